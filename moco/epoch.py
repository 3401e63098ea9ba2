"""What pretraining and linear evaluation share: learning rates, precision, and the record of an epoch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moco import checkpoint, distributed
from moco.errors import RunError
from moco.signals import Interruption


def moco_learning_rate(
    epoch: float, lr: float, epochs: int, warm_up: int, schedule: Sequence[int] | None = None
) -> float:
    """MoCo's learning rate at a moment of the run, in epochs (one step into epoch 3 is 3 + 1 / steps).

    Linear from 0 to lr over the warm-up; then half a cosine from lr to 0 over the rest, or with a schedule lr divided
    by 10 at each of its epochs.
    """
    if epoch < warm_up:
        return lr * epoch / warm_up
    if schedule is None:
        return lr * (1 + math.cos(math.pi * (epoch - warm_up) / (epochs - warm_up))) / 2
    return lr * 0.1 ** sum(epoch >= milestone for milestone in schedule)


def supcon_learning_rate(epoch: float, lr: float, epochs: int, warm_up: int) -> float:
    """Likewise, the learning rate of SupContrast's authors, who count epochs from 1.

    Half a cosine from lr to lr / 1000 over all epochs, stepped once an epoch: epoch e of 0, 1, ... has its value at
    e + 1. Over the warm-up instead linear, step by step, from 0.01 to the cosine's value at the warm-up's end.
    """

    def cosine(done):
        return lr * (0.001 + 0.999 * (1 + math.cos(math.pi * done / epochs)) / 2)

    if epoch < warm_up:
        return 0.01 + (cosine(warm_up) - 0.01) * epoch / warm_up
    return cosine(math.floor(epoch) + 1)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of the encoders; `precision`: "bf16" or "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Record:
    """What an epoch has seen so far: its losses and the health of its contrast, kept on the device until shown.

    losses: (steps,) float32, global up to step `shown`, this process's own after it. health: (5,) float32, sums of
    losses.contrast_health's four values, and their number. seconds: spent before the epoch's first step of this
    run. unevaluated: the log's row of an epoch whose steps are complete, from a checkpoint.
    """

    def __init__(self, steps: int, device: torch.device):
        self.shown = 0
        self.losses, self.health = torch.zeros(steps, device=device), torch.zeros(5, device=device)
        self.seconds = 0.0
        self.unevaluated = None

    def add(self, step: int, loss: Tensor, health: Tensor | None = None) -> None:
        self.losses[step] = loss.detach()
        if health is not None:
            self.health[:4] += health
            self.health[4] += 1

    def share(self, done: int, asked: int) -> tuple[list[float], bool]:
        """Makes the losses of the steps since the last call, up to `done`, global; returns them, and whether any
        process is asked to stop. One collective."""
        asked = self.losses.new_full((1,), float(asked))
        fresh = distributed.all_mean(torch.cat([self.losses[self.shown : done], asked]))
        self.losses[self.shown : done] = fresh[:-1]
        self.shown = done
        *losses, asked = fresh.tolist()
        return losses, asked > 0

    def look(self, done: int, epoch: int, interruption: Interruption, advice: str) -> bool:
        """Shares the losses; RunError at one that is not finite, with `advice`. Do the processes agree to stop?"""
        start = self.shown
        losses, stop = self.share(done, interruption.asked)
        for step, loss in enumerate(losses, start):
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss of epoch {epoch}, step {step}, is not finite; {advice}. "
                    "The last checkpoint is from before it"
                )
        return stop

    def state(self, seconds: float, unevaluated: dict | None = None) -> dict:
        """What a checkpoint within the epoch holds of it; `unevaluated`: the log's row of an epoch whose steps are
        complete. Each process must call it."""
        seen = dict(step=self.shown, losses=self.losses[: self.shown].clone(), health=distributed.all_mean(self.health))
        seen["seconds"] = seconds
        return seen | dict(unevaluated=unevaluated) if unevaluated else seen

    def load(self, saved: dict) -> None:
        """Goes on from a checkpoint, if that is from within an epoch."""
        self.shown = int(saved.get("step", 0))
        if self.shown:
            self.losses[: self.shown] = saved["losses"]
            self.health.copy_(saved["health"])
            self.seconds = float(saved.get("seconds", 0))
            if self.shown == len(self.losses):
                self.unevaluated = {name: float(value) for name, value in saved["unevaluated"].items()}

    def averages(self) -> dict:
        """Loss and health, means over the epoch and the processes. Each process must call it."""
        *sums, number = distributed.all_mean(self.health).tolist()
        names = ("accuracy", "positive_similarity", "negative_similarity", "positives")
        health = {name: value / number for name, value in zip(names, sums, strict=True)} if number else {}
        return dict(loss=self.losses.mean().item(), **health)

    def restart(self, seconds: float) -> None:
        """For the next epoch, which has already spent these seconds."""
        self.losses.zero_()
        self.health.zero_()
        self.shown, self.seconds, self.unevaluated = 0, seconds, None


def resume(saved: dict, path: str, optimizer: torch.optim.Optimizer, record: Record) -> int:
    """The optimizer's state and that of a begun epoch, from a checkpoint; returns the epoch to go on with."""
    try:
        checkpoint.load_optimizer(optimizer, saved["optimizer"])
        record.load(saved)
        return int(saved["epoch"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(f"checkpoint '{path}' cannot be resumed: {type(error).__name__}: {reason}") from None
