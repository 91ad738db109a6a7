"""ALoRA (Liu et al., arXiv 2403.16187): prune the components whose ablation hurts least, grow the sites that lost none.

Plain LoRA whose components carry gates in {0, 1} that are never trained (section 3.1 of the paper). The scores come
from the loop (`ardtrain.ablation`, AB-LoRA); this file decides. Rules: methods.md 3.3 (the paper's Algorithm 1), and
3.6 where the paper is silent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ardtrain.methods.base import Needs
from ardtrain.methods.lora import Lora
from ardtrain.methods.towers import allocate_by
from ardtrain.ranks import Integers, RankPlan, RankTable, prune_and_grow


@dataclass(frozen=True)
class AloraSettings:
    """The method's block of the config and the run's length; k1, k2, total_steps in optimizer steps.

    k1: before the first round; k2: between rounds; rounds: at most so many (the paper's N_A); n_a: components moved in
    one round, None: the number of matrix types in a block; prune_only_harmful: spare components that are no worse than
    empty ones (ours); revive: may a site of rank 0 grow again? per_tower: each tower keeps its total, with its own n_a.
    """

    total_steps: int
    k1: int
    k2: int
    rounds: int
    n_a: int | None = None
    prune_only_harmful: bool = False
    revive: bool = False
    per_tower: bool = False


class Alora(Lora):
    """LoRA's parts and first weights, also for the newborn: B = 0, so growing leaves the output as it was.

    What is pruned leaves at once: the algorithm never switches a gate back on. No state between rounds.
    """

    needs = Needs(ranks=True, ablation=True)

    def __init__(self, settings: AloraSettings) -> None:
        self.settings = settings

    def due(self, step: int) -> bool:
        """After `k1` steps and every `k2` steps from there, `rounds` times, while a step is left to train newborns."""
        s = self.settings
        since = step + 1 - s.k1
        return since >= 0 and since % s.k2 == 0 and since // s.k2 < s.rounds and step + 1 < s.total_steps

    def adapt_end(self) -> int:
        s = self.settings
        return min(s.total_steps, s.k1 + s.k2 * (s.rounds - 1) + 1)

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        """The round after this step.

        Args:
            scores: [R] float64, CS(r) - CS0: importance beside an empty component's; below 0 is harmful.
        """
        assert scores is not None
        s, values = self.settings, scores.numpy()

        def round_of(table: RankTable, own: Integers) -> RankPlan | None:
            return allocate(
                table,
                values[own],
                n_a=num_matrix_types(table) if s.n_a is None else s.n_a,
                prune_only_harmful=s.prune_only_harmful,
                revive=s.revive,
                keep_total=s.per_tower,
            )

        return allocate_by(self.binding.table, round_of, per_tower=s.per_tower)


def num_matrix_types(table: RankTable) -> int:
    """Kinds of matrices in a block (q_proj, k_proj, ...): the default n_A (the paper's N_mod, methods.md 3.6)."""
    return len({site.module.rpartition(".")[2] for site in table.sites})


def allocate(
    table: RankTable,
    scores: Sequence[float] | NDArray[np.float64],
    *,
    n_a: int,
    prune_only_harmful: bool = False,
    revive: bool = False,
    keep_total: bool = False,
) -> RankPlan | None:
    """One round: the n_a lowest scores leave, and as many join the sites that lost none; None: nothing leaves.

    Pruned by (score, site, position), stable. Joined one by one in turns over the sites that lost none, those of the
    higher average score first (equal: in site order), so the counts differ by at most one (section 3.3 of the paper:
    8 over three sites: 3, 3, 2). A site at its largest rank is passed over. Where no site can take a component the
    total falls; it never rises.

    Args:
        scores: [R] in table order, relative to an empty component's.
        revive: sites of rank 0 may grow; they have no score and count as empty components, 0.
        keep_total: prune no more than the other sites can take (ours, for towers with a budget each).
    """
    values = np.asarray(scores, np.float64)
    order = np.argsort(values, kind="stable")  # equal scores in the order of (site, position)
    pruned = order[:n_a]
    if prune_only_harmful:
        pruned = pruned[values[pruned] < 0.0]
    grown = _grown(table, values, pruned, revive=revive)
    while keep_total and len(grown) < len(pruned):
        pruned = pruned[:-1]
        grown = _grown(table, values, pruned, revive=revive)
    if not len(pruned):
        return None
    num_harmful = int((values[pruned] < 0.0).sum())
    numbers = {"highest_pruned": float(values[pruned[-1]]), "num_pruned_harmful": float(num_harmful)}
    if len(order) > len(pruned):
        numbers["lowest_kept"] = float(values[order[len(pruned)]])
    return prune_and_grow(
        table,
        zip(table.owners[pruned].tolist(), table.places[pruned].tolist(), strict=True),
        grown,
        reason=f"alora: pruned {len(pruned)} ({num_harmful} worse than empty), grew {len(grown)}",
        scores=numbers,
    )


def _grown(table: RankTable, scores: NDArray[np.float64], pruned: Integers, *, revive: bool) -> list[int]:
    """Sites that gain a component each time they are named, at most as many as are pruned."""
    may_grow = np.ones(len(table.sites), bool) if revive else table.rank_array > 0
    may_grow[table.owners[pruned]] = False
    takers = np.flatnonzero(may_grow)
    averages = np.array(_averages(table, scores.tolist(), takers.tolist()))
    takers = takers[np.argsort(-averages, kind="stable")]
    return list(islice(_in_turns(takers, table.sites.max_ranks - table.rank_array), len(pruned)))


def _averages(table: RankTable, scores: Sequence[float], sites: Sequence[int]) -> list[float]:
    """Mean score of each site's components; 0, an empty component's, for a site without any."""
    offsets = table.offsets
    return [math.fsum(scores[offsets[i] : offsets[i + 1]]) / max(1, table.ranks[i]) for i in sites]


def _in_turns(takers: Integers, room: Integers) -> Iterator[int]:
    """The takers in turns until all are full."""
    turn = 0
    while len(takers := takers[room[takers] > turn]):
        yield from takers.tolist()
        turn += 1
