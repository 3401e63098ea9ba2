"""What a user sees during a run: a progress bar or lines, log.csv, TensorBoard."""

import csv
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moco import distributed
from moco.errors import RunError


def say(text: str) -> None:
    """A line on stdout, from rank 0 alone. RunError: stdout is a closed pipe or a full disk."""
    if distributed.rank() != 0:
        return
    try:
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))  # names of classes and files can be anything
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered must go somewhere when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RunError(f"stdout cannot be written: {error.strerror}", alone=True) from None


class Progress:
    """The steps of an epoch: a bar on a terminal, MoCo-style lines elsewhere.

    An epoch sees `images` images in batches of `batch_size`, of which the last one may be smaller. `record` (see
    epoch.Record) says from which step the epoch goes on and the seconds that it has already spent: before it was
    interrupted, or while the epoch before was saved.
    """

    def __init__(self, epoch: int, epochs: int, images: int, batch_size: int, record):
        self.epoch, self.epochs, self.images, self.batch_size = epoch, epochs, images, batch_size
        self.steps = steps = -(-images // batch_size)
        self.first = self.done = first = record.shown
        self.begun = self.mark = time.perf_counter()
        self.start = self.begun - record.seconds
        self.waiting = 0.0
        self.bar = None
        if distributed.rank() == 0 and sys.stdout.isatty():
            self.bar = tqdm(total=steps, initial=first, desc=f"epoch {epoch}/{epochs - 1}", unit="step", leave=False)

    def waited_for(self, iterable: Iterable) -> Iterator[tuple[int, Any]]:
        """Steps and their items; counts the seconds that it takes to get these (on a GPU: to ask for them)."""
        iterator = iter(iterable)
        for step in count(self.first):
            start = time.perf_counter()
            if (item := next(iterator, None)) is None:
                return
            self.waiting += time.perf_counter() - start
            yield step, item

    def spent(self) -> float:
        """Seconds of the epoch so far."""
        return time.perf_counter() - self.start

    def seen(self, steps: int) -> int:
        """Images in the first `steps` steps of an epoch."""
        return min(steps * self.batch_size, self.images)

    @property
    def images_per_second(self) -> float:
        return (self.seen(self.done) - self.seen(self.first)) / max(time.perf_counter() - self.begun, 1e-9)

    def show(self, done: int, **values: str) -> None:
        """After `done` steps of the epoch."""
        now = time.perf_counter()
        step_time = (now - self.mark) / max(done - self.done, 1)
        data_time = self.waiting / max(done - self.done, 1)
        self.mark, self.waiting = now, 0.0
        moved, self.done = done - self.done, done
        if distributed.rank() != 0:
            return
        left = (self.images * (self.epochs - self.epoch) - self.seen(done)) / self.images_per_second
        if self.bar is not None:
            self.bar.update(moved)
            self.bar.set_postfix({**values, "images/s": f"{self.images_per_second:.0f}"}, refresh=False)
            return
        shown = "  ".join(f"{name} {value}" for name, value in values.items())
        say(
            f"Epoch: [{self.epoch}][{done:{len(str(self.steps))}}/{self.steps}]  Time {step_time:.3f}  "
            f"Data {data_time:.3f}  {shown}  images/s {self.images_per_second:.0f}  "
            f"ETA {timedelta(seconds=round(left))}"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Log:
    """One row an epoch in FOLDER/NAME.csv, and the same values in FOLDER/tensorboard/NAME. Only rank 0
    writes.

    A resumed run drops the rows from its first epoch on: each epoch is there once. The log of an earlier run is
    replaced when there is a first row to replace it.
    """

    def __init__(self, folder: str | Path, name: str, columns: list[str], first_epoch: int = 0):
        self.columns = columns
        self.writer = None
        if distributed.rank() != 0:
            return
        self.path = Path(folder, f"{name}.csv")
        self.rows = [row for row in read(self.path) if int(row["epoch"]) < first_epoch]
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        threading.excepthook = all_but_os_errors
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if first_epoch:
                self.write(self.rows)
            self.writer = SummaryWriter(os.path.join(folder, "tensorboard", name), purge_step=first_epoch)
        except OSError as error:
            raise RunError(f"'{error.filename or self.path}' cannot be written: {error.strerror}") from None

    def write(self, rows: Iterable[dict]) -> None:
        tmp = self.path.with_name(self.path.name + ".tmp")
        with open(tmp, "w", newline="") as file:
            table = csv.DictWriter(file, self.columns, extrasaction="ignore", restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        os.replace(tmp, self.path)
        self.rows = list(rows)

    def add(self, epoch: int, **values: float | None) -> None:
        """Values may be None: not measured in this epoch."""
        if distributed.rank() != 0:
            return
        row = {"epoch": epoch, **{name: rounded(value) for name, value in values.items()}}
        try:
            self.write([*self.rows, row])
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, epoch)
            self.writer.flush()
        except OSError as error:
            raise RunError(f"'{self.path}' or tensorboard/ next to it cannot be written: {error.strerror}") from None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def all_but_os_errors(error: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a thread's error, unless TensorBoard's thread has met the full disk that `Log` reports."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def read(path: str | Path) -> list[dict[str, str]]:
    """The rows of a log, as dicts of strings; none, if there is no log. A row that was cut short is left out."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        return [
            row for row in csv.DictReader(file) if (row.get("epoch") or "").isdecimal() and None not in row.values()
        ]
