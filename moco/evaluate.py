"""Evaluation, in float32: top-k accuracy, and the kNN monitor on frozen features."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from moco import augment, distributed
from moco.batches import Centres
from moco.datasets import Split


def topk_hits(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """How many of the labels (N,) are among the k highest of the scores (N, classes), for each k: (len(ks),) int64."""
    best = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return torch.stack([hits[:, :k].any(1).sum() for k in ks])


@torch.no_grad()
def accuracy(
    network: Callable[[Tensor], Tensor], split: Split, centre: augment.Centre, batch_size: int, device: torch.device
) -> tuple[float, float, Tensor]:
    """Top-1 and top-5 in percent of a network that gives scores (N, classes); and the confusion matrix.

    The latter is (classes, classes) int64 on the CPU: how many images of class i have their highest score at class j.
    """
    classes = len(split.classes)
    hits = torch.zeros(2, dtype=torch.long, device=device)
    pairs = torch.zeros(classes * classes, dtype=torch.long, device=device)
    for images, labels in Centres(split, centre, batch_size, device):
        scores = network(images)
        hits += topk_hits(scores, labels)
        pairs += (labels * classes + scores.argmax(1)).bincount(minlength=len(pairs))
    top1, top5 = (100 * distributed.all_sum(hits).double() / len(split)).tolist()
    return top1, top5, distributed.all_sum(pairs).view(classes, classes).cpu()


def worst_classes(confusion: Tensor, classes: Sequence[str], count: int = 3) -> str:
    """The classes of lowest top-1 accuracy, as a line; a class without images is left out."""
    images = confusion.sum(1)
    rates = [(100 * int(confusion[i, i]) / int(images[i]), name) for i, name in enumerate(classes) if images[i]]
    return "worst classes: " + ", ".join(f"{name} {rate:.1f}" for rate, name in sorted(rates)[:count])


def frozen(encoder: nn.Module, keep_fc: bool = False) -> nn.Module:
    """A copy of an encoder for fast inference: eval mode, batch norm folded into the convolutions, no `fc`.

    (N, 3, H, W) -> (N, width), or with `keep_fc` what `fc` makes of it.
    """
    encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
    if not keep_fc:
        encoder.fc = nn.Identity()
    for module in encoder.modules():
        if isinstance(module, nn.Sequential) and [type(m) for m in module] == [nn.Conv2d, nn.BatchNorm2d]:
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d) and name.startswith("bn"):
                conv = name.replace("bn", "conv")
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), norm))
                setattr(module, name, nn.Identity())
    return encoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def extract(encoder: nn.Module, split: Split, centre: augment.Centre, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """L2-normalised features (N, width) float32 and labels (N,) of a split, in its order, on every process."""
    features, labels, device = [], [], next(encoder.parameters()).device
    for images, targets in Centres(split, centre, batch_size, device):
        features.append(F.normalize(encoder(images), dim=1))
        labels.append(targets)
    features, labels = torch.cat(features), torch.cat(labels)
    processes = distributed.world_size()
    if processes > 1:  # process r has rows r, r + processes, ...: equal shares are gathered, then interleaved
        missing = -(-len(split) // processes) - len(features)
        features = distributed.all_gather(F.pad(features, (0, 0, 0, missing)))
        features = features.unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)[: len(split)]
        labels = split.labels.to(device)
    return features, labels


@torch.no_grad()
def knn(
    encoder: nn.Module,
    train: Split,
    validation: Split,
    centre: augment.Centre,
    batch_size: int = 256,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Top-1 accuracy in percent of the weighted nearest-neighbour vote (Wu et al., arXiv:1805.01978, section 3.4).

    The k training features most similar to a validation feature vote for their labels with weight
    exp(similarity / temperature); images without a label have no vote. Features are those of the frozen encoder without its head.
    """
    encoder, train = frozen(encoder), train.labelled()
    bank, bank_labels = extract(encoder, train, centre, batch_size)
    queries, labels = extract(encoder, validation, centre, batch_size)
    classes = len(train.classes)
    right = 0
    for query, label in zip(queries.split(1000), labels.split(1000), strict=True):
        similarity, nearest = (query @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = query.new_zeros(len(query), classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        right += (votes.argmax(1) == label).sum()
    return 100 * int(right) / len(labels)
