"""Trains two short epochs of every objective, on as many processes as there are: OUT BN_SPLITS. Used by test_runs."""

import csv
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import TINY

from moco import builder, distributed, options, pretrain

out, splits = Path(sys.argv[1]), sys.argv[2]
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")


def recorded(losses, shown, done, *rest):
    stop = check(losses, shown, done, *rest)
    if distributed.rank() == 0:
        steps.extend(losses[shown:done].tolist())
    return stop


check, pretrain.check = pretrain.check, recorded
for model_class in (
    builder.MoCo,
    builder.MoCoIn,
    builder.MoCoOut,
    builder.MoCoSupLoss,
    builder.SupContrast,
    builder.CrossEntropy,
):
    parser = options.pretrain_parser("")
    model_class.add_options(parser)
    words = [*TINY.split(), "--epochs", "2", "--warm-up", "1", "--bn-splits", splits, "--lr", "0.02"]
    words += ["--output-dir", str(out / model_class.__name__)]
    if issubclass(model_class, builder.MoCo):
        words += ["--moco-k", "72", "--moco-dim", "16", "--mlp", "--aug-plus", "--moco-t", "0.2"]
    args = parser.parse_args(words)
    args.processes_on_node = distributed.world_size()
    steps = []
    pretrain.train(model_class, torch.device("cpu"), args)
    if distributed.rank() == 0:
        with open(out / model_class.__name__ / "steps.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerows([["loss"], *([loss] for loss in steps)])
if dist.is_initialized():
    dist.destroy_process_group()
