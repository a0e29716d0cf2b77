#!/usr/bin/env bash
# `make slurm-test`: a real Slurm on this one machine (Debian, as root), a real array sweep; tasks are killed and submitted again,
# or stopped by Slurm, which queues them again; and one run on two nodes. Starts munged, slurmctld and two slurmd on loopback and
# stops what it started.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${DDC_PYTHON:-$PWD/.venv/bin/python}
export DDC_PYTHON=$PYTHON

if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "slurm-test installs and starts a Slurm of its own: it needs root on Debian or Ubuntu" >&2
    exit 2
fi
missing=""
for program in slurmctld slurmd munged sbatch; do command -v $program > /dev/null || missing="$missing $program"; done
if [ -n "$missing" ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null
fi

work=$(mktemp -d)
export SLURM_CONF=$work/slurm.conf # before anything that might speak to another Slurm
pids=()
stop() {
    status=$?
    scancel --user=root 2> /dev/null || true
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    for _ in $(seq 50); do kill -0 "${pids[@]}" 2> /dev/null || break; sleep 0.2; done # a daemon may hang while it stops
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2> /dev/null || true; done
    if [ $status != 0 ]; then tail -n 20 "$work"/*.log >&2 || true; fi
    rm -rf "$work" || true
    exit $status
}
trap stop EXIT

# --- daemons, on loopback, with all their files in one temporary folder
cat > "$work/slurm.conf" << EOF
ClusterName=ddc
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldPort=16817
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool-%n
MinJobAge=300
NodeName=DEFAULT CPUs=$((($(nproc) + 1) / 2)) RealMemory=$(awk '/MemTotal/ {print int($2 / 2200)}' /proc/meminfo) State=UNKNOWN
NodeName=one NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=16818
NodeName=two NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=16819
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
EOF
mkdir -p "$work/munge" "$work/state" "$work/spool-one" "$work/spool-two"
chmod 755 "$work" "$work/munge"
chown -R munge "$work/munge"
setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --socket="$work/munge/munge.socket" --pid-file="$work/munge/munged.pid" \
    --log-file="$work/munge/munged.log" --seed-file="$work/munge/munged.seed" --key-file=/etc/munge/munge.key \
    > "$work/munged.log" 2>&1 &
pids+=($!)
for _ in $(seq 50); do [ -S "$work/munge/munge.socket" ] && break; sleep 0.1; done
slurmctld -D > "$work/slurmctld.log" 2>&1 & pids+=($!)
for node in one two; do slurmd -D -N $node > "$work/slurmd-$node.log" 2>&1 & pids+=($!); done
for _ in $(seq 100); do [ "$(sinfo -h -o %T 2> /dev/null || true)" = idle ] && break; sleep 0.2; done
sinfo

# --- the same sweep: through Slurm with one task killed, and here
sweep() {
    for optimizer in ddcmuon muon; do # the slow one first, to be caught in the middle
        for seed in 0 1; do
            echo "+experiment=grok_mlp optimizer=$optimizer seed=$seed model.depth=2 model.width=16 data.prime=7" \
                "training.batch_size=16 training.steps=$2 training.evaluations=10 wandb=disabled runs=$1"
        done
    done
}
steps=900
for place in slurm preempted stopped here; do sweep "$work/$place" $steps > "$work/$place.txt"; done
sed -i 2q "$work/stopped.txt" # two runs
finished() { [ -z "$(squeue -h 2> /dev/null)" ]; }
wait_for_jobs() { for _ in $(seq 600); do finished && return; sleep 0.2; done; echo "jobs hang" >&2; squeue >&2; exit 1; }

job=$(slurm/submit.sh "$work/slurm.txt" --time=10 --no-requeue)
echo "submitted as job $job"
wait_for_records() { # of a run in a folder: so many
    for _ in $(seq 600); do [ "$(cat "$work/$1"/grok_mlp/"${3:-ddcmuon-seed0}"-*/records.jsonl 2> /dev/null | wc -l)" -ge "$2" ] && return; sleep 0.1; done
    echo "no records" >&2; exit 1
}
wait_for_records slurm 4
scancel --signal=KILL --full "${job}_0"
timing=$(ls "$work"/slurm/grok_mlp/ddcmuon-seed0-*/timing.jsonl)
cp "$timing" "$work/timing-before.jsonl"
echo "killed task 0 after $(tail -n 1 "$work"/slurm/grok_mlp/ddcmuon-seed0-*/records.jsonl | cut -d, -f1 | tr -dc 0-9) steps"
wait_for_jobs
"$PYTHON" scripts/sweep.py status "$work/slurm.txt" | tee "$work/status.txt" || true
if ! grep -q "3 complete, 1 unfinished" "$work/status.txt"; then
    echo "the killed task should be unfinished, the others complete" >&2
    exit 1
fi
job=$(slurm/submit.sh "$work/slurm.txt" --time=10)
echo "submitted again as job $job"
wait_for_jobs
"$PYTHON" scripts/sweep.py status "$work/slurm.txt"
"$PYTHON" scripts/sweep.py run "$work/here.txt" --jobs "$(nproc)" > /dev/null

