#!/usr/bin/env bash
# `make slurm-test`: a real Slurm on this one machine (Debian, as root), a real array sweep, one task killed, resubmitted.
# Starts munged, slurmctld and slurmd on loopback and stops what it started.
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
SlurmdPort=16818
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
MinJobAge=300
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1100)}' /proc/meminfo) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
mkdir -p "$work/munge" "$work/state" "$work/spool"
chmod 755 "$work" "$work/munge"
chown -R munge "$work/munge"
setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --socket="$work/munge/munge.socket" --pid-file="$work/munge/munged.pid" \
    --log-file="$work/munge/munged.log" --seed-file="$work/munge/munged.seed" --key-file=/etc/munge/munge.key \
    > "$work/munged.log" 2>&1 &
pids+=($!)
for _ in $(seq 50); do [ -S "$work/munge/munge.socket" ] && break; sleep 0.1; done
slurmctld -D > "$work/slurmctld.log" 2>&1 & pids+=($!)
slurmd -D > "$work/slurmd.log" 2>&1 & pids+=($!)
for _ in $(seq 100); do [ "$(sinfo -h -o %T 2> /dev/null || true)" = idle ] && break; sleep 0.2; done
sinfo

# --- the same sweep twice: through Slurm with one task killed, and here
sweep() {
    for optimizer in muon ddcmuon; do
        for seed in 0 1; do
            echo "+experiment=grok_mlp optimizer=$optimizer seed=$seed model.depth=2 model.width=16 data.prime=7" \
                "training.batch_size=16 training.steps=$2 training.evaluations=10 wandb=disabled runs=$1"
        done
    done
}
steps=1500
sweep "$work/slurm" $steps > "$work/slurm.txt"
sweep "$work/here" $steps > "$work/here.txt"
finished() { [ -z "$(squeue -h 2> /dev/null)" ]; }
wait_for_jobs() { for _ in $(seq 600); do finished && return; sleep 0.2; done; echo "jobs hang" >&2; squeue >&2; exit 1; }

job=$(slurm/submit.sh "$work/slurm.txt" --time=10 --no-requeue)
echo "submitted as job $job"
halfway() { [ "$(cat "$work"/slurm/grok_mlp/muon-seed0-*/records.jsonl 2> /dev/null | wc -l)" -ge 4 ]; }
for _ in $(seq 600); do halfway && break; sleep 0.1; done
scancel --signal=KILL --full "${job}_0"
timing=$(ls "$work"/slurm/grok_mlp/muon-seed0-*/timing.jsonl)
cp "$timing" "$work/timing-before.jsonl"
echo "killed task 0 after $(tail -n 1 "$work"/slurm/grok_mlp/muon-seed0-*/records.jsonl | cut -d, -f1 | tr -dc 0-9) steps"
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

# --- and as a Hydra multirun through the launcher
"$PYTHON" train.py --multirun hydra/launcher=slurm hydra.launcher.mem_gb=1 $(head -n 1 "$work/here.txt" | sed "s#runs=.*#runs=$work/multirun#") \
    > "$work/multirun.log" 2>&1
for run in "$work"/multirun/grok_mlp/*/; do
    cmp "$run/records.jsonl" "$work/here/grok_mlp/$(basename "$run")/records.jsonl"
done
[ -f "$work"/multirun/grok_mlp/*/summary.json ]

for run in "$work"/here/grok_mlp/*/; do
    cmp "$run/records.jsonl" "$work/slurm/grok_mlp/$(basename "$run")/records.jsonl"
done
echo "slurm-test passed: $(ls -d "$work"/here/grok_mlp/*/ | wc -l) runs, the same records through an array, the launcher and here"
