"""Which checkpoints a run folder holds: candidates, pointers, pruning, what a crash left; is it writable.

Names in a run folder: `checkpoint-30` complete; `.checkpoint-30.tmp-TOKEN` being written; `.checkpoint-30.old` set
aside while a newer one of the same step takes its name; `.checkpoint-30.removed` on its way out. Each change of name is
one rename, so a name without a dot is never half of anything; `clean` takes back or finishes what a crash interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ardtrain.arena import ArenaLayout, Parts
from ardtrain.checkpoint import strictjson
from ardtrain.checkpoint.errors import CheckpointError, OtherRunError
from ardtrain.checkpoint.format import FULL, MANIFEST, PREFIX, Loaded, check_sizes, load, read_manifest
from ardtrain.checkpoint.identity import Identity
from ardtrain.faults import replace_file
from ardtrain.methods.base import StateKind
from ardtrain.ranks import Dense, Site

POINTERS = ("latest", "best")

_NAME = re.compile(rf"{PREFIX}(\d{{1,18}})")
_LEFT = re.compile(rf"\.({PREFIX}\d{{1,18}})\.(tmp-\w+|tmp|removed|old)")
_logger = logging.getLogger(__name__)


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders that bear a checkpoint's name, oldest first; complete or not."""
    found = [(int(match[1]), path) for path in _entries(run_dir) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if os.path.isdir(path)]


def _entries(run_dir: Path) -> list[Path]:
    try:
        return [run_dir / name for name in sorted(os.listdir(run_dir))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"output_dir={run_dir} cannot be read ({error.strerror}); make it readable, or choose another"
        ) from error


def candidates(run_dir: Path, resume_from: str | None) -> list[Path]:
    """What a resume may take, best first.

    None: nothing. A path: that one alone. `auto`: the one that `latest` names, then the older ones, newest first; last
    the ones beyond `latest` (a longer run's that was resumed from before them, or one whose pointer a crash prevented).

    Raises:
        CheckpointError: a path is named that holds no checkpoint.
    """
    if resume_from is None:
        return []
    if resume_from != "auto":
        path = Path(resume_from)
        if not os.path.isfile(path / MANIFEST):
            raise CheckpointError(
                f"resume_from_checkpoint={resume_from}: {path} holds no {MANIFEST}; name a complete checkpoint"
            )
        return [path]
    found = checkpoints(run_dir)[::-1]
    names = [path.name for path in found]
    latest = pointed(run_dir, "latest")
    if latest not in names:
        return found
    at = names.index(latest)
    return found[at:] + found[:at]


def load_newest(
    run_dir: Path,
    resume_from: str | None,
    *,
    sites: tuple[Site, ...],
    parts: Parts,
    kinds: Mapping[str, StateKind],
    identity: Identity,
    dense: Sequence[Dense] = (),
) -> tuple[Loaded | None, list[str]]:
    """The newest intact checkpoint, read and verified, and a line for each that was passed over; None: a first start.

    Only damage is passed over: another run's checkpoint is refused, and so is a damaged one that was named by its path.

    Raises:
        OtherRunError, CheckpointError: as `load`; or none is intact, with each one's damage.
    """
    skipped: list[str] = []
    latest = pointed(run_dir, "latest") if resume_from == "auto" else None
    found = candidates(run_dir, resume_from)
    if latest is not None and latest not in [path.name for path in found]:
        skipped.append(f"{run_dir / 'latest'} names {latest}, which is not there")
    for path in found:
        try:
            loaded = load(path, sites=sites, parts=parts, kinds=kinds, identity=identity, dense=dense)
        except OtherRunError:
            raise
        except CheckpointError as error:
            if resume_from != "auto":
                raise
            skipped.append(str(error))
        else:
            return loaded, skipped
    if skipped:
        listed = "".join(f"\n- {line}" for line in skipped)
        raise CheckpointError(
            f"resume_from_checkpoint=auto: {run_dir} holds no intact checkpoint:{listed}\nRestore one of them, or "
            "start in a new output_dir"
        )
    return None, []


