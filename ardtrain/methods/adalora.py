"""AdaLoRA (Zhang et al., arXiv 2303.10512): start with more components than wanted, mask the least important ones.

`W x + scaling * B diag(E) A x` with an orthogonality penalty on A and B. Only E is masked, so a masked component goes
on training and may come back until the mask is fixed; at the end masked components are removed. Formulas: methods.md
4.3, 2.2, 2.5. Steps and names follow PEFT's AdaLoRA; where we differ from it or from the authors' code it says so here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ardtrain import schedule
from ardtrain.methods.base import Binding, FixedRank, Needs, StateKind, Statistics
from ardtrain.methods.diagonal import diagonal_entries, first_rows, orthogonality_penalty
from ardtrain.methods.sensitivity import component_scores, observe_sensitivity
from ardtrain.methods.towers import parts_of, shares
from ardtrain.ranks import Integers, RankPlan, RankTable, Site, SiteChange, positions, prune_and_grow


@dataclass(frozen=True)
class AdaLoraSettings:
    """The method's block of the config, field for field (PEFT's names), and the run's length (PEFT's total_step).

    target_r: average rank of a site at the end; the first ranks are the run's (PEFT's init_r). tinit, tfinal, deltaT:
    optimizer steps. compact: when masked components are really removed, at the last step (end) or as soon as the mask
    is fixed (freeze: cheaper steps; the penalty no longer sees the masked rows of A and B). per_tower: each tower is
    masked by its own scores and ends with its share of the last budget, in proportion to its start (ours).
    """

    total_steps: int
    target_r: int
    tinit: int
    tfinal: int
    deltaT: int
    beta1: float
    beta2: float
    orth_reg_weight: float
    reg_orth_form: Literal["mean_norm", "squared"]
    compact: Literal["end", "freeze"]
    per_tower: bool = False


class AdaLora(FixedRank):
    """State: per-entry averages `mean` and `spread` of the sensitivity; `masked` [R], 1 where the fixed mask masks.

    Budget b(t) falls from the table's total b0 to bT = target_r * sites. Events, at steps t counted from 0:
    * tinit < t < T - tfinal and t % deltaT == 0 (PEFT and the authors): the b0 - b(t) lowest diagonals become 0;
    * t = T - tfinal (PEFT): the mask is fixed at bT. Here the last step fixes it where tfinal = 0, which PEFT never
      does, and the first valid step fixes it where that one was void;
    * every later step: the fixed mask once more, since the optimizer has moved the diagonals (PEFT, the authors).
    """

    needs = Needs(ranks=True)

    def __init__(self, settings: AdaLoraSettings) -> None:
        """Raises ValueError where tinit and tfinal leave no step between them."""
        self.settings = settings
        self._masked: list[int] = []  # the fixed mask as components of the table; empty before it is fixed
        self._budget(0, first=0, last=0)  # refuses phases that meet

    def entries(self, site: Site) -> Mapping[str, int]:
        return diagonal_entries(site)

    def init(
        self, site: Site, existing: Mapping[str, Tensor], count: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """A, B ~ N(0, 0.02), E = 0; only at the start, since nothing is born later."""
        return first_rows(site, count, generator)

    def state_tensors(self) -> Mapping[str, StateKind]:
        return {"mean": "per_entry", "spread": "per_entry", "masked": "per_component"}

    def bind(self, binding: Binding) -> None:
        """One host synchronisation.

        Raises:
            ValueError: target_r asks for more components than there are.
        """
        super().bind(binding)
        if self._target > binding.table.total:
            raise ValueError(
                f"adalora.target_r={self.settings.target_r} asks for {self._target} components over "
                f"{len(binding.table.sites)} sites, but the run starts with {binding.table.total}; lower "
                "adalora.target_r or raise r"
            )
        self._masked = torch.nonzero(binding.state["masked"]).flatten().tolist()
        self._pools = [Pool("", np.arange(binding.table.total), self._target)]
        if self.settings.per_tower:
            parts = parts_of(binding.table)
            last = shares([part.table.total for part in parts], self._target)
            self._pools = [Pool(f"{p.tower}.", p.components, n) for p, n in zip(parts, last, strict=True)]

    def extra_loss(self, views: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
        return orthogonality_penalty(views, weight=self.settings.orth_reg_weight, form=self.settings.reg_orth_form)

    def observe(self, step: int, statistics: Statistics) -> None:
        """Averages are kept until the final phase, also before tinit: the mask is fixed by frozen scores."""
        s = self.settings
        if step >= s.total_steps - s.tfinal:
            return
        observe_sensitivity(self.binding, statistics, beta1=s.beta1, beta2=s.beta2)

    @property
    def _target(self) -> int:
        """bT, in components."""
        return self.settings.target_r * len(self.binding.table.sites)

    @property
    def _fixing_step(self) -> int:
        return min(self.settings.total_steps - self.settings.tfinal, self.settings.total_steps - 1)

    def _budget(self, step: int, *, first: int, last: int) -> int:
        s = self.settings
        return schedule.falling_budget(
            step, first=first, last=last, total_steps=s.total_steps, tinit=s.tinit, tfinal=s.tfinal
        )

    def num_masked(self, step: int) -> int:
        """b0 - b(t): how many components a mask of this step masks.

        b0 is the table's total: until the components are removed that is the first one, then it is bT and this is 0.
        """
        return sum(self._num_masked(step, pool) for pool in self._pools)

    def _num_masked(self, step: int, pool: Pool) -> int:
        total, last = len(pool.components), pool.target
        return total - (last if step >= self._fixing_step else self._budget(step, first=total, last=last))

    def due(self, step: int) -> bool:
        event = step >= self._fixing_step or step % self.settings.deltaT == 0
        # Nothing to mask until tinit, nor ever where target_r is the first rank: there PEFT's kthvalue(k=0) fails.
        return event and self.num_masked(step) > 0

    def adapt_end(self) -> int:
        return self.settings.total_steps - self.settings.tfinal

    def local_scores(self, step: int) -> Tensor | None:
        """None once the mask is fixed: it needs none."""
        if self._masked:
            return None
        state, table = self.binding.state, self.binding.table
        return component_scores(self.binding.shard, state["mean"], state["spread"], table.total)

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        """A mask, or at the end the removal of what the fixed mask masks."""
        table, masked, again = self.binding.table, self._masked, bool(self._masked)
        numbers: dict[str, float] = {}
        if not again:
            assert scores is not None
            masked, numbers = self._lowest(step, scores)
        if step < self._fixing_step:
            return mask_plan(table, masked, scores=numbers)
        if step == self.settings.total_steps - 1 or self.settings.compact == "freeze":
            pairs = [(site, p) for site, places in by_site(table, masked).items() for p in places]
            reason = f"adalora: removed {len(pairs)} masked"
            return prune_and_grow(table, pairs, (), reason=reason, scores=numbers)
        if not again:
            self._masked = masked
            self.binding.state["masked"][masked] = 1.0
        return mask_plan(table, masked, scores=numbers, again=again)

    def _lowest(self, step: int, scores: Tensor) -> tuple[list[int], dict[str, float]]:
        """The components that a mask of this step masks, ascending, and the scores beside the cuts."""
        masked: list[int] = []
        numbers: dict[str, float] = {}
        for pool in self._pools:
            count = self._num_masked(step, pool)
            if count > 0:
                chosen, cut = lowest(scores[torch.from_numpy(pool.components)], count)
                masked += pool.components[chosen].tolist()
                numbers |= {pool.name + name: value for name, value in cut.items()}
        return sorted(masked), numbers


class Pool(NamedTuple):
    """What is masked by itself: all components, or a tower's. name: before its numbers; target: its last budget."""

    name: str
    components: Integers
    target: int


