"""The data sets: image folders, CIFAR-10 and CIFAR-100, the digits bundled with scikit-learn.

Small images of one size are kept on the device that trains, as one uint8 tensor. Others stay in their files.
"""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from moco import distributed
from moco.errors import RunError, UsageError, first_line, say
from moco.losses import UNLABELLED

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {  # mean and standard deviation of the training pixels, in 0..1
    "imagefolder": CIFAR10,
    "cifar10": CIFAR10,
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.3054,) * 3, (0.3753,) * 3),
}
SPLITS = ("train", "val", "test")  # folders of an image folder; to evaluate, val/ or test/ is enough
VALIDATION_DIGITS = 360  # the last of the 1,797, by other writers than the first ones
# Suffixes of pictures that torchvision's image folders do not read.
OTHER_PICTURES = {".gif", ".jfif", ".jpe", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".svg"}
LARGEST_SIDE = 96  # images up to this size are kept in memory ...
LARGEST_DATASET = 4 << 30  # ... as long as together they take no more bytes than this


@dataclass
class Split:
    """The training or the validation images.

    labels: (N,) int64 on the CPU, -1 for an image without one. images: (N, 3, H, W) uint8 on the device, or None if
    they stay in their files. paths: these N files, as str or bytes, or None if it is not an image folder.
    """

    labels: torch.Tensor
    classes: list[str]
    images: torch.Tensor | None = None
    paths: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def check_side(self, side: int, what: str) -> None:
        """UsageError: `what` needs images in memory, `side` pixels high and wide, and these are not."""
        if self.images is None or set(self.images.shape[2:]) != {side}:
            size = f"{side} x {side} pixels (--image-size, at most {LARGEST_SIDE})"
            raise UsageError(f"{what}: all images must have {size}")

    def rows_of_each_class(self, part: slice) -> torch.Tensor:
        """(n,) int64: the rows that a slice selects within each class. Unlabelled images are left out."""
        counts = (self.labels + 1).bincount(minlength=len(self.classes) + 1).tolist()
        _, *each = self.labels.argsort(stable=True).split(counts)  # the unlabelled come first
        return torch.cat([rows[part] for rows in each])

    def of_each_class(self, part: slice) -> "Split":
        """The images that a slice selects within each class, and all that have no label."""
        unlabelled = (self.labels == UNLABELLED).nonzero().squeeze(1)
        return self.take(torch.cat([self.rows_of_each_class(part), unlabelled]).sort().values)

    def take(self, rows: torch.Tensor) -> "Split":
        """The images at these rows, (n,) int64 on the CPU, in their order."""
        images = None if self.images is None else self.images[rows]
        paths = None if self.paths is None else [self.paths[i] for i in rows.tolist()]
        return Split(self.labels[rows], self.classes, images, paths)

    def with_labels(self, count: int) -> "Split":
        """All images; only the first `count` of each class keep their label."""
        rows = self.rows_of_each_class(slice(count))
        labels = torch.full_like(self.labels, UNLABELLED)
        labels[rows] = self.labels[rows]
        return replace(self, labels=labels)

    def labelled(self) -> "Split":
        """The images that have a label."""
        rows = (self.labels != UNLABELLED).nonzero().squeeze(1)
        return self if len(rows) == len(self) else self.take(rows)

    def repeated(self, count: int) -> "Split":
        """`count` images: these, repeated in their order."""
        return self if count == len(self) else self.take(torch.arange(count) % len(self))

    def pillow(self, index: int) -> Image.Image:
        """Image `index`, in RGB."""
        if self.paths is not None:
            return open_image(os.fsdecode(self.paths[index]))
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


def resolve(name: str, folder: str | None, trained_on: str | None = None) -> str:
    """The data set's name; "auto": what the folder contains, preferably `trained_on`. UsageError: nothing fits."""
    if name == "auto" and folder is None and trained_on == "digits":
        return trained_on
    if name != "digits" and folder is None:
        raise UsageError("name the data folder, the last argument (or use --dataset digits, which needs none)")
    if name != "auto":
        return name
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"data folder '{folder}' {what} (to download CIFAR-10 to it, add --dataset cifar10)")
    if not (names := candidates(folder)):  # nothing is downloaded to a folder with other files
        raise UsageError(
            f"'{folder}' has no train/ folder and is neither empty nor CIFAR-10's: name the folder that contains "
            "train/ and val/, or an empty one to download CIFAR-10 to"
        )
    return trained_on if trained_on in names else names[0]