# resumed, not started over: what the first try timed is still there
wall_times=$(wc -l < "$work/timing-before.jsonl")
head -n "$((wall_times - 1))" "$work/timing-before.jsonl" | cmp - <(head -n "$((wall_times - 1))" "$timing")

# --- a job takes the machine from tasks: they save, and Slurm queues them again
hurry() { # Slurm would let two minutes pass
    squeue --noheader --states=PENDING --format=%A | while read -r id; do scontrol update JobId="$id" StartTime=now 2> /dev/null || true; done
}
went_on() { # each task goes on from where it stopped
    saved=$(sed -n 's/^stopped after \(step [0-9]*\);.*/\1/p' "$@")
    echo "stopped, and gone on from there:" $saved
    [ -n "$saved" ] && [ "$saved" = "$(sed -n 's/.* steps, from \(step .*\)/\1/p' "$@")" ]
}
job=$(slurm/submit.sh "$work/preempted.txt" --time=10 --output="$work/preempted-%a.log")
echo "submitted as job $job, to be preempted"
wait_for_records preempted 4
srun --partition=urgent --ntasks="$(nproc)" true
for _ in $(seq 600); do finished && break; hurry; sleep 0.2; done
"$PYTHON" scripts/sweep.py status "$work/preempted.txt" # fails unless all are complete
cat "$work"/preempted-*.log | grep "DUE TO PREEMPTION"
went_on "$work"/preempted-*.log

# --- the last task of an array, whose job id is the array's, gets SIGTERM, as before its time limit: it saves, and queues itself
# again, and it alone. Its owner cancels it: it saves, and that is all
job=$(slurm/submit.sh "$work/stopped.txt" --time=10 --output="$work/stopped-%a.log")
echo "submitted as job $job, to be stopped"
wait_for_records stopped 3 ddcmuon-seed1
scancel --batch --signal=TERM "${job}_1"
for _ in $(seq 600); do grep "queued again" "$work/stopped-1.log" && break; sleep 0.1; done
sleep 3 # Slurm refuses to start a job within the second in which it ended
for _ in $(seq 600); do grep "from step" "$work/stopped-1.log" && break; hurry; sleep 0.1; done
went_on "$work/stopped-1.log"
scancel "${job}_1"
wait_for_jobs
"$PYTHON" scripts/sweep.py status "$work/stopped.txt" | tee "$work/status.txt" || true
grep -q "1 complete, 1 unfinished" "$work/status.txt"
if grep "from step" "$work/stopped-0.log"; then echo "a task was queued again that nobody had stopped" >&2; exit 1; fi

# --- and as a Hydra multirun through the launcher
"$PYTHON" train.py --multirun hydra/launcher=slurm hydra.launcher.mem_gb=1 $(head -n 1 "$work/here.txt" | sed "s#runs=.*#runs=$work/multirun#") \
    > "$work/multirun.log" 2>&1
for run in "$work"/multirun/grok_mlp/*/; do
    cmp "$run/records.jsonl" "$work/here/grok_mlp/$(basename "$run")/records.jsonl"
done
[ -f "$work"/multirun/grok_mlp/*/summary.json ]

# --- one run on two nodes, its parameters split between them, which is stopped and queues itself again; and the same run here
two="+experiment=grok_mlp optimizer=ddcmuon model.depth=2 model.width=15 data.prime=7 training.batch_size=16
    training.steps=60 training.evaluations=6 wandb=disabled"
job=$(sbatch --parsable --nodes=2 --time=5 --output="$work/two-nodes.log" slurm/nodes.sh $two runs="$work/two" launcher.parallel=fsdp)
wait_for_records two 3
scancel --batch --signal=TERM "$job"
for _ in $(seq 600); do grep "queued again" "$work/two-nodes.log" && break; sleep 0.1; done
sleep 3
for _ in $(seq 600); do finished && break; hurry; sleep 0.2; done
went_on "$work/two-nodes.log"
"$PYTHON" train.py $two runs="$work/alone" > /dev/null
"$PYTHON" - "$work"/{two,alone}/grok_mlp/*/records.jsonl << 'EOF'
import json, sys
two, alone = ([json.loads(line) for line in open(path)] for path in sys.argv[1:])
assert [row["step"] for row in two] == [row["step"] for row in alone] == list(range(0, 61, 10)), two
for row, other in zip(two, alone):
    for key in ("train_loss", "validation_loss"):
        assert abs(row[key] - other[key]) < 1e-4 * other[key], (row["step"], key, row[key], other[key])
EOF
grep -q '"processes": 2' "$work"/two/grok_mlp/*/run.json

for run in "$work"/here/grok_mlp/*/; do
    for place in slurm preempted; do cmp "$run/records.jsonl" "$work/$place/grok_mlp/$(basename "$run")/records.jsonl"; done
done
echo "slurm-test passed: $(ls -d "$work"/here/grok_mlp/*/ | wc -l) runs, the same records through an array, preempted, the launcher and here;" \
    "and one on two nodes"
