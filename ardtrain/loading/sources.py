"""Where the numbers of one parameter come from: a TensorSource.

`Pieces` covers whatever is a matter of order alone: a stored tensor as it is, tensors merged into one or cut out of
one. Then each number is read once and by nobody else. `Converted` covers the rest: transformers' own operations on
whole tensors, of which a slice is kept.
"""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ardtrain.loading.shards import Stored

MOST_RUNS = 1 << 20  # of one parameter; more are not worth their bookkeeping


class TensorSource(Protocol):
    """The numbers of a final parameter, readable by flat slices. Many threads may read at once."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, begin: int, numel: int) -> Tensor:
        """[numel] of dtype on the CPU, the caller's own: the slice from `begin` on, row-major in the final shape.

        Raises:
            ValueError: a file cannot be read or ends early.
        """
        ...


@dataclass(frozen=True)
class Run:
    """`numel` numbers of a stored tensor in a row, from `first` on."""

    stored: Stored
    first: int
    numel: int


class Pieces:
    """Runs of stored tensors in a row, cast to the dtype."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, runs: Sequence[Run]) -> None:
        self.shape, self.dtype, self.runs = tuple(shape), dtype, list(runs)
        self._starts = [0, *itertools.accumulate(run.numel for run in self.runs)]
        assert self._starts[-1] == math.prod(self.shape), "runs cover the shape"

    @classmethod
    def of(cls, stored: Stored, dtype: torch.dtype) -> Pieces:
        """A stored tensor as it is."""
        return cls(stored.shape, dtype, [Run(stored, 0, stored.numel)])

    def read(self, begin: int, numel: int) -> Tensor:
        out = torch.empty(numel, dtype=self.dtype)
        at = 0
        for run in self.slice(begin, numel):
            part = out[at : at + run.numel]
            if run.stored.dtype == self.dtype:
                run.stored.read_into(part, run.first)
            else:
                raw = torch.empty(run.numel, dtype=run.stored.dtype)
                run.stored.read_into(raw, run.first)
                part.copy_(raw)
            at += run.numel
        assert at == numel, "the slice lies inside the tensor"
        return out

    def slice(self, begin: int, numel: int) -> list[Run]:
        """The runs, and parts of runs, that make up a flat slice."""
        out, end = [], begin + numel
        number = bisect.bisect_right(self._starts, begin) - 1
        while begin < end:
            run, start = self.runs[number], self._starts[number]
            count = min(end, self._starts[number + 1]) - begin
            if count:
                out.append(Run(run.stored, run.first + begin - start, count))
            begin, number = begin + count, number + 1
        return out


class Unread:
    """A tensor of which only the order of its numbers is known; torch's stack, cat, chunk, split act on it.

    transformers' merging and splitting operations run on these, so that their result is again runs of stored tensors.
    Whatever else an operation asks for fails with a TypeError or AttributeError; then `Converted` is the way.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.shape = pieces, torch.Size(pieces.shape)
        self.dtype, self.ndim = pieces.dtype, len(pieces.shape)

    def contiguous(self) -> Unread:
        return self

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def squeeze(self, dim: int) -> Unread:
        assert self.shape[dim] == 1
        return Unread(Pieces([*self.shape[:dim], *self.shape[dim:][1:]], self.dtype, self.pieces.runs))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known: dict[Any, Any] = {torch.stack: _stack, torch.cat: _cat, torch.chunk: _chunk, torch.split: _split}
        return known[function](*args, **(kwargs or {})) if function in known else NotImplemented


def _cat(tensors: Sequence[Unread], dim: int = 0) -> Unread:
    first = tensors[0]
    dim = dim % first.ndim
    if any(t.shape[:dim] != first.shape[:dim] or t.shape[dim + 1 :] != first.shape[dim + 1 :] for t in tensors):
        raise TypeError("shapes differ")
    outer = math.prod(first.shape[:dim])
    inner = [math.prod(t.shape[dim:]) for t in tensors]
    if outer * len(tensors) > MOST_RUNS:
        raise TypeError("too many runs")
    runs = [run for o in range(outer) for t, n in zip(tensors, inner, strict=True) for run in t.pieces.slice(o * n, n)]
    shape = [*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]]
    return Unread(Pieces(shape, first.dtype, runs))


def _stack(tensors: Sequence[Unread], dim: int = 0) -> Unread:
    if dim != 0:
        raise TypeError("only along the first dimension")
    rows = [Unread(Pieces((1, *t.shape), t.dtype, t.pieces.runs)) for t in tensors]
    return _cat(rows)


def _split(tensor: Unread, sizes: int | Sequence[int], dim: int = 0) -> tuple[Unread, ...]:
    dim = dim % tensor.ndim
    whole = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - begin) for begin in range(0, whole, sizes)]
    outer, inner = math.prod(tensor.shape[:dim]), math.prod(tensor.shape[dim + 1 :])
    if outer * len(sizes) > MOST_RUNS or sum(sizes) != whole:
        raise TypeError("too many runs, or sizes that do not add up")
    out, before = [], 0
    for size in sizes:
        starts = ((o * whole + before) * inner for o in range(outer))
        runs = [run for start in starts for run in tensor.pieces.slice(start, size * inner)]
        out.append(Unread(Pieces([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]], tensor.dtype, runs)))
        before += size
    return tuple(out)


def _chunk(tensor: Unread, chunks: int, dim: int = 0) -> tuple[Unread, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


class Conversion:
    """One use of transformers' operations on whole tensors; keeps the last result while its parameters are read."""

    def __init__(self, convert: Callable[[], dict[str, Tensor]], latest: Latest) -> None:
        self._convert, self._latest = convert, latest

    def read(self, name: str, begin: int, numel: int) -> Tensor:
        with self._latest.lock:  # one at a time: whole tensors are in memory
            if self._latest.owner is not self:
                self._latest.drop()
                self._latest.owner, self._latest.tensors = self, self._convert()
            return self._latest.tensors[name].reshape(-1)[begin : begin + numel].clone()


class Latest:
    """The result of one conversion, shared by all of a checkpoint so that no two are held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: Conversion | None = None
        self.tensors: dict[str, Tensor] = {}

    def drop(self) -> None:
        self.owner, self.tensors = None, {}


@dataclass(frozen=True)
class Converted:
    """One parameter out of a conversion: every process reads the whole of what it is made from, a module at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    conversion: Conversion

    def read(self, begin: int, numel: int) -> Tensor:
        return self.conversion.read(self.name, begin, numel)


@dataclass(frozen=True)
class Given:
    """Numbers that are in memory already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, begin: int, numel: int) -> Tensor:
        return self.tensor.detach().reshape(-1)[begin : begin + numel].cpu().clone()
