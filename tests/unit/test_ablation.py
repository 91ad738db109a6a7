import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, DebertaV2Config, LlamaConfig, RobertaConfig

from ardtrain.ablation import AblationScorer
from ardtrain.ablation_work import ONLY, WITHOUT, cut_work, lanes_of
from ardtrain.adapters import AdapterLinear, attach, bind_arena, drop_views
from ardtrain.arena import ArenaLayout
from ardtrain.collectives import World
from ardtrain.data import build_batch
from ardtrain.decoder_stack import find_stack
from ardtrain.dense import attach_dense
from ardtrain.engines import BackboneEngine
from ardtrain.evaluation import held_out_loss, loss_sum
from ardtrain.logits import find_logit_head
from ardtrain.methods.alora import Alora, AloraSettings, allocate
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable, Site
from ardtrain.resize import repack_snapshot, start_snapshot
from tests.threads import Threads
from tests.tiny import CPU, HeldOutBatches, backbone_config, equal_bits, sites_of_model, tiny_llama, tiny_trainer

ALONE = World(0, 1, CPU)
PLAIN = {"ablations_per_forward": 1, "prefix_cache": False, "target_logits_only": False}
TOLERANCE = 1e-6  # of a score in float32; losses are around 5


# ---- the toy of methods.md 3.8.1: logits (f, 0), label 0, f = sum of the active contributions ----


class Toy(nn.Module):
    """`second` makes the other logit of f: 0, so that S = -log(1 + exp(-f)), or what makes S linear in f."""

    def __init__(self, second, offset=0.0):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.second, self.offset = second, offset
        self.requires_grad_(False)

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        f = self.linear(torch.ones(*input_ids.shape, 3)).sum(-1) + self.offset
        return SimpleNamespace(logits=torch.stack([f, self.second(f)], dim=-1))


class OneToken:
    def grains(self):
        return [0]

    def collate(self, grain):
        return build_batch([[(np.array([1, 0]), np.array([False, True]))]], packed=False, pad_token_id=0)


def toy_scores(contributions, *, second=torch.zeros_like, offset=0.0, data=None, **settings):
    """Component i contributes c_i: its row of A is c_i e_i, of B e_i."""
    model = Toy(second, offset)
    sites = [Site("linear", "linear", 3, 3, scaling=1.0)]
    adapters = attach(model, sites, dropout={})
    layout = ArenaLayout(RankTable.start(sites, [len(contributions)]), Lora().entries)
    weights = torch.zeros(layout.size)
    rows = layout.site_rows(weights, 0)
    for i, c in enumerate(contributions):
        rows["lora_A"][i, i], rows["lora_B"][i, i] = c, 1.0
    scorer = AblationScorer(model, adapters, data or OneToken(), world=ALONE, release=lambda: None, **settings)
    return scorer.scores(layout, weights)


@pytest.mark.parametrize(
    ("contributions", "full", "importance", "cs"),
    [
        ((2.0, -1.0), -0.313262, (0.873072, -1.499596), (1.186334, -1.186334)),
        ((2.0, -1.0, 0.5), -0.201413, (0.645736, -1.435785, -0.362229), None),
        ((1.0, 1.0), None, None, (0.0, 0.0)),
        ((1.5, 0.0), None, None, (0.491734, -0.491734)),
    ],
)
def test_toy_numbers(contributions, full, importance, cs):
    scores = toy_scores(contributions)
    if full is not None:
        assert -scores.full_loss == pytest.approx(full, abs=1e-6)
    if importance is not None:
        assert scores.importance.tolist() == pytest.approx(importance, abs=1e-6)
    if cs is not None:
        assert scores.cs.tolist() == pytest.approx(cs, abs=1e-6)


@pytest.mark.parametrize("contributions", [(2.0, -1.0), (0.3, 0.7), (-1.0, -2.0), (1.5, 0.0)])
def test_two_components_have_opposite_scores(contributions):
    """methods.md 3.8.2: with two, M without the one is M with only the other."""
    first, second = toy_scores(contributions).cs.tolist()
    assert first == pytest.approx(-second, abs=1e-7) and (first != 0.0 or contributions == (1.0, 1.0))


def test_linear_contributions():
    """methods.md 3.8.3: where S is linear in f, IS = S(M_none) + 2 c. Second logit log(1 - e^f) makes S = f."""
    scores = toy_scores((0.5, -0.25, 0.125), second=lambda f: torch.log1p(-torch.exp(f)), offset=-2.0)
    assert scores.importance.tolist() == pytest.approx([-2.0 + 1.0, -2.0 - 0.5, -2.0 + 0.25], abs=1e-6)
    assert scores.relative.tolist() == pytest.approx([1.0, -0.5, 0.25], abs=1e-6)
    assert (-scores.full_loss, -scores.bare_loss) == pytest.approx((-1.625, -2.0), abs=1e-6)


