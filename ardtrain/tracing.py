"""Names for the parts of a step in a profile (benchmarks/step.py --trace); they cost nothing while no profiler runs."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

PREFIX = "ardtrain/"
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def part(name: str) -> AbstractContextManager[object]:
    """What runs inside is one part of the step in a profile; parts may stand inside each other."""
    # record_function takes microseconds even when nobody listens, and an adapter has several parts.
    return record_function(PREFIX + name) if torch.autograd.profiler._is_profiler_enabled else _NOTHING
