"""Where images come from: image folders, CIFAR-10 and CIFAR-100, the digits bundled with scikit-learn.

Small images of one size live in memory, on the device that trains, as one uint8 tensor; views are then made in
batches. Others are decoded in loader processes. Either way every random choice is a function of (seed, epoch, step or
image, view), never of the process or worker that makes it.
"""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from moco import augment, distributed
from moco.errors import RunError, UsageError

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {  # mean and standard deviation of the training pixels, in 0..1
    "imagefolder": CIFAR10,
    "cifar10": CIFAR10,
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.3054,) * 3, (0.3753,) * 3),
}
VALIDATION_DIGITS = 360  # the last of the 1,797: other writers than the first ones
LARGEST_SIDE = 96  # images up to this size are kept in memory ...
LARGEST_DATASET = 8 << 30  # ... as long as all of them take fewer bytes than this

# What a random choice is for: part of its seed, so that no two choices share a stream.
IMAGES, KEYS, PARAMETERS, JITTER, PILLOW = range(5)


def generator(*numbers):
    """A torch.Generator seeded with all of these whole numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


@dataclass
class Split:
    """The training or the validation images.

    labels: (N,) int64 on the CPU. Either images: (N, 3, H, W) uint8 on the device, or paths: their N files.
    """

    labels: torch.Tensor
    classes: list
    images: torch.Tensor | None = None
    paths: list | None = None

    def __len__(self):
        return len(self.labels)

    def of_each_class(self, part):
        """The images that a slice takes of each class, in their order."""
        each = [(self.labels == label).nonzero().squeeze(1)[part] for label in range(len(self.classes))]
        kept = torch.cat(each).sort().values
        images = None if self.images is None else self.images[kept]
        paths = None if self.paths is None else [self.paths[i] for i in kept.tolist()]
        return Split(self.labels[kept], self.classes, images, paths)

    def pillow(self, index):
        if self.paths is not None:
            return open_image(self.paths[index])
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


def resolve(args):
    """The data set that `--dataset auto` stands for, after a look at the folder."""
    if args.dataset == "digits":
        return "digits"
    if args.data is None:
        raise UsageError("name the data folder, the last argument (or use --dataset digits, which needs none)")
    if args.dataset != "auto":
        return args.dataset
    folder = Path(args.data)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"data folder '{folder}' {what} (to download CIFAR-10 to it, add --dataset cifar10)")
    if not (names := candidates(folder)):  # it is not ours to download to
        raise UsageError(
            f"'{folder}' has no train/ folder and is neither empty nor CIFAR-10's: name the folder that holds train/ "
            "and val/, or an empty one to download CIFAR-10 to"
        )
    return names[0]


def candidates(folder):
    """The data sets that are in a folder, or can be downloaded to it since it is empty; none, if it is no folder."""
    if not Path(folder).is_dir():
        return []
    if Path(folder, "train").is_dir():
        return ["imagefolder"]
    files = {
        "cifar10": {"cifar-10-batches-py", "cifar-10-python.tar.gz"},
        "cifar100": {"cifar-100-python", "cifar-100-python.tar.gz"},
    }
    inside = {entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")}
    return [name for name, theirs in files.items() if inside & theirs or not inside]


def load(args, train, device):
    """The training or the validation Split of the data set that the command line names."""
    in_memory = not train or args.views == "batched"
    name, folder = args.dataset, args.data
    source = train or args.holdout > 0  # is it cut from the training images?
    if name == "digits":
        split = digits(source)
    elif name == "imagefolder":
        split = image_folder(folder, source, in_memory)
    else:
        split = cifar(name, folder, source, args.processes_on_node)
    if args.holdout:
        if (fewest := int(split.labels.bincount(minlength=len(split.classes)).min())) <= args.holdout:
            raise UsageError(f"--holdout {args.holdout} leaves none of the {fewest} training images of a class")
        split = split.of_each_class(slice(-args.holdout) if train else slice(-args.holdout, None))
    if train and args.per_class:
        split = split.of_each_class(slice(args.per_class))
    if in_memory and split.images is not None:
        split.images = split.images.to(device)
    return split


def digits(train):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8).repeat(3, axis=1)
    part = slice(None, -VALIDATION_DIGITS) if train else slice(-VALIDATION_DIGITS, None)
    return Split(torch.from_numpy(labels[part]).long(), [str(d) for d in range(10)], torch.from_numpy(images[part]))


def cifar(name, folder, train, processes_on_node):
    """What is missing is downloaded by the first process, then by the first one of each machine that lacks it still."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    patience = socket.getdefaulttimeout()
    try:
        for mine in (distributed.rank() == 0, distributed.rank() % processes_on_node == 0):
            if mine:
                try:
                    kind(folder, train)
                except RuntimeError:  # not there, or not whole
                    socket.setdefaulttimeout(30)
                    kind(folder, train, download=True)
            distributed.barrier()
        data = kind(folder, train)
    except Exception as error:  # the many ways in which a download or an archive can fail
        if distributed.lost_connection(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        title = "CIFAR-10" if name == "cifar10" else "CIFAR-100"
        raise RunError(
            f"'{folder}' has no train/ folder and no {title}, and {title} could not be downloaded to it: {reason}",
            alone=True,
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Split(torch.tensor(data.targets), data.classes, images)


def image_folder(folder, train, in_memory):
    """FOLDER/train, or FOLDER/val or FOLDER/test; one folder a class."""
    if train:
        root = Path(folder, "train")
        if not root.is_dir():
            raise UsageError(f"'{folder}' has no train/ folder")
    else:
        root = next((r for r in (Path(folder, "val"), Path(folder, "test")) if r.is_dir()), None)
        if root is None:
            raise UsageError(f"'{folder}' has no validation images: neither val/ nor test/ is there")
    classes = class_folders(root)
    if not train and (missing := set(classes) ^ set(class_folders(Path(folder, "train")))):
        raise UsageError(f"train/ and {root.name}/ differ in their class folders: {', '.join(sorted(missing))}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(images_below(root / name))
        if not found:
            raise UsageError(f"class folder '{root / name}' holds no image ({' '.join(IMG_EXTENSIONS)})")
        paths += found
        labels += [label] * len(found)
    images = decode(paths, root.name) if in_memory else None
    return Split(torch.tensor(labels), classes, images, paths)


def class_folders(root):
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"'{root}' holds no class folders")
    return names


def images_below(root):
    """Paths of the images in a class folder and below it. Of linked folders, those inside the split have their place
    there, and those that hold it would lead in a circle: neither is followed."""
    split, seen = os.path.realpath(os.path.dirname(root)) + os.sep, {os.path.realpath(root) + os.sep}
    for folder, inside, files in os.walk(root, followlinks=True):
        followed = []
        for path in (os.path.join(folder, name) for name in sorted(inside)):
            real = os.path.realpath(path) + os.sep
            circular = os.path.islink(path) and (real.startswith(split) or split.startswith(real))
            if not circular and real not in seen:
                followed.append(os.path.basename(path))
                seen.add(real)
        inside[:] = followed
        yield from (os.path.join(folder, name) for name in files if name.lower().endswith(IMG_EXTENSIONS))


def open_image(path, alone=True):
    """A PIL image in RGB; RunError names the file that is none. `alone`: other processes open other images."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip its values, not scale them
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly everything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"image '{path}' cannot be read: {reason}", alone=alone) from None


def decode(paths, title):
    """(N, 3, H, W) uint8, or None if the images are large or differ in size: then they are loaded as they come."""
    width, height = open_image(paths[0], alone=False).size
    if max(width, height) > LARGEST_SIDE or len(paths) * width * height * 3 > LARGEST_DATASET:
        return None
    images = np.empty((len(paths), height, width, 3), np.uint8)

    def read(i):
        image = open_image(paths[i], alone=False)
        if image.size != (width, height):
            return False
        images[i] = image
        return True

    with ThreadPoolExecutor(min(16, cores())) as pool:
        done = pool.map(read, range(len(paths)))
        quiet = None if distributed.rank() == 0 else True  # None: a bar only on a terminal
        for same in tqdm(done, f"reading {title}/", len(paths), disable=quiet, leave=False, unit="image"):
            if not same:
                pool.shutdown(cancel_futures=True)
                return None
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Batches:
    """The global batches of an epoch, and of each this process's share of views.

    Args:
        recipes: an augment.Recipe a view. Of two views the second one is the key's.
        shuffle_keys: make key views of other rows of the batch than query views, and say which (Shuffling BN).
        drop_last: leave out the last batch where it is smaller than the others.
    """

    def __init__(self, split, recipes, args, device, *, shuffle_keys=False, drop_last=True):
        self.split, self.recipes, self.device, self.seed = split, recipes, device, args.seed
        self.batch, self.shuffle_keys, self.drop_last = args.batch_size, shuffle_keys, drop_last
        self.labels = split.labels.to(device)
        self.worker_seconds = {}  # processor time that each worker has reported
        if drop_last and len(split) < self.batch:
            raise UsageError(f"the {len(split)} training images are fewer than one batch (-b {self.batch})")
        if split.images is not None and args.views == "batched":
            self.views = [augment.Views(r, args.mean, args.std, device, args.compile) for r in recipes]
            self.loader = None
        else:
            self.plan = []  # what the sampler hands to the workers; a new one each epoch
            self.loader = self.workers(args)

    def close(self):
        """Ends the loader processes. They are deaf to signals, so that nobody else can."""
        if self.loader is not None and self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()

    def cpu_seconds(self):
        """Processor time of this process and its loader processes so far."""
        return time.process_time() + sum(self.worker_seconds.values())

    def __len__(self):
        return len(self.split) // self.batch if self.drop_last else -(-len(self.split) // self.batch)

    def epoch(self, epoch, first=0):
        """From step `first` on, yields (views, labels, order).

        views: a (n, 3, S, S) float32 tensor a view, of this process's n rows. labels: (n,) int64, of the queries.
        order: (B,) int64, with shuffle_keys: row j of the global batch of key views shows image order[j] of it.
        """
        index = torch.randperm(len(self.split), generator=generator(self.seed, epoch, IMAGES))
        batches = list(index.split(self.batch))[: len(self)]
        orders = [None] * len(self)
        if self.shuffle_keys:
            orders = torch.rand(len(self), self.batch, generator=generator(self.seed, epoch, KEYS)).argsort(1)
        make = self.in_batches if self.loader is None else self.in_workers
        return make(epoch, first, batches, orders)

    def rows(self, batch, view, order):
        """The rows of the data set whose `view` this process makes."""
        rows = batch[order] if view == 1 and order is not None else batch
        return rows.tensor_split(distributed.world_size())[distributed.rank()]

    def to_device(self, batches, orders):
        """In one transfer each: one at every step would make the host wait for the step before."""
        batches = torch.cat(batches).to(self.device).split(self.batch)
        return batches, orders.to(self.device) if self.shuffle_keys else orders

    def in_batches(self, epoch, first, batches, orders):
        height, width = self.split.images.shape[2:]
        device = self.device
        drawn = []
        for view, recipe in enumerate(self.recipes):
            rng = generator(self.seed, epoch, PARAMETERS, view)
            drawn.append(recipe.draw(len(self.split), height, width, rng).to(device))
        jitter = [generator(self.seed, epoch, JITTER, view) for view in range(len(self.recipes))]
        batches, orders = self.to_device(batches, orders)
        for step, (batch, order) in enumerate(zip(batches, orders, strict=True)):
            colour = [r.draw_order(j) for r, j in zip(self.recipes, jitter, strict=True)]
            if step < first:
                continue
            made = []
            for view, views in enumerate(self.views):
                rows = self.rows(batch, view, order)
                made.append(views(self.split.images[rows], drawn[view][rows], colour[view]))
            yield made, self.labels[self.rows(batch, 0, order)], order

    def in_workers(self, epoch, first, batches, orders):
        self.plan[:] = [
            [(epoch, i, view) for view in range(len(self.recipes)) for i in self.rows(batch, view, order).tolist()]
            for batch, order in list(zip(batches, orders, strict=True))[first:]
        ]
        batches, orders = self.to_device(batches, orders)
        steps = list(zip(batches, orders, strict=True))[first:]
        for (batch, order), (images, worker, seconds) in zip(steps, self.loader, strict=True):
            if worker is not None:
                self.worker_seconds[worker] = seconds
            if isinstance(images, RunError):
                raise images
            rows = self.rows(batch, 0, order)
            made = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield list(made.tensor_split(len(self.recipes))), self.labels[rows], order

    def workers(self, args):
        transforms = [recipe.transform(args.mean, args.std) for recipe in self.recipes]
        count = min(-(-args.workers // args.processes_on_node), cores())
        return DataLoader(
            PillowViews(self.split, transforms, args.seed),
            batch_sampler=self.plan,
            collate_fn=collate,
            num_workers=count,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=deaf,
            persistent_workers=count > 0,
        )


class PillowViews(Dataset):
    """Views made by torchvision's transforms of PIL images; an item is named by (epoch, index, view)."""

    def __init__(self, split, transforms, seed):
        self.split, self.transforms, self.seed = split, transforms, seed

    def __getitem__(self, item):
        epoch, index, view = item
        try:
            image = self.split.pillow(index)
        except RunError as error:  # one that is raised here would arrive with the worker's traceback in its text
            return error
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed(generator(self.seed, epoch, PILLOW, index, view).initial_seed())
            return self.transforms[view](image)


def deaf(worker):
    """Loader processes leave it to the training process to answer signals: it still needs them for its last step."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def collate(items):
    """A batch of views or the error of one; the worker that made it, if any, and the worker's processor time so far."""
    broken = next((item for item in items if isinstance(item, Exception)), None)
    # A small last batch has fewer images than there are processes.
    images = broken or (torch.stack(items) if items else torch.empty(0, 3, 32, 32))
    worker = get_worker_info()
    return images, worker.id if worker else None, time.process_time()


class Centres:
    """This process's share of the validation images, in batches: (images (n, 3, S, S) float32, labels (n,))."""

    def __init__(self, split, args, device, crop=True):
        self.split, self.device, self.batch, self.args = split, device, args.batch_size, args
        self.centre = augment.validation if crop else augment.as_they_are
        self.labels = split.labels.to(device)

    def __iter__(self):
        mine = torch.arange(len(self.split), device=self.device)[distributed.rank() :: distributed.world_size()]
        args = self.args
        with ThreadPoolExecutor(min(16, cores())) as pool:
            for rows in mine.split(self.batch):  # one batch at least, though it be empty
                if self.split.images is not None:
                    images = self.split.images[rows.to(self.split.images.device)].to(self.device)
                    images = self.centre(images, args.image_size, args.mean, args.std)
                else:
                    none = torch.empty(0, 3, args.image_size, args.image_size, device=self.device)
                    images = torch.cat([none, *pool.map(self.decoded, rows.tolist())])
                yield images, self.labels[rows]

    def decoded(self, index):
        image = torch.from_numpy(np.array(open_image(self.split.paths[index]))).permute(2, 0, 1)[None].to(self.device)
        return self.centre(image, self.args.image_size, self.args.mean, self.args.std)
