"""Two runs in one folder, disks that are full or read-only, files in the way."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers import TINY, TINY_MOCO, full, refused, start, until
from moco import checkpoint


def test_files_in_the_way(run, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint_last.pth.tar.tmp").mkdir(parents=True)
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", out), 1, "could not be written: Is a directory")
    (out / "log.csv").write_bytes(bytes(range(256)) * 9)  # garbage is no row
    (out / "checkpoint_last.pth.tar.tmp").rmdir()
    assert run("main_moco.py", TINY_MOCO, "--epochs 1 --resume auto --output-dir", out).status == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "tensorboard").touch()
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", other), 1, "tensorboard")


def test_a_disk_that_fills_up_stops_the_run(run, tmp_path, monkeypatch):
    run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path)
    before = (tmp_path / "checkpoint_last.pth.tar").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    done = run("main_moco.py", TINY_MOCO, "--epochs 3 --resume auto --output-dir", tmp_path)
    refused(done, 1, "checkpoint_last.pth.tar' could not be written", "the previous one is intact")
    assert (tmp_path / "checkpoint_last.pth.tar").read_bytes() == before


def test_an_output_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "out").touch()
    refused(run("main_moco.py", TINY_MOCO, "--epochs 1 --output-dir", tmp_path / "out"), 1, "out")


def test_two_runs_in_one_folder(run, folder, tmp_path, monkeypatch):
    """The second one waits, and goes on when the first one has saved and ended; else it is refused."""
    monkeypatch.setattr("moco.run.PATIENCE", 1)
    photos = folder(train=16, size=(120, 100))  # in files: a data-loading worker must not keep the lock
    words = [f"-a resnet20 --image-size 8 -b 4 --moco-k 16 --seed 0 -p 1 -j 1 {photos} --output-dir", tmp_path]
    command = ["main_moco.py", *" ".join(map(str, words)).split()]
    first = start(*command)
    until(first, "epoch 0:")
    refused(run("main_moco.py", *words, "--resume auto"), 1, f"process {first.pid} on ", tmp_path, "--output-dir")
    linear = [TINY, "--epochs 1 --output-dir", tmp_path, "--pretrained", tmp_path / "checkpoint_last.pth.tar"]
    assert run("main_lincls.py", *linear).status == 0  # it writes other files
    checkpoint.load(tmp_path / "checkpoint_last.pth.tar")
    first.kill()
    first.communicate()
    epoch = checkpoint.load(tmp_path / "checkpoint_last.pth.tar")["epoch"]
    assert run("main_moco.py", *words, f"--epochs {epoch + 1} --resume auto").status == 0

    monkeypatch.setattr("moco.run.PATIENCE", 60)
    first = start(*command, "--resume", "auto")
    until(first, "Epoch:")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (first.send_signal(signal.SIGTERM), sleep(seconds)))
    done = run("main_moco.py", *words, "--epochs 1 --resume auto")
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
    """A folder on a file system of its own: of a megabyte, or read-only."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("it takes root to mount a file system")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", place], capture_output=True)  # a map of a removed file may be left


@pytest.mark.parametrize("options, says", [("size=1m", "No space left"), ("ro", "Read-only file system")])
def test_a_disk_that_refuses(options, says, run, trained, folder, small_disk, tmp_path):
    """One line, nothing left behind; a read-only disk is met before the work, a full one by its first page."""
    data, last, _ = trained
    disk = small_disk(options)
    free = shutil.disk_usage(disk).free
    outputs = [("export.py", last, disk / f"e.{suffix}") for suffix in ("pth", "safetensors", "onnx")]
    outputs += [("picture.py", tmp_path, "--out", disk / "p.png")]
    many = "--dataset digits --split train"  # 368 kB of features, twice while they become a file
    outputs += [("extract.py", last, many, "--out", disk / "f.npz")]
    outputs += [("extract.py", last, data, "--out", tmp_path / "f.npz", "--picture", disk / "p.png", "--force")]
    for how in ("read-only",) if options == "ro" else ("full", "nearly full"):
        if options != "ro":
            (disk / "filler").write_bytes(bytes(free if how == "full" else free - 40_000))
        for script, *words in outputs:
            refused(run(f"scripts/{script}", *words), 1, says, disk)
            assert {path.name for path in disk.iterdir()} <= {"filler"}


def test_extract_on_a_disk_that_fills_up(trained, small_disk):
    """In a process of its own: it was ended by SIGBUS."""
    disk = small_disk("size=200k")
    done = start(
        "scripts/extract.py", str(trained[1]), *["--dataset", "digits", "--split", "train", "--out"], f"{disk}/f.npz"
    )
    out = done.communicate()[0]
    assert done.returncode == 1 and "f.npz' cannot be written: No space left on device" in out, out
    assert "Traceback" not in out and not list(disk.iterdir())


def test_a_log_on_a_full_disk(small_disk):
    """TensorBoard's thread meets it, too, and must not print a traceback after our line."""
    disk = small_disk("size=600k")
    program = f"""
import sys
from contextlib import suppress
from moco.errors import RunError
from moco.run import Log
log = Log("{disk}/out", "log", ["epoch", "loss"])
with suppress(OSError), open("{disk}/filler", "wb") as file:
    file.write(bytes(1 << 20))
log.write = lambda rows: None  # log.csv, which is rewritten, finds a page; TensorBoard's file needs more
try:
    for epoch in range(1000):
        log.add(epoch, loss=1.0)
except RunError as error:
    print("error:", error, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr
