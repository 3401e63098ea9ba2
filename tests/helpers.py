"""Shared by test modules and the programs in subprocesses/: options, images, and functions that start runs and read their output."""

import argparse
import csv
import os
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from moco import checkpoint, distributed, encoders, options, pretrain
from moco.datasets import CIFAR10
from moco.run import Run
from processes import ROOT, split

MEAN, STD = CIFAR10
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
SCRIPTS = ["main_moco.py", "main_moco_in.py", "main_moco_out.py", "main_moco_suploss.py", "main_moco_proto.py"]

# A run of seconds: 160 of scikit-learn's digits as 8x8 images, resnet20, five steps per epoch.
TINY = "-a resnet20 --dataset digits --image-size 8 --per-class 16 -b 32 --seed 0 -p 1"
TINY_MOCO = f"{TINY} --moco-k 80 --moco-dim 16 --warm-up 1 --mlp --aug-plus --cos"
EVERY_SCRIPT = [(script, TINY_MOCO) for script in SCRIPTS] + [("main_supcon.py", TINY), ("main_ce.py", TINY)]
# The same for image folders: the fixture `folder`, without and with options of the queue, and the fixture `photos`.
TINY_FOLDER = "-a resnet20 --image-size 12 -b 8 --epochs 1 --seed 0"
SHORT = "-a resnet20 --image-size 8 -b 4 --epochs 1 --moco-k 16 --seed 0"
PHOTOS = "-a resnet20 --image-size 16 -b 8 --epochs 2 --warm-up 0 --seed 0 -p 1"
PHOTOS_MOCO = f"{PHOTOS} --moco-k 16 --moco-dim 16 --aug-plus"
NEEDS_COMPILER = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
SIZES = [(120, 100), (100, 140), (97, 97), (300, 64)]


def images(count, height=32, width=32):
    """Noise, gradients, saturated and gray images, as (count, 3, height, width) uint8."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (count, height, width, 3))
    smooth = np.linspace(0, 255, width)[None, None, :, None] * rng.random((count, 1, 1, 3)) + 0 * noise
    saturated = (rng.random((count, height, width, 3)) > 0.5) * 255
    gray = noise.mean(3, keepdims=True) + 0 * noise
    kinds = np.stack([noise, smooth, saturated, gray])[np.arange(count) % 4, np.arange(count)]
    return torch.from_numpy(kinds.astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def refused(done, status, *messages):
    """Asserts that a run exits with this status and prints one line on stderr, with all of these messages."""
    lines = [line for line in done.err.splitlines() if line]
    assert done.status == status, (done.status, done.out, done.err)
    assert len(lines) == 1 and "error: " in lines[0], done.err
    for message in messages:
        assert str(message) in lines[0], lines[0]


def error_line(out):
    """The only error in the output of a run, which must not have a traceback."""
    lines = [line for line in out.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in out, out
    return lines[0]


def no_space(file):
    raise OSError(28, "No space left on device")


def train(method, *args, device="cpu"):
    """Trains a method in this process, with a small queue if it has one; returns the loss of every step that it prints."""
    queue = ["--moco-k 72 --moco-dim 16 --mlp --aug-plus --moco-t 0.2"] if method.shuffle_keys else []
    parsed = options.pretrain_parser("", method.add_options).parse_args(split([*args, *queue]))
    losses, sync = [], Run.sync

    def recorded(self, step, lr):
        first = self.step
        sync(self, step, lr)
        losses.extend(self.losses[first : step + 1].tolist())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "sync", recorded)
        pretrain.train(method, parsed, torch.device(device))
    return losses


def photo(rng, size):
    return Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize(size, Image.BICUBIC)


def losses(folder):
    return [row["loss"] for row in rows(folder / "log.csv")]


def on_processes(work, processes):
    """The values of work() on each rank: threads stand in for processes, and exchange tensors as moco.distributed does."""
    here, meeting, given = threading.local(), threading.Barrier(processes), [None] * processes

    def of_all(x):
        given[here.rank] = x.clone()
        meeting.wait(60)
        found = list(given)
        meeting.wait(60)
        return found

    def begin(rank):
        here.rank = rank
        try:
            return work()
        except BaseException:
            meeting.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(processes) as pool:
        patch.setattr(distributed, "rank", lambda: here.rank)
        patch.setattr(distributed, "world_size", lambda: processes)
        patch.setattr(distributed, "all_gather", lambda x: torch.cat(of_all(x)))
        patch.setattr(distributed, "all_sum", lambda x: x.copy_(sum(of_all(x))))
        patch.setattr(distributed, "broadcast", lambda x: x.copy_(of_all(x)[0]))
        return list(pool.map(begin, range(processes)))


def add_unlabelled(data, count=5, size=(12, 12)):
    """Adds a folder unlabelled/ with `count` images, some of them in a subfolder; names and pixels are not those of train/."""
    (data / "unlabelled/more").mkdir(parents=True)
    for n in range(count):
        image = Image.new("RGB", size, (40 * n, 90, 10))
        image.save(data / "unlabelled" / ("more" if n % 2 else "") / f"u{n}.png")
    return data


def copied_pages(folder):
    """Copies README.md and docs/ to folder/pages, and returns that."""
    for name, text in {"README.md": README, **{f"docs/{name}": text for name, text in PAGES.items()}}.items():
        path = folder / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "pages"


def python_blocks(page):
    """The Python programs on a page."""
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def rows(path):
    """The rows of a CSV file, as dicts of strings."""
    with open(path) as file:
        return list(csv.DictReader(file))


def columns(path, *names):
    """Some columns of a CSV file, row by row."""
    return [[row[name] for name in names] for row in rows(path)]


def printed_losses(out):
    """The loss of every step, as a run with -p 1 prints it."""
    return [float(line.split("Loss ")[1].split()[0]) for line in out.splitlines() if line.startswith("Epoch: [")]


def equal_tensors(first, second):
    """Do two state dicts have the same names and, bit for bit, the same tensors?"""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def assert_equal_runs(first, second):
    """Asserts that two output folders have the same weights, queue, momentum buffers and (without times) log."""
    one, other = (checkpoint.load(folder / "checkpoint_last.pth.tar") for folder in (first, second))
    assert equal_tensors(one["state_dict"], other["state_dict"])
    buffers = [{i: s["momentum_buffer"] for i, s in run["optimizer"]["state"].items()} for run in (one, other)]
    assert equal_tensors(*buffers)
    one, other = (columns(folder / "log.csv", "epoch", "loss", "lr", "accuracy") for folder in (first, second))
    assert one == other


def random_statistics(network):
    """Gives batch norm random weights and statistics, as after training; returns the network in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.3, 0.3, generator=generator)
    return network.eval()


