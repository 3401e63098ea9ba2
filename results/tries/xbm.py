"""In with prototypes and a queue of the query encoder's own features (cross-batch memory, arXiv:1912.06798): no key encoder.

One view per image. Tried, not kept; run it from the project's folder, with PYTHONPATH=. (docs/results.md has what it gave).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from moco import distributed, methods, pretrain
from moco.builder import MoCoProto
from moco.losses import contrast_health, in_loss


class XBM(MoCoProto):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.encoder_k

    def forward(self, images, labels):
        q = self.encode(self.encoder_q, images)
        with torch.autocast(q.device.type, enabled=False):
            k_all, labels_all = distributed.gather_keys_and_labels(q.detach(), labels)
            # the other queries of this process, with gradient, and the queue
            logits, positives = self.compare(q, labels, q, labels, own=0)
            own = torch.zeros_like(positives)
            own[:, : len(q)].fill_diagonal_(True)
            logits, positives = logits.masked_fill(own, -1e4), positives & ~own
            if self.measure_health:
                self.health = contrast_health(logits, positives, self.T, ~own)
            losses, counted = in_loss(logits, positives, reduction="rows")
            loss = self.mean_over_rows(losses, counted) + F.cross_entropy(self.scores(q), labels)
            self.enqueue(k_all, label_queue=labels_all)
        return loss


if __name__ == "__main__":
    pretrain.main(replace(methods.PROTO, model=XBM, views=1, shuffle_keys=False), __doc__)
