"""MoCo v2 + SupContrast_Suploss: as Out, and queries are contrasted with the other queries of their process too.

    L_i = 1/|P(i)| * sum_{p in P(i)} -log( exp s(i, p) / sum_{a in A(i)} exp s(i, a) )

with s(i, a) = q_i . a / T, A(i) the other queries (gradient flows into them) and the keys of the same process's
batch, and the queue; P(i) those with the query's label. Its table row:

    python main_moco_suploss.py -a resnet50 --lr 0.12 -b 256 --epochs 1000 --moco-k 4096 \\
      --mlp --moco-t 0.2 --aug-plus --cos --bn-splits 2 data/
"""

from moco import methods, pretrain

if __name__ == "__main__":
    pretrain.main(methods.SUPLOSS, __doc__)
