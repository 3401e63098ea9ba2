"""Top-1 on corrupted test images: corrupted.py DATA WEIGHTS ... > corrupted.csv, with files such as those of pretrained/.

Seven of CIFAR-10-C's corruptions (arXiv:1903.12261) with its parameters for severity 3 of 5; of the blur, the border is
torchvision's.
"""

import io
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import functional as T

from moco import datasets, evaluate, inference
from moco.batches import Centres


def each(images, change):
    """Images changed one by one as PIL images."""
    return torch.stack([datasets.pixels(change(T.to_pil_image(image))) for image in images])


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def pixelate(image, scale):
    small = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


def impulses(x, amount, rng):
    drawn = torch.rand(x.shape, generator=rng)
    return torch.where(drawn < amount / 2, 0, torch.where(drawn < amount, 1, x))


def mean(x):
    return x.mean((2, 3), keepdim=True)


def corrupted(images):
    """Yields (corruption, uint8 images)."""
    yield "none", images
    x, rng = images / 255, torch.Generator().manual_seed(0)
    for name, changed in {
        "gaussian noise": x + 0.08 * torch.randn(x.shape, generator=rng),
        "shot noise": torch.poisson(x * 100, generator=rng) / 100,
        "impulse noise": impulses(x, 0.03, rng),
        "gaussian blur": T.gaussian_blur(x, 9, 0.7),
        "contrast": (x - mean(x)) * 0.4 + mean(x),
    }.items():
        yield name, (changed.clamp(0, 1) * 255).to(torch.uint8)
    yield "jpeg", each(images, partial(jpeg, quality=58))
    yield "pixelate", each(images, partial(pixelate, scale=0.85))


data, *files = sys.argv[1:]
split = datasets.load(datasets.resolve("auto", data), data, False, device=torch.device("cpu"))
networks = {Path(file).name.removesuffix(".pth.tar"): inference.load(file) for file in files}
print("weights,corruption,top1")
for name, images in corrupted(split.images):
    for weights, (network, centre, classes) in networks.items():
        batches = Centres(replace(split, images=images), centre, 250, torch.device("cpu"))
        top1 = evaluate.accuracy(evaluate.frozen(network, keep_fc=True), batches, len(classes))[0]
        print(f"{weights},{name},{top1:.2f}", flush=True)
