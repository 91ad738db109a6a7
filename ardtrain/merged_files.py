"""A base's weight files written anew with other numbers in some of their tensors, and everything else as it is.

A new file has the old one's header, names and places. Which stored numbers a parameter of the model is made of is the
loader's mapping (loading/mapping.py), followed backwards: runs of a stored tensor are stretches of the parameter. A
parameter that is computed from stored tensors (transposed, decoded) cannot be followed and is refused.

Letters: O out, I in, R components.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ardtrain import export
from ardtrain.config import ConfigError
from ardtrain.loading import TensorSource
from ardtrain.loading.shards import DTYPES, Shard, Stored, read_header
from ardtrain.loading.sources import Pieces
from ardtrain.opening import Opened
from ardtrain.token_rows import PART as TOKEN_ROWS
from ardtrain.trained import Trained

BLOCK_NUMBERS = 4 << 20  # of one parameter that are merged at a time: 16 MiB in float32
COPY_BYTES = 8 << 20
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---- new numbers of one parameter ----


class Change(Protocol):
    """What becomes of a parameter seen as [O, I] ([O, 1] for a vector)."""

    def rows(self, begin: int, old: Tensor) -> Tensor:
        """[n, I] float32: rows from `begin` on, of the old ones [n, I] float32."""
        ...


@dataclass(frozen=True)
class LowRank:
    """W + scale B^T A; with a magnitude [O], DoRA's magnitude times that, each row divided by its norm."""

    a: Tensor  # [R, I]
    b: Tensor  # [R, O]
    scale: float
    magnitude: Tensor | None = None

    def rows(self, begin: int, old: Tensor) -> Tensor:
        own = self.b[:, begin : begin + len(old)].t() * self.scale
        new = torch.addmm(old, own, self.a)
        if self.magnitude is None:
            return new
        norm = new.double().norm(dim=1, keepdim=True).clamp_min(1e-10).float()
        return new * (self.magnitude[begin : begin + len(old), None] / norm)


@dataclass(frozen=True)
class Whole:
    """Other values [O, I] in the place of all."""

    values: Tensor

    def rows(self, begin: int, old: Tensor) -> Tensor:
        return self.values[begin : begin + len(old)]


@dataclass(frozen=True)
class Rows:
    """Other values [n, I] in the place of some rows; ids: theirs, ascending."""

    ids: tuple[int, ...]
    values: Tensor

    def rows(self, begin: int, old: Tensor) -> Tensor:
        new = old.clone()
        for place, number in enumerate(self.ids):
            if begin <= number < begin + len(old):
                new[number - begin] = self.values[place]
        return new


class Changes:
    """Parameter name -> how it changes. A pair is made when it is asked for, and the last one alone is kept."""

    def __init__(self, trained: Trained) -> None:
        layout, master = trained.layout, trained.master
        self._pairs = export.Pairs(master, layout, heads=trained.shape.heads, gates=trained.gates)
        self._modules = {f"{module}.weight": module for module in export.module_ranks(layout)}
        self._magnitudes: dict[str, Tensor] = {}
        self._whole: dict[str, Change] = {}
        self._last: tuple[str, Change] | None = None
        for entry, block in zip(layout.dense, layout.all_blocks[len(layout.blocks) :], strict=True):
            values = block.of(master)
            if block.part == "magnitude":
                self._magnitudes[block.module] = values.reshape(-1)
            elif block.part == TOKEN_ROWS:
                self._whole[f"{block.module}.weight"] = Rows(trained.shape.tokens, values)
            else:
                own = values.view(entry.own_shape)
                self._whole[f"{block.module}.{block.part}"] = Whole(own.reshape(len(own), -1))

    @property
    def names(self) -> list[str]:
        """Of all parameters that change."""
        return [*self._modules, *self._whole]

    def __getitem__(self, name: str) -> Change:
        if name in self._whole:
            return self._whole[name]
        if self._last is None or self._last[0] != name:
            module = self._modules[name]
            a, b = self._pairs.pair(module)
            scale = 1.0 if self._pairs.scale is None else self._pairs.scale
            self._last = name, LowRank(a, b, scale, self._magnitudes.get(module))
        return self._last[1]

    def whole(self, name: str) -> Tensor | None:
        """The values of a parameter that is replaced; None for one that is changed."""
        change = self._whole.get(name)
        return change.values if isinstance(change, Whole) else None