def pointed(run_dir: Path, pointer: str) -> str | None:
    """The folder's name that `latest` or `best` holds; None where there is none, or no checkpoint's name in it."""
    try:
        name = (run_dir / pointer).read_bytes()[:64].decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return name if _NAME.fullmatch(name) else None


def point(run_dir: Path, pointer: str, name: str) -> None:
    """Makes `latest` or `best` name a complete checkpoint. Raises OSError."""
    replace_file(run_dir / pointer, name + "\n")
    strictjson.sync(run_dir)


def looks_complete(path: Path) -> bool:
    """Is its manifest sound and every file there and of its size? (No content is read.)"""
    try:
        check_sizes(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def prune(run_dir: Path, limit: int | None) -> list[Path]:
    """Removes the oldest checkpoints beyond `limit`; never what `latest` and `best` name, nor the newest complete one.

    A folder that is a link is somebody's own doing and stays.

    Raises:
        OSError: one could not be removed; none is left half under its own name.
    """
    found = [path for path in checkpoints(run_dir) if not path.is_symlink()]
    if limit is None or len(found) <= limit:
        return []
    kept = {pointed(run_dir, pointer) for pointer in POINTERS}
    kept |= {next((path.name for path in reversed(found) if looks_complete(path)), None)}
    removed = [path for path in found[: len(found) - limit] if path.name not in kept]
    for path in removed:
        aside = run_dir / f".{path.name}.removed"
        remove_folder(aside)
        os.replace(path, aside)
        remove_folder(aside)
    return removed


def remove_folder(path: Path) -> None:
    """Removes a folder and all in it, if it is there."""
    if path.exists():
        shutil.rmtree(path)


def clean(run_dir: Path) -> list[str]:
    """Finishes or takes back what a crash interrupted; process 0 alone, while nobody saves. One line for each thing.

    An `.old` whose successor is not there gets its name again; all other folders with a dot are removed.
    """
    notes: list[str] = []
    for path in _entries(run_dir):
        match = _LEFT.fullmatch(path.name)
        if match is None:
            if re.fullmatch(rf"\.({'|'.join(POINTERS)})\.\d+\.tmp", path.name):
                with contextlib.suppress(OSError):
                    path.unlink()
            continue
        final = run_dir / match[1]
        try:
            if match[2] == "old" and not final.exists():
                os.replace(path, final)
                strictjson.sync(run_dir)
                notes.append(f"{final} was set aside by a save that did not end; it has its name again")
            else:
                remove_folder(path)
                notes.append(f"removed {path}, left by a save that did not end")
        except OSError as error:
            notes.append(f"{path}, left by a save that did not end, could not be removed ({error.strerror})")
    return notes


def state_bytes(layout: ArenaLayout, kinds: Mapping[str, StateKind]) -> int:
    """Bytes of a checkpoint's tensors and of the adapter beside them (README): what a save needs, near enough."""
    per_entry = len(FULL) + sum(kind == "per_entry" for kind in kinds.values())
    per_component = 2 + sum(kind == "per_component" for kind in kinds.values())  # birth, age
    return (per_entry + 1) * 4 * layout.num_trained + per_component * 8 * layout.table.total


def check_writable(run_dir: Path, needed_bytes: int = 0) -> None:
    """Can a checkpoint be written here? Tries it before the first step: folder, file, sync, rename, free space.

    Every process that writes may call it at once; it leaves nothing behind.

    Raises:
        CheckpointError: with the setting, the reason and the remedy.
    """
    trial = run_dir / f".writable-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        trial.mkdir()
        try:
            strictjson.write_bytes(trial / "a", b"ardtrain\n")
            os.replace(trial / "a", trial / "b")
            strictjson.sync(trial)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        space = os.statvfs(run_dir)
    except OSError as error:
        raise CheckpointError(
            f"output_dir={run_dir} cannot be written ({error.strerror or error}): checkpoints go there; make it a "
            "writable folder, free some space, or choose another"
        ) from error
    free = space.f_bavail * space.f_frsize
    if free < needed_bytes:
        raise CheckpointError(
            f"output_dir={run_dir} has {_size(free)} free, one checkpoint takes about {_size(needed_bytes)}; free some "
            "space, or choose another folder"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.1f} MiB"
