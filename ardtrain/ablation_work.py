"""Which ablations share a forward, and which process runs it: cut by the settings alone, alike on every one. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ardtrain.collectives import deal

WITHOUT, ONLY = 0, 1  # the two sides of CS: one component off in M, one component on in M_none


class Item(NamedTuple):
    """One forward: a chunk of ablations (none: M or M_none itself) of one side on one grain."""

    components: tuple[int, ...]
    side: int
    grain: int

    @property
    def copies(self) -> int:
        return max(1, len(self.components))


class Group(NamedTuple):
    """Items that start at the same decoder layer; None: whole forwards."""

    start: int | None
    items: tuple[Item, ...]


def cut_work(
    layer_of: Sequence[int | None],
    *,
    chosen: Sequence[int],
    num_grains: int,
    ablations_per_forward: int,
    alone: Collection[int] = (),
) -> list[Group]:
    """All forwards of one scoring; no function of the number of processes.

    First whole forwards (M, M_none, components outside the decoder layers), then layer by layer. Within a group the
    grain varies fastest, then the side, so that a process meets few of the 2 G starting states.

    Args:
        layer_of: [R] decoder layer of each component. chosen: the components to score. alone: those that share no
            forward.
    """
    by_start: dict[int | None, list[int]] = {None: []}
    for component in chosen:
        by_start.setdefault(layer_of[component], []).append(component)
    groups = []
    for start in sorted(by_start, key=lambda s: -1 if s is None else s):
        members, n = [c for c in by_start[start] if c not in alone], ablations_per_forward
        chunks = [tuple(members[i : i + n]) for i in range(0, len(members), n)]
        chunks += [(c,) for c in by_start[start] if c in alone]
        if start is None:
            chunks = [(), *chunks]
        items = tuple(Item(c, s, g) for c in chunks for s in (WITHOUT, ONLY) for g in range(num_grains))
        groups.append(Group(start, items))
    return groups


def lanes_of(groups: Sequence[Group], world_size: int, global_rank: int) -> list[tuple[int, int]]:
    """(side, grain) of the starting states one process needs, in order."""
    needed = {
        (group.items[index].side, group.items[index].grain)
        for group in groups
        if group.start is not None
        for index, _ in deal(len(group.items), world_size, global_rank)
    }
    return sorted(needed)
