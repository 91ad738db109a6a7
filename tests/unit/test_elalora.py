import numpy as np
import pytest
import torch

from ardtrain.adapters import AdapterLinear
from ardtrain.arena import ArenaLayout, Shard
from ardtrain.methods.base import Binding, Statistics
from ardtrain.methods.diagonal import orthogonality
from ardtrain.methods.elalora import ElaLora, reallocate
from ardtrain.ranks import RankPlan, RankTable, SiteChange
from ardtrain.resize import repack_snapshot, start_snapshot
from tests.tiny import ELALORA, elalora, sites_of

HAND = RankTable.start(sites_of((8, 8), (8, 8), (8, 8)), [3, 3, 3])
HAND_SCORES = (1.0, 2.0, 9.0, 5.0, 6.0, 7.0, 3.0, 4.0, 8.0)


# ---- allocation ----


@pytest.mark.parametrize(
    ("k", "b", "pruned", "born"),
    [
        (1, 1, {0: [0]}, {1: 1}),
        (2, 2, {0: [0, 1]}, {1: 2}),
        (2, 3, {0: [0, 1], 2: [0]}, {1: 2, 2: 1}),
        (2, 4, {0: [0, 1], 2: [0, 1]}, {1: 2, 2: 2}),
    ],
)
def test_allocation_by_hand(k, b, pruned, born):
    """methods.md 2.9.2: three matrices with scores (1, 2, 9), (5, 6, 7), (3, 4, 8)."""
    plan = reallocate(HAND, HAND_SCORES, b=b, k=k)
    wanted = {
        i: SiteChange(tuple(p for p in range(3) if p not in pruned.get(i, [])), born.get(i, 0))
        for i in sorted(pruned.keys() | born.keys())
    }
    assert plan.changes == wanted
    assert plan.apply(HAND).total == HAND.total


def test_plan_records_the_scores_at_the_cut():
    plan = reallocate(HAND, HAND_SCORES, b=3, k=2)
    assert plan.scores == {"highest_pruned": 3.0, "lowest_kept": 4.0}
    assert plan.reason == "elalora: pruned 3, grew 3"


def transcription(scores, *, b, k):
    """The rule of methods.md 2.3 in NumPy, for distinct scores and room everywhere: positions out, sites that gain."""
    pool = []
    for site, values in enumerate(scores):
        lowest = np.argsort(values, kind="stable")[: min(k, len(values) - 1)]
        pool += [(values[p], site, int(p)) for p in lowest]
    order = np.argsort([entry[0] for entry in pool], kind="stable")
    out = {pool[i][1:] for i in order[:b]}
    gain = [pool[i][1] for i in order[::-1][: min(b, len(pool))]]
    return out, {site: gain.count(site) for site in gain}


def test_allocation_against_numpy():
    numbers = np.random.default_rng(3)
    for _ in range(200):
        ranks = numbers.integers(1, 7, size=6).tolist()
        table = RankTable.start(sites_of(*[(40, 40)] * 6), ranks)
        scores = [numbers.random(r) for r in ranks]
        b, k = int(numbers.integers(1, 8)), int(numbers.integers(1, 4))
        out, gain = transcription(scores, b=b, k=k)
        plan = reallocate(table, np.concatenate(scores).tolist(), b=b, k=k)
        if not out:
            assert plan is None
            continue
        left = {(i, p) for i, c in plan.changes.items() for p in range(ranks[i]) if p not in c.keep}
        assert left == out
        assert {i: c.born for i, c in plan.changes.items() if c.born} == gain


