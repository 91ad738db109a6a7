"""ARD-LoRA's formulas, decisions and their way through the loop (methods.md 1.3 and 1.5).

Letters: U units (heads or matrices), G gates, R components, I in, O out.
"""

import functools
import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ardtrain import checkpoint
from ardtrain.adapters import AdapterLinear, bind_arena
from ardtrain.arena import ArenaLayout, Shard
from ardtrain.checkpoint import Identity
from ardtrain.methods.ard_lora import (
    ArdLora,
    bucket,
    make_units,
    project,
    sorted_components,
    sorted_within,
    tied_keys,
)
from ardtrain.methods.base import Binding, Statistics
from ardtrain.methods.lora import Lora
from ardtrain.methods.variation import alpha_step, chains_of, proximal_step, smoothed
from ardtrain.ranks import RankTable, Site
from ardtrain.trainer import LoopState
from tests.reference import ard_lora_numpy as reference
from tests.tiny import ARD, HeldOutBatches, TokenBatches, ard_lora, equal_bits, sites_of, tiny_llama, tiny_trainer

FEW = TokenBatches(num_grains=1)
FREE = {"target_r": None, "alpha_scale": "none"}  # no budget, alpha's gradient as it is


def made(r0=4, *, sites=3, capacity=None, alpha=None, shared=None, size=16, **changes):
    """A bound method over square sites; capacity: ranks of the table it is bound to (default r0 each)."""
    first = RankTable.start(sites_of(*[(size, size)] * sites), [r0] * sites)
    method = ArdLora(replace(ARD, **changes), first, shared)
    table = RankTable.start(first.sites, capacity or [r0] * sites)
    layout = ArenaLayout(table, method.entries)
    state = {name: torch.zeros(kind, dtype=torch.float64) for name, kind in method.state_tensors().items()}
    method.bind(Binding(table, Shard(layout, 0, 1), torch.zeros(table.total, dtype=torch.int64), state))
    if alpha is not None:
        state["alpha"].copy_(torch.as_tensor(alpha, dtype=torch.float64))
    return method


def observe(method, step, gates=None):
    """One step whose gates' gradient is `gates` (default 0), with weights of 1."""
    size = method.binding.shard.layout.size
    gates = torch.zeros(len(method._slots.unit)) if gates is None else gates
    method.observe(step, Statistics(torch.zeros(size), torch.ones(size), gates))
    method.after_step(step)


# ---- masks (methods.md H3, 1.5.2) ----


def naive_ramp(rank, capacity, width):
    """methods.md H3, one component at a time."""
    return [1.0] + [min(1.0, max(0.0, (rank - i - 0.5) / width + 0.5)) for i in range(1, capacity)]


@pytest.mark.parametrize(
    ("alpha", "wanted"),
    [(0.55, [1, 1, 0.2, 0, 0, 0, 0, 0]), (1.3, [1, 1, 1, 1, 1, 0.2, 0, 0]), (1.0, [1, 1, 1, 1, 0, 0, 0, 0])],
)
def test_masks_of_the_specification(alpha, wanted):
    method = made(4, sites=1, capacity=[8], alpha=[alpha])
    assert method.mask(10).tolist() == pytest.approx(wanted, abs=1e-12)
    assert method.gates(10).dtype == torch.float32


@pytest.mark.parametrize(("r0", "capacity"), [(1, 2), (4, 8), (8, 16)])
def test_mask_sums_to_the_rank_and_falls_with_the_place(r0, capacity):
    previous = None
    for number in range(64, 64 * capacity + 1):
        rank = number / 64
        method = made(r0, sites=1, capacity=[capacity], alpha=[rank / r0])
        mask = method.mask(10)
        assert float(mask.sum()) == pytest.approx(rank, abs=1e-12)
        assert bool((mask[1:] <= mask[:-1]).all())
        assert mask.tolist() == pytest.approx(naive_ramp(rank, capacity, 1.0), abs=1e-12)
        if previous is not None:  # continuous, across whole ranks too
            assert float((mask - previous).abs().max()) <= 1 / 64 + 1e-12
        previous = mask


@pytest.mark.parametrize("width", [0.5, 2.0, 3.0, 5.0])
def test_a_ramp_of_any_width_by_the_naive_loop(width):
    for rank in np.linspace(1.0, 8.0, 113).tolist():
        method = made(4, sites=1, capacity=[8], alpha=[rank / 4], ramp_width=width)
        assert method.mask(10).tolist() == pytest.approx(naive_ramp(rank, 8, width), abs=1e-12)


def test_sigmoid_mask_cools_geometrically_over_the_adapt_phase():
    method = made(4, sites=1, capacity=[6], alpha=[0.7], mask="sigmoid", sigmoid_tau=(2.0, 0.02))
    # adapt phase: steps 4 to 48; half way the temperature is the geometric mean
    for step, tau in ((4, 2.0), (26, 0.2), (48, 0.02), (55, 0.02)):
        wanted = [1.0] + [1 / (1 + math.exp(-(2.8 - i - 0.5) / tau)) for i in range(1, 6)]
        assert method.mask(step).tolist() == pytest.approx(wanted, rel=1e-12)


def test_rounding_is_half_up_not_half_to_even():
    """torch.round(2.5) is 2."""
    for rank, wanted in ((0.5, 1), (1.5, 2), (2.5, 3), (2.49, 2), (3.5, 4)):
        method = made(4, sites=1, capacity=[6], alpha=[rank / 4], mask="straight_through")
        assert method.mask(10).tolist() == [1.0] * wanted + [0.0] * (6 - wanted)
    method = made(4, sites=1, alpha=[2.5 / 4], **FREE)
    method.observe(method.freeze_step, Statistics(torch.zeros(256), torch.ones(256), None))
    assert method.plan(method.freeze_step, None).scores["rounded_rank"] == 3.0


# ---- alpha's gradient (1.5.3, 1.5.6) ----


@pytest.mark.parametrize(
    "changes",
    [{}, {"ramp_width": 3.0}, {"mask": "sigmoid"}, {"tie": "matrix"}, {"tie": "layer"}],
    ids=["ramp", "wide ramp", "sigmoid", "tied by matrix", "tied by layer"],
)
def test_gradient_is_that_of_the_mask_by_finite_differences(changes):
    """d/dalpha of sum_g c_g mask_g(alpha), away from whole ranks."""
    method = made(4, sites=3, capacity=[8, 8, 8], **changes)
    numbers = np.random.default_rng(0)
    weights = torch.tensor(numbers.normal(size=24))
    alpha = method.binding.state["alpha"]
    for _ in range(5):
        alpha.copy_(torch.tensor((numbers.integers(4, 31, len(alpha)) + 0.4) / 16))
        gradient = method.alpha_gradient(10, weights)
        for k in range(len(alpha)):
            sides = []
            for move in (1e-6, -1e-6):
                alpha[k] += move
                sides.append(float((method.mask(10) * weights).sum()))
                alpha[k] -= move
            assert float(gradient[k]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6, abs=1e-7)


