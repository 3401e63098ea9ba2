"""Ways to launch, several machines (here: several launches on one), and what each of them says when one fails."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, TINY_MOCO
from moco import datasets, distributed, launch
from moco.errors import UsageError
from moco.launch import plan
from test_bad_input import SHORT
from test_faults import free_port, start, until

TORCHRUN = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", GROUP_RANK="1", MASTER_ADDR="a")
JOB = dict(SLURM_JOB_ID="7", SLURM_NTASKS="8", SLURM_JOB_NODELIST="gpu[07-08]", SLURM_NODEID="0", SLURM_PROCID="0")
STEP = JOB | dict(SLURM_STEP_NUM_TASKS="8", SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_STEP_NODELIST="gpu[07-08]")
SRUN = STEP | dict(SLURM_PROCID="7", SLURM_LOCALID="3", SLURM_NODEID="1", SLURM_STEP_ID="2")
UNEVEN = SRUN | dict(SLURM_STEP_NUM_TASKS="7", SLURM_STEP_TASKS_PER_NODE="4,3", SLURM_PROCID="6", SLURM_LOCALID="2")
NODES = SRUN | dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_PROCID="1", SLURM_LOCALID="0")
KUBERNETES = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="job-master-0", MASTER_PORT="23456")
ALL = dict(multiprocessing_distributed=True, world_size=1, rank=0, dist_url="tcp://localhost:10013")
TCP = "tcp://gpu07:10010"


@pytest.mark.parametrize(
    "environment, gpus, options, processes, rank, device, on_node, url",
    [
        (TORCHRUN, 4, {}, 8, 5, 1, 4, "env://"),
        (TORCHRUN, 4, ALL | dict(gpu=0), 8, 5, 1, 4, "env://"),
        (TORCHRUN | SRUN, 4, {}, 8, 5, 1, 4, "env://"),  # torchrun inside an srun step
        (TORCHRUN, 0, {}, 8, 5, "cpu", 4, "env://"),
        (SRUN, 4, {}, 8, 7, 3, 4, TCP),
        (SRUN, 4, ALL, 8, 7, 3, 4, "tcp://localhost:10013"),
        (SRUN, 1, {}, 8, 7, 0, 4, TCP),  # --gpus-per-task=1: each task sees one, numbered 0
        (SRUN, 0, {}, 8, 7, "cpu", 4, TCP),
        (UNEVEN, 4, {}, 7, 6, 2, 3, TCP),
        (SRUN | dict(MASTER_ADDR="10.0.0.1", MASTER_PORT="99"), 4, {}, 8, 7, 3, 4, "tcp://10.0.0.1:99"),
        (NODES, 4, {}, 2, 1, 0, 1, TCP),
        (NODES, 4, dict(multiprocessing_distributed=True), 8, 4, range(4), 4, TCP),
        (JOB, 4, {}, 1, 0, 0, 1, launch.DIST_URL),  # sbatch's own shell
        (JOB, 4, dict(multiprocessing_distributed=True), 4, 0, range(4), 4, launch.DIST_URL),
        (JOB | dict(SLURM_STEP_NUM_TASKS="1"), 4, {}, 1, 0, 0, 1, launch.DIST_URL),  # srun --pty bash
        (KUBERNETES, 8, {}, 16, 8, range(8), 8, "tcp://job-master-0:23456"),
        (KUBERNETES, 8, ALL, 16, 8, range(8), 8, "tcp://job-master-0:23456"),
        (KUBERNETES, 1, {}, 2, 1, 0, 1, "tcp://job-master-0:23456"),
        (KUBERNETES, 0, {}, 2, 1, "cpu", 1, "tcp://job-master-0:23456"),
        (dict(RANK="0", WORLD_SIZE="1"), 8, {}, 8, 0, range(8), 8, launch.DIST_URL),
        ({}, 0, {}, 1, 0, "cpu", 1, launch.DIST_URL),
        ({}, 8, {}, 1, 0, 0, 1, launch.DIST_URL),
        ({}, 8, dict(gpu=3), 1, 0, 3, 1, launch.DIST_URL),
        ({}, 0, ALL, 1, 0, "cpu", 1, "tcp://localhost:10013"),
        ({}, 2, ALL, 2, 0, range(2), 2, "tcp://localhost:10013"),
        ({}, 8, ALL | dict(world_size=2, rank=1), 16, 8, range(8), 8, "tcp://localhost:10013"),
        ({}, 8, dict(world_size=2, rank=1, gpu=3), 2, 1, 3, 1, launch.DIST_URL),
        (dict(RANK="1"), 8, {}, 1, 0, 0, 1, launch.DIST_URL),
    ],
)
def test_environments(environment, gpus, options, processes, rank, device, on_node, url, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    process, spawning, _ = plan(environment, gpus, **options)
    assert (process.world_size, process.rank, process.on_node, process.url) == (processes, rank, on_node, url)
    assert spawning == isinstance(device, range)
    spawned = [dataclasses.replace(process, local_rank=i) for i in device] if spawning else [process]
    devices = [launch.choose_device(each) for each in spawned]
    assert devices == [
        torch.device("cuda", i) if i != "cpu" else torch.device(i) for i in (device if spawning else [device])
    ]


@pytest.mark.parametrize(
    "environment, options, ignored",
    [
        (TORCHRUN, ALL, "--multiprocessing-distributed, --world-size, --rank, --dist-url"),
        (TORCHRUN, dict(gpu=1), "--gpu"),
        (SRUN, ALL, "--multiprocessing-distributed, --world-size, --rank"),
        (NODES, ALL, "--world-size, --rank"),
        (KUBERNETES, ALL, "--world-size, --rank, --dist-url"),
        (KUBERNETES, dict(multiprocessing_distributed=True, gpu=1), None),
        (TORCHRUN, {}, None),
        (SRUN, {}, None),
        ({}, ALL, None),
    ],
)
def test_options_that_the_environment_overrides_are_named(environment, options, ignored):
    note = plan(environment, 4, **options)[2]
    assert note.endswith(f": {ignored} ignored") if ignored else note == ""


def test_environments_that_cannot_be():
    for environment, says in (
        (TORCHRUN | dict(LOCAL_RANK="first"), "LOCAL_RANK is 'first'"),
        (KUBERNETES | dict(RANK="2"), "--rank 2 is not one of the 2 nodes"),
        (KUBERNETES | dict(MASTER_PORT="x"), "MASTER_PORT"),
    ):
        with pytest.raises(UsageError, match=says):
            plan(environment, 4)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("n1,n2", "n1"),
        ("a-[1,3]-ib", "a-1-ib"),
        ("single", "single"),
    ],
)
def test_where_an_srun_step_meets(nodes, first):
    assert launch.meeting_point(dict(SLURM_STEP_NODELIST=nodes, SLURM_JOB_ID="123456")) == f"tcp://{first}:13457"


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="process 3 of 4 has no GPU: this machine shows 2"):
        launch.choose_device(plan(SRUN, 2)[0])
    with pytest.raises(UsageError, match="no GPU 5: this machine shows 2"):
        launch.choose_device(plan({}, 2, gpu=5)[0])


def two_nodes(words, *more_words):
    """Two launches on this machine; the words of both, of the first and of the second one."""
    where = f"--world-size 2 --dist-url tcp://localhost:{free_port()}".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        start("main_moco_out.py", *map(str, [*words, *where, *more, "--rank", rank]), env=environment)
        for rank, more in enumerate(more_words)
    ]


def test_the_second_of_two_nodes_fails(folder, tmp_path):
    """Each node says in one line, with rank and host, what has happened; all end within a minute."""
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
            assert says in said[0] and run.returncode != 0 and "Traceback" not in out, out
            assert rank == 1 or "another of the 2 processes" in said[0], out
        assert "note: -b 4 is the global batch, of all 2 nodes together" in outs[0]


def test_a_survivor_that_nothing_wakes_is_ended():
    """With NCCL a process can wait for a dead one without an error of its own: here it sleeps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pairs = []
    for victim in "01":
        words = ["tests/sleeper.py", str(free_port()), victim]
        pairs.append([start(*words, rank, env=environment) for rank in "01"])
    for victim, runs in enumerate(pairs):
        out = re.sub(r"\[Gloo\].*\n", "", runs[1 - victim].communicate(timeout=60)[0])  # PyTorch 2.8 says so itself
        runs[victim].communicate(timeout=60)
        silent = f"rank 1 on {socket.gethostname()} has sent no heartbeat"
        assert (silent if victim else "rank 0 cannot be reached") in out and f"(rank {1 - victim} on " in out, out
        assert runs[1 - victim].returncode == 1 and out.count("error: ") == out.count("\n") == 1, out


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


