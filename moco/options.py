"""The command line, shared by every script. Names and defaults are the reference's; what is new has its own group."""

import argparse
import math
import sys

import torch

from moco import augment, data, distributed, logs
from moco.errors import one_line

LARGEST = 2**31 - 1  # of a whole number
DATASETS = ("auto", "imagefolder", "cifar10", "cifar100", "digits")


# Recipes of the linear evaluation: defaults of options, and what has no option (views of the training images, a
# central crop of the validation images or all of them, the factor at each epoch of the schedule).
LINEAR_RECIPES = {
    "moco": dict(
        batch_size=256, lr=30.0, schedule=[60, 80], train_views=augment.LINEAR, centre_crop=True, lr_decay=0.1
    ),
    "supcon": dict(
        batch_size=512,
        lr=5.0,
        schedule=[60, 75, 90, 100],
        train_views=augment.CROSS_ENTROPY,
        centre_crop=False,
        lr_decay=0.2,
    ),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        print(f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def number(kind, low=-math.inf, high=math.inf, *, above=None):
    """An argument type: an int or a float from `low` to `high`, or more than `above`."""

    def parse(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):
            value, finite = math.nan, False
        if not (finite and low <= value <= high and (above is None or value > above)):
            whole = "a whole number" if kind is int else "a number"
            if above is not None:
                limits = f" above {above:g}"
            elif low == -math.inf:
                limits = ""
            elif high in (math.inf, LARGEST):
                limits = f" of {low:g} or more{', in 32 bits' if high == LARGEST else ''}"
            else:
                limits = f" from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"'{text}' is not {whole}{limits}")
        return value

    return parse


positive_int, positive_float = number(int, 1, LARGEST), number(float, above=0)
count, amount = number(int, 0, LARGEST), number(float, 0)


def pretrain_parser(description):
    """Options of the pretraining scripts."""
    parser = base_parser(description, epochs=1000, lr=0.03, weight_decay=1e-4, schedule=[600, 800])
    parser.add_argument(
        "--cos", action=argparse.BooleanOptionalAction, default=False, help="half a cosine from lr to 0, not --schedule"
    )
    parser.add_argument(
        "--warm-up",
        type=count,
        default=5,
        metavar="N",
        help="epochs from lr 0 to lr (default: 5); without a queue 10 from lr 0.01, and none up to a batch of 256",
    )
    parser.add_argument(
        "--aug-plus",
        action="store_true",
        help="MoCo v2's views: colour jitter with p 0.8, and blur (default: those of the script's own recipe)",
    )
    more = parser.add_argument_group("beyond the reference")
    more.add_argument(
        "--save-freq",
        type=positive_int,
        default=200,
        metavar="N",
        help="epochs between checkpoints that are kept; the last epoch always is (default: %(default)s)",
    )
    more.add_argument(
        "--stem",
        choices=("cifar", "imagenet"),
        help="first layers of the ResNet (default: cifar up to 64 pixels, else imagenet)",
    )
    more.add_argument(
        "--bn-splits",
        type=positive_int,
        default=1,
        metavar="S",
        help="batch norm over S chunks of each process's batch, as on S GPUs (default: %(default)s)",
    )
    more.add_argument(
        "--knn-freq",
        type=count,
        default=0,
        metavar="N",
        help="epochs between two kNN evaluations of the encoder on the validation images (default: 0, never)",
    )
    parser.set_defaults(supcon_cosine=False)
    return parser


def moco_options(parser):
    """Options of the scripts with a queue."""
    moco = parser.add_argument_group("momentum contrast")
    moco.add_argument(
        "--moco-dim", type=positive_int, default=128, metavar="C", help="width of the features (default: %(default)s)"
    )
    moco.add_argument(
        "--moco-k", type=positive_int, default=65536, metavar="K", help="keys in the queue (default: %(default)s)"
    )
    moco.add_argument(
        "--moco-m",
        type=number(float, 0, 1),
        default=0.99,
        metavar="M",
        help="momentum of the key encoder (default: %(default)s)",
    )
    moco.add_argument(
        "--moco-t", type=positive_float, default=0.07, metavar="T", help="temperature (default: %(default)s)"
    )
    moco.add_argument("--mlp", action="store_true", help="MoCo v2's projection head of two layers")


def supcon_options(parser):
    """Options of main_supcon.py."""
    supcon = parser.add_argument_group("SupContrast")
    supcon.add_argument(
        "--dim", type=positive_int, default=128, metavar="C", help="width of the features (default: 128)"
    )
    supcon.add_argument("--temp", type=positive_float, default=0.1, metavar="T", help="temperature (default: 0.1)")


def linear_parser(description):
    """Options of main_lincls.py."""
    recipe = linear_recipe()
    parser = base_parser(description, epochs=100, lr=recipe["lr"], weight_decay=0.0, schedule=recipe["schedule"])
    parser.add_argument("--pretrained", metavar="PATH", help="checkpoint of a pretraining script, or of MoCo itself")
    parser.add_argument(
        "--recipe",
        choices=tuple(LINEAR_RECIPES),
        default="moco",
        help="supcon: the evaluation of SupContrast's authors, batch 512, lr 5, its schedule and views (default: moco)",
    )
    parser.add_argument(
        "-e",
        "--evaluate",
        action="store_true",
        help="only evaluate the classifier of --resume on the validation images",
    )
    parser.set_defaults(arch=None, image_size=None, stem=None, **recipe)
    return parser


def linear_recipe():
    """The defaults that --recipe stands for: they are wanted before the command line is parsed, for --help too."""
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    early.add_argument("--recipe")
    try:
        return LINEAR_RECIPES[early.parse_known_args()[0].recipe or "moco"]
    except (argparse.ArgumentError, KeyError):  # the parser proper will say what is wrong
        return LINEAR_RECIPES["moco"]


def base_parser(description, epochs, lr, weight_decay, schedule):
    first, _, rest = description.partition("\n")
    parser = Parser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "data",
        nargs="?",
        metavar="DIR",
        help="folder with train/ and val/ (one folder a class), or where CIFAR is or is downloaded to",
    )
    add(
        "-a",
        "--arch",
        default="resnet50",
        help="resnet20, or a network of torchvision's ResNet family (default: resnet50; for main_lincls.py the checkpoint's)",
    )
    add(
        "-j",
        "--workers",
        type=count,
        default=8,
        metavar="N",
        help="loader processes, where images are loaded at all (default: %(default)s)",
    )
    add(
        "--epochs",
        type=positive_int,
        default=epochs,
        metavar="N",
        help="to train, from the first on (default: %(default)s)",
    )
    add("--start-epoch", type=count, default=0, metavar="N", help="first epoch, counting from 0 (default: %(default)s)")
    add(
        "-b",
        "--batch-size",
        type=positive_int,
        default=256,
        metavar="N",
        help="over all processes (default: %(default)s)",
    )
    add("--lr", "--learning-rate", type=amount, default=lr, help="at this batch size (default: %(default)s)")
    add(
        "--schedule",
        type=count,
        nargs="*",
        default=schedule,
        metavar="EPOCH",
        help="epochs at which lr falls to a tenth (default: %(default)s)",
    )
    add("--momentum", type=number(float, 0, 1), default=0.9, metavar="M", help="of SGD (default: %(default)s)")
    add(
        "--wd",
        "--weight-decay",
        type=amount,
        default=weight_decay,
        dest="weight_decay",
        metavar="W",
        help="weight decay (default: %(default)s)",
    )
    add(
        "-p",
        "--print-freq",
        type=positive_int,
        default=10,
        metavar="N",
        help="steps between two log lines (default: %(default)s)",
    )
    add(
        "--resume", metavar="PATH", help="checkpoint to go on from; auto: the last one in --output-dir, if there is one"
    )
    add("--seed", type=count, help="of every random choice (default: drawn, printed, kept in the checkpoint)")

    where = parser.add_argument_group("processes")
    where.add_argument(
        "--multiprocessing-distributed",
        action="store_true",
        help="one process for each visible GPU (torchrun works too)",
    )
    where.add_argument("--gpu", type=count, metavar="ID", help="the only GPU to use")
    where.add_argument("--world-size", type=int, default=-1, metavar="N", help="machines (default: one)")
    where.add_argument("--rank", type=int, default=-1, metavar="R", help="this machine's number, counting from 0")
    where.add_argument(
        "--dist-url",
        default="tcp://localhost:10001",
        metavar="URL",
        help="where the processes meet (default: %(default)s)",
    )
    where.add_argument("--dist-backend", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPUs")

    more = parser.add_argument_group("beyond the reference: data and speed")
    more.add_argument(
        "--output-dir",
        default=".",
        metavar="DIR",
        help="for checkpoints, log.csv and tensorboard/ (default: the current folder)",
    )
    more.add_argument(
        "--dataset",
        choices=DATASETS,
        default="auto",
        help="auto: an image folder where DIR/train exists, else CIFAR-10, downloaded if absent; digits needs no DIR (default: auto)",
    )
    more.add_argument(
        "--per-class",
        type=positive_int,
        metavar="N",
        help="only the first N training images of each class",
    )
    more.add_argument(
        "--holdout",
        type=count,
        default=0,
        metavar="N",
        help="validate on the last N training images of each class, and do not train on them: to choose options by",
    )
    more.add_argument(
        "--image-size",
        type=number(int, 8, 4096),
        default=32,
        metavar="PIXELS",
        help="side of the views (default: 32; for main_lincls.py the checkpoint's)",
    )
    more.add_argument(
        "--mean",
        type=number(float),
        nargs=3,
        metavar=("R", "G", "B"),
        help="of the pixels, in 0..1 (default: the data set's, CIFAR-10's for image folders)",
    )
    more.add_argument("--std", type=positive_float, nargs=3, metavar=("R", "G", "B"), help="likewise")
    more.add_argument(
        "--views",
        choices=("batched", "pil"),
        default="batched",
        help="how views are made where the data set fits into memory: in batches on the device, or by Pillow in loader processes (default: batched)",
    )
    more.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of the encoders (default: bf16 on GPUs that have it, else fp32)"
    )
    more.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the encoders and the views (default: on GPUs, in runs of 15,000 steps or more)",
    )
    return parser


