"""The command line, shared by every script. Names and defaults are the reference's; new options have their own group."""

import argparse
import math
import os
import shutil
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from itertools import compress
from pathlib import Path
from typing import Any, NoReturn

import torch

from moco import augment, checkpoint, datasets, distributed
from moco.errors import UsageError, one_line, say
from moco.launch import DIST_URL

KEEP, TELL = "keep", "tell"  # a resumed run must not change an option, or a change prints a note: see Parser
DATASETS = ("auto", "imagefolder", "cifar10", "cifar100", "digits")


# Recipes of the linear evaluation: defaults of options, and values without an option: training views, whether the
# validation images are cropped, the factor for lr at each epoch of the schedule.
LINEAR_RECIPES = {
    "moco": dict(batch_size=256, lr=30.0, schedule=[60, 80])
    | dict(train_views=augment.LINEAR, centre_crop=True, lr_decay=0.1),
    "supcon": dict(batch_size=512, lr=5.0, schedule=[60, 75, 90, 100])
    | dict(train_views=augment.CROSS_ENTROPY, centre_crop=False, lr_decay=0.2),
}


# What may differ between processes.
OF_A_PROCESS = ["data", "output_dir", "save_freq", "workers", "compile", "resume", "pretrained", "init"]
OF_A_PROCESS += ["multiprocessing_distributed", "gpu", "rank", "dist_url", "dist_backend"]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors; an option's declaration says whether a resumed run may change it.

    text: a description; --help shows its first line above the options, and the rest, as it is, below them.
    when_resumed: for each option that matters, its flag, whether a resumed run must keep it (else a change is
    announced), and its default, for checkpoints from before the option existed. Parsed options have it, too.
    """

    def __init__(self, text: str, **how: object):
        first, _, rest = text.partition("\n")
        super().__init__(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, **how)
        self.when_resumed: dict[str, tuple[str, bool, object]] = {}
        self.set_defaults(when_resumed=self.when_resumed)

    def adder(self, title: str | None = None, exclusive: bool = False) -> Callable[..., None]:
        """An `add_argument` with the keyword `resumed` (KEEP or TELL), for a group with this title.

        `exclusive`: its options exclude each other.
        """
        group = self.add_argument_group(title) if title else self
        group = group.add_mutually_exclusive_group() if exclusive else group

        def add(*names, resumed=None, **how):
            action = group.add_argument(*names, **how)
            if resumed:
                flag = next(name for name in names if name.startswith("--"))
                self.when_resumed[action.dest] = (flag, resumed == KEEP, action.default)

        return add

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def number(kind: type, what: str, allowed: Callable[[Any], bool] = math.isfinite) -> Callable[[str], int | float]:
    """An argument type: a finite int or float for which `allowed` is true. `what`: the same in words."""

    def parse(text):
        with suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and allowed(value):
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is not {what}")

    return parse


def text(value: str) -> str:
    """An argument type: refuses the empty string, which the shell makes of a variable that is not set."""
    if not value:
        raise argparse.ArgumentTypeError("'' is empty")
    return value


positive_int = number(int, "a whole number of 1 or more, in 32 bits", lambda n: 1 <= n < 2**31)
count = number(int, "a whole number of 0 or more, in 32 bits", lambda n: 0 <= n < 2**31)
positive_float = number(float, "a number above 0", lambda x: x > 0)
amount = number(float, "a number of 0 or more", lambda x: x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
side = number(int, "a whole number from 8 to 4096", lambda n: 8 <= n <= 4096)


# Not formatted: an option is a statement of one to three lines, its help at the end.
# fmt: off


def pretrain_parser(
    description: str, add_options: Callable[[Parser], None] | None = None, defaults: Mapping[str, object] | None = None
) -> Parser:
    """Options of the pretraining scripts. A method adds its own, and the defaults that differ from MoCo's."""
    schedule = (defaults or {}).get("schedule", [600, 800])
    parser = base_parser(description, epochs=1000, lr=0.03, weight_decay=1e-4, schedule=schedule)
    add, add_views = parser.adder(), parser.adder(exclusive=True)
    add("--cos", action=argparse.BooleanOptionalAction, default=False, resumed=TELL,
        help="cosine schedule from lr to 0 (SupContrast and cross entropy: to lr / 1000); replaces --schedule")
    add("--warm-up", resumed=TELL, type=count, default=5, metavar="N",
        help="epochs of linear warm-up; SupContrast and cross entropy: 10 for batches over 256, else 0 (default: 5)")
    add_views("--aug-plus", resumed=KEEP, action="store_true",
              help="MoCo v2's views: colour jitter with p 0.8, and blur (default: the script's own views)")
    add = parser.adder("beyond the reference")
    add("--save-freq", type=positive_int, default=200, metavar="N",
        help="epochs between checkpoints that are kept; the last one always is (default: %(default)s)")
    add("--stem", resumed=KEEP, choices=("cifar", "imagenet"),
        help="first layers of torchvision's ResNets (default: cifar up to 64 pixels, imagenet beyond)")
    add("--bn-splits", type=positive_int, default=1, metavar="S",
        help="batch norm over S chunks of each process's batch, as on S GPUs (default: %(default)s)")
    add("--labels-per-class", resumed=KEEP, type=count, metavar="N",
        help="keep labels for only the first N images per class; the rest train without (default: all)")
    add("--knn-freq", type=count, default=0, metavar="N",
        help="epochs between kNN evaluations on the validation images (default: 0, never)")
    add_views("--aug-mild", resumed=KEEP, action="store_true",
              help="milder views than --aug-plus: crops of at least half the image, and flips; colours do not change")
    add_views("--aug-crop", resumed=KEEP, action="store_true",
              help="He et al.'s views: random crops of the image padded by 4 pixels, and flips; evaluation does not "
                   "crop")
    add("--nesterov", resumed=KEEP, action="store_true", help="Nesterov's momentum")
    add("--no-bias-decay", resumed=KEEP, action="store_true", help="no weight decay on biases and batch norm")
    add("--init", type=text, metavar="PATH",
        help="start the encoder from this file of MoCo, SupContrast, torchvision, timm (.pth, .safetensors) or this "
             "project")
    if add_options:
        add_options(parser)
    parser.set_defaults(**(defaults or {}))
    return parser


