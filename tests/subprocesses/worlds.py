"""Prints the losses of the same few steps for several ways to use processes, as JSON lines: OUT. Used by test_processes.

A world is how its processes are launched, their number, and --bn-splits. The processes are forked, so that torch is
imported only once.
"""

import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401  here, not in each process

from helpers import TINY, free_port, train
from moco import distributed, launch, methods

WORLDS = [("torchrun", 8, 1), ("torchrun", 4, 2), ("nodes", 2, 4), ("single", 1, 8)]
METHODS = [method for method in methods.ALL.values() if not method.labels_only]


def train_all(how, processes, splits, device):
    for method in METHODS:
        name = method.model.__name__
        args = [TINY, f"--per-class 10 --epochs 1 --warm-up 0 --lr 0.02 --bn-splits {splits} --output-dir"]
        losses = train(method, *args, Path(sys.argv[1], f"{how}{processes}", name), device=device)
        if distributed.rank() == 0:
            print(json.dumps([f"{how} {processes}", name, losses]), flush=True)


def process(rank, port, world):
    how, processes, _ = world
    options = {}
    if how == "torchrun":
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
        os.environ |= dict(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    elif how == "nodes":
        options = dict(world_size=processes, rank=rank, dist_url=f"tcp://localhost:{port}")
    launch.launch(lambda device: train_all(*world, device), **options)


for world in WORLDS:
    port = free_port()
    children = [get_context("fork").Process(target=process, args=(rank, port, world)) for rank in range(world[1])]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        sys.exit(1)
