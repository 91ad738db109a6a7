"""Probes: does a new component of a site have something to learn, and in which direction? methods.md 8, ours.

A component with B = 0 changes no output, but dL/dB is the gradient of the frozen weight seen through its row of A.
In rounds 0 .. N - 1 before an event every site has k probes with random orthonormal rows of A: over the grains, `t2`
sets the mean of that gradient against its own noise. In rounds N .. 2 N - 1 the probes' B is an orthonormal basis U of
the mean found before and A = 0: dL/dA = U^T G, whose right singular vectors are the directions worth learning.

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

from ardtrain.methods.base import Binding, Probes, ProbeSums, StateKind
from ardtrain.ranks import Site, named_seed

T2_MOST = 50.0  # of one entry: where the few grains' variance happens to be small


def signal(first: Tensor, second: Tensor, num_grains: int) -> Tensor:
    """[P] float64: min(50, mean^2 / (variance / n)) of each entry over n grains; about 1 where there is none.

    (n - 1) / (n - 3) on average for normal noise. 0 for an entry that never had a gradient, and below two grains.

    Args:
        first, second: [P] float64, sums over the grains of g and g^2.
    """
    if num_grains < 2:
        return torch.zeros_like(first)
    mean = first / num_grains
    variance = ((second - num_grains * mean.square()) / (num_grains - 1)).clamp_min(0.0)
    ratio = torch.where(mean == 0.0, torch.zeros_like(mean), mean.square() * num_grains / variance)
    return ratio.clamp_max(T2_MOST)


@dataclass(frozen=True)
class Candidates:
    """Newborn components to choose from, best first within a site.

    owners: [C] sites; scores: [C] float64, t2 of the site times the direction's share; rows: site -> [k, I] float32
    unit vectors in that order; t2: [S].
    """

    owners: NDArray[np.int64]
    scores: NDArray[np.float64]
    rows: Mapping[int, Tensor]
    t2: NDArray[np.float64]

    def of(self, sites: NDArray[np.int64]) -> Candidates:
        """Those of some sites, ascending, which then count from 0; without their rows."""
        kept = np.isin(self.owners, sites)
        return Candidates(np.searchsorted(sites, self.owners[kept]), self.scores[kept], {}, self.t2[sites])


class Prober:
    """The rounds of probes before each event, and what they saw (`base.ProbeRounds`).

    State, float64 on the host: the sums of g and g^2 of the first N rounds, of dL/dA of the last N, and the event they
    belong to with the grains of each half.
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
        return {"probe_first": up, "probe_second": up, "probe_down": down, "probe_counts": 3}

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
            parts = [self._random(site, event, seed) for site in self.sites] if searching else self._bases(event)
            self._made = key, torch.cat([rows.flatten() for rows in parts])
        part: Literal["lora_A", "lora_B"] = "lora_B" if searching else "lora_A"
        return Probes(self.count, part, self.numbers[0 if searching else 1], self._made[1])

    def observe(self, index: int, event: int, sums: ProbeSums) -> None:
        state, searching = self._binding.state, index < self.rounds
        # Round 0 begins anew: rounds of their own are all done again where a stop came between them.
        if index == 0 or int(state["probe_counts"][0]) != event + 1:
            for name in self.state_tensors():
                state[name].zero_()
            state["probe_counts"][0] = event + 1
        state["probe_counts"][1 if searching else 2] += sums.num_grains
        if searching:
            state["probe_first"] += sums.first.double().cpu()
            state["probe_second"] += sums.second.double().cpu()
        else:
            state["probe_down"] += sums.first.double().cpu()

    def candidates(self, event: int) -> Candidates | None:
        """What the rounds before this event found; None where a half of them saw nothing."""
        state = self._binding.state
        seen, searched, followed = (int(n) for n in state["probe_counts"])
        if seen != event + 1 or searched < 2 or followed < 1:
            return None
        by_entry = signal(state["probe_first"], state["probe_second"], searched)
        t2 = np.array([float(by_entry[a:b].mean()) for a, b in _pairs(self._up)])
        owners, scores, rows = [], [], {}
        for index, (a, b) in enumerate(_pairs(self._down)):
            _, sizes, directions = torch.linalg.svd(state["probe_down"][a:b].view(self.count, -1), full_matrices=False)
            total = float(sizes.square().sum())
            if total == 0.0:
                continue
            rows[index] = directions.float()
            owners += [index] * len(sizes)
            scores.append(t2[index] * (sizes.square() / total).numpy())
        joined = np.concatenate(scores) if scores else np.zeros(0)
        return Candidates(np.array(owners, np.int64), joined, rows, t2)

    def _random(self, site: Site, event: int, seed: int) -> Tensor:
        """[k, I] float32 orthonormal rows."""
        generator = torch.Generator().manual_seed(named_seed("probe", seed, event, site.name))
        normal = torch.randn(site.in_features, self.count, generator=generator, dtype=torch.float64)
        return orthonormal(normal.T)

    def _bases(self, event: int) -> list[Tensor]:
        """[k, O] float32 of each site: a basis of the mean gradient of the first half; random rows where it is zero."""
        first = self._binding.state["probe_first"]
        return [orthonormal(first[a:b].view(self.count, -1)) for a, b in _pairs(self._up)]


def orthonormal(rows: Tensor) -> Tensor:
    """[k, columns] float32: an orthonormal basis that spans what the rows [k, columns] span."""
    basis: Tensor = torch.linalg.qr(rows.double().T).Q.T
    return basis.float().contiguous()


def _cuts(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(sizes, initial=0))


def _pairs(cuts: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(cuts[:-1], cuts[1:], strict=True))
