"""Evaluation, in float32: top-k accuracy, and the kNN monitor on frozen features."""

import copy
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from moco import augment, distributed, encoders
from moco.batches import Centres
from moco.datasets import Split

LARGEST_CONFUSION = 1000  # classes in a confusion matrix: its size is their square, and every checkpoint has it
QUERIES = 1000  # queries per kNN vote
FULL_BYTES = 1 << 30  # the largest bank in float32: a larger one is kept in float16
PART_BYTES = 256 << 20  # a part of the bank in float32 with its similarities


@torch.no_grad()
def accuracy(
    network: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], classes: int
) -> tuple[float, float, Tensor, Tensor | None]:
    """Top-1 and top-5 accuracy of a network that gives scores (N, classes), counts per class, the confusion matrix.

    Args:
        batches: this process's inputs and their labels (N,). Every process has equally many; some may be empty.
    Returns:
        top-1 and top-5 in percent; (2, classes) int64 on the CPU: per class the images that are right at top-1, and all
        images; (classes, classes) int64 on the CPU: how many images of class i have their highest score at class j, or
        None for more than LARGEST_CONFUSION classes.
    """
    # Counted at the end: each bincount waits for the device.
    found = [(network(inputs).topk(min(5, classes), dim=1).indices, labels) for inputs, labels in batches]
    best, labels = map(torch.cat, zip(*found, strict=True))
    right = best == labels[:, None]
    counts = torch.stack([some.bincount(minlength=classes) for some in (labels[right[:, 0]], labels)])
    counts, among5 = distributed.all_sum(counts), distributed.all_sum(right.any(1).sum())
    top1, top5 = (100 * torch.stack([counts[0].sum(), among5]).double() / counts[1].sum()).tolist()
    if classes > LARGEST_CONFUSION:
        return top1, top5, counts.cpu(), None
    pairs = (labels * classes + best[:, 0]).bincount(minlength=classes * classes)
    return top1, top5, counts.cpu(), distributed.all_sum(pairs).view(classes, classes).cpu()


def frozen(encoder: nn.Module, keep_fc: bool = False) -> nn.Module:
    """A copy of an encoder for fast inference: in eval mode, without `fc`; a ResNet's batch norm folded into its convolutions.

    (N, 3, H, W) -> (N, width), or with `keep_fc` the output of `fc`.
    """
    encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
    if not keep_fc:
        encoder.get_submodule("fc")  # AttributeError: there is no such layer, so it cannot be left out
        encoder.fc = nn.Identity()
    # Of a ResNet it is known that its layers are called in the order in which they are defined.
    for module in encoder.modules() if isinstance(encoder, encoders.RESNETS) else ():
        for (first, conv), (second, norm) in pairwise(module.named_children()):
            if isinstance(conv, nn.Conv2d) and type(norm) in (nn.BatchNorm2d, encoders.SplitBatchNorm):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
    return encoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def extract(
    encoder: nn.Module,
    split: Split,
    centre: augment.Centre,
    batch_size: int = 256,
    workers: int = 8,
) -> tuple[Tensor, Tensor]:
    """L2-normalised features (N, width) and labels (N,) of a split, in its order, on every process.

    Features are float32, or float16 if float32 would take more than FULL_BYTES.
    """
    device, processes = next(encoder.parameters()).device, distributed.world_size()
    batches, features = Centres(split, centre, batch_size, device, workers), None
    for i, (images, _) in enumerate(batches):
        mine = F.normalize(encoder(images), dim=1)
        if features is None:
            dtype = torch.float16 if 4 * len(split) * mine.shape[1] > FULL_BYTES else torch.float32
            features = mine.new_empty(len(split), mine.shape[1], dtype=dtype)
        mine = mine.to(features.dtype)
        # Process r has rows r, r + processes, ...: gather equal shares, then interleave them.
        place = features[i * batches.batch * processes : (i + 1) * batches.batch * processes]
        mine = F.pad(mine, (0, 0, 0, -(-len(place) // processes) - len(mine)))
        both = distributed.all_gather(mine).unflatten(0, (processes, -1)).transpose(0, 1).flatten(0, 1)
        place.copy_(both[: len(place)])
    return features, batches.labels


@torch.no_grad()
def knn(
    encoder: nn.Module,
    train: Split,
    validation: Split,
    centre: augment.Centre,
    batch_size: int = 256,
    k: int = 200,
    temperature: float = 0.1,
    workers: int = 8,
) -> float:
    """Top-1 accuracy in percent of the weighted nearest-neighbour vote (Wu et al., arXiv:1805.01978, section 3.4).

    The k training features most similar to a validation feature vote for their labels with weight
    exp(similarity / temperature); images without a label do not vote. Features are those of the frozen encoder
    without its head, in half precision if there are many.
    """
    encoder, train, classes = frozen(encoder), train.labelled(), len(train.classes)
    bank, bank_labels = extract(encoder, train, centre, batch_size, workers)
    queries, labels = extract(encoder, validation, centre, batch_size, workers)
    mine = slice(distributed.rank(), None, distributed.world_size())
    right = torch.zeros((), dtype=torch.long, device=bank.device)
    for query, label in zip(queries[mine].split(QUERIES), labels[mine].split(QUERIES), strict=True):
        right += (vote(query.float(), bank, bank_labels, classes, k, temperature) == label).sum()
    return 100 * int(distributed.all_sum(right)) / len(labels)


def vote(query: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """The label (N,) for which the k nearest features of the bank vote, for each query (N, width) float32.

    The bank is compared in parts, in float32; the k nearest of the parts so far are kept.
    """
    similarity, nearest = query.new_empty(len(query), 0), labels.new_empty(len(query), 0)
    rows = max(1, PART_BYTES // (4 * (len(query) + bank.shape[1])))
    for part, its_labels in zip(bank.split(rows), labels.split(rows), strict=True):
        best, index = (query @ part.float().T).topk(min(k, len(part)), dim=1)
        similarity, nearest = torch.cat([similarity, best], 1), torch.cat([nearest, its_labels[index]], 1)
        similarity, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
        nearest = nearest.gather(1, index)
    votes = query.new_zeros(len(query), classes)
    return votes.scatter_add_(1, nearest, (similarity / temperature).exp()).argmax(1)
