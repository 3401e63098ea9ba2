"""The processes that a launch starts, and their devices."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from helpers import TINY, on_processes
from moco import distributed, launch, methods
from moco.errors import RunError, UsageError, say
from moco.run import Run
from processes import ROOT

NODE = dict(LOCAL_WORLD_SIZE="4", MASTER_ADDR="gpu07", MASTER_PORT="29500")
TORCHRUN = NODE | dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
OPTIONS = dict(multiprocessing_distributed=True, world_size=1, rank=0, dist_url="tcp://localhost:10013")
URL = launch.DIST_URL.removeprefix("tcp://")


@pytest.mark.parametrize(
    "gpus, options, ranks, world_size, master",
    [
        (0, {}, None, 1, None),
        (8, {}, None, 1, None),
        (0, OPTIONS, None, 1, None),
        (1, OPTIONS, None, 1, None),
        (2, OPTIONS, range(2), 2, "localhost:10013"),
        (2, dict(multiprocessing_distributed=True), range(2), 2, URL),
        (8, OPTIONS | dict(world_size=2, rank=1), range(8, 16), 16, "localhost:10013"),
        (1, OPTIONS | dict(world_size=2, rank=1), range(1, 2), 2, "localhost:10013"),
        (8, dict(world_size=2, rank=0, dist_url="tcp://[::1]:99"), range(1), 2, "::1:99"),
    ],
)
def test_processes_that_options_start(gpus, options, ranks, world_size, master):
    processes = launch.plan({}, gpus, **options)
    if ranks is None:
        assert processes == [{}]
        return
    assert all(tuple(process) == launch.VARIABLES for process in processes)
    numbers = [[int(process[name]) for name in launch.VARIABLES[:4]] for process in processes]
    assert numbers == [[rank, world_size, local, len(ranks)] for local, rank in enumerate(ranks)]
    assert {f"{process['MASTER_ADDR']}:{process['MASTER_PORT']}" for process in processes} == {master}


@pytest.mark.parametrize(
    "gpus, processes, local_rank, gpu, device",
    [
        (0, 2, 1, None, "cpu"),
        (1, 4, 3, None, "cuda:0"),  # each process sees its own GPU, numbered 0
        (4, 4, 3, None, "cuda:3"),
        (4, 1, 0, 2, "cuda:2"),
        (2, 4, 3, None, "4 processes need one GPU each, but only 2 are visible"),
        (2, 1, 0, 5, "--gpu 5: this machine has 2 visible GPUs"),
        (0, 1, 0, 0, "--gpu 0: this machine has 0 visible GPUs"),
    ],
)
def test_the_device_of_a_process(gpus, processes, local_rank, gpu, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "processes_on_node", processes)
    monkeypatch.setattr(distributed, "local_rank", local_rank)
    if "GPU" in device or "--gpu" in device:
        with pytest.raises(UsageError, match=device):
            launch.choose_device(gpu)
    else:
        assert str(launch.choose_device(gpu)) == device


def test_a_note_names_the_options_that_the_environment_overrides(capsys):
    options = OPTIONS | dict(gpu=0)
    assert launch.inherited(TORCHRUN | dict(RANK="0", HOME="/"), **options) == TORCHRUN | dict(RANK="0")
    names = "--multiprocessing-distributed, --gpu, --world-size, --rank, --dist-url"
    assert capsys.readouterr().out.startswith(f"note: {names} ignored: ")
    launch.inherited(TORCHRUN, **options)  # only rank 0 prints, and this is rank 5
    launch.inherited(TORCHRUN | dict(RANK="0"), gpu=None, dist_url=launch.DIST_URL)
    assert capsys.readouterr().out == ""


STEP = dict(SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="3")


@pytest.mark.parametrize(
    "environment, options, message",
    [
        (
            dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1"),
            {},
            "not LOCAL_RANK, LOCAL_WORLD_SIZE: use torchrun",
        ),
        (STEP, {}, "8 tasks of this srun step would train a model of its own; use scripts/slurm.sh"),
        (STEP, OPTIONS, "8 tasks of this srun step would train a model of its own"),
        ({}, dict(dist_url="file:///tmp/meet"), "file:///tmp/meet': use tcp://HOST:PORT, or .* torchrun"),
        ({}, dict(dist_url="tcp://localhost"), "tcp://HOST:PORT"),
        ({}, dict(world_size=2, rank=2), "--rank 2 is not one of the 2 nodes"),
        ({}, dict(world_size=2), "--rank -1 is not one of the 2 nodes"),
        (dict(RANK="0", WORLD_SIZE="1"), {}, None),  # a PyTorchJob of one pod
        (dict(SLURM_JOB_ID="7", SLURM_NTASKS="8", SLURM_PROCID="0"), {}, None),  # the shell of a batch script
        (STEP | dict(SLURM_STEP_NUM_TASKS="1"), {}, None),  # srun --pty bash
        (STEP, dict(world_size=8, rank=3), None),  # the options tell the tasks apart
    ],
)
def test_environments_that_are_refused(environment, options, message):
    if message is None:
        assert len(launch.plan(environment, 0, **options)) == 1
    else:
        with pytest.raises(UsageError, match=message):
            launch.plan(environment, 0, **options)


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("main_*.py")))
def test_the_worker_of_every_script_can_be_pickled(script, run, monkeypatch):
    """torch.multiprocessing passes it to the processes that it starts."""
    workers = []
    monkeypatch.setattr(launch, "launch", lambda worker, **_: ForkingPickler.dumps(worker) and workers.append(worker))
    args = "--pretrained a.pth.tar" if script == "main_lincls.py" else ""
    assert run(script, TINY, args).status == 0 and workers
    assert script == "main_lincls.py" or workers[0].args[0] is methods.ALL[script]


def test_a_process_that_leaves_ignores_later_signals(monkeypatch, tmp_path):
    """Its own that comes late, and srun's SIGTERM as soon as another has left: its status must stay that of the first."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    sizes = dict(epochs=1, steps=3, images=6, batch_size=2)
    before = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
    try:
        with pytest.raises(SystemExit), Run(tmp_path, "log", "last", ["epoch"], 1, torch.device("cpu"), "", **sizes):
            raise SystemExit(138)
        after = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
        assert after == before | {signal.SIGUSR1: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_different_signals_stop_all_processes_with_the_same(tmp_path):
    def sync():
        sizes = dict(epochs=1, steps=3, images=6, batch_size=2)
        run = Run(tmp_path, "log", "last", ["epoch"], 1, torch.device("cpu"), "", **sizes)
        run.signal, run.saved = (signal.SIGTERM, signal.SIGUSR1)[distributed.rank()], time.perf_counter()
        for step, _ in run.steps(range(3)):
            run.add(step, torch.tensor(1.0))
            run.sync(step, 0.1)
            return run.stopping, run.saving

    assert on_processes(sync, 2) == [(signal.SIGUSR1, True)] * 2


def test_the_out_of_memory_error_names_options_to_reduce():
    errors = ["CPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"]
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError("1 GiB"), *map(RuntimeError, errors)):
        text = str(launch.explained(error))
        assert "-b" in text and "--moco-k" in text and str(error) in text


