"""ARD-LoRA (Shinwari and Usama, arXiv 2506.18267): a learnable factor alpha per head decides the head's rank.

`rank = r0 * alpha`, made differentiable by a mask over a head's components, which stand in a fixed order: component i
has the gate `clamp((r0 alpha - i - 1/2) / w + 1/2, 0, 1)` and the first is never closed. alpha follows the gates'
gradient, an l1 price (which the budget controller moves) and a total variation, both as one proximal step
(variation.py).
Tensors change seldom: their sizes come from a list of capacities. At the freeze the gates are folded into B and alpha
is gone.

The paper's regulariser, optimizer and hyperparameters could not be recovered; what fills the holes is ours, argued in
methods.md 1.3 (H1 to H14). Ours beyond that: alpha's gradient is measured in units of its own root mean square
(`alpha_scale: rms`), so that one learning rate and one price serve any loss.

Letters: U units (heads, or matrices without heads), P alphas (fewer where they are tied), G gates, R components.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ardtrain.methods.base import Binding, FixedRank, Needs, StateKind, Statistics
from ardtrain.methods.lora import Lora
from ardtrain.methods.sensitivity import row_sums
from ardtrain.methods.variation import TvForm, alpha_step, chains_of
from ardtrain.ranks import Integers, RankPlan, RankTable, Site, SiteChange, positions

MIN_GATE_TO_SORT = 0.25  # below it, unfolding the boundary gate would enlarge a row too much (methods.md H10)
CHECKS = 2  # a site changes its capacity when it was outside its bucket at so many checks in a row (H9)
RMS_DECAY = 0.9
MIN_GATE_TO_KEEP = 1e-3  # of a sigmoid, which never closes: below it a component may leave before the freeze
Folds = tuple[tuple[int, str, tuple[float, ...]], ...]
_LAMBDA, _COUNT, _SQUARE, _UPDATES, _FROZEN = range(5)  # places in the array `controller`


@dataclass(frozen=True)
class ArdLoraSettings:
    """The method's block of the config, field for field, and the run's length. Steps are optimizer steps.

    per_tower: each tower has its own price and budget, the same share of its start as target_r is of the whole's.
    """

    total_steps: int
    init_warmup: int
    final_warmup: int
    tie: Literal["none", "head", "matrix", "layer"]
    mask: Literal["ramp", "sigmoid", "straight_through"]
    ramp_width: float
    sigmoid_tau: tuple[float, float]
    lr_alpha: float
    alpha_scale: Literal["rms", "none"]
    alpha_interval: int
    resize_interval: int
    meta_interval: int
    l1: float
    l1_max: float
    tv_form: TvForm
    beta: float
    target_r: float | None
    controller_rate: float
    budget_in: Literal["components", "parameters"]
    r_max: int | None
    capacities: tuple[int, ...] | None
    per_tower: bool = False


class ArdLora(FixedRank):
    """State: alphas and their gradients' sums [P], checks outside the bucket [U], the controller's numbers: five, and
    two for each further pool (price, mean square).
    """

    def __init__(
        self, settings: ArdLoraSettings, table: RankTable, shared_heads: Mapping[str, tuple[int, str]] | None = None
    ) -> None:
        """
        Args:
            table: the run's first table; its ranks are each site's r0.
            shared_heads: module -> (heads that share its components, the part whose columns are theirs), layout
                shared_a; own_a has a site a head instead.
        """
        self.settings = settings
        self.needs = Needs(ranks=True, held_out_gates=settings.meta_interval > 0)
        self._lora = Lora()
        self.units = make_units(table, shared_heads or {}, settings)
        keys = tied_keys(self.units, settings.tie)
        names = sorted({k for own in keys for k in own})
        place = {k: i for i, k in enumerate(names)}
        self.num_alphas = len(names)
        self._chains = chains_of(names, settings.tv_form)
        widest = max(len(own) for own in keys)
        self._owner = torch.tensor([[place[k] for k in own] + [0] * (widest - len(own)) for own in keys])  # [U, g]
        self._share = torch.tensor(
            [[1.0 / len(own)] * len(own) + [0.0] * (widest - len(own)) for own in keys], dtype=torch.float64
        )
        self._r0 = torch.tensor([float(u.r0) for u in self.units], dtype=torch.float64)
        self._cost = torch.tensor([u.cost for u in self.units], dtype=torch.float64)
        self._pools = self._make_pools(table, names)
        self._targets = self._make_targets(table)
        self._r_max = torch.tensor([float(u.r_max) for u in self.units], dtype=torch.float64)
        self._contributions: Tensor | None = None

    def entries(self, site: Site) -> Mapping[str, int]:
        return self._lora.entries(site)

    def init(
        self, site: Site, existing: Mapping[str, Tensor], count: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        return self._lora.init(site, existing, count, generator)

    def state_tensors(self) -> Mapping[str, StateKind]:
        return {
            "alpha": self.num_alphas,
            "alpha_gradient": self.num_alphas,
            "outside": len(self.units),
            "controller": 5 + 2 * (len(self._pools) - 1),
        }

    def bind(self, binding: Binding) -> None:
        super().bind(binding)
        alpha = binding.state["alpha"]
        if not bool(alpha.any()):  # a run's start: no alpha is ever 0 later
            alpha.fill_(1.0)
            binding.state["controller"][[pool.price for pool in self._pools]] = self.settings.l1
        self._slots = make_slots(self.units, binding.table)
        self._kept: Tensor | None = None

    # ---- alpha to gates and back ----

    def unit_ranks(self) -> Tensor:
        """[U] float64: r0 * alpha of each unit, the continuous rank."""
        alpha = self.binding.state["alpha"]
        return self._r0 * (alpha[self._owner] * self._share).sum(dim=1)

    def usable_ranks(self) -> Tensor:
        """[U] float64: the continuous rank within 1 and r_max, which tied alphas may overstep where r0 differs."""
        return torch.minimum(self.unit_ranks().clamp_min(1.0), self._r_max)

    def gates(self, step: int) -> Tensor | None:
        s = self.settings
        if self.frozen:
            return self._hard_mask() if self._slots.shared else None
        if step < s.init_warmup and self._all_open():
            return None
        return self.mask(step).float()

    def mask(self, step: int) -> Tensor:
        """[G] float64 gates of the forward."""
        ranks = self.unit_ranks()[self._slots.unit]
        if self.settings.mask == "straight_through":
            hard = (self._slots.place < torch.floor(ranks + 0.5)) | (self._slots.place == 0)
            return hard.double()
        return self._soft(step, ranks)[0]

    def _soft(self, step: int, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """[G] soft gates and their derivative by the continuous rank. The first component's gate is 1."""
        s, place = self.settings, self._slots.place.double()
        if s.mask == "sigmoid":
            gates = torch.sigmoid((ranks - place - 0.5) / self._tau(step))
            slope = gates * (1.0 - gates) / self._tau(step)
        else:
            gates, slope = ramp(ranks, place, s.ramp_width)
        first = place == 0
        return gates.masked_fill(first, 1.0), slope.masked_fill(first, 0.0)

    def _tau(self, step: int) -> float:
        """Temperature of the sigmoid: geometric from the first to the last over the adapt phase."""
        s = self.settings
        start, end = s.sigmoid_tau
        span = max(1, s.total_steps - s.final_warmup - s.init_warmup)
        progress = min(1.0, max(0.0, (step - s.init_warmup) / span))
        return float(start * (end / start) ** progress)

    def alpha_gradient(self, step: int, gates: Tensor) -> Tensor:
        """[P] float64: dL/dalpha from dL/dgate [G]."""
        _, slope = self._soft(step, self.unit_ranks()[self._slots.unit])
        by_unit = torch.zeros(len(self.units), dtype=torch.float64)
        by_unit.index_add_(0, self._slots.unit, slope * gates.double().cpu())  # on the host: sequential, repeatable
        by_unit *= self._r0
        out = torch.zeros(self.num_alphas, dtype=torch.float64)
        out.index_add_(0, self._owner.view(-1), (by_unit[:, None] * self._share).view(-1))
        return out

    # ---- each step ----

    def adapts(self, step: int) -> bool:
        """Does alpha learn at this step?"""
        s = self.settings
        return s.init_warmup <= step < s.total_steps - s.final_warmup and not self.frozen

    def wants_held_out_gates(self, step: int) -> bool:
        return self.settings.meta_interval > 0 and self.adapts(step) and step % self.settings.meta_interval == 0

    def observe(self, step: int, statistics: Statistics) -> None:
        if self.due(step):
            self._contributions = self._local_contributions(statistics.weights)
        if not self.adapts(step) or statistics.gates is None or not len(statistics.gates):
            return
        if self.settings.meta_interval > 0 and not self.wants_held_out_gates(step):
            return
        if not bool(torch.isfinite(statistics.gates).all()):  # of a held-out grain: the step itself was finite
            return
        state = self.binding.state
        state["alpha_gradient"] += self.alpha_gradient(step, statistics.gates)
        state["controller"][_COUNT] += 1

    def after_step(self, step: int) -> None:
        """The proximal step of alpha and the controller's, once in `alpha_interval` observations (H14, H4, H7)."""
        state, s = self.binding.state, self.settings
        controller = state["controller"]
        if not self.adapts(step) or controller[_COUNT] < s.alpha_interval:
            return
        gradient = state["alpha_gradient"] / controller[_COUNT]
        state["alpha_gradient"].zero_()
        controller[_COUNT] = 0
        if s.alpha_scale == "rms":
            controller[_UPDATES] += 1
            for pool in self._pools:
                own = gradient[pool.alphas]
                square = RMS_DECAY * controller[pool.square] + (1 - RMS_DECAY) * own.square().mean()
                mean_square = square / (1 - RMS_DECAY ** float(controller[_UPDATES]))
                controller[pool.square], gradient[pool.alphas] = square, own / (mean_square.sqrt() + 1e-30)
        alpha, prices = state["alpha"], torch.empty_like(state["alpha"])
        for pool in self._pools:
            prices[pool.alphas] = controller[pool.price]
        before = self._over_budgets()
        alpha += alpha_step(
            alpha, gradient, rate=s.lr_alpha, l1=prices, beta=s.beta, form=s.tv_form, chains=self._chains
        )
        alpha.copy_(torch.minimum(torch.maximum(alpha, self._lowest()), self._highest()))
        for pool, target, was, over in zip(self._pools, self._targets, before, self._over_budgets(), strict=True):
            if target is not None:
                price = float(controller[pool.price])
                price += s.controller_rate * over + self._damping(pool, target) * (over - was)
                controller[pool.price] = min(max(price, 0.0), s.l1_max)

    def _make_pools(self, table: RankTable, alphas: Sequence[str]) -> list[Pool]:
        """What has a price and a budget of its own: everything, or each tower. alphas: their names, in order."""
        if not self.settings.per_tower:
            return [Pool("", torch.arange(len(self.units)), torch.arange(len(alphas)), _LAMBDA, _SQUARE)]
        towers = np.array([table.sites[unit.site].tower for unit in self.units])
        out: list[Pool] = []
        for number, tower in enumerate(dict.fromkeys(towers.tolist())):
            units = torch.from_numpy(np.flatnonzero(towers == tower))
            # No alpha is tied over two towers: a layer's path says its tower.
            own = torch.unique(self._owner[units][self._share[units] > 0])
            more = 5 + 2 * (number - 1)
            price, square = (more, more + 1) if number else (_LAMBDA, _SQUARE)
            out.append(Pool(f"{tower}.", units, own, price, square))
        return out

    def _make_targets(self, table: RankTable) -> list[float | None]:
        """The budget of each pool; None for none."""
        target = self.settings.target_r
        if target is None:
            return [None] * len(self._pools)
        if not self.settings.per_tower:
            return [float((self._cost * target).sum())]
        share = target * len(table.sites) / table.total
        return [share * float((self._cost * self._r0)[pool.units].sum()) for pool in self._pools]

    def _over_budgets(self) -> list[float]:
        """Of each pool the share of its budget by which the ranks exceed it; negative below it, 0 without a budget."""
        costs = self._cost * self.usable_ranks()
        return [
            0.0 if target is None else float(costs[pool.units].sum()) / target - 1.0
            for pool, target in zip(self._pools, self._targets, strict=True)
        ]

    def _damping(self, pool: Pool, target: float) -> float:
        """Weight of the budget's change beside the budget itself (ours; H7 has the second alone).

        The price adds up the excess and alpha adds up the price: alone they swing, and on a flat loss, where nothing
        makes ranks rise again, they would fall as far below the target as they began above it. With w^2 = rate times
        the share of the budget that a price of 1 takes in one update, 2 w is the critical damping of that swing;
        beyond 1 the price itself would alternate.
        """
        s = self.settings
        width = 1.0 - s.beta if s.tv_form == "temporal" else 1.0
        speed = s.lr_alpha * width * float((self._cost * self._r0)[pool.units].sum()) / target
        return min(2.0 * math.sqrt(s.controller_rate / speed), 1.0 / speed)

    def _lowest(self) -> Tensor:
        """[P]: alpha at which the widest of its units has rank 1 (H8)."""
        return self._by_alpha(1.0 / self._r0, "amin")

    def _highest(self) -> Tensor:
        """[P]: alpha at which the unit with the most room is full: capacity, and r_max (H8)."""
        return self._by_alpha(torch.minimum(self._r_max, self._slots.capacity) / self._r0, "amax")

    def _by_alpha(self, by_unit: Tensor, reduce: Literal["amin", "amax"]) -> Tensor:
        """[P] least or most over the units of each alpha, from [U]."""
        empty = math.inf if reduce == "amin" else -math.inf
        values = by_unit[:, None].expand_as(self._share).where(self._share > 0, torch.tensor(empty).double())
        out = torch.full((self.num_alphas,), empty, dtype=torch.float64)
        return out.scatter_reduce(0, self._owner.view(-1), values.reshape(-1), reduce=reduce)

    # ---- plans ----

    def due(self, step: int) -> bool:
        s = self.settings
        if step >= self.freeze_step:
            return not self.frozen  # later than planned where that step was void
        return s.init_warmup <= step < self.freeze_step and (step - s.init_warmup) % s.resize_interval == 0

    def adapt_end(self) -> int:
        return self.freeze_step + 1

    @property
    def freeze_step(self) -> int:
        """The last step with alphas."""
        return self.settings.total_steps - self.settings.final_warmup - 1

    @property
    def frozen(self) -> bool:
        """Are the gates folded in and the alphas gone?"""
        return bool(self.binding.state["controller"][_FROZEN])

    def local_scores(self, step: int) -> Tensor | None:
        """[R] contributions ||A_i|| ||B_i|| of this shard's components, by which a unit's components are sorted."""
        return self._contributions

    def _local_contributions(self, weights: Tensor) -> Tensor:
        shard = self.binding.shard
        squares = {
            p: torch.zeros(self.binding.table.total, dtype=torch.float64, device=weights.device)
            for p in ("lora_A", "lora_B")
        }
        for part, components, rows in shard.rows(shard.take(weights)):
            squares[part][components] = row_sums(rows.double().square())
        return (squares["lora_A"] * squares["lora_B"]).sqrt()

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        table, ranks = self.binding.table, self.usable_ranks()
        gates = self.mask(step)
        logical = torch.ceil(ranks - 1e-9).long().numpy()
        numbers = {
            "continuous_rank": float(ranks.sum()),
            "rounded_rank": float(torch.floor(ranks + 0.5).sum()),
            **{f"{p.name}l1": float(self.binding.state["controller"][p.price]) for p in self._pools},
        }
        if step >= self.freeze_step:
            changes = self._frozen_changes(self._final_ranks(), gates)
            self.binding.state["controller"][_FROZEN] = 1.0
            reason = "ard_lora: ranks frozen, gates folded into B"
        else:
            assert scores is not None
            changes = self._resize_changes(logical, gates, scores, first=step == self.settings.init_warmup)
            reason = "ard_lora: capacities follow the ranks"
        if not changes:
            return None
        return RankPlan(table.digest, changes, reason=reason, scores=numbers)

    def _resize_changes(
        self, logical: NDArray[np.int64], gates: Tensor, scores: Tensor, *, first: bool
    ) -> dict[int, SiteChange]:
        """Sites whose capacity was outside its bucket at two checks in a row, and the order of components anew."""
        slots, table = self._slots, self.binding.table
        heads, sites = slots.heads, slots.sites
        ranks = table.rank_array[sites]
        most = np.array([u.r_max for u in self.units])
        values = gates.numpy()
        open_gates = values > (MIN_GATE_TO_KEEP if self.settings.mask == "sigmoid" else 0.0)
        used = np.bincount(slots.component, open_gates, minlength=table.total) > 0
        in_use = np.bincount(table.owners[used], minlength=len(table.sites))[sites]  # a wide ramp reaches further
        need = np.minimum(np.maximum(logical + 1, np.repeat(in_use, heads)), most)  # one to grow into
        needs = np.stack([np.maximum.reduceat(need, slots.firsts), most[slots.firsts]], axis=1)
        pairs = needs[:, 0] * (needs.max() + 1) + needs[:, 1]  # a bucket is worked out once for all that are alike
        _, each, like = np.unique(pairs, return_index=True, return_inverse=True)
        wanted = np.array([bucket(n, self.settings.capacities, m) for n, m in needs[each].tolist()])[like]
        outside = self.binding.state["outside"].numpy()
        outside[:] = np.where(np.repeat(wanted != ranks, heads), outside + 1, 0.0)
        moved = (wanted != ranks) & (first | (outside[slots.firsts] >= CHECKS))
        outside[np.repeat(moved, heads)] = 0.0
        single = moved & (heads == 1)
        sortable = np.repeat(single, ranks)
        order, of_single = sorted_components(
            values[np.repeat(single, ranks * heads)], scores.numpy()[sortable], ranks[single]
        )
        folds = {int(site): fold for site, fold in zip(sites[single][list(of_single)], of_single.values(), strict=True)}
        places = table.places.copy()
        places[sortable] = order
        rows = places.tolist()
        starts = table.offset_array[sites]
        columns = (sites, starts, starts + np.minimum(ranks, wanted), np.maximum(0, wanted - ranks))
        return {
            site: SiteChange(tuple(rows[start:stop]), born, (), folds.get(site, ()))
            for site, start, stop, born in np.stack(columns, axis=1)[moved].tolist()
        }

    def _frozen_changes(self, final: Sequence[int], gates: Tensor) -> dict[int, SiteChange]:
        """Each unit's final rank; gates become factors of B (of A where heads share B)."""
        slots, table = self._slots, self.binding.table
        wanted = np.maximum.reduceat(np.array(final, np.int64), slots.firsts)
        values = gates.numpy()
        by_site = np.zeros(len(table.sites), np.int64)
        by_site[slots.sites] = wanted
        ranks = table.rank_array[slots.sites]
        # Components that stay and have a gate to fold; in ascending order.
        foldable = np.zeros(table.total, bool)
        foldable[slots.component[values != 1.0]] = True
        folded = np.flatnonzero(foldable & (table.places < by_site[table.owners]))
        owners, places = table.owners[folded], table.places[folded]
        starts, stops = (np.searchsorted(slots.component, folded, side) for side in ("left", "right"))  # its gates
        folds: dict[int, Folds] = {}
        numbers = values.tolist()
        gates_of = np.stack([owners, places, slots.unit.numpy()[starts], starts, stops], axis=1)
        for site, position, unit, start, stop in gates_of.tolist():
            own = (position, self.units[unit].folds, tuple(numbers[start:stop]))
            folds[site] = (*folds.get(site, ()), own)
        changed = (wanted != ranks) | np.isin(slots.sites, owners)
        columns = (slots.sites, np.minimum(ranks, wanted), np.maximum(0, wanted - ranks))
        return {
            site: SiteChange(positions(kept), born, (), folds.get(site, ()))
            for site, kept, born in np.stack(columns, axis=1)[changed].tolist()
        }

    def _all_open(self) -> bool:
        return bool((self._slots.capacity == self._r0).all())

    def _hard_mask(self) -> Tensor:
        """[G] 0 or 1 after the freeze where heads share components: a head keeps the rank it had at the freeze."""
        if self._kept is None:
            self._kept = (self._slots.place < torch.tensor(self._final_ranks())[self._slots.unit]).float()
        return self._kept

    def _final_ranks(self) -> list[int]:
        """[U] ranks of the freeze: ceil(r0 alpha), or the budget's projection (H7, H11).

        ceil changes no output with a ramp of width 1; a wider one and a sigmoid lose what is open beyond the rank.
        """
        ranks = self.usable_ranks()
        out = torch.ceil(ranks - 1e-9).long()
        for pool, target in zip(self._pools, self._targets, strict=True):
            if target is not None:
                own = pool.units
                limits = [int(n) for n in self._r_max[own].tolist()]
                out[own] = torch.tensor(project(ranks[own].tolist(), self._cost[own].tolist(), target, limits))
        return [int(n) for n in out.tolist()]


