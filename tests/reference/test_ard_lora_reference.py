"""ARD-LoRA's whole schedule against the NumPy transcription of ard_lora_numpy.py, both in float64.

Ours are the pieces of the loop: arena, adapters by head, method, plans and their application; torch's autograd and
AdamW. float64 because a long schedule in float32 parts by more than the tolerance.
"""

import math

import numpy as np
import pytest
import torch

from ardtrain.adapters import AdapterLinear, HeadLinear, SharedHeadLinear, bind_arena
from ardtrain.arena import ArenaLayout, Shard, fill_newborn
from ardtrain.engines import FullState
from ardtrain.heads import Heads, split_heads
from ardtrain.methods.ard_lora import ArdLora, ArdLoraSettings, tied_keys
from ardtrain.methods.base import Binding, Statistics
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable, Site, named_seed
from ardtrain.resize import Snapshot, edit_survivors, repack_snapshot
from tests.reference import ard_lora_numpy as reference

# module -> (in, out, heads, side): 4 query heads, 2 key heads, 4 heads of o, one matrix without heads
SHAPES = {
    "net.0.q_proj": (10, 24, 4, "out"),
    "net.0.k_proj": (24, 12, 2, "out"),
    "net.0.o_proj": (12, 10, 4, "in"),
    "net.0.up_proj": (10, 8, 1, "out"),
}
R0, SCALE, SEED, TOLERANCE = 3, 2.0, 5, 1e-9
STEPS = {"total": 96, "warm": 8, "final": 24, "every": 6, "alpha_every": 3}
# Each unit's alphas under tie=head: a key head takes the mean of two query heads, up_proj has its own.
TIED = [[0], [1], [2], [3], [0, 1], [2, 3], [0], [1], [2], [3], [4]]
CASES = {
    "own_a": {},
    "own_a without a budget": {"target": None, "first_price": 0.4, "every": 4},
    "own_a, tie=head": {"tie": "head"},
    "own_a, temporal_l2, no rms": {"squared": True, "rms": False, "rate_alpha": 1.5, "first_price": 0.05},
    "own_a, variation over heads": {"chains": ([0, 1, 2, 3], [4, 5], [6, 7, 8, 9]), "beta": 0.9},
    "own_a, a wide ramp": {"width": 2.5},
    "own_a, sigmoid": {"mask": "sigmoid", "taus": (0.5, 0.05)},
    "own_a, straight through": {"mask": "hard"},
    "shared_a": {"layout": "shared_a", "target": 26.0, "rate_alpha": 0.2},
    "shared_a without a budget, tie=head": {"layout": "shared_a", "tie": "head", "target": None, "first_price": 0.4},
}


def settings(case):
    """(the transcription's settings, tie, layout)."""
    changes = dict(CASES[case])
    tie, layout = changes.pop("tie", "none"), changes.pop("layout", "own_a")
    base = {
        "share": TIED if tie == "head" else [[u] for u in range(11)],
        "target": 20.0,
        "rate": 2e-2,
        "max_norm": 1.0,
        "rate_alpha": 0.12,
        "beta": 0.25,
        "squared": False,
        "first_price": 0.0,
        "most_price": 10.0,
        "rate_price": 0.5,
        "rms": True,
    }
    return reference.Settings(**(STEPS | base | changes)), tie, layout


def ours_settings(s, tie):
    return ArdLoraSettings(
        total_steps=s.total,
        init_warmup=s.warm,
        final_warmup=s.final,
        tie=tie,
        mask={"ramp": "ramp", "hard": "straight_through", "sigmoid": "sigmoid"}[s.mask],
        ramp_width=s.width,
        sigmoid_tau=s.taus,
        lr_alpha=s.rate_alpha,
        alpha_scale="rms" if s.rms else "none",
        alpha_interval=s.alpha_every,
        resize_interval=s.every,
        meta_interval=0,
        l1=s.first_price,
        l1_max=s.most_price,
        tv_form="heads" if s.chains else "temporal_l2" if s.squared else "temporal",
        beta=s.beta,
        target_r=None if s.target is None else s.target / 11,
        controller_rate=s.rate_price,
        budget_in="components",
        r_max=None,
        capacities=None,
    )


def frozen_weights():
    numbers = np.random.default_rng(SEED)
    return [numbers.normal(0.0, i**-0.5, size=(o, i)) for i, o, _, _ in SHAPES.values()]


def batches(step):
    """Targets of the same chain with changed weights: much in some heads, nothing in others."""
    weights, numbers = frozen_weights(), np.random.default_rng(SEED + 1)
    weights[0][:6] += 0.7 * numbers.normal(size=(6, 10))  # query head 0, all its rank
    weights[1][6:] += 0.4 * np.outer(numbers.normal(size=6), numbers.normal(size=24))  # key head 1, rank 1
    weights[2][:, 3:9] += 0.5 * numbers.normal(size=(10, 6))  # heads 1 and 2 of o
    h = x = np.random.default_rng([SEED, step]).normal(size=(12, 10))
    for i, weight in enumerate(weights):
        h = h @ weight.T if i == len(weights) - 1 else np.tanh(h @ weight.T)
    return x, h


