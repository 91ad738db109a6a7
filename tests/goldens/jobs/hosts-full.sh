#!/bin/bash
# Trains on the hosts of /shared/work/hosts over ssh (DeepSpeed's pdsh launcher). `bash /shared/work/runs/first/job.sh` starts it in
# the foreground; the same again goes on with the run. Ctrl-C or SIGTERM: save, then end.
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
export MASTER_ADDR=${MASTER_ADDR:-node1} MASTER_PORT=${MASTER_PORT:-25531}
if ! /shared/env/bin/python -u -m ardtrain doctor --quick --hosts "/shared/work/hosts" "$run/run.yaml"; then
  echo "the preflight failed, nothing was started; the finding is above"
  exit 1
fi
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
# Address and port are named: DeepSpeed would take the first word of `hostname -I`, and one port for all jobs.
exec /shared/env/bin/python -m ardtrain.launching.supervise "$run" -- \
  /shared/env/bin/deepspeed --hostfile "/shared/work/hosts" --num_nodes 2 \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_local_rank \
  PACKAGE/main.py train "$run/run.yaml"
