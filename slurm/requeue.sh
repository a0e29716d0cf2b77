# Sourced by job scripts. `requeue_when_stopped STOP COMMAND...` runs a command. On SIGTERM, which comes before the time limit, STOP is
# evaluated, which must end the command ($run is its process), and the job is queued again; not so if its owner has cancelled it.
# Status 75 says that there is a checkpoint to go on from; without it, a job is not queued again more than ten times.
requeue_when_stopped() {
    local stop=$1 status=0 stopped="" run id=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # a job id may be that of the whole array
    shift
    "$@" &
    run=$!
    trap 'stopped=yes; eval "$stop" || true' TERM
    wait $run || status=$?
    # a signal ends a wait, and not the command
    while [ $status -gt 128 ] && [ -n "$stopped" ]; do
        status=0
        wait $run || status=$?
        kill -0 $run 2> /dev/null || break
    done
    if [ -n "$stopped" ] && [ $status != 0 ] && [ "$(squeue --noheader --jobs="$id" --format=%T)" = RUNNING ]; then
        if [ $status = 75 ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
            echo "queued again: $(date)"
            scontrol requeue "$id"
        fi
    fi
    return $status
}
