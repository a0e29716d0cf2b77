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
"$DDC_PYTHON" scripts/sweep.py task "$DDC_SWEEP" "$SLURM_ARRAY_TASK_ID" &
run=$!
trap 'kill -TERM $run 2> /dev/null || true' TERM
status=0
wait $run || status=$?
while kill -0 $run 2> /dev/null; do status=0; wait $run || status=$?; done # the signal ended the first wait, not the run
case $status in
    75 | 143) # stopped with a checkpoint, or before there was anything to save
        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
        if [ "$state" = RUNNING ]; then # not CANCELLED by its owner
            echo "queued again: $(date)"
            scontrol requeue "$SLURM_JOB_ID"
        fi ;;
esac
exit $status
