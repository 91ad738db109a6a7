"""What stands in a checkpoint: names <-> tensors, the manifest, and reading all of it with every doubt refused.

`checkpoint-N/`: manifest.json; state/trainer.json (the loop's values, Adam's counter, the rank table);
state/arena-00001-of-00004.safetensors (format 1: state/arena.safetensors), any number of parts, each tensor whole in
one of them: `<module>.{lora_A,lora_B,diagonal}.{master,exp_avg,exp_avg_sq,<method's per-entry names>}` as [r, columns]
float32; `<site>.{birth,age}` [r] int64; `method.<name>` float64 for per-component and per-site arrays; adapter/.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ardtrain.arena import ArenaLayout, Parts
from ardtrain.checkpoint import strictjson
from ardtrain.checkpoint.errors import CheckpointError, OtherRunError
from ardtrain.checkpoint.identity import Identity, compare
from ardtrain.checkpoint.tensorfile import FileRecord, TensorReader, file_sha256
from ardtrain.engines import FullState
from ardtrain.methods.base import StateKind
from ardtrain.ranks import Dense, RankTable, Site
from ardtrain.resize import Snapshot, state_length

FORMAT_VERSION = 3  # 3: the rank table's digest by another formula; 2: parts, whose run it is
FULL = ("master", "exp_avg", "exp_avg_sq")
PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
TRAINER = "state/trainer.json"

_STATE_FILE = re.compile(r"state/arena(-\d{5}-of-\d{5})?\.safetensors")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_COUNT = 1 << 53


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as values: snapshot and its layout, the loop's state, the manifest, and what this run changed."""

    snapshot: Snapshot
    layout: ArenaLayout
    loop: dict[str, Any]
    manifest: dict[str, Any]
    path: Path
    changes: list[str] = field(default_factory=list)


# ---- names <-> tensors ----


def named(snapshot: Snapshot, layout: ArenaLayout) -> dict[str, Tensor]:
    """The snapshot by names of the base's modules: views of it where it has them flat, births new."""
    flats = {name: getattr(snapshot.full, name) for name in FULL} | snapshot.entries
    out: dict[str, Tensor] = {}
    for block in layout.all_blocks:
        for name, flat in flats.items():
            out[f"{block.module}.{block.part}.{name}"] = block.of(flat)
    table = snapshot.table
    for i, site in enumerate(table.sites):
        if table.ranks[i]:
            out[f"{site.name}.birth"] = torch.tensor(table.births[i], dtype=torch.int64)
            out[f"{site.name}.age"] = snapshot.age[table.offsets[i] : table.offsets[i + 1]]
    for name, values in (snapshot.components | snapshot.sites).items():
        out[f"method.{name}"] = values
    return out


def to_tensors(snapshot: Snapshot, layout: ArenaLayout) -> dict[str, Tensor]:
    """`named` as copies."""
    return {name: t.clone() for name, t in named(snapshot, layout).items()}


def blank(table: RankTable, layout: ArenaLayout, *, kinds: Mapping[str, StateKind], steps: int) -> Snapshot:
    """A snapshot of zeros to read into."""
    entries = {name: torch.zeros(layout.size) for name, kind in kinds.items() if kind == "per_entry"}
    others = {
        name: torch.zeros(state_length(kind, table), dtype=torch.float64)
        for name, kind in kinds.items()
        if name not in entries
    }
    components = {name: t for name, t in others.items() if kinds[name] == "per_component"}
    full = FullState(torch.zeros(layout.size), torch.zeros(layout.size), torch.zeros(layout.size), steps)
    age = torch.zeros(table.total, dtype=torch.int64)
    return Snapshot(table, full, age, entries, components, {n: t for n, t in others.items() if n not in components})


def from_tensors(
    tensors: Mapping[str, Tensor], table: RankTable, layout: ArenaLayout, *, kinds: Mapping[str, StateKind], steps: int
) -> Snapshot:
    """The inverse of `to_tensors`. What the table has no place for is left out.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the rank table says.
    """
    snapshot = blank(table, layout, kinds=kinds, steps=steps)
    slots = _Slots(snapshot, layout)
    for name in slots.left():
        if name in tensors:
            slots.check(name, tensors[name].dtype, tuple(tensors[name].shape))
            slots.target(name).copy_(tensors[name])
            slots.done(name)
    slots.finish()
    return snapshot


