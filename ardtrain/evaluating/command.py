"""`ardtrain evaluate`: from the command line to figures.json and predictions.jsonl. Every process runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ardtrain.collectives import World
from ardtrain.config import ConfigError, DataBlock, RunConfig, updated
from ardtrain.data_sources import check_source
from ardtrain.evaluating.answers import answer_rows, answered_by, known_of, names_of, open_prompts, refuse_unanswerable
from ardtrain.evaluating.held_out import evaluate_rows
from ardtrain.evaluating.intervals import Bootstrap
from ardtrain.evaluating.model import Evaluated, EvaluatedAdapters, EvaluatedFull
from ardtrain.evaluating.references import Known
from ardtrain.evaluating.report import Report
from ardtrain.evaluating.request import (
    FULL_MODEL,
    OUT_FOLDER,
    Request,
    Target,
    chosen_metrics,
    find_target,
    read_request,
)
from ardtrain.evaluating.tasks import TaskRequest, check_tasks, run_tasks
from ardtrain.evaluating.text_metrics import GENERATED
from ardtrain.faults import write_status
from ardtrain.preflight import Prepared, prepare_config, read_run_config
from ardtrain.run import Process, first_steps, run_together
from ardtrain.session import Surroundings
from ardtrain.trained import CONFIG

TASKS_SECONDS = 24 * 3600.0  # the watchdog's patience with lm-eval, which tells nothing meanwhile


def evaluate(arguments: Sequence[str]) -> int:
    """`ardtrain evaluate ...` on this process; returns the exit code. Raises ConfigError."""
    request = read_request(arguments)
    target = find_target(request.target)
    config = evaluated_config(request, target, world_size=1)  # mistakes are told before anything starts
    metrics: tuple[str, ...] = ()
    if request.metrics or request.tasks is None:
        metrics = chosen_metrics(request.metrics, task=config.task)
    manager = None if request.tasks is None else check_tasks(request.tasks, task=config.task)
    startup, identity, device = first_steps()
    config = evaluated_config(request, target, world_size=identity.world_size)
    target = with_finished_model(target, config)
    if target.path is None:
        config = updated(config, {"model_name_or_path": str(target.run_dir / FULL_MODEL), "revision": None})
    prepared = prepare_config(config, world_size=identity.world_size)
    if set(metrics) & set(GENERATED):
        refuse_unanswerable(config, setting="--metrics")
    out = Path(request.out) if request.out else target.run_dir / OUT_FOLDER / target.name

    def body(process: Process, around: Surroundings) -> None:
        model = open_model(prepared, around, target)
        Evaluation(model, around, metrics, tasks=request.tasks, manager=manager).execute(out, target)

    return run_together(config, out, "--out", identity, device, startup, body)


def evaluated_config(request: Request, target: Target, *, world_size: int) -> RunConfig:
    """The run's config with what the command line says; nothing of it writes into the run.

    Raises:
        ConfigError: no held-out rows are named, the file is missing, or a setting is wrong.
    """
    config, _ = read_run_config(target.run_dir / CONFIG, request.overrides, world_size=world_size)
    path = request.data
    if path is None and not config.data.held_out_files and request.tasks is not None and not request.metrics:
        path = config.data.training_files[0]  # lm-eval brings its own rows; these are opened and not evaluated
    data = config.data if path is None else held_out_alone(config.data, path)
    if not data.held_out_files:
        raise ConfigError(
            [f"--data is missing and the run {target.run_dir} has no data.eval_file; give --data FILE of held-out rows"]
        )
    for file in data.held_out_files:
        where = "--data" if request.data is not None else "data.eval_file"
        try:
            check_source(file, setting=where)
        except ValueError as error:
            raise ConfigError([f"{where}={file}: {error}"]) from error
    return updated(
        config,
        {
            "data": data,
            "output_dir": str(target.run_dir),
            "gradient_checkpointing": False,  # nothing is kept for a backward
            "activation_offload": False,
            "preemption_signal": (),  # it ends at once: there is nothing to save
            "ranks_from": None,  # the checkpoint has its own
        },
    )


def held_out_alone(data: DataBlock, path: str) -> DataBlock:
    """The block with this file as all of its held-out rows."""
    sources = {name: own.model_copy(update={"eval_file": None}) for name, own in data.sources.items()}
    return data.model_copy(update={"eval_file": path, "sources": sources})


def with_finished_model(target: Target, config: RunConfig) -> Target:
    """Of a run that trained all weights its finished model stands for its newest checkpoint, which is a pickle."""
    if config.method == "full" and not target.is_named and (target.run_dir / FULL_MODEL).is_dir():
        return replace(target, path=None)
    return target


def open_model(prepared: Prepared, around: Surroundings, target: Target) -> Evaluated:
    """The checkpoint's model. All processes must call this."""
    if prepared.config.method == "full":
        return EvaluatedFull(prepared, around, target)
    assert target.path is not None
    return EvaluatedAdapters(prepared, around, target.path)


