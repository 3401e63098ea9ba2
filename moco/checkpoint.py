"""Save, load, resume. Checkpoints have MoCo's format: a dict of `epoch`, `arch`, `state_dict` (names begin with
`module.`), `optimizer`, and what else resuming needs. They are data, not programs: loaded with `weights_only=True`.
"""

import contextlib
import math
import os
import pickle
import textwrap
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco import datasets, distributed, encoders
from moco.errors import RunError, UsageError, first_line, say

LAST = "checkpoint_last.pth.tar"
LINEAR, BEST = "linear_last.pth.tar", "model_best.pth.tar"  # of the linear evaluation
PREFIX = "module."
COUNTER = ".num_batches_tracked"


def save(path: str | Path, checkpoint: dict) -> None:
    """Writes a temporary file, flushes and renames it, so that `path` is always complete, the old or the new one."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError after a failed write
        with contextlib.suppress(OSError):
            tmp.unlink()
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or first_line(error)
        intact = " (the previous one is intact)" if path.exists() else ""
        raise RunError(f"checkpoint '{path}' could not be written: {reason}{intact}") from None


def on_host(content: Any) -> Any:
    """A copy in host memory. Tensors on a GPU are copied asynchronously: synchronise before reading."""
    if isinstance(content, torch.Tensor):
        content = content.detach()
        return content.to("cpu", non_blocking=True) if content.is_cuda else content.clone()
    if isinstance(content, dict):
        return {name: on_host(value) for name, value in content.items()}
    return [on_host(value) for value in content] if isinstance(content, list) else content


class Writer:
    """Saves checkpoints in a thread while training goes on: a disk can take longer than an epoch."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.writing = None

    def save(self, paths: Iterable[Path], checkpoint: dict) -> None:
        """As `save`, to each path in this order, with the values that the checkpoint has now."""
        self.finish()
        content = on_host(checkpoint)
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None

        def write():
            if copied:
                copied.synchronize()
            for path in paths:
                save(path, content)

        self.writing = self.thread.submit(write)

    def finish(self) -> None:
        """Waits for the last checkpoint; raises the RunError that it ended with."""
        if self.writing:
            self.writing.result()

    def check(self) -> None:
        """As `finish`, if the last checkpoint has ended; does not wait."""
        if self.writing and self.writing.done():
            self.finish()

    def close(self, failed: bool) -> None:
        """Completes the last checkpoint. `failed`: the run has an error already, so do not raise another."""
        self.thread.shutdown()
        if not failed:
            self.finish()


def check_finite(state_dict: dict, when: str) -> None:
    """RunError if the last update left weights that are not finite. Its loss does not show that: it was computed before."""
    values = (value for value in state_dict.values() if value.is_floating_point())
    if not nn.utils.get_total_norm(values, torch.inf).isfinite():
        raise RunError(
            f"{when} the weights are not finite: try a lower --lr. The last checkpoint was saved before this"
        )


def load(path: str | Path) -> dict:
    """The checkpoint's dict, on the CPU, always with `state_dict` and `options`.

    The file may also be a bare state dict (.pth, .safetensors), as torchvision, timm and export.py have, or
    SupContrast's dict, whose state dict is `model`.

    Raises:
        UsageError: no such file. RunError: it is truncated, not a checkpoint, or contains code.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint '{path}' {'is not a file' if path.exists() else 'does not exist'}")
    checkpoint = read(path)
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        checkpoint = {"state_dict": dict(checkpoint)}
    checkpoint.setdefault("state_dict", checkpoint.get("model"))
    if not isinstance(checkpoint["state_dict"], dict):
        raise RunError(f"'{path}' is not a checkpoint: it has no state_dict")
    for name, value in checkpoint["state_dict"].items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
        if not isinstance(name, str) or not plain:
            raise RunError(f"'{path}' is not a checkpoint: {name} of its state_dict is not a plain tensor")
        if value.is_floating_point() and value.itemsize == 1:
            raise RunError(f"checkpoint '{path}' has {name} in {value.dtype}: convert it to a wider type")
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"checkpoint '{path}' has values that are not finite, in {name}")
    # A module that torch.compile has wrapped adds to its names.
    checkpoint["state_dict"] = {n.replace("_orig_mod.", ""): v for n, v in checkpoint["state_dict"].items()}
    if not isinstance(checkpoint.get("options"), dict):  # only this project's have them
        checkpoint["options"] = {}
    return checkpoint


def read(path: Path) -> object:
    """Reads a .safetensors file, or plain values from a file of torch.save; RunError: it is corrupt or contains code.

    An argparse.Namespace counts as plain: SupContrast's, torchvision's and timm's training scripts save theirs.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if corrupt := archive.testzip():  # torch.load does not check the checksums ...
                    raise ValueError(f"the checksum of {corrupt} is wrong")
                for entry in archive.infolist():
                    if entry.external_attr & 0x10:  # ... and would leave this tensor uninitialised without an error
                        raise ValueError(f"{entry.filename} is marked as a folder")
        # Warnings are ignored: what is wrong is reported below, in one line.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UsageError('.safetensors needs safetensors: pip install -e ".[export]"') from None
    except Exception as error:  # a corrupt file can fail anywhere in torch.load
        unsafe = isinstance(error, pickle.UnpicklingError)  # PyTorch's text advises to run the code in it
        reason = "only tensors and plain values are opened" if unsafe else first_line(error)
        raise RunError(f"'{path}' cannot be read (corrupt, or not a checkpoint): {reason}") from None


