"""One budget over all towers, or one for each, in which a tower is allocated as if it stood alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ardtrain.arena import ArenaLayout, Shard
from ardtrain.methods.adalora import AdaLora
from ardtrain.methods.alora import Alora, AloraSettings, allocate
from ardtrain.methods.ard_lora import ArdLora
from ardtrain.methods.base import Binding, Statistics
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.towers import parts_of, shares
from ardtrain.ranks import RankTable
from tests.tiny import ARD, ELALORA, sites_of
from tests.unit.test_adalora import ADALORA

TOWERS = ("vision", "vision", "vision", "projector", "language", "vision", "language", "language")


def table_of(ranks, towers=TOWERS):
    sites = sites_of(*[(8, 9)] * len(towers))
    return RankTable.start([replace(s, tower=t) for s, t in zip(sites, towers, strict=True)], ranks)


def bound(method, table, **state):
    """The method bound to a table on one process; state tensors are 0 but for those given."""
    shard = Shard(ArenaLayout(table, method.entries), 0, 1)
    sizes = {"per_entry": shard.size, "per_component": table.total, "per_site": len(table.sites)}
    tensors = {
        name: torch.zeros(sizes.get(kind, kind), dtype=torch.float32 if kind == "per_entry" else torch.float64)
        for name, kind in method.state_tensors().items()
    }
    method.bind(Binding(table, shard, torch.full((table.total,), 99), tensors | state))
    return method


def uneven_scores(table, seed):
    """Scores whose size differs a hundredfold between towers, as gradients of pictures and text do."""
    scale = {"vision": 0.01, "projector": 1.0, "language": 1.0}
    numbers = np.random.default_rng(seed).uniform(size=table.total)
    return torch.from_numpy(numbers * [scale[table.sites[i].tower] for i in table.owners])


def alone(table, tower):
    """The table of one tower, and where its sites and components stand in the whole one."""
    return next(part for part in parts_of(table) if part.tower == tower)


def test_parts_are_the_towers_wherever_their_sites_stand():
    table = table_of([1, 2, 3, 4, 5, 6, 7, 8])
    parts = parts_of(table)
    assert [(p.tower, p.sites.tolist()) for p in parts] == [
        ("vision", [0, 1, 2, 5]), ("projector", [3]), ("language", [4, 6, 7]),
    ]  # fmt: skip
    for part in parts:
        assert part.table.sites == tuple(table.sites[i] for i in part.sites)
        assert part.table.owners.tolist() == [part.sites.tolist().index(i) for i in table.owners[part.components]]
    assert sorted(np.concatenate([p.components for p in parts]).tolist()) == list(range(table.total))


@pytest.mark.parametrize("seed", range(20))
def test_shares_by_hand_and_in_sum(seed):
    assert shares([3, 3, 1], 4) == [2, 2, 0] and shares([10, 5], 10) == [7, 3] and shares([7, 2], 9) == [7, 2]
    numbers = np.random.default_rng(seed)
    totals = numbers.integers(1, 99, size=3).tolist()
    target = int(numbers.integers(1, sum(totals) + 1))
    found = shares(totals, target)
    assert sum(found) == target and all(
        abs(f - t * target / sum(totals)) < 1 for f, t in zip(found, totals, strict=True)
    )
    assert shares(found, target) == found  # a second start changes nothing


METHODS = {
    "elalora": lambda per_tower: ElaLora(replace(ELALORA, b=4, k=2, enable_scheduler=False, per_tower=per_tower)),
    "alora": lambda per_tower: Alora(AloraSettings(60, k1=4, k2=4, rounds=9, n_a=3, per_tower=per_tower)),
}
EVENT = {"elalora": ELALORA.init_warmup + ELALORA.mask_interval, "alora": 3}


@pytest.mark.parametrize("name", list(METHODS))
def test_each_tower_is_allocated_as_if_it_stood_alone(name):
    table, moved = table_of([4] * 8), 0
    for event in range(12):
        scores = uneven_scores(table, event)
        plan = bound(METHODS[name](True), table).plan(EVENT[name], scores)
        for part in parts_of(table):
            own = bound(METHODS[name](True), part.table).plan(EVENT[name], scores[torch.from_numpy(part.components)])
            changes = {} if own is None else {int(part.sites[i]): change for i, change in own.changes.items()}
            assert {i: c for i, c in plan.changes.items() if i in part.sites} == changes
        after = plan.apply(table)
        assert after.by_tower() == table.by_tower()
        moved += after.ranks != table.ranks
        table = after
    assert moved > 6
    assert "vision: " in plan.reason and "language: " in plan.reason and "language.highest_pruned" in plan.scores


@pytest.mark.parametrize("name", list(METHODS))
def test_one_budget_takes_from_the_tower_of_small_scores(name):
    table = table_of([4] * 8)
    plan = bound(METHODS[name](False), table).plan(EVENT[name], uneven_scores(table, 0))
    after = plan.apply(table).by_tower()
    assert after["vision"] < 16 and sum(after.values()) == table.total


def test_alora_prunes_no_more_than_the_other_sites_can_take():
    table = table_of([3, 3, 2], ["vision"] * 3)
    scores = [0.1, 0.2, 0.9, 0.3, 0.8, 0.9, 0.4, 0.9]
    plan = allocate(table, scores, n_a=4, keep_total=True)  # the fourth would leave no site that lost none
    assert plan.apply(table).ranks == (1, 2, 5)
    assert allocate(table_of([3], ["projector"]), [0.1, 0.2, 0.3], n_a=1, keep_total=True) is None
    assert allocate(table, scores, n_a=4).apply(table).total == 4  # the paper's: the total falls


def test_adalora_masks_each_tower_by_its_own_scores_and_share():
    table = table_of([4] * 4 + [8] * 4)  # vision 20, projector 4, language 24, together 48 -> 16
    method, one = (bound(AdaLora(replace(ADALORA, per_tower=p)), table) for p in (True, False))
    steps = [*(s for s in range(4, 15) if method.due(s)), 15]
    assert steps == [*(s for s in range(4, 15) if one.due(s)), 15]
    scores = uneven_scores(table, 1)
    left = []
    for step in steps:
        plan = method.plan(step, scores)
        masked = {table.offsets[i] + p for i, change in plan.changes.items() for p in change.zero}
        assert len(masked) == method.num_masked(step)
        for part in parts_of(table):
            own = part.components.tolist()
            gone = masked & set(own)
            assert all(scores[c] <= scores[d] for c in gone for d in set(own) - gone)
        left.append({p.tower: len(set(p.components.tolist()) - masked) for p in parts_of(table)})
    assert left[-1] == {"vision": 7, "projector": 1, "language": 8}
    assert all(sorted(total[t] for total in left) == [total[t] for total in left][::-1] for t in left[0])
    assert {f"{tower}.highest_masked" for tower in left[0]} <= plan.scores.keys()
    method.binding.state["masked"][sorted(masked)] = 1.0
    last = bound(method, table, masked=method.binding.state["masked"]).plan(19, None)
    assert last.apply(table).by_tower() == left[-1]
    ended = bound(AdaLora(replace(ADALORA, per_tower=True)), last.apply(table))
    assert not any(ended.due(step) for step in range(20))


def method_weights(method):
    """A gradient of 0 and weights of 1."""
    size = method.binding.shard.layout.size
    return torch.zeros(size), torch.ones(size)


def ard(per_tower, **changes):
    settings = replace(ARD, target_r=3.0, total_steps=400, alpha_interval=1, lr_alpha=0.05, per_tower=per_tower)
    table = table_of([4] * 8)
    return bound(ArdLora(replace(settings, **changes), table), table), table


@pytest.mark.parametrize("tie", ["none", "matrix"])
def test_ard_lora_brings_each_tower_to_its_own_budget(tie):
    """The vision tower's gates matter a hundred times less; with one price it would pay for all."""
    totals = {}
    for per_tower in (True, False):
        method, table = ard(per_tower, tie=tie)
        towers = np.array([s.tower for s in table.sites])
        worth = torch.from_numpy(np.where(towers == "vision", 0.01, 1.0) * np.linspace(1, 2, 8))
        method.alpha_gradient = lambda step, gates, w=worth, m=method: -w / m.unit_ranks()
        for step in range(4, 304):
            method.observe(step, Statistics(*method_weights(method), torch.zeros(32)))
            method.after_step(step)
        ranks = torch.tensor(method._final_ranks())
        totals[per_tower] = {t: int(ranks[torch.from_numpy(towers == t)].sum()) for t in dict.fromkeys(TOWERS)}
        prices = method.binding.state["controller"][[pool.price for pool in method._pools]].tolist()
        assert len(prices) == (3 if per_tower else 1) and min(prices) > 0.0
    assert totals[True] == {"vision": 12, "projector": 3, "language": 9}
    assert sum(totals[False].values()) == 24 and totals[False]["vision"] < 12
    plan = ard(True)[0].plan(method.freeze_step, None)
    assert {"vision.l1", "projector.l1", "language.l1"} <= plan.scores.keys()


def test_ard_lora_of_one_tower_is_that_of_one_budget_to_the_bit():
    runs = []
    for per_tower in (True, False):
        table = table_of([4] * 4, ["language"] * 4)
        method = bound(ArdLora(replace(ARD, per_tower=per_tower, target_r=3.0), table), table)
        numbers = np.random.default_rng(2)
        for step in range(4, 48):
            gates = torch.from_numpy(numbers.normal(size=16)).float()
            method.observe(step, Statistics(*method_weights(method), gates))
            method.after_step(step)
        runs.append([method.binding.state[name].tolist() for name in ("alpha", "controller")])
    assert runs[0] == runs[1]
