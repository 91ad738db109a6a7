# Makes what a run needs, and makes it once: the virtual environment, and DeepSpeed's compiled ops. To be sourced.
#
#   source examples/environment.sh
#   ardtrain_environment "$checkout" [EXTRA]   the environment, with the extra (test) if named; sets $ARDTRAIN_PYTHON
#   ardtrain_variables                         thread count, accelerator, folder of the compiled ops
#   ardtrain_libaio                            Debian's libaio-dev, for parameter offload to NVMe (root only)
#   ardtrain_cluster                           Debian's ssh, pdsh and Slurm, for tests on several hosts (root only)
#   ardtrain_mpich                             a second MPI, from PyPI, for those tests
#   ardtrain_browser                           Debian's Chromium, in which a test looks at reports (root only)
#   ardtrain_build_ops OP...                   compiles ahead, two at a time: ShareMemComm (processes that meet on a
#                                              CPU), AsyncIO (offload to NVMe), CPUAdam (its optimizer kernel)
#
# ARDTRAIN_VENV (default: .venv in the checkout) and TORCH_EXTENSIONS_DIR (default: torch_extensions inside the
# environment; on a disk of this machine) say where. A second call finds all by a hash of what it was made from.

ardtrain_stage() { # NAME COMMAND...: runs it and prints its seconds
  local name=$1 start=$SECONDS
  shift
  "$@"
  printf '[%s] %d s\n' "$name" $((SECONDS - start))
}

_ardtrain_lock() { # a second caller waits for the first
  if command -v flock >/dev/null; then flock "$1"; fi
}

ardtrain_environment() {
  local checkout=$1 extra=${2:-} key
  ARDTRAIN_VENV=${ARDTRAIN_VENV:-$checkout/.venv}
  ARDTRAIN_PYTHON=$ARDTRAIN_VENV/bin/python
  ARDTRAIN_CHECKOUT=$checkout
  mkdir -p "$(dirname "$ARDTRAIN_VENV")"
  exec 9>"$ARDTRAIN_VENV.lock"
  _ardtrain_lock 9
  key=$(cat "$checkout/pyproject.toml" "$checkout/constraints.txt" <(echo "$checkout") | sha256sum | cut -c1-32)
  # The environment with an extra serves those who want none.
  if ! grep -qsx "$key ${extra:-.*}" "$ARDTRAIN_VENV/ardtrain-stamp"; then
    ardtrain_stage "virtual environment" _ardtrain_venv
    ardtrain_stage "install torch" _ardtrain_pip torch
    ardtrain_stage "install ardtrain${extra:+ with extra $extra}" _ardtrain_pip -e "$checkout${extra:+[$extra]}"
    echo "$key $extra" >"$ARDTRAIN_VENV/ardtrain-stamp"
  fi
  exec 9>&-
  export PATH="$ARDTRAIN_VENV/bin:$PATH" # ninja, for ops that are compiled at first use
}

_ardtrain_venv() {
  [ -x "$ARDTRAIN_PYTHON" ] && return
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]} is too old: 3.11 or newer; set PYTHON to one")'
  "$python" -m venv "$ARDTRAIN_VENV"
}

_ardtrain_pip() {
  "$ARDTRAIN_PYTHON" -m pip install -qq --no-input --disable-pip-version-check \
    -c "$ARDTRAIN_CHECKOUT/constraints.txt" "$@" </dev/null
}

_ardtrain_has_gpu() { [ -e /dev/nvidiactl ] || [ -e /dev/nvidia0 ] || [ -e /dev/kfd ]; }

ardtrain_variables() { # after ardtrain_environment
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # float sums on the CPU differ with the number of threads
  # Not shared by environments: the compile commands carry their paths, so each would undo the other's.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$ARDTRAIN_VENV/torch_extensions}
  if ! _ardtrain_has_gpu; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}; fi
}

_ardtrain_has_libaio() { echo '#include <libaio.h>' | ${CXX:-c++} -E -x c++ - >/dev/null 2>&1; }

ardtrain_libaio() {
  _ardtrain_has_libaio && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    ardtrain_stage "install libaio-dev" _ardtrain_apt libaio-dev || true
  fi
  _ardtrain_has_libaio || echo "note: libaio's header is missing (Debian: libaio-dev); offload to NVMe is not tested"
}