def with_prefix(state_dict: dict) -> dict:
    return {PREFIX + name: value for name, value in state_dict.items()}


def load_state(module: nn.Module, state_dict: dict, path: str | Path) -> None:
    """Loads weights, with or without `module.`; RunError names the first that are missing, unexpected or of another shape."""
    try:
        module.load_state_dict({name.removeprefix(PREFIX): value for name, value in state_dict.items()})
    except RuntimeError as error:
        raise RunError(f"checkpoint '{path}' does not fit: {textwrap.shorten(str(error), 300)}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads momentum buffers only; learning rate, momentum and weight decay remain those of the command line."""
    mine = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, mine, strict=True):
        group.update(settings)


def find(resume: str | None, folder: str, device: torch.device, last: str = LAST, writes: bool = True) -> str | None:
    """The checkpoint to resume, or None. `auto` is the last one in the output folder, if any."""
    path = Path(folder, last)
    finders = int(distributed.all_sum(torch.tensor(int(path.is_file()), device=device)))  # only some may have --resume
    if resume != "auto":
        if writes and path.is_file() and not (resume and os.path.realpath(resume) == os.path.realpath(path)):
            say(f"note: '{path}' will be overwritten; --resume auto continues it")
        return resume
    if 0 < finders < distributed.world_size():
        raise UsageError(f"only some nodes find a checkpoint to resume: all must share --output-dir {folder}")
    return str(path) if finders else None


def compare_classes(saved: list[str] | None, classes: list[str], path: str | Path) -> None:
    """UsageError: the checkpoint was trained on other classes than `classes`. `saved`: its own, None if it does not say."""
    if saved not in (None, classes):
        other = [f"'{name}'" for name in sorted({*saved} ^ {*classes})]
        which = f" ({', '.join(other[:5])})" if other else ", in another order"
        raise UsageError(f"checkpoint '{path}' was trained on other classes than those of this data{which}")


def compare_data(saved: dict, images: int, classes: list[str], path: str) -> None:
    """As options.compare_options, for the training images: their number and their classes."""
    compare_classes(saved["options"].get("classes"), classes, path)
    then = saved["options"].get("images", images)
    if then != images and saved.get("step"):
        raise UsageError(
            f"checkpoint '{path}' is from within an epoch of {then} images, and this data has {images}: to continue, "
            "restore the images that it had"
        )
    if then != images:
        say(f"note: the training images were {then} and are now {images}")


def encoder_weights(saved: dict, path: str | Path) -> dict:
    """The encoder in a checkpoint, with torchvision's names; RunError: it contains no ResNet.

    The encoder is the query encoder of this project's and MoCo's checkpoints,
    SupContrast's encoder (its `shortcut` is torchvision's `downsample`), or the whole network of a linear evaluation,
    torchvision or timm.
    """
    weights = {name.removeprefix(PREFIX): v for name, v in saved["state_dict"].items()}
    prefix = prefix_of_encoder(weights)
    weights = {
        n.removeprefix(prefix).replace("shortcut", "downsample"): v for n, v in weights.items() if n.startswith(prefix)
    }
    if "conv1.weight" not in weights or weights["conv1.weight"].dim() != 4:
        raise RunError(
            f"checkpoint '{path}' contains no ResNet: it has neither encoder_q.conv1.weight nor conv1.weight"
        )
    return weights