def parse(parser):
    args = parser.parse_args()
    args.program = parser.prog
    return args


def settle(args, device):
    """Fills in what depends on the data set and the device."""
    args.dataset = data.resolve(args)
    mean, std = data.STATISTICS[args.dataset]
    args.mean, args.std = list(args.mean or mean), list(args.std or std)
    args.stem = args.stem or ("cifar" if args.image_size <= 64 else "imagenet")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        # TF32 for convolutions, where float32 is asked for; similarities and views are products in float32 itself.
        torch.backends.cudnn.allow_tf32 = True


def settle_compile(args, steps, device):
    """As `settle`, for epochs of so many steps."""
    if args.compile is None:  # it takes a minute or two; a run of this many steps earns it back on a GPU
        args.compile = device.type == "cuda" and steps * args.epochs >= 15_000


def shared_seed(seed, device):
    """The seed, or one that the first process draws for all."""
    if seed is None:
        drawn = torch.randint(2**31, (1,)).to(device)
        seed = int(distributed.from_first(drawn))
        logs.say(f"seed {seed} (repeat this run with --seed {seed})")
    return seed


def plain(args):
    """The options as a checkpoint keeps them: plain values only."""
    kinds = (str, int, float, bool, type(None), list)
    return {name: value for name, value in vars(args).items() if isinstance(value, kinds)}
