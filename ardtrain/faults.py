"""How a run ends when something asks it to, or breaks: stop requests, status files, watchdog, broken pipes.

Nothing here communicates: a stop request is local until the step's one all-reduce carries its code, and the
watchdog is handed its store. Exit codes: 70 another process failed, or the store is gone; 86 no step for too long.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol, TextIO, cast

EXIT_PEER_FAILED = 70  # EX_SOFTWARE
EXIT_STALLED = 86
ERROR_KEY = "ardtrain/error"

# What gloo, NCCL and torch's store say where another process has ended; its own text is the cause, this is not.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket closed|got 0 bytes|NCCL communicator was aborted"
    r"|ncclRemoteError|remote process exit"
)

State = Literal["started", "requeue", "stopped", "finished", "failed"]


class StopCode(IntEnum):
    """What asked for a stop. All processes take the largest of their codes."""

    NONE = 0
    FILE = 1
    SIGNAL = 2


# The status a run ends with: after a signal the batch script may requeue, after a STOP file it must not.
STATE_AFTER: dict[int, State] = {StopCode.NONE: "finished", StopCode.FILE: "stopped", StopCode.SIGNAL: "requeue"}


_HOLDABLE = (signal.SIGTERM, signal.SIGUSR1)
_held: list[int] = []  # signals that came before a StopRequest could take them


def _hold(number: int, frame: FrameType | None) -> None:
    _held.append(number)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Keeps SIGTERM and SIGUSR1 for the StopRequest to come, from before the seconds of importing and loading on.

    They would end this process, and a preempted job that ends by itself is not requeued by its scheduler. Outside the
    main thread, where signals cannot be taken, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _held.clear()
    previous = {number: signal.signal(number, _hold) for number in _HOLDABLE}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether somebody asked this run to save and stop: a signal, or a file `STOP` in the run folder.

    A handler only sets a flag, prints nothing (stdout may be a broken pipe, which once cost a checkpoint), and a
    second signal while saving changes nothing. A context manager, for the main thread; leaving it puts the old
    handlers back. An error leaves the signals ignored: this process ends by itself and has to say why, while
    launchers send SIGTERM to all as soon as one process has failed (seen with torchrun).
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
        self._signalled |= any(number in self._signals for number in _held)
        for number in set(_HOLDABLE) - set(self._signals):
            if signal.getsignal(number) is _hold:  # no stop request for this run: it ends the process, as ever
                signal.signal(number, signal.SIG_DFL)
                if number in _held:
                    os.kill(os.getpid(), number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if error is None else signal.SIG_IGN)
        self._previous.clear()

    def _set_flag(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> StopCode:
        """This process's code now; cheap enough for every step (process 0: one stat). A user's STOP goes before a
        batch system's signal, after which the run would be requeued."""
        if self._reads_file and self.path.exists():
            return StopCode.FILE
        return StopCode.SIGNAL if self._signalled else StopCode.NONE

    def carried_out(self) -> None:
        """Remove the STOP file, after the stop's checkpoint stands; otherwise the next start would stop at once."""
        if self._reads_file:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:  # the checkpoint stands: no reason to fail
                text = "%s cannot be removed (%s); remove it, or the next start stops at once"
                logging.getLogger(__name__).warning(text, self.path, error.strerror)


