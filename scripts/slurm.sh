#!/bin/bash
# Trains under SLURM on one or more nodes, with one task per GPU:
#
#     sbatch --nodes 2 scripts/slurm.sh main_moco_out.py -a resnet50 --lr 0.24 -b 512 ... data/
#
# Submit it from the repository's folder with the Python environment activated. Without arguments it trains Out as in
# the README. Two minutes before the time limit the run saves its step and the job is requeued. It then continues from
# that step, as it does after preemption or a node failure. See docs/clusters.md.
#
#SBATCH --job-name=moco
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

if [ $# -eq 0 ]; then
    set -- main_moco_out.py -a resnet50 --lr 0.12 -b 256 --moco-k 4096 --mlp --moco-t 0.2 --aug-plus --cos data/
fi
script=$1
shift

# A requeued job keeps its ID, so it finds its checkpoint. A new job continues an ended one with OUTPUT_DIR=runs/slurm-ITS_ID.
out=${OUTPUT_DIR:-runs/slurm-$SLURM_JOB_ID}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it from sbatch
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # not that of the shell that called sbatch
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((10001 + SLURM_JOB_ID % 10000))}

# A data-loading worker for each core of the node, unless "$@" has -j.
workers=$((SRUN_CPUS_PER_TASK * ${SLURM_NTASKS_PER_NODE:-1}))

# Even if it began with --resume PATH, a requeued job continues from its own checkpoint.
compgen -G "$out/*_last.pth.tar" > /dev/null && set -- "$@" --resume auto

# Each task sets torchrun's variables. With exec, the program itself gets the signals and gives the exit status, not a shell.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}
    exec "$@"' task "${PYTHON:-python}" "$script" -j "$workers" --output-dir "$out" --resume auto "$@"
status=$?

preempted() {
    scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}

# Saved, but not finished: stopped by SIGUSR1, or by SIGTERM at a preemption. SLURM itself requeues a preempted job only if it
# still runs at the end of GraceTime.
if [ $status -eq 138 ] || { [ $status -eq 143 ] && preempted; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
