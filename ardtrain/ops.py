"""DeepSpeed's compiled ops on this host: where they lie, which there are, and locks of compiles that were killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

STALE_LOCK_SECONDS = 1800.0  # a compile of one op takes up to some minutes, more on a busy machine


def extensions_folder() -> Path:
    """Where torch builds DeepSpeed's ops at first use."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def compiled_ops(folder: Path) -> list[str]:
    """Names of the ops that need no compile any more."""
    return sorted({path.stem for path in folder.glob("**/*.so")})


def locks(folder: Path) -> dict[Path, float]:
    """Lock files of compiles -> their age in seconds. A compile waits for ever for the lock of one that was killed."""
    found: dict[Path, float] = {}
    for path in folder.glob("**/lock"):
        try:
            found[path] = time.time() - path.stat().st_mtime
        except OSError:  # its compile has just ended
            continue
    return found


def remove_stale_locks(folder: Path) -> list[Path]:
    """Removes lock files that a killed compile left behind. One process a machine calls this, before any op loads.

    Raises:
        ValueError: one cannot be removed, and the op would wait for it for ever.
    """
    stale = [path for path, age in locks(folder).items() if age > STALE_LOCK_SECONDS]
    for path in stale:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"{path}, left by a compile that was killed, cannot be removed ({error.strerror}); remove it, or set "
                "TORCH_EXTENSIONS_DIR to a folder of your own"
            ) from error
    return stale
