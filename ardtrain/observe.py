"""What a run tells while it goes: its progress, `metrics.jsonl`, `ranks.jsonl`, one log file a process, a clock.

Tools read these files, not processes, so a line is whole or absent: each is one write of one system call, and a
resume cuts off the lines beyond its checkpoint (they go to `*.discarded.jsonl`), so that a run cut and resumed leaves
the files of one that was not. A full disk costs lines, not the run.
"""

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from ardtrain.faults import replace_file
from ardtrain.progress import Progress, say

RECORDS = ("metrics.jsonl", "ranks.jsonl")

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What takes the metrics as well (trackers.Trackers); it raises nothing."""

    def metrics(self, step: int, record: Mapping[str, Any], /) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class RunLog:
    """Bar and records of a run. On every process but the main one all methods do nothing, so callers need no `if`."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        is_main: bool,
        num_steps: int,
        first_step: int = 0,
        resumed: bool = False,
        show_bar: bool = True,
        trackers: Callable[[], Tracker] | None = None,
    ) -> None:
        """Open the run's files for appending; first a resumed run cuts off what is beyond `first_step`, a new one all.

        Args:
            num_steps: optimizer steps of the whole run, the bar's end.
            first_step: steps done already (the step of the checkpoint resumed from; 0 for a new run).
            resumed: from a checkpoint, which may be one before the first step: its records stay.
            show_bar: False writes the records only; True: a bar on a terminal, else a line now and then.
            trackers: starts what gets the metrics as well; on the main process alone.
        """
        self._is_main = is_main
        self._lost: dict[Path, int] = {}  # lines in a row that the disk did not take
        self._progress: Progress | None = None
        self._tracker: Tracker | None = None
        if not is_main:
            return
        self._metrics_path, self._ranks_path = (Path(run_dir) / name for name in RECORDS)
        cut_back(run_dir, first_step if resumed or first_step > 0 else -1)
        self._tracker = None if trackers is None else trackers()
        self._progress = Progress(num_steps=num_steps, first_step=first_step) if show_bar else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def metrics(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`. Numbers keep all their digits; nan and infinity become null."""
        if self._is_main:
            self._append(self._metrics_path, {"step": step, **record})
            if self._progress is not None and "eval_loss" in record:
                self._progress.held_out(record["eval_loss"])
            if self._tracker is not None:
                self._tracker.metrics(step, _plain(record))

    def ranks(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line to `ranks.jsonl`: line 0 holds the full table, each later one an event's changes."""
        if self._is_main:
            self._append(self._ranks_path, {"step": step, **record})
            if self._progress is not None and record.get("changes"):
                self._progress.event(record["changes"])

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        """A full disk is said once, and what it cost when there is room again."""
        problem = _append_line(path, record)
        lost = self._lost.pop(path, 0)
        if problem is not None:
            self._lost[path] = lost + 1
        if problem is not None and not lost:
            _logger.warning("%s: the line of step %s is lost (%s); the run goes on", path, record["step"], problem)
        if problem is None and lost:
            _logger.warning("%s: %d lines before step %s were lost", path, lost, record["step"])

    def progress(self, step: int, *, loss: float, num_tokens: int, total_rank: int | None) -> None:
        """Tell who watches that `step` is done. The numbers must be on the host already."""
        if self._progress is not None:
            self._progress.step(step, loss=loss, num_tokens=num_tokens, total_rank=total_rank)

    def say(self, text: str) -> None:
        """Print a line for the user to stdout, above the bar."""
        if self._is_main:
            say(text)

    def close(self, *, failed: bool = False) -> None:
        """Leave the bar as it stands; the records need no closing, trackers do."""
        if self._tracker is not None:
            self._tracker.close(failed=failed)
            self._tracker = None
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class ReadingBar:
    """Bytes of the base that are in place, on process 0's terminal; without a terminal nothing moves."""

    def __init__(self, total: int, *, is_main: bool) -> None:
        """total: bytes this process will read."""
        silent = not is_main or not sys.stderr.isatty()
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, desc="base", unit="B", unit_scale=True, dynamic_ncols=True, disable=silent)

    def add(self, count: int) -> None:
        """From any thread."""
        with self._lock:
            self._bar.update(count)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "ReadingBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _append_line(path: Path, record: Mapping[str, Any]) -> str | None:
    """One whole line; or, where the disk does not take it, the file as it was, and the reason."""
    line = json.dumps(_plain(record), separators=(", ", ": "), allow_nan=False) + "\n"
    content = line.encode()
    try:
        with path.open("ab", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            written, problem = 0, "the disk took a part of it"
            try:
                written = file.write(content)
            except OSError as error:
                problem = error.strerror or str(error)
            if written == len(content):
                return None
            file.truncate(length)
            return problem
    except OSError as error:
        return error.strerror or str(error)


def _plain(value: Any) -> Any:
    """JSON's own types: NumPy's and torch's one-element values as numbers, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_back(run_dir: str | os.PathLike[str], step: int) -> dict[str, int]:
    """Cuts the run's records back to a checkpoint's step, so that what follows continues them. Process 0 alone.

    step: of the checkpoint; -1 cuts all off (a new run). What is cut off is kept in `metrics.discarded.jsonl` and
    `ranks.discarded.jsonl`, behind what earlier resumes cut off. Safe to repeat after a crash in the middle.

    Returns:
        File name -> number of lines cut off.
    Raises:
        ValueError: a line before the last is no record with a step; the file was edited or is not ours. OSError.
    """
    return {name: truncate_after(Path(run_dir) / name, step) for name in RECORDS}


def truncate_after(path: str | os.PathLike[str], step: int) -> int:
    """Move the lines of a JSONL file whose `step` is larger, and a last line torn by a crash, to `*.discarded.jsonl`.

    Returns:
        Number of lines moved; with 0 no file is touched, and a file that is not there has none.
    Raises:
        ValueError: a line before the last is no record with a step; the file was edited or is not ours.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept: list[bytes] = []
    cut: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        try:
            stays = json.loads(line)["step"] <= step and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a record with a step ({error!r}); remove the line") from error
            stays = False
        (kept if stays else cut).append(line)
    if cut:
        _keep_discarded(path.with_suffix(f".discarded{path.suffix}"), b"".join(cut))
        replace_file(path, b"".join(kept).decode())
        _logger.info("%s: %d lines beyond step %d went to *.discarded.jsonl", path.name, len(cut), step)
    return len(cut)


def _keep_discarded(path: Path, lines: bytes) -> None:
    """Appends them, unless the file ends with them already: a crash came between this and the cut."""
    lines = lines.removesuffix(b"\n") + b"\n"
    with path.open("a+b") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - len(lines)))
        end = file.read()
        if end != lines:
            torn = end and not end.endswith(b"\n")
            file.write(b"\n" + lines if torn else lines)
        file.flush()
        os.fsync(file.fileno())


class ProcessLog:
    """The log file of this process, `logs/process-0003.log` of process 3, while it is open."""

    def __init__(self, path: Path, file: logging.FileHandler, undo: Callable[[], None]) -> None:
        self.path, self._undo = path, undo
        # For those that write past Python's logging, as C++ and faulthandler do.
        assert file.stream is not None
        self.descriptor: int = file.stream.fileno()

    def take_streams(self) -> int | None:
        """From now on stdout and stderr go to this file, C++'s and those of child processes too.

        Returns:
            A descriptor of what was stderr before; None where there was none.
        """
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # AttributeError: no stream, or one of another kind
                stream.flush()
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        try:
            before = os.dup(2)
        except OSError:
            before = None
        for number in (1, 2):
            os.dup2(self.descriptor, number)
        return before

    def close(self) -> None:
        """Take the handlers away and close the file; streams that it took keep it open."""
        self._undo()


def start_logging(run_dir: str | os.PathLike[str], *, global_rank: int, level: str = "INFO") -> ProcessLog:
    """Send every logger's lines to `logs/process-0003.log` (process 3), and ours also to process 0's console."""
    folder = Path(run_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    layout = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    path = folder / f"process-{global_rank:04d}.log"
    file = _LogFile(path, encoding="utf-8")
    file.setFormatter(layout)
    ours = logging.getLogger("ardtrain")
    old_level = ours.level
    ours.setLevel(level)
    handlers: list[tuple[logging.Logger, logging.Handler]] = [(logging.getLogger(), file)]
    if global_rank == 0:
        console = _AboveTheBar()
        console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        handlers.append((ours, console))
    for logger, handler in handlers:
        logger.addHandler(handler)

    def undo() -> None:
        for logger, handler in handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk keeps the last lines
                handler.close()
        ours.setLevel(old_level)

    return ProcessLog(path, file, undo)


class _LogFile(logging.FileHandler):
    """A log on a full disk loses lines; logging's own way would print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


class _AboveTheBar(logging.Handler):
    """Console lines that do not cut through the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record))


class Startup:
    """Seconds from this process's birth to its first step, by cause."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic() - _age_seconds()

    def mark(self, name: str) -> None:
        """What has passed since the last mark went to `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def text(self) -> str:
        """One line, the longest first."""
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        return f"start {sum(self.seconds.values()):.1f} s: " + ", ".join(f"{name} {value:.1f}" for name, value in parts)


def _age_seconds() -> float:
    """How long this process has lived, from Linux's /proc; 0 where there is none."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


class Clock:
    """Where the time goes: seconds by name, each one's share of the whole, tokens per second.

    Host time, without a device synchronisation: on a GPU a section holds its own work only if it ends in one (a
    resize and a save do). Sections may nest; an inner one counts in the outer one too.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = self._last_report = now()
        self._seconds: dict[str, float] = {}
        self._tokens = 0

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the time inside the block to `name`, also when the block raises."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def count_tokens(self, num_tokens: int) -> None:
        """Add tokens, padding not among them."""
        self._tokens += num_tokens

    def seconds(self, name: str) -> float:
        """Seconds spent in a section since the start of the clock."""
        return self._seconds.get(name, 0.0)

    def fraction(self, name: str) -> float:
        """A section's share, 0..1, of the time since the start of the clock."""
        elapsed = self._now() - self._start
        return self.seconds(name) / elapsed if elapsed > 0 else 0.0

    def report(self) -> dict[str, float]:
        """For `metrics.jsonl`: tokens per second since the last report, elapsed seconds, seconds of each section."""
        now = self._now()
        interval, self._last_report = now - self._last_report, now
        tokens, self._tokens = self._tokens, 0
        report = {"tokens_per_second": tokens / interval if interval > 0 else 0.0, "elapsed_seconds": now - self._start}
        return report | {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
