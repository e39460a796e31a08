#!/usr/bin/env bash
# A run on the nodes of a Slurm job: `sbatch deploy/slurm.sh job.yaml`, with equigram's environment active.
#
# The store must be where every node can write: a shared folder or s3://. Two minutes before the time limit the run
# ends, and the job is queued again; it goes on from the store. The same happens when Slurm preempts it or its first
# node fails; other nodes may fail without that. EDIT the sizes; also with `sbatch --nodes=8 --gpus-per-node=4 …`.
#SBATCH --job-name=equigram
#SBATCH --output=equigram-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --no-kill
set -euo pipefail

job=${1:?usage: sbatch deploy/slurm.sh JOB.yaml}
patience=${NODE_SECONDS:-300} # how long to wait for the nodes
head_ip=${HEAD_IP:-$(hostname -I | awk '{ print $1 }')} # this is the first node
port=$((20000 + SLURM_JOB_ID % 10000))
folder=/tmp/ray-$SLURM_JOB_ID
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

# A step on one node, with all that Slurm gave the job there.
step=(srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$cpus")

start() { # NODE OPTION…: a Ray node, until it is told to end
  "${step[@]}" --nodelist="$1" ray start "${@:2}" --num-cpus="$cpus" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    --disable-usage-stats --block &
  rays+=($!)
}

attend() { # COMMAND…: run it here, so that SIGTERM reaches it
  [[ -z $ending ]] || return 143
  "$@" &
  child=$!
  [[ -z $ending ]] || terminate # it came in between
  local code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the command
    code=0
    wait "$child" || code=$?
  done
  child=
  return "$code"
}

terminate() {
  ending=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

finish() {
  local code=$?
  trap - EXIT
  trap '' TERM
  ((${#rays[@]} == 0)) || kill -TERM "${rays[@]}" 2>/dev/null || true
  wait || true
  for node in "${nodes[@]}"; do
    "${step[@]}" --nodelist="$node" rm -rf "$folder" || true
  done
  # A job that is cancelled or preempted is not running any more, and Slurm decides about it.
  if [[ -n $ending && $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

rays=() child='' ending=''
trap terminate TERM
trap finish EXIT

start "${nodes[0]}" --head --node-ip-address="$head_ip" --port="$port" --temp-dir="$folder" --include-dashboard=false
for ((waited = 0; waited < patience; waited++)); do
  ! (: <"/dev/tcp/$head_ip/$port") 2>/dev/null || break
  attend sleep 1
done
for node in "${nodes[@]:1}"; do
  start "$node" --address="$head_ip:$port"
done

# Wait for the nodes, then go on with those that are there: one that comes late is used as well.
attend python -c '
import logging, sys, time
import ray

address, wanted, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
end = time.monotonic() + patience
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted and time.monotonic() < end:
    time.sleep(0.5)
print(f"{there} of {wanted} nodes are there", flush=True)
' "$head_ip:$port" "${#nodes[@]}" "$patience"

attend equigram run "$job" --address "$head_ip:$port"
