"""DeepSpeed's own checkpoint of the trained numbers, beside ours, and a resume from it alone.

`checkpoint-N/deepspeed/` is an ordinary ZeRO checkpoint of the arena: its tools convert it to the universal format, or
to plain weights. The client state holds what is not in it: rank table, ages, the method's arrays, the loop's state.
Partitions are read as files, so another number of processes, or the universal format, resumes to the bit as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardtrain import checkpoint
from ardtrain.arena import ArenaLayout, Parts
from ardtrain.checkpoint import CheckpointError, Identity, Loaded
from ardtrain.collectives import World
from ardtrain.engines import AdapterEngine, FullState, read_zero
from ardtrain.methods.base import StateKind
from ardtrain.ranks import Dense, RankTable, Site
from ardtrain.resize import Snapshot, state_length

FOLDER = "deepspeed"
KEY = "ardtrain"
STATES = "mp_rank_00_model_states.pt"


def holds_zero(path: Path) -> bool:
    """Is this folder one of DeepSpeed's, plain or universal?"""
    return (path / STATES).is_file()


def client_state(snapshot: Snapshot, *, loop: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    """What goes beside DeepSpeed's tensors: plain values as JSON text, arrays as tensors."""
    arrays = snapshot.entries | snapshot.components | snapshot.sites
    plain = {"table": snapshot.table.to_json(), "loop": dict(loop), "identity": identity.to_json()}
    return {KEY: {"json": json.dumps(plain), "age": snapshot.age, "arrays": dict(arrays)}}


def save(folder: Path, engine: AdapterEngine, state: Mapping[str, Any], world: World) -> int:
    """Writes `folder/deepspeed`, whole or not at all. All processes must call this.

    Returns:
        Its bytes on process 0, 0 elsewhere: another host may not see the files yet.
    """
    building = f".{FOLDER}.tmp"
    if world.is_main:
        checkpoint.remove_folder(folder / building)
    world.barrier("DeepSpeed's checkpoint begins")
    engine.save_zero(folder, building, state)
    world.barrier("DeepSpeed's checkpoint is written")
    if world.is_main:
        checkpoint.remove_folder(folder / FOLDER)
        (folder / building).rename(folder / FOLDER)
    world.barrier("DeepSpeed's checkpoint has its name")
    return sum(p.stat().st_size for p in (folder / FOLDER).iterdir()) if world.is_main else 0


def load(
    path: Path,
    *,
    allow_pickle: bool,
    sites: tuple[Site, ...],
    parts: Parts,
    kinds: Mapping[str, StateKind],
    identity: Identity,
    dense: Sequence[Dense] = (),
) -> Loaded:
    """A resume from DeepSpeed's files alone. Reads only.

    Raises:
        CheckpointError: damaged, no checkpoint of ours, or another run's.
    """
    try:
        full, states = read_zero(path, allow_pickle=allow_pickle)
        own = states[KEY]
        plain = json.loads(own["json"])
        table = RankTable.from_json(plain["table"], sites)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be resumed from: {error}") from error
    changes = checkpoint.compare(plain["identity"], identity, path)
    layout = ArenaLayout(table, parts, dense)
    arrays: dict[str, Tensor] = own["arrays"]
    wrong = [n for n in kinds if n not in arrays or len(arrays[n]) != _length(kinds[n], table, layout)]
    if wrong or len(full.master) < layout.size:
        raise CheckpointError(f"{path} holds {len(full.master)} numbers and arrays that do not fit its rank table")
    master, exp_avg, exp_avg_sq = (t[: layout.size].clone() for t in (full.master, full.exp_avg, full.exp_avg_sq))
    cut = FullState(master, exp_avg, exp_avg_sq, full.steps)
    groups: dict[str, dict[str, Tensor]] = {"entries": {}, "components": {}, "sites": {}}
    for name, kind in kinds.items():
        group = {"per_entry": "entries", "per_component": "components"}.get(str(kind), "sites")
        groups[group][name] = arrays[name].clone()
    snapshot = Snapshot(table, cut, own["age"].to(torch.int64), **groups)
    return Loaded(snapshot, layout, plain["loop"], {}, path, changes)


def _length(kind: StateKind, table: RankTable, layout: ArenaLayout) -> int:
    return layout.size if kind == "per_entry" else state_length(kind, table)
