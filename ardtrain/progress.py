"""How far a run is, for who watches it: a bar on a terminal, else a plain line now and then. Process 0 alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

PLAIN_SECONDS = 30.0  # between two lines where there is no terminal
_SPEED_STEPS = 20  # over which tokens per second are taken


class Progress:
    """Step, loss, held-out loss, tokens per second, total rank, what moved last, time left."""

    def __init__(
        self,
        *,
        num_steps: int,
        first_step: int = 0,
        on_terminal: bool | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_terminal: a bar; None: as stderr is. num_steps: of the whole run; first_step: done already."""
        self._num_steps, self._first_step, self._now = num_steps, first_step, now
        on_terminal = sys.stderr.isatty() if on_terminal is None else on_terminal
        self._bar: Any = None
        if on_terminal:
            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.5)
        self._start = now()
        self._told = self._start - PLAIN_SECONDS  # so that the first step is
        self._speed: deque[tuple[float, int]] = deque([(self._start, 0)], maxlen=_SPEED_STEPS + 1)
        self._held_out: float | None = None
        self._moved = ""

    def step(self, step: int, *, loss: float, num_tokens: int, total_rank: int | None) -> None:
        """After an optimizer step. The numbers must be on the host already; total_rank: None where nothing has one."""
        now = self._now()
        self._speed.append((now, num_tokens))
        text = self._text(loss, total_rank)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._told >= PLAIN_SECONDS or step == self._num_steps:
            self._told = now
            left = (self._num_steps - step) * (now - self._start) / max(1, step - self._first_step)
            say(f"step {step} of {self._num_steps}: {text}, about {duration(left)} left")

    def held_out(self, loss: float) -> None:
        """A held-out loss, shown from now on."""
        self._held_out = loss

    def event(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """The allocator's last event, shown from now on. changes: those of its line in ranks.jsonl."""
        self._moved = moved_text(changes)

    def _text(self, loss: float, total_rank: int | None) -> str:
        seconds = self._speed[-1][0] - self._speed[0][0]
        tokens = sum(count for _, count in list(self._speed)[1:])
        parts = [f"loss {loss:.4f}"]
        if self._held_out is not None:
            parts.append(f"held-out {self._held_out:.4f}")
        if seconds > 0:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        if total_rank is not None:
            parts.append(f"rank {total_rank}")
        if self._moved:
            parts.append(self._moved)
        return ", ".join(parts)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def moved_text(changes: Sequence[Mapping[str, Any]]) -> str:
    """The site that won most and the one that lost most, such as `moved +3 2.up_proj -2 0.v_proj`."""
    sizes = [(int(change["after"]) - int(change["before"]), str(change["site"])) for change in changes]
    most = max(sizes, key=lambda item: item[0], default=(0, ""))
    least = min(sizes, key=lambda item: item[0], default=(0, ""))
    parts = [f"{size:+d} {_short(site)}" for size, site in ([most] * (most[0] > 0) + [least] * (least[0] < 0))]
    return "moved " + " ".join(parts) if parts else ""


def _short(site: str) -> str:
    """`2.up_proj` of `model.layers.2.mlp.up_proj`; a head stays behind it."""
    matrix, colon, head = site.partition(":")
    parts = matrix.split(".")
    layer = next((part for part in parts if part.isdigit()), None)
    return ".".join([*([layer] if layer else []), parts[-1]]) + colon + head


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str) -> None:
    """A line for the user on stdout, above the bar, at once; a broken pipe or a full disk ends no run."""
    with contextlib.suppress(OSError):
        tqdm.write(text)
        sys.stdout.flush()
