"""What ZeRO-3 costs the host: processor seconds of a step beside ZeRO-0's, hooks around each module or each layer.

python -m benchmarks.zero_hooks [--shape 64x32 | --paligemma] [--blocks 7] [--out FILE]
torchrun --nproc-per-node 2 -m benchmarks.zero_hooks ...

LoRA on all linears of a Llama, or of both towers of a PaliGemma-2 (16 layers each, hidden 64; 16 image tokens before
the text), whose layers are small and many, so that little is left to compute; with and without
activation checkpointing; ZeRO-0, ZeRO-3 with hooks around every module (DeepSpeed's own way) and around whole layers
(ours: engines._gather_layers_whole). The variants take turns in blocks of steps. Seconds are the process's processor
time, which other programs on the machine do not count in; a GPU waits for just these unless its work takes longer.

`hooks`: over ZeRO-0's step, by the calls of fetch_sub_module and the weights that they walk, least squares over the
variants: what the plan's seconds take (planning/hardware.py). `planned`: what its constants, which are of a Llama, give
for these calls.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module

from ardtrain.adapters import attach
from ardtrain.backbones import enable_checkpointing
from ardtrain.data import IGNORE_INDEX
from ardtrain.engines import AdamSettings, BackboneEngine
from ardtrain.methods.lora import Lora
from ardtrain.planning.hardware import constant
from ardtrain.ranks import RankTable, named_seed
from ardtrain.resize import LiveArena
from ardtrain.targets import find_sites
from ardtrain.trainer import Trainer
from benchmarks.common import SHAPES, described, join_world, machine, parser, random_llama, summary, write
from benchmarks.resize import settings
from tests.tiny import TokenBatches, adapter_config, backbone_config
from tests.tiny_paligemma import IMAGE_ID, IMAGE_SIZE, NUM_IMAGE_TOKENS, tiny_paligemma

WAYS = ("zero0", "modules", "layers")
R = 8
PALIGEMMA = {"hidden": 64, "layers": 16, "vision_layers": 16, "vocab": 512}


class PictureBatches(TokenBatches):
    """Rows that begin with the tokens of a random picture."""

    def collate(self, grain):
        batch = super().collate(grain)
        generator = torch.Generator().manual_seed(named_seed("pictures", *grain))
        pixels = torch.rand(len(batch.input_ids), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        answers = (batch.labels != IGNORE_INDEX).long()
        return replace(batch, position_ids=batch.position_ids + 1, token_type_ids=answers, pixel_values=pixels)

    def _row(self, numbers):
        ((ids, mask),) = super()._row(numbers)
        image = np.full(NUM_IMAGE_TOKENS, IMAGE_ID, dtype=np.int32)
        text = np.maximum(ids, IMAGE_ID + 1)
        return [(np.concatenate([image, text]), np.concatenate([np.zeros(len(image), dtype=bool), mask]))]


def build(arguments, world, way, checkpointing):
    """The trainer of one variant."""
    pictures = arguments.paligemma
    model = tiny_paligemma(**PALIGEMMA) if pictures else random_llama(arguments.shape, dtype=torch.float32)
    if checkpointing:
        enable_checkpointing(model, offload=False, device=world.device)
    sites, ranks = find_sites(
        model, target_modules="all-linear", exclude_modules=None, r=R, lora_alpha=16.0, tower_settings={}
    )
    adapters = attach(model, sites, dropout={})
    stage = 0 if way == "zero0" else 3
    config = backbone_config(stage=stage, world_size=world.world_size)
    whole = mock.patch("ardtrain.engines.gathered_whole", lambda model: [])
    with whole if way == "modules" else nullcontext():
        backbone = BackboneEngine(model, stage=stage, config=config, device=world.device)
    method = Lora()
    arena = LiveArena(
        method, world=world, engine_config=adapter_config(world_size=world.world_size), adam=AdamSettings(), seed=0
    )
    arena.start(RankTable.start(sites, ranks))
    model.train()
    vocab = PALIGEMMA["vocab"] if pictures else SHAPES[arguments.shape][5]
    batches = PictureBatches if pictures else TokenBatches
    data = batches(num_grains=world.world_size, rows=1, length=arguments.length, vocab=vocab)
    return Trainer(settings(10**6, torch.float32), world, backbone, adapters, arena, method, data)


def counts(trainer):
    """Calls of fetch_sub_module in a step, and weights that they walk."""
    found = {"calls": 0, "weights": 0}
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(self, module, forward):
        found["calls"] += 1
        found["weights"] += sum(1 for _ in iter_params(module, recurse=z3_leaf_module(module)))
        return fetch(self, module, forward)

    with mock.patch.object(PartitionedParameterCoordinator, "fetch_sub_module", counted):
        trainer.train_step()
    return found


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="64x32")
    options.add_argument("--paligemma", action="store_true")
    options.add_argument("--length", type=int, default=16)
    options.add_argument("--blocks", type=int, default=7)
    options.add_argument("--steps", type=int, default=3, help="steps a block")
    arguments = options.parse_args()
    world = join_world()
    trainers = {(way, again): build(arguments, world, way, again) for again in (False, True) for way in WAYS}
    for trainer in trainers.values():
        for _ in range(3):  # traces of ZeRO-3, optimizer states
            trainer.train_step()
    calls = {variant: counts(t) if variant[0] != "zero0" else {} for variant, t in trainers.items()}
    seconds = {variant: [] for variant in trainers}
    for block in range(arguments.blocks):
        order = list(trainers)
        for variant in order[block % len(order) :] + order[: block % len(order)]:
            start = time.process_time()
            for _ in range(arguments.steps):
                trainers[variant].train_step()
            seconds[variant].append((time.process_time() - start) / arguments.steps)
    result = {
        "benchmark": "zero_hooks", "machine": machine(), "arguments": described(arguments),
        "processes": world.world_size,
        "layers": sum(PALIGEMMA[k] for k in ("layers", "vision_layers")) if arguments.paligemma
        else SHAPES[arguments.shape][1],
        "cpu_seconds_a_step": {name_of(variant): summary(values) for variant, values in seconds.items()},
        "calls_a_step": {name_of(variant): found for variant, found in calls.items() if found},
        "layers_over_modules": {
            name_of((None, again)): summary([a / b for a, b in zip(
                seconds["layers", again], seconds["modules", again], strict=True)]) for again in (False, True)
        },
        "hooks": fitted(seconds, calls),
    }  # fmt: skip
    if world.is_main:
        write(result, arguments.out)
    world.leave()


def name_of(variant):
    """A variant in the result's words."""
    way, again = variant
    return " ".join(word for word in (way, "checkpointing" if again else "kept") if word)


def fitted(seconds, calls):
    """Seconds of one call of fetch_sub_module with its release, and of one weight that they walk."""
    variants = [variant for variant, found in calls.items() if found]
    walked = np.array([[calls[v]["calls"], calls[v]["weights"]] for v in variants], float)
    over = np.array([np.median(seconds[v]) - np.median(seconds["zero0", v[1]]) for v in variants])
    planned = [constant("hook_call"), constant("hook_weight")]
    (call, weight), *_ = np.linalg.lstsq(walked, over, rcond=None)
    return {
        "seconds_a_call": call, "seconds_a_weight": weight,
        "over_zero0": {name_of(v): {"measured": a, "fitted": b, "planned": c} for v, a, b, c in zip(
            variants, over.tolist(), (walked @ [call, weight]).tolist(), (walked @ planned).tolist(), strict=True)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