def candidates(folder: str | Path) -> list[str]:
    """The data sets that are in a folder, or may be downloaded to it: CIFAR's, if there are no other files."""
    if any(Path(folder, split).is_dir() for split in SPLITS):
        return ["imagefolder"]
    files = {
        "cifar10": {"cifar-10-batches-py", "cifar-10-python.tar.gz"},
        "cifar100": {"cifar-100-python", "cifar-100-python.tar.gz"},
    }
    inside = {entry.name for entry in os.scandir(folder) if not hidden(entry.name)}
    both = set().union(*files.values())
    return [
        name
        for name, theirs in files.items()
        if inside & theirs or not inside or (inside <= both and name == "cifar10")
    ]


def load(
    name: str,
    folder: str | None,
    train: bool,
    *,
    holdout: int = 0,
    per_class: int | None = None,
    labels_per_class: int | None = None,
    unlabelled: bool = False,
    in_memory: bool = True,
    classes: list[str] | None = None,
    device: torch.device | str = "cpu",
) -> Split:
    """The training or the validation images of a data set.

    Args:
        name: "imagefolder", "cifar10", "cifar100" or "digits". folder: where it is.
        holdout: the last N training images per class are for validation instead.
        per_class: use only the first N training images per class.
        labels_per_class: only the first N of these keep their label; the others get -1.
        unlabelled: also train on an image folder's unlabelled/, with label -1.
        in_memory: keep small images of one size on the device, as a tensor.
        classes: the classes of an image folder without train/; None: its own class folders.
    """
    source = train or holdout > 0  # whether the split is part of the training images
    if name == "digits":
        split = digits(source)
    elif name == "imagefolder":
        split = image_folder(folder, source, unlabelled and train, classes)
    else:
        split = cifar(name, folder, source)
    if holdout:
        labels = split.labels[split.labels != UNLABELLED]
        if (fewest := int(labels.bincount(minlength=len(split.classes)).min())) <= holdout:
            raise UsageError(f"--holdout {holdout} leaves none of the {fewest} training images of a class")
        split = split.of_each_class(slice(-holdout) if train else slice(-holdout, None))
    if train and per_class:
        split = split.of_each_class(slice(per_class))
    if train and labels_per_class is not None:
        split = split.with_labels(labels_per_class)
    if in_memory and split.paths is not None:
        split.images = decode(split.paths)
    if in_memory and split.images is not None:
        split.images = split.images.to(device)
    return split


def digits(train: bool) -> Split:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8).repeat(3, axis=1)
    part = slice(None, -VALIDATION_DIGITS) if train else slice(-VALIDATION_DIGITS, None)
    return Split(torch.from_numpy(labels[part]).long(), [str(d) for d in range(10)], torch.from_numpy(images[part]))


def cifar(name: str, folder: str, train: bool) -> Split:
    """If it is missing, rank 0 downloads it, then the first process of each machine that still lacks it."""
    kind, title = dict(cifar10=(datasets.CIFAR10, "CIFAR-10"), cifar100=(datasets.CIFAR100, "CIFAR-100"))[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        data = None  # read once: torchvision checks its 170 MB each time
        for mine in (distributed.rank() == 0, distributed.local_rank == 0, True):
            if mine and data is None:
                try:
                    data = kind(folder, train, download=True)  # only if it is not there
                except Exception as error:  # the many ways in which a download or an archive can fail
                    raise RunError(
                        f"'{folder}' has no train/ folder and no {title}, and {title} could not be downloaded to it: "
                        f"{first_line(error)}"
                    ) from None
            distributed.barrier()
    finally:
        socket.setdefaulttimeout(timeout)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Split(torch.tensor(data.targets), data.classes, images)


def image_folder(folder: str, train: bool, unlabelled: bool = False, trained: list[str] | None = None) -> Split:
    """FOLDER/train, or FOLDER/val or FOLDER/test, with one folder per class; `unlabelled` adds FOLDER/unlabelled.

    `trained`: the classes if there is no train/ folder; some of them may have no image.
    """
    roots = [Path(folder, name) for name in (["train"] if train else ["val", "test"])]
    root = next((path for path in roots if path.is_dir()), None)
    if root is None:
        missing = "no train/ folder" if train else "no validation images: it has neither val/ nor test/"
        raise UsageError(f"'{folder}' has {missing}")
    classes = found = class_folders(root)
    if not train and Path(folder, "train").is_dir():
        if missing := set(found) ^ set(class_folders(Path(folder, "train"))):
            raise UsageError(f"train/ and {root.name}/ differ in their class folders: {', '.join(sorted(missing)[:5])}")
    elif trained and not train:
        classes = trained
        if missing := set(found) - set(classes):
            raise UsageError(f"{root.name}/ has classes that were not trained on: {', '.join(sorted(missing)[:5])}")
    skipped = Counter()
    numbers = {name: number for number, name in enumerate(classes)}
    images = [(path, numbers[name]) for name in found for path in images_below(root / name, skipped)]
    announce(skipped, root)
    if unlabelled and Path(folder, "unlabelled").is_dir():
        images += [(path, UNLABELLED) for path in images_without_label(folder, [path for path, _ in images])]
    paths, labels = zip(*images, strict=True)
    return Split(torch.tensor(labels), classes, paths=list(paths))


def images_without_label(folder: str, train: list[str]) -> list[str]:
    """Paths of the images in FOLDER/unlabelled and below it; UsageError if one is a file of `train`, or a link to it."""
    root, skipped = os.path.join(folder, "unlabelled", ""), Counter()
    found = images_below(root, skipped)
    announce(skipped, root)
    real_folder = cache(os.path.realpath)

    def real(path):
        folder, name = os.path.split(path)
        return os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(folder), name)

    labelled = {real(path): path for path in train}
    for path in found:
        if same := labelled.get(real(path)):
            raise UsageError(f"'{path}' is the same file as '{same}': unlabelled/ and train/ must not share images")
    return found


