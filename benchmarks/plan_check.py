"""What `ardtrain plan` says a process holds, beside what real steps of the same runs hold.

python -m benchmarks.plan_check [--case NAME ...] [--out FILE]
torchrun --nproc-per-node 2 -m benchmarks.plan_check ...

`runs` are the cases that the plan's memory was made with, `unseen` those that it was not. Each is a run's config; the
trainer is built from it as a run builds it, over a random Llama, and takes four steps of full rows. On a CPU every
allocation of tensors is recorded by torch's profiler: `static` is live before the last step, `peak` the most while it
lasts, both over the process (device and host are one there). Several processes free
their gathers' buffers on gloo's threads, where the profiler sees nothing; there storages are counted by their lifetime
(common.LiveBytes), without what a kernel takes and gives back inside. On a GPU `peak` is
torch.cuda.max_memory_allocated, and the step's seconds stand beside the plan's. What the plan has for
saves and resizes is left out: no case saves, and no measured step resizes.
"""

import gc
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM

from ardtrain.adapters import attach, first_dense
from ardtrain.backbones import DTYPES, enable_checkpointing, quantize_base
from ardtrain.config import RunConfig, with_batch
from ardtrain.deepspeed_config import split_deepspeed, with_deepspeed
from ardtrain.engines import AdamSettings, BackboneEngine
from ardtrain.evaluation import loss_sum
from ardtrain.logits import find_logit_head
from ardtrain.planning.hardware import Machine, find_gpu
from ardtrain.planning.memory import memory, placement
from ardtrain.planning.shapes import read_shapes
from ardtrain.preflight import adapter_form
from ardtrain.resize import LiveArena
from ardtrain.trainer import Trainer
from benchmarks.common import LiveBytes, join_world, machine, parser, random_llama, timed, write
from benchmarks.resize import settings
from tests.tiny import TokenBatches

GRAINS, STEPS = 2, 3
ELALORA = {"method": "elalora", "elalora": {"init_warmup": 10, "final_warmup": 10, "mask_interval": 5}}
ADALORA = {"method": "adalora", "adalora": {"target_r": 4, "tinit": 10, "tfinal": 10}}
OFFLOAD = {"device": "cpu", "pin_memory": False}


def zero(stage, **more):
    """The `deepspeed` setting."""
    return {"zero_optimization": {"stage": stage, **more}}


CASES = {
    # name: (shape, rows, tokens of a row, changes of the config)
    "256x8 lora zero0": ("256x8", 1, 512, {}),
    "256x8 lora zero0 logits whole": ("256x8", 1, 512, {"loss_chunk_tokens": None}),
    "256x8 lora zero0 rows padded": ("256x8", 3, 256, {}),
    "256x8 lora zero0 checkpointing": ("256x8", 2, 512, {"gradient_checkpointing": True}),
    "256x8 lora int8 zero0": ("256x8", 1, 256, {"quantization": "int8"}),
    "256x8 elalora r64 zero0": ("256x8", 1, 128, {**ELALORA, "r": 64}),
    "256x8 adalora zero3": ("256x8", 1, 256, {**ADALORA, "deepspeed": zero(3)}),
    "256x8 dora zero3": ("256x8", 1, 256, {"method": "dora", "deepspeed": zero(3)}),
    "256x8 ard_lora zero3": ("256x8", 1, 256, {"method": "ard_lora", "deepspeed": zero(3)}),
    "768x4 lora bf16 zero0": ("768x4", 1, 512, {"bf16": True}),
    "768x4 lora bf16 zero3": ("768x4", 1, 256, {"bf16": True, "deepspeed": zero(3)}),
    "768x4 elalora bf16 zero3 checkpointing": (
        "768x4", 1, 512, {**ELALORA, "bf16": True, "gradient_checkpointing": True, "deepspeed": zero(3)}),
    "768x4 elalora bf16 zero3 released": (
        "768x4", 1, 256, {**ELALORA, "bf16": True, "gradient_checkpointing": True, "deepspeed": zero(
            3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0, stage3_param_persistence_threshold=0)}),
    "768x4 lora bf16 zero3 offload": (
        "768x4", 1, 256, {"bf16": True, "deepspeed": zero(
            3, offload_param=OFFLOAD, offload_optimizer={"device": "cpu"}, stage3_max_reuse_distance=0)}),
    "768x4 lora r256 bf16 zero3 offload": (
        "768x4", 1, 128, {"bf16": True, "r": 256, "deepspeed": zero(
            3, offload_param=OFFLOAD, offload_optimizer={"device": "cpu"})}),
}  # fmt: skip

