"""Which runs come next: the learning rate of each method by its tuning runs, then the runs that count. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ardtrain.compare.suite import Part, RunKey, Suite


@dataclass(frozen=True)
class RunResult:
    """What one finished run says. Counts are of numbers; `folder` is below the suite's output_dir.

    metrics: evaluation lines' keys at the last step; None where the number was not finite. diverged: the run ended on
    a loss or gradient that was not finite, and has no metrics. parameters_*: diagonals are folded into B and not
    counted (`results.exported_parameters`). seconds: of the last start. allocator_fraction: share of that time.
    """

    method: str
    part: Part
    learning_rate: float
    seed: int
    folder: str
    digest: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    step: int = 0
    diverged: bool = False
    parameters_start: int | None = None
    parameters_final: int | None = None
    parameters_peak: int | None = None
    total_rank_start: int | None = None
    total_rank_final: int | None = None
    seconds: float | None = None
    resumed: bool = False
    allocator_fraction: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> RunKey:
        return RunKey(self.method, self.part, self.learning_rate, self.seed)

    def value(self, metric: str) -> float | None:
        """The metric at the end, or None where there is no finite one."""
        found = self.metrics.get(metric)
        return None if found is None or not math.isfinite(found) else found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result; text: the last line of its error and where to read on."""

    text: str


Outcomes = Mapping[RunKey, RunResult | Failure]


@dataclass(frozen=True)
class Choice:
    """A method's learning rate.

    scores: mean metric of the tuning seeds by rate, ascending; None: not finite, so worst. rate: the best (the smaller
    of equals), None while unknown. edge: where in the grid it lies after all extensions. added: rates that extended
    the grid. missing: tuning runs to do before one can say more. failed: a tuning run failed, so nothing is chosen.
    """

    method: str
    scores: Mapping[float, float | None]
    rate: float | None = None
    edge: Literal["", "lower", "upper"] = ""
    added: tuple[float, ...] = ()
    missing: tuple[RunKey, ...] = ()
    failed: bool = False


def next_rate(grid: tuple[float, ...], *, upper: bool) -> float:
    """One rate beyond the ascending grid by the grid's own ratio (its geometric mean), to two digits.

    (1e-3, 3e-3, 1e-2, 3e-2): ratio 30 ** (1 / 3) = 3.11, so 0.093 above and 0.00032 below.
    """
    ratio = (grid[-1] / grid[0]) ** (1.0 / (len(grid) - 1))
    return float(f"{grid[-1] * ratio if upper else grid[0] / ratio:.1e}")


def choose_rate(suite: Suite, method: str, outcomes: Outcomes) -> Choice:
    """The method's best rate as far as `outcomes` tell; a best rate at the grid's edge extends the grid."""
    assert suite.tuning is not None
    metric, mode = suite.tuning_metric
    grid = suite.rates(method)
    added: list[float] = []
    while True:
        keys = {rate: [RunKey(method, "tune", rate, seed) for seed in suite.tuning.seeds] for rate in grid}
        missing = tuple(key for rate in grid for key in keys[rate] if key not in outcomes)
        if missing:
            return Choice(method, {}, added=tuple(added), missing=missing)
        results = {rate: [outcomes[key] for key in keys[rate]] for rate in grid}
        if any(isinstance(outcome, Failure) for rate in grid for outcome in results[rate]):
            return Choice(method, {}, added=tuple(added), failed=True)
        scores: dict[float, float | None] = {}
        for rate, outcomes_of_rate in results.items():
            values = [o.value(metric) for o in outcomes_of_rate if isinstance(o, RunResult)]
            finite = [value for value in values if value is not None]
            scores[rate] = statistics.fmean(finite) if len(finite) == len(values) else None
        sign = 1.0 if mode == "min" else -1.0
        ranked = sorted((sign * score, rate) for rate, score in scores.items() if score is not None)
        if not ranked:
            return Choice(method, scores, added=tuple(added))
        best = ranked[0][1]
        edge: Literal["", "lower", "upper"] = ""
        if len(grid) > 1 and best in (grid[0], grid[-1]):
            edge = "lower" if best == grid[0] else "upper"
        if not edge or len(added) == suite.tuning.extend:
            return Choice(method, scores, rate=best, edge=edge, added=tuple(added))
        added.append(next_rate(grid, upper=edge == "upper"))
        grid = tuple(sorted({*grid, added[-1]}))


def counting_keys(suite: Suite, method: str, outcomes: Outcomes) -> tuple[RunKey, ...]:
    """The method's runs that count, as far as they are known."""
    if suite.tuning is None:
        return tuple(RunKey(method, "test", rate, seed) for rate in suite.rates(method) for seed in suite.seeds)
    rate = choose_rate(suite, method, outcomes).rate
    return () if rate is None else tuple(RunKey(method, "test", rate, seed) for seed in suite.seeds)


def next_runs(suite: Suite, outcomes: Outcomes) -> list[RunKey]:
    """Runs that can be started now, by method: those of tuning before those that count."""
    runs: list[RunKey] = []
    for method in suite.methods:
        if suite.tuning is not None:
            runs += choose_rate(suite, method, outcomes).missing
        runs += [key for key in counting_keys(suite, method, outcomes) if key not in outcomes]
    return runs


def least_runs(suite: Suite) -> int:
    """Number of runs if no grid is extended."""
    if suite.tuning is None:
        return sum(len(suite.rates(method)) * len(suite.seeds) for method in suite.methods)
    return sum(len(suite.rates(method)) * len(suite.tuning.seeds) + len(suite.seeds) for method in suite.methods)
