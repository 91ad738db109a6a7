"""Probe growth: probes change nothing, hear a planted direction, and hear nothing in noise."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from ardtrain.adapters import AdapterLinear, HeadLinear, bind_probes
from ardtrain.config import ConfigError, parse_config
from ardtrain.methods.base import Binding
from ardtrain.methods.probe_lora import exchange
from ardtrain.methods.probing import FLOOR, Candidates, Prober, directions, orthonormal, split_means, without
from ardtrain.preflight import prepare
from ardtrain.ranks import RankTable, Site
from ardtrain.trainer import Interrupted
from tests.runs import write_run
from tests.tiny import TokenBatches, elalora, equal_bits, probe_lora, sites_of, tiny_trainer, weights_digest

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def trainers():
    """Makes trainers and ends their engines."""
    made = []

    def make(method):
        made.append(tiny_trainer(method, data=TokenBatches(num_grains=3)))
        return made[-1]

    yield make
    for trainer in made:
        trainer.arena.engine.destroy()


# ---- the statistic ----


def test_the_difference_of_halves_has_the_noise_of_the_mean():
    """Grains of mean 3 and correlated noise, 5 in even and 2 in odd rounds; against NumPy over 40,000 repetitions."""
    numbers = np.random.default_rng(0).normal(size=(40_000, 7, 2))
    grains = 3.0 + numbers @ np.array([[1.0, 0.8], [0.0, 0.6]])
    even, odd = (torch.from_numpy(part.sum(1)) for part in (grains[:, :5], grains[:, 5:]))
    mean, noise = (t.numpy() for t in split_means(even, odd, 5, 2))
    np.testing.assert_allclose(mean, grains.mean(1), rtol=1e-12)
    np.testing.assert_allclose(noise.mean(0), 0.0, atol=0.01)
    np.testing.assert_allclose(np.cov(noise.T), np.cov(mean.T), atol=0.005)


def test_directions_against_numpy():
    generator = np.random.default_rng(1)
    mean, noise = generator.normal(size=(3, 9)) * [[4.0], [2.0], [0.1]], generator.normal(size=(3, 9)) / 3
    scores, rows = directions(torch.from_numpy(mean), torch.from_numpy(noise))
    sizes, floor = np.linalg.svd(mean)[1], np.linalg.norm(noise, 2)
    np.testing.assert_allclose(scores, np.maximum(0.0, sizes**2 - FLOOR * floor**2) / (noise**2).mean(), rtol=1e-9)
    assert scores[0] > scores[1] > 0.0 == scores[2]
    np.testing.assert_allclose(np.abs(np.sum(rows.numpy() * np.linalg.svd(mean, full_matrices=False)[2], 1)), 1.0)


def test_directions_without_noise_or_gradient_score_nothing():
    for mean, noise in ((torch.ones(2, 4), torch.zeros(2, 4)), (torch.zeros(2, 4), torch.ones(2, 4))):
        scores, _ = directions(mean.double(), noise.double())
        assert scores.tolist() == [0.0, 0.0]


def test_what_components_can_learn_is_taken_out():
    generator = torch.Generator().manual_seed(2)
    existing = torch.randn(3, 10, generator=generator)
    mixed = torch.randn(2, 3, generator=generator).double() @ existing.double()
    new = torch.randn(2, 10, generator=generator).double()
    torch.testing.assert_close(without(mixed + new, existing), without(new, existing))
    torch.testing.assert_close(without(new, existing) @ existing.double().t(), torch.zeros(2, 3).double())
    assert without(new, existing[:0]) is new


# ---- probes in the forward and backward ----


def adapters_of(kind, generator):
    """(adapter, its sites) of one matrix of 12 inputs and 8 outputs, rank 3 by site; kind: plain, empty, out or in."""
    linear = nn.Linear(12, 8)
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    if kind in ("out", "in"):
        adapter = HeadLinear(linear.requires_grad_(False), scaling=2.0, num_heads=2, side=kind)
        i, o = (12, 4) if kind == "out" else (6, 8)
        sites = [Site(f"m:head.{h}", "m", i, o, scaling=2.0, kind="head", head=h, start=h * 4) for h in (0, 1)]
    else:
        adapter = AdapterLinear(linear.requires_grad_(False), scaling=2.0)
        sites = [Site("m", "m", 12, 8, scaling=2.0)]
    rank = 0 if kind == "empty" else 3 * len(sites)
    views = {
        "lora_A": torch.randn(rank, sites[0].in_features, generator=generator, requires_grad=True),
        "lora_B": torch.randn(rank, sites[0].out_features, generator=generator, requires_grad=True),
    }
    adapter.bind(views if rank else None, (3,) * len(sites) if rank else (0,) * len(sites))
    return adapter, sites, views


def dense_of(sites, a, b, count, side):
    """[O, I] what probes with rows a and b (flat) would add, by plain matrices."""
    whole = torch.zeros(8, 12, dtype=torch.float64)
    i, o = sites[0].in_features, sites[0].out_features
    for h in range(len(sites)):
        own_a = a.view(len(sites), count, i)[h].double()
        own_b = b.view(len(sites), count, o)[h].double()
        rows = slice(h * o, h * o + o) if side == "out" else slice(0, 8)
        columns = slice(h * i, h * i + i) if side == "in" else slice(0, 12)
        block = torch.zeros_like(whole)
        block[rows, columns] = 2.0 * own_b.t() @ own_a
        whole = whole + block
    return whole


@pytest.mark.parametrize("kind", ["plain", "empty", "out", "in"])
@pytest.mark.parametrize("part", ["lora_B", "lora_A"])
def test_probes_change_no_bit_and_their_gradient_is_that_of_a_component(kind, part):
    generator = torch.Generator().manual_seed(3)
    adapter, sites, views = adapters_of(kind, generator)
    x = torch.randn(2, 5, 12, generator=generator, requires_grad=True)
    wanted = torch.randn(2, 5, 8, generator=generator)
    leaves = [x] if kind == "empty" else [x, *views.values()]

    def loss():
        return (adapter(x) - wanted).square().sum()

    plain = loss()
    before = torch.autograd.grad(plain, leaves)
    count, table = 2, RankTable.start(sites, [0] * len(sites))
    columns = {"lora_A": sites[0].in_features, "lora_B": sites[0].out_features}
    other = "lora_A" if part == "lora_B" else "lora_B"
    fixed = torch.randn(count * len(sites) * columns[other], generator=generator)
    leaf = torch.zeros(count * len(sites) * columns[part], requires_grad=True)
    bind_probes({"m": adapter}, table, count=count, part=part, leaf=leaf, fixed=fixed)
    probed = loss()
    *after, of_leaf = torch.autograd.grad(probed, [*leaves, leaf])
    assert equal_bits(plain, probed) and all(equal_bits(a, b) for a, b in zip(before, after, strict=True))

    zero = torch.zeros(len(leaf), requires_grad=True)
    rows = {part: zero, other: fixed}
    extra = dense_of(sites, rows["lora_A"], rows["lora_B"], count, kind if kind in ("out", "in") else "out")
    explicit = (adapter(x).double() + x.double() @ extra.t() - wanted.double()).square().sum()
    (expected,) = torch.autograd.grad(explicit, zero)
    torch.testing.assert_close(of_leaf, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_with_riding_probes_have_the_bits_of_steps_without(checkpointing, trainers):
    """To the first event the weights of a run whose probes ride are those of one whose probes do not."""
    digests = []
    for probes in ("ride", "separate"):
        trainer = trainers(probe_lora(probes=probes))
        if checkpointing:
            trainer.backbone.module.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(10):
            trainer.train_step()
        digests.append(weights_digest(trainer.arena.capture()))
        assert bool(trainer.arena.state["probe_up"].any()) == (probes == "ride")
    assert digests[0] == digests[1]


# ---- what they hear ----


def a_prober(sites, **changes):
    """A prober whose only event follows step 9, bound to zeros and to components without weights."""
    given = {"count": 2, "rounds": 5, "ride": True, "due": lambda step: step == 9} | changes
    prober = Prober(sites, **given)
    state = {name: torch.zeros(n, dtype=torch.float64) for name, n in prober.state_tensors().items()}
    table = RankTable.start(sites, [1] * len(sites))
    prober.bind(Binding(table, SimpleNamespace(), torch.zeros(table.total), state, rows=no_rows(sites)))
    return prober


def no_rows(sites):
    """Sites without components."""
    return lambda index: {"lora_A": torch.zeros(0, sites[index].in_features)}


def test_rounds_are_those_before_the_event():
    prober = a_prober(sites_of((6, 5)))
    assert [prober.riding(step) for step in (-1, 0, 4, 5, 9, 10)] == [None, (0, 9), (4, 9), (5, 9), (9, 9), None]
    assert prober.separate(9) == 0
    own = a_prober(sites_of((6, 5)), ride=False)
    assert own.riding(9) is None and (own.separate(8), own.separate(9)) == (0, 10)


def test_random_rows_are_orthonormal_and_follow_seed_event_and_site():
    prober = a_prober(sites_of((6, 5), (6, 5)))
    first = prober.make(0, 9, 1)
    a, b = first.fixed.view(2, 2, 6)
    torch.testing.assert_close(a @ a.t(), torch.eye(2))
    assert not torch.allclose(a, b)
    assert equal_bits(first.fixed, prober.make(3, 9, 1).fixed)
    assert not torch.allclose(first.fixed, prober.make(0, 9, 2).fixed)
    assert not torch.allclose(first.fixed, prober.make(0, 19, 1).fixed)


def hear(prober, gradients, event=9, seed=0):
    """All rounds of an event; gradients(grain, site) gives dL/dW [O, I] of that grain."""
    sites, grain = prober.sites, 0
    for index in range(2 * prober.rounds):
        probes = prober.make(index, event, seed)
        up = probes.part == "lora_B"
        k = prober.count
        rows = torch.split(probes.fixed, [k * (s.in_features if up else s.out_features) for s in sites])
        total = torch.zeros(probes.size)
        for _ in range(3):
            pieces = []
            for site, own in zip(sites, rows, strict=True):
                g = gradients(grain, site)
                pieces.append((own.view(k, -1) @ (g.t() if up else g)).flatten())
            total, grain = total + torch.cat(pieces), grain + 1
        prober.observe(index, event, total, 3)


def test_a_planted_direction_is_found():
    """dL/dW = b a^T + noise at one of two sites: the candidates' best is a, with cosine >= 0.95."""
    generator = torch.Generator().manual_seed(1)
    sites = sites_of((40, 30), (40, 30))
    a = orthonormal(torch.randn(1, 40, generator=generator, dtype=torch.float64))[0]
    b = orthonormal(torch.randn(1, 30, generator=generator, dtype=torch.float64))[0]

    def gradients(grain, site):
        noise = torch.randn(30, 40, generator=generator)
        return noise + (20.0 * torch.outer(b, a) if site is sites[1] else 0.0)

    prober = a_prober(sites)
    hear(prober, gradients)
    found = prober.candidates(9)
    best = int(np.argmax(found.scores))
    assert found.owners[best] == 1 and found.scores[best] > 5 * found.scores[found.owners == 0].max()
    assert abs(float(found.rows[1][0] @ a)) >= 0.95
    assert float(found.rows[1][0].norm()) == pytest.approx(1.0)