def test_linear_case_makes_the_first_order_estimate_exact():
    second, settings = (lambda f: torch.log1p(-torch.exp(f))), {"offset": -2.0, "shortlist": 0.3}
    scores = toy_scores((0.5, -0.25, 0.125), second=second, **settings)
    assert scores.first_order.tolist() == pytest.approx(scores.cs.tolist(), abs=1e-6)
    assert scores.exact.tolist() == [False, True, False]


# ---- a Llama with grouped-query attention, against a naive loop ----


class Setup:
    """A tiny Llama with trained-like adapters of unlike ranks on all linears, two validation grains."""

    def __init__(self, seed=0, *, model=None, layers=3, r=2, dropout=0.0, packed=False, b_std=0.15):
        model = tiny_llama(seed, layers=layers) if model is None else model
        sites, ranks = sites_of_model(model, r=r, lora_alpha=2.0 * r)
        ranks = [(rank + i) % (r + 2) for i, rank in enumerate(ranks)]  # 0 .. r + 1
        self.model, self.adapters = model, attach(model, sites, dropout={"language": dropout})
        self.table = RankTable.start(sites, ranks)
        self.layout = ArenaLayout(self.table, Lora().entries)
        self.weights = start_snapshot(self.table, self.layout, Lora().init, seed=seed).full.master
        generator = torch.Generator().manual_seed(seed)
        for block in self.layout.blocks:
            if block.part == "lora_B":
                block.of(self.weights).normal_(0.0, b_std, generator=generator)
        self.data = HeldOutBatches(seed, num_grains=2, rows=2, length=20, packed=packed)

    def scorer(self, *, world=ALONE, data=None, **settings):
        return AblationScorer(
            self.model, self.adapters, data or self.data, world=world,
            release=lambda: None, **settings,
        )  # fmt: skip

    def scores(self, **settings):
        return self.scorer(**settings).scores(self.layout, self.weights)

    def loss(self, gates):
        """Mean loss over the validation batch with these gates [R], one plain forward a grain."""
        self.model.eval()
        with torch.no_grad():
            bind_arena(self.adapters, self.layout, self.weights, gates)
            batches = [self.data.collate(g) for g in self.data.grains()]
            sums = [loss_sum(self.model, b, device=CPU) for b in batches]
            drop_views(self.adapters)
        return math.fsum(map(float, sums)) / sum(b.num_target_tokens for b in batches)

    def naive(self):
        """(CS [R], CS0) by the definition: 2 R + 2 forwards of the batch."""
        one = torch.eye(self.table.total)
        cs = [self.loss(1.0 - row) - self.loss(row) for row in one]
        return torch.tensor(cs, dtype=torch.float64), self.loss(torch.ones(len(one))) - self.loss(torch.zeros(len(one)))


@pytest.fixture(scope="module")
def setup():
    return Setup()


@pytest.fixture(scope="module")
def naive(setup):
    return setup.naive()


def pruned(table, scores, n_a):
    plan = allocate(table, scores.tolist(), n_a=n_a)
    return {(i, p) for i, c in plan.changes.items() for p in range(table.ranks[i]) if p not in c.keep}


@pytest.mark.parametrize("n", [1, 3, 8, 100])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("target_logits_only", [False, True])
def test_every_way_equals_the_naive_loop(setup, naive, n, prefix_cache, target_logits_only):
    """methods.md 3.8.8: batched, cached and at target positions only, alone and together."""
    got = setup.scores(ablations_per_forward=n, prefix_cache=prefix_cache, target_logits_only=target_logits_only)
    cs, cs0 = naive
    assert float((got.cs - cs).abs().max()) < TOLERANCE and abs(got.cs0 - cs0) < TOLERANCE
    spread = float(cs.max() - cs.min())
    assert spread > 1e-2, "scores too alike to test anything"
    low = sorted((cs - cs0).tolist())
    assert low[7] - low[6] > 10 * TOLERANCE
    assert pruned(setup.table, got.relative, 7) == pruned(setup.table, cs - cs0, 7)
    assert bool(got.exact.all()) and got.first_order is None


@pytest.mark.parametrize("shortlist", [None, 0.5])
def test_logits_in_chunks_equal_the_naive_loop(setup, naive, shortlist):
    head = find_logit_head(setup.model, chunk_tokens=5, device=CPU)
    cs, _ = naive
    got = setup.scores(logit_head=head, shortlist=shortlist)
    assert float((got.cs - cs)[got.exact].abs().max()) < TOLERANCE
    if shortlist is not None:
        whole = setup.scores(shortlist=shortlist)
        assert float((got.first_order - whole.first_order).abs().max()) < TOLERANCE


