"""Planted ranks: what is planted where, the teacher, and how an allocation is judged."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ardtrain.ranks import RankTable, Site
from benchmarks import planted as bench
from benchmarks.planted_teacher import (
    RandomRows,
    Shape,
    add_change,
    auc,
    covered,
    divergence_sum,
    even_ranks,
    interval,
    log_probabilities,
    low_rank_change,
    place,
    plant,
    planted_ranks,
    random_base,
    with_floor,
)

SHAPE = {"hidden": 16, "layers": 1, "heads": 4, "kv_heads": 2, "mlp": 16, "vocab": 32}
SMALL = Shape(**SHAPE)
SETTINGS = bench.Settings(
    level="matrix", steps=8, r=4, nats=0.2, grains=2, rows=2, length=8, elalora=dict(bench.ELALORA)
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_planted_ranks_sum_to_the_uniform_total():
    assert planted_ranks(28, 4) == [16] * 4 + [8] * 4 + [4] * 4
    assert planted_ranks(48, 3) == [12] * 7 + [6] * 7 + [3] * 6
    for num_sites, r in itertools.product((7, 10, 28, 48, 96), (1, 2, 4)):
        assert sum(planted_ranks(num_sites, r)) == num_sites * r


def test_place_keeps_room_and_equal_numbers():
    costs = [128, 96, 96, 128, 128, 128, 128] * 4
    room = [64, 32, 32, 64, 64, 64, 64] * 4
    deals = [place(costs, room, 4, generator(seed)) for seed in range(5)]
    for deal in deals:
        assert sorted(x for x in deal if x) == sorted(planted_ranks(28, 4))
        assert abs(np.dot(deal, costs) / (4 * sum(costs)) - 1) <= 0.02
        assert all(4 * rank <= 3 * most for rank, most in zip(deal, room, strict=True))
    assert len({tuple(deal) for deal in deals}) == 5
    assert place(costs, room, 4, generator(0)) == deals[0]
    with pytest.raises(ValueError, match="lower r"):
        place(costs, [4] * 28, 4, generator())


def test_even_ranks_spend_almost_all_numbers():
    costs = [128, 96, 96, 128]
    assert even_ranks(costs, 448 * 3, generator()) == [3, 3, 3, 3]
    for numbers in range(448, 2000, 37):
        ranks = even_ranks(costs, numbers, generator(numbers))
        assert max(ranks) - min(ranks) <= 1
        assert 0 <= numbers - np.dot(ranks, costs) < 128


def test_floor_takes_from_the_largest():
    assert with_floor([4, 0, 0, 2], 6) == [2, 1, 1, 2]
    assert with_floor([5, 1, 1], 7) == [5, 1, 1]


def test_auc_by_hand_and_against_all_pairs():
    assert auc([3, 1, 2, 1], [4, 0, 2, 0]) == 1.0
    assert auc([1, 1, 1], [1, 0, 0]) == 0.5
    assert auc([2, 3, 2, 1], [1, 0, 0, 0]) == pytest.approx((0 + 0.5 + 1) / 3)
    numbers = np.random.default_rng(3)
    scores, planted = numbers.integers(0, 5, 40), numbers.integers(0, 2, 40)
    difference = scores[planted > 0][:, None] - scores[planted == 0][None]
    assert auc(scores.tolist(), planted.tolist()) == pytest.approx(np.mean((np.sign(difference) + 1) / 2))
    with pytest.raises(ValueError, match="planted sites and others"):
        auc([1, 2], [1, 1])


def test_covered_counts_no_component_twice():
    assert covered([4, 4, 4], [8, 0, 4]) == pytest.approx(8 / 12)
    assert covered([8, 0, 9], [8, 0, 4]) == 1.0


def test_interval_of_equal_values_is_a_point_and_of_others_holds_the_mean():
    assert interval([0.5, 0.5, 0.5]) == {"mean": 0.5, "standard_deviation": 0.0, "low": 0.5, "high": 0.5}
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = interval(values)
    assert found["mean"] == 3.0 and found["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    # The bootstrap's standard error is sd(ddof=0) / sqrt(n) = 0.632; 1.96 of them are 1.24.
    assert found["low"] == pytest.approx(3.0 - 1.24, abs=0.16) and found["high"] == pytest.approx(3.0 + 1.24, abs=0.16)
    assert interval([2.0])["standard_deviation"] == 0.0


def test_change_has_equal_singular_values():
    singular = torch.linalg.svdvals(low_rank_change(12, 8, 3, generator()).double())
    assert torch.allclose(singular[:3], torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert float(singular[3:].max()) < 1e-6


@pytest.mark.parametrize(("name", "rows", "columns"), [("q_proj", slice(4, 8), slice(None)),
                                                       ("o_proj", slice(None), slice(4, 8))])  # fmt: skip
def test_change_of_a_head_stays_in_its_rows_or_columns(name, rows, columns):
    problem = bench.Problem(replace(SETTINGS, level="head", r=1, shape=SHAPE), 0)
    site = next(s for s in problem.sites if s.name.endswith(f"{name}:head.1"))
    before, after = random_base(SMALL, 0), random_base(SMALL, 0)
    add_change(after, site, torch.ones(site.out_features, site.in_features))
    moved = after.get_submodule(site.module).weight - before.get_submodule(site.module).weight
    expected = torch.zeros(16, 16)
    expected[rows, columns] = 1.0
    assert torch.allclose(moved, expected, atol=1e-6)


def test_teacher_differs_where_planted_by_that_rank_and_each_change_by_its_share():
    base = random_base(SMALL, 1)
    problem = bench.Problem(replace(SETTINGS, shape=SHAPE), 1)
    sites, ids = problem.sites, problem.rows("size", num_grains=1, rows=16).collate((-1, 0)).input_ids
    planted = [2, 0, 1, 0, 4, 0, 0]
    teacher, sizes = plant(base, sites, planted, nats=0.1, input_ids=ids, generator=generator())
    before = log_probabilities(base, ids)
    for site, rank, size in zip(sites, planted, sizes, strict=True):
        name = f"{site.module}.weight"
        change = teacher.get_parameter(name) - base.get_parameter(name)
        assert torch.linalg.matrix_rank(change, atol=1e-4) == rank
        assert float(torch.linalg.matrix_norm(change, 2)) == pytest.approx(size, rel=1e-4, abs=1e-6)
        if rank:
            alone = random_base(SMALL, 1)
            alone.get_parameter(name).data += change
            moved = float(divergence_sum(log_probabilities(alone, ids), before)) / len(before)
            assert moved == pytest.approx(0.1 * rank / 7, rel=0.02)
    untouched = [n for n, p in base.named_parameters() if torch.equal(p, teacher.get_parameter(n))]
    assert len(untouched) == len(list(base.parameters())) - 3


def test_divergence_against_numpy_and_of_equals():
    teacher, logits = torch.randn(5, 7, generator=generator(1)), torch.randn(5, 7, generator=generator(2))
    p = np.exp(teacher.double().numpy()) / np.exp(teacher.double().numpy()).sum(1, keepdims=True)
    q = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(1, keepdims=True)
    found = divergence_sum(torch.log_softmax(teacher, dim=-1), logits)
    assert float(found) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert float(divergence_sum(torch.log_softmax(teacher, dim=-1), teacher)) == pytest.approx(0.0, abs=1e-6)


def test_rows_depend_on_name_seed_step_and_grain_alone():
    def ids(name="train", seed=0, grain=(3, 1)):
        rows = RandomRows(name, seed, num_grains=2, rows=2, length=8, vocab=32)
        return rows.collate(grain).input_ids

    assert torch.equal(ids(), ids())
    others = [ids(name="held out"), ids(seed=1), ids(grain=(4, 1)), ids(grain=(3, 0))]
    assert not any(torch.equal(ids(), other) for other in others)
    batch = RandomRows("train", 0, num_grains=2, rows=2, length=8, vocab=32).collate((0, 0))
    assert batch.num_target_tokens == 2 * 7


def test_first_tables_cost_the_same():
    problem = bench.Problem(SETTINGS, 3)
    for name in ("lora", "oracle", "oracle_floor", "lora_matrix", "elalora", "dora"):
        entry, table = bench.first_table(problem, name)
        numbers = np.dot(table.ranks, bench.costs_of(table.sites))
        if name == "dora":
            numbers += sum(d.rows * d.columns for d in entry.build(problem, table).dense(table.sites))
        assert abs(numbers / problem.uniform_numbers - 1.0) <= bench.TOLERANCE, name
    assert bench.first_table(problem, "lora@5000")[1].total < 112 // 2
    heads = bench.Problem(replace(SETTINGS, level="head", r=3), 3)
    assert {site.in_features + site.out_features for site in heads.sites} == {80} and len(heads.sites) == 48
    assert bench.first_table(heads, "oracle")[1].total == bench.first_table(heads, "lora")[1].total == 144


def test_random_moves_are_elaloras_in_number():
    problem = bench.Problem(replace(SETTINGS, steps=120), 0)
    sites = [Site(f"s{i}", f"s{i}", 8, 8) for i in range(6)]
    table = RankTable.start(sites, [4] * 6)
    methods = [bench.METHODS[name].build(problem, table) for name in ("elalora", "random")]
    assert [s for s in range(120) if methods[0].due(s)] == [s for s in range(120) if methods[1].due(s)]
    step = next(s for s in range(120) if methods[0].due(s))
    plans = []
    for method in methods:
        method.bind(bench_binding(table))
        plans.append(method.plan(step, torch.arange(24, dtype=torch.float64)))
    born = [sum(c.born for c in plan.changes.values()) for plan in plans]
    assert born[0] == born[1] > 0 and plans[0].changes != plans[1].changes


def bench_binding(table):
    from ardtrain.methods.base import Binding

    return Binding(table, None, torch.full((table.total,), 100))


@pytest.mark.parametrize("name", ["oracle", "elalora", "ard_lora"])
def test_a_run_of_a_few_steps_keeps_the_budget_and_falls(world, name):
    problem = bench.Problem(replace(SETTINGS, r=2, shape=SHAPE | {"layers": 2}), 2)
    figures = bench.run(problem, name, 1e-2, world)
    assert figures["components"] == 2 * len(problem.sites) == 28
    assert figures["kl"] < bench.base_divergence(problem)
    assert figures == bench.run(problem, name, 1e-2, world) | {"seconds": figures["seconds"]}


def test_runs_are_kept_and_not_mixed(world, tmp_path, capsys):
    settings, out = replace(SETTINGS, steps=2, r=2, shape=SHAPE | {"layers": 2}), tmp_path / "planted.json"
    runs = bench.Runs(settings, world, out)
    runs._problem = bench.Problem(settings, 0)
    first = runs.get("lora", 1e-2, 0)
    again = bench.Runs(settings, world, out)
    again._problem = runs._problem
    assert again.get("lora", 1e-2, 0) == first  # seconds too: it was not run again
    with pytest.raises(ValueError, match="other settings"):
        bench.Runs(replace(settings, nats=0.1), world, out)


def test_gain_is_the_share_of_the_oracles():
    class Kept:
        bases = {"1": {"kl": 1.0, "uniform_numbers": 100}}

        def get(self, name, rate, seed):
            kl = {"lora": 0.5, "oracle": 0.1, "elalora": 0.2, "lora@110": 0.4}[name]
            return {"kl": kl, "trained_numbers": 110 if name in ("elalora", "lora@110") else 100}

    rates = {"lora": 1e-2, "oracle": 1e-2, "elalora": 1e-2}
    by_components = bench.figures_of(Kept(), "elalora", 1e-2, 1, rates, "components")
    assert by_components["gain"] == pytest.approx(0.3 / 0.4) and by_components["recovered"] == pytest.approx(0.8)
    assert by_components["numbers_over_uniform"] == pytest.approx(1.1)
    by_parameters = bench.figures_of(Kept(), "elalora", 1e-2, 1, rates, "parameters")
    assert by_parameters["gain"] == pytest.approx(0.2 / 0.3)
