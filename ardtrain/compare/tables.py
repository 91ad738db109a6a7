"""The report: medians and intervals, plain sentences, notes; CSV and Markdown. Pure; `drawing.py` has the pictures."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

from ardtrain.compare.plan import Choice, Failure, Outcomes, RunResult, choose_rate, counting_keys
from ardtrain.compare.suite import Mode, Suite

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 0

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Method minus reference over the seeds both have: mean, 95 % interval (None below two seeds), number of pairs."""

    mean: float
    interval: Interval | None
    num_pairs: int


@dataclass(frozen=True)
class Row:
    """One line of the table: a method at one learning rate. values: metric by seed, ascending seeds.

    parameters: least and most final trainable parameters; peak: most at any time.
    """

    method: str
    learning_rate: float
    values: dict[int, float]
    median: float
    mean: float
    deviation: float | None
    interval: Interval
    difference: Difference | None
    parameters: tuple[int, int] | None
    peak: int | None
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bootstrap_median(values: Sequence[float]) -> Interval:
    """95 % percentile-bootstrap interval of the median; the same for the same values.

    With five values or fewer it is their range, which holds the true median with probability 1 - 2 / 2^n only.
    """
    array = np.array(values, dtype=np.float64)
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    medians = np.median(generator.choice(array, size=(NUM_RESAMPLES, len(array))), axis=1)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(medians, [tail, 1.0 - tail])
    return float(low), float(high)


def paired_difference(ours: dict[int, float], reference: dict[int, float]) -> Difference | None:
    """Mean of ours minus the reference's over common seeds, with Student's interval; None without a common seed.

    Student's t and not the bootstrap: with a handful of seeds resampling gives intervals that are too short.
    """
    differences = [value - reference[seed] for seed, value in ours.items() if seed in reference]
    n = len(differences)
    if not n:
        return None
    mean = statistics.fmean(differences)
    if n == 1:
        return Difference(mean, None, 1)
    half = float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2.0)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, (mean - half, mean + half), n)


def table_rows(suite: Suite, outcomes: Outcomes) -> list[Row]:
    """A row for each method and rate that counts and has a finite value; methods in the suite's order."""
    values: dict[tuple[str, float], dict[int, RunResult]] = {}
    for method in suite.methods:
        for key in counting_keys(suite, method, outcomes):
            outcome = outcomes.get(key)
            if isinstance(outcome, RunResult) and outcome.value(suite.metric) is not None:
                values.setdefault((method, key.learning_rate), {})[key.seed] = outcome
    rows = []
    for (method, rate), results in values.items():
        reference = suite.reference_of(method)
        theirs = {} if method == reference else _runs_of(suite, reference, rate, values)
        rows.append(_row(suite.metric, method, rate, results, theirs))
    return rows


def _runs_of(
    suite: Suite, reference: str, rate: float, values: dict[tuple[str, float], dict[int, RunResult]]
) -> dict[int, RunResult]:
    """The reference's runs: at its own best rate after tuning, at the same rate without."""
    if suite.tuning is None:
        return values.get((reference, rate), {})
    return next((results for (method, _), results in values.items() if method == reference), {})


def _row(metric: str, method: str, rate: float, results: dict[int, RunResult], reference: dict[int, RunResult]) -> Row:
    ours = _values(results, metric)
    numbers = list(ours.values())
    finals = [r.parameters_final for r in results.values() if r.parameters_final is not None]
    peaks = [r.parameters_peak for r in results.values() if r.parameters_peak is not None]
    seconds = [r.seconds for r in results.values() if r.seconds is not None]
    return Row(
        method=method,
        learning_rate=rate,
        values=ours,
        median=statistics.median(numbers),
        mean=statistics.fmean(numbers),
        deviation=statistics.stdev(numbers) if len(numbers) > 1 else None,
        interval=bootstrap_median(numbers),
        difference=paired_difference(ours, _values(reference, metric)),
        parameters=(min(finals), max(finals)) if finals else None,
        peak=max(peaks) if peaks else None,
        seconds=statistics.median(seconds) if seconds else None,
    )


def _values(results: dict[int, RunResult], metric: str) -> dict[int, float]:
    found = {seed: result.value(metric) for seed, result in sorted(results.items())}
    return {seed: value for seed, value in found.items() if value is not None}


