"""Probe growth (ours; methods.md 8): a component is born where a silent probe hears a gradient above its own noise.

`W x + scaling * B A x`, plain LoRA's form. Ranks move between sites from one pool: the least used components leave, and
as many are born along the directions that probes found (`probing.py`). A site may lose all its components, and gain
some again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ardtrain.methods.base import Binding, Needs, SecondMoment, StateKind, Statistics
from ardtrain.methods.lora import Lora
from ardtrain.methods.probing import Candidates, Prober
from ardtrain.methods.sensitivity import component_scores, observe_sensitivity, row_sums
from ardtrain.methods.towers import allocate_by
from ardtrain.ranks import Integers, RankPlan, RankTable, Site, prune_and_grow
from ardtrain.schedule import MoveSchedule


@dataclass(frozen=True)
class ProbeLoraSettings(MoveSchedule):
    """The method's block of the config, field for field, and the run's length. b and the schedule: as ElaLoRA's.

    target_r: average rank of a site after the last event, to which the budget goes from the start's; None: that.
    per_tower: each tower keeps its share of the budget and has its own b.
    """

    probes: Literal["ride", "separate"]
    probe_components: int
    probe_steps: int
    prune_by: Literal["gate", "sensitivity"]
    budget_in: Literal["components", "parameters"]
    newborn_immunity: bool
    beta: float
    newborn_second_moment: SecondMoment = "zero"
    target_r: float | None = None
    per_tower: bool = False

    def due(self, step: int) -> bool:
        """Is there an event after this step? With target_r the budget has moved, whatever b has fallen to."""
        return self.is_event(step) if self.target_r is not None else self.amount(step) > 0


class ProbeLora(Lora):
    """State: the probes' sums; `gate` [R], an average of squared gate gradients, or ElaLoRA's two averages by entry."""

    def __init__(self, settings: ProbeLoraSettings, table: RankTable) -> None:
        """table: the run's first; its numbers are the budget where parameters are counted."""
        s = self.settings = settings
        self.needs = Needs(ranks=True, newborn_second_moment=s.newborn_second_moment)
        self.probes = self._prober = Prober(
            table.sites, count=s.probe_components, rounds=s.probe_steps, ride=s.probes == "ride", due=s.due
        )
        self._costs = np.array([site.in_features + site.out_features for site in table.sites], np.int64)
        self._first = table
        self._factor = 1.0 if s.target_r is None else s.target_r * len(table.sites) / table.total
        self._directions: dict[str, Tensor] = {}  # of the plan that is being applied

    def init(
        self, site: Site, existing: Mapping[str, Tensor], count: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """A along the site's found directions (unit norm), B = 0; at the start as LoRA."""
        rows = dict(super().init(site, existing, count, generator))
        found = self._directions.get(site.name)
        if found is not None:
            rows["lora_A"] = found[:count].clone()
        return rows

    def state_tensors(self) -> Mapping[str, StateKind]:
        own: dict[str, StateKind] = {"mean": "per_entry", "spread": "per_entry"}
        if self.settings.prune_by == "gate":
            own = {"gate": "per_component"}
        return {**own, **self._prober.state_tensors()}

    def bind(self, binding: Binding) -> None:
        super().bind(binding)
        self._prober.bind(binding)
        self._directions = {}

    def observe(self, step: int, statistics: Statistics) -> None:
        s = self.settings
        if step >= s.adapt_end:
            return
        if s.prune_by == "sensitivity":
            observe_sensitivity(self.binding, statistics, beta1=s.beta, beta2=s.beta)
            return
        whole, gate = self.binding.whole, self.binding.state["gate"]
        assert whole is not None
        gate.mul_(s.beta)
        of_weights, of_gradient = (whole.rows(whole.take(t)) for t in (statistics.weights, statistics.gradient))
        for (part, components, rows), (_, _, gradients) in zip(of_weights, of_gradient, strict=True):
            if part == "lora_B":  # sum over outputs of B dL/dB: the gradient of a gate on the component
                gate[components] += (1.0 - s.beta) * row_sums(rows * gradients).double().square()

    def due(self, step: int) -> bool:
        return self.settings.due(step)

    def adapt_end(self) -> int:
        return self.settings.adapt_end

    def local_scores(self, step: int) -> Tensor | None:
        state, shard, total = self.binding.state, self.binding.shard, self.binding.table.total
        if self.settings.prune_by == "sensitivity":
            return component_scores(shard, state["mean"], state["spread"], total)
        own = torch.zeros_like(state["gate"])
        own[shard.start : shard.stop] = state["gate"][shard.start : shard.stop]
        return own

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        assert scores is not None
        found = self._prober.candidates(step)
        if found is None:
            return None
        s, table, values = self.settings, self.binding.table, scores.numpy()
        immune = (self.binding.age.cpu() <= s.mask_interval).numpy() if s.newborn_immunity else None
        places = {site.name: index for index, site in enumerate(table.sites)}

        def allocate(part: RankTable, own: Integers) -> RankPlan | None:
            sites = np.array([places[site.name] for site in part.sites])
            costs = self._costs[sites] if s.budget_in == "parameters" else np.ones(len(sites), np.int64)
            start = int(costs @ self._first.rank_array[sites])
            return exchange(
                part,
                values[own],
                found.of(sites),
                n=s.amount(step),
                limit=round(start * (1.0 + (self._factor - 1.0) * s.progress(step))),
                immune=None if immune is None else immune[own],
                costs=costs,
            )

        plan = allocate_by(table, allocate, per_tower=s.per_tower)
        grown = {} if plan is None else {i for i, change in plan.changes.items() if change.born}
        self._directions = {table.sites[i].name: found.rows[i] for i in grown}
        return plan


def exchange(
    table: RankTable,
    scores: Sequence[float] | NDArray[np.float64],
    found: Candidates,
    *,
    n: int,
    limit: int,
    immune: NDArray[np.bool_] | None = None,
    costs: NDArray[np.int64] | None = None,
) -> RankPlan | None:
    """One event: the lowest components leave, the best candidates are born in their place; None if nothing moves.

    n leave, and as many more as the table has beyond `limit`; births fill it up to the limit. What no candidate with
    signal takes the place of stays, the best first. Both lists go by the value of a component for its cost, ties by
    (site, position). No site gains beyond its largest rank.

    Args:
        scores: [R] in table order; immune: [R], components that may not leave.
        costs: [S] of a component, 1 for each if None; limit: what all may cost.
    """
    price = np.ones(len(table.sites), np.int64) if costs is None else costs
    values, gains = np.asarray(scores, np.float64) / price[table.owners], found.scores / price[found.owners]
    free = np.arange(table.total) if immune is None else np.flatnonzero(~immune)
    ordered = free[np.argsort(values[free], kind="stable")]
    over = int(price @ table.rank_array) - limit
    beyond = np.cumsum(price[table.owners[ordered[n:]]])
    leaving = ordered[: n + (int(np.searchsorted(beyond, over)) + 1 if over > 0 else 0)].tolist()
    ranks = table.rank_array.copy()
    np.subtract.at(ranks, table.owners[leaving], 1)
    most = table.sites.max_ranks
    room = limit - int(price @ ranks)
    grown: list[int] = []
    lowest = 0.0
    for place in np.argsort(-gains, kind="stable").tolist():
        index = int(found.owners[place])
        if gains[place] <= 0.0 or room < int(price.min()):
            break
        if ranks[index] < most[index] and price[index] <= room:
            grown.append(index)
            ranks[index] += 1
            room -= int(price[index])
            lowest = float(found.scores[place])
    for component in reversed(list(leaving)):
        index = int(table.owners[component])
        if price[index] <= room and ranks[index] < most[index]:
            leaving.remove(component)
            ranks[index] += 1
            room -= int(price[index])
    if not grown and not leaving:
        return None
    numbers = {"lowest_born": lowest, "highest_candidate": float(found.scores.max())}
    if leaving:
        numbers["highest_pruned"] = float(np.asarray(scores, np.float64)[leaving[-1]])
    return prune_and_grow(
        table,
        zip(table.owners[leaving].tolist(), table.places[leaving].tolist(), strict=True),
        grown,
        reason=f"probe_lora: pruned {len(leaving)}, grew {len(grown)}",
        scores=numbers,
    )