class _Slots:
    """The places of a blank snapshot, filled one by one and in any order."""

    def __init__(self, snapshot: Snapshot, layout: ArenaLayout) -> None:
        self._table = snapshot.table
        self._named = named(snapshot, layout)
        self._births = {f"{s.name}.birth": b for s, b in zip(snapshot.table.sites, snapshot.table.births, strict=True)}
        self._left = dict.fromkeys(self._named)

    def left(self) -> list[str]:
        return list(self._left)

    def check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Is there a place for it, still empty? Raises CheckpointError."""
        if name not in self._named:
            raise CheckpointError(
                f"tensor {_cut(name)} has no place in this run; take a checkpoint of the same settings"
            )
        if name not in self._left:
            raise CheckpointError(f"tensor {name} stands in the checkpoint twice; take an earlier one")
        wanted = self._named[name]
        if shape != tuple(wanted.shape):
            raise CheckpointError(f"tensor {name} has shape {shape}, its rank table says {tuple(wanted.shape)}")
        if dtype != wanted.dtype:
            raise CheckpointError(f"tensor {name} is {_short(dtype)}, not {_short(wanted.dtype)}; take an earlier one")

    def target(self, name: str) -> Tensor:
        return self._named[name]

    def done(self, name: str) -> None:
        """Checks the values just read."""
        values = self._named[name]
        if name in self._births:
            if tuple(values.tolist()) != self._births[name]:
                raise CheckpointError(f"{name} disagrees with the rank table; the checkpoint is damaged")
        elif values.is_floating_point():
            if not bool(torch.isfinite(values).all()):
                raise CheckpointError(f"tensor {name} holds a number that is not finite; take an earlier checkpoint")
        elif bool((values < 0).any()):
            raise CheckpointError(f"tensor {name} holds a negative age; take an earlier checkpoint")
        del self._left[name]

    def finish(self) -> None:
        for name in self._left:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint; take an earlier one")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the manifest ----


def make_manifest(
    *, step: int, table_digest: str, identity: Identity, files: Mapping[str, FileRecord], world_size: int
) -> dict[str, Any]:
    """The manifest's content, sealed."""
    return seal(
        {
            "format_version": FORMAT_VERSION,
            "step": step,
            "table_digest": table_digest,
            **identity.to_json(),
            "world_size": world_size,
            "files": {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in sorted(files.items())},
        }
    )


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of all else in it, so that a flipped bit shows here as in every other file."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return {**rest, "digest": strictjson.digest(rest)}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder, checked for itself.

    Raises:
        CheckpointError: missing, no JSON, another format, a value of another type, a file name that leads elsewhere.
    """
    file = path / MANIFEST
    manifest = strictjson.read(file)

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged ({why}); take another checkpoint")

    if not isinstance(manifest, dict):
        raise damaged("it is no JSON object")
    version = manifest.get("format_version")
    if not _is_count(version) or version == 0:
        raise damaged(f"format_version is {_cut(version)}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version} is newer than this one, {FORMAT_VERSION}; upgrade, or take another"
        )
    wanted: dict[str, type] = {"table_digest": str, "backbone": str, "data": str, "versions": dict, "files": dict}
    if version >= 2:
        wanted |= {"digest": str, "weights": dict, "method": str, "settings": dict, "changeable": dict}
    missing = [name for name in ("step", *wanted) if name not in manifest]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; take another checkpoint")
    if "digest" in manifest and manifest["digest"] != seal(manifest)["digest"]:
        raise damaged("its own digest differs")
    for name, kind in wanted.items():
        if not isinstance(manifest[name], kind):
            raise damaged(f"{name} is {_cut(manifest[name])}")
    if not _is_count(manifest["step"]):
        raise damaged(f"step is {_cut(manifest['step'])}")
    for what in ("versions", "weights"):
        if not all(isinstance(value, str) for value in manifest.get(what, {}).values()):
            raise damaged(f"{what} holds something else than text")
    number = re.fullmatch(rf"{PREFIX}(\d{{1,18}})", path.name)
    if number and int(number[1]) != manifest["step"]:
        raise damaged(f"it is of step {manifest['step']}, the folder of step {number[1]}")
    _check_files(manifest["files"], damaged)
    return manifest


def _check_files(files: Mapping[str, Any], damaged: Any) -> None:
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):  # no "..", nothing absolute, nothing hidden
            raise damaged(f"the file name {_cut(name)}")
        if not isinstance(entry, dict) or not _is_count(entry.get("bytes")) or entry["bytes"] == 0:
            raise damaged(f"no size of {name}")
        if not isinstance(entry.get("sha256"), str) or not _SHA256.fullmatch(entry["sha256"]):
            raise damaged(f"no sha256 of {name}")
    if TRAINER not in files:
        raise damaged(f"{TRAINER} is not in it")


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LARGEST_COUNT


def _cut(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def state_files(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the files that hold tensors."""
    return [name for name in manifest["files"] if _STATE_FILE.fullmatch(name)]


# ---- reading ----


def check_sizes(path: Path, manifest: Mapping[str, Any]) -> None:
    """Is every file of the manifest there, an ordinary file and as long as it says? Cheap: no file is opened.

    Raises:
        CheckpointError: with the first file named that is not.
    """
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            for folder in _folders(path, name):
                if not stat.S_ISDIR(folder.lstat().st_mode):
                    raise CheckpointError(
                        f"{file} is missing or damaged ({folder.name} is no ordinary folder); take another checkpoint"
                    )
            status = file.lstat()
        except OSError as error:
            raise CheckpointError(
                f"{file} is missing or damaged (it is not there: {error.strerror}); take another checkpoint"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is missing or damaged (it is no ordinary file); take another checkpoint")
        if status.st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} is missing or damaged ({status.st_size} bytes, the manifest says {entry['bytes']}); take "
                "another checkpoint"
            )