def verdict(row: Row, *, name: str, metric: str, mode: Mode, reference: str) -> str:
    """One plain sentence about the row, called `name`: better, worse, or no difference beyond noise."""
    if row.difference is None:
        return f"{name}: no run of {reference} to compare with."
    d = row.difference
    if d.interval is None:
        return f"{name}: {d.mean:+.4g} {metric} against {reference} with one seed, which says nothing about noise."
    low, high = d.interval
    figures = f"mean difference {d.mean:+.4g} {metric}, 95 % interval {low:+.4g} to {high:+.4g}, {d.num_pairs} seeds"
    if low <= 0.0 <= high:
        return f"{name}: no difference to {reference} beyond noise at {d.num_pairs} seeds ({figures})."
    better = (d.mean < 0.0) == (mode == "min")
    return f"{name}: {'better' if better else 'worse'} than {reference} ({figures})."


def verdicts(suite: Suite, rows: Sequence[Row]) -> list[str]:
    """A sentence for each row but the reference's."""
    metric, mode = suite.table_metric
    several = {row.method for row in rows if sum(other.method == row.method for other in rows) > 1}
    names = [f"{row.method} at {row.learning_rate:g}" if row.method in several else row.method for row in rows]
    return [
        verdict(row, name=name, metric=metric, mode=mode, reference=suite.reference_of(row.method))
        for row, name in zip(rows, names, strict=True)
        if row.method != suite.reference_of(row.method)
    ]


def verdicts_over_budgets(suite: Suite, rows: Sequence[Row]) -> list[str]:
    """A sentence for each method that ran at several sizes: where it is better, worse, or neither."""
    _, mode = suite.table_metric
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        budget, reference = suite.methods[row.method].budget, suite.reference_of(row.method)
        if budget is None or row.method == reference or row.difference is None or row.difference.interval is None:
            continue
        low, high = row.difference.interval
        kind = "no difference beyond noise"
        if not low <= 0.0 <= high:
            kind = "better" if (row.difference.mean < 0.0) == (mode == "min") else "worse"
        found.setdefault(row.method.removesuffix(f"-{budget}"), {}).setdefault(kind, []).append(budget)
    return [
        f"{method}: " + "; ".join(f"{kind} at {', '.join(budgets)}" for kind, budgets in kinds.items()) + "."
        for method, kinds in found.items()
    ]


def unequal_parameters(suite: Suite, outcomes: Outcomes) -> list[str]:
    """A line for each method that ends with too many or too few trainable parameters; `full` is left out."""
    if suite.equal_parameters is None:
        return []
    finals: dict[str, list[int]] = {}
    for method, entry in suite.methods.items():
        for key in counting_keys(suite, method, outcomes):
            outcome = outcomes.get(key)
            if isinstance(outcome, RunResult) and not outcome.diverged and entry.method != "full":
                if outcome.parameters_final is None:
                    return [f"NOT COMPARED: {key} says nothing of its final parameters."]
                finals.setdefault(method, []).append(outcome.parameters_final)
    lines = [
        f"NOT COMPARED: no finished run of {name} tells the parameters to be equal to."
        for name in dict.fromkeys(map(suite.reference_of, finals))
        if name not in finals
    ]
    for method, counts in finals.items():
        name = suite.reference_of(method)
        if name not in finals:
            continue
        reference = statistics.median(finals[name])
        worst = max(counts, key=lambda count: abs(count - reference))
        if abs(worst - reference) > suite.equal_parameters.tolerance * reference:
            lines.append(
                f"NOT EQUAL: {method} ends with {worst:,} trainable parameters, {worst / reference - 1.0:+.1%} against "
                f"{name}'s {reference:,.0f}; tolerance {suite.equal_parameters.tolerance:.1%}."
            )
    return lines


