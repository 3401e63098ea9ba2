"""SupCrossEntropy: the encoder with a linear layer, trained by cross entropy and evaluated as it is.

    L_i = -log( exp f(x_i)_{y_i} / sum_c exp f(x_i)_c )

Its table row:

    python main_ce.py -a resnet50 data/
"""

from moco import options, pretrain
from moco.baselines import CrossEntropy

if __name__ == "__main__":
    recipe = dict(epochs=500, batch_size=1024, lr=0.8, cos=True, warm_up=None)
    pretrain.main(CrossEntropy, __doc__, options.CROSS_ENTROPY, **recipe)
