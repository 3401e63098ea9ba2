"""Which images, which views, on which process, at which step.

Every random choice is a function of (seed, epoch, step or image, view), never of the process or worker that makes it.
Views of images in memory are made in batches on the device that trains, those of others by Pillow in loader processes.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from moco import augment, distributed
from moco.datasets import Split, open_image
from moco.errors import RunError, UsageError
from moco.signals import ignore_signals

# What a random choice is for: part of its seed, so that no two choices share a stream.
IMAGES, KEYS, PARAMETERS, JITTER, PILLOW = range(5)


def generator(*numbers):
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
        pil: make the views of images in memory by Pillow, too. workers: loader processes, over all of this machine.
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
        compile: bool = False,
    ):
        self.split, self.recipes, self.device, self.seed = split, recipes, device, seed
        self.batch, self.shuffle_keys, self.drop_last = batch_size, shuffle_keys, drop_last
        self.labels = split.labels.to(device)
        self.worker_seconds = {}  # processor time that each worker has reported
        if drop_last and len(split) < batch_size:
            raise UsageError(f"the {len(split)} training images are fewer than one batch (-b {batch_size})")
        self.loader = None
        if split.images is not None and not pil:
            self.views = [augment.Views(recipe, mean, std, device, compile) for recipe in recipes]
        else:
            self.plan = []  # what the sampler hands to the workers; a new one each epoch
            count = min(-(-workers // distributed.processes_on_node), distributed.cores())
            self.loader = DataLoader(
                PillowViews(split, [recipe.transform(mean, std) for recipe in recipes], seed),
                batch_sampler=self.plan,
                collate_fn=collate,
                num_workers=count,
                pin_memory=device.type == "cuda",
                worker_init_fn=ignore_signals,
                persistent_workers=count > 0,
            )

    def close(self) -> None:
        """Ends the loader processes: they ignore signals, so nobody else can."""
        if self.loader is not None and self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()

    def cpu_seconds(self) -> float:
        """Processor time of this process and its loader processes so far."""
        return time.process_time() + sum(self.worker_seconds.values())

    def __len__(self) -> int:
        return len(self.split) // self.batch if self.drop_last else -(-len(self.split) // self.batch)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
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


def collate(items):
    """A batch of views or the error of one; the worker that made it, if any, and the worker's processor time so far."""
    broken = next((item for item in items if isinstance(item, Exception)), None)
    # A small last batch has fewer images than there are processes.
    images = broken or (torch.stack(items) if items else torch.empty(0, 3, 32, 32))
    worker = get_worker_info()
    return images, worker.id if worker else None, time.process_time()


class Centres:
    """This process's share of a split's images, in batches: (images (n, 3, S, S) float32, labels (n,)).

    Args:
        centre: what makes a (n, 3, H, W) uint8 batch an input, see augment.Centre.
    """

    def __init__(self, split: Split, centre: augment.Centre, batch_size: int, device: torch.device):
        self.split, self.centre, self.batch, self.device = split, centre, batch_size, device
        self.labels = split.labels.to(device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = torch.arange(len(self.split), device=self.device)[distributed.rank() :: distributed.world_size()]
        with ThreadPoolExecutor(min(16, distributed.cores())) as pool:
            for rows in mine.split(self.batch):  # one batch at least, though it be empty
                if self.split.images is not None:
                    images = self.centre(self.split.images[rows.to(self.split.images.device)].to(self.device))
                else:
                    none = torch.empty(0, 3, self.centre.size, self.centre.size, device=self.device)
                    images = torch.cat([none, *pool.map(self.decoded, rows.tolist())])
                yield images, self.labels[rows]

    def decoded(self, index: int) -> Tensor:
        image = torch.from_numpy(np.array(open_image(self.split.paths[index]))).permute(2, 0, 1)
        return self.centre(image[None].to(self.device))
