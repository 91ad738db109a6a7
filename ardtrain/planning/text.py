"""The plan as a page of text for the console."""

from __future__ import annotations

from collections.abc import Sequence

from ardtrain.planning.advice import Suggestion
from ardtrain.planning.hardware import CONSTANTS, GIB, GPUS
from ardtrain.planning.memory import PHASES
from ardtrain.planning.plan import Plan
from ardtrain.planning.seconds import num_resizes
from ardtrain.planning.shapes import compute_dtype

WIDTH = 40


def render(plan: Plan, advice: Sequence[Suggestion]) -> str:
    """All of it; every line at most 120 characters."""
    parts = [_head(plan), _device(plan), _host(plan), _verdict(plan, advice)]
    parts.insert(3, _seconds(plan) if plan.seconds is not None else "times: not planned without a GPU's speed")
    parts.append("All figures are computed; `ardtrain plan --constants` says from what.")
    return "\n\n".join(parts)


def _head(plan: Plan) -> str:
    config, shapes, machine = plan.config, plan.shapes, plan.machine
    where = {"device": "on the GPUs", "cpu": "in host memory", "nvme": "on NVMe"}
    sites = f", {len(shapes.shape.table.sites)} sites" if shapes.layout is not None else ""
    return "\n".join(
        [
            f"{config.model_name_or_path}: {shapes.shape.num_base / 1e9:.2f} B parameters in {compute_dtype(config)}; "
            f"{config.method}: {shapes.num_trained / 1e6:.1f} M trained numbers{sites}",
            f"{machine.world_size} x {machine.gpu.name} on {machine.nodes} node(s), a process each; base ZeRO-"
            f"{plan.place.stage} {where[plan.place.base]}, optimizer {where[plan.place.optimizer]}",
            f"grain: {plan.rows} row(s) of {plan.length} tokens; {config.num_grains} grains a step, "
            f"{-(-config.num_grains // machine.world_size)} a process; gradient_checkpointing "
            f"{'on' if config.gradient_checkpointing else 'off'}",
        ]
    )


def _device(plan: Plan) -> str:
    memory = plan.memory
    causes: list[str] = []
    phases = [phase for phase in PHASES if phase in memory.device]
    for phase in phases:
        causes += [c for c in memory.device[phase] if c not in causes]
    lines = [f"{'GiB on each device, by phase':<{WIDTH}}" + "".join(f"{phase:>10}" for phase in phases)]
    for cause in causes:
        values = [memory.device[phase].get(cause, 0) for phase in phases]
        lines.append(f"  {cause:<{WIDTH - 2}}" + "".join(_gib(v, 10) for v in values))
    totals = [sum(memory.device[phase].values()) for phase in phases]
    lines.append(f"  {'together':<{WIDTH - 2}}" + "".join(_gib(v, 10) for v in totals))
    return "\n".join(lines)


def _host(plan: Plan) -> str:
    lines = [f"{'GiB of host memory and NVMe':<{WIDTH}}{'a process':>10}{'a node':>10}"]
    per_node = plan.machine.gpus_per_node
    for cause, size in plan.memory.host.items():
        lines.append(f"  {cause:<{WIDTH - 2}}{_gib(size, 10)}{_gib(size * per_node, 10)}")
    other = plan.host_node_bytes - plan.memory.host_bytes * per_node
    if other:
        lines.append(f"  {'libraries':<{WIDTH - 2}}{_gib(other // per_node, 10)}{_gib(other, 10)}")
    together = plan.host_node_bytes
    lines.append(f"  {'together':<{WIDTH - 2}}{_gib(together // per_node, 10)}{_gib(together, 10)}")
    start = plan.start_node_bytes
    lines.append(f"  {'while the base is loaded':<{WIDTH - 2}}{_gib(start // per_node, 10)}{_gib(start, 10)}")
    for cause, size in plan.memory.nvme.items():
        lines.append(f"  {'NVMe: ' + cause:<{WIDTH - 2}}{_gib(size, 10)}{_gib(size * per_node, 10)}")
    return "\n".join(lines)


