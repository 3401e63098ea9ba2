"""Several processes and machines (here: several launches on one), and what each prints when one fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from helpers import ROOT, SHORT, TINY, TINY_MOCO, TWO_PROCESSES, free_port, refused, start, until
from moco import launch


def test_one_process_for_each_gpu(tmp_path):
    """MoCo's own command; a signal to the process that starts the others; the linear evaluation of what it left."""
    words = [
        "tests/subprocesses/two_gpus.py",
        str(ROOT / "main_moco_out.py"),
        *TINY_MOCO.split(),
        "--output-dir",
        str(tmp_path),
    ]
    several = f"--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://localhost:{free_port()}".split()
    run = start(*words, *several, "--epochs", "5000")
    assert "on 2 processes" in until(run, "Epoch: [0]")
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 143 and out.count("stopped ") == 1 and "Traceback" not in out, out
    words = [
        "tests/subprocesses/two_gpus.py",
        str(ROOT / "main_lincls.py"),
        *TINY.split(),
        "--output-dir",
        str(tmp_path),
    ]
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
        assert "note: -b 4 is the global batch, over all 2 nodes" in outs[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_survivor_that_nothing_wakes_is_ended(victim):
    """With NCCL a process can wait for a dead one, deaf to signals: its launcher kills it."""
    begun = time.monotonic()
    run = start("tests/subprocesses/sleeper.py", str(free_port()), str(victim))
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


def test_processes_that_cannot_share_a_batch(tmp_path):
    command = [*TWO_PROCESSES, str(ROOT / "main_moco.py"), *TINY_MOCO.split(), "--epochs", "1", "-b", "31"]
    done = subprocess.run([*command, "--output-dir", str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: -b 31" in line]
    assert len(said) == 1 and "2 processes" in said[0], done.stderr


def test_a_port_in_use(run, monkeypatch):
    refused(run("main_moco.py", TINY_MOCO, "--world-size 2 --rank 0 --dist-url tcp://localhost"), 2, "HOST:PORT")
    monkeypatch.setattr(os, "environ", {**os.environ})  # which gets this process's variables
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        words = f"--world-size 2 --rank 0 --dist-url tcp://localhost:{port}"
        says = (f"could not meet at localhost:{port} (--dist-url)", "address already in use")
        refused(run("main_moco.py", TINY_MOCO, "--epochs 1", words), 1, *says)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies(victim, tmp_path):
    """The other ends as well, within a minute, and says in one line what happened."""
    port = free_port()
    words = [*TINY_MOCO.split(), "--epochs", "5000", "--world-size", "2", "--dist-url", f"tcp://localhost:{port}"]
    words += ["--output-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [start("main_moco_out.py", *words, "--rank", str(rank), env=environment) for rank in (0, 1)]
    until(runs[0], "Epoch: [1]")
    runs[victim].kill()
    other = runs[1 - victim]
    begun = time.monotonic()
    out = other.communicate(timeout=60)[0]
    runs[victim].communicate()
    assert time.monotonic() - begun < 60
    assert other.returncode == 1 and "Traceback" not in out, out
    said = [line for line in out.splitlines() if "error: " in line]
    assert len(said) == 1 and "another of the 2 processes" in said[0], out
    assert f"(rank {1 - victim} on {socket.gethostname()})" in said[0] and "[c10d]" not in out, out


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet(rank, run, monkeypatch):
    """A missing rank, a master that is not there: a clear line when the patience (ten minutes) ends."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=2))
    port = free_port()
    done = run("main_moco.py", TINY_MOCO, f"--world-size 2 --rank {rank} --dist-url tcp://localhost:{port}")
    said = [line for line in done.err.splitlines() if "error: " in line]
    assert done.status == 1 and len(said) == 1 and "could not meet" in said[0], done.err
    assert "Traceback" not in done.err
