"""What a run tells while it goes: progress bar, `metrics.jsonl`, `ranks.jsonl`, one log file a process, a clock.

Tools read these files, not processes, so a line is whole or absent: each is one write of one system call, and a
resume drops the lines beyond its checkpoint, so that a run cut and resumed leaves the files of one that was not.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ardtrain.faults import replace_file

_logger = logging.getLogger(__name__)


class RunLog:
    """Bar and records of a run. On every process but the main one all methods do nothing, so callers need no `if`."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        is_main: bool,
        num_steps: int,
        first_step: int = 0,
        show_bar: bool = True,
    ) -> None:
        """Open the run's files for appending; first a resumed run drops what lies beyond `first_step`, a new one all.

        Args:
            num_steps: optimizer steps of the whole run, the bar's end.
            first_step: steps done already (the step of the checkpoint resumed from; 0 for a new run).
            show_bar: False writes the records only.
        """
        self._is_main = is_main
        self._bar: Any = None
        if not is_main:
            return
        self._metrics_path = Path(run_dir) / "metrics.jsonl"
        self._ranks_path = Path(run_dir) / "ranks.jsonl"
        for path in (self._metrics_path, self._ranks_path):
            truncate_after(path, first_step if first_step > 0 else -1)
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not show_bar, mininterval=0.5
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def metrics(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`. Numbers keep all their digits; nan and infinity become null."""
        if self._is_main:
            _append_line(self._metrics_path, {"step": step, **record})

    def ranks(self, step: int, record: Mapping[str, Any]) -> None:
        """Append one line to `ranks.jsonl`: line 0 holds the full table, each later one an event's changes."""
        if self._is_main:
            _append_line(self._ranks_path, {"step": step, **record})

    def progress(self, step: int, *, loss: float, learning_rate: float, total_rank: int) -> None:
        """Move the bar to `step`. The numbers must be on the host already."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, lr {learning_rate:.2e}, total rank {total_rank}", refresh=False
            )
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line for the user to stdout, above the bar."""
        if self._is_main:
            with contextlib.suppress(OSError):  # a broken pipe ends no run
                tqdm.write(text)

    def close(self) -> None:
        """Leave the bar as it stands; the records need no closing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    line = json.dumps(_plain(record), separators=(", ", ": "), allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def _plain(value: Any) -> Any:
    """JSON's own types: NumPy's and torch's one-element values as numbers, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_after(path: str | os.PathLike[str], step: int) -> int:
    """Drop the lines of a JSONL file whose `step` is larger, and a last line torn by a crash.

    Returns:
        Number of lines dropped; with 0 the file is not touched, and a file that is not there has none.
    Raises:
        ValueError: a line before the last is no record with a step; the file was edited or is not ours.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a record with a step ({error!r}); remove the line") from error
    if len(kept) < len(lines):
        replace_file(path, "".join(kept))
        _logger.info("%s: dropped %d lines beyond step %d", path.name, len(lines) - len(kept), step)
    return len(lines) - len(kept)


def start_logging(run_dir: str | os.PathLike[str], *, global_rank: int, level: str = "INFO") -> Callable[[], None]:
    """Send every logger's lines to `logs/process-0003.log` (process 3), and ours also to process 0's console.

    Returns:
        A function that takes the handlers away again and closes the file.
    """
    folder = Path(run_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    layout = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    file = logging.FileHandler(folder / f"process-{global_rank:04d}.log", encoding="utf-8")
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
            handler.close()
        ours.setLevel(old_level)

    return undo


class _AboveTheBar(logging.Handler):
    """Console lines that do not cut through the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record))


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