def _seconds(plan: Plan) -> str:
    s = plan.seconds
    assert s is not None
    lines = [f"{'seconds of a step, nothing hidden':<{WIDTH}}{'':>10}"]
    lines += [f"  {cause:<{WIDTH - 2}}{value:>10.3f}" for cause, value in s.step.items()]
    lines.append(f"  {'together':<{WIDTH - 2}}{s.step_seconds:>10.3f}")
    lines.append(f"  {'base traffic hidden behind products':<{WIDTH - 2}}{s.overlapped_step:>10.3f}")
    slow, fast = s.step_seconds, s.overlapped_step
    lines.append(
        f"tokens/s/GPU: {s.tokens_per_second(slow):,.0f} to {s.tokens_per_second(fast):,.0f}; MFU by 4 N: "
        f"{s.mfu(slow):.1%} to {s.mfu(fast):.1%} of {s.peak_flops / 1e12:,.0f} TFLOP/s; rows taken as full"
    )
    resizes = num_resizes(plan.shapes)
    events = f"; {resizes} events of at most {s.resize:.1f} s each for ranks" if resizes else ""
    if s.run is None or s.hours is None:
        lines.append("run: set max_steps to plan its hours" + events)
    else:
        causes = ", ".join(f"{cause} {_hours(value)}" for cause, value in s.run.items())
        lines.append(f"run: {s.hours:,.1f} hours after the start ({causes}){events}")
    lines.append(f"checkpoint: {plan.checkpoint_bytes / 1e9:.2f} GB; the loop waits about {s.save:.1f} s for a save")
    return "\n".join(lines)


def _verdict(plan: Plan, advice: Sequence[Suggestion]) -> str:
    machine, limit = plan.machine, plan.machine.gpu.memory_bytes
    lines = []
    if limit is not None:
        word = "fits" if plan.fits_device else "DOES NOT FIT"
        lines.append(
            f"device: {word}: {plan.memory.device_bytes / GIB:.1f} of {limit / GIB:.1f} GiB, most in the phase "
            f"{plan.memory.peak_phase}; largest grain that fits: {plan.largest_rows} row(s), {plan.largest_grain} of "
            "those that divide the global batch"
        )
    word = "fits" if plan.fits_host else "DOES NOT FIT"
    room = machine.gpu.node_host_bytes
    lines.append(f"host: {word}: {plan.host_node_bytes / GIB:.0f} of {room / GIB:.0f} GiB a node (--host-gib)")
    if plan.start_node_bytes > room:
        lines.append(
            f"start: DOES NOT FIT: loading takes {plan.start_node_bytes / GIB:.0f} GiB of a node's host; fewer "
            "processes a node"
        )
    if not plan.fits:
        lines.append("change, in this order:")
        for number, s in enumerate(advice, start=1):
            lines.append(
                f"  {number}. {s.change}: frees {s.frees_device_bytes / GIB:.1f} GiB a device, "
                f"{s.frees_host_node_bytes / GIB:.0f} GiB a host; then it {'fits' if s.fits else 'does not fit yet'}"
            )
        if not advice or not advice[-1].fits:
            lines.append("  and nothing that is known here makes it fit")
    return "\n".join(lines)


def constants() -> str:
    """Every number the plan rests on, and its source."""
    lines = ["GPUs:"]
    lines += [f"  {gpu.name}: {gpu.source}" for gpu in GPUS.values()]
    lines.append("constants:")
    for name, c in CONSTANTS.items():
        mark = " (assumed)" if c.assumed else ""
        lines.append(f"  {name} = {c.value:g} {c.unit}{mark}: {c.source}")
    return "\n".join(lines)


def _gib(size: int, width: int) -> str:
    return f"{size / GIB:>{width}.2f}"


def _hours(value: float) -> str:
    return f"{value / 3600:.1f} h" if value >= 360 else f"{value:.0f} s"
