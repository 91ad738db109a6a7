import math

import numpy as np
import pytest
import torch

from ardtrain.arena import ArenaLayout, Shard
from ardtrain.methods.alora import Alora, AloraSettings, allocate, num_matrix_types
from ardtrain.methods.base import Binding
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable, Site, SiteChange
from ardtrain.resize import repack_snapshot, start_snapshot
from tests.tiny import equal_bits, sites_of

SETTINGS = AloraSettings(total_steps=100, k1=10, k2=5, rounds=3)


def table_of(*ranks, size=16):
    return RankTable.start(sites_of(*[(size, size)] * len(ranks)), list(ranks))


def changes(plan):
    return {i: (c.keep, c.born) for i, c in plan.changes.items()}


def born(plan):
    return {i: c.born for i, c in plan.changes.items() if c.born}


def one_site_loses_all_else_gain(n_a, ranks, averages):
    """Site 0 holds the n_a lowest scores; the others' components score their site's average."""
    scores = [-1.0] * ranks[0] + [a for r, a in zip(ranks[1:], averages, strict=True) for _ in range(r)]
    return allocate(table_of(*ranks), scores, n_a=n_a)


# ---- allocation (methods.md 3.3, 3.6, 3.8) ----


def test_eight_over_three_sites():
    """The paper's footnote: n_A = 8, three un-pruned modules in order of importance: 3, 3, 2."""
    plan = one_site_loses_all_else_gain(8, (8, 2, 2, 2), (0.3, 0.2, 0.1))
    assert changes(plan) == {0: ((), 0), 1: ((0, 1), 3), 2: ((0, 1), 3), 3: ((0, 1), 2)}


def test_the_remainder_goes_to_the_higher_average_not_to_the_first_site():
    assert born(one_site_loses_all_else_gain(8, (8, 2, 2, 2), (0.1, 0.2, 0.3))) == {1: 2, 2: 3, 3: 3}


def test_two_over_three_sites():
    assert born(one_site_loses_all_else_gain(2, (2, 2, 2, 2), (0.3, 0.2, 0.1))) == {1: 1, 2: 1}
    assert born(one_site_loses_all_else_gain(2, (2, 2, 2, 2), (0.1, 0.3, 0.2))) == {2: 1, 3: 1}


def test_average_not_sum_orders_the_sites():
    plan = allocate(table_of(1, 3, 1), [-1.0, 0.2, 0.2, 0.2, 0.5], n_a=1)  # sums 0.6 and 0.5, averages 0.2 and 0.5
    assert born(plan) == {2: 1}


def test_every_site_pruned_adds_nothing():
    table = table_of(3, 3)
    plan = allocate(table, [0.1, 0.5, 0.6, 0.2, 0.7, 0.8], n_a=2)
    assert changes(plan) == {0: ((1, 2), 0), 1: ((1, 2), 0)}
    assert plan.apply(table).total == table.total - 2


def test_ties_are_broken_by_site_then_position():
    plan = allocate(table_of(2, 2, 2), [0.0] * 6, n_a=3)
    assert changes(plan) == {0: ((), 0), 1: ((1,), 0), 2: ((0, 1), 3)}
    equal = allocate(table_of(1, 1, 1, 1), [-1.0, 0.5, 0.5, 0.5], n_a=1)
    assert born(equal) == {1: 1}


def test_only_harmful_components_are_pruned_on_request():
    scores = [-0.2, 0.1, -0.1, 0.3, 0.2, 0.4]
    table = table_of(2, 2, 2)
    assert changes(allocate(table, scores, n_a=3)) == {0: ((), 0), 1: ((1,), 0), 2: ((0, 1), 3)}
    spared = allocate(table, scores, n_a=3, prune_only_harmful=True)
    assert changes(spared) == {0: ((1,), 0), 1: ((1,), 0), 2: ((0, 1), 2)}
    assert allocate(table, [0.0] * 6, n_a=3, prune_only_harmful=True) is None


def test_an_empty_site_grows_only_when_revived():
    scores = [-1.0, -0.5, 0.1, 0.2]
    table = table_of(2, 0, 2)
    assert born(allocate(table, scores, n_a=2)) == {2: 2}
    assert born(allocate(table, scores, n_a=2, revive=True)) == {1: 1, 2: 1}
    # It counts as an empty component, 0: before a site of harmful components, behind one of useful ones.
    table = table_of(1, 0, 1, 1)
    assert born(allocate(table, [-1.0, -0.5, -0.2], n_a=1, revive=True)) == {1: 1}
    assert born(allocate(table, [-1.0, -0.5, 0.2], n_a=1, revive=True)) == {3: 1}


def test_a_full_site_is_passed_over():
    table = RankTable.start(sites_of((9, 9), (3, 9), (9, 9)), [4, 2, 2])
    scores = [-1.0] * 4 + [0.9, 0.9, 0.1, 0.1]
    assert born(allocate(table, scores, n_a=4)) == {1: 1, 2: 3}
    full = RankTable.start(sites_of((9, 9), (2, 9)), [2, 2])
    plan = allocate(full, [-1.0, -1.0, 0.5, 0.5], n_a=2)
    assert born(plan) == {}
    assert plan.apply(full).total == 2


def test_plan_records_the_cut_and_the_harmful():
    plan = allocate(table_of(2, 2), [-0.2, 0.1, 0.3, 0.4], n_a=2)
    assert plan.scores == {"highest_pruned": 0.1, "num_pruned_harmful": 1.0, "lowest_kept": 0.3}
    assert plan.reason == "alora: pruned 2 (1 worse than empty), grew 2"