def lowest(scores: Tensor, count: int) -> tuple[list[int], dict[str, float]]:
    """The `count` components of lowest score, ascending by number, and the scores on both sides of the cut.

    Exactly `count`, by (score, site, position): the published threshold masks all that tie with it.

    Args:
        scores: [R] float64 on the host, in table order; 0 < count <= R.
    """
    ordered = torch.sort(scores, stable=True)
    values = ordered.values[count - 1 : count + 1].tolist()
    numbers = dict(zip(("highest_masked", "lowest_kept"), values, strict=False))
    return ordered.indices[:count].sort().values.tolist(), numbers


def by_site(table: RankTable, components: Sequence[int]) -> dict[int, list[int]]:
    """Site index -> positions in it, from components of the whole table in ascending order."""
    chosen = np.array(components, np.int64)
    sites, firsts = np.unique(table.owners[chosen], return_index=True)
    places = table.places[chosen].tolist()
    bounds = [*firsts.tolist(), len(places)]
    return {site: places[a:b] for site, a, b in zip(sites.tolist(), bounds, bounds[1:], strict=False)}


def mask_plan(table: RankTable, masked: Sequence[int], *, scores: Mapping[str, float], again: bool = False) -> RankPlan:
    """Sets the diagonals of these components to 0; no component leaves, no tensor changes its shape.

    again: the mask of the event before, after one more optimizer step.
    """
    changes = {
        site: SiteChange(keep=positions(table.ranks[site]), zero=tuple(places))
        for site, places in by_site(table, masked).items()
    }
    reason = f"adalora: masked {len(masked)}, budget {table.total - len(masked)}"
    return RankPlan(table.digest, changes, reason=reason, scores=scores, again=again)
