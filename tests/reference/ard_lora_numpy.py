"""ARD-LoRA written once more in NumPy float64 on a chain of linear layers, every gradient by hand; nothing of ardtrain.

h_l = tanh(z_l), z_l = h W^T + s sum_i m_i B_i (A_i h) with each head's part in its rows or columns, no tanh after the
last; the loss is half the squared error, summed over outputs, mean over examples. Sources: methods.md 1.3 (H1 to H14)
and 1.4, the controller's damping as ard_lora.py argues it; AdamW as in arXiv 1711.05101, algorithm 2.
Letters: N examples, I in, O out, R components, H heads that share a site's components, U units (heads or matrices).
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Settings:
    """One run. Events (a look at the capacities) come every `every` steps from `warm`; alphas move every `alpha_every`.

    share: for each unit the alphas whose mean it takes. target: of all ranks, or None. mask: ramp, hard or sigmoid.
    chains: alphas that are neighbours; then the variation is taken along them instead of over time.
    """

    total: int
    warm: int
    final: int
    every: int
    alpha_every: int
    share: list
    target: float | None
    rate: float
    max_norm: float
    rate_alpha: float
    beta: float
    squared: bool
    first_price: float
    most_price: float
    rate_price: float
    rms: bool
    mask: str = "ramp"
    width: float = 1.0
    taus: tuple = (1.0, 0.1)
    chains: tuple = ()
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.01

    @property
    def last(self):
        """The last step with alphas."""
        return self.total - self.final - 1


@dataclass
class Site:
    """Owner of components: a [R, I] and b [R, O] of layer `layer`, in columns `reads` and rows `writes` of its W.

    side: of the heads, "out" or "in"; heads: how many share the components (1: the site is one unit).
    """

    name: str
    layer: int
    a: np.ndarray
    b: np.ndarray
    reads: slice
    writes: slice
    side: str
    heads: int
    r_max: int
    units: list = field(default_factory=list)
    outside: int = 0
    births: list = None
    moments: list = None

    def __post_init__(self):
        self.r0 = len(self.a)
        self.births = list(range(self.r0))
        self.next_birth = self.r0
        self.moments = [[np.zeros_like(v), np.zeros_like(v)] for v in (self.a, self.b)]

    def effective(self, gates):
        """a and b with the gates [R, H] in the side that belongs to the heads (in b where there is one unit)."""
        if self.heads == 1:
            return self.a, self.b * gates
        if self.side == "out":
            return self.a, self.b * np.repeat(gates, self.b.shape[1] // self.heads, axis=1)
        return self.a * np.repeat(gates, self.a.shape[1] // self.heads, axis=1), self.b

    def gradients(self, gates, da, db):
        """(dL/da, dL/db, dL/dgate [R, H]) from those of the effective a and b."""
        by_head = (len(self.a), self.heads, -1)
        if self.heads == 1:
            return da, db * gates, (self.b * db).sum(axis=1, keepdims=True)
        if self.side == "out":
            open_ = np.repeat(gates, self.b.shape[1] // self.heads, axis=1)
            return da, db * open_, (self.b * db).reshape(by_head).sum(axis=2)
        open_ = np.repeat(gates, self.a.shape[1] // self.heads, axis=1)
        return da * open_, db, (self.a * da).reshape(by_head).sum(axis=2)


@dataclass
class Record:
    """One step's numbers after it: loss before it, alphas, price, ranks r0 alpha of the units, components of sites."""

    loss: float
    alphas: np.ndarray
    price: float
    ranks: np.ndarray
    gates: np.ndarray
    components: list
    births: list
    event: str
    a: list
    b: list


