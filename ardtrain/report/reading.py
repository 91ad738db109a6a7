"""What a report shows of a run, read from its folder: a run that goes on, was resumed, failed, or has no ranks too."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ardtrain.config import ConfigError
from ardtrain.config.text import parse_yaml
from ardtrain.report.history import SiteHistory, budget, json_lines, matrix_of, read_sites
from ardtrain.watch import RUNNING, RunView, look

Floats = NDArray[np.float64]
_CLOCKS = ("elapsed_seconds", "startup_seconds")  # end in _seconds and are no section of the clock


@dataclass(frozen=True)
class RunData:
    """One run as its files show it."""

    name: str  # told apart from the other runs' names
    view: RunView
    settings: dict[str, Any]  # of config.yaml; {} where there is none
    config_text: str
    info: dict[str, Any]  # of run_info.json; {} for runs of before it was written
    curves: dict[str, tuple[list[float], list[float]]]  # name -> steps, values
    phases: dict[str, float]  # section of the clock -> seconds, of all starts
    elapsed_seconds: float
    startup_seconds: dict[str, float]  # of the last start
    void_steps: list[int]
    history: SiteHistory | None  # None: full fine-tuning has no ranks
    costs: Floats | None = None  # [S] numbers that a component of each site trains, I + O
    budget_ranks: Floats | None = None  # [S]
    scores: dict[int, Floats] = field(default_factory=dict)  # row of `history.ranks` -> [S] mean score before the event

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "unknown"))

    @property
    def goes_on(self) -> bool:
        return self.view.alive and self.view.state in (*RUNNING, "submitted")

    def parameters(self) -> tuple[list[int], list[float]]:
        """Steps and numbers in components; empty where the shapes are not known."""
        if self.history is None or self.costs is None:
            return [], []
        return self.history.steps, (self.history.ranks @ self.costs).tolist()

    def last(self, curve: str) -> float | None:
        """The newest value of a curve."""
        values = self.curves.get(curve, ([], []))[1]
        return values[-1] if values else None

    def best(self, curve: str) -> float | None:
        """The smallest value of a curve."""
        return min(self.curves.get(curve, ([], []))[1], default=None)


def read_runs(folders: Sequence[str]) -> list[RunData]:
    """Runs of folders, each under a name of its own.

    Raises:
        ConfigError: a folder is not there, holds no run, or a file in it is broken; a line each.
    """
    runs, errors = [], []
    for folder, name in zip(folders, names_of(folders), strict=True):
        try:
            runs.append(read_run(folder, name))
        except ValueError as error:
            errors.append(str(error))
        except OSError as error:
            errors.append(f"{error.filename}: cannot be read ({error.strerror}); make it a readable file")
    if errors or not runs:
        raise ConfigError(errors or ["which run folder? name a run's output_dir"])
    return runs


def names_of(folders: Sequence[str]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart; a folder given twice gets a number."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]).strip("/") or "/" for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    seen: dict[str, int] = {}
    for at, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[at] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def read_run(folder: str, name: str = "") -> RunData:
    """One run.

    Raises:
        ValueError: no such folder, no run in it, or a broken file: names it and, where it can, the line.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder}: no such folder; name a run's output_dir")
    if not os.path.isfile(root / "status"):
        raise ValueError(f"{folder}: holds no run (no file `status`); name a run's output_dir")
    records = list(json_lines(root / "metrics.jsonl"))
    history = read_sites(root / "ranks.jsonl") if _has_ranks(root / "ranks.jsonl") else None
    config_text, settings = _config(root / "config.yaml")
    info = _info(root / "run_info.json")
    phases, elapsed = seconds_of(records)
    startups = [r["startup_seconds"] for r in records if isinstance(r.get("startup_seconds"), dict)]
    run = RunData(
        name=name or root.resolve().name,
        view=look(root),
        settings=settings,
        config_text=config_text,
        info=info,
        curves=_curves(records),
        phases=phases,
        elapsed_seconds=elapsed,
        startup_seconds=startups[-1] if startups else {},
        void_steps=[int(r["step"]) for r in records if r.get("void")],
        history=history,
    )
    if history is None:
        return run
    shapes: Mapping[str, Any] = info.get("modules") or {}
    matrices = [matrix_of(site) for site in history.sites]
    known = all(matrix in shapes for matrix in matrices)
    costs = np.array([sum(shapes[m][:2]) for m in matrices], np.float64) if known else None
    return RunData(
        **{
            **vars(run),
            "costs": costs,
            "budget_ranks": budget(run.method, settings, history.ranks[0]),
            "scores": _scores(root / "scores", history),
        }
    )


def _has_ranks(path: Path) -> bool:
    """Full fine-tuning writes no ranks; a run that has just begun has no whole line yet."""
    try:
        with path.open("rb") as file:
            line = file.readline()
    except OSError:
        return False
    return line.endswith(b"\n") and b'"table": {}' not in line


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:  # the run ended before it was resolved
        return "", {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text ({error}); put back the run's own, or remove it") from error
    values = parse_yaml(text, source=str(path))
    return text, values if isinstance(values, dict) else {}


def _info(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it, and the shapes are left out") from error
    return values if isinstance(values, dict) else {}


def _curves(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Each number of the records by its name; what is not finite was written as null and is left out."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        step = record["step"]
        for name, value in record.items():
            if name == "step" or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def seconds_of(records: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], float]:
    """Seconds of each section of the clock, and of all, over all starts: a start's clock begins at 0."""
    total: dict[str, float] = {}
    last: dict[str, float] = {}
    elapsed = before = 0.0
    for record in records:
        now = record.get("elapsed_seconds")
        if now is None:
            continue
        if now < before:  # a new start
            _add(total, last)
            elapsed, last = elapsed + before, {}
        before = now
        last |= {n: v for n, v in record.items() if n.endswith("_seconds") and n not in _CLOCKS and v is not None}
    _add(total, last)
    return {name.removesuffix("_seconds"): value for name, value in total.items()}, elapsed + before


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def _scores(folder: Path, history: SiteHistory) -> dict[int, Floats]:
    """Mean scores by the row of the history whose event they led to; a file that cannot be read is left out."""
    found: dict[int, Floats] = {}
    for row, event in enumerate(history.events):
        path = folder / f"event-{event.get('event')}.safetensors"
        if row == 0 or not path.is_file():
            continue
        try:
            scores = load_file(path)["mean_score"]
        except (OSError, KeyError, SafetensorError):
            continue
        if scores.shape == (len(history.sites),):
            found[row] = scores.astype(np.float64)
    return found