ardtrain_cluster() {
  local packages="iproute2 openssh-server pdsh munge slurmctld slurmd slurm-client libpmix2 slurm-wlm-torque shellcheck"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v slurmctld && command -v pdsh; } >/dev/null; then
    # shellcheck disable=SC2086 # names of packages, one by one
    ardtrain_stage "install ssh, pdsh and Slurm" _ardtrain_apt $packages || true
  fi
  command -v slurmctld >/dev/null || echo "note: Slurm or pdsh is missing; runs on several hosts are not tested"
}

ardtrain_mpich() { # after ardtrain_environment; two MPIs in one environment would share the name mpirun
  if [ ! -x "$ARDTRAIN_VENV/mpich/bin/mpirun" ]; then
    ardtrain_stage "install MPICH" _ardtrain_pip --target "$ARDTRAIN_VENV/mpich" mpich
  fi
}

ardtrain_browser() {
  command -v chromium chromium-browser google-chrome >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    ardtrain_stage "install Chromium" _ardtrain_apt chromium fonts-dejavu-core || true
  fi
  command -v chromium >/dev/null || echo "note: no Chromium; reports are not looked at in a browser"
}

_ardtrain_apt() {
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"; } \
    </dev/null >/dev/null
}

ardtrain_build_ops() {
  local key op wanted=()
  mkdir -p "$TORCH_EXTENSIONS_DIR"
  exec 9>"$TORCH_EXTENSIONS_DIR/.ardtrain-lock"
  _ardtrain_lock 9
  # Ops are compiled for this processor, these versions, this environment's path, the libraries that are there.
  key=$({
    cut -d' ' -f1 "$ARDTRAIN_VENV/ardtrain-stamp"
    echo "$ARDTRAIN_VENV ${DS_ACCELERATOR:-}"
    uname -m
    grep -m1 '^flags' /proc/cpuinfo || true
    if _ardtrain_has_libaio; then echo libaio; fi
  } | sha256sum | cut -c1-32)
  for op in "$@"; do
    if [ "$(cat "$TORCH_EXTENSIONS_DIR/.ardtrain-$op" 2>/dev/null)" != "$key" ]; then wanted+=("$op"); fi
  done
  if [ ${#wanted[@]} -gt 0 ]; then
    ardtrain_stage "compile DeepSpeed's ops" _ardtrain_compile "$key" "${wanted[@]}"
  fi
  exec 9>&-
}

# Ahead, so that processes of a run do not wait for each other's compile. An op that cannot be built is named;
# what needs it says so itself, and the next call tries again.
_ardtrain_compile() {
  "$ARDTRAIN_PYTHON" - "$@" 9>&- <<'PY'
import contextlib, glob, io, multiprocessing, os, pathlib, sys, time
from concurrent.futures import ProcessPoolExecutor

# A killed compile leaves a `lock` file, and the next one would wait for it for ever, in silence. Its maker holds
# it open; what no process holds open is stale.
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"])
held = set()
for link in glob.glob("/proc/[0-9]*/fd/*"):
    with contextlib.suppress(OSError):
        held.add(os.readlink(link))
for lock in folder.glob("**/lock"):
    if str(lock.resolve()) not in held:
        print(f"removed a stale lock: {lock}")
        lock.unlink(missing_ok=True)

from deepspeed.accelerator import get_accelerator

key, *names = sys.argv[1:]


def build(name):
    start = time.monotonic()
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            builder = get_accelerator().create_op_builder(f"{name}Builder")
            if builder is None or not builder.is_compatible(verbose=False):
                result = "not available here"
            else:
                builder.load(verbose=False)
                result = "ready"
        (folder / f".ardtrain-{name}").write_text(key)
    except Exception as error:
        result = f"failed: {str(error).strip().splitlines()[-1] if str(error).strip() else error!r}"
    return f"  {name}: {result}, {time.monotonic() - start:.0f} s"


# The most of an op is one file, which keeps one core busy.
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
    for line in pool.map(build, names):
        print(line, flush=True)
PY
}
