"""Save, verify, load and prune checkpoints: rank-independent state, safetensors and JSON only, nothing unpickled.

`checkpoint-N/` (N optimizer steps done) is written beside its final name and renamed when it is complete and verified;
`latest` and `best` are files that name complete checkpoints only. The state holds full tensors by matrix, never the
flat vector, so another world size, ZeRO stage, offload or a later layout read it alike (architecture.md 9).

state/arena.safetensors: `<module>.{lora_A,lora_B,diagonal}.{master,exp_avg,exp_avg_sq,<method's per-entry names>}` as
[r, columns] float32; `<site>.{birth,age}` [r] int64; `method.<name>` for per-component and per-site arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ardtrain.arena import ArenaLayout, Parts
from ardtrain.engines import FullState
from ardtrain.faults import replace_file
from ardtrain.methods.base import StateKind
from ardtrain.ranks import Dense, RankTable, Site
from ardtrain.resize import Snapshot, state_length

FORMAT_VERSION = 1
FULL = ("master", "exp_avg", "exp_avg_sq")
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: resuming with other data or another base would continue another run.

    backbone, data: sha256 of the base's config and shapes, and of the tokenised rows and their order settings.
    """

    backbone: str
    data: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as values: snapshot and its layout, the loop's state, and the manifest."""

    snapshot: Snapshot
    layout: ArenaLayout
    loop: dict[str, Any]
    manifest: dict[str, Any]
    path: Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says which file, why, and what to do."""


def to_tensors(snapshot: Snapshot, layout: ArenaLayout) -> dict[str, Tensor]:
    """The snapshot by names of the base's modules."""
    flats = {name: getattr(snapshot.full, name) for name in FULL} | snapshot.entries
    out: dict[str, Tensor] = {}
    for block in layout.all_blocks:
        for name, flat in flats.items():
            out[f"{block.module}.{block.part}.{name}"] = block.of(flat).clone()
    table = snapshot.table
    for i, site in enumerate(table.sites):
        if table.ranks[i]:
            out[f"{site.name}.birth"] = torch.tensor(table.births[i], dtype=torch.int64)
            out[f"{site.name}.age"] = snapshot.age[table.offsets[i] : table.offsets[i + 1]].clone()
    for name, values in (snapshot.components | snapshot.sites).items():
        out[f"method.{name}"] = values.clone()
    return out


def from_tensors(
    tensors: Mapping[str, Tensor], table: RankTable, layout: ArenaLayout, *, kinds: Mapping[str, StateKind], steps: int
) -> Snapshot:
    """The inverse of `to_tensors`.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the rank table says.
    """
    entry_names = [n for n, kind in kinds.items() if kind == "per_entry"]
    flats = {name: torch.zeros(layout.size) for name in (*FULL, *entry_names)}
    for block in layout.all_blocks:
        for name, flat in flats.items():
            key = f"{block.module}.{block.part}.{name}"
            block.of(flat).copy_(_take(tensors, key, (block.rows, block.columns)))
    age = torch.zeros(table.total, dtype=torch.int64)
    for i, site in enumerate(table.sites):
        if table.ranks[i]:
            births = _take(tensors, f"{site.name}.birth", (table.ranks[i],)).tolist()
            if tuple(births) != table.births[i]:
                raise CheckpointError(f"{site.name}.birth disagrees with the rank table; the checkpoint is damaged")
            age[table.offsets[i] : table.offsets[i + 1]] = _take(tensors, f"{site.name}.age", (table.ranks[i],))
    full = FullState(flats["master"], flats["exp_avg"], flats["exp_avg_sq"], steps)
    others = {
        n: _take(tensors, f"method.{n}", (state_length(kind, table),)) for n, kind in kinds.items() if n not in flats
    }
    components = {n: t for n, t in others.items() if kinds[n] == "per_component"}
    sites = {n: t for n, t in others.items() if n not in components}
    return Snapshot(table, full, age, {n: flats[n] for n in entry_names}, components, sites)


def _take(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"tensor {key} is missing from the checkpoint; take an earlier one")
    if tuple(tensors[key].shape) != shape:
        raise CheckpointError(f"tensor {key} has shape {tuple(tensors[key].shape)}, its rank table says {shape}")
    return tensors[key]


