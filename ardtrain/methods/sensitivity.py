"""Sensitivity scores of AdaLoRA (arXiv 2303.10512, section 3.2), used unchanged by ElaLoRA (2504.00254).

For each entry w with gradient g: I = |w g|; mean <- b1 mean + (1 - b1) I; spread <- b2 spread + (1 - b2) |I - mean|
with the new mean; score = mean * spread. Both start at 0, without bias correction. A component's score is its
diagonal's score plus the mean over its row of `lora_B` plus the mean over its row of `lora_A` (methods.md 2.2).

Letters: n entries of this process's shard, R components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ardtrain.methods.base import Binding, ShardView, Statistics


def update_averages(
    mean: Tensor, spread: Tensor, weights: Tensor, gradient: Tensor, *, beta1: float, beta2: float
) -> None:
    """One step of both averages, in place. All [n] float32; element-wise, so any partition gives the same bits."""
    importance = (weights * gradient).abs_()
    mean.mul_(beta1).add_(importance, alpha=1.0 - beta1)
    spread.mul_(beta2).add_((importance - mean).abs_(), alpha=1.0 - beta2)


def observe_sensitivity(binding: Binding, statistics: Statistics, *, beta1: float, beta2: float) -> None:
    """One step of the averages `mean` and `spread` that the loop keeps for this process's shard."""
    shard, state = binding.shard, binding.state
    weights, gradient = shard.take(statistics.weights), shard.take(statistics.gradient)
    update_averages(state["mean"], state["spread"], weights, gradient, beta1=beta1, beta2=beta2)


def component_scores(shard: ShardView, mean: Tensor, spread: Tensor, num_components: int) -> Tensor:
    """[R] float64 scores of the shard's components, zero elsewhere.

    Args:
        mean, spread: [n] float32 averages of the shard's entries.
    """
    scores = torch.zeros(num_components, dtype=torch.float64, device=mean.device)
    for (_, components, means), (_, _, spreads) in zip(shard.rows(mean), shard.rows(spread), strict=True):
        scores[components] += row_sums(means.double() * spreads.double()) / means.shape[1]
    return scores


def row_sums(values: Tensor) -> Tensor:
    """[rows] sums of [rows, columns] by a tree of element-wise additions.

    A reduction kernel may split a row differently when the number of rows changes (on GPUs it does), and that number
    depends on how components are dealt over the processes; element-wise additions cannot.
    """
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        folded = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat([folded, values[:, 2 * half :]], dim=1) if values.shape[1] % 2 else folded
    return values[:, 0]
