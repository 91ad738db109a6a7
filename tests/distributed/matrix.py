"""The matrix of settings that must give equal bits: run by several processes, writes JSON from process 0.

python -m tests.distributed.matrix CASES.json OUT.json [cpu|cuda]

A case: family (what may change bits: method, dtype, dropout, packing, grains), and what may not: ZeRO stages, offload,
checkpointing, where the run is cut and resumed. Every case trains for 60 steps; ElaLoRA's with at least 10 resizes.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ardtrain import checkpoint
from ardtrain.ablation import AblationScorer
from ardtrain.backbones import enable_checkpointing
from ardtrain.collectives import World
from ardtrain.engines import start_deepspeed
from ardtrain.evaluation import loss_sum
from ardtrain.gather_sizes import RULES
from ardtrain.logits import find_logit_head
from ardtrain.methods.adalora import AdaLora, AdaLoraSettings
from ardtrain.methods.alora import Alora, AloraSettings
from ardtrain.methods.dora import Dora
from ardtrain.methods.lora import Lora
from ardtrain.preflight import weight_sizes
from ardtrain.trainer import LoopState
from tests.tiny import (
    HeldOutBatches,
    TokenBatches,
    adapter_config,
    ard_lora,
    backbone_config,
    elalora,
    probe_lora,
    tiny_llama,
    tiny_trainer,
    weights_digest,
)

PLAIN = {"dtype": "float32", "dropout": 0.0, "packed": False, "num_grains": 5}
FAMILIES = {
    "fp32": {"dtype": "float32", "dropout": 0.1, "packed": False, "num_grains": 12},
    "packed": {"dtype": "float32", "dropout": 0.0, "packed": True, "num_grains": 6},
    "bf16": {"dtype": "bfloat16", "dropout": 0.1, "packed": True, "num_grains": 6},
    "lora": PLAIN | {"method": lambda: Lora(), "lora_plus_ratio": 4.0},
    "dora": PLAIN | {"method": lambda: Dora(), "form": "dora", "dropout": 0.1},
    "adalora": PLAIN | {"method": lambda: AdaLora(ADALORA), "r": 6},
    "alora": PLAIN | {"method": lambda: Alora(ALORA)},
    "own_a": PLAIN | {"method": lambda: ard_lora(), "form": "own_a", "r": 2},
    "shared_a": PLAIN | {"method": lambda: ard_lora(meta_interval=2, tie="head"), "form": "shared_a", "r": 2},
    "probe": PLAIN | {"method": lambda: PROBE, "form": "own_a", "r": 2},
    "int8": {"dtype": "bfloat16", "dropout": 0.1, "packed": False, "num_grains": 5, "quantization": "int8"},
    "nf4": PLAIN | {"method": lambda: Dora(), "form": "dora", "quantization": "nf4"},
}
METHOD_FAMILIES = ("lora", "dora", "adalora", "alora", "own_a", "shared_a", "probe", "int8", "nf4")
STEPS = 60
ADALORA = AdaLoraSettings(
    total_steps=STEPS,
    target_r=4,
    tinit=5,
    tfinal=20,
    deltaT=5,
    beta1=0.85,
    beta2=0.85,
    orth_reg_weight=0.5,
    reg_orth_form="mean_norm",
    compact="end",
)
ALORA = AloraSettings(total_steps=STEPS, k1=10, k2=8, rounds=4, n_a=6, prune_only_harmful=False, revive=False)
PROBE = probe_lora(total_steps=STEPS, mask_interval=7, budget_in="parameters", target_r=2.5)
IDENTITY = checkpoint.Identity("tiny", "tokens", {})


def build(case, world):
    """A trainer for the case; its arena is unbuilt if the case resumes."""
    family = FAMILIES[case["family"]]
    dtype = getattr(torch, family["dtype"])
    zero = {}
    if case.get("offload_param") == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    elif case.get("offload_param") == "nvme":
        zero["offload_param"] = {"device": "nvme", "nvme_path": case["nvme_path"], "buffer_size": 1_000_000}
    size = world.world_size
    model = tiny_llama(dtype=dtype)
    if case.get("auto"):  # as a config that says `auto` for each of ZeRO-3's sizes
        sizes = weight_sizes(model)
        zero |= {name: rule(sizes, size)[0] for name, rule in RULES.items() if name.startswith("stage3_")}
    backbone = backbone_config(stage=case.get("stage", 0), dtype=dtype, world_size=size, **zero)
    adapter = adapter_config(
        stage=case.get("arena_stage", 1), offload=case.get("offload_optimizer", False), world_size=size
    )
    if case.get("gradient_checkpointing"):
        enable_checkpointing(model, offload=case["gradient_checkpointing"] == "offloaded", device=world.device)
    make = family.get("method", lambda: elalora(init_warmup=4, final_warmup=8, mask_interval=4, b=6, k=2))
    trainer = tiny_trainer(
        make(),
        world=world,
        model=model,
        data=TokenBatches(num_grains=family["num_grains"], packed=family["packed"]),
        r=family.get("r", 4),
        form=family.get("form", "plain"),
        quantization=family.get("quantization"),
        lora_plus_ratio=family.get("lora_plus_ratio", 1.0),
        dropout=family["dropout"],
        backbone=backbone,
        adapter=adapter,
        start="resume" not in case,
        compute_dtype=dtype,
        total_steps=STEPS,
    )
    head = find_logit_head(trainer.backbone.module, chunk_tokens=16, device=world.device)
    trainer.loss_sum = partial(loss_sum, logit_head=head)
    trainer.eval_data = HeldOutBatches(seed=1, num_grains=5)
    trainer.allocation_data = HeldOutBatches(seed=2, num_grains=3)
    if trainer.method.needs.ablation:
        trainer.ablation = AblationScorer(
            trainer.backbone.module,
            trainer.adapters,
            trainer.allocation_data,
            world=world,
            release=trainer.backbone.release,
            logit_head=head,
            between=trainer.between,
        )
    return trainer


def resume(trainer, path):
    """Fills the trainer from a checkpoint."""
    method = trainer.method
    loaded = checkpoint.load(
        path,
        sites=trainer.first_table.sites,
        parts=method.entries,
        kinds=method.state_tensors(),
        identity=IDENTITY,
        dense=trainer.arena.dense,
    )
    trainer.arena.build(loaded.snapshot, loaded.layout)
    trainer.state = LoopState(**loaded.loop)


def run_case(case, world, *, build=build, steps=STEPS, cut=30, evaluate_after=(20, 45)):
    """Losses, table digests, held-out losses and the final digest of weights and moments, as exact texts.

    cut: the steps after which a case that saves does so.
    """
    trainer = build(case, world)
    if "resume" in case:
        resume(trainer, Path(case["resume"]))
    result = {"losses": {}, "tables": {}, "held_out": {}, "events": 0}
    start = time.perf_counter()
    while trainer.state.step < steps:
        step = trainer.train_step()
        result["losses"][step.step] = step.loss.hex()
        result["tables"][step.step] = trainer.arena.table.digest
        result["events"] = trainer.state.events
        if trainer.state.step in evaluate_after:  # between training steps, with rows of other lengths
            result["held_out"][trainer.state.step] = trainer.evaluate().loss.hex()
        if trainer.state.step == cut and "save" in case:
            snapshot = trainer.arena.capture()
            if world.is_main:
                checkpoint.save(
                    Path(case["save"]), snapshot, trainer.arena.layout, step=cut, loop=asdict(trainer.state),
                    identity=IDENTITY, write_adapter=lambda folder: folder.mkdir(),
                )  # fmt: skip
            world.barrier("saved")
    snapshot = trainer.arena.capture()
    result["seconds"] = time.perf_counter() - start
    result["final"] = weights_digest(snapshot)
    result["gathered"] = trainer.backbone.gathered_parameters()
    result["method"] = type(trainer.method).__name__
    world.agree("final weights", result["final"], step=steps)
    trainer.arena.engine.destroy()
    trainer.backbone.destroy()
    return result


def main(cases_path, out_path, device="cpu", *, run=run_case):
    """Runs all cases in this one start of the processes; run: as run_case."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    target = torch.device(device) if device == "cpu" else torch.device(device, int(os.environ["LOCAL_RANK"]))
    if device == "cuda":
        torch.cuda.set_device(target)
    world = World.join(
        global_rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        device=target,
        timeout_seconds=300,
    )
    start_deepspeed(target)
    results = {}
    for name, case in json.loads(Path(cases_path).read_text()).items():
        results[name] = run(case, world)
        if world.is_main:
            print(name, f"{results[name]['seconds']:.1f} s", results[name]["final"][:12], flush=True)
    if world.is_main:
        Path(out_path).write_text(json.dumps(results))
    world.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
