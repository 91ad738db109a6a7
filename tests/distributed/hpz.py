"""ZeRO++'s second copy of the base in each node (hpZ): the same steps with and without it; process 0 writes JSON.

python -m tests.distributed.hpz OUT.json

Nodes are pairs of processes.
"""

import json
import os
import sys
from pathlib import Path

import torch

from ardtrain.collectives import World
from ardtrain.engines import start_deepspeed
from tests.tiny import CPU, adapter_config, backbone_config, elalora, tiny_llama, tiny_trainer, weights_digest

STEPS = 8
NODE = 2


def run(world, **zero):
    """Losses and digests of some steps with resizes; has every weight a second copy?"""
    trainer = tiny_trainer(
        elalora(init_warmup=0, mask_interval=2, newborn_immunity=False), world=world, model=tiny_llama(),
        backbone=backbone_config(stage=3, world_size=world.world_size, **zero),
        adapter=adapter_config(world_size=world.world_size),
    )  # fmt: skip
    losses, events = [], 0
    for _ in range(STEPS):
        step = trainer.train_step()
        losses.append(step.loss.hex())
        events += step.record is not None
    result = {
        "losses": losses, "events": events, "table": trainer.arena.table.digest,
        "weights": weights_digest(trainer.arena.capture()),
        "second_copies": sorted({p.ds_secondary_tensor is not None for p in trainer.backbone.module.parameters()}),
    }  # fmt: skip
    trainer.arena.engine.destroy()
    trainer.backbone.destroy()
    return result


def main():
    """Runs both and writes what process 0 saw; all processes agree on it."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    world = World.join(global_rank=rank, world_size=size, device=CPU, timeout_seconds=120)
    start_deepspeed(CPU)
    result = {"without": run(world), "with": run(world, zero_hpz_partition_size=NODE)}
    world.agree("result", json.dumps(result), step=STEPS)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(result))
    world.leave()


if __name__ == "__main__":
    main()
