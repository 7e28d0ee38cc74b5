#!/bin/bash
# A comparison on several machines of a Slurm cluster: `sbatch examples/slurm_compare_ray.sh`.
# Ray is started on each machine and hands out the runs, four to a GPU. When the time is up, submit it again: what is
# done stays, and what was cut off goes on.
#SBATCH --job-name=foldconv-compare
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

data=${DATA:-/shared/cifar10.npz}
out=${OUT:-/shared/comparison} # on a disk that all machines see
export RAY_USAGE_STATS_ENABLED=0 SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun does not ask sbatch for

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
resources=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)
srun --nodes=1 --ntasks=1 -w "$head" ray start --head --port=6379 --include-dashboard=false "${resources[@]}" &
sleep 20
srun --nodes="$((SLURM_NNODES - 1))" --ntasks="$((SLURM_NNODES - 1))" --exclude="$head" \
    ray start --address="$head:6379" "${resources[@]}" &
sleep 20

# sbatch runs this script on the first machine, the cluster's head. `exec`: the signal above reaches the comparison.
exec foldconv compare --methods plain,doconv,orepa,repvgg,acnet,dbb,expandnet --seeds 10 \
    --config cifar10-resnet20 --data "$data" --out "$out" \
    --ray "$head:6379" --cpus-per-run 8 --gpus-per-run 0.25
