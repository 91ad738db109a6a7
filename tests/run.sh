#!/usr/bin/env bash
# Makes the environment if need be, compiles DeepSpeed's ops ahead, and runs pytest with the arguments given.
# With none: everything but the tests marked `full`. `bash tests/run.sh tests/unit` is the quick round.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$checkout/examples/environment.sh"
cd "$checkout"
# Debian's packages come while pip works, and the ops compile while pip fetches the last one.
{ ardtrain_libaio && ardtrain_cluster && ardtrain_browser; } &
packages=$!
ardtrain_environment "$checkout" test
ardtrain_variables
wait "$packages"
ardtrain_build_ops ShareMemComm AsyncIO CPUAdam &
ops=$!
ardtrain_mpich
wait "$ops"
# Two workers, for two cores; tests/conftest.py says who takes what. `-n 0` after it: one process.
exec "$ARDTRAIN_PYTHON" -m pytest -n 2 "$@" </dev/null
