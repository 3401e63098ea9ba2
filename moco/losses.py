"""The objectives, as pure functions of logits and masks.

Notation: row i of `logits` is a query, column a is a member of its contrast set A(i); logits[i, a] = s(i, a) =
q_i . a / T. `positives` marks P(i), the members of A(i) with the query's label; or it gives weights w(i, a), 0 or more,
and P(i) are the members of A(i) with a weight. A mask is weights of 0 and 1. Everything is computed in float32, whatever
the input: bfloat16 has too few digits for a log-sum-exp over 65,536 keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HEALTH = ("accuracy", "positive_similarity", "negative_similarity", "positives")  # what contrast_health computes
UNLABELLED = -1  # matches nothing: the label of an image without one, and of a queue slot that was never filled


def in_loss(logits: Tensor, positives: Tensor, *, reduction: str = "mean") -> Tensor | tuple[Tensor, Tensor]:
    """SupContrast "In": the mean over the positives is inside the logarithm (L_in, arXiv:2004.11362, eq. 3).

        L_i = -log( 1/|P(i)| * sum_{p in P(i)} exp s(i, p) / sum_{a in A(i)} exp s(i, a) )

    With weights, the mean is weighted:

        L_i = -log( sum_p w(i, p) exp s(i, p) / sum_p w(i, p) / sum_{a in A(i)} exp s(i, a) )

    Args:
        logits: (N, M) float, already divided by the temperature.
        positives: (N, M) bool, or float weights, 0 or more.
        reduction: "mean" or "rows".
    Returns:
        "mean": float32 scalar, the mean over the rows that have a positive (0, with a graph, if none has).
        "rows": the loss of each row, (N,) float32, and which rows have a positive, (N,) bool; the others' loss is 0.
    """
    logits = checked(logits, positives)
    if positives.dtype == torch.bool:
        weighted, total = logits, positives.sum(1)
    else:
        weights, positives = positives.float(), positives > 0
        weighted, total = logits + torch.where(positives, weights, 1).log(), weights.sum(1)
    counted = total > 0
    loss = logits.logsumexp(1) - masked_logsumexp(weighted, positives) + torch.where(counted, total, 1).log()
    return reduced(loss, counted, reduction)


def out_loss(
    logits: Tensor, positives: Tensor, contrast: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor | tuple[Tensor, Tensor]:
    """SupContrast "Out": the mean over the positives is outside the logarithm (L_out, arXiv:2004.11362, eq. 2).

        L_i = 1/|P(i)| * sum_{p in P(i)} -log( exp s(i, p) / sum_{a in A(i)} exp s(i, a) )

    With weights, the mean is weighted:

        L_i = sum_p w(i, p) * -log( exp s(i, p) / sum_{a in A(i)} exp s(i, a) ) / sum_p w(i, p)

    Args:
        logits: (N, M) float, already divided by the temperature.
        positives: (N, M) bool, or float weights, 0 or more; only those inside `contrast` count.
        contrast: (N, M) bool, the members of A(i); None if every column is one.
        reduction: "mean" or "rows".
    Returns:
        As in_loss.
    """
    logits = checked(logits, positives, contrast)
    if contrast is None:
        denominator = logits.logsumexp(1)
    else:
        positives = positives.masked_fill(~contrast, 0)
        denominator = masked_logsumexp(logits, contrast)
    # Distances to the denominator are averaged, not logits: at |logits| of 1e4 the latter would cancel.
    distance = denominator[:, None] - logits
    if positives.dtype == torch.bool:
        total, distance = positives.sum(1), distance.masked_fill(~positives, 0)
    else:
        weights = positives.float()
        total, distance = weights.sum(1), distance.masked_fill(weights == 0, 0) * weights
    counted = total > 0
    return reduced(distance.sum(1) / torch.where(counted, total, 1), counted, reduction)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE of MoCo (arXiv:1911.05722, eq. 1): the positive is the query's own key, the negatives are the queue.

    Args:
        q: (N, C), L2-normalised queries. k: (N, C), their keys. queue: (C, K), older keys.
    Returns:
        float32 scalar, the mean over the queries.
    """
    return info_nce_loss(info_nce_logits(q, k, queue, temperature))


def info_nce_loss(logits: Tensor) -> Tensor:
    """Cross entropy of (N, 1 + K) logits whose column 0 is the positive; scalar, the mean over rows."""
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def info_nce_logits(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """(N, 1 + K) float32: column 0 is the query's own key, the others are the queue."""
    q, k, queue = q.float(), k.float(), queue.float()
    with torch.autocast(q.device.type, enabled=False):
        return torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / temperature


def checked(logits: Tensor, *masks: Tensor | None) -> Tensor:
    """The logits in float32; ValueError: a mask has another shape, and would be broadcast."""
    for mask in masks:
        if mask is not None and mask.shape != logits.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and a mask {tuple(mask.shape)}: the shapes must be equal")
    return logits.float()


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """log sum exp over the columns in `mask`. A row without one gives a huge negative number and no NaN gradient."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).logsumexp(1)


def reduced(loss: Tensor, counted: Tensor, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    if reduction not in ("mean", "rows"):
        raise ValueError(f"reduction '{reduction}': it is mean or rows")
    loss = torch.where(counted, loss, 0)
    return (loss, counted) if reduction == "rows" else loss.sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def contrast_health(logits: Tensor, positives: Tensor, temperature: float, contrast: Tensor | None = None) -> Tensor:
    """(4,) float32 measures of the contrast, which show whether a loss near log K is normal: means over the queries.

    In the order of HEALTH: contrastive accuracy (how often the most similar member of A(i) is a positive), a query's mean
    cosine similarity to its positives and to its negatives (each 0 if it has none), and its number of positives.
    """
    logits = logits.detach().float()
    if contrast is None:
        contrast = torch.ones_like(positives)
    positives = positives & contrast
    negatives = contrast & ~positives
    top = logits.masked_fill(~contrast, -torch.inf).argmax(1, keepdim=True)

    def similarity(mask):
        return ((logits * mask).sum(1) / mask.sum(1).clamp(min=1)).mean() * temperature

    accuracy = positives.gather(1, top).float().mean()
    return torch.stack([accuracy, similarity(positives), similarity(negatives), positives.sum(1).float().mean()])
