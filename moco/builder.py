"""MoCo and its label-aware variants: two encoders, a momentum update and a queue; `forward` returns the loss.

Shapes: N queries on this process, B = N * processes in the global batch, C = dim, K keys in the queue.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from moco import augment, distributed, encoders, options
from moco.encoders import add_mlp_head
from moco.losses import contrast_health, in_loss, info_nce_logits, out_loss

UNLABELLED = -1  # the label of a queue slot that was never filled; it matches nothing


class MoCo(nn.Module):
    """MoCo v2 (arXiv:1911.05722, arXiv:2003.04297): InfoNCE against a queue of momentum-encoded keys.

    Args:
        base_encoder: `base_encoder(num_classes=dim)` builds a network whose last layer is `fc`.
        dim: width C of the features. K: length of the queue. m: momentum of the key encoder. T: temperature.
        mlp: replace `fc` with MoCo v2's two-layer head.
        bn_splits: apply the encoders to this many chunks of the batch, so that batch norm sees what as many
            processes would have seen; Shuffling BN then works in one process too.
    """

    labelled = False  # does forward take labels?
    views = 2
    shuffle_keys = True

    def __init__(self, base_encoder, dim=128, K=65536, m=0.999, T=0.07, mlp=False, *, bn_splits=1):
        super().__init__()
        self.K, self.m, self.T, self.bn_splits = K, m, T, bn_splits
        self.watch = False  # also compute `health`, see losses.contrast_health?
        self.health = None
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        if mlp:
            add_mlp_head(self.encoder_q)
            add_mlp_head(self.encoder_k)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @staticmethod
    def add_options(parser):
        options.moco_options(parser)

    @classmethod
    def from_options(cls, args, classes):
        """The model that a command line asks for; `classes`, their number, plays no part in it."""
        base_encoder = encoders.build(args.arch, args.stem)
        size = (args.moco_dim, args.moco_k, args.moco_m, args.moco_t)
        return cls(base_encoder, *size, args.mlp, bn_splits=args.bn_splits)

    @staticmethod
    def recipe(args):
        return augment.AUG_PLUS if args.aug_plus else augment.PLAIN

    def forward(self, im_q, im_k, *, order=None):
        """
        Args:
            im_q: (N, 3, H, W) float, this process's query views.
            im_k: (N, 3, H, W) float, key views: of the same images, or with `order` of other ones.
            order: (B,) int64, the same permutation of the global batch on every process; row j of the global batch
                of im_k is then a view of image order[j]. Shuffling BN without moving images. Without it the images
                are gathered and shuffled here, as MoCo does it.
        Returns:
            float32 scalar, the mean loss of this process's queries. The queue has taken up the step's keys.
        """
        q = self.encode(self.encoder_q, im_q)
        k, order = self.keys(im_k, order)
        # Similarities are float32 even where the encoders run in bfloat16 (autocast).
        with torch.autocast(q.device.type, enabled=False):
            k_all = unshuffle(distributed.all_gather(k), order)
            loss = self.contrast(q, k_all)
            self.enqueue(k_all)
        return loss

    def contrast(self, q, k_all):
        logits = info_nce_logits(q, distributed.my_rows(k_all), self.queue.clone(), self.T)
        if self.watch:
            positives = torch.zeros_like(logits, dtype=torch.bool)
            positives[:, 0] = True
            self.health = contrast_health(logits, positives, self.T)
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))

    @torch.no_grad()
    def keys(self, im_k, order):
        """(N, C) keys of this process in shuffled order, from the key encoder after its momentum update; the order."""
        self.momentum_update()
        if order is None and distributed.world_size() * self.bn_splits > 1:
            order = torch.randperm(len(im_k) * distributed.world_size(), device=im_k.device)
            order = distributed.from_first(order)
            im_k = distributed.shuffle_images(im_k, order)
        return self.encode(self.encoder_k, im_k), order

    def encode(self, encoder, images):
        """(N, 3, H, W) -> (N, C) float32, L2-normalised."""
        if self.bn_splits == 1 or not self.training:
            return F.normalize(encoder(images).float(), dim=1)
        # Every chunk starts from the same running statistics and their results are averaged: one update by the mean
        # of the chunks' statistics, which is what as many processes arrive at when they average theirs.
        # (`.data`, since autograd would take a change of theirs for one of what the backward pass needs.)
        running = [buffer.data for buffer in encoder.buffers() if buffer.is_floating_point()]
        before = [buffer.clone() for buffer in running]
        after = [torch.zeros_like(buffer) for buffer in running]
        features = []
        for chunk in images.chunk(self.bn_splits):
            torch._foreach_copy_(running, before)
            features.append(encoder(chunk).float())
            torch._foreach_add_(after, running, alpha=1 / self.bn_splits)
        torch._foreach_copy_(running, after)
        return F.normalize(torch.cat(features), dim=1)

    @torch.no_grad()
    def momentum_update(self):
        """theta_k <- m theta_k + (1 - m) theta_q (arXiv:1911.05722, eq. 2)."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m)

    @torch.no_grad()
    def enqueue(self, k_all, **more):
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
    """MoCo with a label for every key of the queue. A variant says in `objective` what is contrasted with what."""

    labelled = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("label_queue", torch.full((self.K,), UNLABELLED, dtype=torch.long))

    def forward(self, im_q, im_k, labels, *, order=None):
        """As MoCo.forward; labels: (N,) int64 of this process's queries, -1 for an image that matches nothing."""
        q = self.encode(self.encoder_q, im_q)
        k, order = self.keys(im_k, order)
        with torch.autocast(q.device.type, enabled=False):
            # One gather a step: a label travels beside a key, its 64 bits in the place of two floats.
            packed = distributed.all_gather(torch.cat([k, labels.view(-1, 1).view(torch.float32)], dim=1))
            k_all = unshuffle(packed[:, :-2], order)
            labels_all = packed[:, -2:].contiguous().view(torch.long).view(-1)
            loss = self.objective(q, labels, k_all, labels_all)
            self.enqueue(k_all, label_queue=labels_all)
        return loss

    def objective(self, q, labels, k_all, labels_all):
        """
        Args:
            q: (N, C), labels: (N,), this process's queries, with gradient.
            k_all: (B, C), labels_all: (B,), the keys of the global batch, in its order, without.
        Returns:
            float32 scalar, the mean over the queries.
        """
        raise NotImplementedError

    def compare(self, q, labels, k, k_labels, own):
        """Queries against the keys `k` (M, C) and the queue.

        Returns:
            logits (N, M + K) float32, divided by T, and positives (N, M + K) bool: equal labels, and column own + i
            for query i, its own key, whatever its label.
        """
        keys = torch.cat([k.T, self.queue], dim=1)  # a copy: the queue moves on before the backward pass
        key_labels = torch.cat([k_labels, self.label_queue])
        positives = (labels[:, None] == key_labels) & (labels[:, None] != UNLABELLED)
        rows = torch.arange(len(q), device=q.device)
        positives[rows, own + rows] = True
        return q @ keys / self.T, positives


