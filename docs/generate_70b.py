"""Writes docs/70b.md from the plan's arithmetic: python docs/generate_70b.py (a minute; needs no GPU).

Everything in the page's tables is computed by ardtrain.planning; the measured column of the calibration comes from
benchmarks/results/plan_check.json, the anchors from peers.md, section 3.
"""

import json
from pathlib import Path
from typing import Any

from ardtrain.config import RunConfig, with_batch
from ardtrain.deepspeed_config import with_deepspeed
from ardtrain.planning.hardware import CONSTANTS, GIB, Machine, find_gpu, machine_of
from ardtrain.planning.plan import Plan, make_plan
from ardtrain.planning.seconds import HOOKS, hook_seconds
from ardtrain.planning.shapes import Shapes

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "70b.md"
CALIBRATION = REPOSITORY / "benchmarks" / "results" / "plan_check.json"
MODELS = {  # folder of examples/shapes -> name, tokens of a row
    "llama-3.1-8b": ("Llama-3.1-8B", 4096),
    "llama-3.1-70b": ("Llama-3.1-70B", 4096),
    "llama-3.1-405b": ("Llama-3.1-405B", 4096),
    "paligemma-2-3b": ("PaliGemma-2 3B", 1024),
    "paligemma-2-10b": ("PaliGemma-2 10B", 1024),
    "paligemma-2-28b": ("PaliGemma-2 28B", 1024),
}
GPUS = (1, 8, 16, 64, 1024)
ON_CPU = REPOSITORY / "benchmarks" / "results" / "zero_hooks.json"
ON_GPU = REPOSITORY / "benchmarks" / "results" / "gpu_h200.json"
ON_GPU_VARIANTS = {
    "zero0": "LoRA, ZeRO-0",
    "zero3": "LoRA, ZeRO-3",
    "zero3_offload": "LoRA, ZeRO-3, base in pinned host memory",
    "peft": "PEFT's LoRA in one ZeRO-3 engine",
    "int8": "LoRA, ZeRO-0, base in int8",
    "nf4": "LoRA, ZeRO-0, base in nf4",
}
OFFLOAD = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
AUTO = {
    f"stage3_{name}": "auto"
    for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
}


def config_of(folder: str, length: int, gpus: int, *, offload: bool, **changes: object) -> RunConfig:
    """LoRA of rank 16 on all linears, bf16, checkpointing, a grain of one row and one grain a process at least."""
    zero = {"stage": 3, **AUTO, **(OFFLOAD if offload else {})}
    values = {
        "model_name_or_path": str(REPOSITORY / "examples" / "shapes" / folder), "method": "lora", "r": 16,
        "data": {"train_file": "none.jsonl"}, "output_dir": "runs/none", "max_steps": 1000, "max_length": length,
        "bf16": True, "gradient_checkpointing": True, "global_batch_size": max(64, gpus),
        "task": "image_text_to_text" if folder.startswith("paligemma") else "causal_lm",
        "deepspeed": {"zero_optimization": zero}, **changes,
    }  # fmt: skip
    return with_batch(with_deepspeed(RunConfig.model_validate(values)), gpus)