def test_straight_through_has_the_ramps_gradient_behind_a_hard_mask():
    hard = made(4, sites=1, capacity=[8], alpha=[0.6], mask="straight_through")
    soft = made(4, sites=1, capacity=[8], alpha=[0.6])
    weights = torch.arange(1.0, 9.0)
    assert hard.mask(10).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert torch.equal(hard.alpha_gradient(10, weights), soft.alpha_gradient(10, weights))
    assert float(hard.alpha_gradient(10, weights)) == 4 * 3.0  # r0 times the boundary component's


def one_by_one_problem():
    """methods.md 1.5.3: r0=2, alpha=0.75, x=1, A=(1,1), B=(2,4), target 5, loss half the squared error."""
    sites = [Site("a.0.p", "a.0.p", 2, 2, scaling=1.0)]
    method = ArdLora(replace(ARD, **FREE), RankTable.start(sites, [2]), {})
    layout = ArenaLayout(RankTable.start(sites, [2]), method.entries)
    state = {name: torch.zeros(kind, dtype=torch.float64) for name, kind in method.state_tensors().items()}
    method.bind(Binding(layout.table, Shard(layout, 0, 1), torch.zeros(2, dtype=torch.int64), state))
    return method, state


def test_gradient_by_hand():
    method, state = one_by_one_problem()
    state["alpha"][0] = 0.75
    linear = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    linear.weight.zero_()
    layer = AdapterLinear(linear, scaling=1.0)
    gates = method.gates(10).requires_grad_()
    assert gates.tolist() == [1.0, 0.5]
    layer.bind({"lora_A": torch.ones(2, 1), "lora_B": torch.tensor([[2.0], [4.0]])}, (2,), gates)
    out = layer(torch.ones(1, 1))
    assert out.tolist() == [[4.0]]
    loss = 0.5 * (out - 5.0).square().sum()
    (by_gate,) = torch.autograd.grad(loss, gates)
    gradient = method.alpha_gradient(10, by_gate)
    assert gradient.tolist() == [-8.0]
    # lambda 0.1, beta 0.5, previous alpha 0.5: -8 + 0.1 + 0.05 = -7.85, the slope of the proximal step upwards too
    alpha = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    mask = torch.stack([torch.ones_like(alpha), 2 * alpha - 1])
    whole = 0.5 * ((mask * torch.tensor([2.0, 4.0])).sum() - 5.0) ** 2 + 0.1 * alpha.abs() + 0.05 * (alpha - 0.5).abs()
    whole.backward()
    assert float(alpha.grad) == pytest.approx(-7.85, abs=1e-12)
    step = proximal_step(gradient, rate=0.01, l1=0.1, beta=0.5, form="temporal")
    assert float(step) == pytest.approx(0.01 * 7.85, abs=1e-12)


# ---- the proximal step (H4, 1.5.4) ----


@pytest.mark.parametrize(("g", "wanted"), [(0.3, -0.08), (0.0, -0.05), (-1.2, 0.0), (-2.0, 0.05)])
def test_proximal_numbers_of_the_specification(g, wanted):
    step = proximal_step(torch.tensor([g], dtype=torch.float64), rate=0.1, l1=1.0, beta=0.5, form="temporal")
    assert float(step) == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("form", ["temporal", "temporal_l2"])
def test_proximal_step_minimises_its_objective(form):
    """(g + l1) d + l1 beta |d| (or half its square) + d^2 / (2 rate), by a fine grid."""
    numbers, grid = np.random.default_rng(1), np.linspace(-1.0, 1.0, 400_001)
    for _ in range(20):
        g, price, beta, rate = (
            numbers.normal(),
            numbers.uniform(0, 2),
            numbers.uniform(0, 2),
            numbers.uniform(0.01, 0.2),
        )
        variation = np.abs(grid) if form == "temporal" else grid**2 / 2
        best = grid[np.argmin((g + price) * grid + price * beta * variation + grid**2 / (2 * rate))]
        step = proximal_step(torch.tensor([g], dtype=torch.float64), rate=rate, l1=price, beta=beta, form=form)
        assert float(step) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("beta", [1.0, 1.5])
def test_no_gradient_and_beta_of_one_is_a_fixed_point(beta):
    zero = torch.zeros(3, dtype=torch.float64)
    assert not proximal_step(zero, rate=0.1, l1=2.0, beta=beta, form="temporal").any()
    assert proximal_step(zero, rate=0.1, l1=2.0, beta=0.99, form="temporal").any()
    method = made(4, alpha=[0.5, 1.0, 1.5], capacity=[8, 8, 8], beta=beta, l1=2.0, **FREE)
    for step in range(4, 30):
        observe(method, step)
    assert method.binding.state["alpha"].tolist() == [0.5, 1.0, 1.5]


def test_alpha_rests_inside_the_band_and_moves_outside():
    """It moves only where |g + l1| > l1 beta: here g < -1.5 (up) or g > -0.5 (down)."""
    gradient = torch.tensor([-1.6, -1.49, -1.0, -0.51, -0.4], dtype=torch.float64)
    step = proximal_step(gradient, rate=0.1, l1=1.0, beta=0.5, form="temporal")
    assert step.sign().tolist() == [1, 0, 0, 0, -1]


@pytest.mark.parametrize("length", [2, 3, 5])
def test_variation_along_a_chain_minimises_its_objective(length):
    numbers = np.random.default_rng(length)
    for weight in (0.01, 0.3, 2.0):
        values = numbers.normal(size=length)
        ours = smoothed(torch.from_numpy(values), weight).numpy()
        assert ours == pytest.approx(reference.smoothed(values, weight), abs=1e-12)
    assert ours == pytest.approx(np.full(length, values.mean()), abs=1e-12)  # a heavy weight leaves one value


def test_two_neighbours_by_hand():
    """0 and 1 with weight 0.3 come 0.3 nearer each; with 0.6 they meet."""
    pair = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert smoothed(pair, 0.3).tolist() == pytest.approx([0.3, 0.7], abs=1e-15)
    assert smoothed(pair, 0.6).tolist() == pytest.approx([0.5, 0.5], abs=1e-15)
    assert smoothed(pair, 0.0) is pair
    step = {"rate": 0.1, "l1": 1.0, "beta": 0.5, "chains": [[0, 1]]}
    moved = alpha_step(pair, torch.tensor([0.0, -2.0], dtype=torch.float64), form="depth", **step)
    assert moved.tolist() == pytest.approx([-0.05, 0.05], abs=1e-15)  # to -0.1 and 1.1, then 0.05 nearer each


