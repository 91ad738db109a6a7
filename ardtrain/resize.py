"""One resize on one page: decide (by the method) -> agree -> gather and repack, array by array -> rebuild.

Resume, and starting from a checkpoint of another world size, enter the same road at *rebuild* with the identity plan.
All of it happens on every process or on none: what can fail (a bad plan, newborn) fails before an old array is lost.
"""

from __future__ import annotations

import contextlib
import gc
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
    Spares,
    fill_newborn,
    fill_newborn_second_moment,
    repack_components,
)
from ardtrain.collectives import World
from ardtrain.engines import MOMENTS, AdamSettings, AdapterEngine, FullState
from ardtrain.methods.base import Binding, Method, SecondMoment, StateKind
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


class Turn:
    """One plan applied to one array after another, each by one pass into a spare or new memory; arrays may be live.

    Survivors keep master, moments, age and statistics to the bit (-0.0 becomes 0.0). Newborn: weights from the method
    (contribution exactly zero), first moment 0, second moment the mean of their site's survivors or 0, age and
    statistics 0.
    """

    def __init__(
        self, table: RankTable, old: ArenaLayout, plan: RankPlan, newborn: Newborn, *, seed: int, step: int,
        second_moment: SecondMoment = "survivors",
    ) -> None:  # fmt: skip
        """second_moment: of the newborn. Raises ValueError where the plan does not fit the table."""
        self.table = plan.apply(table)
        self.layout = ArenaLayout(self.table, old.parts, old.dense)
        self._repacking = Repacking(old, self.layout)
        self._born = self._repacking.source < 0
        self.spares = Spares()
        self._second_moment = second_moment
        self._plan, self._newborn, self._names = plan, newborn, {"seed": seed, "step": step}

    def master(self, flat: Tensor) -> Tensor:
        """[N_new] from the weights [N_old]."""
        out = self._repacking.apply(flat, self.spares)
        fill_newborn(out, self.layout, self._born, self._newborn, **self._names)
        edit_survivors(out, self.layout, self._plan)
        return out

    def moment(self, name: str, flat: Tensor) -> Tensor:
        """[N_new] from one of Adam's moments [N_old]."""
        out = self._repacking.apply(flat, self.spares)
        if name == "exp_avg_sq" and self._second_moment == "survivors":
            fill_newborn_second_moment(out, self.layout, self._born)
        return out

    def entries(self, flat: Tensor) -> Tensor:
        """[N_new] from a method's per-entry array [N_old]; what lies behind its last component may be missing."""
        return self._repacking.apply(flat, self.spares)

    def components(self, values: Tensor) -> Tensor:
        """[R_new, ...] from ages or a method's per-component array [R_old, ...]."""
        return repack_components(values, self._repacking.source)


def repack_snapshot(
    snapshot: Snapshot, old: ArenaLayout, plan: RankPlan, newborn: Newborn, *, seed: int, step: int
) -> tuple[Snapshot, ArenaLayout]:
    """The snapshot after the plan, and its layout: `Turn` applied to all of it. Pure."""
    turn = Turn(snapshot.table, old, plan, newborn, seed=seed, step=step)
    exp_avg, exp_avg_sq = (turn.moment(name, getattr(snapshot.full, name)) for name in MOMENTS)
    full = FullState(turn.master(snapshot.full.master), exp_avg, exp_avg_sq, snapshot.full.steps)
    return (
        Snapshot(
            turn.table,
            full,
            turn.components(snapshot.age),
            {name: turn.entries(values) for name, values in snapshot.entries.items()},
            {name: turn.components(values) for name, values in snapshot.components.items()},
            dict(snapshot.sites),
        ),
        turn.layout,
    )


