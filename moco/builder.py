"""MoCo and its label-aware variants: two encoders, a momentum update and a queue; `forward` returns the loss.

Shapes: N queries on this process, B = N * processes in the global batch, C = dim, K keys in the queue.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed, encoders
from moco.losses import UNLABELLED, contrast_health, in_loss, info_nce_logits, info_nce_loss, out_loss


class MoCo(nn.Module):
    """MoCo v2 (arXiv:1911.05722, arXiv:2003.04297): InfoNCE against a queue of momentum-encoded keys.

    Args:
        base_encoder: `base_encoder(num_classes=dim)` builds a network whose last layer is `fc`.
        dim: width C of the features. K: length of the queue. m: momentum of the key encoder. T: temperature.
        mlp: replace `fc` with MoCo v2's two-layer head.
        bn_splits: the encoders' batch norm sees this many chunks of the batch, each by itself, as it would on that
            many processes; Shuffling BN then works in one process too.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        bn_splits: int = 1,
    ):
        super().__init__()
        self.K, self.m, self.T, self.bn_splits = K, m, T, bn_splits
        self.measure_health = False  # also compute `health`, see losses.contrast_health?
        self.health = None
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        for encoder in (self.encoder_q, self.encoder_k):
            if mlp:
                encoders.add_mlp_head(encoder)
            encoders.split_batch_norm(encoder, bn_splits)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor, labels: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """
        Args:
            im_q: (N, 3, H, W) float, this process's query views.
            im_k: (N, 3, H, W) float, key views: of the same images, or with `order` of other ones.
            labels: unused; a label-aware variant in its place needs them.
            order: (B,) int64, the same permutation of the global batch on every process; row j of the global batch
                of im_k is then a view of image order[j]. Shuffling BN without moving images. Without it the images
                are gathered and shuffled here, as MoCo does it.
        Returns:
            float32 scalar, the mean loss of this process's queries. The queue then holds the step's keys.
        """
        # compute key features, before the queries: their activations are freed first
        k, order = self.keys(im_k, order)  # keys: NxC, shuffled

        # compute query features
        q = self.encode(self.encoder_q, im_q)  # queries: NxC

        # compare in float32, even where the encoders run in bfloat16 (autocast)
        with torch.autocast(q.device.type, enabled=False):
            # gather the keys of all processes and undo the shuffle
            k_all = unshuffle(distributed.all_gather(k), order)  # keys: BxC

            # logits against the own key and the queue, which moves on before the backward pass: Nx(1+K)
            logits = info_nce_logits(q, distributed.my_rows(k_all), self.queue.clone(), self.T)
            if self.measure_health:
                own_key = torch.arange(logits.shape[1], device=q.device).expand(logits.shape) == 0
                self.health = contrast_health(logits, own_key, self.T)
            loss = info_nce_loss(logits)

            # dequeue and enqueue
            self.enqueue(k_all)
        return loss

    @torch.no_grad()
    def keys(self, im_k: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(N, C) keys of this process in shuffled order, from the key encoder after its momentum update; the order."""
        self.momentum_update()
        if order is None and distributed.world_size() * self.bn_splits > 1:
            images = distributed.all_gather(im_k)
            order = distributed.broadcast(torch.randperm(len(images), device=im_k.device))
            im_k = images[distributed.my_rows(order)]  # row j of the global batch shows image order[j]
        return self.encode(self.encoder_k, im_k), order

    def encode(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C) float32, L2-normalised."""
        return F.normalize(encoder(images).float(), dim=1)

    @torch.no_grad()
    def momentum_update(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q (arXiv:1911.05722, eq. 2)."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)

    @torch.no_grad()
    def enqueue(self, k_all: Tensor, **more: Tensor) -> None:
        """Overwrites the oldest keys, wrapping around at K. `self.NAME` is a queue for every NAME in `more`, too."""
        size = min(len(k_all), self.K)  # a batch longer than the queue leaves its last K keys
        skipped = len(k_all) - size
        # The pointer stays on the device: reading it would make the host wait for the step.
        slots = (self.queue_ptr + skipped + torch.arange(size, device=self.queue.device)) % self.K
        self.queue.index_copy_(1, slots, k_all[skipped:].T)
        for name, values in more.items():
            getattr(self, name).index_copy_(0, slots, values[skipped:])
        self.queue_ptr.add_(len(k_all)).remainder_(self.K)


class LabelAwareMoCo(MoCo):
    """MoCo with a label for every key of the queue. A variant gives its `loss`, or an `objective` of its own.

    An objective that skips rows must return `mean_over_rows`.
    """

    loss: Callable[[Tensor, Tensor], Tensor]  # of logits and positives, see moco.losses

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("label_queue", torch.full((self.K,), UNLABELLED, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor, labels: Tensor, order: Tensor | None = None) -> Tensor:
        """As MoCo.forward; labels: (N,) int64 of this process's queries, -1 for an image that matches nothing."""
        # compute key and query features
        k, order = self.keys(im_k, order)  # keys: NxC, shuffled
        q = self.encode(self.encoder_q, im_q)  # queries: NxC

        with torch.autocast(q.device.type, enabled=False):
            # gather keys and labels of all processes; labels were not shuffled
            k_all, labels_all = distributed.gather_keys_and_labels(k, labels)  # BxC, B
            k_all = unshuffle(k_all, order)

            # labels decide which keys are positives
            loss = self.objective(q, labels, k_all, labels_all)

            # dequeue and enqueue
            self.enqueue(k_all, label_queue=labels_all)
        return loss

    def objective(self, q: Tensor, labels: Tensor, k_all: Tensor, labels_all: Tensor) -> Tensor:
        """The variant's `loss` with A: the step's keys from every process, and the queue.

        Args:
            q: (N, C), labels: (N,), this process's queries, with gradient.
            k_all: (B, C), labels_all: (B,), the keys of the global batch in its order, without gradient.
        Returns:
            float32 scalar, the mean over the queries.
        """
        logits, positives = self.compare(q, labels, k_all, labels_all, own=distributed.rank() * len(q))
        if self.measure_health:
            self.health = contrast_health(logits, positives, self.T)
        return self.loss(logits, positives)

    def mean_over_rows(self, losses: Tensor, counted: Tensor) -> Tensor:
        """The mean of losses (N,) over the rows that `counted` (N,) bool marks, on all processes; 0 if it marks none.

        Processes average their gradients, so each gives its own sum times their number over the global count.
        """
        count = distributed.all_sum(counted.sum()).clamp(min=1)
        return torch.where(counted, losses, 0).sum() * (distributed.world_size() / count)

    def compare(self, q: Tensor, labels: Tensor, k: Tensor, k_labels: Tensor, own: int) -> tuple[Tensor, Tensor]:
        """Queries against the keys `k` (M, C) and the queue.

        Returns:
            logits (N, M + K) float32, divided by T, and positives (N, M + K) bool: equal labels, and column own + i
            for query i, its own key, whatever its label.
        """
        keys = torch.cat([k.T, self.queue], dim=1)  # a copy: the queue moves on before the backward pass
        key_labels = torch.cat([k_labels, self.label_queue])
        positives = (labels[:, None] == key_labels) & (labels[:, None] != UNLABELLED)
        positives.diagonal(own).fill_(True)
        return q @ keys / self.T, positives


class MoCoIn(LabelAwareMoCo):
    """L_i = -log( mean_{p in P(i)} exp s(i, p) / sum_{a in A} exp s(i, a) ); A: the step's keys and the queue."""

    loss = staticmethod(in_loss)


class MoCoOut(LabelAwareMoCo):
    """L_i = mean_{p in P(i)} -log( exp s(i, p) / sum_{a in A} exp s(i, a) ); A: the step's keys and the queue."""

    loss = staticmethod(out_loss)


class MoCoProto(MoCoIn):
    """MoCoIn, and a prototype c_y (a learnable vector) for each class y (PaCo's centres, arXiv:2107.12028).

        L_i = L_i^In - log( exp(q_i . c_{y_i} / T) / sum_y exp(q_i . c_y / T) )

    Prototypes are L2-normalised where they are used. The loss is the mean of the first term over all queries plus the
    mean of the second over those with a label.

    Args:
        classes: number of classes; the rest is MoCo's.
    """

    def __init__(self, *args, classes: int, **options):
        super().__init__(*args, **options)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(classes, self.queue.shape[0])))

    def objective(self, q: Tensor, labels: Tensor, k_all: Tensor, labels_all: Tensor) -> Tensor:
        losses = F.cross_entropy(self.scores(q), labels, ignore_index=UNLABELLED, reduction="none")
        contrast = super().objective(q, labels, k_all, labels_all)
        return contrast + self.mean_over_rows(losses, labels != UNLABELLED)

    def scores(self, q: Tensor) -> Tensor:
        """(N, C) features, L2-normalised -> (N, classes) logits: the prototypes are a classifier."""
        return q @ F.normalize(self.prototypes, dim=1).T / self.T


class MoCoSupLoss(LabelAwareMoCo):
    """As MoCoOut, with A: the other queries of the process (with gradient), its keys, and the queue."""

    def objective(self, q: Tensor, labels: Tensor, k_all: Tensor, labels_all: Tensor) -> Tensor:
        if len(q) % self.bn_splits:
            raise ValueError(f"bn_splits={self.bn_splits} does not divide a batch of {len(q)}")
        k = distributed.my_rows(k_all)
        chunks = zip(*(x.chunk(self.bn_splits) for x in (q, labels, k)), strict=True)
        losses, healths = zip(*(self.one_process(*chunk) for chunk in chunks), strict=True)
        self.health = torch.stack(healths).mean(0) if self.measure_health else None
        return torch.stack(losses).mean()

    def one_process(self, q: Tensor, labels: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss and health of one chunk: those of a process with only these queries and keys."""
        n = len(q)
        logits, positives = self.compare(q, labels, torch.cat([q, k]), labels.repeat(2), own=n)
        contrast = ~torch.eye(*positives.shape, dtype=torch.bool, device=q.device)  # not a query with itself
        health = contrast_health(logits, positives, self.T, contrast) if self.measure_health else None
        return out_loss(logits, positives, contrast), health


def unshuffle(k_all: Tensor, order: Tensor | None) -> Tensor:
    """(B, C) gathered keys, put back into the order of the batch; `order` None: they were not shuffled."""
    return k_all if order is None else torch.empty_like(k_all).index_copy_(0, order, k_all)