def test_chains_follow_layers_by_number_and_heads_of_one_matrix():
    modules = [f"model.layers.{i}.self_attn.{m}" for i in range(11) for m in ("k_proj", "q_proj")]
    names = sorted(modules)  # text order: layer 10 comes before layer 2
    chains = chains_of(names, "depth")
    assert sorted([names[i] for i in chain] for chain in chains) == [modules[0::2], modules[1::2]]
    heads = [f"model.layers.{i}.q_proj:{h:06d}" for i in range(2) for h in range(3)]
    assert chains_of(heads, "heads") == [[0, 1, 2], [3, 4, 5]]
    tied = ["model.layers.0.mlp.up_proj", *(f"model.layers.0:head.{h:06d}" for h in range(3))]
    assert chains_of(tied, "heads") == [[1, 2, 3]]
    assert chains_of(heads, "temporal") == []


def test_variation_over_depth_pulls_layers_together(world):
    """The same run with and without it: with it the alphas of a kind of matrix lie closer along the layers."""
    spread = {}
    for form in ("depth", "temporal"):
        method = ard_lora(tie="matrix", tv_form=form, l1=2.0, beta=0.9, target_r=None)
        trainer = pushed(tiny_trainer(method, form="shared_a", r=4, learning_rate=2e-2, data=FEW))
        for _ in range(20):
            trainer.train_step()
        alpha = trainer.method.binding.state["alpha"]
        chains = trainer.method._chains or spread["chains"]
        spread |= {"chains": chains, form: sum(float(alpha[c].diff().abs().sum()) for c in chains)}
        trainer.arena.engine.destroy()
    assert spread["depth"] < 0.5 * spread["temporal"]


# ---- alpha over time (H8, H14) ----


def test_one_alpha_step_by_hand():
    """Mean of two observations, divided by its root mean square (the first average is bias-corrected to itself)."""
    method = made(4, sites=2, alpha=[0.9, 0.9], lr_alpha=0.1, alpha_interval=2, l1=0.5, beta=0.2, target_r=None)
    first, second = torch.zeros(8), torch.zeros(8)
    first[3], second[3], first[7], second[7] = -1.0, -3.0, 0.5, 1.5  # the boundary components
    observe(method, 4, first)
    assert method.binding.state["alpha"].tolist() == [0.9, 0.9]
    observe(method, 5, second)
    g = 4 * np.array([-2.0, 1.0])
    scaled = g / math.sqrt((g**2).mean())
    wanted = -0.1 * (scaled + 0.5)
    wanted = np.sign(wanted) * np.maximum(np.abs(wanted) - 0.1 * 0.5 * 0.2, 0)
    assert method.binding.state["alpha"].tolist() == pytest.approx(np.clip(0.9 + wanted, 0.25, 1.0).tolist(), abs=1e-12)
    assert not method.binding.state["alpha_gradient"].any()
    assert method.binding.state["controller"].tolist()[:4] == pytest.approx([0.5, 0.0, (g**2).mean() * 0.1, 1.0])


def test_scaled_gradient_makes_the_losses_unit_irrelevant():
    runs = []
    for size in (1.0, 1e-6, 1e5):
        method = made(4, sites=2, alpha=[0.9, 0.6], target_r=None, l1=0.3)
        numbers = np.random.default_rng(3)
        for step in range(4, 24):
            observe(method, step, torch.tensor(numbers.normal(size=8) * size).float())
        runs.append(method.binding.state["alpha"].tolist())
    assert runs[1] == pytest.approx(runs[0], abs=1e-6) and runs[2] == pytest.approx(runs[0], abs=1e-6)
    assert max(runs[0]) != min(runs[0])


def test_alpha_learns_in_the_adapt_phase_alone():
    method = made(4, l1=1.0, alpha=[0.9] * 3, alpha_interval=1, **FREE)
    moved = []
    for step in range(60):
        before = method.binding.state["alpha"].clone()
        observe(method, step)
        if not torch.equal(before, method.binding.state["alpha"]):
            moved.append(step)
        assert method.adapts(step) is (4 <= step < 48)
    assert moved and min(moved) == 4 and max(moved) < 48


@pytest.mark.parametrize("price", [1.0, 1e3, 1e9])
def test_every_unit_keeps_rank_one_however_large_the_price(price):
    method = made(4, l1=price, l1_max=price, **FREE)
    for step in range(4, 48):
        observe(method, step)
    assert method.unit_ranks().tolist() == [1.0] * 3
    assert method.mask(47).view(3, 4).tolist() == [[1.0, 0, 0, 0]] * 3
    plan = method.plan(47, None)
    assert [len(plan.changes[i].keep) + plan.changes[i].born for i in range(3)] == [1, 1, 1]


def test_alpha_stays_within_capacity_and_r_max():
    method = made(4, capacity=[6, 8, 8], r_max=7, **FREE)
    for step in range(4, 48):
        observe(method, step, torch.full((22,), -100.0))
    assert method.unit_ranks().tolist() == [6.0, 7.0, 7.0]


def test_gates_are_absent_only_where_all_are_open_for_sure():
    method = made(4)
    assert [method.gates(step) is None for step in (0, 3, 4)] == [True, True, False]
    shared = {f"s{i}": (4, "lora_B") for i in range(3)}
    for mask in ("sigmoid", "ramp"):  # whatever the mask would say of alpha = 1
        method = made(4, shared=shared, mask=mask, ramp_width=3.0)
        assert [method.gates(step) is None for step in (0, 3, 4)] == [True, True, False]
        assert len(method.gates(4)) == 48
    grown = made(4, capacity=[5, 4, 4])
    assert grown.gates(0).tolist() == [1, 1, 1, 1, 0] + [1] * 8


# ---- the controller (H7, 1.5.9) ----


@pytest.mark.parametrize(("lr", "rate"), [(0.05, 0.5), (0.2, 0.5), (0.02, 0.5), (0.05, 0.05), (0.05, 2.0)])
@pytest.mark.parametrize("form", ["temporal", "temporal_l2"])
def test_on_a_flat_loss_the_total_rank_comes_to_the_target_and_stays(lr, rate, form):
    """Band: within 1 % of the target after 300 updates, and never below it by more than 1 % on the way."""
    method = made(
        8, sites=4, lr_alpha=lr, controller_rate=rate, target_r=5.0, total_steps=400, alpha_interval=1, tv_form=form
    )
    totals = []
    for step in range(4, 304):
        observe(method, step)
        totals.append(float(method.unit_ranks().sum()))
    assert totals[-1] == pytest.approx(20.0, rel=0.01)
    assert min(totals) >= 20.0 * 0.99
    assert totals == sorted(totals, reverse=True)


def test_the_controller_settles_where_heads_differ():
    """A head's gain falls with its rank, g = -s / rank: ranks follow s, their total comes within 3 % of the target."""
    method = made(8, sites=6, capacity=[16] * 6, lr_alpha=0.05, target_r=6.0, total_steps=400, alpha_interval=1)
    worth = torch.arange(1.0, 7.0, dtype=torch.float64)
    method.alpha_gradient = lambda step, gates: -worth / method.unit_ranks()
    totals = []
    for step in range(4, 304):
        observe(method, step)
        totals.append(float(method.unit_ranks().sum()))
    assert all(abs(t / 36.0 - 1.0) <= 0.03 for t in totals[-100:])
    ranks = method.unit_ranks().tolist()
    assert ranks == sorted(ranks) and ranks[-1] > 3 * ranks[0]


