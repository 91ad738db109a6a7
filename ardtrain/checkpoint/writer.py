"""Saves in the background: the loop goes on while a thread of each process writes its part of the host copy.

No collectives here: the threads meet in the attempt's folder (saving.py), on the file system that all processes share.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ardtrain.arena import ArenaLayout
from ardtrain.checkpoint import saving
from ardtrain.checkpoint.finding import pointed
from ardtrain.checkpoint.format import PREFIX, named
from ardtrain.checkpoint.identity import Identity
from ardtrain.checkpoint.saving import Content, WriteAdapter
from ardtrain.resize import Snapshot


class Writer:
    """Writes a run's checkpoints, one at a time. Nothing it meets on the disk raises: `poll` and `wait` tell it.

    A save, in the main thread: `attempt = prepare(step)` on process 0, its text broadcast, then `start` on every
    process. Process 0's text says whether a checkpoint came to be; another process's says what its own part met.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        global_rank: int,
        world_size: int,
        limit: int | None = None,
        part_seconds: float = saving.PART_SECONDS,
    ) -> None:
        """Settings; no thread yet.

        Args:
            limit: save_total_limit. part_seconds: how long process 0 waits for the others' parts.
        """
        self._run_dir, self._global_rank, self._world_size = run_dir, global_rank, world_size
        self._limit, self._part_seconds = limit, part_seconds
        self._thread: threading.Thread | None = None
        self._errors: deque[str] = deque()
        self.saved: Path | None = None
        """The last checkpoint that this writer completed; process 0 alone."""

    @property
    def busy(self) -> bool:
        """Is a save going on?"""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, step: int) -> str:
        """Makes the folder of a new attempt, after the last save has ended, and gives its name; process 0 alone.

        "": it cannot be made; `start` does nothing with that, and `poll` tells why.
        """
        self._join()
        try:
            return saving.new_attempt(self._run_dir, step).name
        except Exception as error:
            self._tell(step, error)
            return ""

    def start(
        self,
        attempt: str,
        snapshot: Snapshot,
        layout: ArenaLayout,
        *,
        step: int,
        loop: Mapping[str, Any],
        identity: Identity,
        write_adapter: WriteAdapter,
        is_best: bool = False,
    ) -> None:
        """Begins to write and returns at once, after the last save has ended. Every process of the run calls it.

        Args:
            attempt: process 0's `prepare`. snapshot: owned by the writer from here on; nobody else may write to it.
            loop, identity: plain values, taken now. write_adapter: called on process 0 in the background.
            is_best: `best` will name it too.
        """
        self._join()
        if not attempt:
            return
        content = Content(snapshot, layout, step, copy.deepcopy(dict(loop)), identity, write_adapter)
        building = self._run_dir / attempt
        self._thread = threading.Thread(
            target=self._save, args=(building, content, is_best), name=f"{PREFIX}{step}", daemon=True
        )
        self._thread.start()

    def poll(self) -> str | None:
        """What went wrong since the last asking, without waiting; None: nothing so far."""
        errors = []
        while self._errors:
            errors.append(self._errors.popleft())
        return "\n".join(errors) or None

    def wait(self, beat: Callable[[], object] | None = None) -> str | None:
        """Waits for the save that is going on, then as `poll`.

        beat: called about once a second meanwhile (a watchdog's `touch`).
        """
        self._join(beat)
        return self.poll()

    def _join(self, beat: Callable[[], object] | None = None) -> None:
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(timeout=1.0)
            if beat is not None:
                beat()
        self._thread = None

    def _save(self, building: Path, content: Content, is_best: bool) -> None:
        """The thread. It must end in any case, with the folder gone unless it has become the checkpoint."""
        try:
            if self._global_rank == 0:
                self._save_all(building, content, is_best)
            else:
                self._save_part(building, content)
        except BaseException as error:
            if self._global_rank == 0:
                shutil.rmtree(building, ignore_errors=True)
            elif isinstance(error, FileNotFoundError) and not building.exists():
                error = RuntimeError("process 0 had given it up")
            self._tell(content.step, error)

    def _save_part(self, building: Path, content: Content) -> None:
        part = saving.parts_of(named(content.snapshot, content.layout), self._world_size)[self._global_rank]
        try:
            record = saving.write_part(building, part, step=content.step)
            saving.report_part(building, self._global_rank, record)
        except BaseException as error:
            saving.report_failure(building, self._global_rank, saving.reason(error))
            raise

    def _save_all(self, building: Path, content: Content, is_best: bool) -> None:
        parts = saving.parts_of(named(content.snapshot, content.layout), self._world_size)
        written = {0: saving.write_part(building, parts[0], step=content.step)}
        others = saving.await_parts(building, self._world_size, seconds=self._part_seconds)
        for number, record in others.items():
            saving.check_part(building, parts[number], record)
        records = {
            part.file: record
            for number, part in enumerate(parts)
            if part.file is not None and (record := (written | others)[number]) is not None
        }
        self.saved = saving.finish(
            self._run_dir,
            building,
            content,
            records,
            world_size=self._world_size,
            is_best=is_best,
            limit=self._limit,
        )

    def _tell(self, step: int, error: BaseException) -> None:
        if self._global_rank:
            what = f"process {self._global_rank}: its part of {PREFIX}{step}"
            self._errors.append(f"{what} was not written: {saving.reason(error)}")
            return
        if isinstance(error, saving.AfterwardsError):
            self.saved = self._run_dir / f"{PREFIX}{step}"
            self._errors.append(str(error))
            return
        latest = pointed(self._run_dir, "latest")
        stays = f"{latest} stays the last one" if latest else "there is none yet"
        self._errors.append(f"{PREFIX}{step} was not saved: {saving.reason(error)}; the run goes on, {stays}")
