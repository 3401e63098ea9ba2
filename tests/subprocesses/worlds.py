"""Prints the losses of the same few steps in several worlds, as JSON lines: OUT. Used by test_processes.

A world is a number of processes, how they are launched, and --bn-splits. Its processes are forked: torch is imported
once.
"""

import json
import os
import socket
import sys
from multiprocessing import get_context

import torch.utils.tensorboard  # noqa: F401  here, not in each process

from helpers import TINY
from moco import distributed, launch, methods, options, pretrain
from moco.run import Run

WORLDS = [("torchrun", 8, 1), ("torchrun", 4, 2), ("nodes", 2, 4), ("alone", 1, 8)]
METHODS = [method for method in methods.ALL.values() if not method.labels_only]


def train(how, processes, splits, device):
    steps = []

    def recorded(self, step, lr):
        first = self.step
        sync(self, step, lr)
        steps.extend(self.losses[first : step + 1].tolist())

    sync, Run.sync = Run.sync, recorded
    for method in METHODS:
        name = method.model.__name__
        steps.clear()
        words = [*TINY.split(), "--per-class", "10", "--epochs", "1", "--warm-up", "0", "--lr", "0.02"]
        words += ["--bn-splits", str(splits), "--output-dir", f"{sys.argv[1]}/{how}{processes}/{name}"]
        if method.shuffle_keys:
            words += ["--moco-k", "72", "--moco-dim", "16", "--mlp", "--aug-plus", "--moco-t", "0.2"]
        args = options.pretrain_parser("", method.add_options).parse_args(words)
        pretrain.train(method, args, device)
        if distributed.rank() == 0:
            print(json.dumps([f"{how} {processes}", name, steps]), flush=True)


def process(rank, port, world):
    how, processes, _ = world
    options = {}
    if how == "torchrun":
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
        os.environ |= dict(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    elif how == "nodes":
        options = dict(world_size=processes, rank=rank, dist_url=f"tcp://localhost:{port}")
    launch.launch(lambda device: train(*world, device), **options)


for world in WORLDS:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    children = [get_context("fork").Process(target=process, args=(rank, port, world)) for rank in range(world[1])]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        sys.exit(1)
