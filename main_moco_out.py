"""MoCo v2 + SupContrast_Out: labels choose the positives; their mean is taken outside the logarithm.

    L_i = 1/|P(i)| * sum_{p in P(i)} -log( exp s(i, p) / sum_{a in A} exp s(i, a) )

with s(i, a) = q_i . a / T, A the step's keys and the queue, P(i) those with the query's label. Its table row:

    python main_moco_out.py -a resnet50 --lr 0.12 -b 256 --epochs 1000 --moco-k 4096 \\
      --mlp --moco-t 0.2 --aug-plus --cos --bn-splits 2 data/
"""

from moco import methods, pretrain

if __name__ == "__main__":
    pretrain.main(methods.OUT, __doc__)
