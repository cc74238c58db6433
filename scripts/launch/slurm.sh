#!/usr/bin/env bash
# One training run on several nodes under Slurm: one torchrun a node, which starts one process a GPU.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch/slurm.sh yamls/olmoe-1b-7b.yaml [key=value ...]
#
# The repository, its .venv, the data and save_folder must be on a file system that all nodes see. Slurm sends SIGTERM
# three minutes before the time limit; every rank then finishes its step and saves. Submitted again, the same command
# continues from there.
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

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}             # torchrun's own default is 1
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1                 # a failed collective ends the process
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150                # seconds from SIGTERM to SIGKILL; 30 are short for a big save

# exec: the signal reaches srun, which passes it to every torchrun, and torchrun to every rank.
exec srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    scripts/train.py "$@" autoresume=true
