"""Prints the kNN accuracy of a checkpoint's encoder on a data set, for example on classes that it was not trained on.

python results/tries/knn.py CHECKPOINT data/        (from the project's folder, with PYTHONPATH=.)
"""

import sys
from dataclasses import replace

from moco import datasets, evaluate, inference

encoder, centre, _ = inference.load(sys.argv[1])
train, validation = (datasets.load(datasets.resolve("auto", sys.argv[2]), sys.argv[2], part) for part in (True, False))
# The crop for all alike: load() has none for cross entropy, whose own classifier sees whole images.
centre = replace(centre, crop=True)
print(f"{evaluate.knn(encoder, train, validation, centre):.2f}")
