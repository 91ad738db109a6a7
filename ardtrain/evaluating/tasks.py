"""`--tasks`: lm-evaluation-harness on a checkpoint, through its own model class (HFLM) around our model.

The harness runs whole on every process; the model's batches are dealt over them (dealt_tasks.py).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import norm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from ardtrain.collectives import World
from ardtrain.config import ConfigError
from ardtrain.evaluating.intervals import Figure
from ardtrain.reasons import first_line

logger = logging.getLogger("ardtrain")


@dataclass(frozen=True)
class TaskRequest:
    """Names of tasks, groups or tags. include_path: a folder with task files of one's own; limit: rows a task."""

    names: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None


def check_tasks(request: TaskRequest, *, task: str) -> Any:
    """The harness's TaskManager, if it knows all of them.

    Raises:
        ConfigError: the package is missing, the run is no language model, a task is unknown or its rows are not here.
    """
    if task != "causal_lm":
        raise ConfigError([f"--tasks: lm-eval asks language models, and the run's task is {task}; use --metrics"])
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(["--tasks needs the package lm_eval; pip install 'ardtrain[eval]'"])
    if request.include_path is not None and not Path(request.include_path).is_dir():
        raise ConfigError([f"--include_path={request.include_path} is no folder; name one with task files (YAML)"])
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=request.include_path)
    known = manager.all_tasks
    errors = []
    for name in request.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them; --include_path adds yours"
            errors.append(f"--tasks: lm-eval knows no task {name}; {guess}")
    if errors:
        raise ConfigError(errors)
    _load_data(manager, request.names)
    return manager


def _load_data(manager: Any, names: Sequence[str]) -> None:
    """The tasks' rows into the datasets library's cache. Raises ConfigError."""
    import datasets

    for name in names:
        try:
            manager.load([name])
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(
                [
                    f"--tasks: the rows of {name} cannot be loaded ({first_line(error)}); correct the task's file, or "
                    "fill the datasets library's cache (HF_HOME) where there is a network"
                ]
            ) from error


@contextlib.contextmanager
def _as_the_harness_wants(module: Any) -> Iterator[None]:
    """Inside, HFLM ties no weights anew (sharded, they would come apart), and forks no processes for its intervals."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    module.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.tie_weights
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def run_tasks(
    module: Any,
    tokenizer: PreTrainedTokenizerBase,
    request: TaskRequest,
    manager: Any,
    *,
    world: World,
    sharded: bool,
    batch_size: int,
    bootstrap_samples: int,
) -> dict[str, Any]:
    """lm-eval's results, with the samples, on process 0. All processes must call this.

    sharded: the module's weights are (ZeRO-3).
    """
    from lm_eval import simple_evaluate

    from ardtrain.evaluating.dealt_tasks import DealtLM

    with _as_the_harness_wants(module):
        model = DealtLM(module, tokenizer, world=world, batch_size=batch_size, sharded=sharded)
        results: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=list(request.names),
            task_manager=manager,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            bootstrap_iters=bootstrap_samples,
        )
    return results


def task_figures(results: dict[str, Any], *, confidence: float) -> dict[str, dict[str, Figure]]:
    """Task or group -> metric -> figure; the interval is the normal one of lm-eval's standard error.

    A metric behind a filter of the task's keeps its name: `exact_match,strict-match`.
    """
    width = float(norm.ppf((1 + confidence) / 2))
    out: dict[str, dict[str, Figure]] = {}
    for task, found in results["results"].items():
        figures = {}
        for key, value in found.items():
            name, _, filter_ = key.partition(",")
            if name.endswith("_stderr") or not filter_ or not isinstance(value, int | float):
                continue
            error = found.get(f"{name}_stderr,{filter_}")
            spread = width * error if isinstance(error, int | float) else None
            ends = (None, None) if spread is None else (value - spread, value + spread)
            figures[name if filter_ == "none" else key] = Figure(float(value), *ends)
        out[task] = figures
    return out


def sample_lines(results: dict[str, Any], task: str) -> Sequence[str]:
    """The harness's record of each of a task's rows, a JSON line each."""
    return [json.dumps(sample, default=str, ensure_ascii=False) for sample in results.get("samples", {}).get(task, [])]
