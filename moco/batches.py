"""Batches: which images and views each process sees at each step.

Every random choice is a function of (seed, epoch, step or image, view), never of the process or worker that makes it.
Views are made in batches, on the device that trains. Images in files are first decoded, cropped and resized by
data-loading workers.
"""

import atexit
import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import queues
from tempfile import gettempdir

import numpy as np
import torch
from numpy.random import SeedSequence
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from moco import augment, distributed
from moco.datasets import Split, pixels
from moco.errors import WORKER_DIED, RunError, UsageError
from moco.launch import STOP_SIGNALS

# The kinds of random choices, a part of their seeds: no two kinds share a stream. 4 was used by version 0.1.
IMAGES, KEYS, PARAMETERS, JITTER, CROPS = 0, 1, 2, 3, 5
SHARED_MEMORY = "/dev/shm"  # where data-loading workers put their batches
LONGEST_TMPDIR = 107 - len("/pymp-01234567/listener-01234567")  # a socket's path has at most 107 bytes


def generator(*numbers: int) -> torch.Generator:
    """A torch.Generator seeded with all of these integers."""
    state = SeedSequence(numbers).generate_state(1, "uint64")
    return torch.Generator().manual_seed(int(state[0]) >> 1)


@dataclass(frozen=True)
class Plan:
    """Which images are in which global batch, by seed and epoch."""

    images: int
    batch_size: int
    seed: int
    drop_last: bool

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.images // self.batch_size if self.drop_last else -(-self.images // self.batch_size)

    def rows(self, epoch: int) -> Tensor:
        """The images of an epoch as rows of the data set, (n,) int64; its batches are rows.split(batch_size)."""
        rows = torch.randperm(self.images, generator=generator(self.seed, epoch, IMAGES))
        return rows[: len(self) * self.batch_size]

    def key_orders(self, epoch: int) -> Tensor:
        """(steps, B) int64: at each step, row j of the key views shows image order[j] of the batch (Shuffling BN)."""
        numbers = torch.rand(len(self), self.batch_size, generator=generator(self.seed, epoch, KEYS))
        return numbers.argsort(dim=1, stable=True)  # some are equal


