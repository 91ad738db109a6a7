"""The form that AdaLoRA (arXiv 2303.10512) and ElaLoRA (2504.00254) share: `W x + scaling * B diag(E) A x`.

With a penalty that keeps the rows of A and of B near an orthonormal set. methods.md 2.1, 2.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ardtrain.ranks import Site

INIT_STD = 0.02  # of A and B in the authors' code
PenaltyForm = Literal["mean_norm", "squared"]


def diagonal_entries(site: Site) -> dict[str, int]:
    """A component's numbers: its rows of A and B, and its number of the diagonal."""
    return {"lora_A": site.in_features, "lora_B": site.out_features, "diagonal": 1}


def first_rows(site: Site, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A, B ~ N(0, 0.02) and E = 0, by part [count, columns]."""
    a = torch.empty(count, site.in_features).normal_(0.0, INIT_STD, generator=generator)
    b = torch.empty(count, site.out_features).normal_(0.0, INIT_STD, generator=generator)
    return {"lora_A": a, "lora_B": b, "diagonal": torch.zeros(count, 1)}


def orthogonality_penalty(
    views: Mapping[str, Mapping[str, Tensor]], *, weight: float, form: PenaltyForm
) -> Tensor | None:
    """weight * `orthogonality` of all A and B; None for weight 0."""
    if weight == 0.0:
        return None
    matrices = [parts[name] for parts in views.values() for name in ("lora_A", "lora_B") if name in parts]
    return weight * orthogonality(matrices, form=form)


def orthogonality(matrices: Sequence[Tensor], *, form: Literal["mean_norm", "squared"]) -> Tensor:
    """Distance of the rows of each [R, columns] matrix from an orthonormal set, as one scalar.

    mean_norm: mean over matrices of ||M M^T - I||_F (the authors' code). squared: sum of ||M M^T - I||_F^2 (the paper's
    form). methods.md 2.5.
    """
    residuals = [m @ m.T - torch.eye(len(m), dtype=m.dtype, device=m.device) for m in matrices if len(m)]
    if not residuals:
        return torch.zeros(())
    if form == "squared":
        return torch.stack([(r * r).sum() for r in residuals]).sum()
    return torch.stack([torch.linalg.vector_norm(r) for r in residuals]).mean()
