"""Whole small runs for tests: a model folder, data files and a config, and what a finished run says."""

import hashlib
import json

from safetensors.torch import load_file

from tests.tiny import save_tiny_llama


def write_run(folder, name="run", **settings):
    """Writes model (once), data and `NAME.yaml` into `folder`; returns the config's path. Settings are dotted names."""
    model = folder / "model"
    if not model.is_dir():
        save_tiny_llama(model)
        rows = [{"prompt": f"{a} + {b} = ", "completion": f"{a + b}."} for a in range(12) for b in range(12)]
        for part, chosen in (("train", rows[::2]), ("dev", rows[1::8])):
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    values = {
        "model_name_or_path": str(model),
        "output_dir": str(folder / name),
        "method": "elalora",
        "r": 4,
        "lora_dropout": 0.1,
        "elalora": {"init_warmup": 2, "final_warmup": 4, "mask_interval": 2, "b": 4, "k": 2},
        "data": {"train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "dev.jsonl")},
        "global_batch_size": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": "5e-3",
        "max_steps": 16,
        "eval_steps": 8,
        "logging_steps": 1,
        "max_length": 64,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({k: v for k, v in (values | settings).items() if v is not None}))  # JSON is YAML
    return path


def lines(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def fingerprint(run_dir):
    """Losses, held-out losses, rank tables and final weights of a finished run, to the bit."""
    metrics = lines(run_dir / "metrics.jsonl")
    last = run_dir / (run_dir / "latest").read_text().strip()
    return {
        "losses": {m["step"]: m["loss"].hex() for m in metrics if "loss" in m},
        "held_out": {m["step"]: m["eval_loss"].hex() for m in metrics if "eval_loss" in m},
        "tables": [m["digest"] for m in lines(run_dir / "ranks.jsonl")],
        "weights": state_digest(last),
        "adapter": hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


def state_digest(checkpoint):
    """sha256 over a checkpoint's tensors by name, however they are dealt over its files."""
    tensors = {}
    for path in sorted((checkpoint / "state").glob("*.safetensors")):
        tensors |= load_file(path)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