# ---- from parameters back to stored tensors ----


@dataclass(frozen=True)
class Stretch:
    """`numel` numbers of a stored tensor from `first` on are those of a parameter from `begin` on."""

    first: int
    numel: int
    name: str
    begin: int


@dataclass
class Plan:
    """What to do with the base's files.

    stretches: stored name -> its changed parts in order. sources: of the changed parameters, in float32. added: new
    tensors for the last file. replaced: stored names whose tensor has another shape now.
    """

    stretches: dict[str, list[Stretch]] = field(default_factory=dict)
    sources: dict[str, Pieces] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)


def make_plan(opened: Opened, changes: Changes) -> Plan:
    """Where each changed parameter lies in the files.

    Raises:
        ConfigError: one is computed from what is stored, or stored in a type that holds no real numbers.
    """
    assert opened.weights is not None and opened.shards is not None
    plan, tensors = Plan(), opened.shards.tensors
    kind = next((s.dtype for s in tensors.values() if s.dtype in FLOATS and len(s.shape) > 1), torch.float32)
    for name in changes.names:
        source = opened.weights.sources.get(name)
        values = changes.whole(name)
        if source is None:
            assert values is not None, "only a head may be missing from the files"
            where = plan.replaced if name in tensors else plan.added
            where[name] = values.reshape(opened.model.get_parameter(name).shape).to(kind)
            continue
        plan.sources[name] = pieces = _followed(name, source)
        begin = 0
        for run in pieces.runs:
            stretch = Stretch(run.first, run.numel, name, begin)
            plan.stretches.setdefault(run.stored.name, []).append(stretch)
            begin += run.numel
    for stretches in plan.stretches.values():
        stretches.sort(key=lambda s: s.first)
    return plan


def _followed(name: str, source: TensorSource) -> Pieces:
    """The runs of a parameter, read as float32. Raises ConfigError."""
    if not isinstance(source, Pieces):
        raise ConfigError(
            [
                f"{name} is computed from several stored tensors (transformers' conversion of this family), which "
                "cannot be undone number by number; save the base anew with transformers' save_pretrained, or serve "
                "the exported adapter"
            ]
        )
    for run in source.runs:
        if run.stored.dtype not in FLOATS or type(run.stored) is not Stored:
            raise ConfigError(
                [
                    f"{name} is stored in few bits ({run.stored.name} of {run.stored.shard.path.name}); merge into the "
                    "unquantised base: train on it with quantization: int8 or nf4, or serve the exported adapter"
                ]
            )
    return Pieces(source.shape, torch.float32, source.runs)


# ---- writing ----