def train(weights, sites, batches, newborn, scale, s):
    """[Record] of a whole run; sites are changed in place.

    batches: step -> (x [N, I], y [N, O]). newborn: (site name, step, count) -> rows of a.
    """
    units = []
    for site in sites:
        site.units = list(range(len(units), len(units) + site.heads))
        units += [site] * site.heads
    r0 = np.array([float(u.r0) for u in units])
    r_max = np.array([float(u.r_max) for u in units])
    share = np.zeros((len(units), 1 + max(max(own) for own in s.share)))
    for unit, own in enumerate(s.share):
        share[unit, own] = 1 / len(own)
    alphas, price, frozen = np.ones(share.shape[1]), s.first_price, False
    summed, seen, square, updates = np.zeros_like(alphas), 0, 0.0, 0
    final = None
    records = []
    for t in range(s.total):
        ranks = r0 * (share @ alphas)
        gates = [_gates(site, ranks, t, frozen, final, s) for site in sites]
        shown = np.concatenate([np.float32(g).ravel() for g in gates])
        loss, grads = _backward(weights, sites, [np.float64(np.float32(g)) for g in gates], *batches(t), scale)
        _adam(sites, grads, t + 1, s)
        if s.warm <= t <= s.last:
            for site, (*_, by_gate) in zip(sites, grads, strict=True):
                for h, unit in enumerate(site.units):
                    slope = _slopes(ranks[unit], len(site.a), t, s)
                    summed += r0[unit] * float(slope @ by_gate[:, h]) * share[unit]
            seen += 1
            if seen == s.alpha_every:
                gradient, summed, seen = summed / seen, np.zeros_like(alphas), 0
                if s.rms:
                    updates += 1
                    square = 0.9 * square + 0.1 * float((gradient**2).mean())
                    gradient = gradient / (math.sqrt(square / (1 - 0.9**updates)) + 1e-30)
                before = _over(ranks, r_max, s)
                alphas = _moved(alphas, gradient, price, s)
                alphas = _clipped(alphas, sites, share, r0, r_max)
                ranks = r0 * (share @ alphas)
                if s.target is not None:
                    over = _over(ranks, r_max, s)
                    speed = s.rate_alpha * (1.0 if s.squared or s.chains else 1 - s.beta) * r0.sum() / s.target
                    damping = min(2 * math.sqrt(s.rate_price / speed), 1 / speed)
                    price = min(max(price + s.rate_price * over + damping * (over - before), 0.0), s.most_price)
        event = ""
        if t == s.last:
            usable = np.clip(ranks, 1, r_max)
            final = _projected(usable, r_max, s.target) if s.target else [math.ceil(r - 1e-9) for r in usable]
            _freeze(sites, [_soft(site, ranks, t, s) for site in sites], final, newborn, t)
            frozen, event = True, "freeze"
        elif s.warm <= t < s.last and (t - s.warm) % s.every == 0:
            event = _capacities(sites, ranks, newborn, t, s)
        records.append(
            Record(
                loss,
                alphas.copy(),
                price,
                ranks.copy(),
                shown,
                [len(site.a) for site in sites],
                [list(site.births) for site in sites],
                event,
                [site.a.copy() for site in sites],
                [site.b.copy() for site in sites],
            )
        )
    return records


# ---- gates ----


def _ramp(rank, count, s):
    return np.clip((rank - np.arange(count) - 0.5) / s.width + 0.5, 0, 1)


def _tau(t, s):
    done = min(1.0, max(0.0, (t - s.warm) / (s.total - s.final - s.warm)))
    return s.taus[0] * (s.taus[1] / s.taus[0]) ** done


def _mask(rank, count, t, s):
    if s.mask == "hard":
        out = (np.arange(count) < math.floor(rank + 0.5)).astype(float)
    elif s.mask == "sigmoid":
        out = 1 / (1 + np.exp(-(rank - np.arange(count) - 0.5) / _tau(t, s)))
    else:
        out = _ramp(rank, count, s)
    out[0] = 1.0
    return out


def _slopes(rank, count, t, s):
    if s.mask == "sigmoid":
        soft = 1 / (1 + np.exp(-(rank - np.arange(count) - 0.5) / _tau(t, s)))
        out = soft * (1 - soft) / _tau(t, s)
    else:
        position = (rank - np.arange(count) - 0.5) / s.width + 0.5
        out = ((position >= 0) & (position <= 1)) / s.width
    out[0] = 0.0
    return out


def _soft(site, ranks, t, s):
    return np.stack([_mask(ranks[u], len(site.a), t, s) for u in site.units], axis=1)


