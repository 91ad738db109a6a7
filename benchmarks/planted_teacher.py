"""Planted ranks without a trainer: a base, a teacher with known low-rank changes, how to judge an allocation.

Letters: O out, I in, r rank, S sites, V vocabulary, B rows, T tokens.
"""

import copy
import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ardtrain.data import build_batch
from ardtrain.ranks import named_seed

PROPORTIONS = (4, 2, 1)  # planted ranks beside the uniform one


@dataclass(frozen=True)
class Shape:
    """A Llama's shape; with mlp = hidden a component costs the same in all matrices but k and v."""

    hidden: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 64
    vocab: int = 256


def random_base(shape, seed):
    """A frozen random Llama; entries of std I^-1/2 (embeddings 1), so that each layer really moves the hidden state."""
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=256,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(named_seed("planted base", seed))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 1.0 if name.endswith("embed_tokens.weight") else parameter.shape[1] ** -0.5
            parameter.data.normal_(0.0, std, generator=generator)
    return model.requires_grad_(False).eval()


class RandomRows:
    """Grains of random tokens, a function of (name, seed, step, number); all are targets but a row's first."""

    def __init__(self, name, seed, *, num_grains, rows, length, vocab):
        self.name, self.seed, self.num_grains = name, seed, num_grains
        self.rows, self.length, self.vocab = rows, length, vocab

    def grains(self, step=-1):
        return [(step, index) for index in range(self.num_grains)]

    def collate(self, grain):
        numbers = np.random.default_rng(named_seed("planted rows", self.name, self.seed, *grain))
        ids = numbers.integers(0, self.vocab, size=(self.rows, self.length)).astype(np.int32)
        return build_batch([[(row, np.ones(self.length, bool))] for row in ids], packed=False, pad_token_id=0)

    def sample_ids(self, grain):
        return [f"{self.name}:{grain[0]}.{grain[1]}.{row}" for row in range(self.rows)]


# ---- what is planted where ----


def planted_ranks(num_sites, r):
    """Ranks of the changed sites: 4 r, 2 r, r in turns as long as the total stays at most S r, the uniform total.

    28 sites: 4 of each, which sum to 28 r exactly; 48 sites: 7, 7 and 6 of them, 48 r.
    """
    out, left = [], num_sites * r
    while left >= r:
        for times in PROPORTIONS:
            if times * r <= left:
                out.append(times * r)
                left -= times * r
    return sorted(out, reverse=True)


def place(costs, room, r, generator, *, tolerance=0.02):
    """[S] planted ranks, 0 where nothing is planted: `planted_ranks` dealt at random over the sites.

    Drawn again until no site gets more than three quarters of its room and the planted numbers are within `tolerance`
    of the uniform ones, so that oracle and uniform LoRA are equal in components and in numbers.

    Args:
        costs: [S] numbers of one component. room: [S] largest rank of a site.
    Raises:
        ValueError: no such deal in 10,000 draws.
    """
    ranks, uniform = planted_ranks(len(costs), r), r * sum(costs)
    for _ in range(10_000):
        order = torch.randperm(len(costs), generator=generator).tolist()
        out = [0] * len(costs)
        for site, rank in zip(order, ranks, strict=False):
            out[site] = rank
        fits = all(4 * rank <= 3 * most for rank, most in zip(out, room, strict=True))
        numbers = sum(rank * cost for rank, cost in zip(out, costs, strict=True))
        if fits and abs(numbers / uniform - 1.0) <= tolerance:
            return out
    raise ValueError(f"no deal of ranks {ranks} fits these sites within {tolerance:.0%} of {uniform} numbers; lower r")


def even_ranks(costs, numbers, generator):
    """[S] ranks that differ by at most one and cost at most `numbers`, less than the cheapest component below it.

    Which sites get one more is drawn.
    """
    r = int(numbers // sum(costs))
    left = numbers - r * sum(costs)
    out = [r] * len(costs)
    for site in torch.randperm(len(costs), generator=generator).tolist():
        if costs[site] <= left:
            out[site] += 1
            left -= costs[site]
    return out


def with_floor(planted, total):
    """The planted ranks a method can still reach that leaves every site rank 1: [S] ranks of the same total.

    The ranks missing are taken one by one from the largest site (of equals the first).
    """
    out = [max(1, rank) for rank in planted]
    while sum(out) > total:
        out[out.index(max(out))] -= 1
    return out


# ---- the teacher ----


def low_rank_change(rows, columns, rank, generator):
    """[rows, columns]: `rank` equal singular values 1, random singular vectors."""
    left, _ = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))
    return (left @ right.T).float()