def test_in_noise_no_site_grows_more_than_chance():
    """Births of 300 events of pure noise over 6 equal sites, whose noise differs in size by 1000 and is correlated.

    chi-square: a method that prefers none fails with probability 1e-3 (the seed is fixed). Sites this small, with
    noise this correlated, have a candidate above the floor in 0.28 of the events (0.5 without FLOOR).
    """
    generator = torch.Generator().manual_seed(5)
    sites = sites_of(*[(24, 16)] * 6)
    sizes = {site.name: 10.0 ** (i - 2) / 2 for i, site in enumerate(sites)}
    mixing = torch.randn(24, 24, generator=generator) / 5
    born, above = np.zeros(6), 0
    for event in range(300):
        prober = a_prober(sites, due=lambda step: True, count=4)
        hear(prober, lambda g, site: sizes[site.name] * torch.randn(16, 24, generator=generator) @ mixing, event=event)
        found = prober.candidates(event)
        above += len(set(found.owners[found.scores > 0.0].tolist()))
        plan = exchange(RankTable.start(sites, [2] * 6), np.zeros(12), found, n=1, limit=12)
        for index, change in ({} if plan is None else plan.changes).items():
            born[index] += change.born
    assert chisquare(born).pvalue > 1e-3, born
    assert 0 < above <= 0.33 * 300 * 6


