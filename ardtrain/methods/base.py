"""What a method is to the loop: it looks at numbers and returns a plan. It never communicates.

A method is tested on one process with numbers from a file. The loop owns gradients, reductions, resizing and the
method's state tensors: it allocates them, repacks them at a resize (newborn: 0), deals per-entry ones over the
processes by whole components, saves and loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from ardtrain.ranks import Dense, RankPlan, RankTable, Site

StateKind = Literal["per_entry", "per_component", "per_site"] | int
"""per_entry [n] float32, this process's shard of an arena-long array; per_component [R], per_site [S] float64.

A number n: [n] float64 that no resize changes. It and per_site arrays stay on the host.
"""


SecondMoment = Literal["survivors", "zero"]
"""survivors: the mean of its site's, so steps are as theirs; zero: first steps are 3.16 learning rates an entry."""


@dataclass(frozen=True)
class Needs:
    """Read once before the run.

    ranks: the method moves ranks; ablation: it plans from ablation scores on held-out rows (ALoRA); held_out_gates:
    some steps' dL/dgate come from held-out rows (ARD-LoRA's alternation). newborn_second_moment: what Adam knows of a
    new component's gradients.
    """

    ranks: bool = False
    ablation: bool = False
    held_out_gates: bool = False
    newborn_second_moment: SecondMoment = "survivors"

    @property
    def held_out(self) -> bool:
        """Does the allocator look at held-out rows?"""
        return self.ablation or self.held_out_gates


class ShardView(Protocol):
    """This process's components (arena.Shard): start and stop of their range, and how to cut a flat tensor."""

    start: int
    stop: int
    size: int

    def take(self, flat: Tensor) -> Tensor: ...

    def rows(self, local: Tensor) -> Iterator[tuple[str, slice, Tensor]]: ...


def _no_rows(index: int) -> Mapping[str, Tensor]:
    return {}


@dataclass
class Binding:
    """What the loop hands a method after each build (start, resize, resume).

    age: [R] int64, optimizer steps since each component's birth, the same on every process; kept by the loop.
    state: name -> tensor as declared by `state_tensors`, written in place by the method. whole: all components, cut
    like a shard. rows: index of a site -> part -> [r, columns], its components' weights as they are when asked.
    """

    table: RankTable
    shard: ShardView
    age: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    whole: ShardView | None = None
    rows: Callable[[int], Mapping[str, Tensor]] = _no_rows


@dataclass(frozen=True)
class Statistics:
    """Numbers of one step, alike on every process.

    gradient: [N] float32 of the global mean loss; clipped if `score_at` is after_step (as published), else before
    clipping. weights: [N] float32, after the optimizer step, or before it. gates: dL/dgate as `gates` orders them,
    exact, never clipped, or None.
    """

    gradient: Tensor
    weights: Tensor
    gates: Tensor | None = None


@dataclass(frozen=True)
class Probes:
    """Components that go through a forward and are never updated; one part is zero, so no output changes.

    count: k, of each site. part: the zero part, whose gradient is wanted, lora_A or lora_B; size: P, its numbers.
    fixed: the other part's rows, float32 on the host. Both flat, site by site in table order, k rows each.
    """

    count: int
    part: Literal["lora_A", "lora_B"]
    size: int
    fixed: Tensor


class ProbeRounds(Protocol):
    """Probes of a method: rounds 0, 1, ... before each of its events, each over the grains of one step.

    numbers: of all probes' B, and of their A.
    """

    numbers: tuple[int, int]

    def riding(self, step: int) -> tuple[int, int] | None:
        """(round, step of its event) that goes with this step's own forward and backward, or None."""
        ...

    def separate(self, step: int) -> int:
        """Rounds of their own before the plan after this step; their grains are those of the last steps."""
        ...

    def make(self, index: int, event: int, seed: int) -> Probes:
        """A round's probes, a function of the run's seed, the event's step and what was seen."""
        ...

    def observe(self, index: int, event: int, sums: Tensor, num_grains: int) -> None:
        """sums: [P] float32, the exact sum over a round's grains of the gradient of each grain's loss sum."""
        ...


class Method(Protocol):
    """An allocator. Steps count from 0; `total_steps` is given to the constructor."""

    needs: Needs
    probes: ProbeRounds | None

    def entries(self, site: Site) -> Mapping[str, int]:
        """Part -> numbers in one component's row, in the order of the arena."""
        ...

    def init(
        self, site: Site, existing: Mapping[str, Tensor], count: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """First weights of `count` components [count, columns] by part; `existing` holds the site's survivors.

        The contribution of the new components must be exactly zero.
        """
        ...

    def state_tensors(self) -> Mapping[str, StateKind]:
        """Names and kinds of the tensors the loop keeps for the method."""
        ...

    def bind(self, binding: Binding) -> None: ...

    def dense(self, sites: Sequence[Site]) -> tuple[Dense, ...]:
        """Trained tensors beside the components, such as DoRA's magnitudes."""
        ...

    def gates(self, step: int) -> Tensor | None:
        """Gates of this step's forward, float32 on the host, or None for none.

        In table order, one a component; where heads share a component, one for each of its heads, heads last.
        """
        ...

    def wants_held_out_gates(self, step: int) -> bool:
        """Shall this step's dL/dgate be that of a held-out minibatch?"""
        ...

    def extra_loss(self, views: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
        """A scalar added once a step, a function of the weights alone, alike on every process; None for none."""
        ...

    def observe(self, step: int, statistics: Statistics) -> None: ...

    def after_step(self, step: int) -> None:
        """Moves the method's own parameters (ARD's alphas)."""
        ...

    def due(self, step: int) -> bool:
        """Is `plan` to be asked after this step?"""
        ...

    def adapt_end(self) -> int:
        """Steps done from which on ranks stay."""
        ...

    def local_scores(self, step: int) -> Tensor | None:
        """[R] float64: scores of this shard's components, zero elsewhere; the loop adds them over the processes."""
        ...

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        """The decision after this step; pure in its numbers, the same on every process."""
        ...


class FixedRank:
    """The protocol with nothing to decide; methods replace what they need (composition of defaults, no state)."""

    needs = Needs()
    probes: ProbeRounds | None = None
    binding: Binding

    def state_tensors(self) -> Mapping[str, StateKind]:
        return {}

    def bind(self, binding: Binding) -> None:
        self.binding = binding

    def dense(self, sites: Sequence[Site]) -> tuple[Dense, ...]:
        return ()

    def gates(self, step: int) -> Tensor | None:
        return None

    def wants_held_out_gates(self, step: int) -> bool:
        return False

    def extra_loss(self, views: Mapping[str, Mapping[str, Tensor]]) -> Tensor | None:
        return None

    def observe(self, step: int, statistics: Statistics) -> None:
        return None

    def after_step(self, step: int) -> None:
        return None

    def due(self, step: int) -> bool:
        return False

    def adapt_end(self) -> int:
        return 0

    def local_scores(self, step: int) -> Tensor | None:
        return None

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        return None