def save(
    run_dir: Path,
    snapshot: Snapshot,
    layout: ArenaLayout,
    *,
    step: int,
    loop: Mapping[str, Any],
    identity: Identity,
    write_adapter: Any,
) -> Path:
    """Writes `checkpoint-<step>` on one process and returns its path; complete and verified, or not there.

    write_adapter: function of a folder that writes the PEFT adapter into it.
    """
    final = run_dir / f"{PREFIX}{step}"
    building = run_dir / f".{PREFIX}{step}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    (building / "state").mkdir(parents=True)
    tensors = to_tensors(snapshot, layout)
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise RuntimeError(f"step {step}: {bad[0]} holds a number that is not finite; the checkpoint was not written")
    trainer = {"loop": dict(loop), "adam_steps": snapshot.full.steps, "table": snapshot.table.to_json()}
    (building / "state" / "trainer.json").write_text(json.dumps(trainer))
    arena = building / "state" / "arena.safetensors"
    save_file(tensors, arena)
    arena.chmod((building / "state" / "trainer.json").stat().st_mode)  # safetensors writes for the owner alone
    write_adapter(building / "adapter")
    _compare_with_disk(arena, tensors)
    files = sorted(p for p in building.rglob("*") if p.is_file())
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "table_digest": snapshot.table.digest,
        **asdict(identity),
        "files": {str(p.relative_to(building)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files},
    }
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in building.rglob("*"):
        _sync(path)
    aside = run_dir / f".{PREFIX}{step}.old"
    remove_folder(aside)
    if final.exists():  # left by an earlier run of the same folder beyond its resume point
        os.replace(final, aside)
    os.replace(building, final)
    _sync(run_dir)
    replace_file(run_dir / "latest", final.name + "\n")
    remove_folder(aside)
    return final


def _compare_with_disk(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as stored:
        names = set(stored.keys())
        wrong = [n for n, t in tensors.items() if n not in names or not torch.equal(stored.get_tensor(n), t)]
    if wrong:
        raise RuntimeError(f"{path}: {wrong[0]} reads back other than written; is the disk full or failing?")


def prune(run_dir: Path, limit: int | None) -> list[Path]:
    """Removes the oldest checkpoints beyond `limit`, never the ones that `latest` and `best` name."""
    if limit is None:
        return []
    kept = {name for name in (pointed(run_dir, "latest"), pointed(run_dir, "best")) if name is not None}
    own = [p for p in run_dir.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    found = sorted(own, key=lambda p: int(p.name.removeprefix(PREFIX)))
    removed = []
    for path in found[: max(0, len(found) - limit)]:
        if path.name not in kept:
            shutil.rmtree(path)
            removed.append(path)
    return removed


def pointed(run_dir: Path, pointer: str) -> str | None:
    """The folder's name that `latest` or `best` holds, if any."""
    path = run_dir / pointer
    return path.read_text().strip() if path.is_file() else None


def find(run_dir: Path, resume_from: str | None) -> Path | None:
    """The checkpoint to resume from: None, `auto` (the one `latest` names, if any) or a path.

    Raises:
        CheckpointError: it is named but not there.
    """
    if resume_from is None:
        return None
    if resume_from == "auto":
        name = pointed(run_dir, "latest")
        if name is None:
            return None
        path = run_dir / name
    else:
        path = Path(resume_from)
    if not (path / "manifest.json").is_file():
        raise CheckpointError(
            f"resume_from_checkpoint={resume_from}: {path} holds no manifest.json; name a complete one"
        )
    return path


def load(
    path: Path,
    *,
    sites: tuple[Site, ...],
    parts: Parts,
    kinds: Mapping[str, StateKind],
    identity: Identity,
    dense: Sequence[Dense] = (),
) -> Loaded:
    """Reads and verifies one checkpoint; pure but for reading.

    Raises:
        CheckpointError: another format, a damaged file, or another run's base or data.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        names = ("format_version", "step", "table_digest", "files", "backbone", "data")
        missing = [name for name in names if name not in manifest]
    except ValueError as error:
        raise CheckpointError(f"{path / 'manifest.json'} is no JSON ({error}); take another checkpoint") from error
    if missing:
        raise CheckpointError(f"{path / 'manifest.json'} lacks {', '.join(missing)}; take another checkpoint")
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {manifest['format_version']} is newer than this one, {FORMAT_VERSION}; upgrade"
        )
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file} is missing or damaged (its sha256 differs from the manifest's); take another"
            )
    for what in ("backbone", "data"):
        if manifest[what] != getattr(identity, what):
            raise CheckpointError(
                f"{path} was written with another {what} (fingerprint {manifest[what][:12]}, now "
                f"{getattr(identity, what)[:12]}); resume with the same one, or start in a new output_dir"
            )
    trainer = json.loads((path / "state" / "trainer.json").read_text())
    try:
        table = RankTable.from_json(trainer["table"], sites)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if table.digest != manifest["table_digest"]:
        raise CheckpointError(
            f"{path}: its rank table belongs to sites of other shapes or scale (r, lora_alpha); resume with the "
            "settings it was written with"
        )
    layout = ArenaLayout(table, parts, dense)
    with safe_open(path / "state" / "arena.safetensors", framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    snapshot = from_tensors(tensors, table, layout, kinds=kinds, steps=int(trainer["adam_steps"]))
    return Loaded(snapshot, layout, trainer["loop"], manifest, path)


def remove_folder(path: Path) -> None:
    """Removes a folder and all in it, if it is there."""
    if path.exists():
        shutil.rmtree(path)


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
