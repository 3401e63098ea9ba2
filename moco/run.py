"""A training run: the state within an epoch, progress lines, log, checkpoints, and stopping on a signal."""

import csv
import fcntl
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from moco import checkpoint, distributed
from moco.errors import RunError, first_line, say
from moco.launch import STOP_SIGNALS
from moco.losses import HEALTH

SAVE_EVERY = 30 * 60  # seconds: the most work that a run loses when it is killed within an epoch
PATIENCE = 20  # seconds to wait for another run in the output folder: a requeued job meets the old one's last save


class Run:
    """A context manager around the epochs of a training loop; pretraining and linear evaluation have one each.

    Args:
        folder: of NAME.csv, tensorboard/NAME and the checkpoint `last`. columns: of the log.
        print_freq: steps between lines. advice: what may help if the loss is not finite.
        epochs: of the run. steps, images: per epoch. batch_size: of the global batch.

    Attributes:
        epoch, step: the next step to train.
        losses: (steps,) float32 of the epoch, on the device; means over the processes up to `step`, then this one's own.
        stopping: the signal for which all processes have agreed to stop, or 0. saving: whether to
            save now, within the epoch: every SAVE_EVERY seconds, or because of a signal.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        last: str,
        columns: list[str],
        print_freq: int,
        device: torch.device,
        advice: str,
        *,
        epochs: int,
        steps: int,
        images: int,
        batch_size: int,
    ):
        self.folder, self.name, self.last, self.columns = Path(folder), name, last, columns
        self.epochs, self.length, self.images, self.batch_size = epochs, steps, images, batch_size
        self.print_freq, self.advice = print_freq, advice
        self.epoch = self.step = 0
        self.lr = 0.0  # at the last `sync`
        self.losses, self.health = torch.zeros(steps, device=device), torch.zeros(5, device=device)
        self.seconds = 0.0  # spent on the epoch by the run that is resumed
        self.unevaluated = None  # from a checkpoint: the summary of an epoch that is trained but not evaluated
        self.stopping, self.saving, self.signal = 0, False, 0  # signal: what this process got
        self.writer, self.table = checkpoint.Writer(), None

    def resume(self, saved: dict, optimizer: torch.optim.Optimizer, path: str) -> None:
        """Continues from a checkpoint, read from `path`, that was saved after an epoch or within one."""
        try:
            checkpoint.load_optimizer(optimizer, saved["optimizer"])
            self.epoch, self.step = int(saved["epoch"]), int(saved.get("step", 0))
            if self.step:
                self.losses[: self.step] = saved["losses"]
                self.health.copy_(saved["health"])
                self.seconds = float(saved.get("seconds", 0))
            if self.step == self.length:
                self.unevaluated = {name: float(value) for name, value in saved["unevaluated"].items()}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise RunError(
                f"checkpoint '{path}' cannot be resumed: {type(error).__name__}: {first_line(error)}"
            ) from None

    def __enter__(self) -> "Run":
        if distributed.rank() == 0:
            self.table = Log(self.folder, self.name, self.columns, self.epoch)
        self.handlers = {number: signal.signal(number, self.ask) for number in STOP_SIGNALS}
        self.saved = time.perf_counter()
        self.began = self.saved - self.seconds
        return self

    def __exit__(self, kind, *error) -> None:
        if self.table:
            self.table.close()
        try:
            self.writer.close(failed=kind is not None)
            if kind in (None, SystemExit):
                distributed.barrier()  # until rank 0 has saved: neither a signal nor the launcher may end one before
        finally:
            # Others may still get the signal for which all leave, or SIGTERM from srun once one has left: keep our status.
            leaving = kind is SystemExit and distributed.world_size() > 1
            for number, handler in self.handlers.items():
                signal.signal(number, signal.SIG_IGN if leaving and number != signal.SIGINT else handler)

    def ask(self, number, frame) -> None:
        """Handles a signal. A second SIGINT ends the run at once; schedulers send the others more than once."""
        self.signal = number
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)

    def steps(self, batches: Iterable) -> Iterator[tuple[int, Any]]:
        """Yields (step, batch) for the rest of the epoch; `batches` starts at `self.step`."""
        self.first, self.waiting = self.step, 0.0
        self.steps_began = self.mark = start = time.perf_counter()
        with tqdm(
            total=self.length,
            initial=self.first,
            desc=f"epoch {self.epoch}/{self.epochs - 1}",
            unit="step",
            leave=False,
            disable=distributed.rank() > 0 or None,  # None: a bar only on a terminal
            file=sys.stdout,
        ) as self.bar:
            for step, batch in enumerate(batches, self.first):
                self.waiting += time.perf_counter() - start  # on a GPU: the time to ask for the batch
                yield step, batch
                start = time.perf_counter()

    def add(self, step: int, loss: Tensor, health: Tensor | None = None) -> None:
        """Stores a step's loss and, where measured, the health of its contrast. Does not wait for the device."""
        self.losses[step] = loss.detach()
        if health is not None:
            self.health[:4] += health
            self.health[4] += 1

    def due(self, step: int) -> bool:
        """Is `sync` due after this step? A single process that got a signal stops at once."""
        stop = self.signal > 0 and distributed.world_size() == 1
        return (step + 1) % self.print_freq == 0 or step + 1 == self.length or stop

    def sync(self, step: int, lr: float) -> None:
        """Averages the losses over the processes and prints a line; they agree whether to save or stop. One collective.

        Signals need not reach all processes at the same step, nor be the same: all stop for the first of STOP_SIGNALS
        that one of them got, so that they exit with the same status.

        RunError: a loss is not finite.
        """
        late = time.perf_counter() - self.saved > SAVE_EVERY
        flags = self.losses.new_tensor([late, *(self.signal == number for number in STOP_SIGNALS)])
        fresh = distributed.all_mean(torch.cat([flags, self.losses[self.step : step + 1]]))
        self.losses[self.step : step + 1] = fresh[len(flags) :]
        late, *fresh = fresh.tolist()
        asked, losses = fresh[: len(STOP_SIGNALS)], fresh[len(STOP_SIGNALS) :]
        for number, loss in enumerate(losses, self.step):
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss of epoch {self.epoch}, step {number}, is not finite; {self.advice}. "
                    "The last checkpoint was saved before this step"
                )
        moved, self.step, self.lr = step + 1 - self.step, step + 1, lr
        self.stopping = next(compress(STOP_SIGNALS, asked), 0)
        self.saving = bool(self.stopping or late) and self.step < self.length
        self.writer.check()
        self.show(moved, Loss=f"{losses[-1]:.4f} ({self.losses[: self.step].mean():.4f})", lr=f"{lr:.4g}")

    def show(self, moved: int, **values: str) -> None:
        """After `moved` more steps: a bar on a terminal, MoCo-style lines elsewhere."""
        now, speed = time.perf_counter(), self.images_per_second
        self.bar.set_postfix(**values, refresh=False)
        self.bar.update(moved)
        left = timedelta(seconds=round((self.images * (self.epochs - self.epoch) - self.seen(self.step)) / speed))
        if self.bar.disable:
            shown = "  ".join(f"{name} {value}" for name, value in values.items())
            self.say(
                f"Epoch: [{self.epoch}][{self.step:{len(str(self.length))}}/{self.length}]  "
                f"Time {(now - self.mark) / moved:.3f}  Data {self.waiting / moved:.3f}  "
                f"{shown}  images/s {speed:.0f}  ETA {left}"
            )
        self.mark, self.waiting = now, 0.0

    def say(self, text: str) -> None:
        """As errors.say; a run that got a signal goes on without stdout, since Ctrl-C also ends `tee`."""
        try:
            say(text)
        except RunError:
            if not (self.signal or self.stopping):
                raise

    def seen(self, step: int) -> int:
        """Images in this many steps of an epoch."""
        return min(step * self.batch_size, self.images)

    @property
    def images_per_second(self) -> float:
        return (self.seen(self.step) - self.seen(self.first)) / max(time.perf_counter() - self.steps_began, 1e-9)

    def summary(self) -> dict[str, float]:
        """The log's row of a trained epoch: means over its steps and the processes. One collective."""
        *sums, measured = distributed.all_mean(self.health).tolist()
        if self.unevaluated:
            return self.unevaluated
        health = {name: value / measured for name, value in zip(HEALTH, sums, strict=True)} if measured else {}
        return dict(lr=self.lr, images_per_second=self.images_per_second, loss=self.losses.mean().item(), **health)

    def state(self, unevaluated: dict | None = None) -> dict:
        """What a checkpoint within an epoch needs; `unevaluated`: the `summary`, if only the evaluation is missing.

        Every process must call it.
        """
        return dict(
            step=self.step,
            losses=self.losses[: self.step].clone(),
            health=distributed.all_mean(self.health),
            seconds=time.perf_counter() - self.began,
            unevaluated=unevaluated,
        )

    def save(self, content: dict, kept: str | None = None) -> None:
        """Writes a checkpoint in a thread, on rank 0; `kept`: another file with the same content.

        It is written first, so that a run killed between the two writes both again when it is resumed.
        """
        self.saved = time.perf_counter()
        if distributed.rank() == 0:
            self.writer.save([self.folder / name for name in (kept, self.last) if name], content)

    def log(self, row: dict[str, float]) -> None:
        """Ends the epoch: adds `seconds` to its row, and the row to the log.

        Later time, saving included, counts as the next epoch's.
        """
        now = time.perf_counter()
        row["seconds"] = now - self.began
        if self.table:
            self.table.add(self.epoch, **row)
        self.epoch, self.step, self.unevaluated, self.began = self.epoch + 1, 0, None, now
        self.losses.zero_()
        self.health.zero_()

    def exit_if_stopping(self) -> None:
        """Waits for the checkpoint and exits, if the processes have agreed to stop and the run is not complete."""
        if not self.stopping or self.epoch == self.epochs:
            return
        self.writer.finish()
        self.bar.close()
        where = f"in epoch {self.epoch} after step {self.step}" if self.step else f"after epoch {self.epoch - 1}"
        self.say(f"stopped {where}; --resume auto continues from there")
        raise SystemExit(128 + self.stopping)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Log:
    """One row per epoch in FOLDER/NAME.csv, and the same values in FOLDER/tensorboard/NAME. Rank 0 has one.

    The first new row replaces an earlier run's rows. A resumed run keeps those before its first epoch, so that no epoch
    appears twice.
    """

    def __init__(self, folder: str | Path, name: str, columns: list[str], first_epoch: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.path, self.columns = Path(folder, f"{name}.csv"), columns
        self.rows = [row for row in read_log(self.path) if int(row["epoch"]) < first_epoch]
        threading.excepthook = all_but_os_errors
        self.writer = SummaryWriter(os.path.join(folder, "tensorboard", name), purge_step=first_epoch)

    def add(self, epoch: int, **values: float) -> None:
        """Appends a row with the values that were measured in this epoch."""
        self.rows.append({"epoch": epoch} | {name: f"{value:.7g}" for name, value in values.items()})
        tmp = self.path.with_name(self.path.name + ".tmp")
        try:
            with open(tmp, "w", newline="") as file:
                table = csv.DictWriter(file, self.columns, extrasaction="ignore", lineterminator="\n")
                table.writeheader()
                table.writerows(self.rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, self.path)
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch)
            self.writer.flush()
        except OSError as error:
            raise RunError(f"'{self.path}' or tensorboard/ next to it cannot be written: {error.strerror}") from None

    def close(self) -> None:
        with suppress(OSError):  # `add` has reported it
            self.writer.close()