def test_packed_rows_equal_the_naive_loop():
    setup = Setup(1, packed=True, layers=2)
    cs, cs0 = setup.naive()
    got = setup.scores()
    assert float((got.cs - cs).abs().max()) < TOLERANCE and abs(got.cs0 - cs0) < TOLERANCE


def test_losses_are_the_evaluation_s(setup):
    got = setup.scores()
    bind_arena(setup.adapters, setup.layout, setup.weights)
    full = held_out_loss(setup.model, setup.data, world=ALONE)
    drop_views(setup.adapters)
    bare = held_out_loss(setup.model, setup.data, world=ALONE)
    assert got.full_loss == pytest.approx(full.loss, abs=TOLERANCE)
    assert got.bare_loss == pytest.approx(bare.loss, abs=TOLERANCE)
    assert got.cs0 == got.full_loss - got.bare_loss and got.full_loss != got.bare_loss


def test_importance_is_cs_and_one_constant(setup, naive):
    """methods.md 3.8.4, with IS = S(M) - S(M without r) + S(M with only r) worked out by plain forwards."""
    got = setup.scores()
    total = setup.table.total
    s_full = -setup.loss(torch.ones(total))
    for r in (0, total // 2, total - 1):
        only = torch.eye(total)[r]
        by_definition = s_full + setup.loss(1.0 - only) - setup.loss(only)
        assert float(got.importance[r]) == pytest.approx(by_definition, abs=TOLERANCE)
    differences = got.importance - got.cs
    assert float(differences.max() - differences.min()) < 1e-14
    assert float(differences[0]) == pytest.approx(s_full, abs=TOLERANCE)


def test_gated_off_equals_physically_removed(setup):
    """methods.md 3.8.5, for a whole forward: the loss without components 3 and 8, gated and cut out."""
    gates = torch.ones(setup.table.total)
    gates[[3, 8]] = 0.0
    gated = setup.loss(gates)
    victims = {3, 8}
    ranks, kept = [], []
    for start, stop in zip(setup.table.offsets, setup.table.offsets[1:], strict=False):
        alive = [c for c in range(start, stop) if c not in victims]
        ranks.append(len(alive))
        kept.append([c - start for c in alive])
    small = ArenaLayout(RankTable.start(setup.table.sites, ranks), Lora().entries)
    weights = torch.zeros(small.size)
    for i, rows in enumerate(kept):
        for part, values in setup.layout.site_rows(setup.weights, i).items():
            small.site_rows(weights, i)[part][:] = values[rows]
    with torch.no_grad():
        bind_arena(setup.adapters, small, weights)
        setup.model.eval()
        removed = held_out_loss(setup.model, setup.data, world=ALONE).loss
        drop_views(setup.adapters)
    assert gated == pytest.approx(removed, abs=TOLERANCE)
    assert abs(gated - setup.loss(torch.ones(setup.table.total))) > 1e-4


def test_a_freshly_grown_component_scores_exactly_cs0(setup):
    """methods.md 3.8.8: growing keeps the output, and the newborn's CS is CS0."""
    method = Alora(SimpleNamespace())
    before = setup.scores()
    plan = allocate(setup.table, before.relative.tolist(), n_a=5)
    start = start_snapshot(setup.table, setup.layout, method.init, seed=0)
    start.full.master[:] = setup.weights
    after, layout = repack_snapshot(start, setup.layout, plan, method.init, seed=0, step=3)
    table, newborn = plan.apply(setup.table), []
    for i, change in plan.changes.items():
        newborn += range(table.offsets[i] + len(change.keep), table.offsets[i + 1])
    assert len(newborn) == 5
    got = setup.scorer().scores(layout, after.full.master)
    assert float(got.relative[newborn].abs().max()) < TOLERANCE
    assert sum(abs(x) > 1e-4 for x in got.relative.tolist()) > table.total // 2
    grown_only = allocate(setup.table, before.relative.tolist(), n_a=5)
    survivors = ArenaLayout(
        RankTable.start(setup.table.sites, [len(c.keep) if (c := grown_only.changes.get(i)) else r
                                            for i, r in enumerate(setup.table.ranks)]), Lora().entries,
    )  # fmt: skip
    weights = torch.zeros(survivors.size)
    for i in range(len(table.sites)):
        for part, rows in survivors.site_rows(weights, i).items():
            rows[:] = layout.site_rows(after.full.master, i)[part][: len(rows)]
    without_newborn = setup.scorer().scores(survivors, weights)
    assert without_newborn.full_loss == pytest.approx(got.full_loss, abs=TOLERANCE)


# ---- what scores must not depend on (methods.md 3.8.9) ----


class Backwards:
    """The same grains in the other order."""

    def __init__(self, data):
        self.data = data

    def grains(self):
        return self.data.grains()[::-1]

    def collate(self, grain):
        return self.data.collate(grain)


def test_scores_do_not_depend_on_the_order_of_evaluation(setup):
    one = setup.scores()
    backwards = setup.scores(data=Backwards(setup.data))
    again = setup.scores()
    assert equal_bits(one.cs, backwards.cs) and one.cs0 == backwards.cs0
    assert equal_bits(one.cs, again.cs)


def test_scores_do_not_depend_on_dropout_or_the_mode():
    plain, dropping = Setup(2, layers=2), Setup(2, layers=2, dropout=0.5)
    dropping.model.config.attention_dropout = 0.5
    for layer in dropping.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    dropping.model.train()
    torch.manual_seed(0)
    got = dropping.scores(shortlist=1.0)
    assert dropping.model.training and all(a.training for a in dropping.adapters.values())
    want = plain.scores(shortlist=1.0)
    assert equal_bits(got.cs, want.cs) and equal_bits(got.first_order, want.first_order)


def scores_of(size, setup, **settings):
    """Each process's scores, processes being threads with a model each; and the decoder layers each one ran, with None
    where it called `between`."""
    runs = [[] for _ in range(size)]
    setups = [copy.deepcopy(setup) for _ in range(size)]

    def run(world):
        own, index = runs[world.global_rank], world.global_rank
        for number, layer in enumerate(setups[index].model.model.layers):
            layer.register_forward_pre_hook(lambda *_, n=number: own.append(n))
        return setups[index].scores(world=world, between=partial(own.append, None), **settings)

    return Threads(size).results(run), runs


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shortlist", [None, 0.4])
def test_scores_do_not_depend_on_the_number_of_processes(setup, size, shortlist):
    """To the bit; and all processes run the same layers in the same order, as ZeRO-3 needs."""
    one = setup.scores(ablations_per_forward=4, shortlist=shortlist)
    several, runs = scores_of(size, setup, ablations_per_forward=4, shortlist=shortlist)
    for got in several:
        assert equal_bits(got.cs, one.cs) and got.cs0 == one.cs0 and got.full_loss == one.full_loss
        assert equal_bits(got.exact, one.exact)
        assert shortlist is None or equal_bits(got.first_order, one.first_order)
    assert all(run == runs[0] for run in runs) and runs[0].count(None) > 10
    assert 0 < len(runs[0]) - runs[0].count(None) < one.layer_gathers  # dealt, not repeated


# ---- the cut of the work ----


def test_cut_work_covers_each_ablation_of_each_side_and_grain_once():
    layers = [None, 0, 0, 0, 2, 2, 1, None]
    groups = cut_work(layers, chosen=[0, 1, 2, 3, 5, 6, 7], num_grains=3, ablations_per_forward=2)
    assert [g.start for g in groups] == [None, 0, 1, 2]
    seen = [(c, i.side, i.grain) for g in groups for i in g.items for c in i.components]
    assert sorted(seen) == [(c, s, g) for c in (0, 1, 2, 3, 5, 6, 7) for s in (WITHOUT, ONLY) for g in range(3)]
    unablated = [(i.side, i.grain) for g in groups for i in g.items if not i.components]
    assert sorted(unablated) == [(s, g) for s in (WITHOUT, ONLY) for g in range(3)]
    assert all(layers[c] == g.start for g in groups for i in g.items for c in i.components)
    assert all(len(i.components) <= 2 for g in groups for i in g.items)
    alone = cut_work(layers, chosen=range(8), num_grains=1, ablations_per_forward=3, alone={1, 4})
    assert [i.components for i in alone[1].items if i.side == ONLY] == [(2, 3), (1,)]
    assert [i.components for i in alone[3].items if i.side == ONLY] == [(5,), (4,)]


def test_a_process_needs_few_starting_states():
    """With as many processes as pairs of side and grain each needs one, whatever the number of components."""
    groups = cut_work([0] * 13 + [1] * 7, chosen=range(20), num_grains=2, ablations_per_forward=4)
    assert lanes_of(groups, 1, 0) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [lanes_of(groups, 4, p) for p in range(4)] == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]
    assert [lanes_of(groups, 2, p) for p in range(2)] == [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]