def _folders(path: Path, name: str) -> Iterator[Path]:
    parts = name.split("/")[:-1]
    for end in range(1, len(parts) + 1):
        yield path.joinpath(*parts[:end])


def _check_sha256(file: Path, found: str, entry: Mapping[str, Any]) -> None:
    if found != entry["sha256"]:
        raise CheckpointError(
            f"{file} is missing or damaged (its sha256 differs from the manifest's); take another checkpoint"
        )


def check_files(path: Path, manifest: Mapping[str, Any], *, besides: Sequence[str] = ()) -> None:
    """Sizes, and the sha256 of every file but those of `besides`. Raises CheckpointError."""
    check_sizes(path, manifest)
    for name, entry in manifest["files"].items():
        if name not in besides:
            _check_sha256(path / name, file_sha256(path / name), entry)


def load(
    path: Path,
    *,
    sites: tuple[Site, ...],
    parts: Parts,
    kinds: Mapping[str, StateKind],
    identity: Identity,
    dense: Sequence[Dense] = (),
) -> Loaded:
    """Reads and verifies one checkpoint, each file once; pure but for reading.

    Memory: the snapshot and 16 MiB. JSON and safetensors only: nothing is unpickled, nothing in it is a path.

    Raises:
        OtherRunError: another run's base, data, method or settings. CheckpointError: damaged, or of a newer format.
    """
    manifest = read_manifest(path)
    changes = compare(manifest, identity, path)
    tensors = state_files(manifest)
    check_files(path, manifest, besides=tensors)
    loop, steps, table = _read_trainer(path / TRAINER, sites, manifest)
    layout = ArenaLayout(table, parts, dense)
    snapshot = blank(table, layout, kinds=kinds, steps=steps)
    slots = _Slots(snapshot, layout)
    for name in tensors:
        _read_part(path / name, slots, manifest["files"][name])
    try:
        slots.finish()
    except CheckpointError as error:
        raise CheckpointError(f"{path / 'state'}: {error}") from error
    return Loaded(snapshot, layout, loop, manifest, path, changes)


def _read_part(file: Path, slots: _Slots, entry: Mapping[str, Any]) -> None:
    problem: CheckpointError | None = None
    try:
        with TensorReader(file) as reader:
            for tensor in reader.entries:
                slots.check(tensor.name, tensor.dtype, tensor.shape)
                reader.read_into(slots.target(tensor.name))
                slots.done(tensor.name)
            found = reader.sha256()
    except CheckpointError as error:
        problem, found = error, file_sha256(file)
    _check_sha256(file, found, entry)  # a flipped bit is the better reason than what follows from it
    if problem is not None:
        text = str(problem)
        raise CheckpointError(text if str(file) in text else f"{file}: {text}") from problem


def _read_trainer(
    file: Path, sites: tuple[Site, ...], manifest: Mapping[str, Any]
) -> tuple[dict[str, Any], int, RankTable]:
    """The loop's values, Adam's counter and the rank table."""
    trainer = strictjson.read(file)
    if not isinstance(trainer, dict) or not isinstance(trainer.get("loop"), dict):
        raise CheckpointError(f"{file} is damaged (the loop's values are missing); take another checkpoint")
    steps = trainer.get("adam_steps")
    if not _is_count(steps):
        raise CheckpointError(f"{file} is damaged (adam_steps is {_cut(steps)}); take another checkpoint")
    problem = _table_problem(trainer.get("table"), sites)
    if problem:
        raise CheckpointError(f"{file} is damaged (the rank table: {problem}); take another checkpoint")
    try:
        table = RankTable.from_json(trainer["table"], sites)
    except ValueError as error:
        raise OtherRunError(f"{file.parent.parent}: {error}") from error
    digest = table.digest if manifest["format_version"] >= 3 else table.first_digest
    if digest != manifest["table_digest"]:
        raise OtherRunError(
            f"{file.parent.parent}: its rank table belongs to sites of other shapes or scale (r, lora_alpha); resume "
            "with the settings it was written with"
        )
    return trainer["loop"], steps, table


def _table_problem(table: Any, sites: Sequence[Site]) -> str:
    """What is wrong with a rank table's JSON in itself; "" where nothing is. Other sites are not its fault."""
    if not isinstance(table, dict) or not isinstance(table.get("sites"), list):
        return "no list of sites"
    largest = {site.name: site.max_rank for site in sites}
    for entry in table["sites"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"].isprintable():
            return "a site without a name"
        name, births, following = entry["name"], entry.get("births"), entry.get("next_birth")
        if not isinstance(births, list) or not all(_is_count(b) for b in births) or not _is_count(following):
            return f"{_cut(name)} has births that are no numbers"
        if len(set(births)) < len(births):
            return f"{_cut(name)} has a birth number twice"
        if any(b >= following for b in births):
            return f"{_cut(name)} has a birth number beyond next_birth"
        if name in largest and len(births) > largest[name]:
            return f"{_cut(name)} has rank {len(births)}, more than {largest[name]}"
    return ""