def test_a_site_that_has_the_direction_gets_no_component():
    """The same gradient at two sites; components of one already span its input side."""
    generator = torch.Generator().manual_seed(6)
    sites = sites_of((20, 10), (20, 10))
    a, b = (torch.randn(n, generator=generator) for n in (20, 10))
    prober = a_prober(sites)
    prober._binding.rows = lambda index: {"lora_A": a[None] if index == 0 else a[:0, None].expand(0, 20)}
    hear(prober, lambda grain, site: torch.outer(b, a) + torch.randn(10, 20, generator=generator) / 10)
    found = prober.candidates(9)
    assert found.scores[found.owners == 1].max() > 100.0
    assert found.scores[found.owners == 0].max() < 0.1 * found.scores.max()


def test_a_search_begins_where_the_one_before_ended():
    prober = a_prober(sites_of((12, 9)), due=lambda step: step in (9, 19))
    generator = torch.Generator().manual_seed(7)
    hear(prober, lambda grain, site: torch.randn(9, 12, generator=generator), event=9)
    found = prober.candidates(9)
    torch.testing.assert_close(prober.make(0, 19, 0).fixed.view(2, 12), found.rows[0])


def test_what_belongs_to_another_event_is_forgotten():
    prober = a_prober(sites_of((6, 5)), due=lambda step: step in (9, 19))
    hear(prober, lambda grain, site: torch.ones(5, 6))
    assert prober.candidates(9) is not None and prober.candidates(19) is None
    prober.observe(0, 19, torch.ones(10), 3)
    assert prober.candidates(9) is None and prober.candidates(19) is None  # the second half is missing


