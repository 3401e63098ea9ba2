"""Ways to launch, several machines (here: several launches on one), and what each of them says when one fails."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from conftest import ROOT, TINY, TINY_MOCO
from moco import distributed, launch
from moco.errors import UsageError
from test_bad_input import SHORT
from test_faults import free_port, start, until

NODE = dict(LOCAL_WORLD_SIZE="4", MASTER_ADDR="gpu07", MASTER_PORT="29500")
TORCHRUN = NODE | dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
MOCO = dict(multiprocessing_distributed=True, world_size=1, rank=0, dist_url="tcp://localhost:10013")
URL = launch.DIST_URL.removeprefix("tcp://")


@pytest.mark.parametrize(
    "gpus, options, ranks, world_size, place",
    [
        (0, {}, None, 1, None),
        (8, {}, None, 1, None),
        (0, MOCO, None, 1, None),
        (1, MOCO, None, 1, None),
        (2, MOCO, range(2), 2, "localhost:10013"),
        (2, dict(multiprocessing_distributed=True), range(2), 2, URL),
        (8, MOCO | dict(world_size=2, rank=1), range(8, 16), 16, "localhost:10013"),
        (1, MOCO | dict(world_size=2, rank=1), range(1, 2), 2, "localhost:10013"),
        (8, dict(world_size=2, rank=0, dist_url="tcp://[::1]:99"), range(1), 2, "::1:99"),
    ],
)
def test_processes_that_options_start(gpus, options, ranks, world_size, place):
    processes = launch.plan({}, gpus, **options)
    if ranks is None:
        assert processes == [{}]
        return
    assert all(tuple(process) == launch.VARIABLES for process in processes)
    numbers = [[int(process[name]) for name in launch.VARIABLES[:4]] for process in processes]
    assert numbers == [[rank, world_size, local, len(ranks)] for local, rank in enumerate(ranks)]
    assert {f"{process['MASTER_ADDR']}:{process['MASTER_PORT']}" for process in processes} == {place}


@pytest.mark.parametrize(
    "gpus, processes, local_rank, gpu, device",
    [
        (0, 2, 1, None, "cpu"),
        (1, 4, 3, None, "cuda:0"),  # each process sees its own GPU, numbered 0
        (4, 4, 3, None, "cuda:3"),
        (4, 1, 0, 2, "cuda:2"),
        (2, 4, 3, None, "4 processes need a GPU each: this machine shows 2"),
        (2, 1, 0, 5, "--gpu 5: this machine shows 2"),
        (0, 1, 0, 0, "--gpu 0: this machine shows 0"),
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


def test_options_that_the_environment_overrides_are_named(capsys):
    options = MOCO | dict(gpu=0)
    assert launch.inherited(TORCHRUN | dict(RANK="0", HOME="/"), **options) == TORCHRUN | dict(RANK="0")
    names = "--multiprocessing-distributed, --gpu, --world-size, --rank, --dist-url"
    assert capsys.readouterr().out.startswith(f"note: {names} ignored: ")
    launch.inherited(TORCHRUN, **options)  # rank 5 says nothing
    launch.inherited(TORCHRUN | dict(RANK="0"), gpu=None, dist_url=launch.DIST_URL)
    assert capsys.readouterr().out == ""


STEP = dict(SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="3")


@pytest.mark.parametrize(
    "environment, options, says",
    [
        (
            dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1"),
            {},
            "not LOCAL_RANK, LOCAL_WORLD_SIZE: use torchrun",
        ),
        (STEP, {}, "8 tasks of this srun step would train alone; use scripts/slurm.sh"),
        (STEP, MOCO, "8 tasks of this srun step would train alone"),
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
def test_environments_that_are_refused(environment, options, says):
    if says is None:
        assert len(launch.plan(environment, 0, **options)) == 1
    else:
        with pytest.raises(UsageError, match=says):
            launch.plan(environment, 0, **options)


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("main_*.py")))
def test_processes_can_be_started_for_every_script(script, run, monkeypatch):
    """A process of torch.multiprocessing gets the worker as a pickle."""
    pickles = []
    monkeypatch.setattr(launch, "launch", lambda worker, **options: pickles.append(ForkingPickler.dumps(worker)))
    words = "--pretrained a.pth.tar" if script == "main_lincls.py" else ""
    assert run(script, TINY, words).status == 0 and pickles


def test_one_process_for_each_gpu(tmp_path):
    """MoCo's own command; a signal to the process that starts the others; the linear evaluation of what it left."""
    words = ["tests/two_gpus.py", str(ROOT / "main_moco_out.py"), *TINY_MOCO.split(), "--output-dir", str(tmp_path)]
    several = f"--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://localhost:{free_port()}".split()
    run = start(*words, *several, "--epochs", "5000")
    assert "on 2 processes" in until(run, "Epoch: [0]")
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 143 and out.count("stopped ") == 1 and "Traceback" not in out, out
    words = ["tests/two_gpus.py", str(ROOT / "main_lincls.py"), *TINY.split(), "--output-dir", str(tmp_path)]
    linear = start(*words, *several, "--epochs", "1", "--pretrained", str(tmp_path / "checkpoint_last.pth.tar"))
    out = linear.communicate(timeout=100)[0]
    assert linear.returncode == 0 and out.count("result: ") == 1, out


