"""The arena: every trained number in one flat float32 tensor, and how one arena becomes the next.

`ArenaLayout` is derived from a rank table and the method's parts, never stored. By matrix in base order it holds the
rows of `lora_A` of all its sites (heads in order), then all rows of `lora_B`, then the diagonals, so that all heads of
a matrix are one GEMM. A component owns one row in each block. Dense entries (DoRA's magnitudes, a classifier head)
stand at the end. Blocks start at multiples of 128 bytes; the gaps are zero, never trained, in no count and no norm.

Pure tensor code: no process group, no engine. Letters: N numbers in the arena, R components, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ardtrain.ranks import Dense, Integers, RankTable, Site, named_seed

ALIGNMENT = 32  # float32 numbers: 128 bytes, so that kernels see the same alignment whatever the ranks are

MAX_RUNS_OF_BLOCK = 16  # with more, one indexed copy of its rows is quicker

Parts = Callable[[Site], Mapping[str, int]]
"""A method's `entries`: part name -> numbers in one component's row, e.g. {"lora_A": I, "lora_B": O, "diagonal": 1}."""

Newborn = Callable[[Site, Mapping[str, Tensor], int, torch.Generator], Mapping[str, Tensor]]
"""A method's `init`: (site, the site's survivors by part [r, columns], count, generator) -> rows of the newborn."""


@dataclass(frozen=True)
class Block:
    """The rows of one part of one matrix: arena[offset : offset + rows * columns] seen as [rows, columns].

    first: position of its first row's component in the table's list of all components; -1 for a dense entry.
    """

    module: str
    part: str
    offset: int
    rows: int
    columns: int
    first: int

    @property
    def stop(self) -> int:
        return self.offset + self.rows * self.columns

    def of(self, flat: Tensor) -> Tensor:
        """[rows, columns] view of this block in a flat tensor laid out like the arena."""
        return flat[self.offset : self.stop].view(self.rows, self.columns)


class ArenaLayout:
    """Which slice of the arena is which rows of which matrix."""

    def __init__(self, table: RankTable, parts: Parts, dense: Sequence[Dense] = ()) -> None:
        self.table = table
        self.parts = parts
        self.dense = tuple(dense)
        self._row_starts: dict[str, Integers] = {}
        blocks: list[Block] = []
        offset = 0
        for module, start, stop in table.sites.modules:
            rows = table.offsets[stop] - table.offsets[start]
            if rows == 0:
                continue
            for part, columns in parts(table.sites[start]).items():  # alike for all sites of a matrix
                blocks.append(Block(module, part, offset, rows, columns, table.offsets[start]))
                offset = _aligned(blocks[-1].stop)
        whole: list[Block] = []
        for entry in self.dense:
            whole.append(Block(entry.module, entry.part, offset, entry.rows, entry.columns, -1))
            offset = _aligned(whole[-1].stop)
        self.blocks = tuple(blocks)  # of components
        self.all_blocks = (*blocks, *whole)
        # An empty parameter crashes DeepSpeed: with all ranks 0 one untrained gap stays.
        self.size = max(offset, ALIGNMENT)

    @cached_property
    def num_trained(self) -> int:
        """Trained numbers, gaps not counted."""
        return sum(b.rows * b.columns for b in self.all_blocks)

    def positions(self, module: str) -> tuple[int, int]:
        """First component of a matrix and the number of its components, over all its sites."""
        block = self._first_blocks.get(module)
        return (block.first, block.rows) if block is not None else (0, 0)

    @cached_property
    def _first_blocks(self) -> dict[str, Block]:
        return {b.module: b for b in reversed(self.blocks)}

    @cached_property
    def site_ranks(self) -> dict[str, tuple[int, ...]]:
        """Module -> rank of each of its sites, heads in order."""
        return {module: self.table.ranks[start:stop] for module, start, stop in self.table.sites.modules}

    def row_starts(self, part: str) -> Integers:
        """[R] where each component's row of this part begins; -1 for a component without that part."""
        if part not in self._row_starts:
            starts = np.full(self.table.total, -1, np.int64)
            for b in (b for b in self.blocks if b.part == part):
                starts[b.first : b.first + b.rows] = np.arange(b.offset, b.stop, b.columns)
            self._row_starts[part] = starts
        return self._row_starts[part]

    def views(self, leaf: Tensor) -> dict[str, dict[str, Tensor]]:
        """Module -> part -> [rows, columns] view of the leaf; one split, so backward makes one flat gradient.

        Args:
            leaf: [N] float32 that requires grad.
        """
        sizes: list[int] = []
        end = 0
        for block in self.all_blocks:
            sizes += [block.offset - end, block.stop - block.offset]
            end = block.stop
        sizes.append(self.size - end)
        pieces = torch.split(leaf, sizes)
        out: dict[str, dict[str, Tensor]] = {}
        for block, piece in zip(self.all_blocks, pieces[1::2], strict=True):
            out.setdefault(block.module, {})[block.part] = piece.view(block.rows, block.columns)
        return out

    def site_rows(self, flat: Tensor, index: int) -> dict[str, Tensor]:
        """Part -> [r, columns] rows of one site in a flat tensor."""
        start, stop = self.table.offsets[index], self.table.offsets[index + 1]
        if start == stop:
            return {p: flat.new_zeros(0, c) for p, c in self.parts(self.table.sites[index]).items()}
        return {b.part: b.of(flat)[start - b.first : stop - b.first] for b in self._by_site[index]}

    @cached_property
    def _by_site(self) -> dict[int, list[Block]]:
        by_module: dict[str, list[Block]] = {}
        for block in self.blocks:
            by_module.setdefault(block.module, []).append(block)
        return {i: by_module.get(s.module, []) for i, s in enumerate(self.table.sites)}


