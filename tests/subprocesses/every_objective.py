"""Trains every objective for two short epochs and saves the loss of each step. Used by test_processes.

OUT BN_SPLITS [--compile | --no-compile]: with a third argument, a small network that compiles in seconds.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch import nn

from helpers import TINY, train
from moco import distributed, encoders, methods


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
for method in methods.ALL.values():
    folder = out / method.model.__name__
    args = [TINY, f"--epochs 2 --warm-up 1 --bn-splits {splits} --lr 0.02", *more, "--output-dir", folder]
    losses = train(method, *args)
    if distributed.rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
if dist.is_initialized():
    dist.destroy_process_group()
