"""MoCo v2 + SupContrast_In: labels choose the positives; their mean is taken inside the logarithm.

    L_i = -log( 1/|P(i)| * sum_{p in P(i)} exp s(i, p) / sum_{a in A} exp s(i, a) )

with s(i, a) = q_i . a / T, A the step's keys and the queue, P(i) those with the query's label. Its table row:

    python main_moco_in.py -a resnet50 --lr 0.12 -b 256 --epochs 200 --moco-k 4096 \\
      --mlp --moco-t 0.2 --aug-plus --cos --bn-splits 2 data/
"""

from moco import methods, pretrain

if __name__ == "__main__":
    pretrain.main(methods.IN, __doc__)
