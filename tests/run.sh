#!/usr/bin/env bash
# Makes the environment if need be, compiles DeepSpeed's ops ahead, and runs pytest with the arguments given.
# With none: everything but the tests marked `full`. `bash tests/run.sh tests/unit` is the quick round.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$checkout/examples/environment.sh"
cd "$checkout"
ardtrain_environment "$checkout" test
ardtrain_variables
ardtrain_libaio
ardtrain_cluster
ardtrain_browser
ardtrain_build_ops ShareMemComm AsyncIO CPUAdam
exec "$ARDTRAIN_PYTHON" -m pytest "$@" </dev/null