def test_price_stays_within_its_limits():
    low = made(4, target_r=8.0, l1=0.3, alpha_interval=1)
    high = made(8, target_r=1.0, l1_max=0.7, lr_alpha=1e-4, alpha_interval=1)
    for step in range(4, 48):
        observe(low, step)
        observe(high, step)
        assert 0.0 <= float(low.binding.state["controller"][0]) <= 0.3
        assert float(high.binding.state["controller"][0]) <= 0.7
    assert float(low.binding.state["controller"][0]) == 0.0
    assert float(high.binding.state["controller"][0]) == 0.7


def test_parameters_as_budget_price_a_wide_matrix_more():
    table = RankTable.start(sites_of((8, 8), (64, 64)), [4, 4])
    units = make_units(table, {}, replace(ARD, budget_in="parameters"))
    assert [u.cost for u in units] == pytest.approx([16 / 72, 128 / 72])
    assert [u.cost for u in make_units(table, {}, ARD)] == [1.0, 1.0]


# ---- projection (H7) ----


@pytest.mark.parametrize("seed", range(30))
def test_projection_hits_the_budget(seed):
    numbers = np.random.default_rng(seed)
    count = int(numbers.integers(1, 40))
    ranks = numbers.uniform(0.5, 12, count)
    if seed % 3 == 0:
        ranks = np.round(ranks * 2) / 2  # many ties
    target = int(numbers.integers(count, 12 * count + 1))
    limits = [16] * count
    chosen = project(ranks.tolist(), [1.0] * count, float(target), limits)
    assert sum(chosen) == target
    assert min(chosen) >= 1
    for i, j in itertools.product(range(count), repeat=2):  # a common shift keeps the order
        assert ranks[i] < ranks[j] or chosen[i] >= chosen[j] or ranks[i] == ranks[j]
    within = [c for c in chosen if 1 < c < 16]
    if len(within) == count:
        assert max(np.array(chosen) - ranks) - min(np.array(chosen) - ranks) <= 1 + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_projection_with_costs_and_limits_stays_below_and_near(seed):
    numbers = np.random.default_rng(100 + seed)
    count = int(numbers.integers(2, 20))
    ranks, costs = numbers.uniform(1, 8, count), numbers.uniform(0.3, 3.0, count)
    limits = numbers.integers(1, 9, count)
    target = float((costs * limits).sum() * numbers.uniform(0.2, 1.2))
    if target < costs.sum():
        target = float(costs.sum())
    chosen = np.array(project(ranks.tolist(), costs.tolist(), target, limits.tolist()))
    assert (chosen >= 1).all() and (chosen <= limits).all()
    cost = float((chosen * costs).sum())
    assert cost <= target + 1e-6
    room = [costs[i] for i in range(count) if chosen[i] < limits[i]]
    assert not room or target - cost < sum(costs)
    assert room or cost == pytest.approx(float((costs * limits).sum()))


def test_projection_of_a_budget_below_one_each_keeps_one_each():
    assert project([3.0, 2.0], [1.0, 1.0], 1.0, [4, 4]) == [1, 1]


# ---- capacities and order (H9, H10) ----


def test_default_buckets():
    wanted = [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20]
    assert [bucket(n, None, 100) for n in range(1, 18)] == wanted
    assert (bucket(33, None, 100), bucket(33, None, 36), bucket(100, None, 64)) == (40, 36, 64)
    assert [bucket(n, (16, 4, 8), 32) for n in (1, 4, 5, 9, 16, 17)] == [4, 4, 8, 16, 16, 32]


def random_unit(numbers, gates):
    return numbers.normal(size=(len(gates), 3)), numbers.normal(size=(len(gates), 4))


def contribution(a, b, gates):
    return sum(g * np.outer(y, x) for g, x, y in zip(gates, a, b, strict=True))


