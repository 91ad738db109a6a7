"""How fast a folder's disk writes and reads, and whether it can be written at all. Leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHUNK = 16 << 20
MOST = 4 << 30  # of one measurement; a tenth of the free disk if that is less


@dataclass(frozen=True)
class Speed:
    """Bytes per second."""

    write: float
    read: float


def nearest_folder(path: Path) -> Path:
    """The folder itself or, before it is made, the nearest one above it that exists."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            return folder
    return Path("/")


def free_bytes(path: Path) -> int:
    """Free for this user on the disk where the folder is, or will be."""
    stat = os.statvfs(nearest_folder(path))
    return stat.f_bavail * stat.f_frsize


def write_error(path: Path) -> str | None:
    """Why no file can be made in this folder (or where it will be made); None: it can."""
    folder = nearest_folder(path)
    if folder != path and (below := folder / path.relative_to(folder).parts[0]).exists():
        return f"{below} is no folder"
    try:
        with tempfile.TemporaryFile(prefix=".doctor-", dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def measure(path: Path, *, seconds: float = 2.0) -> Speed:
    """Writes for half of the time, reads it back for the other half, through one file without a name.

    The file is removed before the first byte is written, so that not even a killed process leaves it. Each chunk is
    forced to the disk, and dropped from the host's cache before it is read (a disk in memory ignores that).

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    data = os.urandom(CHUNK)  # disks that compress must not win
    most = max(CHUNK, min(MOST, free_bytes(path) // 10))
    with tempfile.TemporaryFile(prefix=".doctor-", dir=nearest_folder(path), buffering=0) as file:
        number = file.fileno()
        written, start = 0, time.perf_counter()
        while written < most and (written == 0 or time.perf_counter() - start < seconds / 2):
            written += os.write(number, data)
            os.fsync(number)
        write = written / (time.perf_counter() - start)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(number, 0, os.SEEK_SET)
        read, start = 0, time.perf_counter()
        while read < written and (read == 0 or time.perf_counter() - start < seconds / 2):
            read += len(os.read(number, CHUNK))
        return Speed(write, read / (time.perf_counter() - start))
