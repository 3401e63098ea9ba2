"""CIFAR-10 with other labels, as image folders of links: labels.py DATA OUT

OUT/coarse: two classes, animal and vehicle. OUT/noisy: 40 % of the training images of each class have a wrong label,
drawn uniformly from the other nine; the validation images keep theirs. DATA has train/ and val/, a folder per class.
"""

import os
import random
import sys
from pathlib import Path

VEHICLES = ("airplane", "automobile", "ship", "truck")

data, out = (Path(folder).resolve() for folder in sys.argv[1:])
classes = sorted(os.listdir(data / "train"))
for split in ("train", "val"):
    for name in classes:
        folder = out / "coarse" / split / ("vehicle" if name in VEHICLES else "animal")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(data / split / name)

draw = random.Random(0)
for name in classes:
    (out / "noisy" / "train" / name).mkdir(parents=True)
for name in classes:
    files = sorted(os.listdir(data / "train" / name))
    wrong = set(draw.sample(files, len(files) * 2 // 5))
    for file in files:
        label = draw.choice([other for other in classes if other != name]) if file in wrong else name
        (out / "noisy" / "train" / label / f"{name}-{file}").symlink_to(data / "train" / name / file)
(out / "noisy" / "val").symlink_to(data / "val")