def sites_of(layout):
    """(sites, first ranks, heads), and module -> (heads, part) where they share components."""
    sites = [Site(m, m, i, o, scaling=SCALE) for m, (i, o, _, _) in SHAPES.items()]
    heads = {m: Heads(h, side) for m, (_, _, h, side) in SHAPES.items() if h > 1}
    ranks = [R0] * len(sites)
    if layout == "shared_a":
        return sites, ranks, heads, {m: (h.count, "lora_B" if h.side == "out" else "lora_A") for m, h in heads.items()}
    return *split_heads(sites, ranks, heads), heads, {}


def drawn(site, step, count):
    """Rows of A as Lora.init draws them from the generator of (run seed, step, site)."""
    generator = torch.Generator().manual_seed(named_seed(SEED, step, site.name))
    return Lora().init(site, {}, count, generator)["lora_A"].double().numpy()


class Ours:
    """A chain of adapters over one float64 arena, stepped as trainer.py does."""

    def __init__(self, s, tie, form):
        self.settings = s
        sites, ranks, heads, shared = sites_of(form)
        table = RankTable.start(sites, ranks)
        self.method = ArdLora(ours_settings(s, tie), table, shared)
        self.adapters = {}
        for module, weight in zip(SHAPES, frozen_weights(), strict=True):
            linear = torch.nn.Linear(*weight.T.shape, bias=False, dtype=torch.float64).requires_grad_(False)
            linear.weight.data.copy_(torch.from_numpy(weight))
            cut = heads.get(module)
            if cut is None:
                self.adapters[module] = AdapterLinear(linear, scaling=SCALE)
            else:
                kind = HeadLinear if form == "own_a" else SharedHeadLinear
                self.adapters[module] = kind(linear, scaling=SCALE, num_heads=cut.count, side=cut.side)
        layout = ArenaLayout(table, self.method.entries)
        master = torch.zeros(layout.size, dtype=torch.float64)
        fill_newborn(master, layout, torch.ones(table.total, dtype=torch.bool), self.method.init, seed=SEED, step=-1)
        zeros, age = torch.zeros_like(master), torch.zeros(table.total, dtype=torch.int64)
        state = {n: torch.zeros(k, dtype=torch.float64) for n, k in self.method.state_tensors().items()}
        self.build(Snapshot(table, FullState(master, zeros, zeros.clone(), 0), age, {}, {}, state), layout)

    def build(self, snapshot, layout):
        s = self.settings
        self.table, self.layout = snapshot.table, layout
        self.flat = torch.nn.Parameter(snapshot.full.master.clone())
        self.adam = torch.optim.AdamW([self.flat], lr=s.rate, betas=s.betas, eps=s.eps, weight_decay=s.decay)
        self.adam.state[self.flat] = {
            "step": torch.tensor(float(snapshot.full.steps)),
            "exp_avg": snapshot.full.exp_avg.clone(),
            "exp_avg_sq": snapshot.full.exp_avg_sq.clone(),
        }
        self.age, self.state = snapshot.age, snapshot.sites
        self.method.bind(Binding(self.table, Shard(layout, 0, 1), self.age, self.state))

    def apply(self, plan, step):
        if not plan.reshapes(self.table):
            plan.apply(self.table)
            edit_survivors(self.flat.data, self.layout, plan)
            return
        adam = self.adam.state[self.flat]
        full = FullState(self.flat.detach().clone(), adam["exp_avg"], adam["exp_avg_sq"], int(adam["step"]))
        snapshot = Snapshot(self.table, full, self.age, {}, {}, {n: v.clone() for n, v in self.state.items()})
        self.build(*repack_snapshot(snapshot, self.layout, plan, self.method.init, seed=SEED, step=step))

    def step(self, t):
        """(loss, gates of the forward, plan or None)."""
        x, y = (torch.from_numpy(part) for part in batches(t))
        leaf, gates = self.flat.detach().requires_grad_(), self.method.gates(t)
        leaves = [leaf]
        if gates is not None:
            gates = gates.double().requires_grad_()
            leaves.append(gates)
        bind_arena(self.adapters, self.layout, leaf, gates)
        h = x
        for i, adapter in enumerate(self.adapters.values()):
            h = adapter(h) if i == len(SHAPES) - 1 else torch.tanh(adapter(h))
        loss = 0.5 * (h - y).square().sum() / len(x)
        gradient, *by_gate = torch.autograd.grad(loss, leaves)
        norm = float(gradient.norm())
        if norm > self.settings.max_norm:
            gradient = gradient * (self.settings.max_norm / (norm + 1e-6))
        self.flat.grad = gradient
        self.adam.step()
        self.age += 1
        self.method.observe(t, Statistics(gradient, self.flat.data, by_gate[0] if by_gate else None))
        self.method.after_step(t)
        plan = self.method.plan(t, self.method.local_scores(t)) if self.method.due(t) else None
        if plan is not None:
            self.apply(plan, t)
        return float(loss.detach()), None if gates is None else gates.detach().numpy(), plan


