"""ZeRO-3's settings that are written `auto`, chosen by the base's shapes. They move memory and speed, never bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_AHEAD = 1_000_000_000  # numbers gathered ahead: 2 GB in bf16; beyond that the device's memory is worth more


@dataclass(frozen=True)
class WeightSizes:
    """In numbers. largest: weight; vector: largest weight of one dimension (norms, biases); layer: largest repeated
    layer; in_layer: how many weights it has."""

    largest: int
    vector: int
    layer: int
    in_layer: int


Rule = Callable[[WeightSizes, int], tuple[Any, str]]

RULES: Mapping[str, Rule] = {
    # setting of zero_optimization: (sizes, processes) -> value, why
    "stage3_prefetch_bucket_size": lambda s, w: (
        min(s.layer, MOST_AHEAD), "the next layer comes while one computes"),
    "stage3_max_live_parameters": lambda s, w: (
        2 * s.layer + s.largest, "two layers and the largest weight"),
    "stage3_max_reuse_distance": lambda s, w: (
        min(2 * s.layer, 2 * MOST_AHEAD), "the last layers stay for their backward"),
    "stage3_param_persistence_threshold": lambda s, w: (
        s.vector, "norms and biases stay whole, matrices are sharded"),
    "offload_param.pin_memory": lambda s, w: (True, "copies to a GPU run beside its products"),
    "offload_param.buffer_size": lambda s, w: (-(-s.largest // w), "the largest shard"),
    "offload_param.buffer_count": lambda s, w: (
        2 * s.in_layer + 2, "two layers' weights, and both embeddings"),
    "offload_param.max_in_cpu": lambda s, w: (
        MOST_AHEAD, "DeepSpeed's own; it counts trained weights alone"),
}  # fmt: skip


def without_auto(zero: Mapping[str, Any], sizes: WeightSizes, world_size: int, notes: list[str]) -> dict[str, Any]:
    """`zero_optimization` with its `auto` values chosen where there is a rule; each choice is told in `notes`."""
    out: dict[str, Any] = {}
    for key, value in zero.items():
        if key == "offload_param" and isinstance(value, dict):
            out[key] = {k: _chosen(f"{key}.{k}", v, sizes, world_size, notes) for k, v in value.items()}
        else:
            out[key] = _chosen(key, value, sizes, world_size, notes)
    return out


def _chosen(key: str, value: Any, sizes: WeightSizes, world_size: int, notes: list[str]) -> Any:
    if value != "auto" or key not in RULES:
        return value
    chosen, why = RULES[key](sizes, world_size)
    shown = f"{chosen:,}" if not isinstance(chosen, bool) else str(chosen).lower()
    notes.append(f"deepspeed.zero_optimization.{key}: auto is {shown} ({why})")
    return chosen
