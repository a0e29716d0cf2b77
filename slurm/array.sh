#!/usr/bin/env bash
# One task of a sweep. Submitted by slurm/submit.sh, which says how many there are.
# SIGTERM comes 120 s before the time limit: the run saves a checkpoint, and the task queues itself again. When a task is preempted,
# it comes as many seconds before the end as the cluster says (KillWait), and Slurm itself queues the task again.
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail
cd "$DDC_ROOT"
. slurm/requeue.sh
requeue_when_stopped 'kill -TERM $run' "$DDC_PYTHON" scripts/sweep.py task "$DDC_SWEEP" "$SLURM_ARRAY_TASK_ID"