def linear_parser(description: str) -> Parser:
    """Options of main_lincls.py."""
    early = Parser("", add_help=False)  # --help shows the defaults of the recipe
    early.add_argument("--recipe", choices=LINEAR_RECIPES, default="moco")
    recipe = LINEAR_RECIPES[early.parse_known_args()[0].recipe]
    own = dict(schedule=recipe["schedule"], drop={0.1: "tenth", 0.2: "fifth"}[recipe["lr_decay"]])
    parser = base_parser(description, epochs=100, lr=recipe["lr"], weight_decay=0.0, **own)
    add = parser.adder()
    add("--pretrained", type=text, metavar="PATH",
        help="weights to evaluate: a checkpoint of this project, MoCo or SupContrast, or a ResNet of torchvision or timm")
    add("--recipe", resumed=KEEP, choices=tuple(LINEAR_RECIPES), default="moco",
        help="supcon: SupContrast's evaluation, with batch 512, lr 5, its schedule and views (default: moco)")
    add("-e", "--evaluate", action="store_true",
        help="only evaluate the classifier of --resume on the validation images")
    parser.set_defaults(image_size=None, stem=None, **recipe)
    return parser


def base_parser(
    description: str, epochs: int, lr: float, weight_decay: float, schedule: list[int], drop: str = "tenth"
) -> Parser:
    """Options of every training script."""
    parser = Parser(description)
    add = parser.adder()
    add("data", nargs="?", type=text, metavar="DIR",
        help="image folder (train/ and val/, one folder per class), or the directory with CIFAR (downloaded if absent)")
    add("-a", "--arch", resumed=KEEP, type=text,
        help="resnet20, or a network of torchvision's ResNet family (default: that of --init, --resume or "
             "--pretrained, else resnet50)")
    add("-j", "--workers", type=count, default=8, metavar="N",
        help="data-loading workers per node, shared by its processes; unused for data in memory (default: %(default)s)")
    add("--epochs", resumed=TELL, type=positive_int, default=epochs, metavar="N",
        help="total epochs (default: %(default)s)")
    add("--start-epoch", type=count, default=0, metavar="N", help="first epoch, counting from 0 (default: %(default)s)")
    add("-b", "--batch-size", resumed=KEEP, type=positive_int, default=256, metavar="N",
        help="global batch, over all processes of all nodes (default: %(default)s)")
    add("--lr", "--learning-rate", resumed=TELL, type=amount, default=lr,
        help="learning rate; never rescaled with the batch (default: %(default)s)")
    add("--schedule", resumed=TELL, type=count, nargs="*", default=schedule, metavar="EPOCH",
        help=f"epochs at which lr falls to a {drop} (default: {' '.join(map(str, schedule))})")
    add("--momentum", resumed=TELL, type=fraction, default=0.9, metavar="M", help="SGD momentum (default: %(default)s)")
    add("--wd", "--weight-decay", resumed=TELL, type=amount, default=weight_decay, dest="weight_decay", metavar="W",
        help="weight decay (default: %(default)s)")
    add("-p", "--print-freq", type=positive_int, default=10, metavar="N",
        help="steps between log lines (default: %(default)s)")
    add("--resume", type=text, metavar="PATH",
        help="checkpoint to continue from; auto: the last one in --output-dir, if any")
    add("--seed", resumed=KEEP, type=count, help="random seed (default: drawn, printed and kept in the checkpoint)")

    add = parser.adder("processes")
    add("--multiprocessing-distributed", action="store_true",
        help="one process per visible GPU (ignored under torchrun and scripts/slurm.sh, like the next four options)")
    add("--gpu", type=count, metavar="ID", help="the only GPU to use")
    add("--world-size", type=int, default=-1, metavar="N", help="number of nodes (default: 1)")
    add("--rank", type=int, default=-1, metavar="R", help="this node's number, counting from 0")
    add("--dist-url", default=DIST_URL, metavar="tcp://HOST:PORT",
        help="address of the first node, for several processes (default: %(default)s)")
    add("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPUs")

    add = parser.adder("beyond the reference: data and speed")
    add("--output-dir", type=text, default=".", metavar="DIR",
        help="folder for checkpoints, log.csv and tensorboard/ (default: the current folder)")
    add("--dataset", resumed=KEEP, choices=DATASETS, default="auto",
        help="auto: an image folder if DIR has train/, val/ or test/, else CIFAR-10, downloaded if absent and there are no "
             "other files; digits needs no DIR (default: auto)")
    add("--per-class", resumed=KEEP, type=positive_int, metavar="N",
        help="use only the first N training images per class")
    add("--holdout", resumed=KEEP, type=count, default=0, metavar="N",
        help="validate on the last N training images per class instead of training on them, to choose options")
    add("--image-size", resumed=KEEP, type=side, default=32, metavar="PIXELS",
        help="side of the views (default: 32; for main_lincls.py the checkpoint's)")
    add("--mean", resumed=KEEP, type=number(float, "a number"), nargs=3, metavar=("R", "G", "B"),
        help="pixel mean, in 0..1 (default: the data set's; image folders: CIFAR-10's up to 64 pixels, else "
             "ImageNet's)")
    add("--std", resumed=KEEP, type=positive_float, nargs=3, metavar=("R", "G", "B"),
        help="pixel standard deviation (same defaults)")
    add("--precision", resumed=TELL, choices=("bf16", "fp32"),
        help="precision of the encoders (default: bf16 on GPUs that have it, else fp32); evaluation is in float32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the encoders and the views (default: on GPUs, in runs of 15,000 steps or more, with "
             "a C compiler)")
    return parser


