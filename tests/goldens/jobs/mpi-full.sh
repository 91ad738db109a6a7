#!/bin/bash
# Trains on the hosts of /shared/work/hosts by mpirun (openmpi). `bash /shared/work/runs/first/job.sh` starts it in the
# foreground; the same again goes on with the run. Ctrl-C or SIGTERM: save, then end.
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
exports=() # mpirun hands over what it is told to
names='^(NCCL|GLOO|TORCH|TRITON|HF|TRANSFORMERS|DS|DEEPSPEED|OMP|MKL|CUDA_HOME|CUDA_DEVICE|UCX|FI|PYTHON|ARDTRAIN|WANDB|MASTER)|^(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX)$'
for name in $(compgen -e | grep -E "$names") NCCL_IB_HCA GREETING; do exports+=(-x "$name"); done
hosts=(--hostfile "/shared/work/hosts" --map-by ppr:4:node "${exports[@]}")
one_each=(--hostfile "/shared/work/hosts" --map-by ppr:1:node "${exports[@]}")
if ! mpirun -np 2 "${one_each[@]}" apptainer exec --nv image.sif /shared/env/bin/python -u -m ardtrain doctor --meet --quick --run "$run" --config "$run/run.yaml"; then
  echo "the preflight failed, nothing was started; the finding is above"
  exit 1
fi
# The exit code is not mpirun's, which is 0 with some launchers when a process was killed: supervise reads the status.
exec PYTHON -m ardtrain.launching.supervise "$run" -- \
  mpirun -np 8 "${hosts[@]}" apptainer exec --nv image.sif /shared/env/bin/python -u -m ardtrain train "$run/run.yaml"
