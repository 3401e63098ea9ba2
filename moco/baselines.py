"""The table's rows with one encoder: SupContrast (no queue, no momentum encoder) and cross entropy.

Shapes: N images on this process, B = N * processes in the global batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed, encoders
from moco.losses import UNLABELLED, contrast_health, out_loss


class SupContrast(nn.Module):
    """Supervised contrastive learning within a batch (arXiv:2004.11362, eq. 2).

    Args:
        base_encoder, dim, T, bn_splits: see MoCo; the head has two layers.
    """

    def __init__(self, base_encoder: Callable[..., nn.Module], dim: int = 128, T: float = 0.1, *, bn_splits: int = 1):
        super().__init__()
        self.T, self.bn_splits = T, bn_splits
        self.measure_health, self.health = False, None
        self.encoder_q = base_encoder(num_classes=dim)
        encoders.add_mlp_head(self.encoder_q)
        encoders.split_batch_norm(self.encoder_q, bn_splits)

    def forward(self, im_1: Tensor, im_2: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            im_1, im_2: (N, 3, H, W) float, two views of this process's images.
            labels: (N,) int64, 0 or more; -1 for an image without one: its views have each other as their only positive.
        Returns:
            float32 scalar, the loss of the global batch: the mean over its 2B anchors, times T / 0.07.
        """
        if len(labels) % self.bn_splits:
            raise ValueError(f"bn_splits={self.bn_splits} does not divide a batch of {len(labels)}")
        # compute features of both views: batch norm sees both views of a chunk together
        chunks = zip(im_1.chunk(self.bn_splits), im_2.chunk(self.bn_splits), strict=True)
        z = self.encoder_q(torch.cat([view for pair in chunks for view in pair]))
        z = F.normalize(z.float(), dim=1)  # 2NxC
        # an image without a label gets one of its own: its only positive is its other view
        rows = torch.arange(len(labels), device=z.device, dtype=labels.dtype) + distributed.rank() * len(labels)
        labels = torch.where(labels == UNLABELLED, UNLABELLED - rows, labels)
        z_labels = torch.cat([chunk for chunk in labels.chunk(self.bn_splits) for _ in range(2)])

        with torch.autocast(z.device.type, enabled=False):
            # every process computes the loss of all anchors: 2Bx2B
            z_all, labels_all = distributed.gather_keys_and_labels(z.detach(), z_labels)
            z_all = distributed.with_gradient(z_all, z)
            logits = z_all @ z_all.T / self.T
            positives = labels_all[:, None] == labels_all
            contrast = ~torch.eye(len(z_all), dtype=torch.bool, device=z.device)
            if self.measure_health:
                self.health = contrast_health(logits, positives, self.T, contrast)
            loss = out_loss(logits, positives, contrast) * (self.T / 0.07)

            # DistributedDataParallel averages gradients, but these are parts of one loss and must be summed
            return loss.detach() + distributed.world_size() * (loss - loss.detach())


class CrossEntropy(nn.Module):
    """The encoder with a linear layer, trained by cross entropy."""

    def __init__(self, base_encoder: Callable[..., nn.Module], classes: int, *, bn_splits: int = 1):
        super().__init__()
        self.measure_health, self.health = False, None
        self.encoder_q = base_encoder(num_classes=classes)
        encoders.split_batch_norm(self.encoder_q, bn_splits)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: (N, 3, H, W) float. labels: (N,) int64, 0 or more. Returns the mean loss of this process's images."""
        return F.cross_entropy(self.encoder_q(images).float(), labels)