@pytest.mark.parametrize("allow_swap", [True, False])
@pytest.mark.parametrize("levels", [1, 3, 1000], ids=["all tied", "many ties", "few ties"])
def test_random_reallocations_conserve_the_total(allow_swap, levels):
    """methods.md 2.9.3, with ties, small matrices at their largest rank, and immune components."""
    numbers = np.random.default_rng(levels)
    sites = sites_of((3, 9), (9, 4), (5, 5), (8, 8), (2, 2), (16, 3))
    table = RankTable.start(sites, [3, 2, 4, 4, 1, 2])
    for _ in range(100):
        scores = numbers.integers(0, levels, size=table.total).astype(float).tolist()
        immune = (numbers.random(table.total) < 0.2).tolist() if numbers.random() < 0.5 else None
        b, k = int(numbers.integers(1, 9)), int(numbers.integers(1, 4))
        plan = reallocate(table, scores, b=b, k=k, allow_swap=allow_swap, immune=immune)
        if plan is None:
            continue
        after = plan.apply(table)  # refuses a rank above max_rank
        pruned = {i: table.ranks[i] - len(c.keep) for i, c in plan.changes.items()}
        assert after.total == table.total == 16
        assert min(after.ranks) >= 1
        assert sum(pruned.values()) <= b
        assert max(pruned.values()) <= k and max(c.born for c in plan.changes.values()) <= k
        if not allow_swap:
            assert not any(pruned[i] and c.born for i, c in plan.changes.items())
        if immune is not None:
            kept = {(i, p) for i, c in plan.changes.items() for p in c.keep}
            for i in plan.changes:
                for p in range(table.ranks[i]):
                    assert (i, p) in kept or not immune[table.offsets[i] + p]
        table = after


def test_exactly_b_leave_when_all_scores_tie():
    """methods.md 2.4 defect 4: the published threshold gave 16 -> 14 here."""
    table = RankTable.start(sites_of(*[(9, 9)] * 4), [4] * 4)
    plan = reallocate(table, [1.0] * 16, b=2, k=2)
    assert sum(4 - len(c.keep) for c in plan.changes.values()) == 2
    assert plan.apply(table).total == 16
    assert plan.changes[0].keep == (2, 3)  # the first of (score, site, position)


def test_full_site_does_not_grow_and_the_next_does():
    table = RankTable.start(sites_of((3, 8), (8, 8), (8, 8)), [3, 3, 3])
    plan = reallocate(table, [7.0, 8.0, 9.0, 4.0, 5.0, 6.0, 1.0, 2.0, 3.0], b=1, k=2)
    assert plan.apply(table).ranks == (3, 4, 2)  # site 0 scores highest but is full


def test_full_site_may_swap():
    table = RankTable.start(sites_of((3, 3), (3, 3)), [3, 3])
    plan = reallocate(table, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], b=2, k=2)
    assert plan.apply(table).ranks == (3, 3)
    assert plan.apply(table).births == ((2, 3, 4), (0, 1, 2))


def test_nothing_to_prune_gives_no_plan():
    table = RankTable.start(sites_of((3, 3), (3, 3)), [1, 1])
    assert reallocate(table, [1.0, 2.0], b=2, k=2) is None
    assert reallocate(HAND, HAND_SCORES, b=2, k=2, immune=[True] * 9) is None


def test_ranks_of_zero_stay_out_of_the_pool():
    table = RankTable.start(sites_of((3, 3), (3, 3), (3, 3)), [0, 3, 2])
    plan = reallocate(table, [1.0, 2.0, 3.0, 4.0, 5.0], b=1, k=1)
    assert plan.apply(table).ranks == (0, 2, 3)


# ---- the method on its own ----


def bound(method, ranks=(3, 2), *, start=None):
    """The method bound to one process's shard of a fresh arena; returns the layout too."""
    table = RankTable.start(sites_of((6, 5), (4, 8)), ranks)
    layout = ArenaLayout(table, method.entries)
    shard = Shard(layout, 0, 1)
    state = {name: torch.zeros(shard.size) for name in method.state_tensors()}
    method.bind(Binding(table, shard, torch.zeros(table.total, dtype=torch.int64), state))
    return layout


def test_no_event_in_warmup_nor_in_the_final_phase():
    """methods.md 2.9.6."""
    method = elalora(total_steps=60, init_warmup=5, final_warmup=10, mask_interval=4, enable_scheduler=False)
    assert [t for t in range(60) if method.due(t)] == list(range(9, 50, 4))


def test_budget_falls_to_no_event():
    method = elalora(b=1, total_steps=60, init_warmup=0, final_warmup=10, mask_interval=1)
    due = [t for t in range(60) if method.due(t)]
    assert due == list(range(1, 40))  # round(1 - P^3) is 0 once P^3 > 0.5
    method = elalora(b=1, enable_scheduler=False, total_steps=60, init_warmup=0, final_warmup=10, mask_interval=1)
    assert [t for t in range(60) if method.due(t)] == list(range(1, 50))