def supcontrast_checkpoint(network):
    """A checkpoint as SupContrast's scripts save it: other names, and their options next to the weights."""
    state = {n.replace("downsample", "shortcut"): v for n, v in network.state_dict().items() if not n.startswith("fc.")}
    state = {f"encoder.module.{name}": value for name, value in state.items()} | {"head.0.weight": torch.zeros(3, 3)}
    return {
        "opt": argparse.Namespace(model="resnet18", lr_decay_epochs=[700]),
        "model": state,
        "optimizer": {},
        "epoch": 3,
    }


def foreign(tmp_path, kind):
    """Saves weights in the format of another project; returns the file and a network with them, without its classifier."""
    path = tmp_path / f"theirs.{'safetensors' if kind == 'timm' else 'pth'}"
    if kind == "timm":
        timm = pytest.importorskip("timm")
        from safetensors.torch import save_file

        network = random_statistics(timm.create_model("resnet18", num_classes=7))
        save_file(network.state_dict(), path)
    elif kind == "SupContrast":
        network = random_statistics(encoders.build("resnet18")(num_classes=7))
        torch.save(supcontrast_checkpoint(network), path)
    else:
        network = random_statistics(models.resnet18(num_classes=7))
        state = network.state_dict()
        if kind == "old torchvision":  # before version 0.2
            state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        torch.save(state, path)
    network.fc = torch.nn.Identity()
    return path, network


def interrupt(patch, lines, number=signal.SIGTERM):
    """Sends a signal to this process after a run has printed this many progress lines (with -p 1, one per step)."""
    show, printed = Run.show, []

    def shown(self, moved, **values):
        show(self, moved, **values)
        printed.append(moved)
        if len(printed) == lines:
            os.kill(os.getpid(), number)

    patch.setattr(Run, "show", shown)
