#!/bin/bash
# One training on several machines of a Slurm cluster: `sbatch examples/slurm_train.sh`.
# srun starts a process per GPU, and Lightning learns from Slurm which one each is. When the time is up, submit it again:
# a run that has a checkpoint goes on from it.
#SBATCH --job-name=foldconv-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
set -euo pipefail

data=${DATA:-/shared/imagenet}
run=${RUN:-/shared/runs/resnet50-doconv} # on a disk that all machines see
recipe=gluoncv/resnet50_v1b
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

if [ -f "$run/last.ckpt" ]; then
    srun foldconv train --resume "$run"
else
    srun foldconv train --config "$recipe" --data "$data" --out "$run" --workers 7 \
        --nodes "$SLURM_NNODES" --devices "$SLURM_NTASKS_PER_NODE" --strategy ddp
fi

# The same by torchrun, which then has one task per machine (--ntasks-per-node=1):
#   srun torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint "$(hostname):29400" \
#       -m foldconv train --config "$recipe" --data "$data" --out "$run" --nodes 2 --devices 4 --strategy ddp
