"""Runs on several processes and nodes (on one machine, with one launch per node), and what each prints when one fails."""

import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.multiprocessing as mp

from helpers import SHORT, TINY, TINY_MOCO, columns, error_line, refused
from moco import checkpoint, launch
from processes import ROOT, TORCHRUN, free_port, start, until


def test_one_process_for_each_gpu(tmp_path):
    """MoCo's command: stopped by a signal to the process that starts the others, then evaluated."""
    several = f"--multiprocessing-distributed --world-size 1 --rank 0 --dist-url tcp://localhost:{free_port()}"

    def on_two_gpus(script, *args):
        return start("tests/subprocesses/two_gpus.py", ROOT / script, *args, several, "--output-dir", tmp_path)

    run = on_two_gpus("main_moco_out.py", TINY_MOCO, "--epochs 5000")
    assert "on 2 processes" in until(run, "Epoch: [0]")
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 143 and out.count("stopped ") == 1 and "Traceback" not in out, out
    linear = on_two_gpus("main_lincls.py", TINY, "--epochs 1 --pretrained", tmp_path / "checkpoint_last.pth.tar")
    out = linear.communicate(timeout=100)[0]
    assert linear.returncode == 0 and out.count("result: ") == 1, out


def test_torchrun_forwards_sigterm(tmp_path):
    """The run saves; torchrun exits with 1."""
    run = start("main_moco_out.py", TINY_MOCO, "--epochs 5000 --output-dir", tmp_path, launcher=TORCHRUN)
    assert "on 2 processes" in until(run, "Epoch: [")
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=60)[0]
    assert run.returncode == 1 and out.count("stopped ") == 1, out


def two_nodes(*args, first=(), second=()):
    """Starts main_moco_out.py as on two nodes, with common arguments and some for each node."""
    args = [*args, f"--world-size 2 --dist-url tcp://localhost:{free_port()}"]
    return [start("main_moco_out.py", *args, *more, f"--rank {rank}") for rank, more in enumerate((first, second))]


def test_the_second_of_two_nodes_fails(folder, tmp_path):
    """It prints its error in one line with rank and host; the first node prints that it has lost a process."""
    good, other, broken = (folder(name, train=6) for name in ("good", "other", "broken"))
    (broken / "train/dog/3.png").write_bytes(b"GIF89a, perhaps")
    faults = {
        "nowhere' does not exist": [tmp_path / "nowhere"],
        "'nowhere.pth.tar' does not exist": ["--resume", "nowhere.pth.tar", other],
        "dog/3.png' cannot be read": [broken],
    }
    started = time.monotonic()
    launches = {
        message: two_nodes(SHORT, "--output-dir", tmp_path / str(number), first=[good], second=args)
        for number, (message, args) in enumerate(faults.items())
    }
    for message, runs in launches.items():
        outs = [run.communicate(timeout=60)[0] for run in runs]
        assert time.monotonic() - started < 60
        for rank, (run, out) in enumerate(zip(runs, outs, strict=True)):
            line = error_line(out)
            assert f"(rank {rank} on {socket.gethostname()})" in line, out
            assert (message if rank else "another of the 2 processes") in line, out
            assert run.returncode != 0, out
        assert "note: -b 4 is the global batch, over all 2 nodes" in outs[0]


def test_a_hanging_survivor_is_killed():
    """With NCCL, a survivor can block in a collective and ignore SIGTERM: its launcher kills it."""
    started = time.monotonic()
    run = start("tests/subprocesses/sleeper.py", free_port())
    out = run.communicate(timeout=100)[0]
    assert "error: process 1 of 2 was ended by SIGKILL" in out and "(rank 1 on " in out, out
    survivor = int(out.split("survivor ")[1].split()[0])
    assert run.returncode == 1 and out.count("error: ") == 1 and not Path(f"/proc/{survivor}").exists(), out
    assert time.monotonic() - started < 60


def test_a_node_prints_one_line(tmp_path):
    """Both of its processes fail, and torchrun ends the second before it can print the same error as the first."""
    run = start("main_moco.py", TINY_MOCO, "-b 31 --output-dir", tmp_path, launcher=TORCHRUN)
    out = run.communicate(timeout=60)[0]
    lines = [line for line in out.splitlines() if "main_moco.py: error: " in line]
    assert len(lines) == 1 and "-b 31 cannot be shared equally by 2 processes" in lines[0], out
    assert re.search(r"\(rank [01] on ", lines[0]), lines