def prefix_of_encoder(state_dict: dict) -> str:
    """The prefix of the encoder's names, after `module.`; "" for a whole network."""
    names = {name.removeprefix(PREFIX) for name in state_dict}
    prefixes = ("encoder_q.", "encoder.module.", "encoder.")
    return next((prefix for prefix in prefixes if f"{prefix}conv1.weight" in names), "")


def architecture(weights: dict, path: str | Path) -> str:
    """The -a whose network has these shapes, except the first convolution and `fc`; RunError: there is none."""

    def shapes(state_dict):
        own = {name: tuple(value.shape) for name, value in state_dict.items()}
        return {n: s for n, s in own.items() if not n.startswith(("fc.", "conv1.")) and not n.endswith(COUNTER)}

    theirs = shapes(weights)
    for arch in sorted(encoders.names(), key=len):  # the common ones first: building one takes half a second
        with torch.device("meta"):
            own = encoders.build(arch)(num_classes=1).state_dict()
        if shapes(own) == theirs:
            return arch
    raise RunError(f"the shapes in '{path}' fit neither resnet20 nor a network of torchvision's ResNet family")


def load_encoder(encoder: nn.Module, weights: dict, path: str | Path, *, classifier: bool = False) -> None:
    """Loads everything except `fc`, which only `classifier` loads. Old files have no counters of batches, which is fine."""
    weights = {name: value for name, value in weights.items() if classifier or not name.startswith("fc.")}
    own = {n: v for n, v in encoder.state_dict().items() if n.endswith(COUNTER) and n not in weights}
    own |= {} if classifier else {n: v for n, v in encoder.state_dict().items() if n.startswith("fc.")}
    load_state(encoder, weights | own, path)


def initialise(encoder: nn.Module, path: str) -> None:
    """Starts an encoder from the weights in a file, except `fc` and a first convolution of another stem."""
    saved = load(path)
    weights, own = encoder_weights(saved, path), encoder.state_dict()
    left = [name for name in weights if name.startswith("fc.")]
    (*channels, _, size), (*own_channels, _, own_size) = (each["conv1.weight"].shape for each in (weights, own))
    if other_stem := size != own_size and channels == own_channels:
        left.append("conv1.weight")
        weights["conv1.weight"] = own["conv1.weight"]
    load_encoder(encoder, weights, path)
    taken, prefix = len(weights) - len(left), prefix_of_encoder(saved["state_dict"])
    others = {name.removeprefix(PREFIX) for name in saved["state_dict"]}
    left += {f"{name.partition('.')[0]}.*" for name in others if not name.startswith(prefix)}
    say(f"--init '{path}': {taken} tensors taken" + (f"; not taken: {', '.join(sorted(left))}" if left else ""))
    if other_stem:
        say(
            f"note: its first convolution is {size}x{size}, this network's is {own_size}x{own_size} and keeps its random weights: "
            f"--stem {'imagenet' if size == 7 else 'cifar'} would load it"
        )


def described(saved: dict, weights: dict, path: str | Path, arch: str | None = None) -> dict:
    """The arch, stem, image_size, mean and std of a checkpoint's encoder. `arch`: that of -a, if given.

    For other programs' checkpoints the shapes give the arch, the first layer the rest: ImageNet's size and statistics
    for its stem; else 32 pixels, and mean and std are None. RunError: the checkpoint's own are not numbers.
    """
    stem = "cifar" if weights["conv1.weight"].shape[-1] == 3 else "imagenet"
    size, (mean, std) = (32, (None, None)) if stem == "cifar" else (224, datasets.IMAGENET)
    if arch is None:
        arch = saved["arch"] if saved.get("arch") in encoders.names() else architecture(weights, path)
    kept = {name: value for name, value in saved["options"].items() if value is not None}
    try:
        size = int(kept.get("image_size", size))
        mean, std = (three(kept[name]) if name in kept else own for name, own in (("mean", mean), ("std", std)))
        if size < 1 or (std and min(std) <= 0):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise RunError(f"checkpoint '{path}': its image_size is not a number, or its mean or std not three") from None
    return dict(arch=arch, stem=stem, image_size=size, mean=mean, std=std)


def three(values: Iterable) -> list[float]:
    """Three finite numbers; TypeError or ValueError if they are something else."""
    red, green, blue = map(float, values)
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError
    return [red, green, blue]
