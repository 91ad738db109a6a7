"""Bytes by cause: what each process holds on its device, in host memory and on NVMe, at the peak of each phase.

Phases of a step on the device: forward (up to the loss's gradient), backward (the last layer's), gradient (the arena's
flat gradient is made and added), step (the optimizer's), resize (new arrays beside the old). The largest is what must
fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ardtrain.collectives import CHUNK
from ardtrain.deepspeed_config import DeepSpeedPlan
from ardtrain.planning.gathering import Gathered, GatherSettings, play
from ardtrain.planning.hardware import Machine, constant
from ardtrain.planning.shapes import Shapes

FP32, FP64, INT64 = 4, 8, 8
PHASES = ("forward", "backward", "gradient", "step", "resize")
Causes = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """device: phase -> cause -> bytes of a process; host, nvme: cause -> bytes of a process.

    gathered: what ZeRO-3 gathers, or None.
    """

    device: Mapping[str, Causes]
    host: Causes
    nvme: Causes
    gathered: Gathered | None

    @property
    def peak_phase(self) -> str:
        return max(self.device, key=lambda phase: sum(self.device[phase].values()))

    @property
    def device_bytes(self) -> int:
        return sum(self.device[self.peak_phase].values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def nvme_bytes(self) -> int:
        return sum(self.nvme.values())


@dataclass(frozen=True)
class Placement:
    """Where DeepSpeed's settings put things. base, optimizer: "device", "cpu" or "nvme"."""

    stage: int
    base: str
    optimizer: str
    zero: Mapping[str, Any]  # the engine's zero_optimization

    @property
    def gathers(self) -> GatherSettings:
        given = {
            name: int(self.zero[f"stage3_{name}"])
            for name in GatherSettings.__dataclass_fields__
            if f"stage3_{name}" in self.zero
        }
        return GatherSettings(**given)

    def offload(self, key: str, default: Any) -> Any:
        return self.zero.get("offload_param", {}).get(key, default)


def placement(plan: DeepSpeedPlan) -> Placement:
    """From the engines' settings (deepspeed_config.split_deepspeed)."""
    zero = (plan.full or plan.backbone)["zero_optimization"]
    base = zero.get("offload_param", {}).get("device", "none")
    if plan.full is not None:
        optimizer = zero.get("offload_optimizer", {}).get("device", "none")
    else:
        optimizer = "cpu" if plan.optimizer_offload else "none"
    here = {"none": "device"}
    return Placement(plan.backbone_stage, here.get(base, base), here.get(optimizer, optimizer), zero)


def memory(shapes: Shapes, machine: Machine, place: Placement, *, rows: int, length: int) -> Memory:
    """The plan of a grain of `rows` rows of `length` tokens."""
    world = machine.world_size
    traced = shapes.grain_bytes(rows=rows, length=length)
    gathered = None
    if place.stage == 3:
        recompute = shapes.config.gradient_checkpointing
        gathered = play(
            shapes.forward_units(), place.gathers, recompute=recompute, copies=world > 1,
            forward_first=shapes.probes_logits,
        )  # fmt: skip
        if world == 1 and (place.base == "device" or machine.gpu.memory_bytes is None):
            gathered = Gathered(0, 0, 0.0, 0)  # the shard is the weight, and is used where it lies
    frozen, host, nvme = _base(shapes, machine, place)
    if shapes.layout is None:
        trained = _full_engine(shapes, world, place, host, nvme)
        ends: dict[str, Causes] = {"gradient": {}, "step": trained.pop("step")}
        held = trained["held"]
    else:
        held, ends = _arena(shapes, world, place, host)
    waiting = shapes.offloaded_bytes(rows=rows, length=length)
    host["activations of layers"] = waiting
    device: dict[str, Causes] = {}
    for phase in ("forward", "backward", *ends):
        causes = {**frozen, **held}
        if phase in ("forward", "backward"):
            causes |= _grain(phase, traced, gathered, waiting)
        else:
            causes |= ends[phase]
        if machine.gpu.memory_bytes is not None:
            moving = sum(causes.values()) - sum(frozen.values())
            causes["allocator slack"] = int(moving * constant("slack_fraction"))
            causes["CUDA context"] = int(constant("context_bytes"))
        device[phase] = {cause: int(size) for cause, size in causes.items() if size}
    return Memory(
        device, {c: int(b) for c, b in host.items() if b}, {c: int(b) for c, b in nvme.items() if b}, gathered
    )