class Spares:
    """Arrays that were read for the last time, to be written over.

    On a CPU new memory costs two or three times the copy into it (the kernel clears it, page by page); on any device
    there is one array more at a time, not one more of each kind.
    """

    def __init__(self) -> None:
        self._arrays: list[Tensor] = []

    def add(self, array: Tensor) -> None:
        """Nobody may read `array`, or any view of its memory, from here on."""
        self._arrays.append(array)

    def clear(self) -> None:
        """Frees them."""
        self._arrays.clear()

    def take(self, size: int, *, like: Tensor) -> Tensor:
        """[size], any numbers in it, of the dtype and device of `like`: in the memory of a spare that holds as many.

        New memory has 1.6% of room, which the arena's size moves in when components change to wider matrices.
        """
        for index, array in enumerate(self._arrays):
            fits = array.untyped_storage().nbytes() >= size * array.element_size()
            if fits and (array.dtype, array.device) == (like.dtype, like.device):
                return self._arrays.pop(index).as_strided((size,), (1,), 0)
        return torch.empty(size + size // 64, dtype=like.dtype, device=like.device)[:size]


def sources(old: RankTable, new: RankTable) -> Tensor:
    """[R_new] int64: which component of `old` each of `new` is, -1 for the newborn. Identity: (site, birth)."""
    assert old.sites == new.sites
    if not old.total:
        return torch.full((new.total,), -1, dtype=torch.int64)
    span = int(max(old.next_birth_array.max(), new.next_birth_array.max()))
    old_keys, new_keys = (t.owners * span + t.birth_array for t in (old, new))
    order = np.argsort(old_keys, kind="stable")
    at = np.minimum(np.searchsorted(old_keys, new_keys, sorter=order), old.total - 1)
    return torch.from_numpy(np.where(old_keys[order[at]] == new_keys, order[at], -1))


def _moved(old: RankTable, new: RankTable) -> NDArray[np.bool_]:
    """[S] bool: has the site other components than before, or in another order?"""
    moved = old.rank_array != new.rank_array
    before, after = (np.flatnonzero(~moved[t.owners]) for t in (old, new))  # components of the other sites
    differ = old.birth_array[before] != new.birth_array[after]
    moved[new.owners[after[differ]]] = True
    return moved


class Repacking:
    """How flat tensors of one layout become those of another; worked out once, applied to every array.

    Rows that stay neighbours, over the bounds of matrices too, are copied as one run: the cost follows the bytes and
    the components that leave or join, not the number of matrices.
    """

    def __init__(self, old: ArenaLayout, new: ArenaLayout) -> None:
        self.new = new
        self.source = sources(old.table, new.table)
        self._runs: list[tuple[int, int, int, bool]] = []  # start in new, in old, numbers, do both blocks end with it?
        self._gathers: list[tuple[Block, Block, Tensor, Tensor]] = []  # rows of new, rows of old
        moved = _moved(old.table, new.table)
        same = {module: not moved[start:stop].any() for module, start, stop in new.table.sites.modules}
        earlier_blocks = {(b.module, b.part): b for b in old.all_blocks}
        for block in new.all_blocks:
            earlier = earlier_blocks.get((block.module, block.part))
            if earlier is None:  # the matrix had rank 0: all rows are newborn
                continue
            if block.first < 0 or same[block.module]:
                self._add_run(block, earlier, 0, 0, block.rows)
                continue
            rows = self.source[block.first : block.first + block.rows]
            alive = torch.nonzero(rows >= 0).view(-1)
            self._add_rows(block, earlier, alive, rows[alive] - earlier.first)
        self._unset = _complement([(start, start + numbers) for start, _, numbers, _ in self._runs], new.size)

    def _add_rows(self, block: Block, earlier: Block, rows: Tensor, old_rows: Tensor) -> None:
        """Row old_rows[i] of `earlier` becomes row rows[i] of `block`."""
        new, old = rows.tolist(), old_rows.tolist()
        firsts = [i for i in range(len(new)) if not i or new[i] != new[i - 1] + 1 or old[i] != old[i - 1] + 1]
        if len(firsts) > MAX_RUNS_OF_BLOCK:
            self._gathers.append((block, earlier, rows, old_rows))
            return
        for first, following in pairwise([*firsts, len(new)]):
            self._add_run(block, earlier, new[first], old[first], following - first)

    def _add_run(self, block: Block, earlier: Block, row: int, old_row: int, rows: int) -> None:
        """Lengthens the last run where this one follows at once, or across the zero gap between two whole ends."""
        start, old_start = block.offset + row * block.columns, earlier.offset + old_row * block.columns
        numbers = rows * block.columns
        ends = start + numbers == block.stop and old_start + numbers == earlier.stop
        if self._runs:
            first, old_first, length, ended = self._runs[-1]
            begins = row == 0 and old_row == 0 and start == _aligned(first + length)
            if (start == first + length or (ended and begins)) and start - first == old_start - old_first:
                self._runs[-1] = (first, old_first, start - first + numbers, ends)
                return
        self._runs.append((start, old_start, numbers, ends))

    def apply(self, flat: Tensor, spares: Spares | None = None) -> Tensor:
        """[N_new]: the survivors' rows of `flat` [N_old] to the bit, newborn rows and gaps zero. Any dtype.

        -0.0 becomes 0.0, as it does when an array is gathered from several processes. One pass over the bytes, into
        a spare array or new memory; `flat` may be live.
        """
        out = (spares or Spares()).take(self.new.size, like=flat)
        for start, stop in self._unset:
            out[start:stop] = 0
        for start, old_start, numbers, _ in self._runs:
            torch.add(flat[old_start : old_start + numbers], 0, out=out[start : start + numbers])
        for block, earlier, rows, old_rows in self._gathers:
            block.of(out)[rows.to(flat.device)] = earlier.of(flat)[old_rows.to(flat.device)] + 0
        return out


def _complement(intervals: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What ascending intervals leave of [0, size)."""
    ends = [0, *(stop for _, stop in intervals)]
    starts = [*(start for start, _ in intervals), size]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if start > end]


def repack(flat: Tensor, old: ArenaLayout, new: ArenaLayout) -> Tensor:
    """`Repacking` of one array."""
    return Repacking(old, new).apply(flat)


def repack_components(values: Tensor, source: Tensor) -> Tensor:
    """[R_new, ...] from [R_old, ...] by `sources` [R_new]: survivors' values, newborn 0."""
    out = torch.zeros((len(source), *values.shape[1:]), dtype=values.dtype, device=values.device)
    alive = (source >= 0).to(values.device)
    out[alive] = values[source.to(values.device)[alive]]
    return out


def fill_newborn(flat: Tensor, layout: ArenaLayout, born: Tensor, newborn: Newborn, *, seed: int, step: int) -> None:
    """Writes the newborn components' first weights into `flat` [N], in place.

    born: [R] bool, which components of the layout's table have no predecessor. Survivors of each site are handed to
    `newborn` so that new vectors can be orthogonal to them. One CPU generator for each site, named (seed, step, site),
    so the bits depend on no other site, process or device. Newborn rows stand behind the survivors of their site.
    """
    for index, survivors, count in _newborn_sites(layout.table, born):
        site = layout.table.sites[index]
        rows = layout.site_rows(flat, index)
        generator = torch.Generator().manual_seed(named_seed(seed, step, site.name))
        existing = {part: r[:survivors].cpu() for part, r in rows.items()}
        for part, values in newborn(site, existing, count, generator).items():
            rows[part][survivors:] = values.to(flat.device, flat.dtype)


def _newborn_sites(table: RankTable, born: Tensor) -> Iterator[tuple[int, int, int]]:
    """(site, survivors, newborn) of each site that has newborn components; they stand behind its survivors."""
    flags = born.numpy()
    counts = np.bincount(table.owners, flags, minlength=len(table.sites)).astype(np.int64)
    for index in np.flatnonzero(counts).tolist():
        count, stop = int(counts[index]), table.offsets[index + 1]
        assert flags[stop - count : stop].all(), f"{table.sites[index].name}: a newborn stands before a survivor"
        yield index, table.ranks[index] - count, count


def fill_newborn_second_moment(flat: Tensor, layout: ArenaLayout, born: Tensor) -> None:
    """Gives newborn rows the element-wise mean of their site's survivors' second moment, in place.

    Where no survivor is left: the mean over all surviving rows of that part and width, then (none at all) zero.
    With zeros, Adam's shared step counter would make a newborn's first step 3.16 x lr, in the direction of noise.
    Source: methods.md 5 (ours). float64 means, survivors in table order.
    """
    pools: dict[tuple[str, int], Tensor] = {}
    for index, survivors, _ in _newborn_sites(layout.table, born):
        for part, rows in layout.site_rows(flat, index).items():
            if survivors:
                mean = rows[:survivors].double().mean(dim=0)
            else:
                key = (part, rows.shape[1])
                if key not in pools:
                    pools[key] = _pooled_mean(flat, layout, born, *key)
                mean = pools[key]
            rows[survivors:] = mean.to(flat.dtype)


def _pooled_mean(flat: Tensor, layout: ArenaLayout, born: Tensor, part: str, columns: int) -> Tensor:
    total, count = torch.zeros(columns, dtype=torch.float64, device=flat.device), 0
    for block in layout.blocks:
        if block.part == part and block.columns == columns:
            alive = ~born[block.first : block.first + block.rows]
            total += block.of(flat)[alive.to(flat.device)].double().sum(dim=0)
            count += int(alive.sum())
    return total / max(1, count)


@dataclass(frozen=True)
class ShardBlock:
    """Rows of one block in a shard's compact buffer: local[offset : offset + rows * columns]."""

    part: str
    first: int  # component of the first row, as in the whole table
    rows: int
    columns: int
    offset: int


class Shard:
    """The components whose per-entry statistics one process keeps: a contiguous range of the table's components.

    Whole components, so that each one's numbers are computed by one process in one order and bits do not depend on the
    number of processes (deepspeed.md 4). Dealt by the count of numbers.
    """

    def __init__(self, layout: ArenaLayout, index: int, count: int) -> None:
        self.layout = layout
        self.start, self.stop = _deal(layout, index, count)
        self.slices: list[tuple[int, int]] = []
        blocks: list[ShardBlock] = []
        local = 0
        whole = False  # does the last slice end with its block, so that only a gap follows?
        for block in layout.blocks:
            low, high = max(self.start, block.first), min(self.stop, block.first + block.rows)
            if low >= high:
                continue
            begin = block.offset + (low - block.first) * block.columns
            end = block.offset + (high - block.first) * block.columns
            if whole and begin == _aligned(self.slices[-1][1]):  # one longer slice
                local += begin - self.slices[-1][1]
                self.slices[-1] = (self.slices[-1][0], end)
            else:
                self.slices.append((begin, end))
            blocks.append(ShardBlock(block.part, low, high - low, block.columns, local))
            local += end - begin
            whole = end == block.stop
        self.blocks = tuple(blocks)
        self.size = local

    def take(self, flat: Tensor) -> Tensor:
        """[n] this process's part of a flat [N] tensor (a view where it is one slice)."""
        if len(self.slices) == 1:
            return flat[self.slices[0][0] : self.slices[0][1]]
        return torch.cat([flat[a:b] for a, b in self.slices]) if self.slices else flat[:0]

    def put(self, local: Tensor, flat: Tensor) -> None:
        """Writes this process's part [n] into a flat [N] tensor, in place."""
        begin = 0
        for a, b in self.slices:
            flat[a:b] = local[begin : begin + b - a]
            begin += b - a

    def rows(self, local: Tensor) -> Iterator[tuple[str, slice, Tensor]]:
        """(part, the components as a slice of the whole table, [rows, columns] view) of each block of the shard."""
        for b in self.blocks:
            values = local[b.offset : b.offset + b.rows * b.columns].view(b.rows, b.columns)
            yield b.part, slice(b.first, b.first + b.rows), values


def _deal(layout: ArenaLayout, index: int, count: int) -> tuple[int, int]:
    """First and last + 1 component of shard `index` of `count`; shares of about equal numbers."""
    widths = np.zeros(layout.table.total, np.int64)
    for block in layout.blocks:
        widths[block.first : block.first + block.rows] += block.columns
    ends = np.cumsum(widths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, [total * index // count, total * (index + 1) // count])
    start = 0 if index == 0 else int(cuts[0]) + 1
    stop = layout.table.total if index == count - 1 else int(cuts[1]) + 1
    return min(start, layout.table.total), min(max(stop, start), layout.table.total)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
