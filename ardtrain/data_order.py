"""Which samples make up which step: order, packing, cursor.  Pure functions of (seed, epoch, token lengths).

Words: a *sample* is one tokenised document (or a piece of one), numbered from 0 in file order; of several sources those
of the first come first. A *row* is one line of the batch: one sample, or with packing several. Rows of an epoch form a
list; the epochs' lists joined and cut into global batches are the steps; a step is cut into grains. The number of
processes appears nowhere in this file.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# What a stream of random numbers is for; part of its seed, so that no two purposes share numbers.
_PURPOSE_SAMPLES = 1
_PURPOSE_ROWS = 2  # 3 is data.py's
_PURPOSE_SOURCES = 4
_PURPOSE_PASS = 5
_SAMPLES_A_BLOCK = 1 << 16
_EPOCHS_KEPT = 2  # a batch may span two epochs


@dataclass(frozen=True)
class RowRef:
    """One row of a batch: `row` counts from 0 within `epoch`; `samples` are numbers of samples, in order."""

    epoch: int
    row: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Grain:
    """One micro-batch: `index` counts from 0 within the step."""

    index: int
    rows: tuple[RowRef, ...]
    source: str = ""  # of held-out rows in several sources, which no grain mixes


@dataclass(frozen=True)
class Part:
    """A source of a weighted mixture. drawn: samples that an epoch takes of its num_samples; no fewer than these."""

    num_samples: int
    drawn: int


@dataclass(frozen=True)
class Cursor:
    """Place in the run: the next row to be trained on."""

    epoch: int
    row: int


@dataclass(frozen=True)
class RowList:
    """Rows of an epoch in compact form: row i holds `samples[starts[i] : starts[i + 1]]`; 8 to 16 bytes a sample."""

    samples: IntArray
    starts: IntArray  # [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> tuple[int, ...]:
        return tuple(self.samples[self.starts[row] : self.starts[row + 1]].tolist())


def permutation(count: int, *, seed: int, epoch: int, purpose: int, source: int = 0) -> IntArray:
    """[count] int64, the numbers 0..count-1 in an order given by (seed, epoch, purpose, source).

    Sorts raw PCG64 output instead of calling Generator.permutation: NumPy promises that the raw stream never changes
    between versions, and promises nothing about Generator's methods (NEP 19).
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose, source])).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def pack(order: Sequence[int] | IntArray, lengths: npt.NDArray[np.integer], capacity: int) -> list[tuple[int, ...]]:
    """Rows of whole samples, best fit: each sample, in `order`, goes to the fullest row that still has room for it.

    Args:
        order: sample numbers, in the order in which they are placed.
        lengths: [num_samples] tokens of each sample.
        capacity: tokens of a row.
    Returns:
        The rows in order of their first sample. Ties go to the row that reached that fill last.
    Raises:
        ValueError: a sample is longer than a row.
    """
    rows = _packed(np.asarray(order, dtype=np.int64), lengths, capacity)
    return [rows[i] for i in range(len(rows))]


def _packed(order: IntArray, lengths: npt.NDArray[np.integer], capacity: int) -> RowList:
    """`pack` in compact form; about 40 bytes a sample at its peak.

    Cost: about 1 us a sample. `open_rows` is a bit set of the free space for which a row exists, so that finding the
    fullest fitting row is one shift of a `capacity`-bit number.
    """
    row_of = np.empty(len(order), dtype=np.int64)
    by_free: dict[int, list[int]] = {}
    open_rows = num_rows = 0
    for begin in range(0, len(order), _SAMPLES_A_BLOCK):  # numbers as Python's own take 36 bytes each
        block = order[begin : begin + _SAMPLES_A_BLOCK]
        rows: list[int] = []
        for sample, length in zip(block.tolist(), np.asarray(lengths)[block].tolist(), strict=True):
            if length > capacity:
                raise ValueError(f"sample {sample} has {length} tokens, a packed row holds {capacity}")
            fitting = open_rows >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                row = by_free[free].pop()
                if not by_free[free]:
                    open_rows ^= 1 << free
            else:
                free, row = capacity, num_rows
                num_rows += 1
            rows.append(row)
            free -= length
            if free:
                by_free.setdefault(free, []).append(row)
                open_rows |= 1 << free
        row_of[begin : begin + len(rows)] = rows
    return _rows_in_order(order, row_of, num_rows)


def _rows_in_order(samples: IntArray, row_of: IntArray, num_rows: int) -> RowList:
    """Samples by the number of their row, those of a row in the order in which they stand."""
    starts = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=starts[1:])
    return RowList(samples[np.argsort(row_of, kind="stable")], starts)


