"""Writing one checkpoint: parts by many processes, all else by process 0, each step on the disk before the next.

Coordination is by files in the attempt's folder, since it runs beside the training loop's collectives: each process
leaves `.parts/00002.json` when its part is on the disk and reads back as written; process 0 waits for all of them. The
rename to `checkpoint-N` comes last, the pointers after it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardtrain.arena import ArenaLayout
from ardtrain.checkpoint import strictjson
from ardtrain.checkpoint.errors import CheckpointError
from ardtrain.checkpoint.finding import clean, point, prune, remove_folder
from ardtrain.checkpoint.format import MANIFEST, PREFIX, TRAINER, check_sizes, make_manifest, named, read_manifest
from ardtrain.checkpoint.identity import Identity
from ardtrain.checkpoint.tensorfile import (
    FileRecord,
    TensorReader,
    compare_tensors,
    file_sha256,
    write_tensors,
)
from ardtrain.resize import Snapshot

PARTS = ".parts"  # in the attempt's folder: what the processes tell each other
POLL_SECONDS = 0.005  # at first; then ever longer, up to a second
PART_SECONDS = 600.0

WriteAdapter = Callable[[Path], object]
"""Function of a folder, not there yet, that writes the PEFT adapter into it."""

_logger = logging.getLogger(__name__)


class AfterwardsError(RuntimeError):
    """The checkpoint stands, complete and under its name, but a pointer or the pruning failed."""


@dataclass(frozen=True)
class Content:
    """All that one checkpoint says; nothing else may touch the snapshot while it is written."""

    snapshot: Snapshot
    layout: ArenaLayout
    step: int
    loop: Mapping[str, Any]
    identity: Identity
    write_adapter: WriteAdapter


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Which of `count` writers takes which tensor: neighbours together, by the bytes; a writer may get none."""
    total = sum(sizes)
    out: list[list[int]] = [[] for _ in range(count)]
    begin = 0
    for index, size in enumerate(sizes):
        middle = 2 * begin + size
        out[min(count - 1, middle * count // (2 * total)) if total else 0].append(index)
        begin += size
    return out


@dataclass(frozen=True)
class Part:
    """One process's share of the tensors and its file's name under the checkpoint; None: it has none."""

    file: str | None
    tensors: Mapping[str, Tensor]


def parts_of(tensors: Mapping[str, Tensor], count: int) -> list[Part]:
    """The parts of all processes; a function of names and sizes, so that every process knows all of them."""
    names = list(tensors)
    shares = deal([tensors[n].numel() * tensors[n].element_size() for n in names], count)
    num_files = sum(bool(share) for share in shares)
    out: list[Part] = []
    number = 0
    for share in shares:
        number += bool(share)
        file = f"state/arena-{number:05d}-of-{num_files:05d}.safetensors" if share else None
        out.append(Part(file, {names[i]: tensors[names[i]].contiguous() for i in share}))
    return out


def new_attempt(run_dir: Path, step: int) -> Path:
    """An empty folder of a name that no earlier attempt had. Process 0 alone. Raises OSError."""
    for note in clean(run_dir):
        _logger.warning("%s", note)
    building = run_dir / f".{PREFIX}{step}.tmp-{secrets.token_hex(6)}"
    building.mkdir()
    (building / "state").mkdir()
    (building / PARTS).mkdir()
    return building


def write_part(building: Path, part: Part, *, step: int) -> FileRecord | None:
    """One process's tensors on the disk, compared with what was to be written.

    Raises:
        RuntimeError: a number is not finite, or the disk gives back another. OSError.
    """
    if part.file is None:
        return None
    for name, t in part.tensors.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise RuntimeError(f"step {step}: {name} holds a number that is not finite; the checkpoint was not written")
    file = building / part.file
    try:
        record = write_tensors(file, part.tensors)
        compare_tensors(file, part.tensors)
    except BaseException:
        with contextlib.suppress(OSError):
            file.unlink()  # on a full disk this makes room for the text that says so
        raise
    return record


def report_part(building: Path, global_rank: int, record: FileRecord | None, error: str | None = None) -> None:
    """Leaves word for process 0: the part's record, None for no part, or an error's text. Raises OSError."""
    told: dict[str, Any] = {"error": error, "record": asdict(record) if record else None}
    path = building / PARTS / f"{global_rank:05d}.json"
    temporary = path.with_suffix(f".{secrets.token_hex(4)}")
    strictjson.write(temporary, told)
    os.replace(temporary, path)


def report_failure(building: Path, global_rank: int, error: str) -> None:
    """`report_part` of an error; by a folder where no file can be written (a full disk's error). Never raises."""
    try:
        report_part(building, global_rank, None, error)
    except OSError:
        with contextlib.suppress(OSError):  # process 0 waits in vain then, not for ever
            (building / PARTS / f"{global_rank:05d}.failed").mkdir()


def await_parts(building: Path, count: int, *, seconds: float = PART_SECONDS) -> dict[int, FileRecord | None]:
    """Waits for every other process's word. `count`: processes.

    Raises:
        RuntimeError: a process failed, or did not report in time. OSError.
    """
    waiting = set(range(1, count))
    out: dict[int, FileRecord | None] = {}
    deadline = time.monotonic() + seconds
    pause = POLL_SECONDS
    while waiting:
        there = set(os.listdir(building / PARTS))  # asks the server, where a stat may answer from memory
        for number in sorted(waiting):
            if f"{number:05d}.failed" in there:
                raise RuntimeError(f"process {number} could not write its part, nor say why: is the disk full?")
            if f"{number:05d}.json" in there:
                out[number] = _read_report(building / PARTS / f"{number:05d}.json", number)
        waiting -= out.keys()
        if waiting and time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(waiting)} did not write their parts within {seconds:g} s")
        if waiting:
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
    return out


def _read_report(path: Path, number: int) -> FileRecord | None:
    told = strictjson.read(path)
    if told["error"] is not None:
        raise RuntimeError(f"process {number} could not write its part: {told['error']}")
    return FileRecord(**told["record"]) if told["record"] else None


def check_part(building: Path, part: Part, record: FileRecord | None) -> None:
    """Does process 0 see the file another process wrote: its size, its sha256, its tensors' names and shapes?

    Raises:
        RuntimeError: not so.
    """
    if part.file is None:
        return
    file = building / part.file
    try:
        with TensorReader(file) as reader:
            there = {e.name: (e.dtype, e.shape) for e in reader.entries}
            found = FileRecord(file.stat().st_size, reader.sha256())
    except (CheckpointError, OSError) as error:
        raise RuntimeError(f"a part that another process wrote is not as it said: {error}") from error
    if found != record or there != {n: (t.dtype, tuple(t.shape)) for n, t in part.tensors.items()}:
        raise RuntimeError(f"{file} is not what the process that wrote it says; is the folder the same everywhere?")


def finish(
    run_dir: Path,
    building: Path,
    content: Content,
    records: Mapping[str, FileRecord],
    *,
    world_size: int,
    is_best: bool = False,
    limit: int | None = None,
) -> Path:
    """All but the parts, then the name, the pointers, and the pruning. Process 0 alone; returns the final folder.

    records: file -> what was written, of all parts.

    Raises:
        OSError; ValueError: the loop's values are no JSON; whatever the adapter's writer raises: no checkpoint of this
            step came to be. AfterwardsError: it did.
    """
    step, table = content.step, content.snapshot.table
    trainer = {"loop": dict(content.loop), "adam_steps": content.snapshot.full.steps, "table": table.to_json()}
    strictjson.write(building / TRAINER, trainer)
    if strictjson.read(building / TRAINER) != strictjson.plain(trainer):
        raise RuntimeError(f"{building / TRAINER} reads back other than written; is the disk full or failing?")
    content.write_adapter(building / "adapter")
    shutil.rmtree(building / PARTS)
    files = dict(records)
    for path in _files_in(building):
        name = path.relative_to(building).as_posix()
        if name not in files:
            files[name] = FileRecord(path.stat().st_size, file_sha256(path))
        if files[name].bytes == 0:
            raise RuntimeError(f"step {step}: {name} came out empty; the checkpoint was not written")
    manifest = make_manifest(
        step=step, table_digest=table.digest, identity=content.identity, files=files, world_size=world_size
    )
    strictjson.write(building / MANIFEST, manifest, indent=1)
    check_sizes(building, read_manifest(building))
    for path in (*building.rglob("*"), building):
        strictjson.sync(path)
    final = run_dir / f"{PREFIX}{step}"
    _rename(building, final)
    try:
        point(run_dir, "latest", final.name)
        if is_best:
            point(run_dir, "best", final.name)
        prune(run_dir, limit)
    except OSError as error:
        raise AfterwardsError(
            f"{final.name} was saved, but `latest`, `best` or save_total_limit could not follow ({reason(error)})"
        ) from error
    return final


def reason(error: BaseException) -> str:
    """An error as a part of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _rename(building: Path, final: Path) -> None:
    """Gives a complete folder its name; one of the same step (resumed, and saved again) goes only after that."""
    aside = final.with_name(f".{final.name}.old")
    remove_folder(aside)
    if final.exists():
        os.replace(final, aside)
    try:
        os.replace(building, final)
    except OSError:
        if aside.exists():
            os.replace(aside, final)
        raise
    strictjson.sync(final.parent)
    remove_folder(aside)


def save(
    run_dir: Path,
    snapshot: Snapshot,
    layout: ArenaLayout,
    *,
    step: int,
    loop: Mapping[str, Any],
    identity: Identity,
    write_adapter: WriteAdapter,
) -> Path:
    """Writes `checkpoint-<step>` on one process, waits for it, returns its path; complete and verified, or not there.

    write_adapter: function of a folder that writes the PEFT adapter into it.

    Raises:
        RuntimeError: a number is not finite, or the disk gives back another. OSError.
    """
    content = Content(snapshot, layout, step, loop, identity, write_adapter)
    building = new_attempt(run_dir, step)
    try:
        (part,) = parts_of(named(snapshot, layout), 1)
        record = write_part(building, part, step=step)
        records = {part.file: record} if part.file is not None and record is not None else {}
        return finish(run_dir, building, content, records, world_size=1)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
