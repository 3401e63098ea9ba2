"""MoCo and its label-aware variants: two encoders, a momentum update and a queue; `forward` returns the loss.
Below them the two other rows of the table, which have one encoder: SupContrast and CrossEntropy.

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
    classifies = False  # is the encoder itself a classifier?
    views = 2
    shuffle_keys = True  # see data.Batches

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
        k, order = self.keys(im_k, order)  # first: its activations are gone when those of the queries come
        q = self.encode(self.encoder_q, im_q)
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
        return F.normalize(encoders.apply(encoder, images, self.bn_splits), dim=1)

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
        k, order = self.keys(im_k, order)
        q = self.encode(self.encoder_q, im_q)
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
        positives[:, own : own + len(q)].fill_diagonal_(True)
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


class SupContrast(nn.Module):
    """Supervised contrastive learning within a batch (arXiv:2004.11362, eq. 2): no queue, no momentum encoder.

    Args:
        base_encoder, dim, T, bn_splits: see MoCo; the head has two layers.
    """

    labelled = True
    classifies = False
    views = 2
    shuffle_keys = False

    def __init__(self, base_encoder, dim=128, T=0.1, *, bn_splits=1):
        super().__init__()
        self.T, self.bn_splits = T, bn_splits
        self.watch, self.health = False, None
        self.encoder_q = base_encoder(num_classes=dim)
        add_mlp_head(self.encoder_q)

    @staticmethod
    def add_options(parser):
        options.supcon_options(parser)

    @classmethod
    def from_options(cls, args, classes):
        return cls(encoders.build(args.arch, args.stem), args.dim, args.temp, bn_splits=args.bn_splits)

    @staticmethod
    def recipe(args):
        return augment.AUG_PLUS if args.aug_plus else augment.SUPCON

    def forward(self, im_1, im_2, labels):
        """
        Args:
            im_1, im_2: (N, 3, H, W) float, two views of this process's images. labels: (N,) int64.
        Returns:
            float32 scalar, the loss of the global batch: the mean over its 2B anchors, times T / 0.07.
        """
        # Batch norm sees both views of a chunk together.
        chunks = zip(im_1.chunk(self.bn_splits), im_2.chunk(self.bn_splits), strict=True)
        z = encoders.apply(self.encoder_q, torch.cat([view for pair in chunks for view in pair]), self.bn_splits)
        z = F.normalize(z, dim=1)
        with torch.autocast(z.device.type, enabled=False):
            views_labels = torch.cat([pair for c in labels.chunk(self.bn_splits) for pair in (c, c)])
            # Every process computes the loss of all anchors; the features of its own images carry gradient there.
            z_all, labels_all = distributed.all_gather(z.detach()), distributed.all_gather(views_labels)
            own = slice(distributed.rank() * len(z), (distributed.rank() + 1) * len(z))
            if len(z_all) > len(z):
                z_all = torch.cat([z_all[: own.start], z, z_all[own.stop :]])
            else:
                z_all = z
            logits = z_all @ z_all.T / self.T
            positives = (labels_all[:, None] == labels_all) & (labels_all[:, None] != UNLABELLED)
            contrast = ~torch.eye(len(z_all), dtype=torch.bool, device=z.device)
            if self.watch:
                self.health = contrast_health(logits, positives, self.T, contrast)
            loss = out_loss(logits, positives, contrast) * (self.T / 0.07)
            # Gradients are averaged over processes, but the parts that they have here must be added up.
            return loss.detach() + distributed.world_size() * (loss - loss.detach())


class CrossEntropy(nn.Module):
    """The encoder with a linear layer, trained by cross entropy. `classifies`: it is evaluated as it is."""

    labelled = True
    classifies = True
    views = 1
    shuffle_keys = False

    def __init__(self, base_encoder, classes, *, bn_splits=1):
        super().__init__()
        self.bn_splits = bn_splits
        self.watch, self.health = False, None
        self.encoder_q = base_encoder(num_classes=classes)

    @staticmethod
    def add_options(parser):
        pass

    @classmethod
    def from_options(cls, args, classes):
        return cls(encoders.build(args.arch, args.stem), classes, bn_splits=args.bn_splits)

    @staticmethod
    def recipe(args):
        return augment.AUG_PLUS if args.aug_plus else augment.CROSS_ENTROPY

    def forward(self, images, labels):
        """images: (N, 3, H, W) float. labels: (N,) int64. Returns the mean loss of this process's images."""
        return F.cross_entropy(encoders.apply(self.encoder_q, images, self.bn_splits), labels)


def unshuffle(k_all, order):
    """(B, C) gathered keys, put back into the order of the batch; `order` None if they never left it."""
    return k_all if order is None else torch.empty_like(k_all).index_copy_(0, order, k_all)
