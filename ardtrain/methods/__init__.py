"""The allocators: each a short file behind the protocol of `base.py`; `build` makes the one that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ardtrain.methods.adalora import AdaLora, AdaLoraSettings
from ardtrain.methods.alora import Alora, AloraSettings
from ardtrain.methods.ard_lora import ArdLora, ArdLoraSettings
from ardtrain.methods.base import Method
from ardtrain.methods.dora import Dora
from ardtrain.methods.elalora import ElaLora, ElaLoraSettings
from ardtrain.methods.lora import Lora
from ardtrain.methods.probe_lora import ProbeLora, ProbeLoraSettings
from ardtrain.ranks import RankTable


def build(
    name: str,
    block: Mapping[str, Any],
    *,
    total_steps: int,
    table: RankTable,
    shared_heads: Mapping[str, tuple[int, str]] | None = None,
) -> Method:
    """The method of a run with adapters.

    Args:
        name: the config's `method`; block: the settings of its class but total_steps.
        table: the run's first table; shared_heads: ARD-LoRA's heads that share components.
    """
    if name == "lora":
        return Lora()
    if name == "dora":
        return Dora()
    if name == "elalora":
        return ElaLora(ElaLoraSettings(total_steps=total_steps, **block))
    if name == "adalora":
        return AdaLora(AdaLoraSettings(total_steps=total_steps, **block))
    if name == "alora":
        return Alora(AloraSettings(total_steps=total_steps, **block))
    if name == "ard_lora":
        return ArdLora(ArdLoraSettings(total_steps=total_steps, **block), table, shared_heads)
    if name == "probe_lora":
        return ProbeLora(ProbeLoraSettings(total_steps=total_steps, **block), table)
    raise ValueError(f"method={name} has no adapters")
