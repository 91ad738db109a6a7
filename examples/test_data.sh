#!/usr/bin/env bash
# Trains one of the examples on the test data:
#
#   bash examples/test_data.sh e2e_nlg|instruct [--processes N] [a.b=c ...]
#
# ARDTRAIN_TEST_DATA names the folder of the data (default: shared/data in the checkout, else beside it); it holds
# e2e_nlg/, instruct/ and the tiny model stories260k_llama/. The run goes to runs/NAME in the checkout.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

mistake() {
  echo "test_data: $1" >&2
  exit 2
}

name=${1:-}
case $name in
  e2e_nlg | instruct) shift ;;
  *) mistake "which example? e2e_nlg or instruct, such as: bash examples/test_data.sh e2e_nlg" ;;
esac
processes=2
if [ "${1:-}" = --processes ]; then
  [ $# -ge 2 ] || mistake "--processes needs a value"
  processes=$2
  shift 2
fi
data=${ARDTRAIN_TEST_DATA:-}
if [ -z "$data" ]; then
  data=$checkout/shared/data
  [ -d "$data" ] || data=$checkout/../shared/data
fi
[ -d "$data/$name" ] || mistake "$data has no folder $name; set ARDTRAIN_TEST_DATA to the folder of the test data"
data=$(cd "$data" && pwd)

source "$checkout/examples/environment.sh"
ardtrain_environment "$checkout"
ardtrain_variables
if [ "${DS_ACCELERATOR:-}" = cpu ]; then ardtrain_build_ops ShareMemComm; fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::FutureWarning

run=$checkout/runs/$name
held_out=$data/$name/dev.jsonl
if [ "$name" = e2e_nlg ]; then
  "$ARDTRAIN_PYTHON" "$checkout/examples/first_reference.py" "$held_out" "$run/dev.jsonl"
  held_out=$run/dev.jsonl
fi
port=$("$ARDTRAIN_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
exec "$ARDTRAIN_VENV/bin/deepspeed" --num_gpus "$processes" --log_level error --master_port "$port" \
  "$checkout/ardtrain/main.py" train "$checkout/examples/$name.yaml" \
  "model_name_or_path=$data/stories260k_llama" "data.train_file=$data/$name/train.jsonl" "data.eval_file=$held_out" \
  "output_dir=$run" "$@" </dev/null
