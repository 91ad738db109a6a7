"""LoRA beside ElaLoRA on e2e_nlg with stories260k_llama: learning rate tuned for each, five seeds, held-out loss.

python -m benchmarks.compare --data DIR [--steps 200] [--jobs 2] [--out FILE]

DIR holds `e2e_nlg` and `stories260k_llama`. Both start at the same rank on the matrices of the feed-forward part;
ElaLoRA keeps the total rank and moves it. In this model a component of each of these matrices costs the same, 236
numbers, so equal total rank is equal parameters, at the end as at the start. Learning rates are tuned on one seed that is not among the five, by the held-out loss on the first
half of the development rows; figures are the loss on the second half.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.common import machine, parser, write

RATES = ("1e-3", "3e-3", "1e-2", "3e-2", "6e-2")
TARGETS = ("gate_proj", "up_proj", "down_proj")
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 0


def held_out_files(data, folder):
    """Two JSONL files with one line a reference: the development rows' first and second half."""
    rows = [json.loads(line) for line in (data / "e2e_nlg" / "dev.jsonl").read_text().splitlines()]
    for name, part in (("tune", rows[: len(rows) // 2]), ("test", rows[len(rows) // 2 :])):
        pairs = [{"mr": row["mr"], "ref": reference} for row in part for reference in row["refs"][:3]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))


def config(data, folder, steps, r):
    """The shared YAML; what differs comes as overrides."""
    block = {
        "init_warmup": steps // 10,
        "final_warmup": steps // 4,
        "mask_interval": max(2, steps // 40),
        "b": 4,
        "k": 2,
    }
    values = {
        "model_name_or_path": str(data / "stories260k_llama"), "output_dir": "unset", "method": "lora", "r": r,
        "target_modules": TARGETS,
        "data": {
            "train_file": str(data / "e2e_nlg" / "train.jsonl"), "prompt_template": "{mr}\n", "completion_field": "ref",
        },
        "max_length": 256, "global_batch_size": 16, "per_device_train_batch_size": 16, "max_steps": steps,
        "warmup_steps": steps // 20, "lr_scheduler_type": "linear", "logging_steps": steps,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    return path, block


def one(path, folder, block, method, rate, seed, part):
    """Held-out loss and trained numbers of one run."""
    out = folder / f"{method}-{rate}-{seed}"
    overrides = [f"output_dir={out}", f"method={method}", f"learning_rate={rate}", f"seed={seed}",
                 f"data.eval_file={folder / part}.jsonl"]  # fmt: skip
    if method == "elalora":
        overrides.append(f"elalora={json.dumps(block)}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARDTRAIN_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "ardtrain", "train", str(path), *overrides],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{out}: exit {done.returncode}\n{done.stderr[-3000:]}")
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    return {
        "loss": [m["eval_loss"] for m in losses if "eval_loss" in m][-1],
        "parameters": sum(t.numel() for t in adapter.values()),
        "seconds": next(m["elapsed_seconds"] for m in reversed(losses) if "elapsed_seconds" in m),
        "allocator_fraction": next(m["allocator_fraction"] for m in reversed(losses) if "allocator_fraction" in m),
    }


def main():
    """Tunes, runs five seeds of each, prints."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--r", type=int, default=4)
    options.add_argument("--jobs", type=int, default=2)
    arguments = options.parse_args()
    folder = Path(tempfile.mkdtemp())
    held_out_files(arguments.data, folder)
    path, block = config(arguments.data, folder, arguments.steps, arguments.r)
    result = {
        "benchmark": "compare",
        "machine": machine(),
        "steps": arguments.steps,
        "r": arguments.r,
        "target_modules": TARGETS,
        "elalora": block,
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:

        def submit(method, rate, seed, part):
            return pool.submit(one, path, folder, block, method, rate, seed, part)

        methods = ("lora", "elalora")
        tuning = {m: {rate: submit(m, rate, TUNING_SEED, "tune") for rate in RATES} for m in methods}
        result["tuning"] = {m: {rate: run.result()["loss"] for rate, run in runs.items()} for m, runs in tuning.items()}
        best = {m: min(losses, key=losses.get) for m, losses in result["tuning"].items()}
        runs = {m: [submit(m, best[m], seed, "test") for seed in SEEDS] for m in methods}
        for m in methods:
            figures = [run.result() for run in runs[m]]
            losses = [f["loss"] for f in figures]
            result[m] = {
                "learning_rate": best[m], "losses": losses, "mean": statistics.mean(losses),
                "standard_deviation": statistics.stdev(losses), "parameters": [f["parameters"] for f in figures],
                "allocator_fraction": [f["allocator_fraction"] for f in figures],
            }  # fmt: skip
    pairs = [b - a for a, b in zip(result["lora"]["losses"], result["elalora"]["losses"], strict=True)]
    result["elalora_minus_lora"] = {"mean": statistics.mean(pairs), "standard_deviation": statistics.stdev(pairs)}
    write(result, arguments.out)


if __name__ == "__main__":
    main()
