"""Save, load, resume. Checkpoints are in MoCo's format: a dict of `epoch`, `arch`, `state_dict` (names begin with `module.`), `optimizer`,
and what resuming needs besides. A checkpoint is data, not a program: it is loaded with `weights_only=True`.
"""

import contextlib
import os
import pickle
import shutil
import warnings
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco import distributed, encoders
from moco.errors import RunError, UsageError, say

LAST = "checkpoint_last.pth.tar"
LINEAR, BEST = "linear_last.pth.tar", "model_best.pth.tar"  # of the linear evaluation
PREFIX = "module."
COUNTER = ".num_batches_tracked"


def save(path: str | Path, checkpoint: dict, kept: str | None = None) -> None:
    """Writes a temporary file, flushes and renames it: `path` is always complete, the old checkpoint or the new one.

    `kept`: a second name for it, made first, so that a run killed in between makes both again.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if kept:
            link_or_copy(tmp, path.with_name(kept))
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a failed write
        cause = error if isinstance(error, OSError) else error.__context__
        with contextlib.suppress(OSError):
            tmp.unlink()
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        whole = " (the previous one is intact)" if path.exists() else ""
        raise RunError(f"checkpoint '{path}' could not be written: {reason}{whole}") from None


def link_or_copy(path: Path, name: str) -> None:
    tmp = name.with_name(name.name + ".tmp")
    tmp.unlink(missing_ok=True)
    try:
        os.link(path, tmp)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, tmp)
    os.replace(tmp, name)


def on_host(content: Any) -> Any:
    """A copy in host memory. Tensors on a GPU are copied asynchronously: synchronise before reading."""
    if isinstance(content, torch.Tensor):
        content = content.detach()
        return content.to("cpu", non_blocking=True) if content.is_cuda else content.clone()
    if isinstance(content, dict):
        return {name: on_host(value) for name, value in content.items()}
    return [on_host(value) for value in content] if isinstance(content, list) else content


class Writer:
    """Saves checkpoints in a thread, one after another, while training goes on: a disk can take longer than an epoch."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.writing = None

    def save(self, path: Path, checkpoint: dict, kept: str | None = None) -> None:
        """`save`, of the checkpoint as it is now."""
        self.finish()
        content = on_host(checkpoint)
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied:
            copied.record()
        self.writing = self.thread.submit(self.write, copied, path, content, kept)

    @staticmethod
    def write(copied: torch.cuda.Event | None, path: Path, content: dict, kept: str | None) -> None:
        if copied:
            copied.synchronize()
        save(path, content, kept)

    def finish(self) -> None:
        """Waits for the last one; raises the RunError that it ended with."""
        if self.writing:
            self.writing.result()

    def close(self, failed: bool) -> None:
        """Writes what is being written to its end; `failed`: after another error, so that this one's is not raised."""
        self.thread.shutdown()
        if not failed:
            self.finish()


def check_finite(state_dict: dict, when: str) -> None:
    """RunError if the last update left weights that are not finite; the losses, from before it, do not show that."""
    extremes = torch._foreach_norm([v for v in state_dict.values() if v.is_floating_point()], torch.inf)
    if not torch.stack(extremes).isfinite().all():
        raise RunError(f"{when} the weights are not finite: try a lower --lr. The last checkpoint is from before")


def load(path: str | Path) -> dict:
    """The checkpoint's dict, on the CPU; `state_dict` and `options` are always there.

    It may also be a bare state dict, as torchvision and timm have them (.pth, .safetensors) and export.py writes them,
    or SupContrast's dict, whose state dict is `model`.

    Raises:
        UsageError: no such file. RunError: it is truncated, not a checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint '{path}' {'is not a file' if path.exists() else 'does not exist'}")
    checkpoint = read_safetensors(path) if path.suffix == ".safetensors" else read(path)
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        checkpoint = {"state_dict": dict(checkpoint)}
    elif isinstance(checkpoint, dict) and "state_dict" not in checkpoint and isinstance(checkpoint.get("model"), dict):
        checkpoint["state_dict"] = checkpoint.pop("model")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise RunError(f"'{path}' is not a checkpoint: it has no state_dict")
    for name, value in checkpoint["state_dict"].items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
        if not isinstance(name, str) or not plain:
            raise RunError(f"'{path}' is not a checkpoint: {name} of its state_dict is not a plain tensor")
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"checkpoint '{path}' holds values that are not finite, in {name}")
    if not isinstance(checkpoint.get("options"), dict):  # only this project's have them
        checkpoint["options"] = {}
    return checkpoint


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file; RunError: it is damaged."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UsageError('.safetensors needs safetensors: pip install -e ".[export]"') from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise RunError(f"'{path}' cannot be read as .safetensors: {str(error).splitlines()[0]}") from None


def read(path: Path) -> object:
    """What torch.save wrote, plain values only; RunError: the file is damaged or something else.

    An argparse.Namespace is plain, too: SupContrast's, torchvision's and timm's training scripts save theirs.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not look at the checksums
                    raise RunError(f"checkpoint '{path}' is damaged: the checksum of {damaged} is wrong")
                for entry in archive.infolist():
                    if entry.external_attr & 0x10:  # torch.load would leave a tensor uninitialised, without a word
                        raise RunError(f"checkpoint '{path}' is damaged: {entry.filename} is marked as a folder")
        # What is wrong is said below, in one line.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) and "weights_only" in str(error).lower():
            raise RunError(f"checkpoint '{path}' holds more than tensors and plain values, and is not opened") from None
        raise RunError(f"'{path}' is not a checkpoint") from None
    except Exception as error:  # a damaged file can fail anywhere in torch.load
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise RunError(f"checkpoint '{path}' is damaged or is none: {reason}") from None


