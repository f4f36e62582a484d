#!/usr/bin/env bash
# Stages 4 and 5 on several machines under Slurm. The recipe and its data lie on a disk that all of them see; stages 0
# to 3 are done. Edit the four lines, then, from the root of the recipe:
#
#   sbatch local/slurm.sh --conf conf/NAME.yaml --preset gpu80g
#
#SBATCH --job-name=cosyvoice_ft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
bash tools/install.sh   # once, before the machines start side by side
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# SLURM_NODEID differs from machine to machine: it is read there, not here
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'exec bash run.sh --stage 4 --stop_stage 5 --node_rank "$SLURM_NODEID" "$@"' run.sh \
  --num_nodes "$SLURM_NNODES" --nproc "${SLURM_GPUS_ON_NODE:-1}" --master_addr "$master" "$@"
