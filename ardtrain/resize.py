"""One resize on one page: decide (by the method) -> agree -> capture -> repack -> rebuild.

Resume, and starting from a checkpoint of another world size, enter the same road at *rebuild* with the identity plan.
All of it happens on every process or on none: what can fail (a bad plan, memory) fails before the old engine goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ardtrain.arena import (
    ArenaLayout,
    Newborn,
    Repacking,
    Shard,
    fill_newborn,
    fill_newborn_second_moment,
    repack_components,
)
from ardtrain.collectives import World
from ardtrain.engines import AdamSettings, AdapterEngine, FullState
from ardtrain.methods.base import Binding, Method, StateKind
from ardtrain.ranks import Dense, RankPlan, RankTable


@dataclass
class Snapshot:
    """Everything trained, as full tensors on the host: what a checkpoint holds and a resize turns.

    full: master and moments [N]; age: [R] int64; entries: the method's per-entry arrays [N] by name;
    components: its per-component arrays [R, ...]; sites: its arrays that no resize changes, by name.
    """

    table: RankTable
    full: FullState
    age: Tensor
    entries: dict[str, Tensor] = field(default_factory=dict)
    components: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, Tensor] = field(default_factory=dict)


def repack_snapshot(
    snapshot: Snapshot, old: ArenaLayout, plan: RankPlan, newborn: Newborn, *, seed: int, step: int
) -> tuple[Snapshot, ArenaLayout]:
    """The snapshot after the plan, and its layout. Pure.

    Survivors keep master, moments, age and statistics to the bit. Newborn: weights from the method (contribution
    exactly zero), first moment 0, second moment the mean of their site's survivors, age and statistics 0.
    """
    table = plan.apply(snapshot.table)
    layout = ArenaLayout(table, old.parts, old.dense)
    repacking = Repacking(old, layout)
    born = repacking.source < 0
    master = repacking.apply(snapshot.full.master)
    fill_newborn(master, layout, born, newborn, seed=seed, step=step)
    exp_avg_sq = repacking.apply(snapshot.full.exp_avg_sq)
    fill_newborn_second_moment(exp_avg_sq, layout, born)
    edit_survivors(master, layout, plan)
    full = FullState(master, repacking.apply(snapshot.full.exp_avg), exp_avg_sq, snapshot.full.steps)
    return (
        Snapshot(
            table,
            full,
            repack_components(snapshot.age, repacking.source),
            {name: repacking.apply(values) for name, values in snapshot.entries.items()},
            {name: repack_components(v, repacking.source) for name, v in snapshot.components.items()},
            dict(snapshot.sites),
        ),
        layout,
    )


def edit_survivors(master: Tensor, layout: ArenaLayout, plan: RankPlan) -> None:
    """`zero` and `fold` of a plan, in place, on weights that are laid out as after the plan; moments stay.

    A position that leaves is not edited.
    """
    for index, change in plan.changes.items():
        if not (change.zero or change.fold):
            continue
        where = {p: i for i, p in enumerate(change.keep)}
        rows = layout.site_rows(master, index)
        zeroed = [where[p] for p in change.zero if p in where]
        if zeroed:
            rows["diagonal"][zeroed] = 0.0
        for position, part, factors in change.fold:
            if position in where:
                row = rows[part][where[position]]
                row.view(len(factors), -1).mul_(row.new_tensor(factors)[:, None])


def start_snapshot(
    table: RankTable,
    layout: ArenaLayout,
    newborn: Newborn,
    *,
    seed: int,
    dense: Mapping[tuple[str, str], Tensor] | None = None,
    rows: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Snapshot:
    """A run's first snapshot: every component newborn at step -1, moments zero.

    Args:
        dense: first values of the dense entries by (module, part). rows: first rows by site name and part [r, columns]
            where an adapter gives them.
    """
    master = torch.zeros(layout.size)
    fill_newborn(master, layout, torch.ones(table.total, dtype=torch.bool), newborn, seed=seed, step=-1)
    for index, site in enumerate(table.sites):
        for part, values in (rows or {}).get(site.name, {}).items():
            layout.site_rows(master, index)[part].copy_(values)
    for entry, block in zip(layout.dense, layout.all_blocks[len(layout.blocks) :], strict=True):
        block.of(master).copy_((dense or {})[entry.module, entry.part].view(entry.rows, entry.columns))
    zeros = torch.zeros(layout.size)
    return Snapshot(table, FullState(master, zeros, zeros.clone(), 0), torch.zeros(table.total, dtype=torch.int64))


@dataclass(frozen=True)
class ResizeRecord:
    """What one event did: for ranks.jsonl. seconds: by cause, in the order they happened."""

    before: RankTable
    after: RankTable
    plan: RankPlan
    seconds: dict[str, float]


def state_length(kind: StateKind, table: RankTable) -> int:
    """Numbers of a method's array that is not kept by entry."""
    if isinstance(kind, int):
        return kind
    return table.total if kind == "per_component" else len(table.sites)