def _gates(site, ranks, t, frozen, final, s):
    """[R, H] of the forward: 1 before the adapt phase and after the freeze, but a head keeps its own rank."""
    if frozen:
        return np.stack([(np.arange(len(site.a)) < final[u]).astype(float) for u in site.units], axis=1)
    if t < s.warm:
        return np.ones((len(site.a), site.heads))
    return _soft(site, ranks, t, s)


# ---- gradients and steps ----


def _backward(weights, sites, gates, x, y, scale):
    """Loss and for each site (dL/da, dL/db, dL/dgate)."""
    count, h, kept = len(x), x, []
    parts = [site.effective(g) for site, g in zip(sites, gates, strict=True)]
    for layer, weight in enumerate(weights):
        z = h @ weight.T
        for site, (a, b) in zip(sites, parts, strict=True):
            if site.layer == layer:
                z[:, site.writes] += scale * (h[:, site.reads] @ a.T) @ b
        kept.append(h)
        h = z if layer == len(weights) - 1 else np.tanh(z)
    loss = 0.5 * float(((h - y) ** 2).sum()) / count
    dz, grads = (h - y) / count, [None] * len(sites)
    for layer in reversed(range(len(weights))):
        inputs = kept[layer]
        dh = dz @ weights[layer]
        for i, (site, (a, b)) in enumerate(zip(sites, parts, strict=True)):
            if site.layer != layer:
                continue
            own, read = dz[:, site.writes], inputs[:, site.reads]
            hidden = own @ b.T
            da, db = scale * hidden.T @ read, scale * (read @ a.T).T @ own
            dh[:, site.reads] += scale * hidden @ a
            grads[i] = site.gradients(gates[i], da, db)
        dz = dh * (1 - inputs**2)  # inputs of layer l are tanh of layer l - 1
    return loss, grads


def _adam(sites, grads, step, s):
    norm = math.sqrt(sum(float((g**2).sum()) for da, db, _ in grads for g in (da, db)))
    factor = s.max_norm / (norm + 1e-6) if norm > s.max_norm else 1.0
    for site, (da, db, _) in zip(sites, grads, strict=True):
        for value, gradient, (m, v) in zip((site.a, site.b), (da, db), site.moments, strict=True):
            gradient = gradient * factor
            value *= 1 - s.rate * s.decay
            m[:] = s.betas[0] * m + (1 - s.betas[0]) * gradient
            v[:] = s.betas[1] * v + (1 - s.betas[1]) * gradient**2
            value -= s.rate * (m / (1 - s.betas[0] ** step)) / (np.sqrt(v / (1 - s.betas[1] ** step)) + s.eps)


def _moved(alphas, gradient, price, s):
    if not s.chains:
        return alphas + _proximal(gradient, price, s)
    out = alphas - s.rate_alpha * (gradient + price)
    for chain in s.chains:
        out[chain] = smoothed(out[chain], s.rate_alpha * price * s.beta)
    return out


def smoothed(values, weight):
    """The least of |x - values|^2 / 2 + weight sum |x_i - x_(i-1)|: the best of all ways to cut the chain into pieces
    of one value and to order neighbouring pieces."""
    best, least = values, math.inf
    for cuts in itertools.product((-1, 0, 1), repeat=len(values) - 1):  # 0: no cut; 1: the next piece lies higher
        edges = [0, *(i + 1 for i, c in enumerate(cuts) if c), len(values)]
        signs = [0, *(c for c in cuts if c), 0]
        x = np.concatenate(
            [
                np.full(end - start, values[start:end].mean() + weight * (signs[k + 1] - signs[k]) / (end - start))
                for k, (start, end) in enumerate(itertools.pairwise(edges))
            ]
        )
        value = 0.5 * float(((x - values) ** 2).sum()) + weight * float(np.abs(np.diff(x)).sum())
        if value < least:
            best, least = x, value
    return best


def _proximal(gradient, price, s):
    wanted = -s.rate_alpha * (gradient + price)
    if s.squared:
        return wanted / (1 + s.rate_alpha * price * s.beta)
    return np.sign(wanted) * np.maximum(np.abs(wanted) - s.rate_alpha * price * s.beta, 0)


