"""Trains two short epochs of every objective, on as many processes as there are: OUT BN_SPLITS. Used by test_runs."""

import csv
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from conftest import TINY
from moco import baselines, builder, distributed, epoch, options, pretrain

out, splits = Path(sys.argv[1]), sys.argv[2]
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
    words += ["--output-dir", str(out / model_class.__name__)]
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
