#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster, one process a GPU, and goes back into the queue when it is preempted.
#
#   VENV=~/venv sbatch --nodes=2 --partition=PARTITION experiments/launch/slurm.sh \
#     1b --output /shared/runs/1b --data.source /shared/shards/mine --mesh.fsdp 16
#
# Run it in the root of this repository, on a file system that all nodes share; all arguments go to
# experiments.mesanet.pretrain. The cluster charges all GPUs of all nodes until the run is finished. Options of sbatch,
# before the script, win over the ones below. DRY_RUN=1 prints the command instead.
#
#SBATCH --job-name=mesanet
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --open-mode=append
set -euo pipefail

VENV=${VENV:-} # virtual environment on the shared file system: pip install -c constraints.txt -e ".[cuda]"

if [ -z "$VENV" ]; then
  echo "error: VENV is not set; give the virtual environment that this package is installed in." >&2
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: SLURM_JOB_ID is not set; start this script with sbatch." >&2
  exit 2
fi

# The processes get SIGTERM a minute before the time is up: too late to start again here, so the job queues anew. If
# this script gets it, too, that is scancel or a preemption, and Slurm knows best whether the job is to run again.
told=
trap 'told=yes' TERM

# JAX gives each process the GPU of its number on the node, so each has to see all of them.
status=0
FINAL="0 2 130 143" experiments/launch/restart.sh \
  srun --gpu-bind=none "$VENV/bin/python" -m experiments.mesanet.pretrain "$@" || status=$?
if [ "$status" -eq 143 ] && [ -z "$told" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
