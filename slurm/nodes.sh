#!/usr/bin/env bash
# One run on several nodes, from the root of the repository, which all nodes must see, as they must the run's folder:
#   sbatch --nodes=2 --gpus-per-node=8 slurm/nodes.sh +experiment=lm_overtrain scale=gpu launcher.parallel=fsdp
# As many processes on each node as it has GPUs (one without), or DDC_PROCESSES. 120 s before the time limit the run saves a checkpoint,
# for which torchrun gives it 30 s, and the job queues itself again, ten times at most; submitted anew, the run goes on as well.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node --oneliner "$first" | grep -oP 'NodeAddr=\K\S+')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
DDC_PYTHON=${DDC_PYTHON:-$PWD/.venv/bin/python}
DDC_PROCESSES=${DDC_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
export MASTER_ADDR MASTER_PORT DDC_PYTHON DDC_PROCESSES
. slurm/requeue.sh
requeue_when_stopped 'scancel --signal=TERM "$SLURM_JOB_ID"' srun bash -c 'exec "$DDC_PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
    --nproc-per-node="$DDC_PROCESSES" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
    train.py launcher=torchrun "$@"' torchrun "$@"
