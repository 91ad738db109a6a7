"""How much of a ZeRO-3 base is whole on a process at once: DeepSpeed's fetch, prefetch and release, played through.

Follows runtime/zero/partitioned_param_coordinator.py and partition_parameters.py of DeepSpeed 0.19.8, whose names the
settings have: weights are gathered ahead up to `prefetch_bucket_size` numbers while fewer than `max_live_parameters`
are whole, and one that is used again within `max_reuse_distance` numbers stays whole. A gather of several weights holds
them twice, in one buffer and cut out of it, until the last of them is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ardtrain.planning.shapes import Unit


@dataclass(frozen=True)
class GatherSettings:
    """ZeRO-3's settings of zero_optimization, in numbers; the values are DeepSpeed's defaults."""

    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    param_persistence_threshold: int = 100_000


@dataclass(frozen=True)
class Gathered:
    """Bytes that are whole at most: up to the loss; in the backward; with the last unit, whose product the loss is of.

    passes: how often a weight is gathered a grain.
    """

    forward_bytes: int
    backward_bytes: int
    passes: float
    loss_bytes: int


def play(
    units: Sequence[Unit],
    settings: GatherSettings,
    *,
    recompute: bool,
    copies: bool = True,
    forward_first: bool = False,
) -> Gathered:
    """One grain after the first, which records the order.

    Args:
        units: in the order of the forward. recompute: a layer of several units runs again before its backward
            (checkpointing), and gathers again.
        copies: several processes gather into one buffer first.
        forward_first: the first pass that DeepSpeed saw was a forward alone. It answers what to release after a module
            once for all (an lru_cache by module and step), so no weight ever stays for its backward.
    """
    order = list(units)
    groups = [list(group) for _, group in groupby(units, key=lambda u: u.layer if u.layer >= 0 else id(u))]
    for group in reversed(groups):
        back = [unit for unit in reversed(group) if unit.runs_back]
        if recompute and back and group[0].layer >= 0:
            order += group
        order += back
    return _Player(units, order, settings, copies).run(len(units), forward_first=forward_first)


class _Player:
    def __init__(self, units: Sequence[Unit], order: Sequence[Unit], settings: GatherSettings, copies: bool) -> None:
        self.order, self.settings, self.copies = order, settings, copies
        self.sizes = {i: (n, b) for u in units for i, n, b in u.parameters}
        self.persistent = {i for i, (n, _) in self.sizes.items() if n <= settings.param_persistence_threshold}
        self.whole: set[int] = set()
        self.in_flight: dict[int, tuple[int, int]] = {}  # parameter -> (number, bytes) of its buffer
        self.waiting: dict[int, int] = {}  # buffer -> parameters not yet taken
        self.doubled: dict[int, int] = {}  # buffer -> bytes that are there twice until its last parameter is taken
        self.live_bytes = self.live_numbers = self.gathered_bytes = self.buffers = 0

    def run(self, turn: int, *, forward_first: bool) -> Gathered:
        forward = backward = loss = 0
        queue = deque((step, i) for step, unit in enumerate(self.order) for i, _, _ in unit.parameters)
        fetched_for: dict[int, int] = {}
        self._prefetch(queue, fetched_for)  # by the modules that hold the first one
        for step, unit in enumerate(self.order):
            own = [i for i, _, _ in unit.parameters if i not in self.persistent]
            self._gather([i for i in own if i not in self.whole and i not in self.in_flight])
            peak = self._take(own)
            while queue and queue[0][0] <= step:
                queue.popleft()
            self._prefetch(queue, fetched_for)
            peak = max(peak, self.live_bytes)
            if step < turn:
                forward = max(forward, peak)
                loss = peak
            else:
                backward = max(backward, peak)
            known = turn if forward_first and step < turn else len(self.order)
            self._release(step, own, fetched_for, known)
        total = sum(b for i, (_, b) in self.sizes.items() if i not in self.persistent)
        return Gathered(forward, backward, self.gathered_bytes / total if total else 0.0, loss)

    def _prefetch(self, queue: deque[tuple[int, int]], fetched_for: dict[int, int]) -> None:
        """Gathers what comes next of `queue`, (step of its use, parameter); writes for which step each was."""
        room = min(self.settings.max_live_parameters - self.live_numbers, self.settings.prefetch_bucket_size)
        ahead: list[int] = []
        numbers = 0
        while queue and numbers < room:
            used, i = queue.popleft()
            fetched_for[i] = max(fetched_for.get(i, -1), used)
            if i not in self.whole and i not in self.in_flight and i not in self.persistent and i not in ahead:
                ahead.append(i)
                numbers += self.sizes[i][0]
        self._gather(ahead)

    def _gather(self, parameters: list[int]) -> None:
        if not parameters:
            return
        self.buffers += 1
        size = sum(self.sizes[i][1] for i in parameters)
        self.waiting[self.buffers] = len(parameters)
        for i in parameters:
            self.in_flight[i] = (self.buffers, size if len(parameters) > 1 and self.copies else 0)
            self.live_numbers += self.sizes[i][0]
        self.gathered_bytes += size
        self.live_bytes += size

    def _take(self, parameters: list[int]) -> int:
        """Waits for these; returns the most bytes that are live meanwhile."""
        peak = self.live_bytes
        for i in parameters:
            if i not in self.in_flight:
                continue
            buffer, size = self.in_flight[i]
            if size:  # the first wait cuts all of the buffer's parameters out of it
                mates = [j for j, (b, _) in self.in_flight.items() if b == buffer]
                self.live_bytes += size
                for j in mates:
                    self.in_flight[j] = (buffer, 0)
                self.doubled[buffer] = size
            peak = max(peak, self.live_bytes)
            del self.in_flight[i]
            self.whole.add(i)
            self.waiting[buffer] -= 1
            if not self.waiting[buffer]:
                self.live_bytes -= self.doubled.pop(buffer, 0)
        return peak

    def _release(self, step: int, parameters: list[int], fetched_for: dict[int, int], known: int) -> None:
        """known: up to which step uses are looked for."""
        keep = {i for i in parameters if step < fetched_for.get(i, -1) < known}
        distance = 0
        for unit in self.order[step + 1 : known]:
            if distance >= self.settings.max_reuse_distance or len(keep) == len(parameters):
                break
            for i, n, _ in unit.parameters:
                if i in parameters:
                    keep.add(i)
                distance += n
        for i in parameters:
            if i not in keep:
                self.whole.discard(i)
                self.live_bytes -= self.sizes[i][1]
                self.live_numbers -= self.sizes[i][0]
