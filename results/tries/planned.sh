#!/bin/bash
# Prints the command lines of runs that are planned, the most wanted first:
#
#     bash results/tries/planned.sh DATA OUT | PYTHONPATH=. python results/tries/together.py 6 DATA OUT/labels/{coarse,noisy}
#
# OUT/labels is what labels.py makes of DATA. Six runs at a time make 360,000 encoder passes a second on an H200, so 45,000
# images and 60 passes take 7.5 seconds of it. A third argument chooses, for example "long 0" (eleven minutes, of three runs).
D=$1 O=$2
row() { echo "python scripts/reproduce.py $1 $D --name $2 --seeds $3 --epochs $4 -a resnet20 --pretrain \"$5 --precision bf16 --compile\" --runs $O/runs --results $O/results --weights $O/weights/$2-seed$3"; }
L="--linear \"--recipe moco --lr 0.1 -b 256 --epochs 10 --schedule 6 8 --precision fp32\""
crop() {  # seed, epochs of In, of cross entropy, of SupContrast: the own recipe with the options kept, at equal cost
  local R="-b 256 --wd 5e-4 --cos --warm-up 1 --knn-freq 20 --aug-crop --nesterov --no-bias-decay"
  row own resnet20-$2ep-crop $1 $2 "$R --lr 0.3"
  row ce resnet20-$3ep-crop $1 $3 "$R --lr 0.3" | sed "s|--runs|$L --runs|"
  row supcon resnet20-$4ep-crop $1 $4 "$R --lr 0.2" | sed "s|--runs|$L --runs|"
}
own() { crop $1 100 133 67; }   # 400 passes
long() { crop $1 200 267 133; }  # 800: In gains more from longer runs than cross entropy does
table() {  # seed: rows of the README's table
  for r in supcon in-200 ce; do row $r resnet20-60ep $1 60 "" | sed 's|reproduce.py|reproduce.py --small|'; done
}
one() {  # name script options: 60 passes, held-out images, and its linear classifier
  local R=$O/tries/$1
  echo "python $2 -a resnet20 -b 256 --wd 5e-4 --cos --warm-up 1 --precision bf16 --compile --holdout 500 $3 --output-dir $R $D && python main_lincls.py -a resnet20 --recipe moco --lr 0.1 -b 256 --epochs 5 --schedule 3 4 --precision fp32 --holdout 500 --seed 0 --pretrained $R/checkpoint_last.pth.tar --output-dir $R $D"
}
queue() {  # seed
  for k in 1 256 1024 4096 16384; do for m in in out; do for t in 0.1 0.2; do
    one queue-$m-k$k-t$t-$1 main_moco_$m.py "--moco-k $k --moco-m 0.9 --mlp --moco-t $t --epochs 15 --lr 0.3 --aug-mild --knn-freq 5 --seed $1"
  done; done; done
}
noown() {  # seed; needs PYTHONPATH=.
  for k in 1 4096; do one noown-k$k-$1 results/tries/no_own_key.py "--moco-k $k --moco-m 0.9 --mlp --moco-t 0.1 --epochs 15 --lr 0.3 --aug-mild --knn-freq 5 --seed $1"; done
}
other() {  # name script options data ($O/labels/coarse or noisy): all images; the classifier on the right ten labels
  local R=$O/tries/$1
  echo "python $2 -a resnet20 -b 256 --wd 5e-4 --cos --warm-up 1 --precision bf16 --compile $3 --aug-mild --knn-freq 20 --seed 0 --output-dir $R $O/labels/$4 && python main_lincls.py -a resnet20 --recipe moco --lr 0.1 -b 256 --epochs 5 --schedule 3 4 --precision fp32 --seed 0 --pretrained $R/checkpoint_last.pth.tar --output-dir $R/linear $D && python results/tries/knn.py $R/checkpoint_last.pth.tar $D > $R/knn.txt"
}
others() {
  Q="--moco-k 4096 --moco-m 0.9 --mlp --moco-t 0.1 --epochs 15 --lr 0.3"
  for l in coarse noisy; do
    other $l-in main_moco_in.py "$Q" $l; other $l-out main_moco_out.py "$Q" $l; other $l-noown results/tries/no_own_key.py "$Q" $l
    for lr in 0.1 0.3; do other $l-ce-lr$lr main_ce.py "--epochs 20 --lr $lr" $l; other $l-head-lr$lr results/tries/head.py "--epochs 20 --lr $lr" $l; done
  done
}
mild() {  # seed: SupContrast of the README's table, whose third seed is missing
  row supcon resnet20-67ep-own $1 67 "-b 256 --wd 5e-4 --cos --warm-up 1 --knn-freq 20 --aug-mild --lr 0.2" | sed "s|--runs|$L --runs|"
}
eval "${3:-own 1; own 2; noown 0; queue 0; others; noown 1; queue 1; mild 2}"
