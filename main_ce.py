"""SupCrossEntropy: the encoder with a linear layer, trained by cross entropy and evaluated with its own classifier.

    L_i = -log( exp f(x_i)_{y_i} / sum_c exp f(x_i)_c )

Its table row:

    python main_ce.py -a resnet50 data/
"""

from moco import methods, pretrain

if __name__ == "__main__":
    pretrain.main(methods.CROSS_ENTROPY, __doc__)