def drawn_samples(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Samples that an epoch of a weighted mixture draws of each source, in proportion to the weights.

    The epoch is the shortest in which none draws fewer than its source holds: one source is gone through exactly once,
    the others as often or more often. Weights are exact decimals (0.1 is a tenth); shares are off by half a sample.

    Args:
        sizes: samples of each source, above 0. weights: above 0.
    """
    shares = [Fraction(repr(weight)) for weight in weights]
    unit = max(size / share for size, share in zip(sizes, shares, strict=True))
    return [floor(unit * share + Fraction(1, 2)) for share in shares]


def mixed_order(parts: Sequence[Part], *, seed: int, epoch: int) -> IntArray:
    """The samples of one epoch of a mixture, in training order: sum(drawn) numbers, the parts' one after the other.

    Which source comes when is a shuffle of its own. What a source gives is the next part of an endless list, one pass
    over its samples after the other, each in another order: how often two samples of a source have come differs by one
    at most (packing changes the order within an epoch).
    """
    owner = np.repeat(np.arange(len(parts)), [part.drawn for part in parts])
    owner = owner[permutation(len(owner), seed=seed, epoch=epoch, purpose=_PURPOSE_SOURCES)]
    order = np.empty(len(owner), dtype=np.int64)
    first = 0
    for source, part in enumerate(parts):
        order[owner == source] = first + _next_of(part, source, seed=seed, epoch=epoch)
        first += part.num_samples
    return order


def _next_of(part: Part, source: int, *, seed: int, epoch: int) -> IntArray:
    """[drawn] what this epoch takes of the list of the source's passes: places epoch * drawn and on."""
    start = epoch * part.drawn
    passes = range(start // part.num_samples, -(-(start + part.drawn) // part.num_samples))
    listed = [permutation(part.num_samples, seed=seed, epoch=n, purpose=_PURPOSE_PASS, source=source) for n in passes]
    return np.concatenate(listed)[start - passes.start * part.num_samples :][: part.drawn]


def epoch_rows(
    lengths: npt.NDArray[np.integer], *, seed: int, epoch: int, capacity: int | None, parts: Sequence[Part] = ()
) -> RowList:
    """The rows of one epoch in training order; every sample occurs exactly once, of a mixture as `mixed_order` says.

    `capacity` is the tokens of a packed row, None for one sample a row. Packed rows are shuffled once more, as
    otherwise the badly filled ones would all come last.
    """
    if parts:
        order = mixed_order(parts, seed=seed, epoch=epoch)
    else:
        order = permutation(len(lengths), seed=seed, epoch=epoch, purpose=_PURPOSE_SAMPLES)
    if capacity is None:
        return RowList(order, np.arange(len(order) + 1))
    rows = _packed(order, lengths, capacity)
    place = np.empty(len(rows), dtype=np.int64)  # of each row in the shuffled list
    place[permutation(len(rows), seed=seed, epoch=epoch, purpose=_PURPOSE_ROWS)] = np.arange(len(rows))
    return _rows_in_order(rows.samples, np.repeat(place, np.diff(rows.starts)), len(rows))


def total_rows(num_rows: Callable[[int], int], num_train_epochs: float) -> int:
    """Rows in `num_train_epochs` epochs, `num_rows(epoch)` in each; fractions are exact decimals (0.1 is a tenth)."""
    epochs = Fraction(repr(num_train_epochs))
    if epochs <= 0:
        raise ValueError(f"num_train_epochs={num_train_epochs} must be above 0")
    whole = floor(epochs)
    rows = sum(num_rows(epoch) for epoch in range(whole))
    return rows + (ceil((epochs - whole) * num_rows(whole)) if epochs > whole else 0)


def total_steps(
    num_rows: Callable[[int], int],
    *,
    global_batch_size: int,
    num_train_epochs: float | None = None,
    max_steps: int | None = None,
) -> int:
    """Steps of the run: `max_steps`, or ceil(rows of all epochs / global_batch_size).

    Raises:
        ValueError: neither is given, or the one that counts is not above 0.
    """
    if max_steps is not None:
        if max_steps <= 0:
            raise ValueError(f"max_steps={max_steps} must be above 0; leave it out to use num_train_epochs")
        return max_steps
    if num_train_epochs is None:
        raise ValueError("max_steps and num_train_epochs are both unset; set one of them")
    return -(-total_rows(num_rows, num_train_epochs) // global_batch_size)


class TrainOrder:
    """The run's steps, each found without walking the ones before it.

    Args:
        lengths: [num_samples] tokens of each sample, at least one sample.
        capacity: tokens of a packed row; None: one sample a row.
        global_batch_size, grain_size: rows of a step and of a grain.
        parts: of a weighted mixture, whose samples `lengths` holds one part after the other.
    Raises:
        ValueError: grain_size does not divide global_batch_size, no sample, or no length of the run.
    Attributes:
        num_steps: T.
        num_grains: G, grains of a full step.

    Without packing all epochs have the same number of rows. With packing the number depends on the epoch's shuffle:
    it is counted once an epoch, from epoch 0 on, and kept (about 1 us a sample and epoch).
    """

    num_steps: int
    num_grains: int

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        *,
        seed: int,
        capacity: int | None,
        global_batch_size: int,
        grain_size: int,
        num_train_epochs: float | None = None,
        max_steps: int | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        if grain_size <= 0 or global_batch_size <= 0 or global_batch_size % grain_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a whole multiple of per_device_train_batch_size="
                f"{grain_size}; change one of them"
            )
        if len(lengths) == 0:
            raise ValueError("the training data have no sample; nothing to train on")
        assert not parts or sum(part.num_samples for part in parts) == len(lengths)
        self._lengths = lengths
        self._parts = tuple(parts)
        self._seed = seed
        self._capacity = capacity
        self._global_batch_size = global_batch_size
        self._grain_size = grain_size
        self._epochs: OrderedDict[int, RowList] = OrderedDict()
        self._ends: list[int] = []  # rows up to and with each epoch counted so far
        self.num_grains = global_batch_size // grain_size
        self.num_steps = total_steps(
            self.num_rows, global_batch_size=global_batch_size, num_train_epochs=num_train_epochs, max_steps=max_steps
        )
        self._total_rows = self.num_steps * global_batch_size
        if max_steps is None and num_train_epochs is not None:
            self._total_rows = total_rows(self.num_rows, num_train_epochs)

    def num_rows(self, epoch: int) -> int:
        """Rows of `epoch`."""
        while len(self._ends) <= epoch:
            one_each = sum(part.drawn for part in self._parts) or len(self._lengths)
            count = one_each if self._capacity is None else len(self._rows(len(self._ends)))
            self._ends.append(count + (self._ends[-1] if self._ends else 0))
        return self._ends[epoch] - (self._ends[epoch - 1] if epoch else 0)

    def cursor(self, step: int) -> Cursor:
        """Epoch and row at which `step` begins; for `step == num_steps` the place after the last row."""
        if not 0 <= step <= self.num_steps:
            raise ValueError(f"step {step} is outside the run of {self.num_steps} steps")
        return self._locate(min(step * self._global_batch_size, self._total_rows))

    def rows_of_step(self, step: int) -> list[RowRef]:
        """The rows of `step` (from 0): global_batch_size of them, fewer only in the run's last step.

        Raises:
            ValueError: the run has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is outside the run of {self.num_steps} steps")
        first = step * self._global_batch_size
        place = self._locate(first)
        epoch, row = place.epoch, place.row
        rows: list[RowRef] = []
        for _ in range(first, min(first + self._global_batch_size, self._total_rows)):
            if row == self.num_rows(epoch):
                epoch, row = epoch + 1, 0
            rows.append(RowRef(epoch, row, self._rows(epoch)[row]))
            row += 1
        return rows

    def grains(self, step: int) -> list[Grain]:
        """The rows of `step` cut into grains; only the run's last grain may be smaller, its last step have fewer."""
        return cut_grains(self.rows_of_step(step), self._grain_size)

    def samples_before(self, step: int) -> Iterator[IntArray]:
        """The samples of all steps before `step`, an epoch's at a time."""
        place = self.cursor(step)
        for epoch in range(place.epoch + 1):
            rows = self._rows(epoch)
            yield rows.samples[: rows.starts[place.row]] if epoch == place.epoch else rows.samples

    def _locate(self, position: int) -> Cursor:
        while not self._ends or self._ends[-1] <= position:
            self.num_rows(len(self._ends))
        epoch = bisect.bisect_right(self._ends, position)
        return Cursor(epoch, position - (self._ends[epoch - 1] if epoch else 0))

    def _rows(self, epoch: int) -> RowList:
        if epoch not in self._epochs:
            self._epochs[epoch] = epoch_rows(
                self._lengths, seed=self._seed, epoch=epoch, capacity=self._capacity, parts=self._parts
            )
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]


def cut_grains(rows: Sequence[RowRef], grain_size: int, *, first: int = 0) -> list[Grain]:
    """Consecutive `grain_size` rows each; the last grain may be smaller. first: number of the first grain."""
    starts = range(0, len(rows), grain_size)
    return [Grain(first + index, tuple(rows[start : start + grain_size])) for index, start in enumerate(starts)]