class Counter:
    """Calls of the model, its layers, layers times copies of a grain, rows of the output embedding."""

    def __init__(self, model, rows):
        self.calls = self.layers = self.copies = self.head_rows = 0
        model.register_forward_pre_hook(lambda *_: self._add("calls", 1))
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: self._layer(args[0], rows))
        model.lm_head.register_forward_hook(lambda _, args, out: self._add("head_rows", out[..., 0].numel()))

    def _add(self, name, number):
        setattr(self, name, getattr(self, name) + number)

    def _layer(self, hidden, rows):
        self.layers += 1
        self.copies += len(hidden) // rows

    @property
    def all(self):
        return self.calls, self.copies, self.layers, self.head_rows


@pytest.mark.parametrize("settings", [{}, PLAIN, {"ablations_per_forward": 5}, {"shortlist": 0.2}])
def test_reported_cost_is_what_ran(settings):
    setup = Setup(3)
    scorer = setup.scorer(**settings)
    scorer.scores(setup.layout, setup.weights)  # the first time looks at how the model calls its linears
    counter = Counter(setup.model, rows=2)
    got = scorer.scores(setup.layout, setup.weights)
    assert (got.forwards, got.layer_forwards, got.layer_gathers, got.head_rows) == (
        counter.all if settings is not PLAIN else (counter.calls, 0, 0, counter.head_rows)
    )


