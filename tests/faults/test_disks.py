"""Two runs in one folder, full and read-only disks, and paths that cannot be written."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import SHORT, TINY, TINY_MOCO, no_space, refused
from moco import checkpoint
from processes import start, until


def test_paths_that_cannot_be_written(run, tmp_path):
    """A folder where a checkpoint is to be written, a log that is not CSV, a file where TensorBoard needs a folder."""
    out = tmp_path / "out"
    (out / "checkpoint_last.pth.tar.tmp").mkdir(parents=True)
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", out), 1, "could not be written: Is a directory")
    (out / "log.csv").write_bytes(bytes(range(256)) * 9 + bytes(200_000))  # has no valid row, and a long one
    (out / "checkpoint_last.pth.tar.tmp").rmdir()
    assert run("main_moco.py", TINY_MOCO, "--epochs 1 --resume auto --output-dir", out).status == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "tensorboard").touch()
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", other), 1, "tensorboard")


def test_a_disk_that_fills_up_stops_the_run(run, tmp_path, monkeypatch):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    monkeypatch.setattr(torch, "save", lambda content, file: no_space(file))
    done = run("main_moco.py", TINY_MOCO, "--epochs 3 --resume auto --output-dir", tmp_path)
    refused(done, 1, "checkpoint_last.pth.tar' could not be written", "the previous one is intact")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


def test_an_output_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "out").touch()
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path / "out"), 1, tmp_path / "out")


def test_two_runs_in_one_folder(run, folder, tmp_path, monkeypatch):
    """The second run waits for the first to save and end, then continues it; after PATIENCE seconds it is refused."""
    monkeypatch.setattr("moco.run.PATIENCE", 1)
    large = folder(train=16, size=(120, 100))  # decoded by a data-loading worker, which must not inherit the lock
    args = [SHORT, "--epochs 1000 -p 1 -j 1", large, "--output-dir", tmp_path]
    first = start("main_moco.py", *args)
    until(first, "epoch 0:")
    refused(run("main_moco.py", *args, "--resume auto"), 1, f"process {first.pid} on ", tmp_path, "--output-dir")
    linear = [TINY, "--epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "checkpoint_last.pth.tar"]
    assert run("main_lincls.py", *linear).status == 0  # writes other files, so it has a lock of its own
    checkpoint.load(tmp_path / "checkpoint_last.pth.tar")
    first.kill()
    first.communicate()
    epoch = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["epoch"]
    assert run("main_moco.py", *args, f"--epochs {epoch + 1} --resume auto").status == 0

    monkeypatch.setattr("moco.run.PATIENCE", 60)
    first = start("main_moco.py", *args, "--resume auto")
    until(first, "Epoch:")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (first.send_signal(signal.SIGTERM), sleep(seconds)))
    done = run("main_moco.py", *args, "--epochs 1 --resume auto")
    stopped = first.communicate()[0]
    assert first.returncode == 143 and "stopped" in stopped
    assert f"note: process {first.pid} on " in done.out and "nothing left to do" in done.out, done


def test_a_file_system_without_locks(run, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    done = run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    assert done.status == 0 and f"note: '{tmp_path}' cannot be locked (No locks available)" in done.out


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options) mounts a file system with these options of tmpfs and returns its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    sudo = ["sudo", "-n"] if os.geteuid() and shutil.which("sudo") else []

    def mount(options):
        done = subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True)
        if done.returncode:
            pytest.skip("only root can mount a file system")
        return disk

    yield mount
    subprocess.run([*sudo, "umount", "--lazy", disk], capture_output=True)  # lazily: a removed file may still be mapped


@pytest.mark.parametrize("options, message", [("size=1m", "No space left"), ("ro", "Read-only file system")])
def test_a_disk_that_refuses(options, message, run, trained, folder, small_disk, tmp_path):
    """One line, and no partial file."""
    data, last, _ = trained
    disk = small_disk(options)
    free = shutil.disk_usage(disk).free
    outputs = [("export.py", last, disk / f"e.{suffix}") for suffix in ("pth", "safetensors", "onnx")]
    outputs += [("picture.py", tmp_path, "--out", disk / "p.png")]
    many = "--dataset digits --split train"  # 368 kB of features, and as much again while the file is written
    outputs += [("extract.py", last, many, "--out", disk / "f.npz")]
    outputs += [("extract.py", last, data, "--out", tmp_path / "f.npz", "--picture", disk / "p.png", "--force")]
    for how in ("read-only",) if options == "ro" else ("full", "nearly full"):
        if options != "ro":
            (disk / "filler").write_bytes(bytes(free if how == "full" else free - 40_000))
        for script, *args in outputs:
            refused(run(f"scripts/{script}", *args), 1, message, disk)
            assert {path.name for path in disk.iterdir()} <= {"filler"}


def test_extract_on_a_disk_that_fills_up(trained, small_disk):
    """In a process of its own, because writing to a memory map on a full disk can end it with SIGBUS."""
    disk = small_disk("size=200k")
    done = start("scripts/extract.py", trained[1], "--dataset digits --split train --out", disk / "f.npz")
    out = done.communicate()[0]
    assert done.returncode == 1 and "f.npz' cannot be written: No space left on device" in out, out
    assert "Traceback" not in out and not list(disk.iterdir())


def test_a_log_on_a_full_disk(small_disk, tmp_path):
    """TensorBoard's thread gets the same error, and must not print a traceback after our line."""
    disk = small_disk("size=600k")
    program = f"""
import sys
from contextlib import suppress
from pathlib import Path
from moco.errors import RunError
from moco.run import Log
log = Log("{disk}/out", "log", ["epoch", "loss"])
with suppress(OSError), open("{disk}/filler", "wb") as file:
    file.write(bytes(1 << 20))
log.path = Path("{tmp_path}/log.csv")  # only TensorBoard's file is to meet the full disk
try:
    for epoch in range(1000):
        log.add(epoch, loss=1.0)
except RunError as error:
    print("error:", error, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr
