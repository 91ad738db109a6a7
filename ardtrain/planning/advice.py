"""What to change first when a run does not fit: each change is planned again, so its bytes are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ardtrain.config import ConfigError, RunConfig
from ardtrain.planning.hardware import Machine
from ardtrain.planning.plan import Plan, changed, make_plan

WORTH = 0.05  # of the bytes that are missing: what frees less is no advice
MOST_DOUBLINGS = 12


@dataclass(frozen=True)
class Suggestion:
    """One change, made after those before it. frees: bytes of a process (device) and of a node (host); may be < 0."""

    change: str
    frees_device_bytes: int
    frees_host_node_bytes: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


Change = tuple[str, RunConfig, Machine]


def suggestions(plan: Plan) -> list[Suggestion]:
    """Changes in the order of what they cost the user, each on top of those before, until the run fits."""
    out: list[Suggestion] = []
    for step in _LADDER:
        if plan.fits:
            break
        for text, config, machine in step(plan):
            try:
                after = make_plan(config, machine)
            except ConfigError:
                continue  # a change that this run's other settings forbid
            device = plan.memory.device_bytes - after.memory.device_bytes
            host = plan.host_node_bytes - after.host_node_bytes
            frees = host if plan.fits_device else device
            if frees < WORTH * _missing(plan) or (plan.fits_host and not after.fits_host):
                continue
            out.append(Suggestion(text, device, host, after.fits))
            plan = after
            if plan.fits:
                break
    return out


def _missing(plan: Plan) -> int:
    """Bytes by which it does not fit: of the device, else of the host."""
    limit = plan.machine.gpu.memory_bytes
    if limit is not None and not plan.fits_device:
        return plan.memory.device_bytes - limit
    return plan.host_node_bytes - plan.machine.gpu.node_host_bytes


def _set(plan: Plan, **changes: Any) -> Iterator[Change]:
    text = " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in changes.items()
        if value is not None
    )
    try:
        yield text, changed(plan.config, plan.machine, changes), plan.machine
    except ConfigError:
        return


def _checkpointing(plan: Plan) -> Iterator[Change]:
    if not plan.config.gradient_checkpointing:
        yield from _set(plan, gradient_checkpointing=True)


def _chunked_loss(plan: Plan) -> Iterator[Change]:
    if plan.config.loss_chunk_tokens is None and plan.config.method != "full":
        yield from _set(plan, loss_chunk_tokens=512)


def _smaller_grain(plan: Plan) -> Iterator[Change]:
    grain = plan.largest_grain or 1
    if grain < plan.rows:
        yield from _set(plan, per_device_train_batch_size=grain, gradient_accumulation_steps=None)


def _shard(plan: Plan) -> Iterator[Change]:
    if plan.place.stage != 3 and plan.machine.world_size > 1:
        yield from _zero(plan, "deepspeed=zero3", stage=3)


def _offload_optimizer(plan: Plan) -> Iterator[Change]:
    if plan.place.optimizer == "device":
        text = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
        yield from _zero(plan, text, offload_optimizer={"device": "cpu", "pin_memory": True})


def _offload_param(plan: Plan) -> Iterator[Change]:
    if plan.place.base == "device":
        text = "deepspeed.zero_optimization.offload_param.device=cpu"
        if plan.place.stage != 3:
            text = "deepspeed=zero3_offload_param"
        yield from _zero(plan, text, stage=3, offload_param={"device": "cpu", "pin_memory": True})


def _unpinned(plan: Plan) -> Iterator[Change]:
    if plan.memory.host.get("pinned memory's rounding"):
        block = {**plan.place.zero.get("offload_param", {}), "pin_memory": False}
        yield from _zero(plan, "deepspeed.zero_optimization.offload_param.pin_memory=false", offload_param=block)


def _offload_activations(plan: Plan) -> Iterator[Change]:
    if plan.config.gradient_checkpointing and not plan.config.activation_offload:
        yield from _set(plan, activation_offload=True)


def _quantise(plan: Plan) -> Iterator[Change]:
    if plan.config.method == "full":
        return
    for value in {None: ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}[plan.config.quantization]:
        yield from _set(plan, quantization=value)


def _more_gpus(plan: Plan) -> Iterator[Change]:
    machine = plan.machine
    for _ in range(MOST_DOUBLINGS):
        machine = machine.larger()
        text = f"--gpus {machine.world_size}" + (f" --nodes {machine.nodes}" if machine.nodes > 1 else "")
        try:
            config = changed(plan.config, machine, {})
        except ConfigError:
            return
        after = make_plan(config, machine, shapes=plan.shapes)
        if after.fits:
            yield text, config, machine
            return


def _shorter_rows(plan: Plan) -> Iterator[Change]:
    length = plan.length
    while length > 256:
        length //= 2
        yield from _set(plan, max_length=length)


def _zero(plan: Plan, text: str, **changes: Any) -> Iterator[Change]:
    """Changes of zero_optimization."""
    given = plan.config.deepspeed
    whole = copy.deepcopy(given) if isinstance(given, dict) else {}
    zero = whole.setdefault("zero_optimization", {})
    for key, value in changes.items():
        zero[key] = value
    try:
        yield text, changed(plan.config, plan.machine, {"deepspeed": whole}), plan.machine
    except ConfigError:
        return


_LADDER: tuple[Callable[[Plan], Iterator[Change]], ...] = (
    _chunked_loss,
    _shard,
    _checkpointing,
    _smaller_grain,
    _offload_optimizer,
    _offload_activations,
    _unpinned,
    _quantise,
    _offload_param,
    _more_gpus,
    _shorter_rows,
)
