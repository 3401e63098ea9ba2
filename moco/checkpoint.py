"""Save, load, resume. Checkpoints are in MoCo's format: a dict of `epoch`, `arch`, `state_dict` (names begin with `module.`), `optimizer`,
and what resuming needs besides. A checkpoint is data, not a program: it is loaded with `weights_only=True`.
"""

import contextlib
import os
import pickle
import shutil
import signal
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from moco import distributed
from moco.errors import RunError, UsageError
from moco.logs import say

LAST = "checkpoint_last.pth.tar"
PREFIX = "module."

# Options that a resumed run cannot change without becoming another run.
FIXED = [
    "objective",
    "arch",
    "stem",
    "image_size",
    "dataset",
    "mean",
    "std",
    "batch_size",
    "seed",
    "aug_plus",
    "mlp",
    "moco_dim",
    "moco_k",
    "moco_m",
    "moco_t",
    "dim",
    "temp",
    "groups",
    "views",
    "per_class",
    "holdout",
    "recipe",
]
# Options whose change is legitimate, but never silent.
ANNOUNCED = ["epochs", "lr", "schedule", "momentum", "weight_decay", "cos", "warm_up", "precision"]


def save(path, checkpoint, kept=None):
    """Writes beside `path`, flushes and renames: `path` is always whole, the old checkpoint or the new one.

    With a name to keep it under, that is there before `path` is new: a run killed in between makes both again.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if kept:
            second_name(beside, path.with_name(kept))
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a failed write
        cause = error if isinstance(error, OSError) else error.__context__
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        whole = " (the one before it is whole)" if path.exists() else ""
        raise RunError(f"checkpoint '{path}' could not be written: {reason}{whole}") from None


def second_name(path, name):
    beside = name.with_name(name.name + ".tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, beside)
    os.replace(beside, name)


def on_host(content):
    """A copy in the host's memory. Of tensors on a GPU it is whole when the GPU comes to this point, later than now."""
    if isinstance(content, torch.Tensor):
        content = content.detach()
        return content.to("cpu", non_blocking=True) if content.is_cuda else content.clone()
    if isinstance(content, dict):
        return {name: on_host(value) for name, value in content.items()}
    return [on_host(value) for value in content] if isinstance(content, list) else content


class Writer:
    """Saves checkpoints in a thread, one after another, while training goes on: a disk can take longer than an epoch.

    A context manager: what is being written when it is left is written to its end.
    """

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.writing = None

    def save(self, path, checkpoint, kept=None):
        """`save`, of the checkpoint as it is now."""
        self.finish()
        content = on_host(checkpoint)
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        self.writing = self.thread.submit(self.write, copied, path, content, kept)

    @staticmethod
    def write(copied, path, content, kept):
        if copied:
            copied.synchronize()
        save(path, content, kept)

    def finish(self):
        """Waits for the last one; raises the RunError that it ended with."""
        if self.writing:
            self.writing.result()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self.thread.shutdown()
        if kind is None:
            self.finish()


class Interruption:
    """SIGTERM, SIGINT and SIGUSR1 ask the run to come to a point where it can save and leave; then SIGINT ends it at
    once."""

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.asked = 0
        self.agreed = False  # all processes know

    @property
    def alone(self):
        """Need not wait for the other processes' next look at it."""
        return self.asked and distributed.world_size() == 1

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in self.signals}
        return self

    def ask(self, number, frame):
        self.asked = number
        for s in self.signals:  # schedulers send theirs more than once
            signal.signal(s, signal.SIG_DFL if s == signal.SIGINT else signal.SIG_IGN)

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def leave(self, writer, when):
        writer.finish()
        say(f"stopped {when}; --resume auto goes on from there")
        distributed.barrier()  # the first process has saved: whoever started them ends all when one is gone
        raise SystemExit(128 + (self.asked or signal.SIGTERM))


def check_finite(state_dict, when):
    """The losses are from before the last update: does it leave weights that are worth saving?"""
    extremes = torch._foreach_norm([v for v in state_dict.values() if v.is_floating_point()], torch.inf)
    if not torch.stack(extremes).isfinite().all():
        raise RunError(f"{when} the weights are not finite: try a lower --lr. The last checkpoint is from before")


