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
from functools import cached_property
from typing import Any, Literal


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


@dataclass(frozen=True)
class Dense:
    """A trained tensor that belongs to no component and never changes shape: DoRA's magnitude, a classifier head.

    module: path of the module it belongs to; part: its name there; shape: [rows, columns], a vector is one row.
    """

    module: str
    part: str
    rows: int
    columns: int


@dataclass(frozen=True)
class RankTable:
    """For each site the birth numbers of its components, in the order of their rows.

    births: one tuple per site; next_birth: the number that the site's next newborn gets, so none is used twice.
    """

    sites: tuple[Site, ...]
    births: tuple[tuple[int, ...], ...]
    next_birth: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.sites) == len(self.births) == len(self.next_birth)
        for site, births, following in zip(self.sites, self.births, self.next_birth, strict=True):
            assert len(set(births)) == len(births), f"{site.name}: a birth number twice"
            assert all(0 <= b < following for b in births), f"{site.name}: a birth number beyond next_birth"
            assert len(births) <= site.max_rank, f"{site.name}: rank {len(births)} > {site.max_rank}"

    @classmethod
    def start(cls, sites: Sequence[Site], ranks: Sequence[int]) -> RankTable:
        """A first table: site i has components 0 .. ranks[i] - 1."""
        return cls(tuple(sites), tuple(tuple(range(r)) for r in ranks), tuple(ranks))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(b) for b in self.births)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each site's first component in the list of all components, and the total at the end."""
        out = [0]
        for r in self.ranks:
            out.append(out[-1] + r)
        return tuple(out)

    @property
    def total(self) -> int:
        return self.offsets[-1]

    @cached_property
    def digest(self) -> str:
        """sha256 over sites, births and next births; equal tables have equal digests on every process."""
        content = [
            [s.name, s.in_features, s.out_features, s.scaling.hex(), list(b), n]
            for s, b, n in zip(self.sites, self.births, self.next_birth, strict=True)
        ]
        return _digest(content)

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
        return cls(
            tuple(sites),
            tuple(tuple(e["births"]) for e in data["sites"]),
            tuple(int(e["next_birth"]) for e in data["sites"]),
        )


@dataclass(frozen=True)
class SiteChange:
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
        scores = sorted((name, value.hex()) for name, value in self.scores.items())
        content: list[Any] = [self.table_digest, self.reason, self.again, scores]
        for index in sorted(self.changes):
            change = self.changes[index]
            fold = [[p, part, [f.hex() for f in factors]] for p, part, factors in change.fold]
            content.append([index, list(change.keep), change.born, list(change.zero), fold])
        return _digest(content)

    def reshapes(self, table: RankTable) -> bool:
        """Does any component leave, join or change its place? If not, tensors keep their shapes (masks only)."""
        return any(c.born or c.keep != tuple(range(table.ranks[i])) for i, c in self.changes.items())

    def apply(self, table: RankTable) -> RankTable:
        """The table after this plan; pure.

        Raises:
            ValueError: the plan was made for another table, or breaks a rule of one site.
        """
        if self.table_digest != table.digest:
            raise ValueError(
                f"plan made for table {self.table_digest[:12]}, applied to {table.digest[:12]}: plan again"
            )
        births, following = list(table.births), list(table.next_birth)
        for index in sorted(self.changes):
            change, site, old = self.changes[index], table.sites[index], table.births[index]
            _check_change(site, change, len(old))
            first = following[index]
            births[index] = tuple(old[i] for i in change.keep) + tuple(range(first, first + change.born))
            following[index] = first + change.born
        return RankTable(table.sites, tuple(births), tuple(following))


def _check_change(site: Site, change: SiteChange, rank: int) -> None:
    folded = tuple(position for position, _, _ in change.fold)
    for what, positions in (("keep", change.keep), ("zero", change.zero), ("fold", folded)):
        if len(set(positions)) != len(positions) or any(not 0 <= p < rank for p in positions):
            raise ValueError(f"{site.name}: {what}={positions} must be distinct positions below its rank {rank}")
    new_rank = len(change.keep) + change.born
    if change.born < 0 or new_rank > site.max_rank:
        raise ValueError(f"{site.name}: rank {new_rank} after the plan; allowed 0 .. {site.max_rank} (min(in, out))")


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
            keep=tuple(p for p in range(table.ranks[i]) if p not in out.get(i, ())),
            born=born.get(i, 0),
        )
        for i in sorted(out.keys() | born.keys())
    }
    return RankPlan(table.digest, changes, reason=reason, scores=dict(scores or {}))


def named_seed(*names: int | str) -> int:
    """A 63-bit seed from the names of a generator, e.g. (run seed, step, site); the same on every machine."""
    text = json.dumps(names).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
