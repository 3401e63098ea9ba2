"""In with prototypes and a queue of the query encoder's own features (cross-batch memory, arXiv:1912.06798): no key encoder.

One view per image. Tried, not kept; run it from the project's folder, with PYTHONPATH=. (docs/results.md has what it gave).
"""

import torch
import torch.nn.functional as F

from moco import distributed, methods, pretrain
from moco.builder import LabelAwareMoCo
from moco.losses import contrast_health, in_loss


class XBM(LabelAwareMoCo):
    def __init__(self, *args, classes, **options):
        super().__init__(*args, **options)
        del self.encoder_k
        self.prototypes = torch.nn.Parameter(F.normalize(torch.randn(classes, self.queue.shape[0])))

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

    def scores(self, q):
        return q @ F.normalize(self.prototypes, dim=1).T / self.T


if __name__ == "__main__":
    method = methods.with_queue(
        XBM, build=methods.build_proto, classifier=methods.by_prototypes, views=1, shuffle_keys=False
    )
    pretrain.main(method, __doc__)
