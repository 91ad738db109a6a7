"""How a run ends when something asks it to, or breaks: stop requests, status files, watchdog, broken pipes.

Nothing here communicates: a stop request is local until the step's one all-reduce carries its code, and the
watchdog is handed its store. Exit codes: 70 another process failed, or the store is gone; 86 no step for too long.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol, TextIO, cast

EXIT_PEER_FAILED = 70  # EX_SOFTWARE
EXIT_STALLED = 86
ERROR_KEY = "ardtrain/error"

State = Literal["started", "requeue", "stopped", "finished", "failed"]


class StopCode(IntEnum):
    """What asked for a stop. All processes take the largest of their codes."""

    NONE = 0
    FILE = 1
    SIGNAL = 2


# The status a run ends with: after a signal the batch script may requeue, after a STOP file it must not.
STATE_AFTER: dict[int, State] = {StopCode.NONE: "finished", StopCode.FILE: "stopped", StopCode.SIGNAL: "requeue"}


class StopRequest:
    """Whether somebody asked this run to save and stop: a signal, or a file `STOP` in the run folder.

    A handler only sets a flag, prints nothing (stdout may be a broken pipe, which once cost a checkpoint), and a
    second signal while saving changes nothing. A context manager, for the main thread; leaving it puts the old
    handlers back.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], *, reads_file: bool, signals: Iterable[str] = ("SIGTERM", "SIGUSR1")
    ) -> None:
        """`reads_file`: True on process 0 alone, so that a shared folder is asked once a step."""
        self.path = Path(run_dir) / "STOP"
        self._reads_file = reads_file
        self._signals = [signal.Signals[name] for name in signals]
        self._previous: dict[signal.Signals, Any] = {}
        self._signalled = False

    def __enter__(self) -> "StopRequest":
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._set_flag)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _set_flag(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> StopCode:
        """This process's code now; cheap enough for every step (process 0: one stat)."""
        if self._signalled:
            return StopCode.SIGNAL
        return StopCode.FILE if self._reads_file and self.path.exists() else StopCode.NONE

    def carried_out(self) -> None:
        """Remove the STOP file, after the stop's checkpoint stands; otherwise the next start would stop at once."""
        if self._reads_file:
            self.path.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_status(run_dir: str | os.PathLike[str], state: State, step: int, **details: object) -> None:
    """Write `status.json` with the details, then `status`, the line `STATE STEP` that shells read. Process 0 only.

    Call it last: whoever reads `requeue` or `finished` may rely on the checkpoint being there.
    """
    record = {"state": state, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details}
    replace_file(Path(run_dir) / "status.json", json.dumps(record, indent=2, default=str) + "\n")
    replace_file(Path(run_dir) / "status", f"{state} {step}\n")


class Store(Protocol):
    """The part of torch's key-value stores that the watchdog needs.

    Give it a connection of its own (`store.clone()`): while the main thread waits for a key on a shared one, as it
    does when processes first meet, a `check` does not return (seen with torch's TCPStore).
    """

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set. Does not wait for them."""

    def get(self, key: str, /) -> bytes:
        """Value of a key that is set."""

    def set(self, key: str, value: str, /) -> None:
        """Set the key for all processes."""


class Watchdog:
    """Ends this process when another one failed, when the store is gone, or when no step came for too long.

    Two daemon threads: one asks the store for an error text of any process, one looks at the clock, so that a
    store that no longer answers cannot hide a stall or itself. Both end the process by `os._exit`, which works
    where a hung collective makes every other way out wait. (An op that holds the GIL stops both.)

    Order at the end of a run: barrier, then `stop()` on every process, then exit.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        hosts_store: bool,
        stall_seconds: float | None = None,
        poll_seconds: float = 1.0,
        max_failed_polls: int = 3,
        store_seconds: float = 60.0,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        """Settings; `start()` starts the threads.

        Args:
            store: None for a single process: only stalls are watched.
            hosts_store: the store dies with this process (process 0), so it lets the others read before it ends.
            stall_seconds: longest time between two `touch()`; None watches no stalls.
            max_failed_polls: polls in a row that raise before the store counts as gone.
            store_seconds: time without any answer (its host hangs or is cut off) after which it counts as gone.
        """
        self._store = store
        self._hosts_store = hosts_store
        self._stall_seconds = stall_seconds
        self._poll_seconds = poll_seconds
        self._max_failed_polls = max_failed_polls
        self._store_seconds = store_seconds
        self._exit_process = exit_process
        self._stopped = threading.Event()
        self._ending = threading.Lock()  # taken by whoever ends this process, never released
        self._threads: list[threading.Thread] = []
        self._deadline = self._last_answer = time.monotonic()

    def start(self) -> None:
        """Start watching; the first `touch()` deadline counts from here."""
        self._last_answer = time.monotonic()
        self.touch()
        watches = [self._watch_clock] if self._store is None else [self._poll_store, self._watch_clock]
        self._threads = [threading.Thread(target=watch, name=watch.__name__, daemon=True) for watch in watches]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching: the run is over and the store may go. Safe to call twice."""
        self._stopped.set()
        for thread in self._threads:  # Python ends with an abort when a thread is inside torch's store
            thread.join(timeout=2.0)

    def touch(self, extra_seconds: float = 0.0) -> None:
        """Say that this process goes on; `extra_seconds` for what takes longer (first step, save, evaluation)."""
        self._deadline = time.monotonic() + (self._stall_seconds or 0.0) + extra_seconds

    def report(self, text: str) -> None:
        """Hand this process's error text to all others, give them the time to read it, and stop watching.

        The first text stays: what fails later (a connection closed by the first one's end) is a consequence.
        Print the text first, and end this process after it; this takes two polls. Never raises: the store may be
        what broke.
        """
        if self._store is None:
            return
        if self._ending.acquire(blocking=False):  # else this process is being ended for another's error
            _bounded(lambda: self._set_if_first(text))
        time.sleep(self._poll_seconds * 2)
        self.stop()

    def _set_if_first(self, text: str) -> None:
        assert self._store is not None
        if not self._store.check([ERROR_KEY]):
            self._store.set(ERROR_KEY, text)

    def _poll_store(self) -> None:
        assert self._store is not None
        num_failed = 0
        while not self._stopped.wait(self._poll_seconds):
            try:
                text = self._store.get(ERROR_KEY).decode(errors="replace") if self._store.check([ERROR_KEY]) else None
            except Exception as error:  # whatever the store raises when its host has gone
                num_failed += 1
                if num_failed >= self._max_failed_polls:
                    self._end(f"ardtrain: the store on process 0 is gone ({error}); ending this process\n")
                continue
            num_failed, self._last_answer = 0, time.monotonic()
            if text is not None:
                linger = 2 * self._poll_seconds if self._hosts_store else 0.0
                self._end(f"ardtrain: ending this process, because another one failed:\n{text}\n", linger)

    def _watch_clock(self) -> None:
        while not self._stopped.wait(min(self._poll_seconds, (self._stall_seconds or 60.0) / 4)):
            now = time.monotonic()
            if self._store is not None and now - self._last_answer > self._store_seconds:
                self._end(f"ardtrain: no answer from the store for {self._store_seconds:g} s; ending this process\n")
            if self._stall_seconds is not None and now > self._deadline:
                self._end_stalled()

    def _end(self, text: str, linger_seconds: float = 0.0) -> None:
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return
        _bounded(lambda: _write_error(text))
        time.sleep(linger_seconds)
        self._exit_process(EXIT_PEER_FAILED)

    def _end_stalled(self) -> None:
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return
        text = f"ardtrain: no step for {self._stall_seconds:g} s; stacks of all threads follow\n"
        _bounded(lambda: _write_error(text))
        _bounded(lambda: faulthandler.dump_traceback(2, all_threads=True))
        self._exit_process(EXIT_STALLED)


def _bounded(action: Callable[[], object], seconds: float = 2.0) -> None:
    """Run an action that may fail or never return (a full pipe, a dead store) for at most `seconds`."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def _write_error(text: str) -> None:
    """Write to the process's own stderr; sys.stderr may be locked by the thread that hangs."""
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(2, data) :]


class _GuardedStream:
    """A text stream whose writes may fail in silence: the reader of our output may go before we do."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Make stdout and stderr survive a broken pipe: under pdsh it would end the process in the middle of a save."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _GuardedStream):
            setattr(sys, name, cast(TextIO, _GuardedStream(stream)))
