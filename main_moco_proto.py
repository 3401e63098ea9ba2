"""MoCo v2 + SupContrast_In with one prototype per class: a learnable vector c_y that is contrasted with the queries.

    L_i = L_i^In - log( exp s(i, c_{y_i}) / sum_y exp s(i, c_y) )

with L_i^In as in main_moco_in.py and s(i, c) = q_i . c / T, prototypes being L2-normalised. The mean of the second term is
over the queries that have a label. Prototypes also serve as a classifier.

    python main_moco_proto.py -a resnet20 --lr 0.15 -b 256 --epochs 100 --wd 5e-4 --moco-k 4096 --moco-m 0.9 \\
      --mlp --moco-t 0.1 --aug-mild --cos --warm-up 1 data/
"""

from moco import methods, pretrain

if __name__ == "__main__":
    pretrain.main(methods.PROTO, __doc__)