def test_a_stop_between_separate_rounds_leaves_no_trace(trainers):
    """All rounds are done again after it: the same plan, weights and loop state as without the stop."""
    ended = []
    for stops in (False, True):
        trainer = trainers(probe_lora(probes="separate"))
        whole, calls = trainer.between, 0

        def between(trainer=trainer, whole=whole, stops=stops):
            nonlocal calls
            calls += trainer.state.pending_plan
            if stops and calls == 4:  # within the second of six rounds of three grains
                calls += 1
                raise Interrupted(1)
            whole()

        trainer.between = between
        while trainer.state.events == 0:
            result = trainer.train_step()
            if result.stop_flag:
                assert trainer.state.pending_plan
                trainer._allocate(trainer.state.step - 1)
        ended.append((weights_digest(trainer.arena.capture()), trainer.arena.table.digest, trainer.state))
    assert ended[0] == ended[1]


# ---- the exchange ----


def found_of(owners, scores):
    return Candidates(np.array(owners), np.array(scores, float), {})


def test_exchange_moves_as_many_as_leave():
    table = RankTable.start(sites_of((6, 6), (6, 6), (6, 6)), [2, 1, 0])
    plan = exchange(table, [3.0, 1.0, 2.0], found_of([0, 2, 2, 1], [0.1, 5.0, 4.0, 0.2]), n=2, limit=3)
    after = plan.apply(table)
    assert after.ranks == (1, 0, 2)  # a site may end empty, and an empty one grow
    assert plan.scores["highest_pruned"] == 2.0 and plan.scores["lowest_born"] == 4.0


