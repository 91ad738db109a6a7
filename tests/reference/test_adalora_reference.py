"""AdaLoRA's whole schedule against the NumPy transcription of adalora_numpy.py, both in float64.

Ours are the pieces of the loop: arena, adapters, method, plans and their application; torch's autograd and AdamW.
float64 because a long schedule in float32 parts by more than the tolerance; test_adalora_peft.py runs the real trainer.
"""

import math

import numpy as np
import pytest
import torch

from ardtrain.adapters import AdapterLinear
from ardtrain.arena import ArenaLayout, Shard, fill_newborn
from ardtrain.engines import FullState
from ardtrain.methods.adalora import AdaLora, AdaLoraSettings
from ardtrain.methods.base import Binding, Statistics
from ardtrain.ranks import RankTable, Site
from ardtrain.resize import Snapshot, repack_snapshot
from tests.reference.adalora_numpy import Layer, Settings, scores_of, train

SHAPES = [(7, 9), (9, 8), (8, 9), (9, 5)]  # (in, out) of each layer
SCALE = 2.0
TOLERANCE = 1e-9
CHANGE = 22  # step
SEED = 3


def settings(compact, form):
    return Settings(
        total=72,
        ti=8,
        tf=16,
        interval=4,
        r=4,
        target=2,
        rate=3e-2,
        weight_decay=0.01,
        max_norm=0.3,
        penalty=0.005 if form == "squared" else 0.5,
        squared=form == "squared",
        remove_at_freeze=compact == "freeze",
    )


def frozen_weights():
    numbers = np.random.default_rng(SEED)
    return [numbers.normal(0.0, i**-0.5, size=(o, i)) for i, o in SHAPES]


def batches(step):
    """Targets of the same chain with changed weights, by rank 1 in one layer and rank 3 in another.

    They change places on the way, so that a component may become important that was not.
    """
    weights, numbers = frozen_weights(), np.random.default_rng(SEED + 1)
    for layer, rank in ((0, 1), (2, 3)) if step < CHANGE else ((0, 3), (2, 1)):
        out, inputs = weights[layer].shape
        change = numbers.normal(size=(out, rank)) @ numbers.normal(size=(rank, inputs))
        weights[layer] = weights[layer] + 0.5 * change
    h = x = np.random.default_rng([SEED, step]).normal(size=(16, SHAPES[0][0]))
    for i, weight in enumerate(weights):
        h = h @ weight.T if i == len(weights) - 1 else np.tanh(h @ weight.T)
    return x, h


class Ours:
    """A chain of AdapterLinears over one float64 arena, stepped as trainer.py does."""

    def __init__(self, s, compact, form):
        sites = [Site(f"m{i}", f"m{i}", *shape, scaling=SCALE) for i, shape in enumerate(SHAPES)]
        self.method = AdaLora(
            AdaLoraSettings(
                total_steps=s.total,
                target_r=s.target,
                tinit=s.ti,
                tfinal=s.tf,
                deltaT=s.interval,
                beta1=s.beta,
                beta2=s.beta,
                orth_reg_weight=s.penalty,
                reg_orth_form=form,
                compact=compact,
            )
        )
        self.settings, self.adapters = s, {}
        for site, weight in zip(sites, frozen_weights(), strict=True):
            linear = torch.nn.Linear(site.in_features, site.out_features, bias=False, dtype=torch.float64)
            linear.weight.data.copy_(torch.from_numpy(weight))
            self.adapters[site.module] = AdapterLinear(linear.requires_grad_(False), scaling=SCALE)
        table = RankTable.start(sites, [s.r] * len(sites))
        layout = ArenaLayout(table, self.method.entries)
        master = torch.zeros(layout.size)
        fill_newborn(master, layout, torch.ones(table.total, dtype=torch.bool), self.method.init, seed=SEED, step=-1)
        zeros = torch.zeros(layout.size, dtype=torch.float64)
        self.build(
            Snapshot(
                table,
                FullState(master.double(), zeros, zeros.clone(), 0),
                torch.zeros(table.total, dtype=torch.int64),
                {"mean": zeros.clone(), "spread": zeros.clone()},
                {"masked": torch.zeros(table.total, dtype=torch.float64)},
            ),
            layout,
        )

    def build(self, snapshot, layout):
        s = self.settings
        self.table, self.layout = snapshot.table, layout
        self.flat = torch.nn.Parameter(snapshot.full.master.clone())
        self.adam = torch.optim.AdamW([self.flat], betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)
        self.adam.state[self.flat] = {
            "step": torch.tensor(float(snapshot.full.steps)),
            "exp_avg": snapshot.full.exp_avg.clone(),
            "exp_avg_sq": snapshot.full.exp_avg_sq.clone(),
        }
        self.shard, self.age = Shard(layout, 0, 1), snapshot.age
        self.state = {name: self.shard.take(full).clone() for name, full in snapshot.entries.items()}
        self.state |= {name: values.clone() for name, values in snapshot.components.items()}
        self.method.bind(Binding(self.table, self.shard, self.age, self.state))

    def capture(self):
        entries = {}
        for name in ("mean", "spread"):
            entries[name] = torch.zeros(self.layout.size, dtype=torch.float64)
            self.shard.put(self.state[name], entries[name])
        adam = self.adam.state[self.flat]
        full = FullState(self.flat.detach().clone(), adam["exp_avg"], adam["exp_avg_sq"], int(adam["step"]))
        return Snapshot(self.table, full, self.age, entries, {"masked": self.state["masked"]})

    def step(self, t):
        """(loss, gradient norm before clipping, plan or None, scores or None)."""
        s = self.settings
        x, y = (torch.from_numpy(part) for part in batches(t))
        leaf = self.flat.detach().requires_grad_()
        views = self.layout.views(leaf)
        h = x
        for i, (module, adapter) in enumerate(self.adapters.items()):
            adapter.views = views.get(module)
            h = adapter(h) if i == len(SHAPES) - 1 else torch.tanh(adapter(h))
        loss = 0.5 * ((h - y) ** 2).sum() / len(x)
        (gradient,) = torch.autograd.grad(loss + self.method.extra_loss(views), leaf)
        norm = torch.linalg.vector_norm(gradient).item()
        if norm > s.max_norm:
            gradient.mul_(s.max_norm / (norm + 1e-6))
        self.adam.param_groups[0]["lr"] = s.rate * (s.total - t) / s.total
        self.flat.grad = gradient
        self.adam.step()
        self.method.observe(t, Statistics(gradient, self.flat.detach()))
        if not self.method.due(t):
            return loss.item(), norm, None, None
        scores = self.method.local_scores(t)
        plan = self.method.plan(t, scores)
        self.build(*repack_snapshot(self.capture(), self.layout, plan, self.method.init, seed=SEED, step=t))
        return loss.item(), norm, plan, scores

    def rows(self, index):
        """Part -> NumPy rows of one site."""
        return {p: r.detach().numpy() for p, r in self.layout.site_rows(self.flat, index).items()}

    def zeros(self):
        """(site, birth) pairs whose diagonal is 0."""
        return [
            (i, births[p])
            for i, births in enumerate(self.table.births)
            for p in range(len(births))
            if self.rows(i)["diagonal"][p, 0] == 0.0
        ]


