"""Writes the features of a checkpoint's encoder for the images of a data set or a folder.

    python scripts/extract.py CHECKPOINT data/ --out features.npz              # validation images
    python scripts/extract.py CHECKPOINT data/ --split train --out train.npz
    python scripts/extract.py CHECKPOINT photos/ --out photos.npz              # any folder of images, however nested

The .npz has `features` (N, width) float32, not normalised; `labels` (N,) int64, -1 where there is none; `paths` (N,),
files relative to the folder, or the images' numbers.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from moco import datasets, inference, launch, options
from moco.batches import Centres
from moco.errors import RunError, UsageError
from moco.losses import UNLABELLED

THUMBNAIL = 64  # side in pixels of an image on the sheet of neighbours


def main():
    first, _, rest = __doc__.partition("\n")
    parser = options.Parser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of this project or of MoCo, or a file of pretrained/")
    add("data", nargs="?", metavar="DATA", help="data folder as for training, or any folder of images")
    add("--out", type=Path, required=True, metavar="FILE.npz", help="where the features go")
    add("--dataset", choices=options.DATASETS, default="auto", help="as for training; digits needs no DATA")
    add("--split", choices=("train", "val"), help="which images of a data set (default: val)")
    add("-b", "--batch-size", type=options.positive_int, default=256, metavar="N", help="default: 256")
    text = "data-loading workers, for images in files (default: %(default)s)"
    add("-j", "--workers", type=options.count, default=8, metavar="N", help=text)
    add("--neighbours", type=options.positive_int, metavar="K", help="for --picture (default: 8)")
    add("--picture", type=Path, metavar="FILE.png", help="a sheet of images beside their nearest neighbours")
    add("--force", action="store_true", help="overwrite files that exist")
    args = parser.parse_args()
    try:
        for path in (args.out, args.picture):
            if path:
                options.check_output(path, args.force)
        if args.neighbours and not args.picture:
            raise UsageError("--neighbours draws on a sheet: name it with --picture FILE.png")
        split, paths = images(args)
        launch.launch(partial(extract, args, split, paths))
    except (UsageError, RunError) as error:
        launch.report_and_exit(error)


def images(args) -> tuple[datasets.Split, list[str]]:
    """The images, with their labels, and their names."""
    there = args.dataset == "auto" and args.data is not None and Path(args.data).is_dir()
    if there and not (os.listdir(args.data) and datasets.candidates(args.data)):  # no data set: a folder of images
        if args.split:
            raise UsageError(f"--split {args.split}: '{args.data}' has no train/ and val/; without it, all are taken")
        found = sorted(datasets.images_below(args.data))
        if not found:
            raise UsageError(f"'{args.data}' holds no image")
        split = datasets.Split(torch.full((len(found),), UNLABELLED), [], paths=found)
    else:
        name = datasets.resolve(args.dataset, args.data)
        split = datasets.load(name, args.data, args.split == "train", in_memory=False)
    if split.paths is None:
        return split, [str(i) for i in range(len(split))]
    return split, [os.path.relpath(path, args.data) for path in split.paths]


def extract(args, split: datasets.Split, paths: list[str], device: torch.device) -> None:
    encoder, centre, _ = inference.load(args.checkpoint)
    encoder.fc = nn.Identity()
    encoder.to(device)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        features, done = None, 0
        with torch.no_grad(), tqdm(total=len(split), unit="image", disable=None) as bar:
            for batch, _ in Centres(split, centre, args.batch_size, device, args.workers):
                found = encoder(batch).float().cpu().numpy()
                if features is None:  # on disk: there may be more of them than fit into memory
                    shape = (len(split), found.shape[1])
                    features = np.lib.format.open_memmap(Path(folder, "features.npy"), "w+", np.float32, shape=shape)
                features[done : done + len(found)] = found
                done += len(found)
                bar.update(len(found))
        try:
            tmp = Path(folder, "out.npz")
            np.savez(tmp, features=features, labels=split.labels.numpy(), paths=np.array(paths))
            os.replace(tmp, args.out)
        except OSError as error:
            raise RunError(f"'{args.out}' cannot be written: {error.strerror}") from None
        print(f"{args.out}: {features.shape[0]:,} features of width {features.shape[1]}")
        if args.picture:
            sheet(split, features, args.neighbours or 8).save(args.picture)
            print(args.picture)


def sheet(split: datasets.Split, features: np.ndarray, neighbours: int, rows: int = 10) -> Image.Image:
    """Images, evenly spread over the split, each at the left of its row, then its nearest neighbours by cosine."""
    norms = np.linalg.norm(features, axis=1).clip(1e-12)
    chosen = np.linspace(0, len(features) - 1, min(rows, len(features))).astype(int)
    count = min(neighbours, len(features) - 1)
    page = Image.new("RGB", ((count + 1) * (THUMBNAIL + 2) + 8, len(chosen) * (THUMBNAIL + 2)), "white")
    for row, query in enumerate(chosen):
        similarity = features @ features[query] / norms
        similarity[query] = np.inf
        for column, index in enumerate(np.argsort(-similarity)[: count + 1]):
            image = split.pillow(int(index))
            scale = THUMBNAIL / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
            page.paste(image, (column * (THUMBNAIL + 2) + 8 * (column > 0), row * (THUMBNAIL + 2)))
    return page


if __name__ == "__main__":
    main()
