"""Data-loading workers that die, and images that they cannot read."""

import os
import shutil
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import PHOTOS_MOCO, SHORT, error_line, photo, refused
from moco import augment, batches, datasets, distributed
from moco.errors import RunError
from processes import PYTHON, free_port, start, until


def test_workers_end_with_a_run_that_fails(folder, tmp_path):
    """Workers ignore signals, also the SIGTERM that Python sends them at exit; the process must not wait for them."""
    large = folder("large", train=8, size=(120, 100))
    (large / "train/cat/5.png").write_bytes(b"GIF89a, perhaps")
    failing = start("main_moco.py", SHORT, "-j 2 --output-dir", tmp_path, large, launcher=PYTHON)
    out = failing.communicate(timeout=60)[0]
    assert failing.returncode == 1 and "cat/5.png' cannot be read" in out, out


@pytest.mark.parametrize("kind, workers", [("truncated", 2), ("truncated", 0), ("empty", 2), ("16-bit", 2)])
def test_the_error_names_a_file_that_cannot_be_read(kind, workers, run, photos, tmp_path):
    data = photos()
    for name in ("train/dog/3.jpg", "val/dog/3.jpg"):
        if kind == "16-bit":
            Image.fromarray(np.zeros((99, 99), np.uint16)).save(data / name, format="PNG")
        else:
            content = (data / name).read_bytes()
            (data / name).write_bytes(content[: len(content) // 2 if kind == "truncated" else 0])
        done = run("main_moco.py", PHOTOS_MOCO, f"-j {workers} --knn-freq 1 --output-dir", tmp_path / "out", data)
        refused(done, 1, name, "cannot be read")
        shutil.copy(data / name.replace("3", "2"), data / name)


def test_a_worker_that_dies_ends_the_run_in_one_line(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(batches.Crops, "__getitem__", lambda self, item: os.kill(os.getpid(), signal.SIGKILL))
    done = run("main_moco.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "out", photos())
    refused(done, 1, "a data-loading worker died")


def test_a_worker_that_dies_in_a_script(run, photos, tmp_path, monkeypatch):
    data = photos()
    assert run("main_moco.py", PHOTOS_MOCO, "-j 0 --output-dir", tmp_path, data).status == 0
    monkeypatch.setattr(batches.CentreCrops, "__getitem__", lambda self, item: os.kill(os.getpid(), signal.SIGKILL))
    last = tmp_path / "checkpoint_last.pth.tar"
    for script, *args in (("picture.py", tmp_path), ("extract.py", last, data, "--out", tmp_path / "features.npz")):
        refused(run(f"scripts/{script}", *args), 1, "a data-loading worker died")


def test_a_batch_that_cannot_be_passed_on(run, photos, tmp_path, monkeypatch):
    """As where /dev/shm fills up. By itself the worker would print a traceback, and the run would wait for ever."""
    here, dumps = os.getpid(), ForkingPickler.dumps

    def refuse(content, protocol=None):
        if os.getpid() != here:
            raise OSError(28, "No space left on device")
        return dumps(content, protocol)

    monkeypatch.setattr(ForkingPickler, "dumps", refuse)
    done = run("main_moco.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "out", photos())
    refused(done, 1, "a data-loading worker died")


def test_workers_that_cannot_be_started(run, photos, tmp_path, monkeypatch):
    def refuse(loader):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(batches.DataLoader, "__iter__", refuse)
    done = run("main_moco.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "out", photos())
    refused(done, 1, "workers cannot be started: Resource temporarily unavailable", "-j")


def test_a_temporary_folder_with_a_long_name(run, photos, tmp_path, monkeypatch):
    """Workers make a socket in it."""
    monkeypatch.setattr(batches, "gettempdir", lambda: "/" + 75 * "x")
    args = [PHOTOS_MOCO, "--epochs 1 --output-dir", tmp_path / "out", photos()]
    refused(run("main_moco.py", *args, "-j 2"), 1, "TMPDIR '/xxx", "is too long", "-j 0")
    assert run("main_moco.py", *args, "-j 0").status == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_dies_within_a_step(processes, photos, tmp_path):
    """PyTorch's SIGCHLD handler raises an error wherever the main thread is, usually in the network."""
    args = [PHOTOS_MOCO, "--image-size 96 --epochs 500 -j 4", photos(train=16), "--output-dir", tmp_path / "out"]
    args += [f"--world-size {processes} --dist-url tcp://localhost:{free_port()} --rank"]
    runs = [start("main_moco.py", *args, rank) for rank in range(processes)]
    until(runs[0], "Epoch: [0]")
    victim = runs[-1].pid
    os.kill(int(Path(f"/proc/{victim}/task/{victim}/children").read_text().split()[0]), signal.SIGKILL)
    outs = [run.communicate(timeout=60)[0] for run in runs]
    for run, out in zip(runs, outs, strict=True):
        line = error_line(out)
        assert run.returncode == 1, out
        assert ("a data-loading worker died" if run is runs[-1] else "another of the 2 processes") in line


def test_too_little_shared_memory(run, photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(batches, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data = photos()
    refused(run("main_moco.py", PHOTOS_MOCO, "-j 2 --output-dir", tmp_path / "out", data), 1, "--shm-size")
    assert run("main_moco.py", PHOTOS_MOCO, "-j 0 --output-dir", tmp_path / "out", data).status == 0


def test_workers_and_shared_memory_are_of_the_machine(tmp_path, monkeypatch):
    """-j 8 on a machine of four processes: two workers for each, and the shared memory for all eight."""
    photo(np.random.default_rng(0), (40, 40)).save(tmp_path / "a.png")
    split = datasets.Split(torch.zeros(16).long(), ["a"], paths=[str(tmp_path / "a.png")] * 16)
    monkeypatch.setattr(distributed, "processes_on_node", 4)
    monkeypatch.setattr(distributed, "cores", lambda: 16)
    begun, loader = [], batches.DataLoader
    monkeypatch.setattr(
        batches, "DataLoader", lambda *args, **how: begun.append(how["num_workers"]) or loader(*args, **how)
    )
    centre, free = augment.Centre(256, (0.5,) * 3, (0.5,) * 3), [1 << 40]
    usage = batches.shutil.disk_usage("/")
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    images = batches.Centres(split, centre, 1, torch.device("cpu"), workers=8)
    assert len(list(images)) == 16 and begun == [2]
    free[0] = 4 * 6 * 3 * 256 * 256 - 1  # four processes with six batches each, of one image
    with pytest.raises(RunError, match="4 MiB free, and 8 data-loading workers need 5 MiB"):
        next(iter(images))
