"""Seconds by cause: of one step, of the events between steps, of the run. Arithmetic on hardware.py's table.

Two bounds of a step: nothing hidden (all causes added), and all traffic of the base and ZeRO-3's work on the host
hidden behind the products. Where between them a run lies depends on streams and kernels; plans go by the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ardtrain.config import AloraBlock
from ardtrain.planning.gathering import Gathered
from ardtrain.planning.hardware import Machine, constant
from ardtrain.planning.memory import FP32, INT64, Memory, Placement
from ardtrain.planning.shapes import Hooks, Shapes
from ardtrain.utilisation import mfu_4n

TRAFFIC = ("gathers", "host to device", "NVMe to host", "activations to the host and back")
HOOKS = "ZeRO-3's hooks on the host"
ABLATION_SHARE = 0.51  # of 2R + 1 whole forwards' operations: benchmarks/results/ab_lora_stories260k.json


@dataclass(frozen=True)
class Seconds:
    """step: cause -> seconds of one optimizer step. resize, save, ablation, evaluation: of one event.

    run: cause -> seconds over all of the run, None where its length is not known.
    """

    step: Mapping[str, float]
    overlapped_step: float
    resize: float
    save: float
    run: Mapping[str, float] | None
    tokens: int  # of a step
    matmul_numbers: int  # N
    world_size: int
    peak_flops: float

    @property
    def step_seconds(self) -> float:
        return sum(self.step.values())

    @property
    def hours(self) -> float | None:
        return None if self.run is None else sum(self.run.values()) / 3600

    def tokens_per_second(self, seconds: float) -> float:
        """Of each GPU."""
        return self.tokens / seconds / self.world_size

    def mfu(self, seconds: float) -> float:
        """Share of the datasheet's FLOP/s by 4 N, attention and recomputation not counted."""
        return mfu_4n(self.matmul_numbers, self.tokens_per_second(seconds), self.peak_flops)


def grain_flops(shapes: Shapes, *, rows: int, length: int) -> dict[str, float]:
    """Operations of one grain by cause. A frozen weight costs 4 a token (forward, and back to the input), a trained 6.

    Attention: 2 products of T x T x width forward, half where queries are blind to later keys; backward 2.5 times.
    """
    tokens = rows * length
    full = shapes.layout is None
    again = 1 if shapes.config.gradient_checkpointing else 0
    forward = 2.0 * shapes.matmul_numbers * tokens
    attention = sum(4.0 * rows * length**2 * a.width * a.layers * (0.5 if a.causal else 1.0) for a in shapes.attentions)
    out = {
        "products with the base": forward * (3 if full else 2),
        "attention": attention * (1 + constant("attention_backward")),
        "recomputation": again * (forward + attention),
    }
    if not full:
        out["adapters"] = (6.0 + 2.0 * again) * shapes.num_trained * tokens
    return out


