"""MoCo v2: InfoNCE against a momentum queue, without labels.

    L_i = -log( exp s(i, k_i) / ( exp s(i, k_i) + sum_{a in queue} exp s(i, a) ) )

with s(i, a) = q_i . a / T and k_i the query's own key. Row "MoCo v2" of the table:

    python main_moco.py -a resnet50 --lr 0.12 -b 256 --epochs 200 --moco-k 4096 \\
      --mlp --moco-t 0.2 --aug-plus --cos --bn-splits 2 data/
"""

from moco import methods, pretrain

if __name__ == "__main__":
    pretrain.main(methods.MOCO, __doc__)
