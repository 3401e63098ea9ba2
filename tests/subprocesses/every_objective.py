"""Trains two short epochs of every objective, on as many processes as there are. Used by test_processes.

OUT BN_SPLITS [--compile | --no-compile]: with the third word, of a small network that compiles in seconds.
"""

import csv
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from helpers import TINY
from moco import distributed, encoders, methods, options, pretrain
from moco.run import Run


class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))


out, splits, more = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
if more:
    encoders.build = lambda arch, stem: Small
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")


def recorded(self, step, lr):
    first = self.step
    sync(self, step, lr)
    steps.extend(self.losses[first : step + 1].tolist())


sync, Run.sync = Run.sync, recorded
for method in methods.ALL.values():
    name = method.model.__name__
    words = [*TINY.split(), "--epochs", "2", "--warm-up", "1", "--bn-splits", splits, "--lr", "0.02"]
    words += ["--output-dir", str(out / name), *more]
    if method.shuffle_keys:
        words += ["--moco-k", "72", "--moco-dim", "16", "--mlp", "--aug-plus", "--moco-t", "0.2"]
    args, steps = options.pretrain_parser("", method.add_options).parse_args(words), []
    pretrain.train(method, args, torch.device("cpu"))
    if distributed.rank() == 0:
        with open(out / name / "steps.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerows([["loss"], *([loss] for loss in steps)])
if dist.is_initialized():
    dist.destroy_process_group()