# The model of memory was made and mended by the cases above. None of these had run before it was; shapes, ranks,
# lengths, rows, nf4, ALoRA and shared heads are in no case above.
UNSEEN = {
    "320x6 lora r24 zero0": ("320x6", 2, 192, {"r": 24}),
    "320x6 adalora r12 bf16 zero3 checkpointing": (
        "320x6", 3, 320, {**ADALORA, "r": 12, "bf16": True, "gradient_checkpointing": True, "deepspeed": zero(3)}),
    "640x3 alora r20 bf16 zero3": (
        "640x3", 1, 384, {"method": "alora", "alora": {"k1_steps": 50}, "r": 20, "bf16": True, "deepspeed": zero(3),
                          "data": {"train_file": "none.jsonl", "eval_file": "none.jsonl"}}),
    "640x3 dora r5 bf16 zero3 offload": (
        "640x3", 2, 160, {"method": "dora", "r": 5, "bf16": True, "deepspeed": zero(3, offload_param=OFFLOAD)}),
    "448x10 ard_lora shared_a r16 bf16 zero3 checkpointing": (
        "448x10", 2, 224, {"method": "ard_lora", "ard_lora": {"layout": "shared_a"}, "r": 16, "bf16": True,
                           "gradient_checkpointing": True, "deepspeed": zero(3)}),
    "448x10 lora r32 nf4 bf16 zero0": ("448x10", 4, 96, {"r": 32, "bf16": True, "quantization": "nf4"}),
}  # fmt: skip


class FullRows(TokenBatches):
    """Rows of the full length; with more than one, all but the first a token shorter, so that they are padded."""

    def collate(self, grain):
        self.row = 0
        return super().collate(grain)

    def _row(self, numbers):
        length = self.length - (self.row > 0)
        self.row += 1
        ids = numbers.integers(4, self.vocab, size=length).astype(np.int32)
        return [(ids, np.ones(length, dtype=bool))]


def config_of(case, folder, world_size):
    """The case's RunConfig; its model is a folder with config.json alone."""
    shape, rows, length, changes = (CASES | UNSEEN)[case]
    random_llama(shape, dtype=torch.float32, device="meta").config.save_pretrained(folder)
    values = {
        "model_name_or_path": str(folder), "method": "lora", "r": 8, "data": {"train_file": "none.jsonl"},
        "output_dir": "runs/none", "max_steps": 100, "max_length": length, "per_device_train_batch_size": rows,
        "global_batch_size": rows * GRAINS, **changes,
    }  # fmt: skip
    return with_batch(with_deepspeed(RunConfig.model_validate(values)), world_size)


