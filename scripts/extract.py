"""Writes the features of a checkpoint's encoder for the images of a data set or a folder.

    python scripts/extract.py CHECKPOINT data/ --out features.npz              # validation images
    python scripts/extract.py CHECKPOINT data/ --split train --out train.npz
    python scripts/extract.py CHECKPOINT photos/ --out photos.npz              # any folder of images, however nested

A folder with class folders in train/, val/ or test/ is a data set; --dataset folder takes all images in it and below.

The .npz has `features` (N, width) float32, not normalised; `labels` (N,) int64, -1 where there is none; `paths` (N,),
relative to the folder, or the images' numbers. For labelled images it also prints recall@1, recall@5 and MAP@R.
"""

import moco  # noqa: F401, I001  before torch: it says how threads wait

import math
import os
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from moco import checkpoint, datasets, inference, launch, options
from moco.batches import Centres
from moco.errors import UsageError, one_line, say
from moco.losses import UNLABELLED
from moco.run import all_but_os_errors
from output import check_output, writing

MOST_SEARCHED = 100_000  # images of which all pairs are compared
MOST_PROJECTED = 5000  # images in the projector
PART_BYTES = 256 << 20  # similarities compared at a time
THUMBNAIL = 64  # side in pixels of an image on the sheet of neighbours


@launch.reporting()
def main():
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="of this project, MoCo or SupContrast, or a ResNet of torchvision or timm",
    )
    add("data", nargs="?", metavar="DATA", help="data folder as for training, or any folder of images")
    add("--out", type=Path, required=True, metavar="FILE.npz", help="file to write")
    text = "as for training, or folder: all images below DATA, without labels; digits needs no DATA"
    add("--dataset", choices=(*options.DATASETS, "folder"), default="auto", help=text)
    add("--split", choices=("train", "val"), help="which images of a data set (default: val)")
    add("-b", "--batch-size", type=options.positive_int, default=256, metavar="N", help="default: 256")
    add("-j", "--workers", type=options.count, default=8, metavar="N", help="data-loading workers (default: 8)")
    add("--picture", type=Path, metavar="FILE.png", help="a sheet of images beside their eight nearest neighbours")
    add("--projector", type=Path, metavar="DIR", help="new folder for TensorBoard's embedding projector")
    add("--force", action="store_true", help="overwrite files that exist")
    args = parser.parse_args()
    outputs = [path for path in (args.out, args.picture, args.projector) if path]
    if len({path.absolute() for path in outputs}) < len(outputs):
        parser.error("--out, --picture and --projector need a name each")
    check_output(args.out, args.force)
    if args.picture:
        check_output(args.picture, args.force, [".png", ".jpg"])
    if args.projector:
        check_output(args.projector, force=False)
    saved = checkpoint.load(args.checkpoint)
    extract(args, saved, *images(args, saved["options"]), launch.choose_device())


def images(args, theirs: dict) -> tuple[datasets.Split, list[str]]:
    """The images, with their labels, and their names. `theirs`: the options of the checkpoint."""
    name, is_folder = args.dataset, args.data is not None and Path(args.data).is_dir()
    if name == "folder" and not is_folder:
        raise UsageError(f"--dataset folder needs a folder, after the checkpoint; '{args.data or ''}' is not a folder")
    if name == "folder" or (name == "auto" and is_folder and not is_data_set(args.data)):
        if args.split:
            raise UsageError(
                f"--split {args.split}: '{args.data}' has no train/ and val/; omit --split to take all images"
            )
        skipped = Counter()
        found = datasets.images_below(os.path.join(args.data, ""), skipped)  # links out of it are followed
        datasets.announce(skipped, args.data)
        split = datasets.Split(torch.full((len(found),), UNLABELLED), [], paths=found)
    else:
        name = datasets.resolve(name, args.data, theirs.get("dataset"))
        holdout = theirs.get("holdout", 0) if only_train(args.data, theirs.get("classes")) else 0
        if holdout:
            say(
                f"note: the last {holdout} training images of each class are the validation images, as in the run (--holdout {holdout})"
            )
        split = datasets.load(name, args.data, args.split == "train", holdout=holdout, in_memory=False)
    if split.paths is None:
        return split, [str(i) for i in range(len(split))]
    return split, [os.path.relpath(path, args.data) for path in split.paths]


def only_train(folder: str | None, classes: list[str] | None) -> bool:
    """Is train/ with these classes the only split? Then the held-out images of a run are its validation images."""
    splits = [split for split in datasets.SPLITS if folder and Path(folder, split).is_dir()]
    return splits == ["train"] and datasets.class_folders(Path(folder, "train")) == classes


def is_data_set(folder: str) -> bool:
    """Are there class folders in train/, val/ or test/, or is it CIFAR's?"""
    if (names := datasets.candidates(folder)) == ["imagefolder"]:
        return any(any(Path(folder).glob(f"{split}/*/")) for split in datasets.SPLITS)
    return bool(names) and not all(map(datasets.hidden, os.listdir(folder)))


