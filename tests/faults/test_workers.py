"""Data-loading workers that die, and images that they cannot read: one line."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import PHOTOS_MOCO, SHORT, free_port, refused, start, until
from moco import batches


def test_broken_image_among_large_ones(run, folder, tmp_path):
    """Decoded by data-loading workers: named all the same."""
    large = folder("large", train=8, size=(120, 100))
    (large / "train/cat/5.png").write_bytes(b"GIF89a, perhaps")
    for workers in (0, 2):
        done = run("main_moco.py", SHORT, f"--aug-plus -j {workers} --output-dir", tmp_path / "out", large)
        refused(done, 1, "cat/5.png", "cannot be read")
    os.remove(large / "train/cat/5.png")
    assert run("main_moco.py", SHORT, "--aug-plus -j 1 --output-dir", tmp_path / "out", large).status == 0


def test_workers_end_with_a_run_that_fails(folder, tmp_path):
    """They ignore signals, including the one that Python sends them when it ends."""
    large = folder("large", train=8, size=(120, 100))
    (large / "train/cat/5.png").write_bytes(b"GIF89a, perhaps")
    words = f"-a resnet20 --image-size 8 -b 4 --epochs 1 --moco-k 16 -j 2 --output-dir {tmp_path} {large}"
    failing = start("main_moco.py", *words.split())
    out = failing.communicate(timeout=60)[0]
    assert failing.returncode == 1 and "cat/5.png' cannot be read" in out, out


@pytest.mark.parametrize("spoil", ["truncated", "empty", "deep"])
def test_a_file_that_cannot_be_read_is_named(spoil, run, photos, tmp_path):
    data = photos()
    for place in ("train/dog/3.jpg", "val/dog/3.jpg"):
        if spoil == "deep":
            Image.fromarray(np.zeros((99, 99), np.uint16)).save(data / place, format="PNG")
        else:
            content = (data / place).read_bytes()
            (data / place).write_bytes(content[: len(content) // 2 if spoil == "truncated" else 0])
        done = run("main_moco.py", PHOTOS_MOCO, "-j 2 --knn-freq 1 --output-dir", tmp_path / "out", data)
        assert done.status == 1 and len(done.err.splitlines()) == 1
        assert place in done.err and "cannot be read" in done.err
        shutil.copy(data / place.replace("3", "2"), data / place)


def test_a_worker_that_dies_ends_the_run_in_one_line(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(batches.Crops, "__getitem__", lambda self, item: os.kill(os.getpid(), signal.SIGKILL))
    done = run("main_moco.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "out", photos())
    assert done.status == 1 and len(done.err.splitlines()) == 1
    assert "a data-loading worker died" in done.err


def test_a_worker_that_dies_in_a_script(run, photos, tmp_path, monkeypatch):
    data = photos()
    assert run("main_moco.py", PHOTOS_MOCO, "-j 0 --output-dir", tmp_path, data).status == 0
    monkeypatch.setattr(batches.CentreCrops, "__getitem__", lambda self, item: os.kill(os.getpid(), signal.SIGKILL))
    last = tmp_path / "checkpoint_last.pth.tar"
    for script, *words in (("picture.py", tmp_path), ("extract.py", last, data, "--out", tmp_path / "features.npz")):
        refused(run(f"scripts/{script}", *words), 1, "a data-loading worker died")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_dies_within_a_step(processes, photos, tmp_path):
    """PyTorch's handler of SIGCHLD raises an error wherever the main thread is, mostly in the network."""
    words = [
        *PHOTOS_MOCO.split(),
        "--image-size",
        "96",
        "--epochs",
        "500",
        "-j",
        "4",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    words += ["--world-size", str(processes), "--dist-url", f"tcp://localhost:{free_port()}", str(photos(train=16))]
    runs = [start("main_moco.py", *words, "--rank", str(rank)) for rank in range(processes)]
    until(runs[0], "Epoch: [0]")
    victim = runs[-1].pid
    os.kill(int(Path(f"/proc/{victim}/task/{victim}/children").read_text().split()[0]), signal.SIGKILL)
    printed = [run.communicate(timeout=60)[0] for run in runs]
    for rank, run in enumerate(runs):
        said = [line for line in printed[rank].splitlines() if "error: " in line]
        assert run.returncode == 1 and len(said) == 1 and "Traceback" not in printed[rank], printed[rank]
        assert ("a data-loading worker died" if run is runs[-1] else "another of the 2 processes") in said[0]


def test_too_little_shared_memory(run, photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(batches, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data = photos()
    done = run("main_moco.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "out", data)
    assert done.status == 1 and len(done.err.splitlines()) == 1 and "--shm-size" in done.err
    assert run("main_moco.py", PHOTOS_MOCO, "-j 0 --output-dir", tmp_path / "out", data).status == 0