def with_prefix(state_dict: dict) -> dict:
    return {PREFIX + name: value for name, value in state_dict.items()}


def load_state(module: nn.Module, state_dict: dict, path: str | Path) -> None:
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


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Its momentum buffers; learning rate, momentum and weight decay stay those of the command line."""
    mine = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, mine, strict=True):
        group.update(settings)


def find(resume: str | None, folder: str, device: torch.device, last: str = LAST) -> str | None:
    """The checkpoint that --resume names, or None. `auto` is the last one in the output folder, if there is one."""
    path = Path(folder, last)
    if resume == "":
        raise UsageError("--resume '' names no checkpoint")
    if resume is None and path.is_file():
        say(f"note: '{path}' will be overwritten; --resume auto continues it")
    if resume != "auto":
        return resume
    finders = distributed.total(path.is_file(), device)
    if 0 < finders < distributed.world_size():
        raise UsageError(f"only some machines find a checkpoint to resume: they must share --output-dir {folder}")
    return str(path) if finders else None


def compare_classes(there: list[str] | None, classes: list[str], path: str | Path) -> None:
    """UsageError: the checkpoint was trained on other classes than `classes`; `there` None: it does not say."""
    if there not in (None, classes):
        other = [f"'{name}'" for name in [*there, *classes] if name not in there or name not in classes]
        which = f" ({', '.join(other[:5])})" if other else ", in another order"
        raise UsageError(f"checkpoint '{path}' was trained on other classes than those of this data{which}")


def compare_data(saved: dict, images: int, classes: list[str], path: str) -> None:
    """As `compare_options`, of what is known when the images are: their number and their classes."""
    compare_classes(saved["options"].get("classes"), classes, path)
    there = saved["options"].get("images", images)
    if there != images and saved.get("step"):
        raise UsageError(f"checkpoint '{path}' is from within an epoch of {there} images, and this data has {images}")
    if there != images:
        say(f"note: the training images were {there} and are now {images}")


def compare_options(saved: dict, args: Namespace, path: str) -> None:
    """UsageError if a resumed run has changed an option that it must keep; announces the change of others.

    `saved`: the checkpoint's options. Which options matter is said where they are declared, see options.Parser.
    """
    if not saved:  # another program's checkpoint
        return
    if saved.get("views") == "pil":
        raise UsageError(f"checkpoint '{path}' was trained with --views pil, which is gone: it cannot be resumed")
    now = vars(args)
    if saved.get("objective") != now.get("objective"):
        raise UsageError(
            f"checkpoint '{path}' was trained with {saved['objective']}, this script trains {args.objective}"
        )
    if saved.get("groups") != now.get("groups"):
        raise UsageError(
            f"checkpoint '{path}' was trained with batch norm over {saved['groups']} groups (--bn-splits times "
            f"processes), this run has {args.groups}"
        )
    for name, (flag, must_keep, default) in args.when_resumed.items():
        then = saved.get(name, default)
        if then != now[name] and must_keep:
            raise UsageError(f"checkpoint '{path}' was trained with {flag} {then}, this run has {now[name]}")
        if then != now[name]:
            say(f"note: {flag} was {then} and is now {now[name]}")


def encoder_weights(saved: dict, path: str | Path) -> dict:
    """The encoder in a checkpoint, with torchvision's names; RunError: there is no ResNet in it.

    It is the query encoder of ours and of MoCo's (with --ema the average of its weights), SupContrast's encoder (whose
    `shortcut` is torchvision's `downsample`), or a whole network: a linear evaluation's, torchvision's or timm's.
    """
    weights = {name.removeprefix(PREFIX): v for name, v in (saved.get("average") or saved["state_dict"]).items()}
    prefix = prefix_of_encoder(weights)
    weights = {
        n.removeprefix(prefix).replace("shortcut", "downsample"): v for n, v in weights.items() if n.startswith(prefix)
    }
    if "conv1.weight" not in weights or weights["conv1.weight"].dim() != 4:
        raise RunError(f"checkpoint '{path}' holds no ResNet: neither encoder_q.conv1.weight nor conv1.weight is there")
    return weights


def prefix_of_encoder(state_dict: dict) -> str:
    """What the names of the encoder begin with, after `module.`; "" for a whole network."""
    names = {name.removeprefix(PREFIX) for name in state_dict}
    prefixes = ("encoder_q.", "encoder.module.", "encoder.")
    return next((prefix for prefix in prefixes if f"{prefix}conv1.weight" in names), "")


def architecture(weights: dict, path: str | Path) -> str:
    """The -a whose network has these shapes, but for the first convolution and `fc`; RunError: there is none."""

    def shapes(state_dict):
        own = {name: tuple(value.shape) for name, value in state_dict.items()}
        return {n: s for n, s in own.items() if not n.startswith(("fc.", "conv1.")) and not n.endswith(COUNTER)}

    theirs = shapes(weights)
    for arch in sorted(encoders.names(), key=len):  # the usual ones first: to build one takes half a second
        with torch.device("meta"):
            own = encoders.build(arch)(num_classes=1).state_dict()
        if shapes(own) == theirs:
            return arch
    raise RunError(f"the shapes in '{path}' fit neither resnet20 nor a network of torchvision's ResNet family")


def load_encoder(encoder: nn.Module, weights: dict, path: str | Path, *, classifier: bool = False) -> None:
    """Loads everything but `fc`, or with `classifier` that too. Old files have no counters of batches, and need none."""
    weights = {name: value for name, value in weights.items() if classifier or not name.startswith("fc.")}
    own = {n: v for n, v in encoder.state_dict().items() if n.endswith(COUNTER) and n not in weights}
    own |= {} if classifier else {n: v for n, v in encoder.state_dict().items() if n.startswith("fc.")}
    load_state(encoder, weights | own, path)


def initialise(encoder: nn.Module, path: str) -> None:
    """Starts an encoder from the weights in a file: everything but `fc`, and but a first convolution of another stem."""
    saved = load(path)
    weights, own = encoder_weights(saved, path), encoder.state_dict()
    left = [name for name in weights if name.startswith("fc.")]
    size, here = tuple(weights["conv1.weight"].shape), tuple(own["conv1.weight"].shape)
    other_stem = size != here and size[:2] == here[:2]
    if other_stem:
        left.append("conv1.weight")
        stem = "imagenet" if size[-1] == 7 else "cifar"
    taken = {name: value for name, value in weights.items() if name not in left}
    load_encoder(encoder, taken | ({"conv1.weight": own["conv1.weight"]} if other_stem else {}), path)
    prefix = prefix_of_encoder(saved["state_dict"])
    others = {name.removeprefix(PREFIX) for name in saved["state_dict"]}
    left += {f"{name.partition('.')[0]}.*" for name in others if not name.startswith(prefix)}
    say(f"--init '{path}': {len(taken)} tensors taken" + (f"; not taken: {', '.join(sorted(left))}" if left else ""))
    if other_stem:
        size, here = ("x".join(map(str, shape[2:])) for shape in (size, here))
        say(
            f"note: its first convolution is {size}, this network's is {here} and starts anew: --stem {stem} would take it"
        )


def described(saved: dict, weights: dict, path: str | Path, arch: str | None = None) -> dict:
    """What a checkpoint says of its encoder: arch, stem, image_size, mean, std. `arch`: what -a says, if anything.

    Those that are not ours do not say: then arch is what has the shapes, stem and size are what the first layer suggests,
    the statistics None.
    """
    options = saved["options"]
    stem = "cifar" if weights["conv1.weight"].shape[-1] == 3 else "imagenet"
    size = options.get("image_size") or (32 if stem == "cifar" else 224)
    named = {name: options.get(name) for name in ("mean", "std")}
    if arch is None:
        arch = saved["arch"] if saved.get("arch") in encoders.names() else architecture(weights, path)
    return dict(arch=arch, stem=stem, image_size=size, **named)
