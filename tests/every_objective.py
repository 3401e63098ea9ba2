"""Trains two short epochs of every objective, on as many processes as there are. Used by test_runs.

OUT BN_SPLITS [--compile | --no-compile]: with the third word, of a small network that compiles in seconds.
"""

import csv
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from conftest import TINY
from moco import baselines, builder, distributed, encoders, epoch, options, pretrain


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


def recorded(self, done, asked):
    losses, stop = share(self, done, asked)
    steps.extend(losses)
    return losses, stop


share, epoch.Record.share = epoch.Record.share, recorded
methods = dict.fromkeys((builder.MoCo, builder.MoCoIn, builder.MoCoOut, builder.MoCoSupLoss), options.MOCO)
methods |= {baselines.SupContrast: options.SUPCON, baselines.CrossEntropy: options.CROSS_ENTROPY}
for model_class, method in methods.items():
    words = [*TINY.split(), "--epochs", "2", "--warm-up", "1", "--bn-splits", splits, "--lr", "0.02"]
    words += ["--output-dir", str(out / model_class.__name__), *more]
    if issubclass(model_class, builder.MoCo):
        words += ["--moco-k", "72", "--moco-dim", "16", "--mlp", "--aug-plus", "--moco-t", "0.2"]
    args, steps = options.pretrain_parser("", method).parse_args(words), []
    pretrain.train(model_class, method, args, torch.device("cpu"))
    if distributed.rank() == 0:
        with open(out / model_class.__name__ / "steps.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerows([["loss"], *([loss] for loss in steps)])
if dist.is_initialized():
    dist.destroy_process_group()