class Batches:
    """The global batches of an epoch, and this process's share of their views.

    Args:
        recipes: an augment.Recipe per view. The second view, if any, is the key's.
        batch_size: of the global batch. mean, std: of the pixels, in 0..1.
        shuffle_keys: this process's key views show other images than its query views, given by an order (Shuffling BN).
        drop_last: omit the last batch if it is smaller than the others.
        workers: data-loading workers of this machine, over all its processes. They prepare the next epoch, up to
            `epochs`, during the current one.
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
        workers: int = 8,
        epochs: int = 1,
        compile: bool = False,
    ):
        if drop_last and len(split) < batch_size:
            raise UsageError(f"the {len(split)} training images are fewer than one batch (-b {batch_size})")
        self.recipes, self.device, self.shuffle_keys = recipes, device, shuffle_keys
        self.plan = Plan(len(split), batch_size, seed, drop_last)
        self.labels, self.images = split.labels.to(device), split.images
        in_files = split.images is None
        self.files = Files(Crops(split, recipes, seed), self.plan, epochs, workers, device) if in_files else None
        self.views = [augment.Views(r, mean, std, device, compile, cropped=in_files) for r in recipes]

    def __len__(self) -> int:
        return len(self.plan)

    def close(self) -> None:
        """Stops the workers, which ignore signals."""
        if self.files:
            self.files.close()

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
        """Yields (views, labels, order) from step `first` on.

        views: a (n, 3, S, S) float32 tensor per view, of this process's n rows. labels: (n,) int64, of the queries.
        order: (B,) int64, or None without shuffle_keys: row j of the global key views shows image order[j] of the batch.
        """
        plan, device = self.plan, self.device
        size = (None, None) if self.files else self.images.shape[2:]  # None: the workers crop
        drawn, jitter = [], []
        for view, recipe in enumerate(self.recipes):
            parameters = generator(plan.seed, epoch, PARAMETERS, view)
            drawn.append(recipe.draw(plan.images, *size, parameters).to(device))
            jitter.append(generator(plan.seed, epoch, JITTER, view))
        # One transfer per epoch: one per step would make the host wait for the step before.
        batches = plan.rows(epoch).to(device).split(plan.batch_size)
        on_host = plan.key_orders(epoch) if self.shuffle_keys else None
        orders = [None] * len(self) if on_host is None else on_host.to(device)
        for step, (batch, order) in enumerate(zip(batches, orders, strict=True)):
            colours = [recipe.draw_order(rng) for recipe, rng in zip(self.recipes, jitter, strict=True)]
            if step < first:
                continue
            rows = [
                distributed.my_rows(batch if order is None or view != 1 else batch[order])
                for view in range(len(self.views))
            ]
            if self.files:
                images = self.files(epoch, step)
                if order is not None:  # the process with an image's query decoded it: its key crop changes processes
                    images[1] = distributed.exchange(images[1], order, on_host[step])
            else:
                images = [self.images[each] for each in rows]
            parameters = [draws[each] for draws, each in zip(drawn, rows, strict=True)]
            views = [make(*what) for make, *what in zip(self.views, images, parameters, colours, strict=True)]
            yield views, self.labels[rows[0]], order


class Files:
    """Images in files, decoded and cropped by data-loading workers, which live for all epochs."""

    def __init__(self, dataset: "Decoded", plan: Plan, epochs: int, workers: int, device: torch.device):
        self.dataset, self.plan, self.epochs, self.workers, self.device = dataset, plan, epochs, workers, device
        self.stream, self.next = None, None  # the workers' batches, and the (epoch, step) of the next one

    def __call__(self, epoch: int, step: int) -> list[Tensor]:
        """The crops of this process's queries, (n, 3, S, S) uint8 on the device per view. Each file is decoded once."""
        if self.next != (epoch, step):
            self.close()
            self.stream = self.start(epoch, step)
        self.next = None  # after an error there is nothing to continue
        crops = next(self.stream)
        self.next = (epoch, step + 1) if step + 1 < len(self.plan) else (epoch + 1, 0)
        return list(crops.to(self.device, non_blocking=True).unbind(1))

    def start(self, epoch: int, first: int) -> Iterator[Tensor]:
        epochs, share = range(epoch, max(self.epochs, epoch + 1)), -(-self.plan.batch_size // distributed.world_size())
        items, steps = islice(self.items(epochs), first, None), len(self.plan) * len(epochs) - first
        return load_batches(self.dataset, items, steps, share, self.workers, self.device)

    def items(self, epochs: Iterable[int]) -> Iterator[list[tuple[int, int]]]:
        """The items (epoch, row) that this process's workers load for each step."""
        for epoch in epochs:
            for rows in self.plan.rows(epoch).split(self.plan.batch_size):
                yield [(epoch, i) for i in distributed.my_rows(rows).tolist()]

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def load_batches(
    dataset: "Decoded", items: Iterable[list], steps: int, share: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yields the batch that `dataset` makes of each step's items, in data-loading workers.

    Args:
        items: for each of the `steps` steps, at most `share` of them. workers: of this machine, over all its processes.
    Raises:
        RunError: an image cannot be read, or there is too little shared memory.
    """
    processes = distributed.processes_on_node
    workers = min(-(-workers // processes), distributed.cores(), steps)
    if workers and os.path.isdir(SHARED_MEMORY):
        # Each worker has two batches ready; without a copy on a GPU the loop has the last one and the one before.
        size = share * dataset.empty.shape[1:].numel()
        free, needed = shutil.disk_usage(SHARED_MEMORY).free, min(2 * workers + 2, steps) * size * processes
        if free < needed:
            raise RunError(
                f"{SHARED_MEMORY} has {free >> 20} MiB free, and {workers * processes} data-loading workers need "
                f"{-(-needed >> 20)} MiB: enlarge it (docker run --shm-size), or choose a smaller -j or -b",
            )
    if workers and len(os.fsencode(gettempdir())) > LONGEST_TMPDIR:
        raise RunError(
            f"TMPDIR '{gettempdir()}' is too long for the sockets of data-loading workers: set a shorter one, or use -j 0"
        )
    loader = DataLoader(
        dataset,
        batch_sampler=items,
        collate_fn=default_convert,  # unchanged
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker,
    )
    try:
        iterator = iter(loader)
    except OSError as error:
        for worker in multiprocessing.active_children():  # those that have started
            worker.kill()
        raise RunError(f"data-loading workers cannot be started: {error.strerror}; try a smaller -j") from None
    if workers:  # they ignore signals: a program that does not close this generator would wait for them at its end
        atexit.register(iterator._shutdown_workers)
    try:
        for made in iterator:
            if isinstance(made, RunError):
                raise made
            yield made
    except (OSError, EOFError):  # a worker was killed while it passed on a batch
        raise RunError(WORKER_DIED) from None
    finally:
        if workers:
            iterator._shutdown_workers()
            atexit.unregister(iterator._shutdown_workers)


def begin_worker(worker: int) -> None:
    """Makes a worker leave signals to the training process, and end if it cannot pass on a batch.

    By itself it would only print why (a full SHARED_MEMORY), and the run would wait for that batch for ever.
    """
    # Pillow's: every worker would repeat them.
    warnings.filterwarnings("ignore", "Palette images with Transparency|(Possibly c|C)orrupt EXIF")
    for number in STOP_SIGNALS:  # a process that gets one needs its workers for the last step
        signal.signal(number, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))


class Decoded(Dataset):
    """Makes uint8 tensors from the images in files. `empty`: the batch without items."""

    def __init__(self, split: Split, *shape: int):
        # One array that forked workers share: reference counts would copy a list page by page.
        self.split = replace(split, paths=np.array([os.fsencode(path) for path in split.paths]))
        self.empty = torch.empty(0, *shape, dtype=torch.uint8)

    def __getitems__(self, items: list) -> Tensor | RunError:
        """The batch of these items, or an item's error: DataLoader would add a traceback if it were raised."""
        try:
            return torch.stack([self[item] for item in items]) if items else self.empty
        except RunError as error:
            return error


class Crops(Decoded):
    """(views, 3, S, S) uint8 per item (epoch, index): random crops of a file that is decoded once."""

    def __init__(self, split: Split, recipes: Sequence[augment.Recipe], seed: int):
        super().__init__(split, len(recipes), 3, recipes[0].size, recipes[0].size)
        self.recipes, self.seed = recipes, seed

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        epoch, index = item
        image = pixels(self.split.pillow(index))[None]
        return torch.stack([self.crop(image, epoch, index, view) for view in range(len(self.recipes))])

    def crop(self, image: Tensor, epoch: int, index: int, view: int) -> Tensor:
        recipe, rng = self.recipes[view], generator(self.seed, epoch, CROPS, index, view)
        top, left, height, width = recipe.draw_crop(*image.shape[2:], rng)
        return augment.resize(image[:, :, top : top + height, left : left + width], recipe.size, recipe.size)[0]


class CentreCrops(Decoded):
    """(3, S, S) uint8 per item, the index of a file: its centre crop, see augment.Centre."""

    def __init__(self, split: Split, centre: augment.Centre):
        super().__init__(split, 3, centre.size, centre.size)
        self.centre = centre

    def __getitem__(self, index: int) -> Tensor:
        return self.centre.cut(pixels(self.split.pillow(index))[None])[0]


class Centres:
    """This process's share of a split's images, in batches: (images (n, 3, S, S) float32, labels (n,)).

    Every process has equally many batches; the last ones may be empty. Process r of R has rows r, r + R, ...

    Args:
        centre: makes the inputs. batch_size: over all processes. workers: for images in files; of this machine, over
            all its processes.
    """

    def __init__(self, split: Split, centre: augment.Centre, batch_size: int, device: torch.device, workers: int = 8):
        self.split, self.centre, self.device, self.workers = split, centre, device, workers
        self.batch = -(-batch_size // distributed.world_size())
        self.labels = split.labels.to(device)

    def __len__(self) -> int:
        return max(1, -(-len(self.split) // (self.batch * distributed.world_size())))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Slices, because rows chosen by indices from the CPU wait for the device.
        mine = slice(distributed.rank(), None, distributed.world_size())
        parts = [slice(i * self.batch, (i + 1) * self.batch) for i in range(len(self))]
        if self.split.images is not None:
            kept = self.split.images[mine]
            make, loaded = self.centre, (kept[part] for part in parts)
        else:
            make, dataset = self.centre.normalise, CentreCrops(self.split, self.centre)
            items = [[*range(len(self.split))[mine][part]] for part in parts]
            loaded = load_batches(dataset, items, len(items), self.batch, self.workers, self.device)
        with closing(loaded):
            for part, images in zip(parts, loaded, strict=True):
                yield make(images.to(self.device, non_blocking=True)), self.labels[mine][part]