def load(path):
    """The checkpoint's dict, on the CPU; `options` is always there.

    Raises:
        UsageError: no such file. RunError: it is truncated, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint '{path}' {'is not a file' if path.exists() else 'does not exist'}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not look at the checksums
                    raise RunError(f"checkpoint '{path}' is damaged: the checksum of {damaged} is wrong")
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, in one line
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) and "weights_only" in str(error).lower():
            raise RunError(f"checkpoint '{path}' holds more than tensors and plain values, and is not opened") from None
        raise RunError(f"'{path}' is no checkpoint") from None
    except Exception as error:  # a damaged file can fail anywhere in torch.load
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise RunError(f"checkpoint '{path}' is damaged or is none: {reason}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise RunError(f"'{path}' is no checkpoint: it has no state_dict")
    for name, value in checkpoint["state_dict"].items():
        if (
            not isinstance(name, str)
            or not isinstance(value, torch.Tensor)
            or value.layout != torch.strided
            or value.is_meta
        ):
            raise RunError(f"'{path}' is no checkpoint: {name} of its state_dict is no plain tensor")
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"checkpoint '{path}' holds values that are not finite, in {name}")
    if not isinstance(checkpoint.get("options"), dict):  # of MoCo's own there are none
        checkpoint["options"] = {}
    return checkpoint


def with_prefix(state_dict):
    return {PREFIX + name: value for name, value in state_dict.items()}


def load_state(module, state_dict, path):
    """Loads weights whose names begin with `module.`; RunError says which are missing, unknown or of another shape."""
    state_dict = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state_dict]
    wrong += [f"{name} is unknown" for name in state_dict if name not in own]
    wrong += [
        f"{name} is {tuple(value.shape)} there, {tuple(own[name].shape)} here"
        for name, value in state_dict.items()
        if name in own and own[name].shape != value.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RunError(f"checkpoint '{path}' does not fit this network: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict(state_dict)


def load_optimizer(optimizer, state, args):
    """Its momentum buffers; the momentum and the weight decay are those of the command line."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update(momentum=args.momentum, weight_decay=args.weight_decay)


def find(args, device, last=LAST):
    """The checkpoint that --resume names, or None. `auto` is the last one in the output folder, if there is one."""
    path = Path(args.output_dir, last)
    if args.resume == "":
        raise UsageError("--resume '' names no checkpoint")
    if args.resume is None and path.is_file():
        say(f"note: '{path}' is an earlier run's: this one replaces it (--resume auto goes on with it)")
    if args.resume != "auto":
        return args.resume
    finders = distributed.all_sum(torch.tensor([int(path.is_file())], device=device)).item()
    if 0 < finders < distributed.world_size():
        raise UsageError(
            f"only some machines find a checkpoint to resume: they must share --output-dir {args.output_dir}"
        )
    return str(path) if finders else None


def compare_data(saved, args, path):
    """As `compare_options`, of what is known when the images are: their classes and their number."""
    there, here = saved["options"].get("classes", args.classes), args.classes
    if there != here:
        other = [f"'{name}'" for name in [*there, *here] if name not in there or name not in here]
        which = f" ({', '.join(other[:5])})" if other else ", in another order"
        raise UsageError(f"checkpoint '{path}' was trained on other classes than those of this data{which}")
    there, here = saved["options"].get("images", args.images), args.images
    if there != here and saved.get("step"):
        raise UsageError(f"checkpoint '{path}' is from within an epoch of {there} images, and this data has {here}")
    if there != here:
        say(f"note: the training images were {there} and are now {here}")


def compare_options(options, args, path):
    """Stops at options that would silently make a resumed run another one, announces the change of others."""
    now = vars(args)

    def flag(name):
        name = {"weight_decay": "wd", "groups": "bn-splits"}.get(name, name)
        return f"--{name.replace('_', '-')}"

    def differ(names):
        return [(n, options[n], now[n]) for n in names if n in options and n in now and options[n] != now[n]]

    for name, there, here in differ(FIXED):
        if name == "objective":
            raise UsageError(f"checkpoint '{path}' was trained with {there}, this script trains {here}")
        if name == "groups":
            raise UsageError(
                f"checkpoint '{path}' was trained with batch norm over {there} groups (--bn-splits times processes), "
                f"this run has {here}"
            )
        raise UsageError(f"checkpoint '{path}' was trained with {flag(name)} {there}, this run has {here}")
    for name, there, here in differ(ANNOUNCED):
        say(f"note: {flag(name)} was {there} and is now {here}")