def all_but_os_errors(error: threading.ExceptHookArgs) -> None:
    """A threading.excepthook that skips OSErrors: when the disk is full, TensorBoard's thread has one, and `Log` reports it."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def read_log(path: str | Path) -> list[dict[str, str]]:
    """The rows of a log, as dicts of strings; [] without a log. Incomplete rows are left out."""
    if not Path(path).is_file():
        return []
    csv.field_size_limit(sys.maxsize)  # a file that is not a log has no row, however long its lines
    with open(path, newline="", errors="replace") as file:
        return [
            row for row in csv.DictReader(file) if (row.get("epoch") or "").isdecimal() and None not in row.values()
        ]


@contextmanager
def lock(folder: str | Path, name: str) -> Iterator[None]:
    """Keeps out other runs that would write FOLDER/NAME.csv and its checkpoints.

    Rank 0 takes the lock; the others wait until it has. The kernel releases it when that process ends, however it ends
    (NFSv3 not if the machine goes down); child processes do not inherit it.

    Raises:
        RunError: another run has it, even after PATIENCE seconds, or the folder cannot be written.
    """
    path = Path(folder, f"{name}.lock")
    with ExitStack() as stack:
        if distributed.rank() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, "a+b", buffering=0))  # not truncated: it may be another run's
                acquire(file, path)
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError as error:
                raise RunError(f"'{error.filename or path}' cannot be written: {error.strerror}") from None
        distributed.barrier()
        yield


def acquire(file: BinaryIO, path: Path) -> None:
    """Locks the open file; without locks on its file system, prints a note."""
    for second in range(PATIENCE):
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another run"
        except OSError as error:
            return say(f"note: '{path.parent}' cannot be locked ({error.strerror}): do not start a second run in it")
        if second == 0:
            say(f"note: {owner} is using '{path.parent}': waiting up to {PATIENCE} seconds for it to end")
        time.sleep(1)
    raise RunError(
        f"{owner} is using '{path.parent}': wait for it to end, or choose another --output-dir (if its machine is down, "
        f"delete '{path}')"
    )
