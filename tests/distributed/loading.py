"""Loads models on several processes and says what each has read and got; started by test_loading.py.

python -m tests.distributed.loading CASES.json OUT_FOLDER
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from ardtrain.backbones import ModelSource
from ardtrain.collectives import World
from ardtrain.engines import BackboneEngine, start_deepspeed
from ardtrain.opening import open_model
from tests.tiny import CPU, backbone_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def digest(model, whole):
    """Of all parameters, buffers and logits, each with its name and type."""
    found = hashlib.sha256()

    def add(name, tensor):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    for name, parameter in model.named_parameters():
        with whole(parameter):
            add(name, parameter)
    for name, buffer in model.named_buffers():
        add(name, buffer)
    with torch.no_grad():
        add("logits", model(input_ids=torch.arange(3, 27).view(2, 12)).logits)
    return found.hexdigest()


def load(case, world):
    """One model under ZeRO-3; what this process has read, and the digest."""
    compute, offload = case["compute"], case.get("offload")
    opened = open_model(ModelSource(case["folder"]), compute_dtype=compute)
    headers = opened.shards.bytes_read
    zero = {} if offload is None else {"offload_param": offload}
    config = backbone_config(stage=3, dtype=DTYPES[compute], world_size=world.world_size, **zero)
    engine = BackboneEngine(opened.model, stage=3, config=config, device=CPU, weights=opened.weights)
    result = {
        "headers": headers,
        "read": opened.shards.bytes_read - headers,
        "stored": opened.shards.nbytes,
        "parameters": sum(1 for _ in opened.model.parameters()),
        "swapped": sum(p.ds_tensor.final_location is not None for p in opened.model.parameters()),
        "digest": digest(opened.model, engine.whole),
    }
    engine.destroy()
    return result


def main(cases_path, out_folder):
    torch.set_num_threads(1)
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World.join(global_rank=number, world_size=size, device=CPU, timeout_seconds=120)
    start_deepspeed(CPU)
    results = {name: load(case, world) for name, case in json.loads(Path(cases_path).read_text()).items()}
    (Path(out_folder) / f"{size}-{number}.json").write_text(json.dumps(results))
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
