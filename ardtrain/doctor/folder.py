"""Do all hosts see one run folder? Each writes a file that the others must see; all files are removed."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from ardtrain.doctor.disk import nearest_folder


class SharedFolder:
    """One process's side of the test, in the run folder or, before it is made, the nearest one above it.

    Process 0 draws the token and finds the folder; the others take its token and go as many levels up from the run
    folder as they know it.
    """

    def __init__(self, run_dir: Path, *, token: str | None = None, levels: int | None = None) -> None:
        if levels is None:
            levels = [run_dir, *run_dir.parents].index(nearest_folder(run_dir))
        self.levels = levels
        self.token = token or secrets.token_hex(8)
        self.path = [run_dir, *run_dir.parents][min(levels, len(run_dir.parents))]
        self._own: Path | None = None

    def write(self, process: int) -> str | None:
        """Writes this process's file; returns why it could not."""
        path = self._file(process)
        try:
            with path.open("x") as file:
                self._own = path
                file.write(self.token)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error.strerror or str(error)
        return None

    def sees(self, process: int, *, seconds: float = 2.0) -> bool:
        """Whether another process's file is here, with its token; waits a little, for network disks."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if self._file(process).read_text() == self.token:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def clean(self) -> None:
        """Removes this process's file."""
        if self._own is not None:
            with contextlib.suppress(OSError):
                self._own.unlink()

    def _file(self, process: int) -> Path:
        return self.path / f".doctor-{self.token}-{process}"