@pytest.mark.parametrize("half", [0.0, 0.25, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_sorting_keeps_the_function(half, seed):
    numbers = np.random.default_rng(seed)
    gates = [1.0, 1.0, 1.0, half, 0.0, 0.0]
    a, b = random_unit(numbers, gates)
    scores = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    kept, folds = sorted_components(np.array(gates), scores, np.array([len(gates)]))
    order = kept.tolist()
    folded = b.copy()
    for position, part, factors in folds.get(0, ()):
        assert part == "lora_B" and len(factors) == 1
        folded[position] *= factors[0]
    np.testing.assert_allclose(contribution(a[order], folded[order], gates), contribution(a, b, gates), rtol=1e-12)
    sizes = np.linalg.norm(a[order], axis=1) * np.linalg.norm(folded[order], axis=1) * gates
    open_ones = sum(g > 0 for g in gates)
    assert (np.diff(sizes[:open_ones]) <= 1e-12).all()  # largest first, what each gives now
    assert order[open_ones:] == list(range(open_ones, 6))
    assert sorted(order) == list(range(6))


@pytest.mark.parametrize("gates", [[1.0, 1.0, 0.24, 0.0], [1.0, 0.6, 0.3, 0.0]], ids=["below 0.25", "two half open"])
def test_sorting_touches_nothing_where_a_factor_would_be_large(gates):
    order, folds = sorted_components(np.array(gates), np.arange(1.0, 5.0), np.array([4]))
    assert order.tolist() == [0, 1, 2, 3] and not folds


def test_units_are_sorted_each_for_itself():
    numbers = np.random.default_rng(3)
    units = [[1.0, 1.0, 0.5, 0.0], [], [1.0], [1.0, 0.3], [1.0, 0.6, 0.3, 0.0], [1.0, 0.1], [1.0, 1.0, 1.0]]
    scores = [numbers.uniform(size=len(gates)).round(1) for gates in units]
    ranks = np.array([len(gates) for gates in units])
    order, folds = sorted_components(np.concatenate(units), np.concatenate(scores), ranks)
    together = [own.tolist() for own in np.split(order, np.cumsum(ranks)[:-1])]
    for unit, (gates, own) in enumerate(zip(units, scores, strict=True)):
        alone, fold = sorted_components(np.array(gates), own, np.array([len(gates)]))
        assert together[unit] == alone.tolist() and folds.get(unit) == fold.get(0)
    assert together[4] == [0, 1, 2, 3] and 4 not in folds and folds


def test_sorting_within_units_is_lexsort():
    numbers = np.random.default_rng(0)
    for counts in (numbers.integers(1, 9, 50), np.array([40, *[1] * 30]), np.array([0, 3, 0]), np.array([], np.int64)):
        starts, unit = np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)
        keys = np.where(numbers.random(len(unit)) < 0.3, np.inf, numbers.integers(0, 3, len(unit)))  # ties, too
        order = sorted_within(keys, starts, counts, np.arange(len(unit)) - starts[unit])
        assert order.tolist() == np.lexsort((keys, unit)).tolist()


def test_a_capacity_changes_after_two_checks_outside_its_bucket():
    method = made(4, sites=2, capacity=[6, 6], alpha=[2.2 / 4, 1.3], **FREE)
    scores = torch.ones(12, dtype=torch.float64)
    assert method.plan(8, scores) is None  # first look: site 0 wants 4, site 1 (rank 5.2) 7
    assert method.binding.state["outside"].tolist() == [1.0, 1.0]
    method.binding.state["alpha"][1] = 1.2  # rank 4.8: 6 again
    plan = method.plan(12, scores)
    assert plan.changes.keys() == {0}
    assert (plan.changes[0].keep, plan.changes[0].born) == ((0, 1, 2, 3), 0)
    assert method.binding.state["outside"].tolist() == [0.0, 0.0]


def test_the_first_look_acts_at_once():
    method = made(4, sites=1, **FREE)
    plan = method.plan(4, torch.ones(4, dtype=torch.float64))
    assert (plan.changes[0].keep, plan.changes[0].born) == ((0, 1, 2, 3), 1)  # one component to grow into


def test_a_wide_ramp_keeps_what_is_open_beyond_the_rank():
    """width 5: components 0 .. 6 are open at rank 5.2; four of capacity 8 would be too few for rank 2.2's."""
    method = made(4, sites=1, capacity=[8], alpha=[2.2 / 4], ramp_width=5.0, **FREE)
    mask = method.mask(8)
    method.plan(8, torch.ones(8, dtype=torch.float64))
    plan = method.plan(12, torch.ones(8, dtype=torch.float64))
    kept = 8 if plan is None else len(plan.changes[0].keep)
    assert kept >= int((mask > 0).sum()) == 5
    assert plan is not None and not mask[kept:].any()


def test_due_at_the_checks_and_at_the_freeze():
    method = made(4)
    assert [s for s in range(60) if method.due(s)][:-12] == [*range(4, 47, 4), 47]
    method.binding.state["controller"][4] = 1.0
    assert [s for s in range(48, 60) if method.due(s)] == []


# ---- ties (H2, H12) ----


def llama_units(**changes):
    trainer = tiny_trainer(ard_lora(**changes), form="own_a", r=2, start=False)
    return trainer.method


def tie_names(method):
    keys = tied_keys(method.units, method.settings.tie)
    return {(u.module.removeprefix("model.layers."), u.head): k for u, k in zip(method.units, keys, strict=True)}


@pytest.mark.parametrize(("tie", "alphas"), [("none", 30), ("head", 14), ("matrix", 14), ("layer", 2)])
def test_number_of_alphas(world, tie, alphas):
    """2 layers; 4 query heads, 2 key and value heads, 4 of o, three matrices without heads."""
    assert llama_units(tie=tie).num_alphas == alphas


def test_key_and_value_heads_take_the_mean_of_their_group(world):
    method = llama_units(tie="head")
    names = tie_names(method)
    for h in range(4):
        assert names["0.self_attn.q_proj", h] == names["0.self_attn.o_proj", h] == (f"model.layers.0:head.{h:06d}",)
    for h in range(2):
        group = tuple(f"model.layers.1:head.{g:06d}" for g in (2 * h, 2 * h + 1))
        assert names["1.self_attn.k_proj", h] == names["1.self_attn.v_proj", h] == group
    assert names["0.mlp.up_proj", 0] == ("model.layers.0.mlp.up_proj",)


def started(**changes):
    return tiny_trainer(ard_lora(**changes), form="own_a", r=2)


def ranks_of(trainer):
    method = trainer.method
    out = {}
    for unit, rank in zip(method.units, method.unit_ranks().tolist(), strict=True):
        out[unit.module.removeprefix("model.layers."), unit.head] = rank
    return out


def test_ranks_under_each_tie(world):
    trainer = started(tie="head")
    names = sorted({k for own in tied_keys(trainer.method.units, "head") for k in own})
    alpha = trainer.method.binding.state["alpha"]
    for h, value in enumerate((0.5, 1.0, 1.5, 0.75)):
        alpha[names.index(f"model.layers.0:head.{h:06d}")] = value
    ranks = ranks_of(trainer)
    assert [ranks["0.self_attn.q_proj", h] for h in range(4)] == [1.0, 2.0, 3.0, 1.5]
    assert [ranks["0.self_attn.o_proj", h] for h in range(4)] == [1.0, 2.0, 3.0, 1.5]
    assert [ranks["0.self_attn.k_proj", h] for h in range(2)] == [1.5, 2.25]
    assert {r for (m, _), r in ranks.items() if m[0] == "1" or "mlp" in m} == {2.0}
    trainer.arena.engine.destroy()
    trainer = started(tie="layer")
    trainer.method.binding.state["alpha"].copy_(torch.tensor([0.5, 1.25]))
    ranks = ranks_of(trainer)
    assert {(m[0], r) for (m, _), r in ranks.items()} == {("0", 1.0), ("1", 2.5)}
    trainer.arena.engine.destroy()


def test_tied_units_of_unlike_room_never_leave_their_own():
    """A layer's alpha may lift a wide matrix to 16 where a narrow one has room for 8 alone."""
    sites = [Site("m.0.a", "m.0.a", 8, 8), Site("m.0.b", "m.0.b", 64, 64)]
    first = RankTable.start(sites, [8, 8])
    for target in (None, 12.0):
        method = ArdLora(replace(ARD, tie="layer", target_r=target), first, {})
        layout = ArenaLayout(RankTable.start(sites, [8, 16]), method.entries)
        state = {name: torch.zeros(kind, dtype=torch.float64) for name, kind in method.state_tensors().items()}
        method.bind(Binding(layout.table, Shard(layout, 0, 1), torch.zeros(24, dtype=torch.int64), state))
        for step in range(4, 48):
            observe(method, step, torch.full((24,), -100.0))
        assert method.unit_ranks().tolist() == [16.0, 16.0]
        assert method.usable_ranks().tolist() == [8.0, 16.0]
        plan = method.plan(47, None)
        ranks = plan.apply(layout.table).ranks if plan is not None else layout.table.ranks
        assert ranks == (8, 16)
        assert plan is None or plan.scores["continuous_rank"] == 24.0


# ---- through the loop ----


class Watch:
    """Logits on fixed tokens, and the held-out loss, right before and right after each resize event."""

    def __init__(self, trainer):
        self.trainer, self.events, self.apply = trainer, [], trainer.arena.apply
        trainer.arena.apply = self

    def function(self, gates):
        t = self.trainer
        t.backbone.module.eval()
        with torch.no_grad():
            bind_arena(t.adapters, t.arena.layout, t.arena.engine.weights, gates)
            logits = t.backbone.module(input_ids=torch.arange(4, 44).view(2, 20)).logits
            data = HeldOutBatches(3)
            batches = [data.collate(g) for g in data.grains()]
            losses = [float(t.loss_sum(t.backbone.module, b, device=t.world.device)) for b in batches]
        t.backbone.module.train()
        return logits, sum(losses)

    def __call__(self, plan, *, step):
        method = self.trainer.method
        before = self.function(method.mask(step).float())
        weights, layout = self.trainer.arena.engine.weights.clone(), self.trainer.arena.layout
        record = self.apply(plan, step=step)
        after = self.function(method.gates(step + 1))
        self.events.append((step, plan, record, before, after, (weights, layout)))
        return record


def far(before, after):
    """Largest difference of the logits beside the largest logit, and relative difference of the loss."""
    logits = float((before[0] - after[0]).abs().max() / before[0].abs().max())
    return logits, abs(before[1] / after[1] - 1.0)


def pushed(trainer, seed=0):
    """Adds a random gradient to what the gates say, so that alphas move apart in a short run."""
    numbers = np.random.default_rng(seed)
    method, direction = trainer.method, None
    inner = method.alpha_gradient

    def gradient(step, gates):
        nonlocal direction
        own = inner(step, gates)
        if direction is None:
            direction = torch.tensor(numbers.normal(size=len(own)))
        return own + direction * (1e-3 + own.abs().mean())

    method.alpha_gradient = gradient
    return trainer


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("own_a", {}),
        ("own_a", {"ramp_width": 5.0}),
        ("own_a", {"tie": "head"}),
        ("shared_a", {}),
        ("shared_a", {"tie": "matrix", "tv_form": "temporal_l2"}),
    ],
)
def test_capacity_events_and_freeze_keep_the_function(world, form, changes):
    """methods.md 5 and 1.5.8: to float32 rounding, 2e-6 of the largest logit."""
    method = ard_lora(target_r=None, l1=0.2, **changes)
    trainer = pushed(tiny_trainer(method, form=form, r=4, learning_rate=2e-2, data=FEW))
    watch = Watch(trainer)
    for _ in range(49):
        trainer.train_step()
    assert len(watch.events) >= 4
    assert watch.events[-1][0] == 47 and "frozen" in watch.events[-1][1].reason
    reordered = grown = shrunk = half = 0
    for step, plan, record, before, after, _ in watch.events:
        if step < 47 or not changes.get("ramp_width"):
            logits, loss = far(before, after)
            assert logits <= 2e-6 and loss <= 1e-6, f"step {step}: {logits} {loss}"
        for index, change in plan.changes.items():
            moved = change.keep != tuple(sorted(change.keep))
            assert not (moved and trainer.adapters[record.before.sites[index].module].gates_per_component > 1)
            reordered += moved
            grown += bool(change.born)
            shrunk += len(change.keep) < record.before.ranks[index]
            half += bool(change.fold)
    assert grown and shrunk and half
    assert bool(reordered) is ("ramp_width" not in changes)  # there several gates are half open
    assert max(abs(r - 4) for r in trainer.method.unit_ranks().tolist()) > 1
    assert trainer.method.frozen
    trainer.arena.engine.destroy()


