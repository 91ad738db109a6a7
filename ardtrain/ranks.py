"""Ranks as data: which site owns which components, and how one table becomes the next.

Pure values without torch.distributed or deepspeed. A component is one row of `lora_A [R, I]` and its row of
`lora_B [R, O]`; its identity is (site, birth number), so scores and ages follow it through every resize.
Every order in the project is the order of `RankTable.sites`: the base model's `named_modules()` order, then the head
number. It breaks every tie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Site:
    """The unit that owns a rank: a whole matrix, or one head's part of it.

    name: module path in the base checkpoint's parameter names, plus `:head.5` where a head owns it.
    module: that path without the head.
    in_features, out_features: numbers in a row of the site's `lora_A` and of its `lora_B`.
    head: head number, or None for a whole matrix; start: first row (q, k, v) or column (o) of the head's slice.
    scaling: `lora_alpha / r` of the site's own first r; fixed for the whole run, so a resize never rescales survivors.
    """

    name: str
    module: str
    in_features: int
    out_features: int
    scaling: float = 1.0
    tower: str = "language"
    kind: Literal["matrix", "head"] = "matrix"
    head: int | None = None
    start: int = 0

    @property
    def max_rank(self) -> int:
        """Largest rank that adds anything: min(in, out)."""
        return min(self.in_features, self.out_features)


class Sites(tuple[Site, ...]):
    """All sites of a run, in order; one object for all its tables, so what follows from them is worked out once."""

    @cached_property
    def digest(self) -> bytes:
        """sha256 over what a table's digest says of its sites."""
        return _sha256([[s.name, s.in_features, s.out_features, s.scaling.hex()] for s in self])

    @cached_property
    def max_ranks(self) -> Integers:
        """[S] the sites' largest ranks."""
        return np.fromiter((s.max_rank for s in self), np.int64, len(self))

    @cached_property
    def modules(self) -> tuple[tuple[str, int, int], ...]:
        """(module, its first site, its last + 1) of each matrix; the sites of one follow each other, alike in shape."""
        starts = [i for i, s in enumerate(self) if not i or s.module != self[i - 1].module]
        stops = [*starts[1:], len(self)][: len(starts)]  # full fine-tuning has no sites
        for a, b in zip(starts, stops, strict=True):
            shapes = {(s.in_features, s.out_features) for s in self[a:b]}
            assert len(shapes) == 1, f"{self[a].module}: sites of one matrix differ in shape"
        return tuple((self[a].module, a, b) for a, b in zip(starts, stops, strict=True))


@dataclass(frozen=True)
class Dense:
    """A trained tensor that belongs to no component and never changes shape: DoRA's magnitude, a classifier head.

    module: path of the module it belongs to; part: its name there; in the arena it is [rows, columns], a vector one
    row. shape: the tensor's own, where it is another.
    """

    module: str
    part: str
    rows: int
    columns: int
    shape: tuple[int, ...] | None = None

    @property
    def own_shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns) if self.shape is None else self.shape