def _grain(phase: str, traced: Mapping[str, Causes], gathered: Gathered | None, waiting: int) -> Causes:
    """What moves in a grain's forward or backward at its highest moment. waiting: activations that lie on the host.

    The forward has two: gathers are highest while layers run (several weights come in one buffer and are cut out of
    it), activations at the loss.
    """
    moments = {"forward": 0, "backward": 0}
    if gathered is not None:
        moments = {
            "forward": gathered.loss_bytes,
            "layers": gathered.forward_bytes,
            "backward": gathered.backward_bytes,
        }
    found = []
    for moment, size in moments.items():
        if (moment == "backward") == (phase == "backward"):
            causes = {kind: max(0, own) for kind, own in traced[moment].items()}
            causes["activations"] = max(0, causes.get("activations", 0) - waiting)
            found.append(causes | ({"gathered layers": size} if gathered is not None else {}))
    return max(found, key=lambda causes: sum(causes.values()))


def _base(shapes: Shapes, machine: Machine, place: Placement) -> tuple[Causes, Causes, Causes]:
    """The frozen base on the device, the host and NVMe. For method full: the weights in the compute dtype."""
    world = machine.world_size
    if place.stage != 3:
        return {"frozen base": sum(b for _, _, b in shapes.weights)}, {}, {}
    shards, whole = [], 0
    for _, numbers, size in shapes.weights:
        shards.append(-(-numbers // world) * size // numbers)
        # One process keeps one copy on the device.
        if numbers <= place.gathers.param_persistence_threshold and not (world == 1 and place.base == "device"):
            whole += size
    host: Causes = {}
    device: Causes = {"small weights kept whole": whole}
    per_copy = int(place.zero.get("zero_hpz_partition_size", 1))
    if per_copy > 1:  # a second copy of the base over so many processes
        device["second shard in the node (hpZ)"] = -(-sum(b for _, _, b in shapes.weights) // per_copy)
    if place.base == "device":
        return {"frozen shard": sum(shards), **device}, {}, {}
    pinned = bool(place.offload("pin_memory", True)) and machine.gpu.memory_bytes is not None
    if place.base == "cpu":
        host["frozen shard"] = sum(shards)
        if pinned:  # torch's pinned allocator takes powers of two (ATen/core/CachingHostAllocator.h)
            host["pinned memory's rounding"] = sum(power_of_two(s) - s for s in shards)
        return device, host, {}
    count, size = place.offload("buffer_count", 5), place.offload("buffer_size", 100_000_000)
    host["NVMe buffers"] = int(count * size * shapes.itemsize)
    return device, host, {"frozen shard": sum(shards)}


def _arena(shapes: Shapes, world: int, place: Placement, host: Causes) -> tuple[Causes, dict[str, Causes]]:
    """What the trained numbers hold always, and at the two last phases; writes what lies on the host."""
    numbers = shapes.arena_size
    shard = -(-numbers // world)
    held = {
        "arena weights": FP32 * numbers,
        "method's averages": FP32 * shapes.entry_states * shard,
        "exact sum (int64)": INT64 * numbers,
    }
    state = {"master weights": FP32 * shard, "Adam's moments": 2 * FP32 * shard}
    (held if place.optimizer == "device" else host).update(state)
    if place.optimizer == "cpu":  # deepspeed stage_1_and_2.py
        held["offload's gradient buffer"] = FP32 * numbers  # temp_grad_buffer_for_gpu_offload
        host["offloaded gradients"] = FP32 * (numbers + shard)  # ..._for_cpu_offload, the masters' own
        host["offload's weight buffer"] = FP32 * shard  # param_buffer_of_bit16_for_cpu_offload_groups
    host["snapshot for a save"] = (3 + shapes.entry_states) * FP32 * numbers
    rounds = None if shapes.method is None else shapes.method.probes
    heard = 0  # a round's gradient
    if rounds is not None:
        up, down = rounds.numbers
        heard = max(up, down)
        held |= {"probes": FP32 * (up + down), "exact sum (int64)": INT64 * (numbers + heard)}
        host["sums of probes"] = FP64 * (up + 3 * down)
        host["snapshot for a save"] += host["sums of probes"]
    chunk = min(numbers, CHUNK)
    gradient = {
        "gradient": 2 * FP32 * (numbers + heard),  # in pieces, and joined
        "conversion to int64": chunk * (INT64 + FP32),
    }
    step = {
        "exact sum (int64)": 0,  # gone with the sum
        "gradient": FP32 * numbers,
        "adapter engine's gradient and bucket": 2 * FP32 * numbers + FP32 * shard,
    }
    ends = {"gradient": gradient, "step": step}
    if shapes.moves_ranks:
        ends["resize"] = {"exact sum (int64)": 0, "new arrays of a resize": _resize(shapes, world, place, host)}
    return held, ends


def _resize(shapes: Shapes, world: int, place: Placement, host: Causes) -> int:
    """Bytes of a resize on the device, beside the old arrays; writes those on the host. As resize.LiveArena._repack.

    New weights; each further array goes where an old one was, but what several processes hold is gathered first.
    """
    array, several = FP32 * shapes.arena_size, world > 1
    shard = -(-shapes.arena_size // world)
    entries = array + FP32 * shapes.entry_states * shard if several and shapes.entry_states else 0
    moments = 2 * array if several else 0
    if place.optimizer != "device":
        host["new moments of a resize"] = array + moments
        moments = 0
    return array + moments + entries


def _full_engine(shapes: Shapes, world: int, place: Placement, host: Causes, nvme: Causes) -> dict[str, Causes]:
    """Method full: gradients, masters, moments and buckets of an ordinary ZeRO engine of stage 1 to 3."""
    numbers, b = shapes.num_trained, shapes.itemsize
    shard = -(-numbers // world)
    bucket = int(place.zero.get("reduce_bucket_size", 500_000_000))
    half = b < FP32
    accumulates = shapes.config.num_grains > world
    gradient_size = FP32 if half and accumulates else b
    state = {"master weights": FP32 * shard, "Adam's moments": 2 * FP32 * shard}
    gradients = gradient_size * (numbers if place.stage < 2 else shard)
    held = {"gradients": gradients, "reduce bucket": b * min(bucket, numbers)}
    if place.optimizer == "device":
        held |= state
    elif place.optimizer == "cpu":
        host |= state
        host["gradients"] = FP32 * shard
    else:
        nvme |= state
        host["NVMe buffers"] = 4 * FP32 * min(shard, 10**9)
    return {"held": held, "step": {"float32 gradient": FP32 * shard if half else 0}}


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, math.ceil(math.log2(size))) if size > 0 else 0


def host_of_node(memory_of_process: Memory, machine: Machine) -> int:
    """Bytes that a node's processes take of its host together."""
    own = memory_of_process.host_bytes
    if machine.gpu.memory_bytes is not None:
        own += int(constant("process_host_bytes"))
    return own * machine.gpus_per_node


def start_of_node(shapes: Shapes, machine: Machine, place: Placement) -> int:
    """Host bytes of a node while the base is loaded: what stays there, the largest weight and buffers to read into.

    Weights in another format than safetensors load the whole model in each process.
    """
    sizes = [b for _, _, b in shapes.weights]
    own = max(sizes, default=0) + int(constant("reading_bytes"))
    if place.base == "cpu":
        own += -(-sum(sizes) // machine.world_size)
    return own * machine.gpus_per_node