def delta(trainer, gates, weights=None, layout=None):
    """Module -> the adapter's change of the weight, [O, I] float64."""
    arena = trainer.arena
    bind_arena(trainer.adapters, layout or arena.layout, arena.engine.weights if weights is None else weights, gates)
    out = {}
    with torch.no_grad():
        for module, adapter in trainer.adapters.items():
            out[module] = adapter.product(torch.eye(adapter.in_features)).T.double()
    return out


def test_freeze_by_projection_removes_what_it_says(world):
    """methods.md 1.5.8: rounding down takes away exactly m_k B_k A_k of each component that leaves."""
    trainer = pushed(tiny_trainer(ard_lora(target_r=2.0), form="own_a", r=4, learning_rate=2e-2, data=FEW))
    watch = Watch(trainer)
    while trainer.state.step < 48:
        trainer.train_step()
    step, plan, record, *_, (weights, layout) = watch.events[-1]
    assert step == 47
    assert sum(record.after.ranks) == 2 * len(record.after.ranks)  # the budget, to the component
    ranks = trainer.method.unit_ranks().tolist()
    masks = [naive_ramp(r, n, 1.0) for r, n in zip(ranks, record.before.ranks, strict=True)]
    before = delta(trainer, torch.tensor([m for own in masks for m in own]), weights, layout)
    wanted = {m: d.clone() for m, d in before.items()}
    removed = 0
    for index, change in plan.changes.items():
        site, rows = record.before.sites[index], layout.site_rows(weights, index)
        heads = trainer.adapters[site.module]
        for k in range(len(change.keep), record.before.ranks[index]):
            own = site.scaling * masks[index][k] * torch.outer(rows["lora_B"][k], rows["lora_A"][k]).double()
            removed += masks[index][k] > 0
            if site.head is None:
                wanted[site.module] -= own
            elif heads.side == "out":
                wanted[site.module][site.start : site.start + site.out_features] -= own
            else:
                wanted[site.module][:, site.start : site.start + site.in_features] -= own
    assert removed > 0
    after = delta(trainer, trainer.method.gates(48))
    for module in wanted:
        torch.testing.assert_close(after[module], wanted[module], rtol=1e-5, atol=1e-7)
    trainer.arena.engine.destroy()


@pytest.mark.parametrize("form", ["own_a", "shared_a"])
def test_a_whole_run_holds_the_budget_and_shrinks_the_arena(world, form):
    """The memory claim: trained numbers, and the tensors that hold them, follow the ranks."""
    trainer = pushed(tiny_trainer(ard_lora(target_r=1.5, lr_alpha=0.3), form=form, r=4, data=FEW))
    start = trainer.arena.layout.num_trained
    units = trainer.method.units
    for _ in range(60):
        trainer.train_step()
    arena = trainer.arena
    final = trainer.method._final_ranks()
    assert sum(final) == math.floor(1.5 * len(units)) and min(final) >= 1
    wanted = 0
    for site, rank in zip(arena.table.sites, arena.table.ranks, strict=True):
        wanted += rank * (site.in_features + site.out_features)
    assert arena.layout.num_trained == wanted
    assert arena.engine.weights.numel() == arena.layout.size <= wanted + 32 * len(arena.layout.blocks)
    share = wanted / start
    if form == "own_a":
        assert arena.table.ranks == tuple(final)
        assert share < 0.6  # 41 % or more less
    else:  # a component goes when no head of the matrix wants it
        for index, own in itertools.groupby(range(len(units)), key=lambda u: units[u].site):
            assert arena.table.ranks[index] == max(final[u] for u in own)
        assert share < 0.9
        kept = trainer.method.gates(60)
        assert set(kept.unique().tolist()) == {0.0, 1.0} and int(kept.sum()) == sum(final)
    trainer.arena.engine.destroy()