def test_exchange_spares_the_immune_and_full_sites():
    table = RankTable.start(sites_of((2, 2), (6, 6)), [2, 2])
    immune = np.array([False, False, True, True])
    plan = exchange(table, [5.0, 4.0, 1.0, 2.0], found_of([0, 1], [9.0, 1.0]), n=1, limit=4, immune=immune)
    assert plan.apply(table).ranks == (2, 2)  # the lowest that may leave is of the full site, which makes room in it
    spared = np.ones(4, bool)
    assert exchange(table, [5.0, 4.0, 1.0, 2.0], found_of([0, 1], [9.0, 1.0]), n=1, limit=4, immune=spared) is None


def test_exchange_without_signal_moves_nothing():
    table = RankTable.start(sites_of((6, 6)), [2])
    assert exchange(table, [1.0, 2.0], found_of([0], [0.0]), n=1, limit=2) is None


def test_exchange_counts_parameters():
    """A component of the wide site costs 30, of the narrow ones 10; the total never passes the limit."""
    table = RankTable.start(sites_of((15, 15), (5, 5), (5, 5)), [1, 1, 1])
    costs = np.array([30, 10, 10])
    plan = exchange(table, [0.3, 2.0, 2.0], found_of([0, 1, 2], [1.0, 9.0, 8.0]), n=1, costs=costs, limit=50)
    assert plan.apply(table).ranks == (0, 2, 2)  # worth 0.01 a number leaves; two are born for 20 of its 30
    again = plan.apply(table)
    second = exchange(again, [1.0] * 4, found_of([1], [1.0]), n=1, costs=costs, limit=50)
    assert second.apply(again).ranks == (0, 3, 2)  # what was free is used; nobody has to leave for it


@pytest.mark.parametrize(("limit", "ranks"), [(6, (2, 4)), (4, (1, 3)), (3, (1, 2)), (2, (1, 1))])
def test_exchange_follows_the_limit(limit, ranks):
    """One moves, and the table of four grows or falls; with a limit of two all that leave stay gone but one."""
    table = RankTable.start(sites_of((6, 6), (6, 6)), [2, 2])
    plan = exchange(table, [4.0, 1.0, 3.0, 2.0], found_of([1, 1, 0], [3.0, 2.0, 0.0]), n=1, limit=limit)
    assert plan.apply(table).ranks == ranks


def test_exchange_grows_no_further_than_there_is_signal():
    table = RankTable.start(sites_of((6, 6)), [2])
    plan = exchange(table, [1.0, 2.0], found_of([0, 0], [1.0, 0.0]), n=0, limit=9)
    assert plan.apply(table).ranks == (3,)


def test_a_run_ends_with_the_rank_it_aims_at(trainers):
    """From rank 4 up or down, with and without moves; the last event brings the last of them."""
    for target, b in ((6.0, 0), (4.5, 2), (2.0, 0)):
        trainer = trainers(probe_lora(target_r=target, b=b, newborn_immunity=False))
        start = trainer.arena.table
        totals = [start.total]
        for _ in range(50):
            trainer.train_step()
            totals.append(trainer.arena.table.total)
        assert totals[0] == 4 * len(start.sites) and totals[-1] == target * len(start.sites)
        assert totals == sorted(totals, reverse=target < 4.0)


def test_a_run_moves_ranks_and_keeps_their_total(trainers):
    for changes in ({}, {"probes": "separate"}, {"prune_by": "sensitivity"}, {"budget_in": "parameters"}):
        trainer = trainers(probe_lora(**changes))
        start = trainer.arena.table
        numbers = trainer.arena.layout.num_trained
        events = [event for _ in range(30) if (event := trainer.train_step().event) is not None]
        table = trainer.arena.table
        assert len(events) == 4 and table.ranks != start.ranks
        if changes.get("budget_in") == "parameters":
            assert 0.9 * numbers < trainer.arena.layout.num_trained <= numbers
        else:
            assert table.total == start.total


def test_newborn_components_lie_along_found_directions_and_add_nothing(trainers):
    trainer = trainers(probe_lora())
    while (event := trainer.train_step().event) is None:
        pass
    layout, weights = trainer.arena.layout, trainer.arena.engine.weights
    for index, change in event.record.plan.changes.items():
        rows = layout.site_rows(weights, index)
        if change.born:
            torch.testing.assert_close(rows["lora_A"][-change.born :].norm(dim=1), torch.ones(change.born))
            assert not rows["lora_B"][-change.born :].any()


