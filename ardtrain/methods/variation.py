"""Total variation of ARD-LoRA's alphas, over time or over neighbours, with the l1 price as one proximal step.

The paper (arXiv 2506.18267) names l1 and total variation; over what the variation is taken could not be recovered
(methods.md 1.3 H4). Over time is the default. Over depth compares a matrix (or a layer) with the same one of the layer
before it, so alphas must be tied within it; over heads compares neighbouring heads.

Letters: P alphas.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TvForm = Literal["temporal", "temporal_l2", "depth", "heads"]


def alpha_step(
    alpha: Tensor,
    gradient: Tensor,
    *,
    rate: float,
    l1: float | Tensor,
    beta: float,
    form: TvForm,
    chains: Sequence[list[int]],
) -> Tensor:
    """[P] float64: change of alpha by one proximal step.

    Args:
        alpha, gradient: [P] float64. l1: the price, one or [P], alike within a chain; beta: the variation's weight
            beside it.
        chains: indices of neighbours in their order (`chains_of`), for depth and heads.
    """
    if form in ("temporal", "temporal_l2"):
        return proximal_step(gradient, rate=rate, l1=l1, beta=beta, form=form)
    wanted = alpha - rate * (gradient + l1)
    out, prices = wanted.clone(), torch.as_tensor(l1, dtype=torch.float64).expand(len(alpha))
    for chain in chains:
        out[chain] = smoothed(wanted[chain], rate * float(prices[chain[0]]) * beta)
    return out - alpha


def proximal_step(gradient: Tensor, *, rate: float, l1: float | Tensor, beta: float, form: str) -> Tensor:
    """Change of alpha: l1 price and total variation over time as one proximal step (methods.md H4).

    temporal: soft(-rate (g + l1), rate l1 beta), nothing moves unless |g + l1| > l1 beta. temporal_l2: the squared
    difference, -rate (g + l1) / (1 + rate l1 beta).
    """
    wanted = -rate * (gradient + l1)
    if form == "temporal_l2":
        return wanted / (1.0 + rate * l1 * beta)
    kept: Tensor = (wanted.abs() - rate * l1 * beta).clamp_min(0.0)
    return torch.sign(wanted) * kept


def smoothed(values: Tensor, weight: float) -> Tensor:
    """The minimum of `|x - values|^2 / 2 + weight * sum |x_i - x_(i-1)|` over one chain, float64.

    By its dual, a least squares problem in a box: x = values - D^T u with |u| <= weight. Exact up to rounding (scipy's
    bounded-variable least squares is an active set method), and the same on every process.
    """
    if weight == 0.0 or len(values) < 2:
        return values
    from scipy.optimize import lsq_linear  # type: ignore[import-untyped]  # a third of a second to import

    differences = torch.diff(torch.eye(len(values), dtype=torch.float64), dim=0)  # D [n - 1, n]
    dual = lsq_linear(differences.T.numpy(), values.numpy(), bounds=(-weight, weight), method="bvls", tol=1e-14)
    return values - differences.T @ torch.from_numpy(dual.x)


def chains_of(names: Sequence[str], form: TvForm) -> list[list[int]]:
    """Indices of alphas that are neighbours, in order; names: of the alphas, as ard_lora.tied_keys makes them.

    depth: the same path but for the layer's number, by that number. heads: the same path, by the head's number, which
    ends the name. Chains of one are left out.
    """
    pattern = {"depth": r"(.*?\.)(\d+)(.*)", "heads": r"(.*[:.])(\d+)()"}.get(form)
    if pattern is None:
        return []
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for index, name in enumerate(names):
        match = re.fullmatch(pattern, name)
        if match is not None and (form == "depth" or ":" in name):
            found.setdefault((match[1], match[3]), []).append((int(match[2]), index))
    return [[index for _, index in sorted(chain)] for chain in found.values() if len(chain) > 1]