# fmt: on


def launching(args: Namespace) -> dict:
    """The options of `launch.launch`."""
    names = ("multiprocessing_distributed", "gpu", "world_size", "rank", "dist_url", "dist_backend")
    return {name: getattr(args, name) for name in names}


def resolve_pretraining(args: Namespace, device: torch.device, objective: str, saved: dict | None) -> Namespace:
    """The resolved options of a pretraining script. `saved`: the checkpoint to resume, or None."""
    args = resolve(args, device)
    if args.init and not saved:
        weights = checkpoint.encoder_weights(start := checkpoint.load(args.init), args.init)
        args.arch = checkpoint.described(start, weights, args.init, args.arch)["arch"]
    args.arch = args.arch or (saved or {}).get("arch") or "resnet50"
    args.objective, args.groups = objective, distributed.world_size() * args.bn_splits
    args.stem = args.stem or ("cifar" if args.image_size <= augment.SMALL else "imagenet")
    if args.warm_up is None:  # SupContrast's authors, for batches over 256
        args.warm_up = 10 if args.batch_size > 256 else 0
    if args.batch_size % args.groups:
        raise UsageError(
            f"-b {args.batch_size} is not a multiple of {args.groups} (--bn-splits {args.bn_splits} times processes)"
        )
    if args.batch_size < 2 * args.groups:
        raise UsageError(f"-b {args.batch_size}: batch norm needs 2 images in each of its {args.groups} groups")
    if args.start_epoch >= args.epochs:
        raise UsageError(
            f"--start-epoch {args.start_epoch} is beyond the last of --epochs {args.epochs} (epochs count from 0)"
        )
    if args.nesterov and not args.momentum:
        raise UsageError("--nesterov needs a --momentum above 0")
    theirs = saved["options"] if saved else {}
    args.seed = shared_seed(args.seed if args.seed is not None else theirs.get("seed"), device)
    return args


