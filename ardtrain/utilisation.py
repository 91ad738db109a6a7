"""Model FLOP utilisation by the 4 N rule: of `ardtrain plan` and of a run's metrics.

A token costs 4 operations a number of the frozen base that multiplies it: 2 forward, 2 back to the inputs, none for
weights that are not trained. Attention, adapters and recomputation are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ardtrain.adapters import AdapterLinear
from ardtrain.dense import DenseLayer, DenseLinear
from ardtrain.quantized import QuantizedLinear


def matmul_numbers(model: nn.Module) -> int:
    """N: numbers that multiply each token: weights of linears, a tied output embedding among them.

    A convolution that cuts a picture into patches multiplies each of them once. A vision tower's numbers count for each
    token, also for those of text, which do not pass it.
    """
    modules = [m.layer if isinstance(m, DenseLayer) else m for m in model.modules()]
    kinds = nn.Linear | QuantizedLinear | AdapterLinear | DenseLinear
    linears = sum(m.in_features * m.out_features for m in modules if isinstance(m, kinds))
    # Not by the weight's size, which is 0 where ZeRO-3 has sharded it.
    return linears + sum(
        m.in_channels // m.groups * m.out_channels * math.prod(m.kernel_size)
        for m in modules
        if isinstance(m, nn.Conv2d)
    )


def mfu_4n(numbers: int, tokens_per_second: float, peak_flops: float) -> float:
    """Share of a GPU's peak. tokens_per_second: of that GPU."""
    return 4.0 * numbers * tokens_per_second / peak_flops


def utilisation(model: nn.Module, *, gpu: str, world_size: int) -> Callable[[float], float] | None:
    """What makes a share of the datasheet's dense bf16 speed of all processes' tokens per second.

    gpu: as CUDA names the device, alike for all processes. None: it is not in the plan's table.
    """
    from ardtrain.planning.hardware import gpu_of_device  # what plans need is not loaded for every run

    found = gpu_of_device(gpu)
    if found is None or found.flops is None:
        return None
    numbers, peak = matmul_numbers(model), found.flops
    return lambda tokens_per_second: mfu_4n(numbers, tokens_per_second / world_size, peak)
