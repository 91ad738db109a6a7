"""Intervals of figures by resampling the held-out rows (percentile bootstrap, Efron 1979), seeded.

Letters: N rows, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ardtrain.ranks import named_seed

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_NUMBERS_AT_ONCE = 1 << 22  # drawn row numbers


@dataclass(frozen=True)
class Figure:
    """A metric's value and its interval; without one low and high are None."""

    value: float
    low: float | None = None
    high: float | None = None

    def map(self, function: Callable[[float], float]) -> Figure:
        """The figure of a rising function of this one."""
        ends = (None if end is None else function(end) for end in (self.low, self.high))
        return Figure(function(self.value), *ends)

    def to_json(self) -> dict[str, Any]:
        """For the figures' file."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def text(self) -> str:
        """`0.8125 [0.7500, 0.8750]`."""
        ends = "" if self.low is None or self.high is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{ends}"


@dataclass(frozen=True)
class Bootstrap:
    """Draws N rows with replacement S times. samples: S, 0 for no intervals; confidence: share that is covered."""

    samples: int
    confidence: float
    seed: int

    def draws(self, num_rows: int) -> Iterator[Integers]:
        """[s, N] numbers of rows, some of the S resamples at a time; the same for the same seed and N."""
        numbers = np.random.default_rng(named_seed("bootstrap", self.seed, num_rows))
        step = max(1, _NUMBERS_AT_ONCE // max(1, num_rows))
        for start in range(0, self.samples, step):
            yield numbers.integers(0, num_rows, size=(min(step, self.samples - start), num_rows))

    def interval(self, value: float, resampled: Floats) -> Figure:
        """The value with the interval of its resamples [S]; NaN among them widens nothing."""
        known = resampled[np.isfinite(resampled)]
        if not len(known):
            return Figure(value)
        tail = (1.0 - self.confidence) / 2
        low, high = np.quantile(known, [tail, 1.0 - tail])
        return Figure(value, float(low), float(high))

    def ratio(self, value: float, above: Floats, below: Floats) -> Figure:
        """Of sum(above) / sum(below) over the rows [N], whose value is given."""
        if not self.samples or not len(above):
            return Figure(value)
        parts = [above[rows].sum(axis=1) / below[rows].sum(axis=1) for rows in self.draws(len(above))]
        return self.interval(value, np.concatenate(parts))

    def mean(self, scores: Floats) -> Figure:
        """Of the mean of a row's score [N]."""
        return self.ratio(float(np.mean(scores)) if len(scores) else 0.0, scores, np.ones(len(scores)))