def test_starting_at_the_layer_halves_the_layers_and_targets_cut_the_head():
    setup = Setup(3, layers=6)
    total, tokens = setup.table.total, [setup.data.collate(g) for g in setup.data.grains()]
    got = setup.scores()
    naive = (2 * total + 1) * len(tokens)
    assert got.layer_forwards / (naive * 6) < 0.62  # (6 + 1) / 2 layers of 6 on average, and the starting states
    assert got.layer_gathers / (naive * 6) < 0.15
    targets = sum(b.num_target_tokens for b in tokens)
    assert got.head_rows == (2 * total + 2) * targets
    assert setup.scores(target_logits_only=False).head_rows == (2 * total + 2) * sum(b.labels.numel() for b in tokens)


def test_linears_before_the_ablated_one_are_not_computed_again(setup):
    """Rows through each linear of the layer where ablations start: of q's own, and of what q does not change."""
    fresh = copy.deepcopy(setup)
    table = fresh.table
    down = next(i for i, s in enumerate(table.sites) if s.name.endswith("layers.2.mlp.down_proj"))
    assert table.ranks[down] > 0
    scorer = fresh.scorer()
    calls = []
    original = AdapterLinear.forward

    def counted(self, x):
        calls.append((next(n for n, a in fresh.adapters.items() if a is self), len(x)))
        return original(self, x)

    chosen = list(range(table.offsets[down], table.offsets[down + 1]))
    groups = cut_work([2] * table.total, chosen=chosen, num_grains=1, ablations_per_forward=8)[
        1:
    ]  # without the whole forwards
    scorer._layout, scorer._weights, scorer._views = fresh.layout, fresh.weights, fresh.layout.views(fresh.weights)
    scorer._spans = {block.module: (block.first, block.rows) for block in fresh.layout.blocks}
    AdapterLinear.forward = counted
    try:
        with torch.no_grad():
            fresh.model.eval()
            scorer._run_groups(groups, torch.zeros(2, table.total + 1, 1, dtype=torch.float64))
    finally:
        AdapterLinear.forward = original
    layer = [(n.rpartition(".")[2], rows) for n, rows in calls if ".layers.2." in n]
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # Each of the two starting states runs the layer once, each of the two forwards only down_proj, on one copy.
    assert sorted(layer) == sorted([(n, 2) for n in names] * 2 + [("down_proj", 2)] * 2)


# ---- models as they come ----


def test_the_model_is_left_as_it_was(setup):
    fresh = copy.deepcopy(setup)
    modules = dict(fresh.model.named_modules())
    fresh.model.train()
    fresh.scores(shortlist=0.5)
    assert dict(fresh.model.named_modules()) == modules and fresh.model.training
    for module in modules.values():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in vars(module)
    assert all(a.views is None and a.gates is None for a in fresh.adapters.values())


def test_an_error_on_the_way_leaves_the_model_as_it_was(setup):
    fresh = copy.deepcopy(setup)
    modules = dict(fresh.model.named_modules())
    last = fresh.model.model.layers[2].mlp.down_proj

    def fails(*_):
        if "forward" in vars(last):  # its own ablations: earlier layers are skipped, earlier linears replayed
            raise OSError("provoked")

    handle = last.register_forward_pre_hook(fails)
    with pytest.raises(OSError, match="provoked"):
        fresh.scores()
    handle.remove()
    assert dict(fresh.model.named_modules()) == modules
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in modules.values())
    assert equal_bits(fresh.scores().cs, setup.scores().cs)