def resolve_linear(args: Namespace, device: torch.device, source: str, saved: dict, weights: dict) -> Namespace:
    """The resolved options of main_lincls.py. What is not given comes from the checkpoint `saved`, read from `source`."""
    theirs = saved["options"]
    if args.arch and saved.get("arch") and args.arch != saved["arch"]:
        raise UsageError(f"checkpoint '{source}' was trained with -a {saved['arch']}, not {args.arch}")
    known = checkpoint.described(saved, weights, source, args.arch)
    args = Namespace(**vars(args) | {name: value for name, value in known.items() if not getattr(args, name)})
    args.aug_crop = bool(theirs.get("aug_crop"))  # saved, too: a resumed run has the same views
    if args.aug_crop:
        args.train_views, args.centre_crop = augment.PADDED, False
    args = resolve(args, device, theirs.get("dataset"))
    if args.evaluate:
        args.centre_crop = theirs.get("centre_crop", args.centre_crop)
        if (then := theirs.get("holdout", 0)) != args.holdout:
            say(f"note: --holdout was {then} and is now {args.holdout}")
        return args
    args.seed = shared_seed(theirs.get("seed") if args.resume and args.seed is None else args.seed, device)
    return args


def compare_options(saved: dict, args: Namespace, path: str) -> None:
    """UsageError if a resumed run has changed an option that it must keep; prints a note if it has changed another.

    `saved`: the checkpoint's options. Which options matter is declared with them, see Parser.
    """
    if not saved:  # another program's checkpoint
        return
    if saved.get("views") == "pil":
        raise UsageError(f"checkpoint '{path}' was trained with --views pil, which was removed: it cannot be resumed")
    derived = dict(objective=("objective", True, None), groups=("--bn-splits times processes =", True, None))
    for name, (flag, must_keep, default) in (derived | args.when_resumed).items():
        then, now = saved.get(name, default), vars(args).get(name)
        if then != now and must_keep:
            raise UsageError(f"checkpoint '{path}' was trained with {flag} {then}, this run has {now}")
        if then != now:
            say(f"note: {flag} was {then} and is now {now}")