def transcribed(s, form):
    sites, ranks, heads, shared = sites_of(form)
    by_name, out = {site.name: site for site in sites}, []
    for site, rank in zip(sites, ranks, strict=True):
        i, o, _, side = SHAPES[site.module]
        reads, writes = slice(0, i), slice(0, o)
        if site.head is not None and side == "out":
            writes = slice(site.start, site.start + site.out_features)
        elif site.head is not None:
            reads = slice(site.start, site.start + site.in_features)
        count = shared.get(site.module, (1, ""))[0]
        a, b = drawn(site, -1, rank), np.zeros((rank, site.out_features))
        most, layer = min(2 * rank, site.in_features, site.out_features), list(SHAPES).index(site.module)
        out.append(reference.Site(site.name, layer, a, b, reads, writes, side, count, most))

    def newborn(name, step, count):
        return drawn(by_name[name], step, count)

    return reference.train(frozen_weights(), out, batches, newborn, SCALE, s)


def alpha_places(method, s):
    """For each alpha of the transcription its place in ours, which stand by name."""
    keys = tied_keys(method.units, method.settings.tie)
    names = sorted({name for own in keys for name in own})
    place = {}
    for own, share in zip(keys, s.share, strict=True):
        place |= {k: names.index(name) for k, name in zip(share, own, strict=True)}
    return [place[k] for k in range(len(names))]


def apart(ours, theirs):
    """Largest difference beside the largest number."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / max(1e-300, np.abs(theirs).max()))


@pytest.mark.parametrize("case", CASES)
def test_the_whole_schedule(case):
    s, tie, form = settings(case)
    ours, records = Ours(s, tie, form), transcribed(s, form)
    places = alpha_places(ours.method, s)
    worst = dict.fromkeys(("loss", "gates", "alphas", "ranks", "price", "weights"), 0.0)
    for t, wanted in enumerate(records):
        loss, gates, plan = ours.step(t)
        state = ours.state
        assert ours.table.ranks == tuple(wanted.components), f"step {t}"
        assert [list(b) for b in ours.table.births] == wanted.births, f"step {t}"
        worst["loss"] = max(worst["loss"], abs(loss / wanted.loss - 1))
        if gates is None:
            assert (wanted.gates == 1).all(), f"step {t}"
        else:
            worst["gates"] = max(worst["gates"], float(np.abs(gates - wanted.gates).max()))
        worst["alphas"] = max(worst["alphas"], apart(state["alpha"][places], wanted.alphas))
        worst["ranks"] = max(worst["ranks"], apart(ours.method.unit_ranks(), wanted.ranks))
        worst["price"] = max(worst["price"], abs(float(state["controller"][0]) - wanted.price))
        for index in range(len(ours.table.sites)):
            rows = ours.layout.site_rows(ours.flat.detach(), index)
            for part, theirs in (("lora_A", wanted.a[index]), ("lora_B", wanted.b[index])):
                if theirs.any() and len(theirs):
                    worst["weights"] = max(worst["weights"], apart(rows[part], theirs))
        if plan is not None:
            assert wanted.event
    assert max(worst.values()) <= TOLERANCE, worst
    assert_something_happened(s, records)


def assert_something_happened(s, records):
    """A run in which nothing moves would agree with anything."""
    assert records[-1].loss < 0.7 * records[0].loss
    alphas = records[s.last].alphas
    assert alphas.max() - alphas.min() > 0.2
    assert sum(r.event == "capacity" for r in records) >= 3
    assert records[s.last].event == "freeze"
    if len(records[-1].components) == len(s.share):
        ranks = records[-1].components
        assert len(set(ranks)) > 1
    else:  # heads that share: a head's rank is the number of its open gates
        assert set(records[-1].gates.tolist()) == {0.0, 1.0}
        ranks = records[-1].gates
    if s.target is not None:
        assert sum(ranks) == s.target
        assert any(r.price > 0 for r in records)


def test_sorting_and_factors_were_at_work():
    """The transcription's run has half-open gates at events and components that change places."""
    s, _, form = settings("own_a without a budget")
    records = transcribed(s, form)
    events = [t for t, r in enumerate(records) if r.event == "capacity"]
    moved = sum(b != sorted(b) for t in events for b in records[t].births)
    half = sum(bool(0.25 <= r - math.floor(r) < 1) for t in events for r in records[t].ranks)
    assert moved >= 3 and half >= 3