def test_a_stop_between_rounds_leaves_the_model_as_it_was(setup):
    fresh = copy.deepcopy(setup)
    modules, rounds = dict(fresh.model.named_modules()), []

    def stops():
        rounds.append(1)
        if len(rounds) == 20:
            raise KeyboardInterrupt

    scorer = fresh.scorer(between=stops)
    with pytest.raises(KeyboardInterrupt):
        scorer.scores(fresh.layout, fresh.weights)
    assert dict(fresh.model.named_modules()) == modules
    assert not any("forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks for m in modules.values())
    assert all(a.views is None for a in fresh.adapters.values())
    assert equal_bits(scorer.scores(fresh.layout, fresh.weights).cs, setup.scores().cs)


class TupleLayer(nn.Module):
    """A decoder layer as transformers before version 5 had them: returns a tuple; the caller reads an attribute."""

    attention_type = "full"

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return (self.layer(hidden_states, **kwargs), None)


class TupleLlama(nn.Module):
    """A hand-written caller of such layers, which hands the hidden state over by name."""

    _no_split_modules = ["TupleLayer"]

    def __init__(self, llama):
        super().__init__()
        self.embed, self.norm, self.lm_head = llama.model.embed_tokens, llama.model.norm, llama.lm_head
        self.rotary = llama.model.rotary_emb
        self.layers = nn.ModuleList(TupleLayer(layer) for layer in llama.model.layers)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        hidden = self.embed(input_ids)
        rotary = self.rotary(hidden, position_ids=position_ids)
        size = input_ids.shape[1]
        mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
        mask = mask.expand(len(input_ids), 1, size, size)
        for layer in self.layers:
            assert layer.attention_type == "full"
            out = layer(hidden_states=hidden, attention_mask=mask, position_embeddings=rotary)
            hidden = out[0]
        return SimpleNamespace(logits=self.lm_head(self.norm(hidden)))


def test_layers_that_return_tuples(setup, naive):
    fresh = copy.deepcopy(setup)
    model = TupleLlama(fresh.model)
    paths = [n.replace("model.layers", "layers") for n in fresh.adapters]
    paths = [n.replace("self_attn", "layer.self_attn").replace("mlp", "layer.mlp") for n in paths]
    adapters = dict(zip(paths, fresh.adapters.values(), strict=True))
    pairs = zip(paths, fresh.table.sites, strict=True)
    sites = [Site(n, n, s.in_features, s.out_features, s.scaling) for n, s in pairs]
    layout = ArenaLayout(RankTable.start(sites, fresh.table.ranks), Lora().entries)
    assert layout.size == fresh.layout.size and dict(model.named_modules()).keys() >= adapters.keys()
    scorer = AblationScorer(model, adapters, fresh.data, world=ALONE, release=lambda: None)
    assert scorer.stack.path == "layers"
    got = scorer.scores(layout, fresh.weights)
    assert got.layer_forwards > 0
    assert float((got.cs - naive[0]).abs().max()) < TOLERANCE


def test_a_model_without_a_list_of_layers_is_run_whole(setup, naive):
    fresh = copy.deepcopy(setup)
    fresh.model._no_split_modules = None
    scorer = fresh.scorer()
    assert scorer.stack is None
    got = scorer.scores(fresh.layout, fresh.weights)
    assert float((got.cs - naive[0]).abs().max()) < TOLERANCE and got.layer_gathers == 0


def test_layers_run_twice_are_refused(setup):
    fresh = copy.deepcopy(setup)
    layers = fresh.model.model.layers
    fresh.model.model.layers = nn.ModuleList([layers[0], layers[1], layers[0]])
    with pytest.raises(ValueError, match=r"model.layers did not run its 3 layers .* set alora.prefix_cache=false"):
        fresh.scores()


def test_the_list_with_most_adapters_is_taken():
    both = nn.Module()
    both._no_split_modules = ["Linear"]
    both.vision = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    both.text = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert find_stack(both, ["text.0", "text.1", "vision.0"]).path == "text"
    assert find_stack(both, ["vision.0", "vision.1", "text.0"]).path == "vision"
    assert find_stack(both, ["other"]) is None
    stack = find_stack(both, ["text.0", "text.1"])
    assert [stack.layer_of(n) for n in ("text.0.q", "text.1", "vision.0", "head")] == [0, 1, None, None]


def test_adapters_outside_the_layers_are_scored_by_whole_forwards():
    """An adapted output embedding and a part of the layers."""
    model = tiny_llama(4)
    sites = [
        Site("lm_head", "lm_head", 32, 128, scaling=2.0),
        Site("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", 32, 64, scaling=2.0),
    ]
    setup = Setup(4, layers=2)
    setup.model, setup.adapters = model, attach(model, sites, dropout={})
    setup.table = RankTable.start(sites, [3, 2])
    setup.layout = ArenaLayout(setup.table, Lora().entries)
    setup.weights = torch.randn(setup.layout.size, generator=torch.Generator().manual_seed(0)) * 0.1
    cs, cs0 = setup.naive()
    got = setup.scores()
    assert float((got.cs - cs).abs().max()) < TOLERANCE and abs(got.cs0 - cs0) < TOLERANCE


def test_what_is_trained_in_full_stays_in_both_models():
    """A dense output embedding belongs to no component: M_none keeps it."""
    setup = Setup(5, layers=2)
    dense = attach_dense(setup.model, ["lm_head"])
    from ardtrain.dense import dense_entries

    layout = ArenaLayout(setup.table, Lora().entries, dense_entries({"lm_head": tiny_llama(5).lm_head}))
    weights = torch.zeros(layout.size)
    weights[: setup.layout.size] = setup.weights
    block = next(b for b in layout.all_blocks if b.module == "lm_head")
    block.of(weights)[:] = 2.0 * dense["lm_head"].first["weight"]
    setup.adapters, setup.layout, setup.weights = {**setup.adapters, **dense}, layout, weights
    cs, cs0 = setup.naive()
    got = setup.scores()
    assert float((got.cs - cs).abs().max()) < 2 * TOLERANCE and abs(got.cs0 - cs0) < 2 * TOLERANCE


class ClassRows:
    """Two grains of classified rows of unlike lengths, for models with `types` token types."""

    def __init__(self, types):
        self.types = types

    def grains(self):
        return [0, 1]

    def collate(self, grain):
        numbers = np.random.default_rng(grain)
        lengths = [9, 5, 7]
        ids = numbers.integers(5, 40, size=(3, 9))
        mask = np.arange(9) < np.array(lengths)[:, None]
        tokens = [[(row[:n].astype(np.int32), np.zeros(n, dtype=bool))] for row, n in zip(ids, lengths, strict=True)]
        batch = build_batch(tokens, packed=False, pad_token_id=1)
        types = torch.from_numpy((np.arange(9) >= 4) & mask).long() if self.types else None
        classes = torch.from_numpy(numbers.integers(0, 3, size=3))
        return replace(batch, class_labels=classes, token_type_ids=types, num_target_tokens=3)


def classifier(family):
    """A tiny random model that tells three classes apart."""
    common = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.3, "num_labels": 3,
        "pad_token_id": 1,
    }  # fmt: skip
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = {
        "bert": lambda: BertConfig(**common),
        "roberta": lambda: RobertaConfig(**common, type_vocab_size=1),
        "deberta": lambda: DebertaV2Config(**common, **relative, share_att_key=True),
        "llama": lambda: LlamaConfig(**common, num_key_value_heads=1, use_cache=False),
    }[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)


