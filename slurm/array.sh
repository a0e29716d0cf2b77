#!/usr/bin/env bash
# One task of a sweep. Submitted by slurm/submit.sh, which says how many there are.
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "$DDC_ROOT"
exec "$DDC_PYTHON" scripts/sweep.py task "$DDC_SWEEP" "$SLURM_ARRAY_TASK_ID"