# ---- units: what owns a rank ----


@dataclass(frozen=True)
class Unit:
    """A head, or a matrix without heads. cost: of one component, 1 or parameters beside the mean unit's.

    folds: the part that takes a gate folded in.
    """

    site: int
    head: int
    num_heads: int
    module: str
    r0: int
    r_max: int
    cost: float
    folds: str


class Pool(NamedTuple):
    """Units and alphas with one price and one budget: all of them, or a tower's.

    name: before its numbers; price, square: the places of its price and its gradient's mean square in `controller`.
    """

    name: str
    units: Tensor
    alphas: Tensor
    price: int
    square: int


def make_units(table: RankTable, shared_heads: Mapping[str, tuple[int, str]], settings: ArdLoraSettings) -> list[Unit]:
    """The units in table order; heads of one matrix follow each other."""
    sites_of = Counter(site.module for site in table.sites)
    units = []
    for index, (site, rank) in enumerate(zip(table.sites, table.ranks, strict=True)):
        count, folds = shared_heads.get(site.module, (1, "lora_B"))
        most = min(settings.r_max or 2 * rank, site.max_rank)
        cost = (site.in_features + site.out_features) / count
        for h in range(count):
            head = h if count > 1 else (site.head or 0)
            heads = count if count > 1 else sites_of[site.module]
            units.append(Unit(index, head, heads, site.module, rank, most, cost, folds))
    mean = sum(u.cost for u in units) / len(units)
    flat = settings.budget_in == "components"
    return [replace(u, cost=1.0 if flat else u.cost / mean) for u in units]


