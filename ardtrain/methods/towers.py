"""One budget over all towers of a model, or one for each: which part of a table is allocated by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ardtrain.ranks import Integers, RankPlan, RankTable, SiteChange, Sites


class Part(NamedTuple):
    """A tower's part of a table. sites, components: their indices in the whole table, ascending."""

    tower: str
    sites: Integers
    components: Integers
    table: RankTable


def parts_of(table: RankTable) -> list[Part]:
    """The towers of a table, in the order of their first sites."""
    towers = np.array([site.tower for site in table.sites])
    out = []
    for tower in dict.fromkeys(towers.tolist()):
        sites = np.flatnonzero(towers == tower)
        components = np.flatnonzero(towers[table.owners] == tower)
        own = RankTable(
            Sites(table.sites[i] for i in sites),
            table.rank_array[sites],
            table.birth_array[components],
            table.next_birth_array[sites],
        )
        out.append(Part(tower, sites, components, own))
    return out


def allocate_by(
    table: RankTable, allocate: Callable[[RankTable, Integers], RankPlan | None], *, per_tower: bool
) -> RankPlan | None:
    """One plan for the whole table, or the plans of its towers, each made as if the tower stood alone, as one.

    Args:
        allocate: (a table, the indices of its components in the whole one) -> its plan; None where nothing changes.
    """
    if not per_tower:
        return allocate(table, np.arange(table.total))
    changes: dict[int, SiteChange] = {}
    reasons: list[str] = []
    scores: dict[str, float] = {}
    for part in parts_of(table):
        plan = allocate(part.table, part.components)
        if plan is not None:
            changes |= {int(part.sites[i]): change for i, change in plan.changes.items()}
            reasons.append(f"{part.tower}: {plan.reason}")
            scores |= {f"{part.tower}.{name}": value for name, value in plan.scores.items()}
    return RankPlan(table.digest, changes, reason="; ".join(reasons), scores=scores) if changes else None


def shares(totals: list[int], target: int) -> list[int]:
    """Whole parts of `target` in proportion to `totals`, by largest remainder; equal remainders in their order."""
    whole = [n * target // sum(totals) for n in totals]
    by_remainder = sorted(range(len(totals)), key=lambda i: -(totals[i] * target % sum(totals)))
    for i in by_remainder[: target - sum(whole)]:
        whole[i] += 1
    return whole
