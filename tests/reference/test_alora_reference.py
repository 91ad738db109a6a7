"""ALoRA against a transcription in NumPy float64: a Llama with gated LoRA, AB-LoRA by its definition, one round.

Written from the formulas of arXiv 2403.16187 (methods.md 3.1 to 3.3, 3.6); shares no code with the package.
"""

import math

import numpy as np
import pytest
import torch

from ardtrain.ablation import AblationScorer
from ardtrain.adapters import attach
from ardtrain.arena import ArenaLayout
from ardtrain.collectives import World
from ardtrain.methods.alora import Alora, AloraSettings, allocate
from ardtrain.ranks import RankTable
from ardtrain.resize import start_snapshot
from tests.tiny import CPU, HeldOutBatches, sites_of, sites_of_model, tiny_llama

TOLERANCE = 3e-6  # of float32 scores of losses around 5; NumPy's are float64


class NumpyLlama:
    """One row at a time; `lora` maps a module's path to (A [R, I], B [R, O], scaling, gates [R])."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
        self.lora = {}

    def linear(self, path, x):
        out = x @ self.weights[path + ".weight"].T
        if path in self.lora:
            a, b, scaling, gates = self.lora[path]
            out = out + scaling * ((x @ a.T) * gates) @ b
        return out

    def norm(self, path, x):
        return self.weights[path + ".weight"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps)

    def rotate(self, x):
        """Rotary embedding of [T, heads, d], halves paired, base 10000."""
        size, half = x.shape[0], x.shape[2] // 2
        angle = np.arange(size)[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attention(self, path, x):
        heads, kv = self.config.num_attention_heads, self.config.num_key_value_heads
        size, width = len(x), self.config.hidden_size // heads
        q = self.rotate(self.linear(path + ".q_proj", x).reshape(size, heads, width))
        k = self.rotate(self.linear(path + ".k_proj", x).reshape(size, kv, width))
        v = self.linear(path + ".v_proj", x).reshape(size, kv, width)
        k, v = (np.repeat(t, heads // kv, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        scores = np.where(np.tri(size, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.linear(path + ".o_proj", np.einsum("hqk,khd->qhd", weights, v).reshape(size, -1))

    def mlp(self, path, x):
        gate = self.linear(path + ".gate_proj", x)
        return self.linear(path + ".down_proj", gate / (1.0 + np.exp(-gate)) * self.linear(path + ".up_proj", x))

    def loss_sum(self, ids, labels):
        """Summed cross-entropy of a row; label t is predicted at t - 1, -100 is none."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            x = x + self.attention(layer + ".self_attn", self.norm(layer + ".input_layernorm", x))
            x = x + self.mlp(layer + ".mlp", self.norm(layer + ".post_attention_layernorm", x))
        logits = self.norm("model.norm", x) @ self.weights["lm_head.weight"].T
        top = logits.max(-1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        return -sum(logs[t - 1, label] for t, label in enumerate(labels) if t > 0 and label != -100)


class NumpyScores:
    """S for any gates of a whole network, and AB-LoRA from it."""

    def __init__(self, model, table, lora, rows):
        self.llama, self.table, self.lora, self.rows = model, table, lora, rows

    def s(self, gates):
        """Minus the mean cross-entropy over the target tokens of the whole batch; gates [R]."""
        for i, site in enumerate(self.table.sites):
            a, b = self.lora[i]
            own = gates[self.table.offsets[i] : self.table.offsets[i + 1]]
            self.llama.lora[site.module] = (a, b, site.scaling, own)
        targets = sum(int((labels[1:] != -100).sum()) for _, labels in self.rows)
        return -sum(self.llama.loss_sum(ids, labels) for ids, labels in self.rows) / targets

    def all(self):
        """IS [R], CS [R], CS0, S(M)."""
        total = self.table.total
        s_full, s_none = self.s(np.ones(total)), self.s(np.zeros(total))
        cs = np.array([-self.s(1.0 - one) + self.s(one) for one in np.eye(total)])
        return cs + s_full, cs, s_none - s_full, s_full


def numpy_round(ranks, rooms, scores, n_a, *, only_harmful=False, revive=False):
    """One round: (site, position) that leave, and how many each site gains."""
    sites = np.repeat(np.arange(len(ranks)), ranks)
    positions = np.concatenate([np.arange(r) for r in ranks])
    order = np.lexsort((positions, sites, scores))
    out = [int(c) for c in order[:n_a] if scores[c] < 0 or not only_harmful]
    unpruned = [i for i in range(len(ranks)) if i not in sites[out] and (ranks[i] or revive)]
    mean = {i: scores[sites == i].mean() if ranks[i] else 0.0 for i in unpruned}
    gain, left = dict.fromkeys(unpruned, 0), len(out)
    while left and any(gain[i] < rooms[i] for i in unpruned):
        for i in sorted(unpruned, key=lambda i: -mean[i]):
            if left and gain[i] < rooms[i]:
                gain[i] += 1
                left -= 1
    return {(int(sites[c]), int(positions[c])) for c in out}, {i: g for i, g in gain.items() if g}


def compared(plan, table):
    """A plan in numpy_round's form."""
    if plan is None:
        return set(), {}
    out = {(i, p) for i, c in plan.changes.items() for p in range(table.ranks[i]) if p not in c.keep}
    return out, {i: c.born for i, c in plan.changes.items() if c.born}


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_against_numpy(seed):
    model = tiny_llama(seed, layers=2)
    sites, ranks = sites_of_model(model, r=2, lora_alpha=4.0)
    reference = NumpyLlama(model)
    adapters = attach(model, sites, dropout={})
    table = RankTable.start(sites, [(rank + i) % 4 for i, rank in enumerate(ranks)])
    method = Alora(AloraSettings(total_steps=40, k1=10, k2=5, rounds=3))
    layout = ArenaLayout(table, method.entries)
    weights = start_snapshot(table, layout, method.init, seed=seed).full.master
    numbers = torch.Generator().manual_seed(seed)
    for block in layout.blocks:
        if block.part == "lora_B":
            block.of(weights).normal_(0.0, 0.15, generator=numbers)
    lora = []
    for i in range(len(sites)):
        rows = layout.site_rows(weights, i)
        lora.append((rows["lora_A"].double().numpy(), rows["lora_B"].double().numpy()))
    data = HeldOutBatches(seed, num_grains=2, rows=2, length=14)
    rows = []
    for batch in map(data.collate, data.grains()):
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
            rows.append((ids[mask].numpy(), labels[mask].numpy()))
    importance, cs, cs0, s_full = NumpyScores(reference, table, lora, rows).all()
    scorer = AblationScorer(model, adapters, data, world=World(0, 1, CPU), release=lambda: None)
    got = scorer.scores(layout, weights)
    assert np.ptp(cs) > 1e-2
    np.testing.assert_allclose(got.cs.numpy(), cs, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.importance.numpy(), importance, rtol=0, atol=TOLERANCE)
    assert got.cs0 == pytest.approx(cs0, abs=TOLERANCE) and -got.full_loss == pytest.approx(s_full, abs=TOLERANCE)
    low = np.sort(cs)
    assert low[7] - low[6] > 10 * TOLERANCE  # no tie at the cut
    rooms = [site.max_rank - rank for site, rank in zip(table.sites, table.ranks, strict=True)]
    want = numpy_round(table.ranks, rooms, cs - cs0, 7)
    assert compared(allocate(table, got.relative.tolist(), n_a=7), table) == want


def test_rounds_against_numpy():
    numbers = np.random.default_rng(11)
    for trial in range(300):
        shapes = [(int(n), 9) for n in numbers.integers(3, 8, size=6)]
        ranks = [int(numbers.integers(0, n + 1)) for n, _ in shapes]
        table = RankTable.start(sites_of(*shapes), ranks)
        scores = numbers.normal(0.3, 1.0, size=table.total)
        if trial % 3 == 0:
            scores = np.round(scores)  # ties
        n_a = int(numbers.integers(1, 12))
        only_harmful, revive = bool(trial % 2), bool(trial % 5 == 0)
        plan = allocate(table, scores.tolist(), n_a=n_a, prune_only_harmful=only_harmful, revive=revive)
        rooms = [n - r for (n, _), r in zip(shapes, ranks, strict=True)]
        want = numpy_round(ranks, rooms, scores, n_a, only_harmful=only_harmful, revive=revive)
        got = compared(plan, table)
        if trial % 3:
            assert got == want
        else:  # averages of rounded scores may tie in exact arithmetic and differ in NumPy's last bit
            assert got[0] == want[0] and sum(got[1].values()) == sum(want[1].values())