def tied_keys(units: Sequence[Unit], tie: str) -> list[tuple[str, ...]]:
    """For each unit the names of the alphas whose mean it takes (methods.md H2, H12).

    tie=head: one alpha for a head's q, k, v and o; a key or value head takes the mean of its group of query heads.
    """
    if tie == "none":
        return [(f"{u.module}:{u.head:06d}",) for u in units]
    if tie == "matrix":
        return [(u.module,) for u in units]
    layers = [layer_of(u.module) for u in units]
    if tie == "layer":
        return [(layer,) for layer in layers]
    most: dict[str, int] = {}
    for unit, layer in zip(units, layers, strict=True):
        most[layer] = max(most.get(layer, 1), unit.num_heads)
    keys: list[tuple[str, ...]] = []
    for unit, layer in zip(units, layers, strict=True):
        if unit.num_heads == 1:
            keys.append((unit.module,))
            continue
        group = most[layer] // unit.num_heads
        first = unit.head * group
        keys.append(tuple(f"{layer}:head.{h:06d}" for h in range(first, first + group)))
    return keys


def layer_of(module: str) -> str:
    """The path up to and with its first number: the decoder layer."""
    found = re.match(r"(.*?\.\d+)(\.|$)", module)
    return found.group(1) if found else module


@dataclass(frozen=True)
class Slots:
    """Where the gates stand, in table order: unit [G], place within the unit [G], component [G].

    capacity: [U] float64, components of each unit's site. sites: those with units; firsts, heads: the first unit and
    the number of units of each of them. shared: do heads share components anywhere?
    """

    unit: Tensor
    place: Tensor
    component: Integers
    capacity: Tensor
    sites: Integers
    firsts: Integers
    heads: Integers
    shared: bool


