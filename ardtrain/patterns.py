"""Ranks and scales of single modules by name: PEFT's rank_pattern and alpha_pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from ardtrain.ranks import Site

Value = TypeVar("Value")


def by_pattern(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key, a regular expression, that is the module's path or an ending of it (PEFT's rule)."""
    return next((value for key, value in pattern.items() if _names(key, module)), default)


def with_patterns(
    sites: Sequence[Site],
    ranks: Sequence[int],
    *,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> tuple[list[Site], list[int]]:
    """Sites and first ranks where the patterns give some their own.

    A site's scale is its alpha over its own rank, as in PEFT: a rank alone leaves lora_alpha as it is.

    Args:
        sites, ranks: whole matrices, with the scale lora_alpha / r.

    Raises:
        ValueError: a key names no site, or a rank exceeds min(in, out) of its module.
    """
    for setting, keys in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for key in keys:
            if not any(_names(key, site.module) for site in sites):
                raise ValueError(
                    f"{setting} names {key}, and no adapted module's path ends so (the first is {sites[0].module}); "
                    "correct it, or widen target_modules"
                )
    out: list[Site] = []
    chosen: list[int] = []
    for site, r in zip(sites, ranks, strict=True):
        own = by_pattern(rank_pattern, site.module, r)
        if own > site.max_rank:
            raise ValueError(
                f"rank_pattern gives {site.module} r={own}, and its rank is at most {site.max_rank} "
                f"({site.in_features} inputs, {site.out_features} outputs); lower it"
            )
        alpha = by_pattern(alpha_pattern, site.module, site.scaling * r)
        is_own = own != r or any(_names(key, site.module) for key in alpha_pattern)
        out.append(replace(site, scaling=alpha / own) if is_own else site)
        chosen.append(own)
    return out, chosen


def _names(key: str, module: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({key})", module) is not None
    except re.error as error:
        raise ValueError(f"the pattern {key} is no regular expression ({error}); correct it") from error