def notes(suite: Suite, outcomes: Outcomes) -> list[str]:
    """What a reader of the table must know: parameters, edges of grids, diverged, failed and missing runs, versions."""
    lines = unequal_parameters(suite, outcomes)
    if suite.tuning is not None:
        lines += [note for m in suite.methods for note in _tuning_notes(choose_rate(suite, m, outcomes))]
    for method in suite.methods:
        keys = counting_keys(suite, method, outcomes)
        lines += [
            f"{key}: diverged; the figures are of the other seeds, so they flatter it."
            for key in keys
            if isinstance(result := outcomes.get(key), RunResult) and result.value(suite.metric) is None
        ]
        missing = sum(key not in outcomes for key in keys)
        if missing:
            lines.append(f"{method}: {missing} of {len(keys)} runs are still to do.")
    lines += [f"{key}: failed: {o.text}" for key, o in sorted(outcomes.items()) if isinstance(o, Failure)]
    versions = {tuple(sorted(o.versions.items())) for o in outcomes.values() if isinstance(o, RunResult)}
    if len(versions) > 1:
        differing = sorted({name for kind in versions for name, _ in set(kind) ^ set(next(iter(versions)))})
        lines.append(f"The runs were made with different versions of {', '.join(differing)}.")
    if len(suite.methods) > 2:
        lines.append("Each interval stands for itself: of twenty comparisons without a difference one would show one.")
    return lines


def _tuning_notes(choice: Choice) -> list[str]:
    lines = []
    if choice.edge:
        lines.append(
            f"{choice.method}: its best rate, {choice.rate:g}, is the {choice.edge} edge of the rates tried; a better "
            "one may lie beyond."
        )
    if len(choice.scores) == 1:
        lines.append(f"{choice.method}: one rate only, so it was not tuned.")
    if choice.failed:
        lines.append(f"{choice.method}: a tuning run failed, so no rate is chosen.")
    elif choice.missing:
        lines.append(f"{choice.method}: {len(choice.missing)} tuning runs are still to do.")
    elif choice.rate is None:
        lines.append(f"{choice.method}: every rate tried diverged.")
    lines += [f"{choice.method}: diverged in tuning at {r:g}." for r, score in choice.scores.items() if score is None]
    return lines


_HEAD = ("method", "learning_rate", "seeds", "median", "median_low", "median_high", "mean", "standard_deviation",
         "difference", "difference_low", "difference_high", "pairs", "parameters_min", "parameters_max",
         "parameters_peak", "seconds")  # fmt: skip


def csv_text(rows: Sequence[Row]) -> str:
    """All digits; empty cells where there is no number. difference: mean of method minus reference, paired by seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_HEAD)
    for row in rows:
        d = row.difference
        low, high = d.interval if d and d.interval else (None, None)
        least, most = row.parameters or (None, None)
        cells = (row.method, row.learning_rate, len(row.values), row.median, *row.interval, row.mean, row.deviation,
                 d.mean if d else None, low, high, d.num_pairs if d else None, least, most, row.peak,
                 row.seconds)  # fmt: skip
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def markdown_text(suite: Suite, outcomes: Outcomes) -> str:
    """Table, sentences and notes."""
    metric, mode = suite.table_metric
    rows = table_rows(suite, outcomes)
    against = suite.reference
    if suite.budgets:  # each method at a size is compared with the reference at that size
        against = f"{against.removesuffix(f'-{suite.budgets[-1]}')} of that size"
    lines = [
        f"# {suite.name}",
        "",
        f"{metric} at the end of each run, {'lower' if mode == 'min' else 'higher'} is better. [ ]: 95 % intervals, of "
        "the median by bootstrap, of the paired difference (same seeds) by Student's t.",
        "",
        f"| Method | Rate | Seeds | Median | Mean (standard deviation) | Difference to {against} "
        "| Final parameters | Peak | Seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        d = row.difference
        difference = "" if d is None else f"{d.mean:+.4g}" + (_bracket(d.interval, "+") if d.interval else "")
        deviation = "" if row.deviation is None else f" ({row.deviation:.4f})"
        around = _bracket(row.interval) if len(row.values) > 1 else ""
        cells = (
            row.method, f"{row.learning_rate:g}", str(len(row.values)), f"{row.median:.4f}{around}",
            f"{row.mean:.4f}{deviation}", difference, _span(row.parameters),
            "" if row.peak is None else f"{row.peak:,}", "" if row.seconds is None else f"{row.seconds:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    sentences = [f"- {line}" for line in verdicts(suite, rows)]
    if over := verdicts_over_budgets(suite, rows):
        sentences = ["By method:", "", *(f"- {line}" for line in over), "", "In figures:", "", *sentences]
    remarks = [f"- {line}" for line in notes(suite, outcomes)]
    return "\n".join([*lines, "", *sentences, *(["", "Notes:", "", *remarks] if remarks else []), ""])


def _bracket(interval: Interval, sign: str = "") -> str:
    return f" [{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]"


def _span(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return ""
    return f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} to {counts[1]:,}"
