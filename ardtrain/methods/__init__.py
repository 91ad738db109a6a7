"""The allocators: each a short file behind the protocol of `base.py`; `build` makes the one that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ardtrain.methods.base import Method
from ardtrain.methods.elalora import ElaLora, ElaLoraSettings
from ardtrain.methods.lora import Lora


def build(name: str, block: Mapping[str, Any], *, total_steps: int) -> Method:
    """The method of a run.

    Args:
        name: the config's `method`; block: its own block, field for field.
    """
    if name == "lora":
        return Lora()
    if name == "elalora":
        return ElaLora(ElaLoraSettings(total_steps=total_steps, **block))
    raise ValueError(f"method={name} is not built yet; these work: elalora, lora")