def replace_file(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # on a full disk, half of it
        raise


def write_status(run_dir: str | os.PathLike[str], state: State, step: int, **details: object) -> None:
    """Write `status.json` with the details, then `status`, the line `STATE STEP` that shells read. Process 0 only.

    Call it last: whoever reads `requeue` or `finished` may rely on the checkpoint being there.
    """
    record = {"state": state, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details}
    replace_file(Path(run_dir) / "status.json", json.dumps(record, indent=2, default=str) + "\n")
    replace_file(Path(run_dir) / "status", f"{state} {step}\n")


def read_status(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `status.json` holds; empty where there is none, or no readable one."""
    try:
        record = json.loads((Path(run_dir) / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_failure(run_dir: str | os.PathLike[str], step: int | None, error: str) -> None:
    """Write status `failed`, unless this start was refused before it began: then an earlier status stays.

    Args:
        step: None: not known, the step at which the run began.
    """
    earlier = read_status(run_dir)
    begun = (earlier.get("state"), earlier.get("host"), earlier.get("pid")) == ("started", host_name(), os.getpid())
    if earlier and not begun:
        return
    details = {key: value for key, value in earlier.items() if key not in ("state", "step", "time", "error")}
    write_status(run_dir, "failed", earlier.get("step", 0) if step is None else step, **details, error=error)


def host_name() -> str:
    """This host's name, without its domain."""
    return socket.gethostname().partition(".")[0]


def lost_peer(error: BaseException) -> bool:
    """Does the error say no more than that another process has ended?"""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


class Store(Protocol):
    """The part of torch's key-value stores that the watchdog needs.

    Give it a connection of its own (`store.clone()`): while the main thread waits for a key on a shared one, as it
    does when processes first meet, a `check` does not return (seen with torch's TCPStore).
    """

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set. Does not wait for them."""

    def get(self, key: str, /) -> bytes:
        """Value of a key that is set."""

    def compare_set(self, key: str, expected: str, value: str, /) -> bytes:
        """Set the key for all processes if its value is `expected` ("": not set); returns what it is then."""


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
        first_text_seconds: float = 3.0,
        process: str = "this process",
        console: int | None = 2,
        log: int | None = None,
        last_words: int | None = None,
        on_failure: Callable[[str], object] = lambda text: None,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        """Settings; `start()` starts the threads.

        Args:
            store: None for a single process: only stalls are watched.
            hosts_store: the store dies with this process (process 0), so it lets the others read before it ends.
            stall_seconds: longest time between two `touch()`; None watches no stalls.
            max_failed_polls: polls in a row that raise before the store counts as gone.
            store_seconds: time without any answer (its host hangs or is cut off) after which it counts as gone.
            first_text_seconds: how long a failure that looks like a consequence waits for the text of its cause.
            process: what the others are told about a stall, such as `process 3 on node2 (log: PATH)`.
            console, log: file descriptors that get the texts; stacks of a process that did not fail go to `log` only.
            last_words: descriptor for one line when the store is gone, and with it the console of process 0.
            on_failure: gets the text before this process is ended; it may fail, or take two seconds.
        """
        self._store = store
        self._hosts_store = hosts_store
        self._stall_seconds = stall_seconds
        self._poll_seconds = poll_seconds
        self._max_failed_polls = max_failed_polls
        self._store_seconds = store_seconds
        self._first_text_seconds = first_text_seconds
        self._process = process
        self._console, self._log, self._last_words = console, log, last_words
        self._on_failure = on_failure
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

    def report(self, text: str, *, lost_peer: bool = False) -> str:
        """Hand this process's error text to all others; returns the first one of the run, which may be another's.

        The first text stays: what fails later (a connection closed by the first one's end) is a consequence.
        Never raises: the store may be what broke. Show what it returns, then `linger`, then end this process.

        Args:
            lost_peer: the error looks like a consequence, so the cause's text gets some seconds to arrive.
        """
        if self._store is None:
            return text
        if not self._ending.acquire(blocking=False):
            time.sleep(10 + 2 * self._poll_seconds)  # a thread is ending this process for another's error
            return text
        wait_seconds = self._first_text_seconds if lost_peer else 0.0
        first: list[str] = []
        _bounded(lambda: first.append(self._first_text(text, wait_seconds)), wait_seconds + 2.0)
        if not first:
            self._say_last_words("does not answer")
            return text
        return first[0]

    def linger(self) -> None:
        """Give the others the time to read this process's report (two polls), and stop watching."""
        if self._store is not None:
            time.sleep(self._poll_seconds * 2)
        self.stop()

    def _first_text(self, own: str, wait_seconds: float) -> str:
        assert self._store is not None
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline and not self._store.check([ERROR_KEY]):
            time.sleep(min(0.1, self._poll_seconds))
        return self._store.compare_set(ERROR_KEY, "", own).decode(errors="replace")

    def _poll_store(self) -> None:
        assert self._store is not None
        num_failed = 0
        while not self._stopped.wait(self._poll_seconds):
            try:
                text = self._store.get(ERROR_KEY).decode(errors="replace") if self._store.check([ERROR_KEY]) else None
            except Exception as error:  # whatever the store raises when its host has gone
                num_failed += 1
                if num_failed >= self._max_failed_polls:
                    self._end_without_store(f"is gone ({error})")
                continue
            num_failed, self._last_answer = 0, time.monotonic()
            if text is not None:
                self._end(text)

    def _watch_clock(self) -> None:
        while not self._stopped.wait(min(self._poll_seconds, (self._stall_seconds or 60.0) / 4)):
            now = time.monotonic()
            if self._store is not None and now - self._last_answer > self._store_seconds:
                self._end_without_store(f"has not answered for {self._store_seconds:g} s")
            if self._stall_seconds is not None and now > self._deadline:
                self._end_stalled()

    def _end(self, text: str) -> None:
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return
        self._write(f"\nardtrain: ending this process, because another one failed:\n{text}\n")  # below the bar
        if self._log is not None:
            self._write_stacks(self._log)  # where this process was when the other one failed
        _bounded(lambda: self._on_failure(text))
        self._let_others_read()
        self._exit_process(EXIT_PEER_FAILED)

    def _end_without_store(self, what: str) -> None:
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return
        self._write(f"ardtrain: the store on process 0 {what}; ending this process\n")
        self._say_last_words(what)
        self._exit_process(EXIT_PEER_FAILED)

    def _end_stalled(self) -> None:
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return
        text = f"{self._process}: no step for {self._stall_seconds:g} s"
        self._write(f"\nardtrain: {text}; stacks of all threads follow\n")
        for output in (self._console, self._log):
            if output is not None:
                self._write_stacks(output)
        if self._store is not None:
            _bounded(lambda: self._first_text(text, 0.0))
        _bounded(lambda: self._on_failure(text))
        self._let_others_read()
        self._exit_process(EXIT_STALLED)

    def _let_others_read(self) -> None:
        if self._hosts_store and self._store is not None:
            time.sleep(2 * self._poll_seconds)

    def _write(self, text: str) -> None:
        for output in (self._console, self._log):
            if output is not None:
                _write_to(output, text)

    def _write_stacks(self, output: int) -> None:
        _bounded(lambda: faulthandler.dump_traceback(output, all_threads=True))

    def _say_last_words(self, what: str) -> None:
        if self._last_words is not None:
            _write_to(
                self._last_words,
                f"ardtrain: {self._process}: the store on process 0 {what}, and process 0 with it: it was probably "
                "killed, or its host was lost\n",
            )


def _bounded(action: Callable[[], object], seconds: float = 2.0) -> None:
    """Run an action that may fail or never return (a full pipe, a dead store) for at most `seconds`."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def _write_to(output: int, text: str) -> None:
    """Write to a file descriptor for at most some seconds; sys.stderr may be locked by the thread that hangs."""

    def write() -> None:
        data = text.encode(errors="replace")
        while data:
            data = data[os.write(output, data) :]

    _bounded(write)


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
