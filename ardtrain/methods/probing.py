"""Probes: does a site lack a component, and along which direction? methods.md 8, ours, with another statistic.

A component with B = 0 changes no output, but dL/dB is the gradient of the frozen weight seen through its row of A.
In rounds 0 .. N - 1 before an event every site has k probes whose rows of A are orthonormal and B = 0: at the first
event at random, then the directions that the event before found, so that directions too weak for one event gather
over several (subspace iteration). In rounds N .. 2 N - 1 the probes' B is an orthonormal basis U of the gradient found
before and A = 0: dL/dA = U^T G, whose right singular vectors are the directions worth learning.

methods.md 8 compares the first half's gradient with its variance entry by entry. Here the second half is judged, which
U did not see, against the difference of its even and odd rounds: that has no mean gradient in it, and its noise is the
mean's own, with all its correlations. And what components in use can learn themselves, the span of their rows of A, is
taken out first: else a site gets components because those it has are slow.

Letters: S sites, k probes of a site, I in, O out, P numbers of all probes' zero part, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ardtrain.methods.base import Binding, Probes, StateKind
from ardtrain.ranks import Site, named_seed

FLOOR = 1.25  # of noise alone one site in two would be above 1: its mean and its difference are drawn alike


def split_means(even: Tensor, odd: Tensor, num_even: int, num_odd: int) -> tuple[Tensor, Tensor]:
    """(mean, noise): the mean over all grains, and a difference of halves with the covariance of that mean's noise.

    Args:
        even, odd: sums over the grains of the even and of the odd rounds; num_even, num_odd: at least 1.
    """
    n = num_even + num_odd
    return (even + odd) / n, (even / num_even - odd / num_odd) * ((num_even * num_odd) ** 0.5 / n)


def without(rows: Tensor, existing: Tensor) -> Tensor:
    """`rows` [k, I] with their part in the span of `existing` [r, I] taken out; float64."""
    if not len(existing):
        return rows
    basis: Tensor = torch.linalg.qr(existing.double().T).Q
    return rows - (rows @ basis) @ basis.T


def directions(mean: Tensor, noise: Tensor) -> tuple[NDArray[np.float64], Tensor]:
    """(scores [k], unit rows [k, I]), best first: what the mean gradient [k, I] has beyond its noise [k, I].

    A score is the square of a singular value of `mean` beyond FLOOR times that of the largest of `noise`, in units of
    the noise's mean square entry, and 0 below. Where the curvature is about the gradients' covariance it is, up to a
    factor that all sites share, the loss that the direction can take away (a step of natural gradient), so sites
    compare whatever the size of their gradients.
    """
    _, sizes, rows = torch.linalg.svd(mean, full_matrices=False)
    unit = float(noise.square().mean())
    scores = np.zeros(len(sizes))
    if unit > 0.0:
        floor = float(torch.linalg.matrix_norm(noise, 2))
        scores = ((sizes.square() - FLOOR * floor * floor) / unit).clamp_min(0.0).numpy()
    return scores, rows


@dataclass(frozen=True)
class Candidates:
    """Newborn components to choose from, best first within a site.

    owners: [C] sites; scores: [C] float64 of `directions`; rows: site -> [k, I] float32 unit vectors in that order.
    """

    owners: NDArray[np.int64]
    scores: NDArray[np.float64]
    rows: Mapping[int, Tensor]

    def of(self, sites: NDArray[np.int64]) -> Candidates:
        """Those of some sites, ascending, which then count from 0; without their rows."""
        kept = np.isin(self.owners, sites)
        return Candidates(np.searchsorted(sites, self.owners[kept]), self.scores[kept], {})


class Prober:
    """The rounds of probes before each event, and what they saw (`base.ProbeRounds`).

    State, float64 on the host: the sums of dL/dB of the first N rounds, of dL/dA of the even and of the odd ones of the
    last N, the event they belong to with the grains of each, and the directions of the event before.
    """

    def __init__(
        self, sites: Sequence[Site], *, count: int, rounds: int, ride: bool, due: Callable[[int], bool]
    ) -> None:
        """count: k. rounds: N, of each half. ride: with the steps before an event; else passes of their own."""
        self.sites, self.count, self.rounds, self.ride, self._due = tuple(sites), count, rounds, ride, due
        self._up = _cuts(count * s.out_features for s in sites)
        self._down = _cuts(count * s.in_features for s in sites)
        self.numbers = self._up[-1], self._down[-1]
        self._made: tuple[tuple[int, int, bool], Tensor] | None = None  # rows that N rounds share
        self._binding: Binding

    def state_tensors(self) -> Mapping[str, StateKind]:
        up, down = self.numbers
        return {"probe_up": up, "probe_even": down, "probe_odd": down, "probe_found": down, "probe_counts": 4}

    def bind(self, binding: Binding) -> None:
        self._binding = binding

    def riding(self, step: int) -> tuple[int, int] | None:
        if not self.ride:
            return None
        for left in range(2 * self.rounds):
            if self._due(step + left):
                return 2 * self.rounds - 1 - left, step + left
        return None

    def separate(self, step: int) -> int:
        return 0 if self.ride or not self._due(step) else 2 * self.rounds

    def make(self, index: int, event: int, seed: int) -> Probes:
        searching = index < self.rounds
        key = (event, seed, searching)
        if self._made is None or self._made[0] != key:
            parts = self._searching(event, seed) if searching else self._bases()
            self._made = key, torch.cat([rows.flatten() for rows in parts])
        part: Literal["lora_A", "lora_B"] = "lora_B" if searching else "lora_A"
        return Probes(self.count, part, self.numbers[0 if searching else 1], self._made[1])

    def observe(self, index: int, event: int, sums: Tensor, num_grains: int) -> None:
        state, counts = self._binding.state, self._binding.state["probe_counts"]
        sums_of = ("probe_up", "probe_even", "probe_odd")
        # Round 0 begins anew: rounds of their own are all done again where a stop came between them.
        if index == 0 or int(counts[0]) != event + 1:
            for name in (*sums_of, "probe_counts"):
                state[name].zero_()
            counts[0] = event + 1
        half = 0 if index < self.rounds else 1 + index % 2
        counts[1 + half] += num_grains
        state[sums_of[half]] += sums.double().cpu()

    def candidates(self, event: int) -> Candidates | None:
        """What the rounds before this event found; None where the search or a half of what follows saw nothing."""
        state = self._binding.state
        seen, searched, num_even, num_odd = (int(n) for n in state["probe_counts"])
        if seen != event + 1 or not (searched and num_even and num_odd):
            return None
        mean, noise = split_means(state["probe_even"], state["probe_odd"], num_even, num_odd)
        owners, scores, rows = [], [], {}
        for index, (a, b) in enumerate(_pairs(self._down)):
            existing = self._binding.rows(index)["lora_A"].cpu()
            own = (without(part[a:b].view(self.count, -1), existing) for part in (mean, noise))
            found, along = directions(*own)
            owners += [index] * len(found)
            scores.append(found)
            rows[index] = along.float()
            state["probe_found"][a:b] = along.flatten()  # where the next search begins
        return Candidates(np.array(owners, np.int64), np.concatenate(scores), rows)

    def _searching(self, event: int, seed: int) -> list[Tensor]:
        """[k, I] float32 orthonormal rows of each site: the directions found last; at random before the first event."""
        found = self._binding.state["probe_found"]
        return [
            found[a:b].view(self.count, -1).float() if bool(found[a:b].any()) else self._random(site, event, seed)
            for site, (a, b) in zip(self.sites, _pairs(self._down), strict=True)
        ]

    def _random(self, site: Site, event: int, seed: int) -> Tensor:
        """[k, I] float32 orthonormal rows."""
        generator = torch.Generator().manual_seed(named_seed("probe", seed, event, site.name))
        normal = torch.randn(site.in_features, self.count, generator=generator, dtype=torch.float64)
        return orthonormal(normal.T)

    def _bases(self) -> list[Tensor]:
        """[k, O] float32 of each site: a basis of the mean gradient of the first half; random rows where it is zero."""
        seen = self._binding.state["probe_up"]
        return [orthonormal(seen[a:b].view(self.count, -1)) for a, b in _pairs(self._up)]


def orthonormal(rows: Tensor) -> Tensor:
    """[k, columns] float32: an orthonormal basis that spans what the rows [k, columns] span."""
    basis: Tensor = torch.linalg.qr(rows.double().T).Q.T
    return basis.float().contiguous()


def _cuts(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(sizes, initial=0))


def _pairs(cuts: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(cuts[:-1], cuts[1:], strict=True))
