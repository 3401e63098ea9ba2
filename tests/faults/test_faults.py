"""Runs that are killed or interrupted, or cannot write to stdout."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import PAGES, README, TINY, TINY_MOCO, assert_equal_runs, rows
from moco import checkpoint
from moco.errors import RunError
from moco.run import Run
from processes import ROOT, start, until

KILLS = int(os.environ.get("KILLS", 3))  # KILLS=50 for a long test


def test_killed_at_random_instants(tmp_path):
    """A run that is killed again and again ends as one that never stopped, bit for bit."""
    args = [TINY_MOCO, "--epochs 20 --knn-freq 14 --output-dir"]
    whole = start("main_moco_in.py", *args, tmp_path / "whole")
    out = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, out
    parts = tmp_path / "parts"
    seconds = sum(float(row["seconds"]) for row in rows(tmp_path / "whole" / "log.csv"))
    rng = random.Random(0)
    killed, reached = 0, 0
    while True:
        started = time.monotonic()
        run = start("main_moco_in.py", *args, parts, "--resume auto")
        line = run.stdout.readline()  # kills before the first line would only interrupt the import of torch
        while line and not line.startswith(("MoCoIn", "Epoch")):
            line = run.stdout.readline()
        if killed < KILLS:
            time.sleep(
                rng.uniform(0, seconds / max(KILLS, 6))
            )  # short, so that the run does not end before the kill, even if the machine gets faster meanwhile
        else:
            run.wait(timeout=300)
        run.kill()
        run.stdout.close()
        status = run.wait()
        if (parts / "log.csv").is_file():
            done = len(rows(parts / "log.csv"))
            assert done >= reached - 1, "lost more than the current epoch"
            reached = done
        if status == 0:
            break
        assert status == -signal.SIGKILL and time.monotonic() - started < 300
        killed += 1
    assert_equal_runs(tmp_path / "whole", parts)
    assert [row["epoch"] for row in rows(parts / "log.csv")] == [str(e) for e in range(20)]
    assert killed >= min(KILLS, 2)


def test_a_second_interrupt_ends_at_once(tmp_path):
    """The first interrupt makes the run save, which takes two minutes in this test."""
    run = start("tests/subprocesses/slow_disk.py", ROOT / "main_moco.py", TINY_MOCO, "--output-dir", tmp_path)
    until(run, "Epoch: [0]")
    os.kill(run.pid, signal.SIGINT)
    until(run, "saving")
    time.sleep(2)  # so that the first interrupt is handled even if this save was the end of an epoch
    os.kill(run.pid, signal.SIGINT)
    out = run.communicate(timeout=30)[0]
    assert run.returncode == -signal.SIGINT and "stopped" not in out and "Traceback" not in out, out


@pytest.mark.parametrize(
    "script, args, device",
    [("main_moco.py", f"{TINY_MOCO} --epochs 1", None), ("scripts/reproduce.py", "--print", "/dev/full")],
)
def test_output_that_cannot_be_written_stops_the_run(tmp_path, script, args, device):
    """A closed pipe, and a full disk."""
    if device and not Path(device).exists():
        pytest.skip(f"there is no {device}")
    if device:
        writer = os.open(device, os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    command = [sys.executable, str(ROOT / script), *args.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, cwd=tmp_path)
    os.close(writer)
    message = f"{Path(script).name}: error: stdout cannot be written: "
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done


@pytest.mark.parametrize("script", ["main_moco.py", "main_lincls.py"])
def test_an_interrupt_that_also_ends_what_reads_stdout(script, run, trained, tmp_path, monkeypatch):
    """A terminal sends Ctrl-C to `tee`, too. The run saves all the same."""
    show = Run.show

    def closed(text):
        raise RunError("stdout cannot be written: Broken pipe")

    def interrupted(self, *args, **values):
        if not self.signal:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr("moco.run.say", closed)
        show(self, *args, **values)

    monkeypatch.setattr(Run, "show", interrupted)
    data, pretrained, _ = trained
    more = {"main_moco.py": "--moco-k 32 -a resnet20", "main_lincls.py": f"--pretrained {pretrained}"}[script]
    done = run(script, more, "--image-size 12 -b 2 -p 1 --seed 0 --output-dir", tmp_path / "out", data)
    assert done.status == 130 and not done.err, done
    (last,) = (tmp_path / "out").glob("*_last.pth.tar")
    assert checkpoint.load(last)["step"] == 2  # it was sent while the first line was printed


def test_a_signal_during_the_last_save(run, tmp_path, monkeypatch):
    """It changes nothing: the run is complete."""
    close = checkpoint.Writer.close

    def signalled(self, failed):
        os.kill(os.getpid(), signal.SIGINT)
        close(self, failed)

    monkeypatch.setattr(checkpoint.Writer, "close", signalled)
    assert run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path).status == 0
    assert checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["epoch"] == 1


def test_the_linear_evaluation_is_interrupted_and_goes_on(run, tmp_path):
    assert run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path).status == 0
    args = [TINY, "--lr 0.1 --epochs 400 --output-dir", tmp_path, "--pretrained", tmp_path / "checkpoint_last.pth.tar"]
    for resume in ("", "--resume auto"):
        linear = start("main_lincls.py", *args, resume)
        assert ("continuing at epoch" in until(linear, "epoch ")) == bool(resume)  # until an epoch is complete
        linear.send_signal(signal.SIGTERM)
        out = linear.communicate(timeout=60)[0]
        assert linear.returncode == 143 and "stopped " in out and "Traceback" not in out, out
    saved = checkpoint.load(tmp_path / "linear_last.pth.tar")
    assert [int(row["epoch"]) for row in rows(tmp_path / "linear.csv")] == list(range(saved["epoch"]))


def test_every_fault_on_the_page_has_its_test():
    _, *faults = [line for line in PAGES["faults.md"].splitlines() if line.startswith("| ")]
    assert faults and all(re.search(r"`test_\w+`", line.split(" | ")[-1]) for line in faults)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", "".join([README, *PAGES.values()])):
        assert f"def {name}(" in tests, name