def classes_setup(family):
    setup = Setup(8, model=classifier(family))
    setup.data = ClassRows(family == "bert")
    return setup


@pytest.mark.parametrize(
    ("family", "n", "prefix_cache"),
    [("bert", 8, True), ("roberta", 8, True), ("llama", 8, True), ("llama", 3, False), ("deberta", 8, False)],
)
def test_rows_of_classes(family, n, prefix_cache):
    """S is then minus the mean cross-entropy over the rows (the paper's RoBERTa); encoders start in the middle too."""
    setup = classes_setup(family)
    cs, cs0 = setup.naive()
    got = setup.scores(ablations_per_forward=n, prefix_cache=prefix_cache, shortlist=1.0)
    assert float((got.cs - cs).abs().max()) < TOLERANCE and abs(got.cs0 - cs0) < TOLERANCE
    assert float(cs.max() - cs.min()) > 1e-2
    assert (got.layer_forwards > 0) == prefix_cache, "the list of layers was not found"


@pytest.mark.parametrize(
    ("family", "alone"), [("bert", "bert.pooler.dense"), ("deberta", "query_proj key_proj pooler")]
)
def test_linears_that_are_not_called_row_by_row_are_ablated_alone(family, alone):
    """A pooler sees [B, I]; DeBERTa's query and key projections also see the table of relative positions."""
    setup = classes_setup(family)
    scorer = setup.scorer()
    scorer.scores(setup.layout, setup.weights)
    others = set(setup.adapters) - scorer._row_by_row
    assert others == {n for n in setup.adapters if any(word in n for word in alone.split())} != set()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_zero3_gives_the_same_bits_and_leaves_nothing_gathered(setup, world, prefix_cache):
    plain = copy.deepcopy(setup)
    BackboneEngine(plain.model, stage=0, config=backbone_config(), device=CPU)
    want = plain.scores(prefix_cache=prefix_cache, shortlist=0.5)
    sharded = copy.deepcopy(setup)
    engine = BackboneEngine(sharded.model, stage=3, config=backbone_config(stage=3), device=CPU)
    scorer = AblationScorer(
        engine.module, sharded.adapters, sharded.data, world=world,
        release=engine.release, prefix_cache=prefix_cache, shortlist=0.5,
    )  # fmt: skip
    for _ in range(2):
        got = scorer.scores(sharded.layout, sharded.weights)
        assert equal_bits(got.cs, want.cs) and equal_bits(got.first_order, want.first_order)
        assert engine.gathered_parameters() == 0
    engine.destroy()