@pytest.mark.parametrize("method", [probe_lora, elalora])
@pytest.mark.parametrize("kind", ["zero", "survivors"])
def test_what_adam_knows_of_a_newborn(trainers, method, kind):
    trainer = trainers(method(newborn_second_moment=kind))
    while (event := trainer.train_step().event) is None:
        pass
    layout, moment = trainer.arena.layout, trainer.arena.capture().full.exp_avg_sq
    for index, change in event.record.plan.changes.items():
        for rows in layout.site_rows(moment, index).values():
            kept, born = rows[: len(change.keep)], rows[len(change.keep) :]
            if kind == "zero":
                assert kept.any() and not born.any()
            else:
                torch.testing.assert_close(born, kept.mean(dim=0).expand_as(born))


def test_each_tower_keeps_its_own_total(trainers):
    """Sites of layer 1 are taken for another tower; every birth of the shared budget would be there."""
    for per_tower in (True, False):
        sites = [replace(s, tower="ab"[n // 2]) for n, s in enumerate(sites_of(*[(8, 8)] * 4))]
        table = RankTable.start(sites, [2] * 4)
        method = probe_lora(per_tower=per_tower, newborn_immunity=False)(table, {})
        state = {
            name: torch.zeros(n if isinstance(n, int) else 8).double() for name, n in method.state_tensors().items()
        }
        method.bind(Binding(table, SimpleNamespace(), torch.zeros(8), state, rows=no_rows(sites)))
        generator = torch.Generator().manual_seed(2)

        def gradients(grain, site, generator=generator):
            noise = torch.randn(8, 8, generator=generator)
            return noise + (9.0 * torch.eye(8) if site.tower == "b" else 0.0)

        hear(method.probes, gradients, event=10)
        after = method.plan(10, torch.arange(8).double()).apply(table)
        assert after.by_tower() == ({"a": 4, "b": 4} if per_tower else {"a": 0, "b": 8})
        assert after.births != table.births


# ---- settings ----


def test_settings_are_checked():
    raw = {
        "model_name_or_path": "m", "method": "probe_lora", "data": {"train_file": "t.jsonl"}, "output_dir": "o",
        "max_steps": 100,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="needs a block `probe_lora:`"):
        parse_config(raw)
    block = {"init_warmup": 10, "final_warmup": 20, "mask_interval": 10}
    with pytest.raises(ConfigError, match="probe_steps=6 needs 12 steps before a reallocation and mask_interval=10"):
        parse_config(raw | {"probe_lora": block})
    assert parse_config(raw | {"probe_lora": block | {"probes": "separate"}}).probe_lora.probe_components == 4
    grown = block | {"mask_interval": 20, "b": 0}
    assert parse_config(raw | {"probe_lora": grown | {"target_r": 12}}).probe_lora.target_r == 12.0
    with pytest.raises(ConfigError, match="b=0 moves no component; raise it, or set target_r"):
        parse_config(raw | {"probe_lora": grown})
    with pytest.raises(ConfigError, match=r"probe_lora.mask_interval=90 gives no reallocation"):
        parse_config(raw | {"probe_lora": block | {"mask_interval": 90}})


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"probe_components": 999}, r"probe_components=999 exceeds the largest rank of .*, \d+; lower it"),
        ({"target_r": 999}, r"target_r=999 asks for \d+ components and the \d+ sites have room for \d+; lower it"),
        ({"target_r": 4, "b": 0}, "b=0 moves no component and target_r=4 is where the ranks start; raise b"),
    ],
)
def test_settings_are_checked_against_the_model(tmp_path, own, said):
    block = {"init_warmup": 2, "final_warmup": 2, "mask_interval": 4, "probe_steps": 2}
    config = write_run(tmp_path, "run", method="probe_lora", elalora=None, r=4, probe_lora=block | own)
    with pytest.raises(ConfigError, match=said):
        prepare(config, [], world_size=1)