def seconds(shapes: Shapes, machine: Machine, place: Placement, memory: Memory, *, rows: int, length: int) -> Seconds:
    """The plan's times; the machine's GPU has a known speed (hardware.Gpu.flops)."""
    gpu, world = machine.gpu, machine.world_size
    assert gpu.flops is not None
    config = shapes.config
    num_grains = config.num_grains
    rounds = -(-num_grains // world)
    speed = gpu.flops * constant("compute_fraction")
    flops = grain_flops(shapes, rows=rows, length=length)
    step = {cause: rounds * count / speed for cause, count in flops.items()}
    if shapes.quantized_numbers:
        passes = 3 if config.gradient_checkpointing else 2
        step["dequantisation"] = rounds * passes * shapes.quantized_numbers * constant("dequantise_bytes") / gpu.hbm
    if memory.gathered is not None:
        step |= {c: rounds * s for c, s in _base_traffic(shapes, machine, place, memory.gathered).items()}
        step[HOOKS] = rounds * hook_seconds(shapes.hooks())
    waiting = shapes.offloaded_bytes(rows=rows, length=length)
    if waiting:
        link = gpu.host * constant("host_link_fraction")
        step["activations to the host and back"] = rounds * 2 * waiting / link
    step |= _engine(shapes, machine, place, rounds)
    traffic = sum(step.get(cause, 0.0) for cause in TRAFFIC)
    products = sum(step[cause] for cause in flops)
    hooks = step.get(HOOKS, 0.0)
    overlapped = max(products, traffic, hooks) + sum(step.values()) - products - traffic - hooks
    tokens = num_grains * rows * length
    n = shapes.num_trained or 1
    resize = constant("resize_seconds") * n / constant("resize_numbers") if shapes.moves_ranks else 0.0
    save = constant("save_seconds") * n / constant("save_numbers")
    forward = (2.0 * shapes.matmul_numbers * length) / speed / world  # of a row, over all processes
    run = _run(shapes, sum(step.values()), resize=resize, save=save, row=forward)
    return Seconds(step, overlapped, resize, save, run, tokens, shapes.matmul_numbers, world, gpu.flops)


def hook_seconds(hooks: Hooks) -> float:
    """The host's, of one grain on a GPU."""
    on_cpu = hooks.calls * constant("hook_call") + hooks.weights * constant("hook_weight")
    return on_cpu * constant("hook_factor")


def _base_traffic(shapes: Shapes, machine: Machine, place: Placement, gathered: Gathered) -> dict[str, float]:
    """Of one grain: the sharded base over NVLink and network, from the host, from NVMe."""
    world, gpu = machine.world_size, machine.gpu
    size = gathered.passes * sum(b for _, _, b in shapes.weights)
    out = {"gathers": _ring(size, machine)}
    if place.base in ("cpu", "nvme"):
        out["host to device"] = size / world / (gpu.host * constant("host_link_fraction"))
    if place.base == "nvme":
        out["NVMe to host"] = size / machine.nodes / constant("nvme_read")
    return {cause: s for cause, s in out.items() if s}


def _ring(size: float, machine: Machine) -> float:
    """Seconds of an all-gather of `size` bytes in all; an all-reduce takes two."""
    world, nodes = machine.world_size, machine.nodes
    inside = size * (world - 1) / world / (machine.gpu.peer * constant("peer_fraction")) if world > nodes else 0.0
    between = size * (nodes - 1) / nodes / (machine.gpu.network * constant("network_fraction"))
    return max(inside, between)


def _engine(shapes: Shapes, machine: Machine, place: Placement, rounds: int) -> dict[str, float]:
    """Of one step: the gradient's sum and the optimizer."""
    n, world, gpu = shapes.num_trained, machine.world_size, machine.gpu
    out: dict[str, float] = {}
    if shapes.layout is None:
        b = shapes.itemsize
        out["gradient's reduction"] = rounds * _ring(b * n, machine) + _ring(b * n, machine)
    else:
        convert = rounds * n * (FP32 + 2 * INT64 + FP32) / gpu.hbm  # read, add to int64, the joined gradient
        out["exact sum"] = 2 * _ring(INT64 * n, machine) + convert
        out["adapter engine's collectives"] = 3 * _ring(FP32 * n, machine)
    shard = n / world
    states = 7 * FP32 * shard  # read gradient, master, moments; write the last three
    if place.optimizer == "device":
        out["optimizer and scores"] = (states + 8 * FP32 * n + 6 * FP32 * shapes.entry_states * shard) / gpu.hbm
    else:
        out["optimizer and scores"] = states / constant("host_memory") + 2 * FP32 * shard / (
            gpu.host * constant("host_link_fraction")
        )
        if place.optimizer == "nvme":
            out["optimizer and scores"] += 6 * FP32 * shard * machine.gpus_per_node / constant("nvme_read")
    return out


def _run(shapes: Shapes, step: float, *, resize: float, save: float, row: float) -> dict[str, float] | None:
    """Seconds of the whole run by cause; row: a held-out row's forward, dealt over all processes."""
    config = shapes.config
    if config.max_steps is None:
        return None
    out = {"steps": config.max_steps * step}
    events = num_resizes(shapes)
    out["resizes"] = events * resize
    if config.method == "alora":
        block = config.alora or AloraBlock()
        forwards = ABLATION_SHARE * (2 * shapes.shape.table.total + 1)
        out["ablation"] = block.rounds * forwards * block.val_batch * row
    out["saves"] = save * (1 + (config.max_steps // config.save_steps if config.save_steps else 0))
    if config.max_eval_samples and config.data.held_out_files and config.eval_steps:
        evaluations = config.max_steps // config.eval_steps + int(config.eval_on_start)
        out["evaluations"] = evaluations * config.max_eval_samples * len(config.data.held_out_files) * row
    return {cause: s for cause, s in out.items() if s}


def num_resizes(shapes: Shapes) -> int:
    """Events at which ranks may move."""
    config, method = shapes.config, shapes.method
    if config.max_steps is None or method is None or not shapes.moves_ranks:
        return 0
    if config.method == "alora":
        return (config.alora or AloraBlock()).rounds
    if config.method == "adalora":  # masks rebuild nothing; masked components leave once
        return 1
    if config.method == "ard_lora":
        block = shapes.config.ard_lora
        return config.max_steps // (block.resize_interval if block is not None else 100)
    return sum(method.due(step) for step in range(config.max_steps))