class Merger:
    """Writes the files anew, one after the other; holds a block of a parameter and a pair."""

    def __init__(self, plan: Plan, changes: Changes) -> None:
        self._plan, self._changes = plan, changes
        self._block: tuple[str, int, Tensor] | None = None  # parameter, its first number, numbers

    def write(self, source: Path, target: Path, *, added: dict[str, Tensor]) -> str:
        """One file, with tensors more at its end; returns its sha256. Raises ValueError, OSError."""
        file = Shard(source)
        try:
            entries = sorted(read_header(file), key=lambda stored: stored.begin)
            digest = hashlib.sha256()
            with target.open("wb") as out:
                for part in self._content(file, entries, added):
                    digest.update(part)
                    out.write(part)
                out.flush()
                os.fsync(out.fileno())
            return digest.hexdigest()
        finally:
            file.close()

    def _content(self, file: Shard, entries: list[Stored], added: dict[str, Tensor]) -> Iterator[memoryview | bytes]:
        start = min((s.begin for s in entries), default=file.size)
        head = _read(file, 0, start)
        replaced = {s.name: self._plan.replaced[s.name] for s in entries if s.name in self._plan.replaced}
        if replaced or added:
            head = _new_header(head, entries, replaced, added)
        yield head
        at = start
        for stored in entries:
            if stored.begin != at:
                raise ValueError(f"{file.path}: its tensors do not follow each other; get the model anew")
            at += stored.numel * stored.dtype.itemsize
            if stored.name in replaced:
                yield _bytes_of(replaced[stored.name])
            else:
                yield from self._tensor(stored)
        for values in added.values():
            yield _bytes_of(values)

    def _tensor(self, stored: Stored) -> Iterator[memoryview]:
        """The bytes of a stored tensor, changed where the plan says."""
        done = 0
        for stretch in self._plan.stretches.get(stored.name, []):
            yield from _copied(stored, done, stretch.first - done)
            for values in self._changed(stretch):
                kept = values.to(stored.dtype)
                if not bool(torch.isfinite(kept).all()):
                    raise ValueError(
                        f"{stretch.name} would hold a number that is not finite in {_NAMES[stored.dtype]}, as its file "
                        "has it; take an earlier checkpoint, or a base in bf16"
                    )
                yield _bytes_of(kept)
            done = stretch.first + stretch.numel
        yield from _copied(stored, done, stored.numel - done)

    def _changed(self, stretch: Stretch) -> Iterator[Tensor]:
        """[n] float32 pieces of a changed parameter, from the stretch's begin on."""
        at, stop = stretch.begin, stretch.begin + stretch.numel
        while at < stop:
            first, values = self._values(stretch.name, at)
            part = values[at - first : stop - first]
            yield part
            at += len(part)

    def _values(self, name: str, at: int) -> tuple[int, Tensor]:
        """The block that a number of a parameter lies in: its first number, and all of it."""
        if self._block is not None:
            kept, first, values = self._block
            if kept == name and first <= at < first + len(values):
                return first, values
        source = self._plan.sources[name]
        height = source.shape[0]
        width = max(1, torch.Size(source.shape).numel() // max(1, height))
        count = max(1, BLOCK_NUMBERS // width)
        begin = at // width // count * count
        size = min(count, height - begin)
        old = source.read(begin * width, size * width).view(size, width)
        values = self._changes[name].rows(begin, old).reshape(-1)
        self._block = name, begin * width, values
        return begin * width, values


def _copied(stored: Stored, first: int, count: int) -> Iterator[memoryview]:
    step = max(1, COPY_BYTES // stored.dtype.itemsize)
    for at in range(first, first + count, step):
        part = torch.empty(min(step, first + count - at), dtype=stored.dtype)
        stored.read_into(part, at)
        yield _bytes_of(part)


def _read(file: Shard, begin: int, count: int) -> bytes:
    memory = bytearray(count)
    file.read_into(memoryview(memory), begin)
    return bytes(memory)


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def _new_header(head: bytes, entries: list[Stored], replaced: dict[str, Tensor], added: dict[str, Tensor]) -> bytes:
    """A safetensors header for the same tensors in the same order, some of other shapes, and more behind them."""
    described: dict[str, Any] = {}
    before = json.loads(head[8:])
    if "__metadata__" in before:
        described["__metadata__"] = before["__metadata__"]
    at = 0
    kept = [(s.name, s.dtype, s.shape) for s in entries if s.name not in replaced]
    shapes = {name: (dtype, shape) for name, dtype, shape in kept}
    new = {name: (t.dtype, tuple(t.shape)) for name, t in (*replaced.items(), *added.items())}
    for name in (*(s.name for s in entries), *added):
        dtype, shape = new.get(name) or shapes[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    return len(text).to_bytes(8, "little") + text
