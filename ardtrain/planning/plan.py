"""The plan of a run: shapes, memory and seconds put together, whether it fits, and the largest grain that does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ardtrain.config import RunConfig, with_batch
from ardtrain.deepspeed_config import split_deepspeed, with_deepspeed
from ardtrain.planning.hardware import Machine
from ardtrain.planning.memory import Memory, Placement, host_of_node, memory, placement, start_of_node
from ardtrain.planning.seconds import Seconds, num_resizes, seconds
from ardtrain.planning.shapes import Shapes, compute_dtype, read_shapes

MOST_ROWS = 4096
SCHEMA_VERSION = 1
STATE_BYTES, COPY_BYTES, COMPONENT_BYTES = 12, 4, 16  # README, "Stop and resume": bytes of a checkpoint


@dataclass(frozen=True)
class Plan:
    """What a config does on a machine. rows: of a grain; largest_rows: that fit, 0: none."""

    config: RunConfig
    machine: Machine
    place: Placement
    shapes: Shapes
    memory: Memory
    seconds: Seconds | None
    rows: int
    length: int
    largest_rows: int | None

    @property
    def fits_device(self) -> bool:
        limit = self.machine.gpu.memory_bytes
        return limit is None or self.memory.device_bytes <= limit

    @property
    def host_node_bytes(self) -> int:
        return host_of_node(self.memory, self.machine)

    @property
    def start_node_bytes(self) -> int:
        """Of a node's host while the base is loaded."""
        return start_of_node(self.shapes, self.machine, self.place)

    @property
    def fits_host(self) -> bool:
        return self.host_node_bytes <= self.machine.gpu.node_host_bytes

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, DeepSpeed's own beside it not counted."""
        n, shapes = self.shapes.num_trained, self.shapes
        if shapes.layout is None:
            return (STATE_BYTES + shapes.itemsize) * n
        entries = 4 * shapes.entry_states
        return (STATE_BYTES + COPY_BYTES + entries) * n + COMPONENT_BYTES * shapes.shape.table.total

    @property
    def largest_grain(self) -> int | None:
        """The largest that fits and divides the global batch."""
        if self.largest_rows is None:
            return None
        total = self.config.global_batch_size or 1
        return max((r for r in range(1, min(self.largest_rows, total) + 1) if total % r == 0), default=0)


def make_plan(config: RunConfig, machine: Machine, *, shapes: Shapes | None = None) -> Plan:
    """The plan of a resolved config (preflight.read_run_config).

    Args:
        shapes: of the same config but for `deepspeed` and the global batch.
    Raises:
        ConfigError: as preflight.check_model and split_deepspeed.
    """
    if shapes is None:
        shapes = read_shapes(config, base_on_nvme=_base_on_nvme(config))
    shapes = replace(shapes, config=config)
    engines = split_deepspeed(
        config, world_size=machine.world_size, trainable_numbers=shapes.num_trained, sizes=shapes.shape.sizes
    )
    place = placement(engines)
    rows, length = config.per_device_train_batch_size, config.max_length
    found = memory(shapes, machine, place, rows=rows, length=length)
    times = None
    if machine.gpu.flops is not None:
        times = seconds(shapes, machine, place, found, rows=rows, length=length)
    return Plan(config, machine, place, shapes, found, times, rows, length, _largest(shapes, machine, place, length))


def _base_on_nvme(config: RunConfig) -> bool:
    return split_deepspeed(config, world_size=1).base_on_nvme


def _largest(shapes: Shapes, machine: Machine, place: Placement, length: int) -> int | None:
    """The largest grain whose device bytes fit; None without a limit."""
    limit = machine.gpu.memory_bytes
    if limit is None:
        return None

    def fits(rows: int) -> bool:
        return memory(shapes, machine, place, rows=rows, length=length).device_bytes <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST_ROWS and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def changed(config: RunConfig, machine: Machine, changes: dict[str, Any]) -> RunConfig:
    """The config with other settings, batch and DeepSpeed JSON resolved again."""
    from ardtrain.config import updated

    return with_batch(with_deepspeed(updated(config, changes)), machine.world_size)


def to_json(plan: Plan, suggestions: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan for machines; names and units stay within a schema version. Bytes are of a process unless they say."""
    s, m, shapes = plan.seconds, plan.memory, plan.shapes
    return {
        "schema_version": SCHEMA_VERSION,
        "config": {
            "model": plan.config.model_name_or_path,
            "method": plan.config.method,
            "compute_dtype": compute_dtype(plan.config),
            "rows": plan.rows,
            "length": plan.length,
            "global_batch_size": plan.config.global_batch_size,
            "grains": plan.config.num_grains,
            "max_steps": plan.config.max_steps,
            "gradient_checkpointing": plan.config.gradient_checkpointing,
        },
        "machine": {
            "gpu": plan.machine.gpu.name,
            "gpus": plan.machine.world_size,
            "nodes": plan.machine.nodes,
            "device_bytes": plan.machine.gpu.memory_bytes,
            "node_host_bytes": plan.machine.gpu.node_host_bytes,
        },
        "model": {
            "frozen_numbers": 0 if shapes.layout is None else shapes.shape.num_base,
            "trained_numbers": shapes.num_trained,
            "sites": len(shapes.shape.table.sites),
            "components": shapes.shape.table.total,
        },
        "placement": {"zero_stage": plan.place.stage, "base": plan.place.base, "optimizer": plan.place.optimizer},
        "memory": {
            "device": {phase: dict(causes) for phase, causes in m.device.items()},
            "device_peak_phase": m.peak_phase,
            "device_peak_bytes": m.device_bytes,
            "host": dict(m.host),
            "host_bytes": m.host_bytes,
            "host_node_bytes": plan.host_node_bytes,
            "host_node_start_bytes": plan.start_node_bytes,
            "nvme": dict(m.nvme),
            "nvme_bytes": m.nvme_bytes,
            "gathers_per_grain": None if m.gathered is None else m.gathered.passes,
        },
        "largest_rows": plan.largest_rows,
        "largest_grain": plan.largest_grain,
        "seconds": None
        if s is None
        else {
            "step": dict(s.step),
            "step_seconds": s.step_seconds,
            "step_seconds_overlapped": s.overlapped_step,
            "resize": s.resize,
            "resizes": num_resizes(shapes),
            "save": s.save,
            "run": None if s.run is None else dict(s.run),
            "hours": s.hours,
            "tokens_per_step": s.tokens,
            "tokens_per_second_per_gpu": s.tokens_per_second(s.step_seconds),
            "tokens_per_second_per_gpu_overlapped": s.tokens_per_second(s.overlapped_step),
            "mfu_4n": s.mfu(s.step_seconds),
            "mfu_4n_overlapped": s.mfu(s.overlapped_step),
        },
        "checkpoint_bytes": plan.checkpoint_bytes,
        "fits": {"device": plan.fits_device, "host": plan.fits_host},
        "suggestions": suggestions,
    }
