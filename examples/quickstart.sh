#!/usr/bin/env bash
# From a fresh clone to two trained adapters, without questions:
#
#   bash examples/quickstart.sh [--processes N]
#       offline: pre-trains a small Llama on Python's own documentation for about a minute, then adapts it to the
#       standard library's source code with LoRA and with ElaLoRA, under ZeRO-3 on two processes (or the GPUs here)
#   bash examples/quickstart.sh --model HUB_ID --data FILE [--eval FILE] [--processes N] [-- a.b=c ...]
#       the same two runs for a model of the hub (or a folder) and your JSONL or text; overrides of settings after --,
#       such as 'data.prompt_template="{question}\n"' data.completion_field=answer
#
# Everything is written to runs/quickstart in the checkout (runs/quickstart/own with --model). It may be run again:
# what is there already (environment, compiled op, base model) is used again, the adapters are trained anew.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$checkout/examples/quickstart
runs=$checkout/runs/quickstart

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
mistake() {
  echo "quickstart: $1" >&2
  exit 2
}
absolute() { # FILE: its path from any folder; it must exist
  [ -f "$1" ] || mistake "$1 is no file; correct the path"
  echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"
}

model="" data="" held_out="" processes="" overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    --model | --data | --eval | --processes)
      [ $# -ge 2 ] || mistake "$1 needs a value"
      case $1 in
        --model) model=$2 ;;
        --data) data=$(absolute "$2") ;;
        --eval) held_out=$(absolute "$2") ;;
        --processes) processes=$2 ;;
      esac
      shift 2
      ;;
    --)
      shift
      overrides=("$@")
      break
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) mistake "$1 is unknown; bash examples/quickstart.sh --help lists what is known" ;;
  esac
done
case $processes in *[!0-9]* | 0*) mistake "--processes=$processes must be a whole number above 0" ;; esac
if { [ -n "$model" ] && [ -z "$data" ]; } || { [ -z "$model" ] && [ -n "$data$held_out" ]; }; then
  mistake "--model and --data belong together (--eval goes with them)"
fi
if [ -d "$model" ]; then model=$(cd "$model" && pwd); fi

# The environment and the one-time compile; their own seconds are printed by them.
source "$checkout/examples/environment.sh"
start=$SECONDS
ardtrain_environment "$checkout"
ardtrain_variables
if [ "${DS_ACCELERATOR:-}" = cpu ]; then ardtrain_build_ops ShareMemComm; fi
printf '[environment and compiled op, made once] %d s\n' $((SECONDS - start))
start=$SECONDS

# Quieter: other projects' announcements of what they will rename.
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::FutureWarning
if [ -z "$processes" ]; then
  processes=2
  if [ "${DS_ACCELERATOR:-}" != cpu ]; then
    processes=$("$ARDTRAIN_PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
  fi
fi

free_port() { "$ARDTRAIN_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

train() { # NAME a.b=c...: one run into runs/quickstart/NAME
  local name=$1
  shift
  local given own=()
  for given in ${overrides[@]+"${overrides[@]}"}; do # settings of ElaLoRA's block are for ElaLoRA's run
    if [ "$name" = elalora ] || [[ $given != elalora.* ]]; then own+=("$given"); fi
  done
  rm -rf "${runs:?}/$name"
  "$ARDTRAIN_VENV/bin/deepspeed" --num_gpus "$processes" --log_level error --master_port "$(free_port)" \
    "$checkout/ardtrain/main.py" train "$checkout/examples/quickstart.yaml" \
    output_dir="$runs/$name" "${settings[@]}" "$@" ${own[@]+"${own[@]}"} </dev/null
}

pretrain() { # into a folder of another name first, so that base/ is whole or absent
  rm -rf "$runs/base" "$runs/base.tmp"
  "$ARDTRAIN_PYTHON" "$here/pretrain.py" "$runs/docs.jsonl" "$runs/base.tmp" </dev/null
  echo "$made_from" >"$runs/base.tmp/made_from"
  mv "$runs/base.tmp" "$runs/base"
}

if [ -n "$model" ]; then runs=$runs/own; fi
mkdir -p "$runs"
cd "$checkout"
if [ -z "$model" ]; then
  export HF_HUB_OFFLINE=1
  model=$runs/base data=$runs/code.jsonl held_out=$runs/held_out.jsonl settings=()
  made_from=$(cat "$here/collect.py" "$here/pretrain.py" <("$ARDTRAIN_PYTHON" -V) | sha256sum | cut -c1-32)
  if [ "$(cat "$runs/base/made_from" 2>/dev/null)" = "$made_from" ] && [ -f "$data" ] && [ -f "$held_out" ]; then
    echo "base model and text: as made before, in $runs"
  else
    ardtrain_stage "collect text" "$ARDTRAIN_PYTHON" "$here/collect.py" "$runs" </dev/null
    ardtrain_stage "pre-train a small Llama" pretrain
  fi
  lora=(learning_rate=1.5e-2)
else
  if [ -z "$held_out" ]; then
    parts=$("$ARDTRAIN_PYTHON" "$here/hold_out.py" "$data" "$runs")
    { read -r data && read -r held_out; } <<<"$parts"
  fi
  settings=(target_modules=all-linear max_length=512 learning_rate=5.0e-4)
  if [ "${DS_ACCELERATOR:-}" != cpu ]; then settings+=(bf16=true); fi
  lora=(learning_rate=2.0e-4)
fi
settings+=("model_name_or_path=$model" "data.train_file=$data" "data.eval_file=$held_out")

ardtrain_stage "LoRA, $processes processes, ZeRO-3" train lora method=lora elalora=null "${lora[@]}"
ardtrain_stage "ElaLoRA, $processes processes, ZeRO-3" train elalora

echo
"$ARDTRAIN_PYTHON" "$here/table.py" "$runs/lora" "$runs/elalora"
printf '[all but environment and compile] %d s\n' $((SECONDS - start))
echo "ranks:   $runs/elalora/ranks.png"
echo "adapter: $runs/elalora/adapter"
