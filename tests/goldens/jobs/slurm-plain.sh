#!/bin/bash
# ---- edit here; then `sbatch /shared/work/runs/first/job.sh` submits it again, and the run goes on
#SBATCH --job-name=first
#SBATCH --time=24:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# ---- what requeueing needs: a signal ahead of the end, to this shell alone, and one log for all starts
#SBATCH --output=/shared/work/runs/first/logs/slurm-%j.out
#SBATCH --requeue --open-mode=append --signal=B:USR1@300

me=$SLURM_JOB_ID
# ---- variables of all processes; those that are set already win
cd "/shared/work" || exit
run="/shared/work/runs/first"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
cache=/tmp/ardtrain-$(id -un) # on a disk of each node: compiled ops and kernels do not belong on a shared home
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
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
begin_state() { # what an earlier start wrote must not be taken for this one's
  earlier='' step_then=0
  read -r earlier step_then 2>/dev/null <"$run/status" || true
  echo "starting 0" >"$run/status"
}
end_state() { # what nobody goes on with must not look alive
  local state='' step_now=0
  read -r state step_now 2>/dev/null <"$run/status" || true
  case "$state:$earlier" in
  starting:finished | starting:stopped) echo "$earlier $step_then" >"$run/status" ;;
  starting:*) echo "failed $step_then" >"$run/status" ;;
  started:*) echo "failed $step_now" >"$run/status" ;;
  esac
}
begin_state
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))


# ---- one process a task, and no launcher in between: signals reach them, and one that dies ends the step
pid='' signalled='' cancelled=''
trap 'signalled=1; if [ -n "$pid" ]; then kill -USR1 "$pid"; fi' USR1 # no $(...) in handlers: bash may break on it
trap 'cancelled=1' TERM
step() { # a trapped signal ends `wait` early, so it loops
  srun --kill-on-bad-exit=1 "$@" &
  pid=$!
  while :; do
    wait "$pid"
    rc=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  pid=''
}
preempted() { scontrol show job "$me" | grep -q 'PreemptTime=[0-9]'; } # of this start; a requeue clears it
step /shared/env/bin/python -u -m ardtrain train "$run/run.yaml"

# ---- again? By what the run wrote, never by the exit code alone: launchers change it
read_state
read_latest
again=''
if [ "$state" = requeue ]; then
  again="it saved and stopped on a signal"
elif [ "$rc" != 0 ] && [[ $state == start* ]] && { [ -n "$signalled" ] || preempted; }; then
  again="the signal came before training could save"
elif [ "$rc" != 0 ] && [ "$state" != finished ] && [ "$state" != stopped ] && [ "$latest" != "$before" ]; then
  again="it failed after progress"
fi
requeue() {
  for _ in 1 2 3 4 5; do # a busy controller may not answer at once
    case "$(squeue -h -j "$me" -o %T)" in COMPLETING | CANCELLED) return ;; esac # somebody has ended it
    echo "requeued: $again"
    scontrol requeue "$me" && sleep 60 && exit 0 # Slurm ends this script
    sleep 10
  done
  echo "it could not be requeued; \`sbatch /shared/work/runs/first/job.sh\` goes on with the run"
  rc=1
}
if [ -n "$again" ] && [ -z "$cancelled" ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ]; then
    echo "not requeued although $again: launcher.max_requeues=20 is reached"
  else
    requeue
  fi
fi
end_state
exit "$rc"