def class_folders(root: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not hidden(entry.name))
    if not names:
        raise UsageError(f"'{root}' contains no class folders")
    return names


def images_below(root: str | Path, skipped: Counter) -> list[str]:
    """Sorted paths of the images in a class folder and below it, without hidden ones; UsageError: there are none.

    `skipped` counts the suffixes of other pictures. Links to folders inside the split or around it are not followed:
    they would repeat images, or never end.
    """
    images, split, seen = [], os.path.realpath(os.path.dirname(root)) + os.sep, {os.path.realpath(root) + os.sep}
    for folder, inside, files in os.walk(root, followlinks=True, onerror=refuse):
        files = [name for name in files if not hidden(name)]
        followed = []
        for path in (os.path.join(folder, name) for name in sorted(inside) if not hidden(name)):
            real = os.path.realpath(path) + os.sep
            circular = os.path.islink(path) and (real.startswith(split) or split.startswith(real))
            if not circular and real not in seen:
                followed.append(os.path.basename(path))
                seen.add(real)
        inside[:] = followed
        images += [os.path.join(folder, name) for name in files if name.lower().endswith(IMG_EXTENSIONS)]
        skipped.update(suffix for name in files if (suffix := os.path.splitext(name)[1].lower()) in OTHER_PICTURES)
    if not images:
        raise UsageError(f"'{root}' contains no images ({' '.join(IMG_EXTENSIONS)})")
    return sorted(images)


def refuse(error: OSError) -> NoReturn:
    """For os.walk, which would skip a folder that it cannot list."""
    raise RunError(f"'{error.filename}' cannot be listed: {error.strerror}")


def hidden(name: str) -> bool:
    """Is it a file or a folder that systems make next to images: thumbnails, macOS's copies of attributes?"""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def announce(skipped: Counter, root: str | Path) -> None:
    """Prints a note on the pictures that `images_below` has counted and skipped."""
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
        say(f"note: skipped in '{root}': {kinds} (convert them to one of {' '.join(IMG_EXTENSIONS)})")


def open_image(path: str) -> Image.Image:
    """A PIL image in RGB; RunError names a file that cannot be read.

    An animation gives its first frame. EXIF orientation is not applied, as in torchvision: published encoders were
    trained on the pixels as they are stored.
    """
    try:
        with Image.open(path) as image:
            return rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly everything
        raise RunError(f"image '{path}' cannot be read: {first_line(error)}") from None


def pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 of a PIL image in RGB, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; ValueError if its pixels have more than 8 bits: Pillow would clip them, not scale them."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
    return image.convert("RGB")


def decode(paths: Sequence[str]) -> torch.Tensor | None:
    """(N, 3, H, W) uint8; None if the images are large or differ in size, and so stay in their files."""
    width, height = open_image(paths[0]).size
    if max(width, height) > LARGEST_SIDE or len(paths) * width * height * 3 > LARGEST_DATASET:
        return None
    images = np.empty((len(paths), 3, height, width), np.uint8)
    # disable=None: a bar only on a terminal. No threads: they wait for Python's lock three times as long as this takes.
    bar = dict(desc="reading", unit="image", leave=False, disable=distributed.rank() > 0 or None)
    for i, path in enumerate(tqdm(paths, **bar)):
        image = open_image(path)
        if image.size != (width, height):
            return None
        images[i] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(images)