def test_what_torchrun_does_with_signals(tmp_path):
    """SIGTERM reaches the processes, which save, and its status is 1; SIGUSR1 ends only torchrun itself."""
    words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(ROOT / "main_moco_out.py")]
    words += [*TINY_MOCO.split(), "--epochs", "5000", "--output-dir", str(tmp_path), "--resume", "auto"]
    for number, status in ((signal.SIGTERM, 1), (signal.SIGUSR1, -signal.SIGUSR1)):
        run = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert "on 2 processes" in until(run, "Epoch: [")
        processes = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        run.send_signal(number)
        if number == signal.SIGUSR1:
            run.wait(timeout=60)
            until(run, "Epoch: [")
            for pid in processes:
                os.kill(pid, signal.SIGKILL)
        out = run.communicate(timeout=60)[0]
        assert len(processes) == 2 and run.returncode == status, out
        assert ("stopped " in out) == (number == signal.SIGTERM), out


def two_nodes(words, *more_words):
    """Two launches on this machine; the words of both, of the first and of the second one."""
    where = f"--world-size 2 --dist-url tcp://localhost:{free_port()}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        start("main_moco_out.py", *map(str, [*words, *where, *more, "--rank", rank]), env=environment)
        for rank, more in enumerate(more_words)
    ]