SRUN_SCRIPT = """#!/bin/bash
# Stands in for srun: starts the tasks on this machine, forwards SIGUSR1, and exits with the highest of their statuses.
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 "${pids[@]}"' USR1
for ((task = 0; task < SLURM_STEP_NUM_TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
echo $$ > "$FOLDER/srun.pid"
status=0
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    while kill -0 "$pid" 2> /dev/null; do wait "$pid"; code=$?; done
    if ((code > status)); then status=$code; fi
done
exit $status
"""


SCONTROL_SCRIPT = """#!/bin/bash
if [[ $1 == show ]]; then printf "localhost\\nnowhere\\n"; else echo "$@" > "$FOLDER/scontrol.called"; fi
"""


def with_programs(folder, **programs):
    """The environment, with programs that stand in for SLURM's."""
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_sbatch_file(tmp_path):
    """On SLURM's signal before the time limit, the run saves, the job is requeued with the same ID, and it resumes.

    It resumes in one task, which is faster to start than two.
    """
    job = dict(SLURM_JOB_ID="41", SLURM_JOB_NODELIST="n[1-2]", MASTER_PORT=str(free_port()))
    environment = with_programs(tmp_path, srun=SRUN_SCRIPT, scontrol=SCONTROL_SCRIPT)
    environment |= job | {"PYTHON": sys.executable, "FOLDER": str(tmp_path)}
    for tasks, epochs, status in ((2, 5000, 138), (1, 8, 0)):
        environment |= dict(SLURM_STEP_NUM_TASKS=str(tasks), SLURM_NTASKS_PER_NODE=str(tasks))
        args = [ROOT / "main_moco_out.py", TINY_MOCO, f"--epochs {epochs} --bn-splits {2 // tasks}"]
        args += [] if status else ["--resume elsewhere.pth.tar"]  # it has a checkpoint of its own by then
        run = start("scripts/slurm.sh", *args, launcher=["bash"], env=environment, cwd=tmp_path)
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


@pytest.mark.parametrize(
    "status, preempted, requeued",
    [(138, "None", True), (143, "2026-01-01T00:00:00", True), (143, "None", False), (1, "2026-01-01T00:00:00", False)],
)
def test_the_job_is_requeued_if_it_has_saved(status, preempted, requeued, tmp_path):
    """After SIGTERM only if SLURM preempts it: srun sends one, too, when a task fails."""
    job = f"   PreemptEligibleTime=2025-12-31T00:00:00 PreemptTime={preempted}"
    srun = f'#!/bin/bash\necho "$MASTER_ADDR" "$@" > called; exit {status}\n'
    scontrol = (
        f'#!/bin/bash\ncase $1-$2 in show-job) echo "{job}";; show-*) echo here;; *) echo "$@" > requeued;; esac\n'
    )
    job = dict(SLURM_JOB_ID="41", SLURM_JOB_NODELIST="here", MASTER_ADDR="elsewhere", OUTPUT_DIR="runs/slurm-40")
    environment = with_programs(tmp_path, srun=srun, scontrol=scontrol) | job
    done = start("scripts/slurm.sh", "main.py data/", launcher=["bash"], env=environment, cwd=tmp_path)
    assert done.wait(60) == status
    assert (tmp_path / "requeued").exists() == requeued
    called = (tmp_path / "called").read_text()
    assert called.startswith("here ") and "--output-dir runs/slurm-40 --resume auto data/" in called