def test_memory_that_runs_out_while_a_cuda_graph_is_recorded():
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nMore lines")
    except RuntimeError as error:
        assert "--no-compile may fit (CUDA out of memory.)" in str(launch.explained(error))


def test_errors_outside_of_a_run_are_one_line(capsys):
    for error, message in (
        (PermissionError(13, "Permission denied", "data/train"), "'data/train': Permission denied"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
    ):
        with pytest.raises(SystemExit, match="1"), launch.reporting():
            raise error
        assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_closed_outputs(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as Python has it after >&- 2>&-
    with pytest.raises(SystemExit, match="2"), launch.reporting():
        say("nobody reads this")
        raise UsageError("nor this")
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_is_freed_on_a_cpu_is_used_again():
    program = """
import resource, torch
from moco import launch
def count_new_pages(device):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(1 << 24)  # 64 MB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
count_new_pages("cpu")
launch.launch(count_new_pages)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    by_default, kept = map(int, done.stdout.split())
    # Not all of them: small objects may take the place of a freed tensor.
    assert 2 * kept < by_default, done


def test_a_gpu_that_cannot_be_used(monkeypatch):
    def refuse(device):
        raise RuntimeError("The NVIDIA driver on your system is too old.\nMore lines")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(RunError, match="the GPU cannot be used: The NVIDIA driver on your system is too old"):
        launch.choose_device()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("NCCL error in: a.cpp:77, invalid usage\nLast error:\nDuplicate GPU detected", "Duplicate GPU detected"),
        ("NCCL error in: a.cpp:77, internal error.\nLast error:\n", "NCCL error in: a.cpp:77, internal error."),
        ("[1] is setting up NCCL: Connection reset\nframe #0", "[1] is setting up NCCL: Connection reset"),
    ],
)
def test_the_reason_that_nccl_gives(text, reason, monkeypatch):
    def refuse(*args, **options):
        raise torch.distributed.DistBackendError(text)

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    with pytest.raises(RunError, match=re.escape(f"NCCL cannot connect the 2 processes: {reason}") + "$"):
        launch.join_group(torch.device("cpu"), "nccl", 2)


@pytest.mark.parametrize(
    "script, given",
    [
        ("main_moco_out.py", ""),
        ("main_moco_out.py", "OMP_WAIT_POLICY=ACTIVE"),
        ("main_moco_out.py", "GOMP_SPINCOUNT=7"),
        ("main_lincls.py", ""),
        ("scripts/extract.py", ""),
        ("scripts/bench.py", ""),
    ],
)
def test_the_default_of_gomp_spincount(script, given):
    """Scripts set it before they import torch, which reads it, unless the user has set how threads wait."""
    program = f"""
import os, runpy, sys
class PrintAtImport:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, PrintAtImport())
runpy.run_path("{script}", run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= dict([given.split("=")]) if given else {}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == {"": "1000", "OMP_WAIT_POLICY=ACTIVE": "None"}.get(given, "7"), done.stderr