def build(config, shapes, plan, world, model=None):
    """The trainer as adapter_run builds it, over a random model, or over this one."""
    dtype = DTYPES[plan.compute_dtype]
    if model is None:
        model = AutoModelForCausalLM.from_config(shapes.model.config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    if config.quantization is not None:
        quantize_base(model, config.quantization)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        enable_checkpointing(model, offload=config.activation_offload, device=world.device)
    adapters = attach(model, shapes.shape.table.sites, dropout={}, form=adapter_form(config), heads=shapes.shape.heads)
    dense = first_dense(adapters)
    engine = BackboneEngine(model, stage=plan.backbone_stage, config=plan.backbone, device=world.device)
    arena = LiveArena(
        shapes.method, world=world, engine_config=plan.adapter, adam=AdamSettings(), seed=0, dense=shapes.shape.dense
    )
    arena.start(shapes.shape.table, dense, {})
    model.train()
    head = None
    if config.loss_chunk_tokens is not None:
        head = find_logit_head(engine.module, chunk_tokens=config.loss_chunk_tokens, device=world.device)
        engine.release()
    data = FullRows(
        num_grains=config.num_grains, rows=config.per_device_train_batch_size, length=config.max_length,
        vocab=shapes.vocabulary,
    )  # fmt: skip
    trainer = Trainer(settings(100, dtype), world, engine, adapters, arena, shapes.method, data)
    trainer.loss_sum = partial(loss_sum, logit_head=head)
    return trainer


def planned(config, shapes, plan, world):
    """Static and peak bytes of the plan, and the peak by cause."""
    gpu = find_gpu("h100" if world.device.type == "cuda" else "cpu")
    found = memory(
        shapes, Machine(gpu, 1, world.world_size), placement(plan),
        rows=config.per_device_train_batch_size, length=config.max_length,
    )  # fmt: skip
    host = {c: b for c, b in found.host.items() if c not in ("snapshot for a save", "new moments of a resize")}
    # BackboneEngine.release frees small weights too; the next grain gathers them with the first that need them.
    moving = {
        "small weights kept whole",
        "activations",
        "adapter activations",
        "logits and loss",
        "gathered layers",
        "exact sum (int64)",
    }
    static = {c: b for c, b in found.device["forward"].items() if c not in moving}
    totals = {phase: sum(causes.values()) for phase, causes in found.device.items() if phase != "resize"}
    phase = max(totals, key=totals.get)
    return {
        "static": sum(static.values()) + sum(host.values()),
        "peak": totals[phase] + sum(host.values()),
        "phase": phase, "by_cause": {**found.device[phase], **{f"host: {c}": b for c, b in host.items()}},
    }  # fmt: skip


def measured(config, shapes, plan, world):
    """Static and peak bytes of real steps."""
    gc.collect()
    if world.device.type == "cuda":
        trainer = build(config, shapes, plan, world)
        for _ in range(STEPS - 1):
            trainer.train_step()
        torch.cuda.reset_peak_memory_stats()
        static = torch.cuda.memory_allocated()
        seconds = min(timed(trainer.train_step, world.device) for _ in range(3))
        return {"static": static, "peak": torch.cuda.max_memory_allocated(), "step_seconds": seconds}
    if world.world_size > 1:
        with LiveBytes() as tally:
            trainer = build(config, shapes, plan, world)
            for _ in range(STEPS - 1):
                trainer.train_step()
            gc.collect()  # what is garbage is no matter of chance
            static = tally.peak = tally.live
            trainer.train_step()
        ended(trainer)
        return {"static": static, "peak": tally.peak}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer = build(config, shapes, plan, world)
        for _ in range(STEPS - 1):
            trainer.train_step()
        gc.collect()
        with record_function("measured step"):
            trainer.train_step()
    events = profiled.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == "measured step")
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = np.cumsum([size for _, size in changes])
    before = sum(t < start for t, _ in changes)
    ended(trainer)
    return {"static": int(live[before - 1]), "peak": int(live[before:].max())}


def ended(trainer):
    """Its engines are gone."""
    trainer.backbone.destroy()
    trainer.arena.engine.destroy()


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--case", nargs="*", default=sorted(CASES | UNSEEN))
    arguments = options.parse_args()
    world = join_world()
    results = {}
    for case in arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(case, Path(folder), world.world_size)
            shapes = read_shapes(config)
            plan = split_deepspeed(config, world_size=world.world_size, trainable_numbers=shapes.num_trained)
            ours = planned(config, shapes, plan, world)
            shapes = read_shapes(config)  # adapters anew
            theirs = measured(config, shapes, plan, world)
        ratio = {name: round(ours[name] / theirs[name], 3) for name in ("static", "peak")}
        results[case] = {"planned_over_measured": ratio, "planned": ours, "measured": theirs}
        if world.is_main:
            print(f"{case}: static {ratio['static']}, peak {ratio['peak']} ({ours['phase']})", flush=True)
    if world.is_main:
        key = f"{world.device.type} {world.world_size} process(es)"
        out = Path(arguments.out) if arguments.out else None
        result = {"benchmark": "plan_check", "machine": machine()}
        before = json.loads(out.read_text()) if out is not None and out.is_file() else {}
        for group, cases in (("runs", CASES), ("unseen", UNSEEN)):  # other cases of an earlier call stay
            own = {case: found for case, found in results.items() if case in cases}
            earlier = before.get(group, {})
            result[group] = {**earlier, key: earlier.get(key, {}) | own} if own else earlier
        write(result, arguments.out)
    world.leave()


if __name__ == "__main__":
    main()