def test_a_signal_before_the_processes_can_handle_it(monkeypatch):
    """They die of it, and the status is that of a single process."""

    def join(grace_period):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise mp.ProcessExitedException("", 0, 1, -signal.SIGUSR1, "SIGUSR1")

    context = SimpleNamespace(join=join, pids=list)
    monkeypatch.setattr(mp, "start_processes", lambda *args, **options: context)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit, match="138"):
            launch.spawn(print, [{}, {}], None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_the_options_in_the_sbatch_file():
    """One task per GPU, a signal that makes the run save, and one log for all starts of the job."""
    text = (ROOT / "scripts/slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "USR1@120" and "requeue" in options and options["open-mode"] == "append"


def test_a_port_in_use(run, monkeypatch):
    refused(run("main_moco.py", TINY_MOCO, "--world-size 2 --rank 0 --dist-url tcp://localhost"), 2, "HOST:PORT")
    monkeypatch.setattr(os, "environ", {**os.environ})  # a copy, because a launch sets variables in it
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        args = f"--world-size 2 --rank 0 --dist-url tcp://localhost:{port}"
        messages = (f"could not meet at localhost:{port} (--dist-url)", "address already in use")
        refused(run("main_moco.py", TINY_MOCO, "--epochs 1", args), 1, *messages)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies(victim, tmp_path):
    """The other process also ends, within a minute, and prints in one line what happened."""
    runs = two_nodes(TINY_MOCO, "--epochs 5000 --output-dir", tmp_path)
    until(runs[0], "Epoch: [1]")
    runs[victim].kill()
    other = runs[1 - victim]
    out = other.communicate(timeout=60)[0]
    runs[victim].communicate()
    line = error_line(out)
    assert other.returncode == 1 and "another of the 2 processes" in line, out
    assert f"(rank {1 - victim} on {socket.gethostname()})" in line and "[c10d]" not in out, out


def test_a_signal_to_one_of_two_processes(run, tmp_path):
    """Both exit with its status: srun, and so scripts/slurm.sh, sees the highest of all. Resumed, the epoch ends as if whole."""
    args = [TINY_MOCO.replace("--cos", ""), "--output-dir"]  # so that lr does not depend on --epochs
    nodes = two_nodes(*args, tmp_path / "two", "--epochs 5000")
    until(nodes[0], "Epoch: [1]")
    nodes[1].send_signal(signal.SIGUSR1)
    outs = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [138, 138] and "stopped " in outs[0], outs
    epochs = checkpoint.load(tmp_path / "two" / checkpoint.LAST)["epoch"] + 1
    for name, resume in (("two", "--resume auto"), ("one", "")):
        done = run("main_moco_out.py", *args, tmp_path / name, f"--bn-splits 2 --epochs {epochs}", resume)
        assert done.status == 0, done.err
    for column in ("loss", "positives", "positive_similarity"):
        one, two = ([float(x) for (x,) in columns(tmp_path / name / "log.csv", column)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-3), column


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet(rank, run, monkeypatch):
    """The other rank never joins, or rank 0 cannot be reached: one line after PATIENCE (ten minutes, two seconds here)."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=2))
    port = free_port()
    done = run("main_moco.py", TINY_MOCO, f"--world-size 2 --rank {rank} --dist-url tcp://localhost:{port}")
    assert done.status == 1 and "could not meet" in error_line(done.err), done.err


@pytest.mark.parametrize(
    "script, what",
    [
        ("main_moco_out.py", "lr"),
        ("main_moco_out.py", "the training images"),
        ("main_moco_out.py", "the validation images"),
        ("main_lincls.py", "the training images"),
        ("main_lincls.py", "the validation images"),
    ],
)
def test_two_nodes_that_differ_stop_at_the_start(script, what, trained, folder, tmp_path):
    _, last, _ = trained
    moco = ["-a resnet20 --image-size 12 --moco-k 16 --knn-freq 1"]
    more = ["--pretrained", last] if script == "main_lincls.py" else moco
    args = [*more, "-b 8 --epochs 1 --seed 0 --output-dir", tmp_path / "out", "--world-size 2"]
    args += [f"--dist-url tcp://localhost:{free_port()} --rank"]
    one = folder("one", train=8, val=5)
    other = folder("other", train=8, val=4) if "validation" in what else folder("other", train=7, val=5)
    second = ["--lr 0.2", one] if what == "lr" else ["--lr 0.1", other]
    runs = [start(script, *args, rank, *each) for rank, each in enumerate((["--lr 0.1", one], second))]
    for run in runs:
        out = run.communicate(timeout=60)[0]
        assert run.returncode == 2 and f"the processes differ in {what}" in error_line(out), out