@dataclass(frozen=True, eq=False)
class RankTable:
    """For each site the birth numbers of its components, in the order of their rows.

    rank_array: [S] components of each site; birth_array: [R] their birth numbers, site after site; next_birth_array:
    [S] the number that the site's next newborn gets, so none is used twice. `ranks`, `births` and `next_birth` are the
    same as tuples, one entry per site. Nobody writes into the arrays.
    """

    sites: Sites
    rank_array: Integers
    birth_array: Integers
    next_birth_array: Integers

    def __post_init__(self) -> None:
        assert len(self.sites) == len(self.rank_array) == len(self.next_birth_array)
        births, owners = self.birth_array, self.owners
        known = bool(np.all((births >= 0) & (births < self.next_birth_array[owners])))
        if known and _distinct(owners, births) and bool(np.all(self.rank_array <= self.sites.max_ranks)):
            return
        for site, own, most in zip(self.sites, self.births, self.next_birth, strict=True):  # to name what is wrong
            assert len(set(own)) == len(own), f"{site.name}: a birth number twice"
            assert all(0 <= birth < most for birth in own), f"{site.name}: a birth number beyond next_birth"
            assert len(own) <= site.max_rank, f"{site.name}: rank {len(own)} > {site.max_rank}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RankTable):
            return NotImplemented
        ours, theirs = ((t.sites, t.births, t.next_birth) for t in (self, other))
        return ours == theirs

    @classmethod
    def of(cls, sites: Sequence[Site], births: Sequence[Sequence[int]], next_birth: Sequence[int]) -> RankTable:
        """From one entry per site."""
        known = sites if isinstance(sites, Sites) else Sites(sites)
        return cls(known, *_counted(births), np.array(next_birth, np.int64))

    @classmethod
    def start(cls, sites: Sequence[Site], ranks: Sequence[int]) -> RankTable:
        """A first table: site i has components 0 .. ranks[i] - 1."""
        return cls.of(sites, [range(r) for r in ranks], ranks)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.rank_array.tolist())

    @cached_property
    def births(self) -> tuple[tuple[int, ...], ...]:
        numbers = self.birth_array.tolist()
        return tuple(tuple(numbers[a:b]) for a, b in pairwise(self.offsets))

    @cached_property
    def next_birth(self) -> tuple[int, ...]:
        return tuple(self.next_birth_array.tolist())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each site's first component in the list of all components, and the total at the end."""
        return tuple(self.offset_array.tolist())

    @property
    def total(self) -> int:
        return len(self.birth_array)

    @cached_property
    def offset_array(self) -> Integers:
        """[S + 1] `offsets`."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.rank_array)])

    @cached_property
    def owners(self) -> Integers:
        """[R] the site of each component."""
        return np.repeat(np.arange(len(self.sites)), self.rank_array)

    @cached_property
    def places(self) -> Integers:
        """[R] the position of each component in its site."""
        return np.arange(self.total) - self.offset_array[self.owners]

    @cached_property
    def digest(self) -> str:
        """sha256 over sites, births and next births; equal tables have equal digests on every process."""
        numbers = (self.rank_array, self.birth_array, self.next_birth_array)
        return _sha256_of_numbers(self.sites.digest, numbers)

    @property
    def first_digest(self) -> str:
        """The digest by another formula, of checkpoints of format versions 1 and 2; slow for large tables."""
        content = [
            [s.name, s.in_features, s.out_features, s.scaling.hex(), list(b), n]
            for s, b, n in zip(self.sites, self.births, self.next_birth, strict=True)
        ]
        return _sha256(content).hex()

    def by_name(self) -> dict[str, int]:
        """Site name -> rank."""
        return {s.name: r for s, r in zip(self.sites, self.ranks, strict=True)}

    def by_tower(self) -> dict[str, int]:
        """Tower -> total rank of its sites."""
        out: dict[str, int] = {}
        for site, own in zip(self.sites, self.ranks, strict=True):
            out[site.tower] = out.get(site.tower, 0) + own
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "sites": [
                {"name": s.name, "births": list(b), "next_birth": n}
                for s, b, n in zip(self.sites, self.births, self.next_birth, strict=True)
            ]
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], sites: Sequence[Site]) -> RankTable:
        """Reads `to_json`'s form against the sites that the model has now.

        Raises:
            ValueError: the sites' names or their order differ.
        """
        stored = [entry["name"] for entry in data["sites"]]
        wanted = [s.name for s in sites]
        if stored != wanted:
            odd = next((f"{a} against {b}" for a, b in zip(stored, wanted, strict=False) if a != b), "their number")
            raise ValueError(
                f"the checkpoint's sites differ from this run's ({odd}; {len(stored)} against {len(wanted)}): "
                "target_modules and the model must be the ones the checkpoint was written with"
            )
        return cls.of(sites, [e["births"] for e in data["sites"]], [int(e["next_birth"]) for e in data["sites"]])


class SiteChange(NamedTuple):
    """What a plan does to one site.

    keep: positions (in the old table) that stay, in their new order; born: how many components join after them;
    zero: positions whose diagonal becomes 0 in the master while everything else stays (AdaLoRA's reversible mask);
    fold: (position, part, factors): that row of the component is multiplied in the master, moments stay; one factor,
    or one for each head that shares the row (ARD-LoRA's gates folded in).
    """

    keep: tuple[int, ...]
    born: int = 0
    zero: tuple[int, ...] = ()
    fold: tuple[tuple[int, str, tuple[float, ...]], ...] = ()


class _Changes(NamedTuple):
    """A plan's changes in the order of their sites [C]; of keep, zero and fold how many each has, and all of them."""

    sites: Integers
    born: Integers
    keep: tuple[Integers, Integers]
    zero: tuple[Integers, Integers]
    fold: tuple[Integers, Integers]


@dataclass(frozen=True)
class RankPlan:
    """One decision: the changed sites, against exactly one table.

    table_digest: the table it was made for; changes: site index -> change, untouched sites are absent;
    reason: why, for people; scores: numbers worth recording with the event (score at the cut, for instance);
    again: the last plan's mask once more after an optimizer step (AdaLoRA's final phase): applied, but no event.
    """

    table_digest: str
    changes: Mapping[int, SiteChange]
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    again: bool = False

    @cached_property
    def digest(self) -> str:
        """sha256 over all of it."""
        scores = sorted((name, value.hex()) for name, value in self.scores.items())
        folds = [own for _, c in self._ordered for own in c.fold]
        parts = "".join(f"{part}," for _, part, _ in folds)
        head = _sha256([self.table_digest, self.reason, self.again, scores, parts])
        counts, places = self._arrays.fold
        folded = counts > 0
        numbers = [
            self._arrays.sites,
            self._arrays.born,
            *self._arrays.keep,
            *self._arrays.zero,
            self._arrays.sites[folded],
            counts[folded],
            places,
            np.fromiter((len(factors) for _, _, factors in folds), np.int64, len(folds)),
            np.fromiter(chain.from_iterable(factors for _, _, factors in folds), np.float64),
        ]
        return _sha256_of_numbers(head, numbers)

    @cached_property
    def _ordered(self) -> list[tuple[int, SiteChange]]:
        return sorted(self.changes.items())

    @cached_property
    def _arrays(self) -> _Changes:
        changes = [c for _, c in self._ordered]
        return _Changes(
            np.fromiter((i for i, _ in self._ordered), np.int64, len(changes)),
            np.fromiter((c.born for c in changes), np.int64, len(changes)),
            _counted([c.keep for c in changes]),
            _counted([c.zero for c in changes]),
            (
                np.fromiter((len(c.fold) for c in changes), np.int64, len(changes)),
                np.fromiter((own[0] for c in changes for own in c.fold), np.int64),
            ),
        )

    def reshapes(self, table: RankTable) -> bool:
        """Does any component leave, join or change its place? If not, tensors keep their shapes (masks only)."""
        return any(c.born or c.keep != positions(table.ranks[i]) for i, c in self.changes.items())

    def apply(self, table: RankTable) -> RankTable:
        """The table after this plan; pure.

        Raises:
            ValueError: as `check`.
        """
        self.check(table)
        sites, born, (num_kept, kept), _, _ = self._arrays
        changed = np.zeros(len(table.sites), bool)
        changed[sites] = True
        stay, following = table.rank_array.copy(), table.next_birth_array.copy()  # [S]
        stay[sites] = num_kept
        following[sites] += born
        ranks = stay.copy()
        ranks[sites] += born
        owners = np.repeat(np.arange(len(ranks)), ranks)
        places = np.arange(len(owners)) - np.repeat(np.cumsum(ranks) - ranks, ranks)
        births = (table.next_birth_array - stay)[owners] + places  # of the newborn
        survives = places < stay[owners]
        births[survives & ~changed[owners]] = table.birth_array[~changed[table.owners]]
        births[survives & changed[owners]] = table.birth_array[np.repeat(table.offset_array[sites], num_kept) + kept]
        return RankTable(table.sites, ranks, births, following)

    def check(self, table: RankTable) -> None:
        """Raises ValueError: the plan was made for another table, or breaks a rule of one site."""
        if self.table_digest != table.digest:
            raise ValueError(
                f"plan made for table {self.table_digest[:12]}, applied to {table.digest[:12]}: plan again"
            )
        sites, born, *named = self._arrays
        ranks, most = table.rank_array[sites], table.sites.max_ranks[sites]
        kept, _ = self._arrays.keep
        fine = all(_all_below(counts, places, ranks) for counts, places in named)
        if fine and bool(np.all((born >= 0) & (kept + born <= most))):
            return
        for index, change in self._ordered:  # names what is wrong
            _check_change(table.sites[index], change, table.ranks[index])


def _check_change(site: Site, change: SiteChange, rank: int) -> None:
    folded = tuple(position for position, _, _ in change.fold)
    for what, places in (("keep", change.keep), ("zero", change.zero), ("fold", folded)):
        if len(set(places)) != len(places) or any(not 0 <= p < rank for p in places):
            raise ValueError(f"{site.name}: {what}={places} must be distinct positions below its rank {rank}")
    new_rank = len(change.keep) + change.born
    if change.born < 0 or new_rank > site.max_rank:
        raise ValueError(f"{site.name}: rank {new_rank} after the plan; allowed 0 .. {site.max_rank} (min(in, out))")


@lru_cache(maxsize=1024)
def positions(rank: int) -> tuple[int, ...]:
    """0 .. rank - 1: the `keep` of a site that keeps all; one object for each rank."""
    return tuple(range(rank))


def identity_plan(table: RankTable) -> RankPlan:
    """The plan that changes nothing: a checkpoint load enters the resize with it."""
    return RankPlan(table.digest, {}, reason="identity")


def prune_and_grow(
    table: RankTable,
    pruned: Iterable[tuple[int, int]],
    grown: Iterable[int],
    *,
    reason: str,
    scores: Mapping[str, float] | None = None,
) -> RankPlan:
    """A plan from (site, position) pairs that leave and a list of sites that gain one component per mention."""
    out: dict[int, set[int]] = {}
    for site, position in pruned:
        out.setdefault(site, set()).add(position)
    born: dict[int, int] = {}
    for site in grown:
        born[site] = born.get(site, 0) + 1
    changes = {
        i: SiteChange(
            keep=tuple(p for p in range(table.ranks[i]) if p not in out[i]) if i in out else positions(table.ranks[i]),
            born=born.get(i, 0),
        )
        for i in sorted(out.keys() | born.keys())
    }
    return RankPlan(table.digest, changes, reason=reason, scores=dict(scores or {}))


def named_seed(*names: int | str) -> int:
    """A 63-bit seed from the names of a generator, e.g. (run seed, step, site); the same on every machine."""
    text = json.dumps(names).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def _sha256(content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).digest()


def _sha256_of_numbers(head: bytes, arrays: Iterable[NDArray[Any]]) -> str:
    """Over the bytes of a head and of arrays, each with its length before it; little-endian on every machine."""
    digest = hashlib.sha256(head)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _counted(rows: Sequence[Sequence[int]]) -> tuple[Integers, Integers]:
    """The lengths of the rows, and all their numbers in a row."""
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return counts, np.fromiter(chain.from_iterable(rows), np.int64, int(counts.sum()))


def _distinct(owners: Integers, values: Integers) -> bool:
    """Has no owner a value twice? Values >= 0."""
    if not len(values):
        return True
    keys = owners * (int(values.max()) + 1) + values
    if bool(np.all(keys[1:] > keys[:-1])):  # already in order, as most are
        return True
    keys = np.sort(keys)
    return bool(np.all(keys[1:] != keys[:-1]))


def _all_below(counts: Integers, values: Integers, limits: Integers) -> bool:
    """Are each owner's numbers distinct, >= 0 and below its limit? counts: how many each has, in a row in `values`."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return bool(np.all((values >= 0) & (values < limits[owners]))) and _distinct(owners, values)
