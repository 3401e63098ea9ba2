"""The methods, one record each: model, options, views, learning rate, defaults. A new method is a class and a record."""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from moco import augment, evaluate
from moco.baselines import CrossEntropy, SupContrast
from moco.builder import MoCo, MoCoIn, MoCoOut, MoCoProto, MoCoSupLoss
from moco.options import KEEP, Parser, fraction, positive_float, positive_int

Scores = Callable[[Tensor], Tensor]  # images (N, 3, S, S) -> (N, classes)


@dataclass(frozen=True)
class Method:
    """What a pretraining script trains.

    model: its class; its `forward` takes `inputs` and returns the loss. build: makes the model from its class, a base
    encoder, the options and the number of classes. add_options: adds the method's own options to a parser. defaults:
    those that differ from MoCo's. views: their number per image. recipe: the default recipe of each view; --aug-plus
    and the like replace it. learning_rate: the lr at a time of the run, in epochs. labels: the loss depends on labels.
    labels_only: every image needs a label, and the model's own classifier is evaluated after each epoch. shuffle_keys:
    see batches.Batches. classifier: makes a function from images to scores of a model; None without a classifier.
    """

    model: type[nn.Module]
    build: Callable[[type, Callable[..., nn.Module], Namespace, int], nn.Module]
    learning_rate: Callable[[float, Namespace], float]
    recipe: augment.Recipe
    views: int = 2
    labels: bool = True
    labels_only: bool = False
    shuffle_keys: bool = False
    classifier: Callable[[nn.Module], Scores] | None = None
    add_options: Callable[[Parser], None] | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)

    def recipes(self, args: Namespace) -> list[augment.Recipe]:
        """The recipe of each view: that of --aug-plus, --aug-mild or --aug-crop, else the method's own."""
        chosen = {"aug_plus": augment.AUG_PLUS, "aug_mild": augment.MILD, "aug_crop": augment.PADDED}
        recipe = next((recipe for name, recipe in chosen.items() if getattr(args, name)), self.recipe)
        return [replace(recipe, size=args.image_size)] * self.views

    def inputs(self, views: Sequence[Tensor], labels: Tensor, order: Tensor | None) -> list[Tensor]:
        """The arguments of the model's `forward`, from a batch of batches.Batches.epoch."""
        return [*views, labels, *([] if order is None else [order])]


def moco_learning_rate(
    epoch: float, lr: float, epochs: int, warm_up: int, schedule: Sequence[int] | None = None
) -> float:
    """MoCo's learning rate at a time of the run, in epochs (one step into epoch 3 is 3 + 1 / steps).

    Linear from 0 to lr over the warm-up; then half a cosine from lr to 0 over the rest, or with a schedule lr divided
    by 10 at each of its epochs.
    """
    if epoch < warm_up:
        return lr * epoch / warm_up
    if schedule is None:
        return lr * (1 + math.cos(math.pi * (epoch - warm_up) / (epochs - warm_up))) / 2
    return lr * 0.1 ** sum(epoch >= milestone for milestone in schedule)


def supcon_learning_rate(epoch: float, lr: float, epochs: int, warm_up: int) -> float:
    """The learning rate of SupContrast's authors at a time of the run, in epochs.

    Half a cosine from lr to lr / 1000 over all epochs, stepped once per epoch. They count epochs from 1: epoch e, from
    0, has the cosine's value at e + 1. During the warm-up the rate is linear in the step, from 0.01 to the cosine's
    value at the end of the warm-up.
    """

    def cosine(done):
        return lr * (0.001 + 0.999 * (1 + math.cos(math.pi * done / epochs)) / 2)

    if epoch < warm_up:
        return 0.01 + (cosine(warm_up) - 0.01) * epoch / warm_up
    return cosine(math.floor(epoch) + 1)


def moco_rate(epoch: float, args: Namespace) -> float:
    return moco_learning_rate(epoch, args.lr, args.epochs, args.warm_up, None if args.cos else args.schedule)


def supcon_rate(epoch: float, args: Namespace) -> float:
    return supcon_learning_rate(epoch, args.lr, args.epochs, args.warm_up) if args.cos else moco_rate(epoch, args)


