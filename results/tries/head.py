"""Cross entropy with MoCo v2's head of two layers between the features and the classes; the evaluation removes it.

A control for the contrastive methods, whose projection head is removed, too. Run it from the project's folder, with
PYTHONPATH=. (docs/results.md has what it gave).
"""

from dataclasses import replace

from moco import encoders, methods, pretrain
from moco.baselines import CrossEntropy


class CrossEntropyHead(CrossEntropy):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        encoders.add_mlp_head(self.encoder_q)


if __name__ == "__main__":
    pretrain.main(replace(methods.CROSS_ENTROPY, model=CrossEntropyHead), __doc__)
