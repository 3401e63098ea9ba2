"""The last weights of a run with --ema, without their average: plain.py RUN DATA

Writes RUN/plain.pth.tar and prints kNN on the held-out images, as the log has it. For commit ddb2295: --ema was removed.
"""

import sys
from pathlib import Path

import torch

from moco import datasets, evaluate, inference

run, data = Path(sys.argv[1]), sys.argv[2]
saved = torch.load(run / "checkpoint_last.pth.tar", weights_only=True)
del saved["average"], saved["options"]["ema"]
torch.save(saved, run / "plain.pth.tar")
network, centre, _ = inference.load(run / "plain.pth.tar")
train, held_out = (datasets.load("imagefolder", data, part, holdout=500) for part in (True, False))
print(f"kNN {evaluate.knn(network, train, held_out, centre):.2f}")
