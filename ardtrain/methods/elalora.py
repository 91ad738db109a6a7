"""ElaLoRA (Chang et al., arXiv 2504.00254): prune the least important components, expand the most important sites.

`W x + scaling * B diag(E) A x` with an orthogonality penalty on A and B. Ranks move between sites from one pool, so the
total is conserved. Formulas: methods.md 2.1 to 2.5; where we differ from the published code (2.4, 2.8) it says so here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ardtrain.methods.base import FixedRank, Needs, SecondMoment, StateKind, Statistics
from ardtrain.methods.diagonal import diagonal_entries, first_rows, orthogonality_penalty
from ardtrain.methods.sensitivity import component_scores, observe_sensitivity
from ardtrain.methods.towers import allocate_by
from ardtrain.ranks import Integers, RankPlan, RankTable, Site, prune_and_grow
from ardtrain.schedule import MoveSchedule


@dataclass(frozen=True)
class ElaLoraSettings(MoveSchedule):
    """The method's block of the config, field for field, and the run's length.

    k: most components moved per site in one event. per_tower: each tower keeps its total and has its own b.
    """

    k: int
    beta1: float
    beta2: float
    reg_orth_coef: float
    reg_orth_form: Literal["mean_norm", "squared"]
    allow_swap: bool
    newborn_immunity: bool
    newborn_norm: Literal["mean", "unit"]
    newborn_second_moment: SecondMoment = "survivors"
    per_tower: bool = False


class ElaLora(FixedRank):
    """State: per-entry averages `mean` and `spread` of the sensitivity."""

    def __init__(self, settings: ElaLoraSettings) -> None:
        self.settings = settings
        self.needs = Needs(ranks=True, newborn_second_moment=settings.newborn_second_moment)

    def entries(self, site: Site) -> Mapping[str, int]:
        return diagonal_entries(site)

    def init(
        self, site: Site, existing: Mapping[str, Tensor], count: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """At the start A, B ~ N(0, 0.02) and E = 0; later vectors orthogonal to the survivors, E = 0.

        Ours: a QR projection, which makes cosines 1e-8 where the published `v - A^T A v` leaves 0.16; norm = mean norm
        of the survivors (`newborn_norm: unit` for the published 1); E exactly 0 (published: 1e-13).
        """
        rows = first_rows(site, count, generator)
        if len(existing["diagonal"]):
            for part in ("lora_A", "lora_B"):
                rows[part] = self._orthogonal(rows[part], existing[part])
        return rows

    def _orthogonal(self, rows: Tensor, existing: Tensor) -> Tensor:
        """[count, columns]: rows made orthogonal to `existing` [r, columns] and to each other. float64 inside."""
        stacked = torch.cat([existing, rows]).double().T  # [columns, r + count]
        basis: Tensor = torch.linalg.qr(stacked).Q[:, len(existing) :].T
        norm = existing.double().norm(dim=1).mean() if self.settings.newborn_norm == "mean" else 1.0
        return (basis * norm).float()

    def state_tensors(self) -> Mapping[str, StateKind]:
        return {"mean": "per_entry", "spread": "per_entry"}

    def extra_loss(self, views: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
        return orthogonality_penalty(views, weight=self.settings.reg_orth_coef, form=self.settings.reg_orth_form)

    def observe(self, step: int, statistics: Statistics) -> None:
        """Averages are kept until the final phase, also during warm-up (methods.md 2.3)."""
        s = self.settings
        if step >= s.total_steps - s.final_warmup:
            return
        observe_sensitivity(self.binding, statistics, beta1=s.beta1, beta2=s.beta2)

    def due(self, step: int) -> bool:
        return self.settings.amount(step) > 0

    def adapt_end(self) -> int:
        return self.settings.adapt_end

    def local_scores(self, step: int) -> Tensor | None:
        state, table = self.binding.state, self.binding.table
        return component_scores(self.binding.shard, state["mean"], state["spread"], table.total)

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        assert scores is not None
        s, values = self.settings, scores.numpy()
        immune = (self.binding.age.cpu() <= s.mask_interval).numpy() if s.newborn_immunity else None

        def allocate(table: RankTable, own: Integers) -> RankPlan | None:
            kept = None if immune is None else immune[own]
            return reallocate(table, values[own], b=s.amount(step), k=s.k, allow_swap=s.allow_swap, immune=kept)

        return allocate_by(self.binding.table, allocate, per_tower=s.per_tower)


def reallocate(
    table: RankTable,
    scores: Sequence[float] | NDArray[np.float64],
    *,
    b: int,
    k: int,
    allow_swap: bool = True,
    immune: Sequence[bool] | NDArray[np.bool_] | None = None,
) -> RankPlan | None:
    """One event: prune the b least important of the pool, grow where the pool's b most important stand.

    Pool: each site's min(k, r - 1) lowest components, so one always survives. Exactly b are pruned: by (score, site,
    position), stable; the published threshold removes more when scores tie (methods.md 2.4, defect 4). A site at its
    largest rank cannot grow; the next of the pool does. The total is conserved: as many leave as join.

    Args:
        scores: [R] in table order. immune: [R], newborn components that may not be pruned for one interval (ours, 2.8).
        allow_swap: may a site lose and gain in one event (published: yes)?
    """
    values = np.asarray(scores, np.float64)
    free = np.arange(table.total) if immune is None else np.flatnonzero(~np.asarray(immune, bool))
    # By site, then score, then position; of each site the first min(k, r - 1) are the pool.
    ordered = free[np.lexsort((values[free], table.owners[free]))]
    owners = table.owners[ordered]
    place = np.arange(len(ordered)) - np.searchsorted(owners, owners)
    pool = ordered[place < np.minimum(k, table.rank_array - 1)[owners]]
    ascending = pool[np.argsort(values[pool], kind="stable")]  # equal scores in the order of (site, position)
    descending = pool[np.argsort(-values[pool], kind="stable")]
    pruned = ascending[:b]
    lost = Counter(table.owners[pruned].tolist())
    grown: list[int] = []
    joined: Counter[int] = Counter()
    for index in table.owners[descending].tolist():
        if len(grown) == len(pruned):
            break
        room = table.sites[index].max_rank - table.ranks[index] + lost[index] - joined[index]
        if room > 0 and (allow_swap or index not in lost):
            grown.append(index)
            joined[index] += 1
    pruned = pruned[: len(grown)]
    if not len(pruned):
        return None
    numbers = {"highest_pruned": float(values[pruned[-1]])}
    if len(ascending) > len(pruned):
        numbers["lowest_kept"] = float(values[ascending[len(pruned)]])
    return prune_and_grow(
        table,
        zip(table.owners[pruned].tolist(), table.places[pruned].tolist(), strict=True),
        grown,
        reason=f"elalora: pruned {len(pruned)}, grew {len(grown)}",
        scores=numbers,
    )
