#!/bin/bash
# ---- edit here; then `qsub /shared/work/runs/first/job.sh` submits it again, and the run goes on
#PBS -N first
#PBS -A abc123
#PBS -q gpu
#PBS -l select=2:ncpus=96:mpiprocs=8:ngpus=8
#PBS -l place=scatter:excl
#PBS -l walltime=60:30:00
#PBS -j oe
#PBS -o /shared/work/runs/first/logs/pbs.out
#PBS -r y
#PBS --constraint=h100
# ---- no signal ahead of the end is promised here: the run itself stops by max_hours=23.9167 in run.yaml

# ---- variables of all processes; those that are set already win
cd "/shared/work" || exit
run="/shared/work/runs/first"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
cache=/tmp/ardtrain-$(id -un) # on a disk of each node: compiled ops and kernels do not belong on a shared home
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5
export GREETING='it'"'"'s a "day"'
export ARDTRAIN_EXPORT="NCCL_IB_HCA GREETING" # these go to the other hosts as well
module load cuda/12.8 || exit
source env.sh || exit
mkdir -p "$run/logs"
# ---- what the run says of itself: "STATE STEP" in $run/status, the newest checkpoint's name in $run/latest
read_state() {
  state=''
  read -r state _ 2>/dev/null <"$run/status" || true
}
read_latest() {
  latest=''
  read -r latest 2>/dev/null <"$run/latest" || true
}
read_latest
before=$latest
# The node file has a line a process; DeepSpeed wants a line a host, in the same order.
awk '!n[$1]++ {order[++hosts] = $1} END {for (i = 1; i <= hosts; i++) print order[i], "slots=" n[order[i]]}' \
  "$PBS_NODEFILE" >"$run/hostfile"
MASTER_ADDR=$(head -n1 "$PBS_NODEFILE")
number=${PBS_JOBID%%[!0-9]*}
export MASTER_ADDR MASTER_PORT=$((20000 + ${number:-0} % 20000))
if ! /shared/env/bin/python -u -m ardtrain doctor --quick --hosts "$run/hostfile" "$run/run.yaml"; then
  echo "the preflight failed, nothing was started; the finding is above"
  exit 1
fi
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
pid='' cancelled=''
trap 'cancelled=1; if [ -n "$pid" ]; then kill -TERM "$pid"; fi' TERM INT # qdel: save, end, and do not come again
/shared/env/bin/python -m ardtrain.launching.supervise "$run" -- \
  /shared/env/bin/deepspeed --hostfile "$run/hostfile" --num_nodes 2 \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_local_rank \
  PACKAGE/main.py train "$run/run.yaml" &
pid=$!
while :; do
  wait "$pid"
  rc=$?
  kill -0 "$pid" 2>/dev/null || break
done

# ---- again? By what the run wrote: `requeue` is its own stop before the walltime
read_state
read_latest
again=''
[ "$rc" = 0 ] && [ "$state" = requeue ] && again="it saved and stopped before the walltime"
[ "$rc" != 0 ] && [ "$state" = failed ] && [ "$latest" != "$before" ] && again="it failed after progress"
if [ -n "$again" ] && [ -z "$cancelled" ]; then
  starts=$(cat "$run/resubmitted" 2>/dev/null || echo 0)
  if [ "$starts" -ge 5 ]; then
    echo "not submitted again although $again: launcher.max_requeues=5 is reached"
  else
    echo $((starts + 1)) >"$run/resubmitted"
    echo "submitted again: $again"
    if ! qsub "/shared/work/runs/first/job.sh"; then
      echo "it could not be submitted from here; on a login node \`qsub /shared/work/runs/first/job.sh\` goes on with the run"
      rc=1
    fi
  fi
fi
exit "$rc"
