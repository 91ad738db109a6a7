#!/bin/bash
# Trains on the hosts of /shared/work/hosts by mpirun (mpich). `bash /shared/work/runs/first/job.sh` starts it in the
# foreground; the same again goes on with the run. Ctrl-C or SIGTERM: save, then end.
# ---- variables of all processes; those that are set already win
cd "/shared/work" || exit
run="/shared/work/runs/first"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
cache=/tmp/ardtrain-$(id -un) # on a disk of each node: compiled ops and kernels do not belong on a shared home
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
mkdir -p "$run/logs"
export MASTER_ADDR=${MASTER_ADDR:-node1} MASTER_PORT=${MASTER_PORT:-25531}
hosts=(-f "$run/machinefile" -ppn 4) # mpich hands over the whole environment
sed -E 's/[[:space:]]*#.*//; /^[[:space:]]*$/d; s/[[:space:]]+slots=/:/' "/shared/work/hosts" >"$run/machinefile"
# The exit code is not mpirun's, which is 0 with some launchers when a process was killed: supervise reads the status.
exec /shared/env/bin/python -m ardtrain.launching.supervise "$run" -- \
  mpirun -np 8 "${hosts[@]}" -iface ib0 /shared/env/bin/python -u -m ardtrain train "$run/run.yaml"
