#!/usr/bin/env bash
# One training run on several nodes under Slurm: one torchrun per node, which starts one process per GPU.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch/slurm.sh yamls/olmoe-1b-7b.yaml [key=value ...]
#
# The repository, its .venv, the data and save_folder must be on a file system that all nodes see. Set --cpus-per-task to
# the cores of a node. Three minutes before the time limit, Slurm sends SIGTERM to each torchrun, which passes it to its
# ranks: they finish the step and save. The same command continues the run.
#SBATCH --job-name=llmfoundry
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --output=%x-%j.log

set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch --nodes N --gpus-per-node G $0 YAML [key=value ...]" >&2
    exit 2
fi

cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}  # torchrun's own default is 1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # for torchrun --max-restarts on several nodes (docs/many-gpus.md)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150     # seconds from SIGTERM to SIGKILL; the default of 30 is short for a big save

# srun does not inherit --cpus-per-task from sbatch since Slurm 22.05.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    scripts/train.py "$@" autoresume=true