def _clipped(alphas, sites, share, r0, r_max):
    """Each alpha between rank 1 of its widest unit and full capacity of the one with most room (H8)."""
    room = np.array([min(m, len(site.a)) for site in sites for m in [site.r_max] for _ in range(site.heads)])
    out = alphas.copy()
    for k in range(len(alphas)):
        own = share[:, k] > 0
        out[k] = min(max(alphas[k], (1 / r0[own]).min()), (room[own] / r0[own]).max())
    return out


def _over(ranks, r_max, s):
    return 0.0 if s.target is None else float(np.clip(ranks, 1, r_max).sum()) / s.target - 1


# ---- events ----

CAPACITIES = sorted({m << k for m in range(4, 9) for k in range(6)} | {1, 2, 3})


def _capacities(sites, ranks, newborn, t, s):
    happened = ""
    for site in sites:
        rank, gates = len(site.a), _soft(site, ranks, t, s)
        least = 1e-3 if s.mask == "sigmoid" else 0.0
        used = int((gates > least).any(axis=1).sum())
        need = max(min(max(math.ceil(ranks[u] - 1e-9) + 1, used), site.r_max) for u in site.units)
        wanted = min(site.r_max, min(c for c in CAPACITIES if c >= need))
        site.outside = site.outside + 1 if wanted != rank else 0
        if wanted == rank or (site.outside < 2 and t != s.warm):
            continue
        site.outside, happened = 0, "capacity"
        order = list(range(rank))
        if site.heads == 1:
            order = _sort(site, gates[:, 0])
        _take(site, order[:wanted], max(0, wanted - rank), newborn, t)
    return happened


def _sort(site, gates):
    """Open components by what they give, largest first; b changes so that the function stays (H10). The new order."""
    half = [i for i in range(len(gates)) if 0 < gates[i] < 1]
    if len(half) > 1 or (half and gates[half[0]] < 0.25):
        return list(range(len(gates)))
    gives = np.linalg.norm(site.a, axis=1) * np.linalg.norm(site.b, axis=1) * gates
    active = [i for i in range(len(gates)) if gates[i] > 0]
    order = sorted(active, key=lambda i: (-gives[i], i)) + [i for i in range(len(gates)) if gates[i] == 0]
    if half and order[half[0]] != half[0]:
        site.b[half[0]] *= gates[half[0]]
        site.b[order[half[0]]] *= 1 / gates[half[0]]
    return order


def _take(site, keep, born, newborn, t):
    """Row selection of values and moments, then newborn rows: b 0, first moment 0, second the survivors' mean."""
    site.births = [site.births[i] for i in keep] + list(range(site.next_birth, site.next_birth + born))
    site.next_birth += born
    rows = newborn(site.name, t, born) if born else np.zeros((0, site.a.shape[1]))
    site.a = np.concatenate([site.a[keep], rows])
    site.b = np.concatenate([site.b[keep], np.zeros((born, site.b.shape[1]))])
    for pair in site.moments:
        m, v = pair[0][keep], pair[1][keep]
        pair[0] = np.concatenate([m, np.zeros((born, m.shape[1]))])
        pair[1] = np.concatenate([v, np.repeat(v.mean(axis=0, keepdims=True), born, axis=0)])


def _freeze(sites, gates, final, newborn, t):
    for site, own in zip(sites, gates, strict=True):
        site.a, site.b = (part.copy() for part in site.effective(own))
        wanted = max(final[u] for u in site.units)
        _take(site, list(range(min(wanted, len(site.a)))), max(0, wanted - len(site.a)), newborn, t)


def _projected(ranks, r_max, target):
    """Whole ranks by the largest common shift that the budget allows, then one each by the largest fraction (H7)."""
    jumps = sorted({n - r for r in ranks for n in range(1, int(max(r_max)) + 1)} | {-max(ranks)})
    shift = [-max(ranks)]
    for jump in jumps:
        if np.clip(np.floor(ranks + jump + 1e-12), 1, r_max).sum() <= target + 1e-9:
            shift.append(jump)
    chosen = np.clip(np.floor(ranks + shift[-1] + 1e-12), 1, r_max)
    for i in sorted(range(len(ranks)), key=lambda i: (-(ranks[i] + shift[-1] - chosen[i]), i)):
        if chosen.sum() + 1 <= target + 1e-9 and chosen[i] < r_max[i]:
            chosen[i] += 1
    return [int(c) for c in chosen]