def resolve(args: Namespace, device: torch.device, trained_on: str | None = None) -> Namespace:
    """Resolves, for every script, what depends on the data set, the device and the processes."""
    args = Namespace(**vars(args))
    if args.batch_size % distributed.world_size():
        raise UsageError(f"-b {args.batch_size} cannot be shared equally by {distributed.world_size()} processes")
    if (nodes := distributed.nodes) > 1:
        say(
            f"note: -b {args.batch_size} is the global batch, over all {nodes} nodes; MoCo's -b is per node (its "
            f"-b {args.batch_size} on {nodes} nodes is -b {args.batch_size * nodes} in this project)"
        )
    args.dataset = datasets.resolve(args.dataset, args.data, trained_on)
    mean, std = datasets.STATISTICS[args.dataset]
    if args.dataset == "imagefolder" and args.image_size > augment.SMALL:  # ImageNet and its like
        mean, std = datasets.IMAGENET
    args.mean, args.std = list(args.mean or mean), list(args.std or std)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    return args


def agree(
    args: Namespace,
    device: torch.device,
    split: datasets.Split | None = None,
    saved: dict | None = None,
    validation: datasets.Split | None = None,
) -> None:
    """UsageError: the processes differ in an option, the images or the checkpoint that they have read.

    To be called before any collective that depends on one of these: the processes would wait for each other there.
    """
    if distributed.world_size() == 1:
        return
    compared = {name: value for name, value in plain(args).items() if name not in OF_A_PROCESS}
    compared["the checkpoint"] = saved and (saved.get("epoch"), saved.get("step"))
    for name, images in {"training": split, "validation": validation}.items():
        files = [os.path.basename(path) for path in images.paths or []] if images else []
        compared[f"the {name} images"] = images and (images.classes, images.labels.tolist(), files)
    digests = torch.tensor([[*sha256(repr(value).encode()).digest()] for value in compared.values()], device=device)
    differ = (distributed.all_gather(digests[None]) != digests).any(2).any(0).tolist()
    if any(differ):
        found = ", ".join(compress(compared, differ))
        raise UsageError(f"the processes differ in {found}: they must be the same on all, see docs/clusters.md")


def complete(args: Namespace, split: datasets.Split, steps: int, device: torch.device) -> Namespace:
    """The final options, with what depends on the training images. `steps`: per epoch.

    By default runs of 15,000 steps or more on a GPU are compiled, if they can be: that takes a minute or two, and pays
    off there.
    """
    worth = device.type == "cuda" and steps * args.epochs >= 15_000 and can_compile(device)
    compiled = worth if args.compile is None else args.compile
    return Namespace(**vars(args) | dict(images=len(split), classes=split.classes, compile=compiled))


def can_compile(device: torch.device) -> bool:
    """Is there Triton with all that it needs? Images with only CUDA's runtime have neither a C compiler nor Python.h."""
    if not find_spec("triton") or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file()


def shared_seed(seed: int | None, device: torch.device) -> int:
    """The seed, or a random one, the same on all processes."""
    drawn = int(distributed.broadcast(torch.randint(2**31, (1,)).to(device)))  # by all, whoever has a seed
    if seed is None:
        say(f"seed {drawn} (repeat this run with --seed {drawn})")
    return drawn if seed is None else seed


def plain(args: Namespace) -> dict:
    """The options that a checkpoint stores: plain values only."""
    kinds = (str, int, float, bool, type(None), list)
    return {name: value for name, value in vars(args).items() if isinstance(value, kinds)}
