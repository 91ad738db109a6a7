"""Figures and predictions of one evaluation: figures.json, predictions.jsonl, lines on the console. Process 0 alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ardtrain.evaluating.held_out import Rows, held_out_figures
from ardtrain.evaluating.intervals import Bootstrap, Figure, Floats
from ardtrain.evaluating.tasks import sample_lines, task_figures
from ardtrain.evaluating.text_metrics import BY_ROW, Answered, by_group, figure_of_all, row_scores
from ardtrain.evaluation import HeldOut
from ardtrain.faults import replace_file

FIGURES, PREDICTIONS = "figures.json", "predictions.jsonl"
_GROUPS_TOLD = 20  # on the console


class Report:
    """Collects what an evaluation finds; nothing here communicates."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap
        self.figures: dict[str, Figure] = {}
        self.groups: dict[str, dict[str, tuple[int, Figure]]] = {}  # metric -> group -> rows and figure
        self.logged: dict[str, float] = {}  # as training logs them
        self.lines: dict[str, dict[str, Any]] = {}  # by the row's place in its file
        self.tasks: dict[str, dict[str, Figure]] = {}  # lm-eval's: task -> metric -> figure
        self.task_rows: dict[str, Sequence[str]] = {}
        self.task_notes: dict[str, Any] = {}

    def held_out(
        self, held_out: HeldOut, rows: Rows, wanted: Sequence[str], groups: Sequence[str | None] | None
    ) -> None:
        """Metrics of the one forward, and each row's part."""
        self.figures |= held_out_figures(held_out, rows, wanted, self._bootstrap)
        self.logged = {**held_out.numbers(), "num_tokens": held_out.num_tokens}
        for index, name in enumerate(rows.ids):
            line = self._line(name)
            line["loss"] = float(rows.losses[index])
            if rows.num_classes:
                line |= {"label": int(rows.classes[index]), "prediction": int(rows.predicted[index])}
            else:
                line["num_tokens"] = int(rows.targets[index])
        if rows.num_classes and "accuracy" in wanted:
            self._by_group("accuracy", (rows.classes == rows.predicted).astype(np.float64), groups)

    def generated(self, answered: Answered, wanted: Sequence[str], lengths: Sequence[int], ids: Sequence[str]) -> None:
        """Metrics of generated texts. lengths: tokens of each without its end token."""
        lines = [self._line(name) for name in ids]
        for line, text, references, length in zip(lines, answered.texts, answered.references, lengths, strict=True):
            line |= {"text": text, "references": list(references), "generated_tokens": length}
        for name in wanted:
            if name not in BY_ROW:
                self.figures[name] = figure_of_all(name, answered, self._bootstrap)
                continue
            scores = row_scores(name, answered)
            self.figures[name] = self._bootstrap.mean(scores)
            self._by_group(name, scores, answered.groups)
            for line, score in zip(lines, scores, strict=True):
                line[name] = float(score)

    def of_tasks(self, results: dict[str, Any]) -> None:
        """What lm-eval found."""
        self.tasks = task_figures(results, confidence=self._bootstrap.confidence)
        self.task_rows = {name: sample_lines(results, name) for name in results.get("samples", {})}
        self.task_notes = {
            "versions": results.get("versions", {}),
            "num_fewshot": results.get("n-shot", {}),
            "rows": {name: counts["effective"] for name, counts in results.get("n-samples", {}).items()},
        }

    def _line(self, name: str) -> dict[str, Any]:
        return self.lines.setdefault(name, {"row": len(self.lines), "id": name})

    def _by_group(self, metric: str, scores: Floats, groups: Sequence[str | None] | None) -> None:
        found = by_group(scores, groups, self._bootstrap) if groups is not None else {}
        if found:
            self.groups[metric] = found

    def write(self, out: Path, head: Mapping[str, Any]) -> None:
        """figures.json and predictions.jsonl, each whole or as before. head: what figures.json begins with."""
        out.mkdir(parents=True, exist_ok=True)
        whole: dict[str, Any] = {
            **head,
            "metrics": {name: figure.to_json() for name, figure in self.figures.items()},
            "groups": {
                metric: {name: {"rows": rows, **figure.to_json()} for name, (rows, figure) in found.items()}
                for metric, found in self.groups.items()
            },
            "held_out": self.logged,
        }
        if self.tasks:
            figures = {task: {n: f.to_json() for n, f in found.items()} for task, found in self.tasks.items()}
            whole["tasks"] = {"figures": figures, **self.task_notes}
        for task, rows in self.task_rows.items():
            replace_file(out / f"samples_{task}.jsonl", "".join(f"{row}\n" for row in rows))
        replace_file(out / PREDICTIONS, "".join(_json(line) + "\n" for line in self.lines.values()))
        replace_file(out / FIGURES, _json(whole, indent=1) + "\n")

    def tell(self, out: Path, *, seconds: float) -> None:
        """The figures on the console."""
        lines = [(name, figure.text()) for name, figure in self.figures.items()]
        for metric, found in self.groups.items():
            shown = list(found.items())[:_GROUPS_TOLD]
            lines += [(f"{metric}, {name}", f"{figure.text()} of {rows} rows") for name, (rows, figure) in shown]
        lines += [(f"{task}, {n}", f.text()) for task, found in self.tasks.items() for n, f in found.items()]
        width = max((len(name) for name, _ in lines), default=0)
        for name, text in lines:
            print(f"{name:<{width}}  {text}")
        rows = len(self.lines) + sum(map(len, self.task_rows.values()))
        print(f"{rows} rows in {seconds:.1f} s; figures and predictions: {out}", flush=True)


def _json(value: object, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **how)