class LiveArena:
    """The arena in training: rank table, layout, adapter engine, ages and the method's state tensors.

    Every process calls every method of it. After `start`, `build` and `apply` the adapters' views are stale: the loop
    binds them anew each step, and drops them before `apply`, so that the old arena can be freed.
    """

    def __init__(
        self,
        method: Method,
        *,
        world: World,
        engine_config: Mapping[str, Any],
        adam: AdamSettings,
        seed: int,
        dense: Sequence[Dense] = (),
    ) -> None:
        self.method, self.world, self.seed, self.dense = method, world, seed, tuple(dense)
        self._engine_config, self._adam = dict(engine_config), adam
        self.engine: AdapterEngine

    def start(
        self,
        table: RankTable,
        dense: Mapping[tuple[str, str], Tensor] | None = None,
        rows: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Builds a run's first arena; dense, rows: as `start_snapshot` takes them."""
        layout = ArenaLayout(table, self.method.entries, self.dense)
        snapshot = start_snapshot(table, layout, self.method.init, seed=self.seed, dense=dense, rows=rows)
        for name, kind in self.method.state_tensors().items():
            if kind == "per_entry":
                snapshot.entries[name] = torch.zeros(layout.size)
            elif kind == "per_component":
                snapshot.components[name] = torch.zeros(table.total, dtype=torch.float64)
            else:
                snapshot.sites[name] = torch.zeros(state_length(kind, table), dtype=torch.float64)
        self.build(snapshot, layout)

    def build(self, snapshot: Snapshot, layout: ArenaLayout) -> None:
        """Makes the engine and writes everything trained into it. A checkpoint load enters here."""
        device = self.world.device
        self.table, self.layout = snapshot.table, layout
        self.engine = AdapterEngine(snapshot.full.master, config=self._engine_config, adam=self._adam, device=device)
        self.engine.restore(snapshot.full)
        self.shard = Shard(layout, self.world.global_rank, self.world.world_size)
        self.age = snapshot.age.clone()
        state = {name: self.shard.take(full).clone().to(device) for name, full in snapshot.entries.items()}
        state |= {name: values.clone().to(device) for name, values in snapshot.components.items()}
        state |= {name: values.clone() for name, values in snapshot.sites.items()}  # few: they stay on the host
        self.state = state
        self.method.bind(Binding(self.table, self.shard, self.age, self.state))

    def capture(self) -> Snapshot:
        """Full tensors of everything trained, on the host, the same on every process."""
        kinds = self.method.state_tensors()
        entries = {}
        for name in (n for n, kind in kinds.items() if kind == "per_entry"):
            full = torch.zeros(self.layout.size, device=self.world.device)
            self.shard.put(self.state[name], full)
            entries[name] = self.world.merge(full).cpu()
        return Snapshot(
            self.table,
            self.engine.capture(),
            self.age.clone(),
            entries,
            {n: self.state[n].cpu().clone() for n, kind in kinds.items() if kind == "per_component"},
            {n: self.state[n].clone() for n, kind in kinds.items() if kind == "per_site" or isinstance(kind, int)},
        )

    def scores(self, step: int) -> Tensor | None:
        """[R] float64 on the host: every component's score, gathered from the process that keeps it."""
        local = self.method.local_scores(step)
        return None if local is None else self.world.merge(local).cpu()

    def apply(self, plan: RankPlan, *, step: int) -> ResizeRecord:
        """One resize. Raises RuntimeError on every process when they disagree, before anything is changed."""
        seconds: dict[str, float] = {}
        with _timed(seconds, "agree"):
            self.world.agree("rank plan", plan.digest, step=step)
        before = self.table
        if not plan.reshapes(before):
            with _timed(seconds, "edit"):
                plan.apply(before)  # checks it
                weights = self.engine.weights.clone()
                edit_survivors(weights, self.layout, plan)
                self.engine.set_weights(weights)
            return ResizeRecord(before, before, plan, seconds)
        with _timed(seconds, "capture"):
            snapshot = self.capture()
        with _timed(seconds, "repack"):
            snapshot, layout = repack_snapshot(snapshot, self.layout, plan, self.method.init, seed=self.seed, step=step)
        with _timed(seconds, "destroy"):
            self.engine.destroy()
        with _timed(seconds, "rebuild"):
            self.build(snapshot, layout)
        return ResizeRecord(before, self.table, plan, seconds)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
