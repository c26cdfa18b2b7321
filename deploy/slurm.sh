#!/usr/bin/env bash
# Run one experiment on a SLURM cluster. Ray runs on every node of the allocation, and the pld-ray
# command runs on the first node.
#
#   sbatch deploy/slurm.sh cifar100_methods
#   sbatch --nodes 8 deploy/slurm.sh homogeneous_pairs --set data.root=/data/imagenet
#
# To resume, for example after the time limit or the loss of a node, submit the same job again.
# All nodes must see a virtual environment with pld-ray ($PLD_RAY_VENV, by default ./.venv) and a
# shared folder for the results ($PLD_RAY_STORAGE, by default ./results).
#SBATCH --job-name=pld-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail

bin=${PLD_RAY_VENV:-$PWD/.venv}/bin
export PLD_RAY_STORAGE=${PLD_RAY_STORAGE:-$PWD/results}
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_PER_TASK:-0}
gpus=${gpus##*:}  # the value can have a type, as in "a100:4"
port=$((20000 + SLURM_JOB_ID % 20000))

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}')

# The token keeps other users of these machines out of this cluster.
RAY_AUTH_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# --block keeps each task alive until the job ends.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap "$bin/ray" start --head --block \
  --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 \
  --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats &
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap "$bin/ray" start --block \
    --address="$address:$port" --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats &
done

joined=0
for _ in $(seq 120); do
  joined=$("$bin/ray" status --address="$address:$port" 2>/dev/null | grep -c ' node_' || true)
  [ "$joined" -eq "${#nodes[@]}" ] && break
  sleep 1
done
if [ "$joined" -ne "${#nodes[@]}" ]; then
  echo "$joined of ${#nodes[@]} nodes joined the Ray cluster; see the messages above" >&2
  exit 1
fi

# The command is started without srun, because srun would not forward the signal. After the signal,
# the command stops within seconds and prints how to resume.
"$bin/pld-ray" run "$@" --address "$address:$port" &
driver=$!
trap 'kill -TERM $driver' TERM INT
code=0
wait $driver || code=$?
while kill -0 $driver 2>/dev/null; do  # the signal interrupts wait, so wait again
  code=0
  wait $driver || code=$?
done
jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true
exit $code