def test_averages_move_during_warmup_and_stop_in_the_final_phase():
    method = elalora(total_steps=20, init_warmup=5, final_warmup=5)
    layout = bound(method)
    ones = Statistics(torch.ones(layout.size), torch.ones(layout.size))
    method.observe(0, ones)
    after_first = method.binding.state["mean"].clone()
    assert after_first.any()
    method.observe(14, ones)
    before_final = method.binding.state["mean"].clone()
    assert not torch.equal(before_final, after_first)
    method.observe(15, ones)
    assert torch.equal(method.binding.state["mean"], before_final)


def test_newborn_are_immune_for_one_interval():
    method = elalora(mask_interval=4, b=2, k=2, enable_scheduler=False)
    layout = bound(method, (3, 3))
    scores = torch.tensor([1.0, 2.0, 9.0, 5.0, 6.0, 7.0], dtype=torch.float64)
    method.binding.age[:] = torch.tensor([4, 5, 50, 50, 50, 50])  # component 0 was born at the last event
    plan = method.plan(9, scores)
    assert 0 in plan.changes[0].keep and 1 not in plan.changes[0].keep
    method.binding.age[0] = 8  # the event after
    assert method.plan(13, scores).changes[0].keep == (2,)
    assert layout.table.total == 6
    method = elalora(mask_interval=4, b=2, k=2, enable_scheduler=False, newborn_immunity=False)
    bound(method, (3, 3))
    assert method.plan(9, scores).changes[0].keep == (2,)


def test_first_components_are_not_immune_at_the_first_event():
    """Their age is the step's number + 1, which is beyond the interval."""
    method = elalora(init_warmup=0, mask_interval=4, enable_scheduler=False)
    bound(method, (3, 3))
    method.binding.age += 5  # after step 4
    assert method.plan(4, torch.arange(6.0, dtype=torch.float64)) is not None


def test_local_scores_follow_the_averages():
    method = elalora(beta1=0.85, beta2=0.85)
    layout = bound(method)
    weights = torch.zeros(layout.size)
    rows = layout.site_rows(weights, 0)
    rows["diagonal"][1], rows["lora_A"][1, 0], rows["lora_B"][1, 2] = 1.0, 6.0, 5.0
    method.observe(0, Statistics(torch.full((layout.size,), 0.1), weights))
    # I = 0.1 gives 0.015 * 0.01275; a row's single entry counts by 1 / columns.
    one = 0.00019125
    wanted = [0.0, one + one * 36 / 6 + one * 25 / 5, 0.0, 0.0, 0.0]
    assert method.local_scores(0).tolist() == pytest.approx(wanted, rel=1e-5)


# ---- the function ----


def outputs(flat, layout, x):
    """Output of each site's adapter over a zero weight, in float64."""
    out = []
    for index, site in enumerate(layout.table.sites):
        linear = torch.nn.Linear(site.in_features, site.out_features, bias=False, dtype=torch.float64)
        linear.weight.data.zero_()
        adapter = AdapterLinear(linear.requires_grad_(False), scaling=site.scaling)
        adapter.views = layout.site_rows(flat.double(), index) if layout.table.ranks[index] else None
        out.append(adapter(x[index]))
    return out


