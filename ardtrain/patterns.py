"""Values of single modules by name, as in PEFT's rank_pattern and alpha_pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

Value = TypeVar("Value")
NO_PATTERN: Mapping[str, Any] = MappingProxyType({})


def by_pattern(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key, a regular expression, that is the module's path or an ending of it (PEFT's rule)."""
    return next((value for key, value in pattern.items() if _names(key, module)), default)


def refuse_unused(pattern: Mapping[str, Any], modules: Sequence[str], *, setting: str) -> None:
    """Raises ValueError: a key names none of the modules (PEFT would go on without it)."""
    for key in pattern:
        if not any(_names(key, module) for module in modules):
            raise ValueError(
                f"{setting} names {key}, and no adapted module's path ends so (the first is {modules[0]}); correct it, "
                "or widen target_modules"
            )


def _names(key: str, module: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({key})", module) is not None
    except re.error as error:
        raise ValueError(f"the pattern {key} is no regular expression ({error}); correct it") from error
