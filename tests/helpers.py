"""What several test modules and their programs in subprocesses/ share: options, images, and how to start and read a run."""

import argparse
import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from moco import checkpoint, encoders
from moco.datasets import CIFAR10
from moco.run import Run, read_log

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = CIFAR10
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
SCRIPTS = ["main_moco.py", "main_moco_in.py", "main_moco_out.py", "main_moco_suploss.py"]

# A run of seconds: 160 of scikit-learn's digits as 8x8 images, resnet20, five steps an epoch.
TINY = "-a resnet20 --dataset digits --image-size 8 --per-class 16 -b 32 --seed 0 -p 1"
TINY_MOCO = f"{TINY} --moco-k 80 --moco-dim 16 --warm-up 1 --mlp --aug-plus --cos"
# The same for image folders: of the fixture `folder`, with and without a queue, and of the fixture `photos`.
TINY_FOLDER = "-a resnet20 --image-size 12 -b 8 --epochs 1 --seed 0"
SHORT = "-a resnet20 --image-size 8 -b 4 --epochs 1 --moco-k 16 --seed 0"
PHOTOS = "-a resnet20 --image-size 16 -b 8 --epochs 2 --warm-up 0 --seed 0 -p 1"
PHOTOS_MOCO = f"{PHOTOS} --moco-k 16 --moco-dim 16 --aug-plus"
SIZES = [(120, 100), (100, 140), (97, 97), (300, 64)]
# Starts a script on two processes, on a port that is free.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
TWO_PROCESSES += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def images(count, height=32, width=32):
    """Smooth images, noise, saturated ones and gray ones, as (count, 3, height, width) uint8."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (count, height, width, 3))
    smooth = np.linspace(0, 255, width)[None, None, :, None] * rng.random((count, 1, 1, 3)) + 0 * noise
    saturated = (rng.random((count, height, width, 3)) > 0.5) * 255
    gray = noise.mean(3, keepdims=True) + 0 * noise
    kinds = np.stack([noise, smooth, saturated, gray])[np.arange(count) % 4, np.arange(count)]
    return torch.from_numpy(kinds.astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def refused(done, status, *says):
    """Nothing but one line on stderr, with all of these words."""
    lines = [line for line in done.err.splitlines() if line]
    assert done.status == status, (done.status, done.out, done.err)
    assert len(lines) == 1 and "error: " in lines[0], done.err
    for word in says:
        assert str(word) in lines[0], lines[0]


def full(file):
    raise OSError(28, "No space left on device")


def start(script, *words, **more):
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def until(run, begins):
    """Reads what a run prints, to the first line that begins so."""
    lines = []
    while not lines or not lines[-1].startswith(begins):
        lines.append(run.stdout.readline())
        assert lines[-1], "it has ended"
    return "".join(lines)


def photo(rng, size):
    return Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize(size, Image.BICUBIC)


def losses(folder):
    return [row["loss"] for row in read_log(folder / "log.csv")]


def add_unlabelled(data, count=5, size=(12, 12)):
    """Puts images of every class into unlabelled/, of other names and pixels, some of them in a folder below it."""
    (data / "unlabelled/more").mkdir(parents=True)
    for n in range(count):
        image = Image.new("RGB", size, (40 * n, 90, 10))
        image.save(data / "unlabelled" / ("more" if n % 2 else "") / f"u{n}.png")
    return data


def copied_pages(place):
    """README.md and docs/ in a folder of their own."""
    for name, text in {"README.md": README, **{f"docs/{name}": text for name, text in PAGES.items()}}.items():
        path = place / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return place / "pages"


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def printed_losses(out):
    """Of every step, at -p 1."""
    return [float(line.split("Loss ")[1].split()[0]) for line in out.splitlines() if line.startswith("Epoch: [")]


def end(folder):
    """Weights, queue, optimizer state, and the log without its times."""
    saved = checkpoint.load(folder / "checkpoint_last.pth.tar")
    state = {f"momentum of {i}": s["momentum_buffer"] for i, s in saved["optimizer"]["state"].items()}
    log = [[row["epoch"], row["loss"], row["lr"], row["accuracy"]] for row in rows(folder / "log.csv")]
    return saved["state_dict"] | state, log


def same(first, second):
    assert first[1] == second[1]
    assert set(first[0]) == set(second[0])
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name


def random_statistics(network):
    """As if it were trained: batch norm that does something."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.3, 0.3, generator=generator)
    return network.eval()


def supcontrasts(network):
    """A checkpoint as SupContrast's scripts save it: other names, and their options beside it."""
    state = {n.replace("downsample", "shortcut"): v for n, v in network.state_dict().items() if not n.startswith("fc.")}
    state = {f"encoder.module.{name}": value for name, value in state.items()} | {"head.0.weight": torch.zeros(3, 3)}
    return {
        "opt": argparse.Namespace(model="resnet18", lr_decay_epochs=[700]),
        "model": state,
        "optimizer": {},
        "epoch": 3,
    }


def foreign(tmp_path, kind):
    """A file of someone else's weights, and their network."""
    path = tmp_path / f"theirs.{'safetensors' if kind == 'timm' else 'pth'}"
    if kind == "timm":
        timm = pytest.importorskip("timm")
        from safetensors.torch import save_file

        network = random_statistics(timm.create_model("resnet18", num_classes=7))
        save_file(network.state_dict(), path)
    elif kind == "SupContrast":
        network = random_statistics(encoders.build("resnet18")(num_classes=7))
        torch.save(supcontrasts(network), path)
    else:
        network = random_statistics(models.resnet18(num_classes=7))
        state = network.state_dict()
        if kind == "old torchvision":  # before version 0.2
            state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        torch.save(state, path)
    network.fc = torch.nn.Identity()
    return path, network


def interrupt(patch, lines, number=signal.SIGTERM):
    """Runs in this process get a signal when they have printed so many lines of progress (at -p 1, steps)."""
    show, seen = Run.show, []

    def shown(self, done, **values):
        show(self, done, **values)
        seen.append(done)
        if len(seen) == lines:
            os.kill(os.getpid(), number)

    patch.setattr(Run, "show", shown)