def with_queue(model: type[MoCo], **changes) -> Method:
    """The record of a model with MoCo's constructor, options, views and learning rate. `changes`: other fields."""
    method = Method(model, build_moco, moco_rate, augment.PLAIN, shuffle_keys=True, add_options=moco_options)
    return replace(method, **changes)


# fmt: off
def moco_options(parser: Parser) -> None:
    add = parser.adder("momentum contrast")
    add("--moco-dim", resumed=KEEP, type=positive_int, default=128, metavar="C",
        help="width of the features (default: %(default)s)")
    add("--moco-k", resumed=KEEP, type=positive_int, default=65536, metavar="K",
        help="keys in the queue (default: %(default)s)")
    add("--moco-m", resumed=KEEP, type=fraction, default=0.99, metavar="M",
        help="momentum of the key encoder (default: %(default)s)")
    add("--moco-t", resumed=KEEP, type=positive_float, default=0.07, metavar="T",
        help="temperature (default: %(default)s)")
    add("--mlp", resumed=KEEP, action="store_true", help="MoCo v2's projection head of two layers")


def supcon_options(parser: Parser) -> None:
    add = parser.adder("SupContrast")
    add("--dim", resumed=KEEP, type=positive_int, default=128, metavar="C",
        help="width of the features (default: %(default)s)")
    add("--temp", resumed=KEEP, type=positive_float, default=0.1, metavar="T",
        help="temperature (default: %(default)s)")


# fmt: on
def build_moco(model: Callable[..., MoCo], base_encoder: Callable, args: Namespace, classes: int) -> MoCo:
    size = (args.moco_dim, args.moco_k, args.moco_m, args.moco_t)
    return model(base_encoder, *size, args.mlp, bn_splits=args.bn_splits)


def build_proto(model: type[MoCoProto], base_encoder: Callable, args: Namespace, classes: int) -> MoCoProto:
    return build_moco(partial(model, classes=classes), base_encoder, args, classes)


def build_supcon(model: type[SupContrast], base_encoder: Callable, args: Namespace, classes: int) -> SupContrast:
    return model(base_encoder, args.dim, args.temp, bn_splits=args.bn_splits)


def build_classifier(model: type[CrossEntropy], base_encoder: Callable, args: Namespace, classes: int) -> CrossEntropy:
    return model(base_encoder, classes, bn_splits=args.bn_splits)


def own_classifier(model: CrossEntropy) -> Scores:
    """The encoder's last layer."""
    return evaluate.frozen(model.encoder_q, keep_fc=True)


def by_prototypes(model: MoCoProto) -> Scores:
    """Similarity of a query to each prototype."""
    features = evaluate.frozen(model.encoder_q, keep_fc=True)
    return lambda images: model.scores(F.normalize(features(images), dim=1))


MOCO = with_queue(MoCo, labels=False)
IN = with_queue(MoCoIn)
OUT = with_queue(MoCoOut)
SUPLOSS = with_queue(MoCoSupLoss)
PROTO = with_queue(MoCoProto, build=build_proto, classifier=by_prototypes)
SUPCON = Method(
    SupContrast,
    build_supcon,
    supcon_rate,
    augment.SUPCON,
    add_options=supcon_options,
    defaults=dict(batch_size=1024, lr=0.5, cos=True, warm_up=None, schedule=[700, 800, 900]),
)
CROSS_ENTROPY = Method(
    CrossEntropy,
    build_classifier,
    supcon_rate,
    augment.CROSS_ENTROPY,
    views=1,
    labels_only=True,
    classifier=own_classifier,
    defaults=dict(epochs=500, batch_size=1024, lr=0.8, cos=True, warm_up=None, schedule=[350, 400, 450]),
)
ALL = {
    "main_moco.py": MOCO,
    "main_moco_in.py": IN,
    "main_moco_out.py": OUT,
    "main_moco_suploss.py": SUPLOSS,
    "main_moco_proto.py": PROTO,
    "main_supcon.py": SUPCON,
    "main_ce.py": CROSS_ENTROPY,
}
