"""`ardtrain evaluate`: from the command line to figures.json and predictions.jsonl. Every process runs it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ardtrain.collectives import World
from ardtrain.config import ConfigError, RunConfig, updated
from ardtrain.data_sources import check_source
from ardtrain.evaluating.held_out import Rows, evaluate_rows, held_out_figures
from ardtrain.evaluating.intervals import Bootstrap, Figure
from ardtrain.evaluating.model import Evaluated, EvaluatedAdapters, EvaluatedFull
from ardtrain.evaluating.request import (
    CONFIG_FILE,
    FULL_MODEL,
    OUT_FOLDER,
    Request,
    Target,
    chosen_metrics,
    find_target,
    read_request,
)
from ardtrain.evaluation import HeldOut
from ardtrain.faults import replace_file
from ardtrain.preflight import Prepared, prepare_config, read_run_config
from ardtrain.run import Process, first_steps, run_together
from ardtrain.session import Surroundings

FIGURES, PREDICTIONS = "figures.json", "predictions.jsonl"
logger = logging.getLogger("ardtrain")


def evaluate(arguments: Sequence[str]) -> int:
    """`ardtrain evaluate ...` on this process; returns the exit code. Raises ConfigError."""
    request = read_request(arguments)
    target = find_target(request.target)
    config = evaluated_config(request, target, world_size=1)  # mistakes are told before anything starts
    metrics = chosen_metrics(request.metrics, task=config.task)
    startup, identity, device = first_steps()
    config = evaluated_config(request, target, world_size=identity.world_size)
    target = with_finished_model(target, config)
    if target.path is None:
        config = updated(config, {"model_name_or_path": str(target.run_dir / FULL_MODEL), "revision": None})
    prepared = prepare_config(config, world_size=identity.world_size)
    out = Path(request.out) if request.out else target.run_dir / OUT_FOLDER / target.name

    def body(process: Process, around: Surroundings) -> None:
        Evaluation(open_model(prepared, around, target), around, metrics).execute(out, target)

    return run_together(config, out, identity, device, startup, body)


def evaluated_config(request: Request, target: Target, *, world_size: int) -> RunConfig:
    """The run's config with what the command line says; nothing of it writes into the run.

    Raises:
        ConfigError: no held-out rows are named, the file is missing, or a setting is wrong.
    """
    config, _ = read_run_config(target.run_dir / CONFIG_FILE, request.overrides, world_size=world_size)
    path = request.data if request.data is not None else config.data.eval_file
    if path is None:
        raise ConfigError(
            [f"--data is missing and the run {target.run_dir} has no data.eval_file; give --data FILE of held-out rows"]
        )
    try:
        check_source(path)
    except ValueError as error:
        where = "--data" if request.data is not None else "data.eval_file"
        raise ConfigError([f"{where}={path}: {error}"]) from error
    return updated(
        config,
        {
            "data": config.data.model_copy(update={"eval_file": path}),
            "output_dir": str(target.run_dir),
            "gradient_checkpointing": False,  # nothing is kept for a backward
            "activation_offload": False,
            "preemption_signal": (),  # it ends at once: there is nothing to save
            "verify_weights": config.verify_weights,
        },
    )


def with_finished_model(target: Target, config: RunConfig) -> Target:
    """Of a run that trained all weights its finished model stands for its newest checkpoint, which is a pickle."""
    if config.method == "full" and not target.is_named and (target.run_dir / FULL_MODEL).is_dir():
        return Target(target.run_dir, None, is_named=False)
    return target


def open_model(prepared: Prepared, around: Surroundings, target: Target) -> Evaluated:
    """The checkpoint's model. All processes must call this."""
    if prepared.config.method == "full":
        return EvaluatedFull(prepared, around, target.path)
    assert target.path is not None
    return EvaluatedAdapters(prepared, around, target.path)


class Evaluation:
    """One evaluation on this process: passes over the rows, figures, files."""

    def __init__(self, model: Evaluated, around: Surroundings, metrics: Sequence[str]) -> None:
        self.model, self.metrics = model, metrics
        self.world: World = around.world
        self.between = around.watchdog.touch
        config = model.prepared.config
        block = config.evaluation
        self.bootstrap = Bootstrap(block.bootstrap_samples, block.confidence, config.seed)

    def execute(self, out: Path, target: Target) -> None:
        """All processes must call this; process 0 writes."""
        start = time.monotonic()
        held_out, rows = self._held_out()
        figures: dict[str, Figure] = {}
        if self.world.is_main:
            figures = held_out_figures(held_out, rows, self.metrics, self.bootstrap)
            lines = held_out_lines(rows)
            write(out, self._summary(target, held_out, figures, num_rows=len(lines)), lines)
            tell(out, figures, seconds=time.monotonic() - start, num_rows=len(lines))
        self.world.barrier("figures written")

    def _held_out(self) -> tuple[HeldOut, Rows]:
        model = self.model
        with model.bound():
            result = evaluate_rows(
                model.module,
                model.eval_data,
                world=self.world,
                logit_head=model.logit_head,
                num_classes=len(model.prepared.shape.labels),
                between=self.between,
            )
            model.release()
        return result

    def _summary(
        self, target: Target, held_out: HeldOut, figures: Mapping[str, Figure], *, num_rows: int
    ) -> dict[str, Any]:
        """What figures.json holds: nothing in it hangs on the number of processes or on the clock."""
        config = self.model.prepared.config
        return {
            "checkpoint": target.name,
            "step": self.model.step,
            "task": config.task,
            "method": config.method,
            "data": config.data.eval_file,
            "rows": num_rows,
            "counts": self.model.eval_data.counts,
            "metrics": {name: figure.to_json() for name, figure in figures.items()},
            "held_out": {**held_out.numbers(), "num_tokens": held_out.num_tokens},
            "intervals": {
                "confidence": self.bootstrap.confidence,
                "resamples": self.bootstrap.samples,
                "seed": self.bootstrap.seed,
            },
        }


def held_out_lines(rows: Rows) -> list[dict[str, Any]]:
    """A line of predictions.jsonl for each sample, in the file's order."""
    lines: list[dict[str, Any]] = []
    for index, name in enumerate(rows.ids):
        line: dict[str, Any] = {"row": index, "id": name, "loss": float(rows.losses[index])}
        if rows.num_classes:
            line |= {"label": int(rows.classes[index]), "prediction": int(rows.predicted[index])}
        else:
            line["num_tokens"] = int(rows.targets[index])
        lines.append(line)
    return lines


def write(out: Path, summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """figures.json and predictions.jsonl, each whole or as before."""
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    replace_file(out / PREDICTIONS, text)
    replace_file(out / FIGURES, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def tell(out: Path, figures: Mapping[str, Figure], *, seconds: float, num_rows: int) -> None:
    """The figures on the console."""
    width = max((len(name) for name in figures), default=0)
    for name, figure in figures.items():
        print(f"{name:<{width}}  {figure.text()}")
    print(f"{num_rows} rows in {seconds:.1f} s; figures and predictions: {out}", flush=True)