def test_images_that_the_gpu_has_no_room_for_stay_in_their_files(folder, monkeypatch):
    place = folder(train=4)
    size = 8 * 3 * 12 * 12
    for free, kept in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        monkeypatch.setattr(distributed, "total", lambda value, device: float(value))
        assert datasets.fits(size, torch.device("cuda")) == kept and datasets.fits(size, torch.device("cpu"))
        monkeypatch.setattr(datasets, "fits", lambda size, device, kept=kept: kept)
        split = datasets.load("imagefolder", place, True)
        assert (split.images is not None) == kept and len(split.paths) == 8
        monkeypatch.undo()


def test_the_out_of_memory_line_names_what_takes_the_memory():
    error = launch.explained(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"), launch.Process())
    assert "-b" in str(error) and "--moco-k" in str(error)
    error = launch.explained(RuntimeError("DefaultCPUAllocator: can't allocate memory"), launch.Process())
    assert "-b" in str(error)


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


def test_the_sbatch_file(tmp_path):
    """SLURM's signal before the time limit: saved, queued again under the same number, resumed."""
    for name, text in (("srun", SRUN_SCRIPT), ("scontrol", '#!/bin/bash\necho "$@" > "$BESIDE/scontrol.called"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    step = dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="localhost")
    job = step | dict(SLURM_JOB_ID="41", SLURM_NODEID="0", SLURM_STEP_ID="0", MASTER_PORT=str(free_port()))
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
        assert ("stopped " in out) == bool(status) and ("going on with epoch" in out) == (not status), out
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
    assert len(worlds) == 4 and len(methods) == 5 and len(losses) == 20
    for (world, method), values in losses.items():
        assert len(values) == 3
        assert values == pytest.approx(losses["alone 1", method], rel=2e-4), (world, method)
