"""Peak host memory and seconds of `ardtrain merge`, beside those of loading the base whole and merging it with PEFT.

python -m benchmarks.merge_memory [--shape 4096x2] [--r 16] [--out FILE]

The base is random, in bf16, a file a layer. Each measurement is a process of its own, whose peak is its largest
resident memory, Python and libraries included (`idle`: they alone).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import described, llama_config, machine, parser, random_llama, write
from tests.runs import write_run
from tests.trained_runs import make_run

# Of this process's memory since exec; rusage's figure would begin with the parent's.
TAIL = "\nprint('PEAK', [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
MERGE = "import sys\nfrom ardtrain.cli import main\nassert main(['merge', sys.argv[1], '--out', sys.argv[2]]) == 0"
IDLE = "import ardtrain.merging"
PEFT = """import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')
merged = PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3])"""


def write_base(folder, shape):
    """A random Llama in bf16, a file a layer; the bytes of each file."""
    folder.mkdir()
    config = llama_config(shape)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    noise = torch.empty(1 << 22).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    files = {}
    for name, parameter in random_llama(shape, dtype=torch.bfloat16, device="meta").named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = tuple(parameter.shape)
    for file, shapes in files.items():
        tensors = {}
        for name, own in shapes.items():
            count = torch.Size(own).numel()
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].view(own).clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [(folder / file).stat().st_size for file in files]


def measured(code, *arguments):
    """Peak bytes and seconds of a process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code + TAIL, *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    peak = next(int(line.split()[1]) for line in out.stdout.splitlines() if line.startswith("PEAK "))
    return {"peak_mib": round(peak / 2**10), "seconds": round(time.perf_counter() - start, 1)}


def main():
    """The command line."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--shape", default="4096x2")
    arguments.add_argument("--r", type=int, default=16)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = write_base(folder / "model", given.shape)
        (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 24)
        data = {"train_file": str(folder / "train.jsonl")}
        config = write_run(folder, method="lora", elalora=None, r=given.r, data=data, eval_steps=None, bf16=True)
        run_dir = make_run(folder, config=config, ranks=lambda i: 1 + i % given.r, std=0.01)
        results = {"idle": measured(IDLE), "merge": measured(MERGE, run_dir, folder / "merged")}
        export = "import sys\nfrom ardtrain.cli import main\nmain(['export', *sys.argv[1:], '--without-base'])"
        measured(export, run_dir, "--out", folder / "adapter")
        results["peft"] = measured(PEFT, folder / "model", folder / "adapter", folder / "by_peft")
    largest = max(sizes)
    result = {
        "what": __doc__.splitlines()[0],
        **described(given),
        "base_mib": round(sum(sizes) / 2**20),
        "largest_file_mib": round(largest / 2**20),
        "limit_mib": round(largest / 2**20) + 1024,
        "within_limit": results["merge"]["peak_mib"] <= largest / 2**20 + 1024,
        "results": results,
        "machine": machine(),
    }
    write(result, given.out)


if __name__ == "__main__":
    main()