def add_change(model, site, change):
    """Adds [out_features, in_features] of a site to its part of the weight: a head's rows (q, k, v) or columns (o)."""
    weight = model.get_submodule(site.module).weight.data
    rows, columns = weight.shape
    if site.out_features < rows:
        weight = weight[site.start : site.start + site.out_features]
    elif site.in_features < columns:
        weight = weight[:, site.start : site.start + site.in_features]
    weight += change


@torch.no_grad()
def log_probabilities(model, input_ids):
    """[B (T - 1), V] float32 of the positions whose next token is a target."""
    logits = model(input_ids=input_ids, use_cache=False).logits
    return F.log_softmax(logits[:, :-1].flatten(0, 1).float(), dim=-1)


def divergence_sum(teacher, logits):
    """Scalar: sum over positions of KL(teacher || student), nats. teacher: log-probabilities [n, V]; logits: [n, V]."""
    return F.kl_div(F.log_softmax(logits.float(), dim=-1), teacher, log_target=True, reduction="sum")


def plant(base, sites, planted, *, nats, input_ids, generator):
    """(teacher, [S] sizes): the base with a change of rank `planted[i]` at site i.

    Each site's change is scaled until it alone moves the outputs by KL(changed || base) = nats * rank / total rank on
    `input_ids` [B, T], so that components matter alike, wherever they are. A size is the change's singular values.

    Raises:
        ValueError: a site cannot move the outputs so far.
    """
    before = log_probabilities(base, input_ids)
    teacher, sizes = copy.deepcopy(base), []
    for site, rank in zip(sites, planted, strict=True):
        if not rank:
            sizes.append(0.0)
            continue
        change = low_rank_change(site.out_features, site.in_features, rank, generator)
        size = _size(base, site, change, before, input_ids, wanted=nats * rank / sum(planted))
        add_change(teacher, site, size * change)
        sizes.append(size)
    return teacher, sizes


def _size(base, site, change, before, input_ids, *, wanted):
    """The factor of `change` at which it alone moves the outputs by `wanted` nats a position, to 1 %."""
    changed, size = copy.deepcopy(base), 0.5
    original = base.get_submodule(site.module).weight.data
    for _ in range(50):
        changed.get_submodule(site.module).weight.data.copy_(original)
        add_change(changed, site, size * change)
        moved = float(divergence_sum(log_probabilities(changed, input_ids), before)) / len(before)
        if abs(moved / wanted - 1.0) < 0.01:
            return size
        size *= min(2.0, max(0.5, math.sqrt(wanted / moved)))
        if size > 100.0:
            break
    raise ValueError(f"{site.name}: no change of this rank moves the outputs by {wanted:.3g} nats; lower --nats")


# ---- judging an allocation ----


def auc(scores, planted):
    """Chance that a planted site has a higher score than one that is not; ties count half.

    Raises:
        ValueError: all sites are planted, or none is.
    """
    inside = [s for s, p in zip(scores, planted, strict=True) if p > 0]
    outside = [s for s, p in zip(scores, planted, strict=True) if p == 0]
    if not inside or not outside:
        raise ValueError("an AUC needs planted sites and others")
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return wins / (len(inside) * len(outside))


def covered(ranks, planted):
    """Share of the planted components for which their site has a component: sum of min(rank, planted) / sum planted."""
    return sum(min(a, b) for a, b in zip(ranks, planted, strict=True)) / sum(planted)


def interval(values, *, resamples=10_000):
    """Mean, standard deviation and the mean's 95 % percentile bootstrap interval over seeds."""
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.percentile(data[drawn].mean(axis=1), [2.5, 97.5])
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": float(data.mean()), "standard_deviation": spread, "low": float(low), "high": float(high)}