def alora_run(stage, **settings):
    """Losses and events of ten steps with rounds after steps 4, 7 and 10 of 12; the trainer."""
    settings = AloraSettings(total_steps=12, k1=4, k2=3, rounds=8, **settings)
    trainer = tiny_trainer(Alora(settings), r=2, backbone=backbone_config(stage=stage), learning_rate=2e-2)
    trainer.ablation = AblationScorer(
        trainer.backbone.module, trainer.adapters, HeldOutBatches(3, num_grains=2), world=trainer.world,
        release=trainer.backbone.release,
    )  # fmt: skip
    events = []
    trainer.hooks.on_event = events.append
    return [trainer.train_step().loss for _ in range(10)], events, trainer


def test_training_with_rounds(world):
    """Ranks move at the rounds alone, the total never rises, ZeRO-3 gives the bits of ZeRO-0."""
    losses, events, trainer = alora_run(0)
    assert [event.step for event in events] == [3, 6, 9]
    records = [event.record for event in events]
    totals = [r.before.total for r in records] + [trainer.arena.table.total]
    assert totals == sorted(totals, reverse=True) and totals[0] == 28
    assert all(r.plan.reason.startswith("alora: pruned 7") and r.before.ranks != r.after.ranks for r in records)
    assert {"ablation_full_loss", "ablation_forwards"} <= set(events[0].notes)
    lowest = sorted(events[0].scores.tolist())
    assert records[0].plan.scores["highest_pruned"] == lowest[6]
    other_losses, _, other = alora_run(3)
    assert [x.hex() for x in losses] == [x.hex() for x in other_losses]
    assert other.arena.table.digest == trainer.arena.table.digest
    assert other.backbone.gathered_parameters() == 0
    other.backbone.destroy()


def test_settings_are_checked(setup):
    with pytest.raises(ValueError, match="ablations_per_forward=0 must be at least 1"):
        setup.scorer(ablations_per_forward=0)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"shortlist={fraction} must be a fraction"):
            setup.scorer(shortlist=fraction)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(RuntimeError, match="not finite"):
        toy_scores((float("nan"), 1.0))


def test_an_empty_table_is_scored():
    setup = Setup(6, layers=2)
    layout = ArenaLayout(RankTable.start(setup.table.sites, [0] * len(setup.table.sites)), Lora().entries)
    got = setup.scorer().scores(layout, torch.zeros(layout.size))
    assert len(got.cs) == 0 and got.cs0 == 0.0 and got.notes["ablation_exact_fraction"] == 1.0


# ---- the first-order shortlist, which is not AB-LoRA ----


def test_first_order_by_finite_differences():
    """dS/dg at M and at M_none by central differences of the gates, in plain forwards."""
    setup = Setup(7, layers=2)
    got = setup.scores(shortlist=0.1)
    total, step = setup.table.total, 1e-2
    for r in (0, 5, total - 1):
        slopes = []
        for base in (torch.ones(total), torch.zeros(total)):
            nudge = torch.eye(total)[r] * step
            slopes.append(-(setup.loss(base + nudge) - setup.loss(base - nudge)) / (2 * step))
        assert float(got.first_order[r] - got.cs0) == pytest.approx(sum(slopes), abs=2e-4)


def test_shortlist_marks_and_keeps_the_estimates_behind(setup, naive):
    """Exact where it says so, equal to the full scoring there; the others are estimates, above every exact score."""
    got, exact = setup.scores(shortlist=0.25), setup.scores()
    count = math.ceil(0.25 * setup.table.total)
    assert int(got.exact.sum()) == count < setup.table.total
    assert got.notes["ablation_exact_fraction"] == pytest.approx(count / setup.table.total)
    lowest = torch.argsort(got.first_order, stable=True)[:count]
    assert set(lowest.tolist()) == set(torch.nonzero(got.exact).view(-1).tolist())
    assert float((got.cs - exact.cs)[got.exact].abs().max()) < TOLERANCE
    others, top = ~got.exact, got.cs[got.exact].max()
    assert bool((got.cs[others] > top).all())
    higher = others & (got.first_order > top)
    assert bool(higher.any()) and equal_bits(got.cs[higher], got.first_order[higher])
    chosen = {c for i, p in pruned(setup.table, got.relative, 7) for c in [setup.table.offsets[i] + p]}
    assert all(bool(got.exact[c]) for c in chosen)
    assert got.forwards < exact.forwards and got.layer_forwards < exact.layer_forwards / 2


def test_shortlist_prunes_what_the_full_scoring_prunes():
    """How often, over seeds: measured here on small contributions, where first order is good; a benchmark has more."""
    equal = 0
    for seed in range(6):
        setup = Setup(seed, layers=2, r=1, b_std=0.05)
        exact, short = setup.scores(), setup.scores(shortlist=0.4)
        equal += pruned(setup.table, exact.relative, 3) == pruned(setup.table, short.relative, 3)
    assert equal >= 5
