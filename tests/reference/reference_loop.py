"""LoRA and ElaLoRA written once more, plainly: one process, ordinary float32 sums, everything edited in place.

Independent of ardtrain but for two things that must agree for newborn vectors to agree: the names of their generators
(`ranks.named_seed`) and the rule they are drawn by (a method's `init`). Sources: methods.md 2 and 5.
Letters: I in, O out, R components.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.lora import Lora
from ardtrain.ranks import Site, named_seed


@dataclass(frozen=True)
class Settings:
    """One run; the names are those of the config."""

    seed: int
    total_steps: int
    learning_rate: float
    warmup_steps: int
    max_grad_norm: float
    r: int
    lora_alpha: float
    b: int = 0
    k: int = 0
    init_warmup: int = 0
    final_warmup: int = 0
    mask_interval: int = 0
    beta1: float = 0.85
    beta2: float = 0.85
    reg_orth_coef: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class LoraLinear(nn.Module):
    """`W x + s (x A^T) diag(E) B`; A [R, I], B [R, O], E [R, 1] or None."""

    def __init__(self, linear, name, scale):
        super().__init__()
        self.weight, self.name, self.scale = linear.weight, name, scale
        self.values = {}  # part -> parameter
        self.moments = {}  # part -> (exp_avg, exp_avg_sq)
        self.averages = {}  # part -> [mean, spread], float64 NumPy
        self.age = []

    def forward(self, x):
        hidden = x @ self.values["lora_A"].T
        if "diagonal" in self.values:
            hidden = hidden * self.values["diagonal"].T
        return x @ self.weight.T + self.scale * (hidden @ self.values["lora_B"])

    @property
    def rank(self):
        return len(self.age)

    def set_rows(self, rows):
        """Takes [R, columns] rows by part as parameters of its own."""
        for part, values in rows.items():
            self.values[part] = values.clone().requires_grad_()

    def site(self):
        return Site(self.name, self.name, self.weight.shape[1], self.weight.shape[0], scaling=self.scale)


@dataclass
class Event:
    """One reallocation: component scores before it, what was decided, and how near the decision was."""

    step: int
    scores: np.ndarray
    ranks: list[int]
    births: list[list[int]]
    margin: float


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    layers: list[LoraLinear] = field(default_factory=list)


def train(model, data, settings, *, method):
    """Trains adapters on every linear of `model` but the output; `method` is drawn from for newborn vectors only."""
    layers = [_replace(model, name, settings) for name in _linears(model)]
    births = []
    for layer in layers:
        generator = torch.Generator().manual_seed(named_seed(settings.seed, -1, layer.name))
        nothing = {part: torch.zeros(0, columns) for part, columns in method.entries(layer.site()).items()}
        layer.set_rows(method.init(layer.site(), nothing, settings.r, generator))
        layer.moments = {p: [torch.zeros_like(v), torch.zeros_like(v)] for p, v in layer.values.items()}
        layer.averages = {p: [np.zeros(v.shape), np.zeros(v.shape)] for p, v in layer.values.items()}
        layer.age = [0] * settings.r
        births.append(list(range(settings.r)))
    run, next_birth = Run(layers=layers), [settings.r] * len(layers)
    for step in range(settings.total_steps):
        loss, gradients = _gradients(model, data, step, layers)
        if settings.reg_orth_coef:
            _add_penalty(layers, gradients, settings.reg_orth_coef)
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        if norm > settings.max_grad_norm:
            gradients = {key: g * (settings.max_grad_norm / (norm + 1e-6)) for key, g in gradients.items()}
        rate = _rate(step, settings)
        _adam(layers, gradients, rate, step + 1, settings)
        for layer in layers:
            layer.age = [a + 1 for a in layer.age]
        run.losses.append(loss)
        run.rates.append(rate)
        run.norms.append(norm)
        if isinstance(method, Lora):
            continue
        if step < settings.total_steps - settings.final_warmup:
            _average(layers, gradients, settings)
        amount = _amount(step, settings)
        if amount:
            scores = [_scores(layer) for layer in layers]
            pruned, grown, margin = _decide(layers, scores, amount, settings)
            for index, layer in enumerate(layers):
                keep = [p for p in range(layer.rank) if (index, p) not in pruned]
                count = grown.count(index)
                _resize(layer, keep, count, method, settings.seed, step)
                births[index] = [births[index][p] for p in keep]
                births[index] += range(next_birth[index], next_birth[index] + count)
                next_birth[index] += count
            ranks = [layer.rank for layer in layers]
            run.events.append(Event(step, np.concatenate(scores), ranks, [list(b) for b in births], margin))
    return run


def _linears(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def _replace(model, name, settings):
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    layer = LoraLinear(getattr(owner, child), name, settings.lora_alpha / settings.r)
    setattr(owner, child, layer)
    return layer


def _gradients(model, data, step, layers):
    """(mean loss over target tokens, (layer, part) -> gradient of it), grains one after the other."""
    total, tokens = 0.0, 0
    leaves = {(i, part): value for i, layer in enumerate(layers) for part, value in layer.values.items()}
    sums = {key: torch.zeros_like(value) for key, value in leaves.items()}
    for grain in data.grains(step):
        batch = data.collate(grain)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        logs = torch.log_softmax(logits[:, :-1], dim=-1)
        labels = batch.labels[:, 1:]
        counted = labels != -100
        loss = -logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][counted].sum()
        for key, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            sums[key] += gradient
        total += float(loss.detach())
        tokens += int(counted.sum())
    return total / tokens, {key: g / tokens for key, g in sums.items()}


def _add_penalty(layers, gradients, coefficient):
    """coefficient * mean over all A and B of ||M M^T - I||_F; its gradient is 2 (M M^T - I) M / norm."""
    count = 2 * len(layers)
    for i, layer in enumerate(layers):
        for part in ("lora_A", "lora_B"):
            rows = layer.values[part].detach()
            residual = rows @ rows.T - torch.eye(len(rows))
            gradients[i, part] += (coefficient / count) * 2.0 * (residual @ rows) / residual.norm()


def _rate(step, s):
    if step < s.warmup_steps:
        return s.learning_rate * step / s.warmup_steps
    return s.learning_rate * (s.total_steps - step) / (s.total_steps - s.warmup_steps)


def _adam(layers, gradients, rate, t, s):
    """Adam (arXiv 1412.6980, algorithm 1), in place; the step counter is shared by old and new components."""
    beta1, beta2 = s.betas
    for (i, part), g in gradients.items():
        m, v = layers[i].moments[part]
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        corrected = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + s.eps)
        layers[i].values[part].data -= rate * corrected


def _average(layers, gradients, s):
    """I = |w g| with the clipped gradient and the weight after the step."""
    for (i, part), g in gradients.items():
        importance = np.abs((layers[i].values[part].detach() * g).double().numpy())
        averages = layers[i].averages[part]
        averages[0] = s.beta1 * averages[0] + (1 - s.beta1) * importance
        averages[1] = s.beta2 * averages[1] + (1 - s.beta2) * np.abs(importance - averages[0])


def _scores(layer):
    return sum((mean * spread).mean(axis=1) for mean, spread in layer.averages.values())


def _amount(step, s):
    """b(t) at event steps, else 0."""
    end = s.total_steps - s.final_warmup
    if step <= s.init_warmup or step >= end or (step - s.init_warmup) % s.mask_interval:
        return 0
    return round(s.b * (1 - ((step - s.init_warmup) / (end - s.init_warmup)) ** 3))


def _decide(layers, scores, amount, s):
    """(pruned (layer, position) set, grown layers, margin).

    margin: the least change of a score that could change the decision: the gap at the prune cut, at the grow cut, and
    inside a layer between the last component pruned and the first one kept.
    """
    pool = []
    for i, layer in enumerate(layers):
        free = sorted((scores[i][p], p) for p in range(layer.rank) if layer.age[p] > s.mask_interval)
        pool += [(score, i, p) for score, p in free[: min(s.k, layer.rank - 1)]]
    pool.sort()
    pruned = {(i, p) for _, i, p in pool[:amount]}
    gaps = [pool[amount][0] - pool[amount - 1][0]] if len(pool) > amount else []
    for i, layer in enumerate(layers):
        free = [(scores[i][p], p) for p in range(layer.rank) if layer.age[p] > s.mask_interval]
        gone = [x for x, p in free if (i, p) in pruned]
        kept = [x for x, p in free if (i, p) not in pruned]
        if gone and kept:
            gaps.append(min(kept) - max(gone))
    lost = [i for i, _ in pruned]
    room = [min(layer.weight.shape) - layer.rank + lost.count(i) for i, layer in enumerate(layers)]
    grown, refused = [], None
    for score, i, _ in sorted(pool, reverse=True):
        if len(grown) == len(pruned):
            refused = score
            break
        if room[i] > 0:
            grown.append(i)
            room[i] -= 1
            last = score
    if refused is not None:
        gaps.append(last - refused)
    return pruned, grown, float(min(gaps))


def _resize(layer, keep, count, method, seed, step):
    """Index selection of everything, then newborn rows: E = 0, first moment 0, second the survivors' mean, age 0."""
    if keep == list(range(layer.rank)) and not count:
        return
    rows = {part: value.detach()[keep] for part, value in layer.values.items()}
    born = {part: value[:0] for part, value in rows.items()}
    if count:
        generator = torch.Generator().manual_seed(named_seed(seed, step, layer.name))
        born = method.init(layer.site(), rows, count, generator)
    for part in rows:
        first, second = layer.moments[part]
        padding = torch.zeros(count, first.shape[1])
        mean = second[keep].double().mean(dim=0, keepdim=True).float().expand(count, -1)
        layer.moments[part] = [torch.cat([first[keep], padding]), torch.cat([second[keep], mean])]
        zeros = np.zeros((count, first.shape[1]))
        layer.averages[part] = [np.concatenate([a[keep], zeros]) for a in layer.averages[part]]
    layer.set_rows({part: torch.cat([rows[part], born[part]]) for part in rows})
    layer.age = [layer.age[p] for p in keep] + [0] * count


__all__ = ["ElaLora", "Event", "Lora", "LoraLinear", "Run", "Settings", "train"]
