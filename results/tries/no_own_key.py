"""In without a query's own key: neither a positive nor a negative. It tests why In at T 0.1 needs its queue.

Run it from the project's folder, with PYTHONPATH=. (docs/results.md has what it gave).
"""

import torch

from moco import distributed, methods, pretrain
from moco.builder import MoCoIn
from moco.losses import contrast_health, in_loss


class NoOwnKey(MoCoIn):
    def objective(self, q, labels, k_all, labels_all):
        first = distributed.rank() * len(q)
        logits, positives = self.compare(q, labels, k_all, labels_all, own=first)
        own = torch.zeros_like(positives)
        own.diagonal(first).fill_(True)
        logits, positives = logits.masked_fill(own, -1e4), positives & ~own
        if self.measure_health:
            self.health = contrast_health(logits, positives, self.T, ~own)
        return self.mean_over_rows(*in_loss(logits, positives, reduction="rows"))


if __name__ == "__main__":
    pretrain.main(methods.with_queue(NoOwnKey), __doc__)