def double_loss(module, batch, *, device):
    """The loop's loss without its rounding to float32."""
    logits = module(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")


def double_llama():
    """A tiny Llama that computes in float64 throughout; transformers' own norm goes through float32."""

    def forward(norm, hidden):
        return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    model = tiny_llama(dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(forward, module)
    return model


@pytest.mark.parametrize(
    ("form", "tie"),
    [("own_a", "none"), ("own_a", "head"), ("own_a", "layer"), ("shared_a", "none"), ("shared_a", "matrix")],
)
def test_gradient_of_the_loss_in_alpha_by_finite_differences(world, form, tie):
    """methods.md 1.5.6, through the exact sum: what `observe` gets against losses of the whole global batch.

    Backbone in float64; alphas are multiples of 1/64 away from whole ranks, so that gates are exact in float32.
    """
    settings = {"tie": tie, "target_r": None, "resize_interval": 1000}
    trainer = tiny_trainer(
        ard_lora(**settings), form=form, r=4, model=double_llama(), data=TokenBatches(num_grains=3),
        learning_rate=2e-2, compute_dtype=torch.float64,
    )  # fmt: skip
    trainer.loss_sum = double_loss
    for _ in range(6):
        trainer.train_step()
    method, numbers = trainer.method, np.random.default_rng(5)
    method.after_step = lambda step: None
    alpha = method.binding.state["alpha"]
    alpha.copy_(torch.tensor((numbers.integers(0, 3, len(alpha)) * 16 + numbers.integers(18, 31, len(alpha))) / 64))
    seen = []
    method.observe = lambda step, statistics: seen.append(statistics)
    weights, layout = trainer.arena.engine.weights.clone(), trainer.arena.layout
    step = trainer.state.step
    trainer.train_step()
    gradient = method.alpha_gradient(step, seen[0].gates)

    def loss():
        total = tokens = 0.0
        with torch.no_grad():
            bind_arena(trainer.adapters, layout, weights, method.gates(step))
            for grain in trainer.data.grains(step):
                batch = trainer.data.collate(grain)
                total += float(double_loss(trainer.backbone.module, batch, device=None))
                tokens += batch.num_target_tokens
        return total / tokens

    h, checked = 2.0**-9, 0
    scale = float(gradient.abs().max())
    for k in numbers.permutation(len(alpha))[:8].tolist():
        sides = []
        for move in (h, -h):
            alpha[k] += move
            sides.append(loss())
            alpha[k] -= move
        slope = (sides[0] - sides[1]) / (2 * h)
        assert float(gradient[k]) == pytest.approx(slope, rel=1e-3, abs=2e-5 * scale)
        checked += abs(slope) > 0.05 * scale
    assert checked >= 2
    trainer.arena.engine.destroy()


@pytest.mark.parametrize("tie", ["none", "head"])
def test_an_alpha_touches_its_head_and_nothing_else(world, tie):
    """methods.md 1.5.7, with 4 query heads of 8 numbers and 2 key and value heads."""
    trainer = tiny_trainer(ard_lora(tie=tie), form="own_a", r=2, learning_rate=2e-2)
    for _ in range(3):
        trainer.train_step()
    method = trainer.method
    alpha = method.binding.state["alpha"]
    alpha.fill_(0.75)
    before = delta(trainer, method.gates(10))
    keys = tied_keys(method.units, tie)
    names = sorted({k for own in keys for k in own})
    for number, name in enumerate(names):
        alpha[number] = 0.6
        after = delta(trainer, method.gates(10))
        alpha[number] = 0.75
        touched = {}
        for unit, own in zip(method.units, keys, strict=True):
            if name in own:
                touched.setdefault(unit.module, []).append(unit.head)
        assert touched
        for module, adapter in trainer.adapters.items():
            changed = ~torch.eq(after[module], before[module])
            if module not in touched:
                assert not changed.any()
                continue
            expected = torch.zeros_like(changed)
            if not hasattr(adapter, "num_heads"):
                expected[:] = True
            elif adapter.side == "out":
                width = adapter.out_features // adapter.num_heads
                for h in touched[module]:
                    expected[h * width : (h + 1) * width] = True
            else:
                width = adapter.in_features // adapter.num_heads
                for h in touched[module]:
                    expected[:, h * width : (h + 1) * width] = True
            assert torch.equal(changed, expected), (name, module)
        if tie == "head" and "head" in name:
            h = int(name[-1])
            layer = name.split(":")[0]
            assert touched == {
                f"{layer}.self_attn.q_proj": [h],
                f"{layer}.self_attn.k_proj": [h // 2],
                f"{layer}.self_attn.v_proj": [h // 2],
                f"{layer}.self_attn.o_proj": [h],
            }
    trainer.arena.engine.destroy()


@pytest.mark.parametrize("phase", ["warm-up", "adapt"])
def test_shared_heads_with_open_gates_train_as_ordinary_lora(world, phase):
    """methods.md 1.5.1: weights and losses to 1e-6; in the warm-up without gates, later with alphas held at 1."""
    still = {"init_warmup": 0, "r_max": 4, "lr_alpha": 1e-30} if phase == "adapt" else {"init_warmup": 12}
    ours = tiny_trainer(ard_lora(target_r=None, **still), form="shared_a", r=4)
    plain = tiny_trainer(Lora(), r=4)
    for step in range(12):
        gates = ours.method.gates(step)
        assert gates is None if phase == "warm-up" else bool((gates == 1).all())
        a, b = ours.train_step(), plain.train_step()
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert ours.arena.table.ranks == plain.arena.table.ranks
    torch.testing.assert_close(ours.arena.engine.weights, plain.arena.engine.weights, rtol=1e-5, atol=1e-6)
    ours.arena.engine.destroy()
    plain.arena.engine.destroy()


def test_open_gates_equal_plain_lora_of_each_head(world):
    """methods.md 1.5.1: alpha = 1 and capacity r0, against B_h A_h put into their rows or columns by hand."""
    trainer = tiny_trainer(ard_lora(), form="own_a", r=2, learning_rate=2e-2)
    for _ in range(4):
        trainer.train_step()
    arena = trainer.arena
    gates = trainer.method.gates(10)
    assert arena.table.ranks == (2,) * 30 and bool((gates == 1).all())
    model = tiny_llama()
    for index, site in enumerate(arena.table.sites):
        rows = arena.layout.site_rows(arena.engine.weights, index)
        own = site.scaling * rows["lora_B"].T @ rows["lora_A"]
        weight = model.get_submodule(site.module).weight.data
        if site.head is None:
            weight += own
        elif site.module.endswith("o_proj"):
            weight[:, 8 * site.head : 8 * site.head + 8] += own
        else:
            weight[8 * site.head : 8 * site.head + 8] += own
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        for given in (gates, None):
            bind_arena(trainer.adapters, arena.layout, arena.engine.weights, given)
            logits = trainer.backbone.module(input_ids=ids).logits
            assert float((logits - wanted).abs().max() / wanted.abs().max()) <= 1e-6
        assert float((tiny_llama()(input_ids=ids).logits - wanted).abs().max()) > 0.1
    arena.engine.destroy()


# ---- held-out gates (H6) ----


class Recorded(HeldOutBatches):
    """Held-out rows that say which grains were asked for."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.asked = []

    def collate(self, grain):
        self.asked.append(grain)
        return super().collate(grain)


def test_held_out_gates_are_of_held_out_rows_only(world):
    trainer = tiny_trainer(ard_lora(meta_interval=3, alpha_interval=2, resize_interval=1000), form="own_a", r=2)
    assert trainer.method.needs.held_out_gates and trainer.method.needs.held_out
    trainer.allocation_data = Recorded(99, num_grains=2)
    seen = []
    inner = trainer.method.observe

    def observed(step, statistics):
        count = float(trainer.method.binding.state["controller"][1])
        inner(step, statistics)
        taken = float(trainer.method.binding.state["controller"][1]) != count
        seen.append((step, taken, statistics.gates))
        weights = statistics.weights.clone()
        if taken:  # by hand: the next grain, the weights after the step, eval mode
            batch = HeldOutBatches(99, num_grains=2).collate(trainer.allocation_data.asked[-1])
            trainer.backbone.module.eval()
            gates = trainer.method.gates(step).requires_grad_()
            bind_arena(trainer.adapters, trainer.arena.layout, weights, gates)
            loss = trainer.loss_sum(trainer.backbone.module, batch, device=trainer.world.device)
            (own,) = torch.autograd.grad(loss / batch.num_target_tokens, gates)
            trainer.backbone.module.train()
            torch.testing.assert_close(statistics.gates, own, rtol=1e-5, atol=float(own.abs().max()) * 1e-6)

    trainer.method.observe = observed
    for _ in range(25):
        trainer.train_step()
    assert [step for step, taken, _ in seen if taken] == [6, 9, 12, 15, 18, 21, 24]
    assert len(trainer.allocation_data.asked) == 7
    assert set(trainer.allocation_data.asked) == {(-1, 0), (-1, 1)}
    trainer.arena.engine.destroy()


def test_training_rows_move_no_alpha_when_held_out_ones_do():
    method = made(4, meta_interval=5, l1=0.0, alpha_interval=1, lr_alpha=1e-4, **FREE)
    moved = []
    for step in range(60):
        before = method.binding.state["alpha"].clone()
        observe(method, step, torch.full((12,), 5.0))
        if not torch.equal(before, method.binding.state["alpha"]):
            moved.append(step)
    assert moved == list(range(5, 48, 5))
    assert [s for s in range(60) if method.wants_held_out_gates(s)] == list(range(5, 48, 5))


def test_a_held_out_gradient_that_is_not_finite_is_left_out():
    method = made(4, meta_interval=1, alpha_interval=2, **FREE)
    for bad in (float("nan"), float("inf")):
        gates = torch.zeros(12)
        gates[3] = bad
        observe(method, 5, gates)
    assert method.binding.state["controller"][1] == 0
    assert not method.binding.state["alpha_gradient"].any()


# ---- what may go wrong on the way ----


def test_a_void_step_at_the_freeze_freezes_at_the_next_one(world):
    method = ard_lora(target_r=None, l1=0.2)
    trainer = pushed(tiny_trainer(method, form="own_a", r=4, max_skipped_steps=2, data=FEW))
    watch, inner = Watch(trainer), trainer.loss_sum

    def loss(module, batch, **settings):
        out = inner(module, batch, **settings)
        return out * float("nan") if trainer.state.step in (47, 48) and torch.is_grad_enabled() else out

    trainer.loss_sum = loss
    results = [trainer.train_step() for _ in range(51)]
    assert [r.step for r in results if r.void] == [47, 48]
    frozen = [e for e in watch.events if "frozen" in e[1].reason]
    assert [e[0] for e in frozen] == [49]
    assert max(far(frozen[0][3], frozen[0][4])) <= 2e-6
    assert trainer.method.gates(50) is None
    trainer.arena.engine.destroy()


IDENTITY = Identity("b" * 64, "d" * 64, {})


def resumed(trainer, folder, make):
    """Another trainer from a checkpoint of this one, on the road of run.py."""
    path = checkpoint.save(
        folder,
        trainer.arena.capture(),
        trainer.arena.layout,
        step=trainer.state.step,
        loop=asdict(trainer.state),
        identity=IDENTITY,
        write_adapter=lambda place: place.mkdir(),
    )
    other = make(start=False)
    loaded = checkpoint.load(
        path,
        sites=trainer.arena.table.sites,
        parts=other.method.entries,
        kinds=other.method.state_tensors(),
        identity=IDENTITY,
        dense=other.arena.dense,
    )
    other.arena.build(loaded.snapshot, loaded.layout)
    other.state = LoopState(**loaded.loop)
    return other


@pytest.mark.parametrize(
    ("form", "changes", "stops"),
    [
        ("own_a", {}, (3, 21, 22, 47, 48, 53)),
        ("own_a", {"tie": "head", "mask": "sigmoid"}, (21,)),
        ("own_a", {"meta_interval": 3, "mask": "straight_through"}, (22,)),
        ("shared_a", {"budget_in": "parameters"}, (22, 48, 55)),
    ],
)
def test_a_resumed_run_goes_on_to_the_bit(world, tmp_path, form, changes, stops):
    """Saved in the warm-up, between two observations of one alpha step, at and after the freeze."""

    def make(start=True):
        out = tiny_trainer(ard_lora(target_r=1.6, **changes), form=form, r=2, data=TokenBatches(num_grains=1),
                           start=start)  # fmt: skip
        out.allocation_data = HeldOutBatches(5, num_grains=2)
        return out

    unbroken, losses, others = make(), [], {}
    for step in range(60):
        if step in stops:
            others[step] = resumed(unbroken, tmp_path, make)
            again = others[step].arena.capture()
            for name, values in unbroken.arena.capture().sites.items():
                assert equal_bits(again.sites[name], values), name
        losses.append(unbroken.train_step().loss)
    alphas = unbroken.method.binding.state["alpha"]
    assert len(alphas.unique()) > 2 and len(set(unbroken.arena.table.ranks)) > 1
    for step, other in others.items():
        assert [other.train_step().loss for _ in range(step, 60)] == losses[step:], step
        assert other.arena.table == unbroken.arena.table
        assert equal_bits(other.arena.engine.weights, unbroken.arena.engine.weights)
        assert equal_bits(other.method.binding.state["alpha"], alphas)
        other.arena.engine.destroy()
    unbroken.arena.engine.destroy()


def test_nothing_of_the_method_depends_on_the_process_that_keeps_the_scores():
    """Contributions of two shards add up to those of one."""
    whole = made(4, sites=3)
    layout = whole.binding.shard.layout
    weights = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(12, dtype=torch.float64)
    for process in range(2):
        whole.binding.shard = Shard(layout, process, 2)
        total += whole._local_contributions(weights)
    for index in range(3):
        rows = layout.site_rows(weights.double(), index)
        for k in range(4):
            wanted = float(rows["lora_A"][k].norm() * rows["lora_B"][k].norm())
            assert float(total[4 * index + k]) == pytest.approx(wanted, rel=1e-12)