def table() -> list[str]:
    """A row for each model, number of GPUs and place of the base."""
    lines = [
        "| Model | H100-80 | Base | Device GiB | Host GiB a node | Largest grain | Tokens/s/GPU | MFU (4 N) | Fits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for folder, (name, length) in MODELS.items():
        shapes: Shapes | None = None
        for gpus in GPUS:
            for offload in (False, True):
                machine = machine_of("h100", gpus=gpus, nodes=None)
                plan = make_plan(config_of(folder, length, gpus, offload=offload), machine, shapes=shapes)
                shapes = plan.shapes
                lines.append(_row(name, gpus, offload, plan))
    return lines


def _row(name: str, gpus: int, offload: bool, plan: Plan) -> str:
    s = plan.seconds
    assert s is not None
    fits = "yes" if plan.fits else "no: " + ("device" if not plan.fits_device else "host")
    slow, fast = s.step_seconds, s.overlapped_step
    return (
        f"| {name} | {gpus:,} | {'host' if offload else 'GPUs'} | {plan.memory.device_bytes / GIB:.1f} | "
        f"{plan.host_node_bytes / GIB:,.0f} | {plan.largest_rows} | {_number(s.tokens_per_second(slow))} to "
        f"{_number(s.tokens_per_second(fast))} | {s.mfu(slow):.0%} to {s.mfu(fast):.0%} | {fits} |"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}"


def calibration(group: str = "runs") -> list[str]:
    """Plan over measured, for each case and number of processes. group: of the file."""
    runs = json.loads(CALIBRATION.read_text())[group]
    lines = [
        "| Case | Processes | Peak measured, MiB | Plan / measured: peak | before the step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for where, cases in sorted(runs.items()):
        for case, result in sorted(cases.items()):
            ratio = result["planned_over_measured"]
            peak = result["measured"]["peak"] / 2**20
            lines.append(f"| {case} | {where} | {peak:.1f} | {ratio['peak']:.2f} | {ratio['static']:.2f} |")
    return lines


def on_gpu() -> dict[str, Any]:
    """What was measured on one H200, by part."""
    parts: dict[str, Any] = json.loads(ON_GPU.read_text())["parts"]
    return parts


def measured() -> list[str]:
    """Steps of an 8B-shaped Llama on one H200, each beside the plan of its own config as it was made then."""
    parts = on_gpu()
    lines = [
        "| One H200, deterministic kernels | Step, s | Plan, s | Tokens/s | MFU (4 N) | Peak allocated, GiB | "
        "Reserved, GiB | Plan, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, name in ON_GPU_VARIANTS.items():
        part = parts.get(f"step_{variant}")
        if part is None:
            lines.append(f"| {name} | not finished in its time | | | | | | |")
            continue
        own, plan = part["deterministic"], part.get("planned")
        seconds, size = ("", "")
        if plan is not None:
            slow, fast = plan["step_seconds"], plan["overlapped_step_seconds"]
            seconds = f"{slow:.2f}" if slow == fast else f"{fast:.2f} to {slow:.2f}"
            size = f"{plan['device_bytes'] / GIB:.1f}"
        lines.append(
            f"| {name} | {own['step_seconds']['median']:.2f} | {seconds} | {_number(own['tokens_per_second'])} | "
            f"{own['mfu_4n']:.0%} | {own['peak_allocated'] / GIB:.1f} | {own['peak_reserved'] / GIB:.1f} | {size} |"
        )
    return lines


def hook_seconds_of(variant: str) -> tuple[float, float]:
    """The plan of a step on the H200: with hooks around every module, as it was measured, and around layers, as now."""
    config = config_of("llama-3.1-8b", 4096, 1, offload=False, global_batch_size=2, deepspeed={"zero_optimization": {
        "stage": 3, **AUTO, **({"offload_param": OFFLOAD["offload_param"]} if variant == "zero3_offload" else {})
    }})  # fmt: skip
    plan = make_plan(config, machine_of("h100", gpus=1, nodes=None))
    assert plan.seconds is not None
    now, hooks = plan.seconds.step_seconds, plan.seconds.step[HOOKS]
    return now - hooks + 2 * hook_seconds(plan.shapes.hooks(by_module=True)), now


def hooks() -> str:
    """What ZeRO-3's hooks took and take."""
    parts = on_gpu()
    on_cpu = json.loads(ON_CPU.read_text())["hooks"]["over_zero0"]
    rows = []
    for variant, where in (("zero3", "ZeRO-3"), ("zero3_offload", "with the base on the host")):
        then, now = hook_seconds_of(variant)
        seen = parts[f"step_{variant}"]["deterministic"]["step_seconds"]["median"]
        rows.append(f"{where}, {then:.2f} s of {seen:.2f} measured, and {now:.2f} s now")
    cpu = [on_cpu[f"{way} checkpointing"]["measured"] for way in ("modules", "layers")]
    return (
        "ZeRO-3's rows were measured when its hooks stood around every module. The host took longer for them than the "
        "GPU for its products; the plan of then did not have that, the plan of now does (`hook_call`, `hook_weight` "
        "from a CPU, `hook_factor` fitted to the first two rows). Since then one pair of hooks stands around a decoder "
        "layer under checkpointing too: on a CPU, 32 small layers, ZeRO-3 adds "
        f"{cpu[1]:.3f} s to a step instead of {cpu[0]:.3f} (`benchmarks/results/zero_hooks.json`). The plan, nothing "
        f"hidden: {'; '.join(rows)}. The last figures have not been measured."
    )


def anchors() -> list[str]:
    """What others measured (peers.md 3C, 3D) beside the plan of the nearest set-up that we can plan."""
    lines = [
        "| Measured by others | Theirs | Plan of ours | Difference in set-up |",
        "| --- | --- | --- | --- |",
    ]
    one = _anchor("llama-3.1-8b", "h100", 1, length=4096, stage=0, gradient_checkpointing=False, global_batch_size=32)
    lines.append(
        f"| Automodel, Llama-3-8B LoRA r16, sequence 4096, 1 x H100 | 12,473 tokens/s/GPU | {_speed(one)} | none "
        "known; the compute fraction is taken from it |"
    )
    eight = _anchor("llama-3.1-70b", "h100", 8, length=4096, stage=3, gradient_checkpointing=True)
    lines.append(
        f"| Automodel, Llama-3-70B LoRA, 8 x H100 | 1,092 tokens/s/GPU | {_speed(eight)} | theirs TP 2 x FSDP 4, ours "
        "ZeRO-3 with checkpointing |"
    )
    sixteen = _anchor("llama-3.1-70b", "h100", 16, length=4096, stage=3, gradient_checkpointing=True)
    lines.append(f"| the same, 16 x H100, 2 nodes | 985 tokens/s/GPU | {_speed(sixteen)} | the same |")
    peft = _anchor(
        "llama-2-70b", "h100", 8, length=2048, stage=3, gradient_checkpointing=True, per_device_train_batch_size=8
    )
    lines.append(
        f"| PEFT, Llama-2-70B LoRA all-linear, ZeRO-3, 8 x H100-80, batch 8, sequence 2048 | 64 GB a GPU | "
        f"{peft.memory.device_bytes / 1e9:.0f} GB | theirs PEFT in one engine, as shown by the card |"
    )
    chunked = _anchor("llama-3.1-70b", "a100-80", 8, length=4096, stage=3, gradient_checkpointing=True)
    lines.append(
        f"| torchtune, Llama-3.1-70B LoRA, 8 x A100 | 27.6 GiB a GPU, 437 tokens/s/GPU | "
        f"{chunked.memory.device_bytes / GIB:.1f} GiB, {_speed(chunked)} | theirs FSDP, batch and length not known |"
    )
    return lines


def _anchor(folder: str, gpu: str, gpus: int, *, length: int, stage: int, **changes: object) -> Plan:
    zero = {"stage": stage, **(AUTO if stage == 3 else {})}
    rows = int(str(changes.get("per_device_train_batch_size", 1)))
    changes.setdefault("global_batch_size", rows * gpus)
    config = config_of(folder, length, gpus, offload=False, deepspeed={"zero_optimization": zero}, **changes)
    per_node = min(gpus, 8)
    return make_plan(config, Machine(find_gpu(gpu), gpus // per_node, per_node))


def _speed(plan: Plan) -> str:
    s = plan.seconds
    assert s is not None
    slow, fast = (_number(s.tokens_per_second(t)) for t in (s.step_seconds, s.overlapped_step))
    return f"{slow} to {fast} tokens/s/GPU"


def render() -> str:
    """The page."""
    assumed = [name for name, c in CONSTANTS.items() if c.assumed]
    parts = [
        "# 70B, and what it takes",
        "Generated by `python docs/generate_70b.py` from the arithmetic of `ardtrain plan`; a test compares the page "
        "with it.",
        "**Everything in the first table is computed.** One GPU was present for a few minutes: steps of an 8B-shaped "
        "Llama with random weights were measured on it (second table); no other run of these sizes has been made. The "
        "memory was calibrated on a CPU with small models (last table); seconds rest on datasheets and on what others "
        "measured, and on these numbers that nobody measured for us: " + ", ".join(f"`{n}`" for n in assumed) + ". "
        "`ardtrain plan --constants` lists all numbers with their sources; `ardtrain plan CONFIG` makes such a plan of "
        "any run, by cause, and says what to change where it does not fit.",
        "## The plan\n\nLoRA of rank 16 on all linear layers, bf16, ZeRO-3 with sizes on `auto`, activation "
        "checkpointing, a grain of one row of 4,096 tokens (PaliGemma: 1,024, image tokens among them), 64 rows a step "
        'or one for each GPU. "host": base and optimizer state offloaded to the CPU. Tokens/s: from nothing hidden to '
        "all traffic of the base and the host's work for ZeRO-3 hidden behind products. Nodes of 8 GPUs, 2 TB of host "
        "memory, 8 x 400 Gb/s. A grain of more rows makes better use of gathers and of the host's work, which is a "
        "grain's whatever its rows: the column says how many fit.",
        "\n".join(table()),
        "PaliGemma's rows count each weight for each token, the vision tower's too. Frozen weights in "
        "`quantization: int8` or `nf4` take half or 0.28 of the shard, gathers and traffic; plan your own.",
        "## Measured on a GPU\n\n`benchmarks/gpu.py` on one H200 (`benchmarks/results/gpu_h200.json`): all 32 "
        "layers of Llama-3.1-8B's shape, random weights, LoRA of rank 16 on all linear layers, bf16, "
        "checkpointing, two grains of one row of 4,096 tokens a step, one process; MFU against 989 TFLOP/s. The "
        "plan is of the same config on an H100, whose products are as fast; 1.5 GiB of it are CUDA's context, "
        "which neither column of what was measured counts. With one process nothing is gathered over a wire.",
        "\n".join(measured()),
        hooks(),
        "## What others measured, beside the plan\n\nFrom the project's notes on other trainers (peers.md 3C, 3D).",
        "\n".join(anchors()),
        "## Calibration\n\n`benchmarks/plan_check.py`: the plan beside real steps of the same config on a CPU "
        "(`benchmarks/results/plan_check.json`), peak of live tensors of a process over a whole step. Goal: within "
        "10 %. Under ZeRO-3 the forward has two moments that count: gathers are highest while layers run, activations "
        "at the loss. What a CPU cannot show: the caching allocator's "
        "fragments, CUDA's context and pinned memory's rounding.",
        "\n".join(calibration()),
        "Shapes, ranks, lengths and settings that were in no case while the model of memory was made, planned first "
        "and measured after. The plan of then gave 0.94 to 1.01 of what was measured with one process, and with two "
        "1.02 to 1.04 but for two cases at 1.12 and 1.13 (640x3, ZeRO-3): it took layers to stay whole for their "
        "backward, which DeepSpeed does not do after a first forward without one (`forward_first` in "
        "ardtrain/planning/gathering.py). The table has the plan of now; those two do not check it independently. "
        "With two processes and without checkpointing the plan is on the high side: it adds the gathers of the first "
        "layers to the activations of all.",
        "\n".join(calibration("unseen")),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE.relative_to(REPOSITORY))