class Evaluation:
    """One evaluation on this process: passes over the rows, figures, files."""

    def __init__(
        self,
        model: Evaluated,
        around: Surroundings,
        metrics: Sequence[str],
        *,
        tasks: TaskRequest | None = None,
        manager: Any = None,
    ) -> None:
        """metrics: of our own, which may be none; tasks, manager: lm-eval's (check_tasks)."""
        self.model, self.metrics = model, metrics
        self.world: World = around.world
        self.touch = around.watchdog.touch
        self.between: Callable[[], None] = around.watchdog.touch
        self.config = config = model.prepared.config
        self.block = block = config.evaluation
        self.bootstrap = Bootstrap(block.bootstrap_samples, block.confidence, config.seed)
        self.data = model.eval_data
        self.tasks, self.manager = tasks, manager
        self.generates = bool(set(metrics) & set(GENERATED))
        if self.generates:
            self.data = open_prompts(config, model.tokenizer, self.data)
        self.ids = names_of(self.data)

    def execute(self, out: Path, target: Target) -> None:
        """All processes must call this; process 0 writes, and where it fails all end with its text."""
        start = time.monotonic()
        report = Report(self.bootstrap)
        known = self._known()
        with self.model.bound():
            if set(self.metrics) - set(GENERATED):
                self._held_out(report, known)
            if self.generates:
                self._generated(report, known)
            if self.tasks is not None:
                self._of_tasks(report, self.tasks)
            self.model.release()

        def tell() -> None:
            try:
                report.write(out, self._head(target))
                write_status(out, "finished", self.model.step)  # a failure writes one too
            except OSError as error:
                raise ConfigError(
                    [f"--out={out}: cannot be written ({error}); free some space, or choose another folder"]
                ) from error
            report.tell(out, seconds=time.monotonic() - start)

        self.world.ask_main(tell)

    def _known(self) -> Known | None:
        """References and groups, on process 0; read before anything is computed. All processes must call this."""
        if not self.generates and self.block.group_field is None:
            return None
        return known_of(self.config, self.model.tokenizer, self.ids, world=self.world)

    def _held_out(self, report: Report, known: Known | None) -> None:
        model = self.model
        held_out, rows = evaluate_rows(
            model.module,
            model.eval_data,
            world=self.world,
            logit_head=model.logit_head,
            num_classes=len(model.prepared.shape.labels),
            between=self.between,
        )
        wanted = [name for name in self.metrics if name not in GENERATED]
        groups = None if known is None else known.groups
        self.world.ask_main(lambda: report.held_out(held_out, rows, wanted, groups))

    def _generated(self, report: Report, known: Known | None) -> None:
        model = self.model
        sharded = model.prepared.plan.backbone_stage == 3
        tokens = answer_rows(
            model.module,
            self.data,
            self.config,
            model.tokenizer,
            world=self.world,
            sharded=sharded,
            between=self.between,
        )
        wanted = [name for name in self.metrics if name in GENERATED]

        def judge() -> None:
            assert known is not None
            answered = answered_by(tokens, known, model.tokenizer)
            report.generated(answered, wanted, list(map(len, tokens)), self.ids)

        self.world.ask_main(judge)

    def _of_tasks(self, report: Report, tasks: TaskRequest) -> None:
        """lm-eval's tasks; the watchdog waits for all of them."""
        self.touch(TASKS_SECONDS)
        results = run_tasks(
            self.model.module,
            self.model.tokenizer,
            tasks,
            self.manager,
            world=self.world,
            sharded=self.model.prepared.plan.backbone_stage == 3,
            batch_size=self.config.per_device_eval_batch_size,
            bootstrap_samples=self.block.bootstrap_samples,
        )
        self.between()
        self.world.ask_main(lambda: report.of_tasks(results))

    def _head(self, target: Target) -> dict[str, Any]:
        """What figures.json begins with: nothing in it hangs on the number of processes or on the clock."""
        return {
            "checkpoint": target.name,
            "step": self.model.step,
            "task": self.config.task,
            "method": self.config.method,
            "data": self.config.data.eval_file or self.config.data.held_out_sources,
            "rows": len(self.ids) if self.metrics else 0,
            "counts": self.data.counts if self.metrics else {},
            "settings": {"seed": self.config.seed, **self.block.model_dump(mode="json")},
        }
