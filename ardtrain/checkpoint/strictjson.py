"""JSON as a checkpoint has it: read without a doubt or refused, written to the disk before it counts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from ardtrain.checkpoint.errors import CheckpointError

LARGEST_JSON_BYTES = 1 << 28  # a file of holes must not take the memory; a table of a million components has 10 MB


def open_regular(path: Path) -> FileIO:
    """A file of a checkpoint, opened for reading without a buffer.

    Raises:
        CheckpointError: it is not there, cannot be read, or is a link, a folder, a pipe or a device.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing or damaged (it is not there); take another checkpoint") from error
    except OSError as error:
        link = ": it is a symbolic link" if os.path.islink(path) else ""
        raise CheckpointError(
            f"{path} is missing or damaged (it cannot be opened{link}, {error.strerror}); take another checkpoint"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is missing or damaged (it is no ordinary file); take another checkpoint")
    return FileIO(descriptor, "rb")


def read_bytes(path: Path) -> bytes:
    """All bytes of a small file. Raises CheckpointError."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_JSON_BYTES:
                raise CheckpointError(
                    f"{path} is damaged ({size} bytes are no plausible size); take another checkpoint"
                )
            return file.readall()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); take another checkpoint") from error


def parse(content: bytes, path: Path) -> Any:
    """JSON's value. Refused beside bad syntax: NaN and infinity, a key twice, numbers beyond float64.

    Raises:
        CheckpointError: with the file named.
    """
    try:
        return json.loads(content, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); take another checkpoint") from error


def read(path: Path) -> Any:
    """`parse` of a file."""
    return parse(read_bytes(path), path)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return out


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """The value as it will be read back: tuples as lists, keys as text.

    Raises:
        ValueError: it holds NaN, infinity or no JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except TypeError as error:
        raise ValueError(str(error)) from error


def write(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Writes and syncs a new file. Raises OSError; ValueError for NaN and what JSON lacks."""
    try:
        content = json.dumps(value, indent=indent, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}; a number that is not finite, or no JSON value, is in it") from error
    write_bytes(path, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes and syncs a new file."""
    with path.open("xb", buffering=0) as file:
        write_all(file, content)
        os.fsync(file.fileno())


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """All of it: one call of the system may write a part. Raises OSError."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def sync(path: Path) -> None:
    """What stands in a file or folder survives a power cut after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