def edit_survivors(master: Tensor, layout: ArenaLayout, plan: RankPlan) -> None:
    """`zero` and `fold` of a plan, in place, on weights that are laid out as after the plan; moments stay.

    A position that leaves is not edited.
    """
    zeroed: list[int] = []
    for index, change in plan.changes.items():
        if not (change.zero or change.fold):
            continue
        site = layout.table.sites[index]
        where = {p: i for i, p in enumerate(change.keep, layout.table.offsets[index])}
        zeroed += [where[p] for p in change.zero if p in where]
        for position, part, factors in change.fold:
            if position in where:
                start = int(layout.row_starts(part)[where[position]])
                row = master[start : start + layout.parts(site)[part]]
                row.view(len(factors), -1).mul_(row.new_tensor(factors)[:, None])
    if zeroed:  # a diagonal's row is one number
        master[torch.from_numpy(layout.row_starts("diagonal")[zeroed]).to(master.device)] = 0.0


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
        """Makes the engine and writes a copy of everything trained into it. A checkpoint load enters here."""
        device, full = self.world.device, snapshot.full
        self.table, self.layout = snapshot.table, layout
        self._make_engine(full.master.clone())
        self.engine.set_moments({name: getattr(full, name).clone() for name in MOMENTS}, full.steps)
        self.shard = self._deal(layout)
        state = {name: self._own(self.shard, values.to(device)).clone() for name, values in snapshot.entries.items()}
        state |= {name: values.clone().to(device) for name, values in snapshot.components.items()}
        state |= {name: values.clone() for name, values in snapshot.sites.items()}  # few: they stay on the host
        self._bind(snapshot.age.clone(), state)

    def _make_engine(self, master: Tensor) -> None:
        self.engine = AdapterEngine(master, config=self._engine_config, adam=self._adam, device=self.world.device)

    def _deal(self, layout: ArenaLayout) -> Shard:
        return Shard(layout, self.world.global_rank, self.world.world_size)

    def _own(self, shard: Shard, full: Tensor) -> Tensor:
        """This process's part [n] of a per-entry array [N]; the array itself where one process holds it all."""
        own = shard.take(full)
        return own if self.world.world_size == 1 else own.clone()

    def _bind(self, age: Tensor, state: dict[str, Tensor]) -> None:
        self.age, self.state = age, state
        whole = self.shard if self.world.world_size == 1 else Shard(self.layout, 0, 1)
        self.method.bind(Binding(self.table, self.shard, age, state, whole, self._rows))

    def _rows(self, index: int) -> dict[str, Tensor]:
        return self.layout.site_rows(self.engine.weights, index)

    def _gather(self, name: str, spares: Spares) -> Tensor:
        """[N] one of the method's per-entry arrays, gathered. All processes must call this."""
        full = spares.take(self.layout.size, like=self.state[name]).zero_()
        self.shard.put(self.state[name], full)
        return self.world.merge(full)

    def _entries(self, name: str, spares: Spares) -> Tensor:
        """What `Turn.entries` may read: the live array where one process holds it all. All processes must call this."""
        if self.world.world_size == 1 and not self.dense and len(self.shard.slices) == 1:
            return self.state[name]
        full = self._gather(name, spares)
        spares.add(self.state[name])
        return full

    def _named(self, *wanted: str) -> list[str]:
        """Names of the method's arrays of these kinds."""
        kinds = self.method.state_tensors().items()
        return [name for name, kind in kinds if (kind if isinstance(kind, str) else "per_site") in wanted]

    def capture(self) -> Snapshot:
        """Copies of everything trained as full tensors on the host, the same on every process."""
        return Snapshot(
            self.table,
            self.engine.capture(),
            self.age.clone(),
            {name: self._gather(name, Spares()).cpu() for name in self._named("per_entry")},
            {name: self.state[name].cpu().clone() for name in self._named("per_component")},
            {name: self.state[name].clone() for name in self._named("per_site")},
        )

    def scores(self, step: int) -> Tensor | None:
        """[R] float64 on the host: every component's score, gathered from the process that keeps it."""
        local = self.method.local_scores(step)
        return None if local is None else self.world.merge(local).cpu()

    def apply(self, plan: RankPlan, *, step: int) -> ResizeRecord:
        """One resize. Raises RuntimeError on every process when they disagree, before anything is changed.

        Arrays stay on the device where they are used, and are gathered and repacked one by one. What can fail (the
        plan, the newborn) is done when the new weights exist; from there on each array is written over the one before.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "agree"):
            self.world.agree("rank plan", plan.digest, step=step)
        before = self.table
        if not plan.reshapes(before):
            with _timed(seconds, "edit"):
                plan.check(before)
                weights = self.engine.weights.clone()
                edit_survivors(weights, self.layout, plan)
                self.engine.set_weights(weights)
            return ResizeRecord(before, before, plan, seconds)
        with _timed(seconds, "layout"):
            turn = Turn(
                before, self.layout, plan, self.method.init, seed=self.seed, step=step,
                second_moment=self.method.needs.newborn_second_moment,
            )  # fmt: skip
            shard = self._deal(turn.layout)
        master, moments, state = self._repack(turn, shard, seconds)
        with _timed(seconds, "method"):
            state |= {name: turn.components(self.state[name]) for name in self._named("per_component")}
            state |= {name: self.state[name] for name in self._named("per_site")}
            age = turn.components(self.age)
        steps = self.engine.steps
        with _timed(seconds, "destroy"):
            turn.spares.clear()
            self.engine.destroy()
            self.state.clear()  # the method's old arrays go too
        with _timed(seconds, "rebuild"):
            self.table, self.layout, self.shard = turn.table, turn.layout, shard
            self._make_engine(master)
        with _timed(seconds, "restore"):
            self.engine.set_moments(moments, steps)
            self._bind(age, state)
        return ResizeRecord(before, self.table, plan, seconds)

    def _repack(
        self, turn: Turn, shard: Shard, seconds: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """New weights, moments and per-entry arrays; the old ones are written over. All processes must call this."""
        copy = self.engine.copy_of_weights
        if copy is not None:
            turn.spares.add(copy)
        with _timed(seconds, "repack"):
            try:
                master = turn.master(self.engine.weights)
            except BaseException:
                self.engine.set_weights(self.engine.weights)  # so also the copy
                raise
        turn.spares.add(self.engine.weights)
        moments, state = {}, {}
        for name in MOMENTS:
            with _timed(seconds, "gather"):
                full = self.engine.moment(name)
            with _timed(seconds, "repack"):
                moments[name] = turn.moment(name, full)
            turn.spares.add(full)
        for name in self._named("per_entry"):
            with _timed(seconds, "gather"):
                full = self._entries(name, turn.spares)
            with _timed(seconds, "method"):
                entries = turn.entries(full)
                state[name] = self._own(shard, entries)
            turn.spares.add(full)
            if state[name].untyped_storage().data_ptr() != entries.untyped_storage().data_ptr():
                turn.spares.add(entries)
        return master, moments, state


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside, where a plan of 10,000 changed sites is made.

    It makes tuples by the ten thousand, none of them garbage: looking at them is a fifth of its time, and now and then
    the collection of all there is falls due, 0.3 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time inside to a cause."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