class MoCoIn(LabelAwareMoCo):
    """L_i = -log( mean_{p in P(i)} exp s(i, p) / sum_{a in A} exp s(i, a) ); A: the step's keys and the queue."""

    loss = staticmethod(in_loss)

    def objective(self, q, labels, k_all, labels_all):
        logits, positives = self.compare(q, labels, k_all, labels_all, own=distributed.rank() * len(q))
        if self.watch:
            self.health = contrast_health(logits, positives, self.T)
        return self.loss(logits, positives)


class MoCoOut(MoCoIn):
    """L_i = mean_{p in P(i)} -log( exp s(i, p) / sum_{a in A} exp s(i, a) ); A: the step's keys and the queue."""

    loss = staticmethod(out_loss)


class MoCoSupLoss(LabelAwareMoCo):
    """As MoCoOut, with A: the other queries of the process (with gradient), its keys, and the queue."""

    def objective(self, q, labels, k_all, labels_all):
        k = distributed.my_rows(k_all)
        chunks = zip(*(x.chunk(self.bn_splits) for x in (q, labels, k)), strict=True)
        losses, healths = zip(*(self.one_process(*chunk) for chunk in chunks), strict=True)
        self.health = torch.stack(healths).mean(0) if self.watch else None
        return torch.stack(losses).mean()

    def one_process(self, q, labels, k):
        n = len(q)
        logits, positives = self.compare(q, labels, torch.cat([q, k]), labels.repeat(2), own=n)
        contrast = torch.ones_like(positives)
        contrast[:, :n].fill_diagonal_(False)  # a query is not contrasted with itself
        health = contrast_health(logits, positives, self.T, contrast) if self.watch else None
        return out_loss(logits, positives, contrast), health


def unshuffle(k_all, order):
    """(B, C) gathered keys, put back into the order of the batch; `order` None if they never left it."""
    return k_all if order is None else torch.empty_like(k_all).index_copy_(0, order, k_all)
