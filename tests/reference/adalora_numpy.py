"""AdaLoRA written once more in NumPy float64 on a chain of linear layers, every gradient by hand; nothing of ardtrain.

h_l = tanh(z_l), z_l = h W^T + s ((h A^T) * E) B for each layer, no tanh after the last; the loss is half the squared
error, summed over outputs, mean over examples. Sources: arXiv 2303.10512, methods.md 4.3, 2.2 and 2.5; AdamW as in
arXiv 1711.05101, algorithm 2. Letters: N examples, I in, O out, R components.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Settings:
    """One run; T total steps, ti and tf its two phases, interval between masks, r and target ranks of each layer."""

    total: int
    ti: int
    tf: int
    interval: int
    r: int
    target: int
    rate: float
    weight_decay: float
    max_norm: float
    penalty: float
    squared: bool
    remove_at_freeze: bool
    beta: float = 0.85
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass
class Layer:
    """Frozen W [O, I], scale s, and by part ("A" [R, I], "B" [R, O], "E" [R]) value, moments and averages."""

    weight: np.ndarray
    scale: float
    value: dict
    births: np.ndarray = None
    moments: dict = field(default_factory=dict)
    averages: dict = field(default_factory=dict)

    def __post_init__(self):
        self.births = np.arange(len(self.value["E"]))
        self.moments = {p: [np.zeros_like(v), np.zeros_like(v)] for p, v in self.value.items()}
        self.averages = {p: [np.zeros_like(v), np.zeros_like(v)] for p, v in self.value.items()}

    def keep(self, rows):
        """Row selection of everything that has rows."""
        self.births = self.births[rows]
        self.value = {p: v[rows] for p, v in self.value.items()}
        self.moments = {p: [m[rows] for m in pair] for p, pair in self.moments.items()}
        self.averages = {p: [a[rows] for a in pair] for p, pair in self.averages.items()}


@dataclass
class Mask:
    """One event: its step, all scores in order of (layer, row), and the (layer, birth) pairs it masked."""

    step: int
    scores: np.ndarray
    masked: list


@dataclass
class Run:
    losses: list = field(default_factory=list)
    norms: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    zeros: list = field(default_factory=list)  # after each step: (layer, birth) pairs whose E is 0


def train(layers, batches, s):
    """batches: step -> (x [N, I], y [N, O]). Changes `layers` in place."""
    run, fixed, first = Run(), None, s.r * len(layers)
    for t in range(s.total):
        loss, gradients = loss_and_gradients(layers, *batches(t))
        for layer, own in zip(layers, gradients, strict=True):
            add_penalty(layer, own, s, count=sum(2 for other in layers if len(other.births)))
        norm = np.sqrt(sum(np.sum(g * g) for own in gradients for g in own.values()))
        shrink = s.max_norm / (norm + 1e-6) if norm > s.max_norm else 1.0
        for layer, own in zip(layers, gradients, strict=True):
            for part in own:
                own[part] = own[part] * shrink
                adamw(layer, part, own[part], t, s)
                if t < s.total - s.tf:
                    average(layer, part, own[part], s)
        run.losses.append(loss)
        run.norms.append(norm)
        if s.ti < t < s.total - s.tf and t % s.interval == 0:
            budget = int(s.target * len(layers) + (first - s.target * len(layers)) * (1 - progress(t, s)) ** 3)
            set_to_zero(layers, mask(layers, first - budget, t, run))
        elif t == s.total - s.tf:
            fixed = mask(layers, first - s.target * len(layers), t, run)
            set_to_zero(layers, fixed)
        elif t > s.total - s.tf:
            set_to_zero(layers, fixed)
        if fixed and t == (s.total - s.tf if s.remove_at_freeze else s.total - 1):
            for i, layer in enumerate(layers):
                layer.keep([k for k, b in enumerate(layer.births) if (i, b) not in fixed])
        run.zeros.append([(i, int(b)) for i, y in enumerate(layers) for b in y.births[y.value["E"] == 0.0]])
    return run


def progress(t, s):
    return (t - s.ti) / (s.total - s.ti - s.tf)


def loss_and_gradients(layers, x, y):
    """(loss, by layer: part -> gradient)."""
    inputs = [x]
    for i, layer in enumerate(layers):
        a, b, e = (layer.value[p] for p in "ABE")
        z = inputs[-1] @ layer.weight.T + layer.scale * ((inputs[-1] @ a.T) * e) @ b
        inputs.append(z if i == len(layers) - 1 else np.tanh(z))
    error = inputs[-1] - y
    dz = error / len(x)
    gradients = [None] * len(layers)
    for i in reversed(range(len(layers))):
        layer, h = layers[i], inputs[i]
        a, b, e = (layer.value[p] for p in "ABE")
        u = h @ a.T  # [N, R]
        v = layer.scale * dz @ b.T  # [N, R]
        gradients[i] = {"A": (v * e).T @ h, "B": layer.scale * (u * e).T @ dz, "E": np.sum(u * v, axis=0)}
        dh = dz @ layer.weight + (v * e) @ a
        dz = dh * (1.0 - h * h)  # h is tanh of the layer before; unused for the first
    return 0.5 * np.sum(error * error) / len(x), gradients


def add_penalty(layer, gradients, s, *, count):
    """penalty * mean over `count` matrices of ||M M^T - I||_F, or penalty * the sum of its squares."""
    for part in "AB":
        m = layer.value[part]
        if not len(m):
            continue
        residual = m @ m.T - np.eye(len(m))
        if s.squared:
            gradients[part] = gradients[part] + s.penalty * 4.0 * residual @ m
        else:
            gradients[part] = gradients[part] + s.penalty / count * 2.0 * residual @ m / np.linalg.norm(residual)


def adamw(layer, part, g, t, s):
    """In place; the rate falls linearly to 0."""
    rate, (b1, b2), moments = s.rate * (s.total - t) / s.total, s.betas, layer.moments[part]
    moments[0] = b1 * moments[0] + (1 - b1) * g
    moments[1] = b2 * moments[1] + (1 - b2) * g * g
    step = (moments[0] / (1 - b1 ** (t + 1))) / (np.sqrt(moments[1] / (1 - b2 ** (t + 1))) + s.eps)
    layer.value[part] = layer.value[part] * (1 - rate * s.weight_decay) - rate * step


def average(layer, part, g, s):
    """With the weight after the step and the clipped gradient."""
    pair, importance = layer.averages[part], np.abs(layer.value[part] * g)
    pair[0] = s.beta * pair[0] + (1 - s.beta) * importance
    pair[1] = s.beta * pair[1] + (1 - s.beta) * np.abs(importance - pair[0])


def scores_of(layer):
    """[R]."""
    entry = {part: mean * spread for part, (mean, spread) in layer.averages.items()}
    return entry["E"] + entry["A"].mean(axis=1) + entry["B"].mean(axis=1)


def mask(layers, number, t, run):
    """(layer, birth) of the `number` lowest scores, ties by layer, then row; recorded in the run."""
    scores = np.concatenate([scores_of(layer) for layer in layers])
    owners = [(i, int(b)) for i, layer in enumerate(layers) for b in layer.births]
    chosen = sorted(owners[k] for k in np.argsort(scores, kind="stable")[:number])
    run.masks.append(Mask(t, scores, chosen))
    return chosen


def set_to_zero(layers, pairs):
    for i, birth in pairs:
        layers[i].value["E"][layers[i].births == birth] = 0.0
