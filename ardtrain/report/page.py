"""The HTML report: one file with style, scripts and numbers inside; it asks no network and opens from disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ardtrain import __version__
from ardtrain.report.history import head_of, matrix_of, place_of
from ardtrain.report.reading import RunData

# What a page may hold, over all its runs; beyond, events and points are thinned, and the page says so.
MAX_CHANGES = 500_000  # a site's rank changed in an event: about 7 bytes
MAX_SCORES = 600_000  # a site's score at an event: about 4 bytes
MAX_POINTS = 1500  # of a curve
_SCORE_LEVELS = 999  # scores are kept on a logarithmic scale of so many levels
_CURVES = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "host_memory_peak_bytes",
           "device_memory_peak_bytes")  # fmt: skip


def html_page(runs: Sequence[RunData], *, refresh_seconds: float | None = None) -> str:
    """The page's text. refresh_seconds: the browser reads the file anew so often; None: never."""
    environment = Environment(
        loader=PackageLoader("ardtrain", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    title = "Runs " + ", ".join(run.name for run in runs) if len(runs) > 1 else f"Run {runs[0].name}"
    data = {"runs": [run_object(run, share=1.0 / len(runs)) for run in runs], "differences": differences(runs)}
    return environment.get_template("page.html").render(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M:%S"),
        version=__version__,
        refresh=None if refresh_seconds is None else max(1, round(refresh_seconds)),
        data=embedded(data),
    )


def embedded(data: object) -> str:
    """JSON that may stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def run_object(run: RunData, *, share: float = 1.0) -> dict[str, Any]:
    """What the scripts know of a run. share: of the page's limits that this run may use."""
    view, starts = run.view, run.info.get("starts") or [{}]
    return {
        "name": run.name,
        "method": run.method,
        "state": view.state,
        "alive": run.goes_on,
        "error": (view.error or "").strip(),
        "step": view.step,
        "numSteps": view.num_steps,
        "secondsLeft": view.seconds_left if run.goes_on else None,
        "worldSize": view.world_size,
        "bestLoss": run.best("eval_loss"),
        "lastEval": run.last("eval_loss"),
        "elapsed": _rounded(run.elapsed_seconds),
        "startup": {name: _rounded(value) for name, value in run.startup_seconds.items()},
        "phases": {name: _rounded(value) for name, value in run.phases.items()},
        "trained": run.info.get("num_trained"),
        "base": run.info.get("num_base"),
        "device": starts[-1].get("device"),
        "versions": {"python": starts[-1].get("python"), **starts[-1].get("versions", {})} if run.info else {},
        "starts": [start.get("step", 0) for start in starts if start],
        "voidSteps": run.void_steps[:1000],
        "numVoid": len(run.void_steps),
        "curves": {name: thinned(*run.curves[name]) for name in _CURVES if name in run.curves},
        "config": run.config_text,
        "ranks": None if run.history is None else _ranks(run, share),
    }


def _ranks(run: RunData, share: float) -> dict[str, Any]:
    """Sites, first ranks, changes by event, and the events' own words."""
    history = run.history
    assert history is not None
    matrices = list(dict.fromkeys(matrix_of(site) for site in history.sites))
    number = {name: at for at, name in enumerate(matrices)}
    shapes: Mapping[str, Any] = run.info.get("modules") or {}
    steps, values = run.parameters()
    rows = _kept_rows(history.ranks, int(MAX_CHANGES * share))
    changes = [_changes(history.ranks[a], history.ranks[b]) for a, b in zip(rows, rows[1:], strict=False)]
    return {
        "matrices": [[*place_of(matrix), (shapes.get(matrix) or ["", "", ""])[2]] for matrix in matrices],
        "names": matrices,
        "owners": [number[matrix_of(site)] for site in history.sites],
        "heads": [head_of(site) for site in history.sites],
        "costs": None if run.costs is None else run.costs.astype(int).tolist(),
        "start": history.ranks[0].tolist(),
        "steps": [history.steps[row] for row in rows],
        "changes": changes,
        "numEvents": len(history.steps) - 1,
        "totals": thinned(history.steps, history.ranks.sum(axis=1).tolist(), exact=True),
        "parameters": thinned(steps, values, exact=True),
        "budget": None if run.budget_ranks is None else _rounded(float(run.budget_ranks.sum())),
        "budgetParameters": None
        if run.budget_ranks is None or run.costs is None
        else round(float(run.budget_ranks @ run.costs)),
        "events": [_event(run, row) for row in range(1, len(history.steps))][-2000:],
        "scores": _scores(run, int(MAX_SCORES * share)),
    }


def _kept_rows(ranks: np.ndarray, most: int) -> list[int]:
    """Rows of [E, S] to show: all, or the start, the end and every n-th between, so that `most` changes remain."""
    num_rows, step = len(ranks), 1
    while True:
        rows = sorted({0, num_rows - 1, *range(0, num_rows, step)})
        if step >= num_rows or int((np.diff(ranks[rows], axis=0) != 0).sum()) <= most:
            return rows
        step *= 2


def _changes(before: np.ndarray, after: np.ndarray) -> list[int]:
    """[2 n] site and difference, alternating; a site by its distance to the one before it."""
    sites = np.flatnonzero(after != before)
    pairs = np.stack([np.diff(sites, prepend=0), (after - before)[sites]], axis=1)
    flat: list[int] = pairs.reshape(-1).tolist()
    return flat


def _event(run: RunData, row: int) -> dict[str, Any]:
    history = run.history
    assert history is not None
    event, moved = history.events[row], history.moved[row]
    seconds = event.get("seconds")
    return {
        "event": event.get("event", row),
        "step": history.steps[row],
        "total": int(history.ranks[row].sum()),
        "sites": int((history.ranks[row] != history.ranks[row - 1]).sum()),
        "pruned": moved.get("pruned", 0),
        "born": moved.get("born", 0),
        "masked": moved.get("masked", 0),
        "reason": str(event.get("reason", "")),
        "scores": {name: _number(value) for name, value in (event.get("scores") or {}).items()},
        "seconds": _number(sum(seconds.values()) if isinstance(seconds, dict) else seconds),  # of a resize, by stage
    }


def _scores(run: RunData, most: int) -> dict[str, Any] | None:
    """Scores of the sites on a logarithmic scale: level l is low * (high / low)^(l / levels), 0 a score of nothing."""
    history = run.history
    if history is None or not run.scores:
        return None
    rows = sorted(run.scores)
    every = max(1, math.ceil(len(rows) * len(history.sites) / max(1, most)))
    rows = rows[::every]
    table = np.abs(np.stack([run.scores[row] for row in rows]))
    table[~np.isfinite(table)] = 0.0
    positive = table[table > 0]
    if not positive.size:
        return None
    low, high = float(positive.min()), float(positive.max())
    span = max(math.log(high / low), 1e-9)
    with np.errstate(divide="ignore"):
        levels = np.where(table > 0, 1 + np.round(np.log(table / low) / span * (_SCORE_LEVELS - 1)), 0)
    return {
        "steps": [history.steps[row] for row in rows],
        "low": low,
        "high": high,
        "levels": _SCORE_LEVELS,
        "rows": levels.astype(int).tolist(),
        "every": every,
    }


def thinned(steps: Sequence[float], values: Sequence[float], *, exact: bool = False) -> list[list[float]]:
    """[steps, values] of at most MAX_POINTS points: means of neighbours, or with `exact` the last of each group."""
    size = math.ceil(len(steps) / MAX_POINTS)
    if size <= 1:
        return [list(steps), [_rounded(v) for v in values]]
    ends = range(size - 1, len(steps) + size - 1, size)
    last = len(steps) - 1
    kept = [steps[min(end, last)] for end in ends]
    if exact:
        return [kept, [_rounded(values[min(end, last)]) for end in ends]]
    groups = [values[max(0, end - size + 1) : end + 1] for end in ends]
    return [kept, [_rounded(math.fsum(group) / len(group)) for group in groups]]


def differences(runs: Sequence[RunData]) -> list[list[Any]]:
    """[setting, value in each run] of the settings in which the runs differ; where a run is to go is none."""
    flat = [flattened(run.settings) for run in runs]
    names = sorted({name for f in flat for name in f}) if len(runs) > 1 else []
    rows = [[name, *(f.get(name) for f in flat)] for name in names if not name.startswith("output_dir")]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def flattened(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            out |= flattened(value, f"{path}{name}.")
        else:
            out[f"{path}{name}"] = value
    return out


def _number(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return _rounded(float(value)) if number and math.isfinite(value) else None  # type: ignore[arg-type]


def _rounded(value: float) -> float:
    """Six digits, enough for a picture."""
    if value == int(value):
        return int(value)
    return float(f"{value:.6g}")
