#!/bin/bash
# The main job on Slurm, on all GPUs of its nodes. From the checkout, which all nodes see, with its environment in .venv:
#
#   sbatch --nodes=4 docs/cluster/slurm.sh --images /data/train --store /data/features --device cuda
#
# All arguments are options of jobs/upsample_imagenet.py. The script adds --resume: a job that Slurm stopped and queued
# again, or that you submit again, continues its store. It ends with the exit code of the job.
#
#SBATCH --job-name=densefeat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=densefeat-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:TERM@120
# --no-kill: the job survives the loss of a node other than the first. --signal: two minutes before its time is over, the
# job stops, and says how many shards are finished.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
export PATH="$PWD/.venv/bin:$PATH"

# Other users of these nodes reach Ray's ports, but nobody without the token can run code through them.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# Other jobs may run Ray on these nodes too: ports and the folder are this job's own.
port=$((20000 + SLURM_JOB_ID % 10000 * 3))
RAY_ADDRESS=$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$port
export RAY_ADDRESS
node=(--block --num-cpus="$SLURM_CPUS_PER_TASK" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0)

# Not `ray stop`, which would also end what other jobs of the same user run on these nodes.
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

# This script runs on the first node, and so do the head of the cluster and the driver of the job.
ray start --head --port="$port" --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${node[@]}" >/dev/null &
head=$!
until ray status >/dev/null 2>&1; do
    kill -0 "$head" 2>/dev/null || { echo "error: Ray does not start on $SLURMD_NODENAME, see above" >&2; exit 70; }
    sleep 1
done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others)); then
    srun --nodes=$others --ntasks=$others --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        --exclude="$SLURMD_NODENAME" --no-kill --kill-on-bad-exit=0 --wait=0 \
        ray start --address="$RAY_ADDRESS" "${node[@]}" >/dev/null &
fi

# Without --workers, the job has one worker per GPU that is there when it starts.
python - "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys
import time

import ray

ray.init(address="auto", logging_level="ERROR")
wanted, end = int(sys.argv[1]), time.monotonic() + 300
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted and time.monotonic() < end:
    time.sleep(1)
print(f"{there} of {wanted} nodes are there", file=sys.stderr)
PYTHON

stopped=0
trap 'stopped=1; kill -TERM "$job" 2>/dev/null || true' TERM
python -m jobs.upsample_imagenet --resume "$@" &
job=$!
code=0
wait "$job" || code=$?
while ((stopped)); do # the signal ended only the waiting
    stopped=0 code=0
    wait "$job" || code=$?
done
exit "$code"