def make_slots(units: Sequence[Unit], table: RankTable) -> Slots:
    """The gates of a table: one a component, or one a component and head, heads last."""
    owner = np.array([u.site for u in units], np.int64)
    sites, firsts, heads = np.unique(owner, return_index=True, return_counts=True)
    ranks = table.rank_array[sites]
    component = np.repeat(np.arange(table.total), heads[np.searchsorted(sites, table.owners)])
    first_gates = np.cumsum(ranks * heads) - ranks * heads
    within = np.arange(len(component)) - np.repeat(first_gates, ranks * heads)
    head = within % np.repeat(heads, ranks * heads)
    return Slots(
        unit=torch.from_numpy(np.repeat(firsts, ranks * heads) + head),
        place=torch.from_numpy(within // np.repeat(heads, ranks * heads)),
        component=component,
        capacity=torch.from_numpy(table.rank_array[owner].astype(np.float64)),
        sites=sites,
        firsts=firsts,
        heads=heads,
        shared=bool((heads > 1).any()),
    )


# ---- formulas ----


def ramp(ranks: Tensor, place: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Gates `clamp((rank - i - 1/2) / w + 1/2, 0, 1)` and their derivative by the rank (methods.md H3).

    At both ends of the ramp the derivative counts: at a whole rank the open neighbour tells whether to shrink, and the
    closed one, whose gate at 0 has no signal yet, adds nothing. Without the component that stands first.
    """
    position = (ranks - place - 0.5) / width + 0.5
    inside = (position >= 0.0) & (position <= 1.0)
    return position.clamp(0.0, 1.0), inside.double() / width


@lru_cache(maxsize=4096)
def bucket(need: int, capacities: tuple[int, ...] | None, most: int) -> int:
    """The smallest capacity that holds `need` components, at most `most`.

    Default capacities: 1 to 8 one by one, then four from each power of two to the next (10, 12, 14, 16, 20, 24, ...).
    """
    if capacities is None:
        step = max(1, 1 << max(0, (need - 1).bit_length() - 3))
        return min(most, -(-need // step) * step)
    return min(most, next((c for c in sorted(capacities) if c >= need), most))


def sorted_components(
    gates: NDArray[np.float64], scores: NDArray[np.float64], ranks: Integers
) -> tuple[Integers, dict[int, Folds]]:
    """[n] of each unit its components by contribution, largest first; by unit the factors that keep the function (H10).

    Open components only; with one half-open gate its factor is folded into the row that leaves the boundary and taken
    out of the row that comes to it. Nothing moves where that factor would be below MIN_GATE_TO_SORT, or where several
    gates are half open (a wide ramp, a sigmoid).

    Args:
        gates, scores: [n] of the units' components, unit after unit. ranks: components of each unit.
    """
    ends = np.cumsum(ranks)
    starts = ends - ranks
    unit = np.repeat(np.arange(len(ranks)), ranks)
    place = np.arange(len(unit)) - starts[unit]
    half = (gates > 0.0) & (gates < 1.0)
    num_half = np.bincount(unit, half, minlength=len(ranks))
    boundary = np.full(len(ranks), -1)
    boundary[unit[half]] = np.flatnonzero(half)  # of the only half-open gate, where there is only one
    factors = np.append(gates, 1.0)[boundary]
    stays = (num_half > 1) | ((num_half == 1) & (factors < MIN_GATE_TO_SORT))
    active = np.bincount(unit, gates > 0.0, minlength=len(ranks))[unit] > place
    key = np.where(active, -scores * gates, np.inf)
    key[stays[unit]] = 0.0
    order = place[sorted_within(key, starts, ranks, place)]
    leaves, comes = (np.append(numbers, -1)[boundary] for numbers in (place, order))
    folded = np.flatnonzero((num_half == 1) & ~stays & (comes != leaves))
    columns = (numbers[folded].tolist() for numbers in (leaves, comes, factors))
    return order, {
        unit: ((left, "lora_B", (gate,)), (came, "lora_B", (1.0 / gate,)))
        for unit, left, came, gate in zip(folded.tolist(), *columns, strict=True)
    }


def sorted_within(keys: NDArray[np.float64], starts: Integers, counts: Integers, place: Integers) -> Integers:
    """[n] the places of the keys in the whole, unit by unit, each unit's in ascending order of its keys, stable.

    As np.lexsort of (key, unit); where units are of about one size, one row of a matrix each is three times as quick.

    Args:
        keys: [n], unit after unit, no NaN. starts, counts: [U] where each unit begins and its keys. place: [n] of each
            key in its unit.
    """
    unit = np.repeat(np.arange(len(counts)), counts)
    width = int(counts.max(initial=0))
    if len(counts) * width > 4 * len(keys):
        return np.lexsort((keys, unit))
    rows = np.full((len(counts), width), np.inf)  # behind its keys, also behind those that are inf
    rows[unit, place] = keys
    inside = np.arange(width) < counts[:, None]
    order: Integers = (np.argsort(rows, axis=1, kind="stable") + starts[:, None])[inside]
    return order


def project(
    ranks: Sequence[float], costs: Sequence[float], target: float, limits: Sequence[int] | None = None
) -> list[int]:
    """Whole ranks >= 1 near `ranks` whose cost is at most `target` and as near to it as components allow (H7).

    A common shift of all ranks by bisection, then components one by one where the fraction is largest. limits: most
    of each.
    """
    values, prices = np.asarray(ranks, np.float64), np.asarray(costs, np.float64)
    largest = np.asarray(limits or [math.ceil(target)] * len(ranks), np.float64)

    def whole(shift: float) -> NDArray[np.float64]:
        return np.minimum(largest, np.maximum(1.0, np.floor(values + shift)))

    def cost(chosen: NDArray[np.float64]) -> float:
        return float(np.cumsum(chosen * prices)[-1])  # one after another, as in table order

    low, high = -max(ranks) - 1.0, max(1.0, target)
    for _ in range(100):
        middle = (low + high) / 2
        exhausted = middle in (low, high)
        low, high = (middle, high) if cost(whole(middle)) <= target + 1e-9 else (low, middle)
        if exhausted:  # no number lies between them
            break
    shifted = whole(low)
    left = target - cost(shifted)
    by_fraction = np.argsort(-(values + low - shifted), kind="stable").tolist()
    chosen = [int(n) for n in shifted.tolist()]
    for i in by_fraction:
        if costs[i] <= left + 1e-9 and chosen[i] < largest[i]:
            chosen[i] += 1
            left -= costs[i]
    return chosen