def apart(ours, theirs):
    """Largest difference as a share of the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max() if theirs.size else 0.0


@pytest.mark.parametrize("form", ["mean_norm", "squared"])
@pytest.mark.parametrize("compact", ["end", "freeze"])
def test_schedule_agrees_with_numpy(compact, form):
    s = settings(compact, form)
    ours = Ours(s, compact, form)
    layers = []
    for index, weight in enumerate(frozen_weights()):
        rows = {p: r.copy() for p, r in ours.rows(index).items()}
        layers.append(Layer(weight, SCALE, {"A": rows["lora_A"], "B": rows["lora_B"], "E": rows["diagonal"][:, 0]}))
    run = train(layers, batches, s)

    losses, norms, masks, zeros = [], [], {}, []
    for t in range(s.total):
        births = ours.table.births
        loss, norm, plan, scores = ours.step(t)
        losses.append(loss)
        norms.append(norm)
        zeros.append(ours.zeros())
        if scores is not None:
            gone = {
                i: set(change.zero) | set(range(len(births[i]))) - set(change.keep)
                for i, change in plan.changes.items()
            }
            masks[t] = ([(i, births[i][p]) for i in sorted(gone) for p in sorted(gone[i])], scores.numpy(), plan.scores)

    assert apart(losses, run.losses) <= TOLERANCE
    assert apart(norms, run.norms) <= TOLERANCE
    assert list(masks) == [m.step for m in run.masks] == [*range(12, 56, 4), 56]
    for theirs in run.masks:
        masked, scores, cut = masks[theirs.step]
        assert masked == theirs.masked, f"step {theirs.step}"
        assert apart(scores, theirs.scores) <= TOLERANCE
        # The decision does not hang on the last bits that two programs may round differently.
        difference = np.abs(scores - theirs.scores).max()
        assert cut["lowest_kept"] - cut["highest_masked"] >= 100 * difference, "choose a seed with wider gaps"
    assert zeros == run.zeros
    assert [list(b) for b in ours.table.births] == [layer.births.tolist() for layer in layers]
    for index, layer in enumerate(layers):
        rows = ours.rows(index)
        for part, mine in (("A", rows["lora_A"]), ("B", rows["lora_B"]), ("E", rows["diagonal"][:, 0])):
            assert apart(mine, layer.value[part]) <= TOLERANCE, f"layer {index}, {part}"
    assert apart(ours.method.local_scores(s.total), np.concatenate([scores_of(layer) for layer in layers])) <= TOLERANCE

    # The run was one worth comparing.
    assert run.losses[-1] < 0.5 * run.losses[0]
    assert min(run.norms) < s.max_norm < max(run.norms)
    assert ours.table.total == s.target * len(SHAPES) and len(set(ours.table.ranks)) > 1
    events = [set(m.masked) for m in run.masks]
    assert any(a - b for a, b in zip(events, events[1:], strict=False)), "no component came back"
    assert all(math.isfinite(x) for x in losses)
