#!/usr/bin/env bash
# Slurm: one process per node; the folder of the sweep, and the weights in ckpt/ of the folder from which this is
# submitted, on a file system that all nodes share.
#
#   sbatch scripts/pod/slurm.sh sweep --config vbvr_ensemble --config.unit=8 --out /shared/runs/ensemble
#
#SBATCH --job-name=videoreason
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
set -euo pipefail

# the processes find each other by the variables that srun sets; one on a node takes all its GPUs
srun --kill-on-bad-exit=1 videoreason "$@"
