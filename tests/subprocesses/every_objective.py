"""Trains every objective for two short epochs and saves the loss of each step: OUT BN_SPLITS [OPTION...].

With --compile or --no-compile the network is a small one that compiles in seconds; of the compiled objectives one has a
key encoder, and one has none. Used by test_processes.
"""

import argparse
import json
from pathlib import Path

from torch import nn

from helpers import TINY, train
from moco import distributed, encoders, launch, methods


class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))


def train_all(device):
    for method in (methods.OUT, methods.SUPCON) if "--compile" in more else methods.ALL.values():
        folder = args.out / method.model.__name__
        options = [TINY, f"--epochs 2 --warm-up 1 --bn-splits {args.splits} --lr 0.02", *more, "--output-dir", folder]
        losses = train(method, *options, device=device)
        if distributed.rank() == 0:
            (folder / "losses.json").write_text(json.dumps(losses))


parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("splits", type=int)
for name, kind in (("world-size", int), ("rank", int), ("dist-url", str)):
    parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
args, more = parser.parse_known_args()
if more:
    encoders.build = lambda arch, stem: Small
launch.launch(train_all, **{name: vars(args)[name] for name in ("world_size", "rank", "dist_url") if name in args})
