"""SupContrast: supervised contrastive learning within a batch, no queue, no momentum encoder (arXiv:2004.11362).

    L_i = 1/|P(i)| * sum_{p in P(i)} -log( exp s(i, p) / sum_{a in A(i)} exp s(i, a) ),  times T / 0.07

with s(i, a) = z_i . z_a / T. Each of the 2B views of a batch of B is an anchor; A(i) is the other 2B - 1, P(i) those
with its label. Its table row:

    python main_supcon.py -a resnet50 data/
    python main_lincls.py --recipe supcon --pretrained checkpoint_0999.pth.tar data/
"""

from moco import methods, pretrain

if __name__ == "__main__":
    pretrain.main(methods.SUPCON, __doc__)