def extract(args, saved: dict, split: datasets.Split, paths: list[str], device: torch.device) -> None:
    encoder, centre, _ = inference.load(args.checkpoint, saved)
    encoder.fc = nn.Identity()
    encoder.to(device)
    # Features go to a file without a name: there may be more of them than fit into memory.
    with writing(args.out) as tmp, tempfile.TemporaryFile(dir=args.out.parent) as raw:
        with torch.no_grad(), tqdm(total=len(split), unit="image", disable=None) as bar:
            for batch, _ in Centres(split, centre, args.batch_size, device, args.workers):
                found = encoder(batch).float().cpu().numpy()
                raw.write(np.ascontiguousarray(found))  # not into a map: on a full disk that ends the process
                bar.update(len(found))
        raw.flush()
        features = np.memmap(raw, np.float32, "r").reshape(len(split), -1)
        with open(tmp, "wb") as file:
            np.savez(file, features=features, labels=split.labels.numpy(), paths=np.array(paths))
    say(f"{args.out}: {features.shape[0]:,} features of width {features.shape[1]}")
    search(features, split.labels, device)
    if args.projector:
        project(args.projector, split, features, paths)
        say(f"{args.projector}: tensorboard --logdir {args.projector}")
    if args.picture:
        with writing(args.picture) as picture:
            sheet(split, features).save(picture)
        say(f"{args.picture}")


def search(features: np.ndarray, labels: torch.Tensor, device: torch.device) -> None:
    """Prints how well the labelled images find others of their class, if there are any."""
    rows = (labels != UNLABELLED).nonzero().squeeze(1)
    if len(rows) > MOST_SEARCHED:
        say(f"note: no recall@1 and MAP@R for more than {MOST_SEARCHED:,} images: they compare all pairs")
        return
    normed = F.normalize(torch.from_numpy(features[rows.numpy()]).to(device), dim=1)
    if found := retrieval(normed, labels[rows].to(device)):
        say("retrieval among the labelled images: recall@1 {:.2f}, recall@5 {:.2f}, MAP@R {:.2f}".format(*found))


@torch.no_grad()
def retrieval(features: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float] | None:
    """Recall@1, recall@5 and MAP@R in percent, of each image among all others (Musgrave et al., arXiv:2003.08505).

    Recall@k: is an image of the query's class among its k nearest? With R other images of its class,

        MAP@R = (1/R) sum_{i=1..R} [the i-th nearest is of the class] (share of the class among the i nearest).

    Means over the images with R > 0; None if there are none.

    Args:
        features: (N, width) float32, L2-normalised. labels: (N,) int64, 0 or more.
    """
    others = labels.bincount()[labels] - 1
    queries = others.nonzero().squeeze(1)
    if not len(queries):
        return None
    sums = torch.zeros(3, dtype=torch.float64, device=features.device)
    for rows in queries.split(max(1, PART_BYTES // (32 * len(labels)))):
        similarity = features[rows] @ features.T
        similarity.scatter_(1, rows[:, None], -math.inf)
        wanted = others[rows, None]
        nearest = similarity.topk(min(len(labels) - 1, max(5, int(wanted.max()))), dim=1).indices
        hits = labels[nearest] == labels[rows, None]
        ranks = torch.arange(1, nearest.shape[1] + 1, device=features.device)
        precision = hits.cumsum(1) / ranks
        map_at_r = ((precision * (hits & (ranks <= wanted))).sum(1, keepdim=True) / wanted).sum()
        sums += torch.stack([hits[:, 0].sum(), hits[:, :5].any(1).sum(), map_at_r])
    return tuple((100 * sums / len(queries)).tolist())


def project(folder: Path, split: datasets.Split, features: np.ndarray, paths: list[str]) -> None:
    """Writes TensorBoard's embedding projector, with class, path and thumbnail of each image: of all, or evenly spread."""
    from torch.utils.tensorboard import SummaryWriter  # takes a second to import

    chosen = np.linspace(0, len(features) - 1, min(MOST_PROJECTED, len(features))).astype(int).tolist()
    labels = [int(split.labels[i]) for i in chosen]
    names = ["" if label == UNLABELLED else split.classes[label] for label in labels]
    rows = zip(names, (paths[i] for i in chosen), strict=True)
    rows = [[one_line(os.fsencode(text).decode(errors="replace")) for text in row] for row in rows]  # UTF-8
    thumbnails = [ImageOps.fit(split.pillow(i), (THUMBNAIL // 2, THUMBNAIL // 2)) for i in chosen]
    images = torch.stack([datasets.pixels(image) for image in thumbnails]).float() / 255
    threading.excepthook = all_but_os_errors
    with writing(folder) as tmp, SummaryWriter(tmp) as writer:
        writer.add_embedding(features[chosen], rows, images, metadata_header=["class", "path"])


def sheet(split: datasets.Split, features: np.ndarray, neighbours: int = 8, rows: int = 10) -> Image.Image:
    """Images, evenly spread over the split, each at the left of its row, then its nearest neighbours by cosine."""
    norms = np.sqrt(np.einsum("ij,ij->i", features, features)).clip(1e-12)  # without a copy of all features
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