def test_the_second_of_two_nodes_fails(folder, tmp_path):
    """It says why, in one line with rank and host; the first one says that it has lost the other."""
    good, other, broken = (folder(name, train=6) for name in ("good", "other", "broken"))
    (broken / "train/dog/3.png").write_bytes(b"GIF89a, perhaps")
    faults = {
        "nowhere' does not exist": [tmp_path / "nowhere"],
        "'nowhere.pth.tar' does not exist": ["--resume", "nowhere.pth.tar", other],
        "dog/3.png' cannot be read": [broken],
    }
    begun = time.monotonic()
    launches = {says: two_nodes([*SHORT.split(), "--output-dir", tmp_path], [good], f) for says, f in faults.items()}
    for says, runs in launches.items():
        outs = [run.communicate(timeout=60)[0] for run in runs]
        assert time.monotonic() - begun < 60
        for rank, (run, out) in enumerate(zip(runs, outs, strict=True)):
            said = [line for line in out.splitlines() if "error: " in line]
            assert len(said) == 1 and f"(rank {rank} on {socket.gethostname()})" in said[0], out
            assert (says if rank else "another of the 2 processes") in said[0], out
            assert run.returncode != 0 and "Traceback" not in out, out
        assert "note: -b 4 is the global batch, of all 2 nodes together" in outs[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_survivor_that_nothing_wakes_is_ended(victim):
    """With NCCL a process can wait for a dead one, deaf to signals: its launcher kills it."""
    begun = time.monotonic()
    run = start("tests/sleeper.py", str(free_port()), str(victim))
    out = run.communicate(timeout=100)[0]
    assert f"error: process {victim} of 2 was ended by SIGKILL" in out and f"(rank {victim} on " in out, out
    survivor = int(out.split("survivor ")[1].split()[0])
    assert run.returncode == 1 and out.count("error: ") == 1 and not Path(f"/proc/{survivor}").exists(), out
    assert time.monotonic() - begun < 60


def test_each_node_prints_one_line(tmp_path):
    """Two nodes of two processes, and an error that all four meet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    launcher += ["--master-addr=localhost", f"--master-port={free_port()}"]
    program = [str(ROOT / "main_moco.py"), *TINY_MOCO.split(), "-b", "30", "--output-dir", str(tmp_path)]
    nodes = [
        subprocess.Popen(
            [*launcher, f"--node-rank={node}", *program], env=environment, stderr=subprocess.PIPE, text=True
        )
        for node in (0, 1)
    ]
    for node, run in enumerate(nodes):
        err = run.communicate(timeout=60)[1]
        said = [line for line in err.splitlines() if "main_moco.py: error: " in line]
        assert len(said) == 1 and "-b 30 cannot be shared equally by 4 processes" in said[0], err
        assert re.search(rf"\(rank [{2 * node}{2 * node + 1}] on ", said[0]), said


def test_the_out_of_memory_line_names_what_takes_the_memory():
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CPUAllocator: can't allocate memory")):
        text = str(launch.explained(error))
        assert "-b" in text and "--moco-k" in text and str(error) in text


SRUN_SCRIPT = """#!/bin/bash
# Stands in for srun: two tasks on this machine, which get its signals; its status is their highest.
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 "${pids[@]}"' USR1
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
echo $$ > "$BESIDE/srun.pid"
status=0
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; code=$?; done
    if ((code > status)); then status=$code; fi
done
exit $status
"""


SCONTROL_SCRIPT = """#!/bin/bash
if [[ $1 == show ]]; then printf "localhost\\nnowhere\\n"; else echo "$@" > "$BESIDE/scontrol.called"; fi
"""


def test_the_sbatch_file(tmp_path):
    """SLURM's signal before the time limit: saved, queued again under the same number, resumed."""
    for name, text in (("srun", SRUN_SCRIPT), ("scontrol", SCONTROL_SCRIPT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = dict(SLURM_JOB_ID="41", SLURM_JOB_NODELIST="n[1-2]", SLURM_STEP_NUM_TASKS="2", SLURM_NTASKS_PER_NODE="2")
    job["MASTER_PORT"] = str(free_port())
    environment = {**os.environ, **job, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "BESIDE": str(tmp_path)}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    for epochs, status in (("5000", 138), ("8", 0)):
        words = ["bash", ROOT / "scripts/slurm.sh", ROOT / "main_moco_out.py", *TINY_MOCO.split(), "--epochs", epochs]
        run = subprocess.Popen(
            words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if status:
            assert "on 2 processes" in until(run, "Epoch: [0]")
            os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
        out = run.communicate(timeout=100)[0]
        assert run.returncode == status and "Traceback" not in out, out
        assert ("stopped " in out) == bool(status) and ("continuing at epoch" in out) == (not status), out
        if status:
            assert (tmp_path / "scontrol.called").read_text() == "requeue 41\n"
            (tmp_path / "scontrol.called").unlink()
    assert not (tmp_path / "scontrol.called").exists()
    assert (tmp_path / "runs/slurm-41/checkpoint_0007.pth.tar").is_file()


def test_the_sbatch_file_asks_for_what_the_launch_needs():
    """One task a GPU, a signal that is answered by saving, the log of every start."""
    asks = re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", (ROOT / "scripts/slurm.sh").read_text(), re.MULTILINE)
    asks = dict(asks)
    assert asks["ntasks-per-node"] == asks["gpus-per-node"]
    assert asks["signal"] == "USR1@120" and "requeue" in asks and asks["open-mode"] == "append"


def test_losses_do_not_depend_on_how_processes_and_nodes_are_cut(tmp_path):
    """Eight processes, four of two chunks, two nodes of four chunks and one process of eight."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/worlds.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    losses = {(world, method): values for world, method, values in lines}
    worlds, methods = {world for world, _ in losses}, {method for _, method in losses}
    assert len(worlds) == 4 and len(methods) == 6 and len(losses) == 24
    for (world, method), values in losses.items():
        assert len(values) == 3
        assert values == pytest.approx(losses["alone 1", method], rel=2e-4), (world, method)


@pytest.mark.parametrize("script", ["main_moco_out.py", "main_lincls.py"])
@pytest.mark.parametrize("given", ["", "OMP_WAIT_POLICY=ACTIVE", "GOMP_SPINCOUNT=7"])
def test_threads_wait_as_the_user_says(script, given):
    """Before torch is imported, which reads it; only where nothing is said."""
    program = f"""
import os, runpy, sys
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch())
runpy.run_path("{script}", run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= dict([given.split("=")]) if given else {}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == {"": "1000", "OMP_WAIT_POLICY=ACTIVE": "None"}.get(given, "7"), done.stderr