def test_event_changes_the_function_by_exactly_the_pruned_triples():
    """methods.md 2.9.4; growing alone changes nothing at all."""
    method = ElaLora(ELALORA)
    table = RankTable.start(sites_of((6, 9), (7, 7)), [4, 3])
    layout = ArenaLayout(table, method.entries)
    snapshot = start_snapshot(table, layout, method.init, seed=0)
    for index in (0, 1):
        layout.site_rows(snapshot.full.master, index)["diagonal"].normal_(
            generator=torch.Generator().manual_seed(index)
        )
    x = [torch.randn(5, s.in_features, dtype=torch.float64) for s in table.sites]
    before = outputs(snapshot.full.master, layout, x)

    grow = RankPlan(table.digest, {0: SiteChange((0, 1, 2, 3), 2), 1: SiteChange((0, 1, 2), 1)})
    after, new = repack_snapshot(snapshot, layout, grow, method.init, seed=0, step=9)
    for a, b in zip(before, outputs(after.full.master, new, x), strict=True):
        assert torch.equal(a, b) or (a - b).abs().max() <= 1e-15 * a.abs().max()

    plan = reallocate(table, [4.0, 1.0, 5.0, 6.0, 9.0, 7.0, 8.0], b=2, k=2)
    after, new = repack_snapshot(snapshot, layout, plan, method.init, seed=0, step=9)
    changed = outputs(after.full.master, new, x)
    for index, site in enumerate(table.sites):
        rows = {p: r.double() for p, r in layout.site_rows(snapshot.full.master, index).items()}
        removed = torch.zeros_like(before[index])
        for p in range(table.ranks[index]):
            if index in plan.changes and p not in plan.changes[index].keep:
                hidden = (x[index] @ rows["lora_A"][p]) * rows["diagonal"][p] * site.scaling
                removed += torch.outer(hidden, rows["lora_B"][p])
        assert (before[index] - removed - changed[index]).abs().max() <= 1e-14 * before[index].abs().max()
    assert (before[0] - changed[0]).abs().max() > 0


# ---- the penalty ----


def test_orthogonality_by_hand():
    """methods.md 2.9.7: A rows (1, 0), (0, 2) and B the transpose."""
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert (0.1 * orthogonality([a, a], form="mean_norm")).item() == pytest.approx(0.3)
    assert orthogonality([a, a], form="squared").item() == 18.0


def test_orthogonality_of_nothing_is_zero():
    assert orthogonality([], form="mean_norm").item() == 0.0
    assert orthogonality([torch.zeros(0, 4)], form="squared").item() == 0.0


@pytest.mark.parametrize("form", ["mean_norm", "squared"])
def test_extra_loss_is_the_penalty_on_a_and_b_only(form):
    method = elalora(reg_orth_coef=0.3, reg_orth_form=form)
    layout = bound(method)
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    views = layout.views(flat)
    loss = method.extra_loss(views)
    matrices = [views[m][p] for m in ("s0", "s1") for p in ("lora_A", "lora_B")]
    residuals = [np.linalg.norm((m @ m.T).detach().numpy() - np.eye(len(m))) for m in matrices]
    wanted = np.mean(residuals) if form == "mean_norm" else np.sum(np.square(residuals))
    assert loss.item() == pytest.approx(0.3 * wanted, rel=1e-5)
    loss.backward()
    for site in (0, 1):
        assert not layout.site_rows(flat.grad, site)["diagonal"].any()
        assert layout.site_rows(flat.grad, site)["lora_B"].any()


def test_penalty_of_exactly_orthonormal_rows_has_a_finite_gradient():
    """The norm's derivative at 0 is 0, not 0 / 0."""
    rows = torch.eye(3, 5, requires_grad=True)
    orthogonality([rows], form="mean_norm").backward()
    assert torch.isfinite(rows.grad).all()


def test_no_coefficient_no_extra_loss():
    method = elalora(reg_orth_coef=0.0)
    layout = bound(method)
    assert method.extra_loss(layout.views(torch.zeros(layout.size, requires_grad=True))) is None


def test_compat_reference_is_the_published_choice():
    from ardtrain.config import parse_config
    from ardtrain.preflight import Shape, make_method

    block = {"init_warmup": 1, "final_warmup": 1, "mask_interval": 1, "allow_swap": False}
    raw = {"model_name_or_path": "m", "output_dir": "o", "method": "elalora", "data": {"train_file": "a.jsonl"}}
    shape = Shape(RankTable.start(sites_of((4, 4)), [2]), 0, 0, "")

    def chosen(**extra):
        s = make_method(parse_config(raw | {"elalora": block | extra}), shape, total_steps=9).settings
        return s.allow_swap, s.newborn_immunity, s.newborn_norm

    assert chosen() == (False, True, "mean")
    assert chosen(compat="reference") == (True, False, "unit")
