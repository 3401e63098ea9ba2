"""Which images, which views, on which process, at which step.

Every random choice is a function of (seed, epoch, step or image, view), never of the process or worker that makes it.
Views are made in batches on the device that trains. Images that stay in files are first decoded, cropped and resized by
data-loading workers.
"""

import atexit
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from moco import augment, distributed
from moco.datasets import PathArray, Split, pixels
from moco.errors import RunError, UsageError
from moco.signals import ignore_signals

# What a random choice is for: part of its seed, so that no two choices share a stream.
IMAGES, KEYS, PARAMETERS, JITTER, PILLOW, CROPS = range(6)
SHARED_MEMORY = "/dev/shm"  # through which workers hand over their batches


def generator(*numbers: int) -> torch.Generator:
    """A torch.Generator seeded with all of these whole numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


class Batches:
    """The global batches of an epoch, and of each this process's share of views.

    Args:
        recipes: an augment.Recipe a view. Of two views the second one is the key's.
        batch_size: of the global batch. mean, std: of the pixels, in 0..1.
        shuffle_keys: make key views of other rows of the batch than query views, and say which (Shuffling BN).
        drop_last: leave out the last batch where it is smaller than the others.
        pil: make all views with torchvision on PIL images, in workers.
        workers: data-loading workers of this machine, over all its processes; they prepare the next epoch while one
            is trained, up to `epochs`.
        compile: torch.compile the views.
    """

    def __init__(
        self,
        split: Split,
        recipes: Sequence[augment.Recipe],
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        shuffle_keys: bool = False,
        drop_last: bool = True,
        pil: bool = False,
        workers: int = 8,
        epochs: int = 1,
        compile: bool = False,
    ):
        self.split, self.recipes, self.device, self.seed = split, recipes, device, seed
        self.batch, self.shuffle_keys, self.drop_last = batch_size, shuffle_keys, drop_last
        self.epochs, self.workers = epochs, workers
        self.labels = split.labels.to(device)
        self.worker_seconds = {}  # processor time that each worker has reported
        if drop_last and len(split) < batch_size:
            raise UsageError(f"the {len(split)} training images are fewer than one batch (-b {batch_size})")
        self.pil, self.in_files = pil, split.images is None
        self.stream, self.next = None, None  # what the workers make, and the (epoch, step) that comes next
        if pil:
            self.dataset = PillowViews(split, [recipe.transform(mean, std) for recipe in recipes], seed)
        elif self.in_files:
            self.dataset = Crops(split, recipes, seed)
        if not pil:
            self.views = [augment.Views(r, mean, std, device, compile, cropped=self.in_files) for r in recipes]

    def close(self) -> None:
        """Stops the workers: they ignore signals, so nothing else does."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None
            self.worker_seconds.clear()  # os.times() counts them from now on

    def cpu_seconds(self) -> float:
        """Processor time so far of this process and its workers, running or ended."""
        ended = os.times()
        return time.process_time() + sum(self.worker_seconds.values()) + ended.children_user + ended.children_system

    def __len__(self) -> int:
        return len(self.split) // self.batch if self.drop_last else -(-len(self.split) // self.batch)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
        """From step `first` on, yields (views, labels, order).

        views: a (n, 3, S, S) float32 tensor a view, of this process's n rows. labels: (n,) int64, of the queries.
        order: (B,) int64, with shuffle_keys: row j of the global batch of key views shows image order[j] of it.
        """
        make = self.by_pillow if self.pil else self.in_batches
        return make(epoch, first, *self.order(epoch))

    def order(self, epoch: int) -> tuple[list[Tensor], Tensor | list[None]]:
        """The images of each global batch of an epoch, and the orders of its keys."""
        index = torch.randperm(len(self.split), generator=generator(self.seed, epoch, IMAGES))
        batches = list(index.split(self.batch))[: len(self)]
        if not self.shuffle_keys:
            return batches, [None] * len(self)
        return batches, torch.rand(len(self), self.batch, generator=generator(self.seed, epoch, KEYS)).argsort(1)

    def rows(self, batch, view, order):
        """The rows of the data set whose `view` this process makes."""
        rows = batch[order] if view == 1 and order is not None else batch
        return rows.tensor_split(distributed.world_size())[distributed.rank()]

    def to_device(self, batches, orders):
        """In one transfer each: one at every step would make the host wait for the step before."""
        batches = torch.cat(batches).to(self.device).split(self.batch)
        return batches, orders.to(self.device) if self.shuffle_keys else orders

    def in_batches(self, epoch, first, batches, orders):
        height, width = (None, None) if self.in_files else self.split.images.shape[2:]
        device = self.device
        drawn = []
        for view, recipe in enumerate(self.recipes):
            rng = generator(self.seed, epoch, PARAMETERS, view)
            drawn.append(recipe.draw(len(self.split), height, width, rng).to(device))
        jitter = [generator(self.seed, epoch, JITTER, view) for view in range(len(self.recipes))]
        if self.in_files:
            sources = self.crops(epoch, first, orders)
        batches, orders = self.to_device(batches, orders)
        for step, (batch, order) in enumerate(zip(batches, orders, strict=True)):
            colour = [r.draw_order(j) for r, j in zip(self.recipes, jitter, strict=True)]
            if step < first:
                continue
            rows = [self.rows(batch, view, order) for view in range(len(self.views))]
            # of images in files: cropped already; else whole images, of which the views are cut out here
            images = next(sources) if self.in_files else [self.split.images[mine] for mine in rows]
            made = [views(images[view], drawn[view][rows[view]], colour[view]) for view, views in enumerate(self.views)]
            yield made, self.labels[self.rows(batch, 0, order)], order

    def crops(self, epoch, first, orders):
        """From step `first` on, yields of each view this process's (n, 3, S, S) uint8 crops, on the device.

        Each file is decoded once, by the process that has its query: key crops change processes.
        """
        shuffle = distributed.Shuffle(orders, self.device) if self.shuffle_keys else None
        for step, crops in enumerate(self.loaded(epoch, first), first):
            views = list(crops.to(self.device, non_blocking=True).unbind(1))
            if shuffle:
                views[1] = shuffle(views[1], step)
            yield views

    def by_pillow(self, epoch, first, batches, orders):
        batches, orders = self.to_device(batches, orders)
        steps = list(zip(batches, orders, strict=True))[first:]
        for (batch, order), images in zip(steps, self.loaded(epoch, first), strict=True):
            made = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield list(made.tensor_split(len(self.recipes))), self.labels[self.rows(batch, 0, order)], order

    def loaded(self, epoch, first):
        """Yields what the workers make for each step of an epoch; meanwhile they prepare the next one."""
        if self.next != (epoch, first):
            self.close()
            end = max(self.epochs, epoch + 1)
            items = -(-self.batch // distributed.world_size()) * (len(self.recipes) if self.pil else 1)
            plan = Plan(self.items, epoch, first, end)
            self.stream = load(self.dataset, plan, items, len(self) * (end - epoch) - first, self.workers, self.device)
        for step in range(first, len(self)):
            self.next = None  # after an error there is nothing to continue
            images, worker, seconds = next(self.stream)
            if worker is not None:
                self.worker_seconds[worker] = seconds
            self.next = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
            yield images

    def items(self, epoch):
        """What the dataset is asked for at each step of an epoch."""
        for batch, order in zip(*self.order(epoch), strict=True):
            if self.pil:
                yield [(epoch, i, v) for v in range(len(self.recipes)) for i in self.rows(batch, v, order).tolist()]
            else:
                yield [(epoch, i) for i in self.rows(batch, 0, None).tolist()]


class Plan:
    """A batch sampler over epochs: `items(epoch)` yields the batches of one, of which the first loses `first`."""

    def __init__(self, items: Callable[[int], Iterator[list]], epoch: int, first: int, epochs: int):
        self.items, self.epoch, self.first, self.epochs = items, epoch, first, epochs

    def __iter__(self) -> Iterator[list]:
        for epoch in range(self.epoch, self.epochs):
            for step, batch in enumerate(self.items(epoch)):
                if epoch > self.epoch or step >= self.first:
                    yield batch


def load(
    dataset: Dataset, plan: Iterable[list], items: int, batches: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, int | None, float]]:
    """Yields what `dataset` makes of each batch of a plan, in data-loading workers: see `collate`.

    Args:
        dataset: its `empty` is a batch of no item. plan: a batch sampler of `batches` batches of up to `items` items.
        workers: of this machine, over all its processes.
    Raises RunError for an image that cannot be read, too little shared memory, or a worker that dies.
    """
    processes = distributed.processes_on_node
    count = min(-(-workers // processes), distributed.cores(), batches)
    if count and os.path.isdir(SHARED_MEMORY):
        size = items * dataset.empty.shape[1:].numel() * dataset.empty.element_size()
        free, needed = shutil.disk_usage(SHARED_MEMORY).free, min(2 * count, batches) * size * processes
        if free < needed:
            raise RunError(
                f"{SHARED_MEMORY} has {free >> 20} MiB free, and {count * processes} data-loading workers need "
                f"{-(-needed >> 20)} MiB: enlarge it (docker run --shm-size), or choose a smaller -j or -b",
                alone=True,
            )
    loader = DataLoader(
        dataset,
        batch_sampler=plan,
        collate_fn=partial(collate, dataset.empty),
        num_workers=count,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    iterator = iter(loader)
    if count:  # they ignore signals: a program that leaves this generator open would wait for them when it ends
        atexit.register(iterator._shutdown_workers)
    try:
        while True:
            try:
                made = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise RunError(
                    f"a data-loading worker died (out of memory, or of {SHARED_MEMORY}?): try a smaller -j", alone=True
                ) from None
            if made is None:
                return
            if isinstance(made[0], RunError):
                raise made[0]
            yield made
    finally:
        if count:
            iterator._shutdown_workers()
            atexit.unregister(iterator._shutdown_workers)


class PillowViews(Dataset):
    """Views made by torchvision's transforms of PIL images; an item is named by (epoch, index, view)."""

    def __init__(self, split, transforms, seed):
        self.split, self.transforms, self.seed = for_workers(split), transforms, seed
        self.empty = torch.empty(0, 3, 32, 32)  # of a small last batch, which has fewer images than there are processes

    def __getitem__(self, item):
        epoch, index, view = item
        try:
            image = self.split.pillow(index)
        except RunError as error:  # one that is raised here would arrive with the worker's traceback in its text
            return error
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.manual_seed(generator(self.seed, epoch, PILLOW, index, view).initial_seed())
            return self.transforms[view](image)


class Crops(Dataset):
    """(views, 3, S, S) uint8: RandomResizedCrop of a file, decoded once; an item is named by (epoch, index)."""

    def __init__(self, split, recipes, seed):
        self.split, self.recipes, self.seed = for_workers(split), recipes, seed
        self.empty = torch.empty(0, len(recipes), 3, recipes[0].size, recipes[0].size, dtype=torch.uint8)

    def __getitem__(self, item):
        epoch, index = item
        try:
            image = pixels(self.split.pillow(index))
        except RunError as error:
            return error
        return torch.stack([self.crop(image, epoch, index, view) for view in range(len(self.recipes))])

    def crop(self, image, epoch, index, view):
        recipe, rng = self.recipes[view], generator(self.seed, epoch, CROPS, index, view)
        top, left, height, width = recipe.draw_crop(*image.shape[1:], rng)
        return augment.resize(image[:, top : top + height, left : left + width], recipe.size, recipe.size)


class CentreCrops(Dataset):
    """(3, S, S) uint8: what augment.Centre takes of a file; an item is named by its index."""

    def __init__(self, split, centre):
        self.split, self.centre = for_workers(split), centre
        self.empty = torch.empty(0, 3, centre.size, centre.size, dtype=torch.uint8)

    def __getitem__(self, index):
        try:
            return self.centre.cut(pixels(self.split.pillow(index)))
        except RunError as error:
            return error


def for_workers(split: Split) -> Split:
    """The split with its paths as one array, see PathArray."""
    return split if split.paths is None else replace(split, paths=PathArray(split.paths))


def collate(empty: Tensor, items: list) -> tuple[Tensor | RunError, int | None, float]:
    """A batch or the error of an item; the worker that made it, if any, and the worker's processor time so far."""
    broken = next((item for item in items if isinstance(item, Exception)), None)
    worker = get_worker_info()
    return broken or (torch.stack(items) if items else empty), worker.id if worker else None, time.process_time()


class Centres:
    """This process's share of a split's images, in batches: (images (n, 3, S, S) float32, labels (n,)).

    Every process has the same number of batches; its last ones may be empty. Process r of R has rows r, r + R, ...

    Args:
        centre: what makes a (n, 3, H, W) uint8 batch an input, see augment.Centre.
        batch_size: over all processes. workers: for images in files; of this machine, over all its processes.
    """

    def __init__(self, split: Split, centre: augment.Centre, batch_size: int, device: torch.device, workers: int = 8):
        self.split, self.centre, self.device, self.workers = split, centre, device, workers
        self.batch = -(-batch_size // distributed.world_size())
        self.labels = split.labels.to(device)

    def __len__(self) -> int:
        return max(1, -(-len(self.split) // (self.batch * distributed.world_size())))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = torch.arange(len(self.split))[distributed.rank() :: distributed.world_size()]
        rows = [mine[i * self.batch : (i + 1) * self.batch] for i in range(len(self))]
        if self.split.images is not None:
            for some in rows:
                images = self.centre(self.split.images[some.to(self.split.images.device)].to(self.device))
                yield images, self.labels[some.to(self.device)]
            return
        plan = [some.tolist() for some in rows]
        stream = load(CentreCrops(self.split, self.centre), plan, self.batch, len(plan), self.workers, self.device)
        with closing(stream):
            for some, (images, _, _) in zip(rows, stream, strict=True):
                images = self.centre.normalise(images.to(self.device, non_blocking=True))
                yield images, self.labels[some.to(self.device)]
