"""One run, or one comparison, at a time in a folder: two would write over each other's checkpoints and records.

The lock is flock's on the file `.lock`, which stays there: the system lets go of it when its process ends, however it
ends, also on another host where the file system carries locks over (NFS, Lustre with flock).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import filelock

from ardtrain.config import ConfigError

LOCK_FILE = ".lock"
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def sole_user(folder: str | Path, *, refusal: str, patience_seconds: float = 0.0) -> Iterator[None]:
    """Holds the folder. Where the file system has no locks it warns, and nothing is held.

    Args:
        patience_seconds: how long another one may take to end.
    Raises:
        ConfigError: `refusal`: another process holds it.
    """
    lock = filelock.FileLock(Path(folder, LOCK_FILE), fallback_to_soft=False)  # a soft one outlives a killed process
    try:
        lock.acquire(timeout=patience_seconds, poll_interval=0.2)
    except filelock.Timeout:
        raise ConfigError([refusal]) from None
    except (NotImplementedError, OSError) as error:
        _logger.warning("%s: not locked (%s); start nothing else in this folder", folder, error)
    try:
        yield
    finally:
        lock.release()  # does nothing when it is not held