def test_the_total_never_rises_above_the_first():
    """methods.md 3.8.7: a thousand random rounds; the total falls only where no site can take a component."""
    numbers = np.random.default_rng(5)
    for _ in range(50):
        table = RankTable.start(sites_of(*[(6, 9)] * 5), numbers.integers(0, 6, size=5).tolist())
        first = table.total
        for _ in range(20):
            scores = numbers.choice([-1.0, 0.0, 0.5, 1.0, 2.0], size=table.total).tolist()
            revive, n_a = bool(numbers.random() < 0.5), int(numbers.integers(1, 9))
            plan = allocate(table, scores, n_a=n_a, revive=revive)
            if plan is None:
                assert table.total == 0
                break
            after = plan.apply(table)
            lost = sum(r - len(plan.changes[i].keep) for i, r in enumerate(table.ranks) if i in plan.changes)
            assert lost == min(n_a, table.total)
            assert not any(c.born and len(c.keep) < table.ranks[i] for i, c in plan.changes.items())
            room = sum(
                site.max_rank - rank
                for i, (site, rank) in enumerate(zip(table.sites, table.ranks, strict=True))
                if (rank or revive) and len(plan.changes.get(i, SiteChange(tuple(range(rank)))).keep) == rank
            )
            assert after.total == table.total - lost + min(lost, room) <= first
            table = after


# ---- the method ----


def bound(method, table):
    layout = ArenaLayout(table, method.entries)
    method.bind(Binding(table, Shard(layout, 0, 1), torch.zeros(table.total, dtype=torch.int64)))
    return method


def test_rounds_by_step():
    method = Alora(SETTINGS)
    assert [step for step in range(100) if method.due(step)] == [9, 14, 19]
    last = Alora(AloraSettings(total_steps=20, k1=10, k2=5, rounds=9))
    assert [step for step in range(20) if last.due(step)] == [9, 14]  # after step 19 nothing would train the newborn


def test_default_n_a_is_the_number_of_matrix_types():
    names = [f"model.layers.{i}.{m}" for i in range(3) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
    table = RankTable.start([Site(n, n, 8, 8) for n in names], [2] * 9)
    assert num_matrix_types(table) == 3
    scores = torch.arange(18, dtype=torch.float64)
    plan = bound(Alora(SETTINGS), table).plan(9, scores)
    assert changes(plan) == {0: ((), 0), 1: ((1,), 0), 8: ((0, 1), 1), 7: ((0, 1), 1), 6: ((0, 1), 1)}
    five = AloraSettings(total_steps=100, k1=10, k2=5, rounds=3, n_a=5)
    assert sum(c.born for c in bound(Alora(five), table).plan(9, scores).changes.values()) == 5


def test_settings_reach_the_allocation():
    table = table_of(2, 0, 2)
    scores = torch.tensor([-1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    settings = {"total_steps": 100, "k1": 10, "k2": 5, "rounds": 3, "n_a": 2}
    assert changes(bound(Alora(AloraSettings(**settings)), table).plan(9, scores)) == {0: ((), 0), 2: ((0, 1), 2)}
    harmful = bound(Alora(AloraSettings(**settings, prune_only_harmful=True)), table)
    assert changes(harmful.plan(9, scores)) == {0: ((1,), 0), 2: ((0, 1), 1)}
    revive = bound(Alora(AloraSettings(**settings, revive=True)), table)
    assert changes(revive.plan(9, scores)) == {0: ((), 0), 1: ((), 1), 2: ((0, 1), 1)}


def test_it_needs_ablation_and_nothing_else():
    method = Alora(SETTINGS)
    assert method.needs.ranks and method.needs.ablation and method.needs.held_out
    assert method.state_tensors() == {}
    assert bound(method, table_of(2)).local_scores(9) is None


def test_a_round_keeps_survivors_and_starts_the_newborn_as_lora():
    """Newborn: Kaiming A, B = 0, whoever else is in the site; survivors to the bit; the contribution changes by what
    left alone."""
    method = Alora(SETTINGS)
    table = RankTable.start(sites_of((12, 9), (12, 9)), [3, 3])
    layout = ArenaLayout(table, method.entries)
    snapshot = start_snapshot(table, layout, method.init, seed=1)
    generator = torch.Generator().manual_seed(0)
    snapshot.full.master[:] = torch.randn(layout.size, generator=generator)
    plan = allocate(table, [-1.0, 0.5, -2.0, 0.1, 0.2, 0.3], n_a=2)
    after, new = repack_snapshot(snapshot, layout, plan, method.init, seed=1, step=9)
    old_rows, rows = layout.site_rows(snapshot.full.master, 0), new.site_rows(after.full.master, 0)
    assert equal_bits(rows["lora_A"], old_rows["lora_A"][1:2]) and equal_bits(rows["lora_B"], old_rows["lora_B"][1:2])
    old_grown, grown = layout.site_rows(snapshot.full.master, 1), new.site_rows(after.full.master, 1)
    assert equal_bits(grown["lora_A"][:3], old_grown["lora_A"]) and equal_bits(grown["lora_B"][:3], old_grown["lora_B"])
    assert not grown["lora_B"][3:].any() and len(grown["lora_B"]) == 5
    assert equal_bits(old_grown["lora_A"].T @ old_grown["lora_B"], grown["lora_A"][:3].T @ grown["lora_B"][:3])
    reference = Lora().init(table.sites[1], {}, 4000, torch.Generator().manual_seed(2))
    born_rows = method.init(table.sites[1], old_grown, 4000, torch.Generator().manual_seed(2))
    assert equal_bits(born_rows["lora_A"], reference["lora_A"]) and not born_rows["lora_B"].any()
    bound_ = 1 / math.sqrt(12)
    assert float(born_rows["lora_A"].abs().max()) <= bound_
    assert float(born_rows["lora_A"].std()) == pytest.approx(bound_ / math.sqrt(3), rel=0.02)
