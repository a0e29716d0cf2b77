#!/usr/bin/env bash
# Submit a sweep file as a Slurm array: slurm/submit.sh SWEEP_FILE [sbatch options, such as --time=2:00:00 -p gpu]
# Submitted again, complete runs end at once and stopped ones resume: it is safe after any failure.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "usage: slurm/submit.sh SWEEP_FILE [sbatch options]" >&2
    exit 2
fi
DDC_SWEEP=$(realpath "$1"); shift
DDC_ROOT=$(realpath "$(dirname "$0")/..")
DDC_PYTHON=${DDC_PYTHON:-$DDC_ROOT/.venv/bin/python}
export DDC_SWEEP DDC_ROOT DDC_PYTHON
count=$("$DDC_PYTHON" "$DDC_ROOT/scripts/sweep.py" count "$DDC_SWEEP")  # every line composed and validated
mkdir -p "$DDC_ROOT/runs/slurm"
exec sbatch --parsable --array="0-$((count - 1))" --output="$DDC_ROOT/runs/slurm/%A_%a.log" --export=ALL "$@" "$DDC_ROOT/slurm/array.sh"
