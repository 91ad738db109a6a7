"""Writes the report of a suite into its output_dir: results.json, table.csv, table.md, table.png."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ardtrain import __version__
from ardtrain.compare.drawing import draw, draw_budgets
from ardtrain.compare.plan import Failure, Outcomes, RunResult, choose_rate
from ardtrain.compare.suite import Suite
from ardtrain.compare.tables import (
    csv_text,
    markdown_text,
    notes,
    table_rows,
    unequal_parameters,
    verdicts,
    verdicts_over_budgets,
)
from ardtrain.faults import replace_file

_ABSOLUTE = re.compile(r"(?<![\w.])/(?:[^\s/:()]+/)*([^\s/:()]+/[^\s/:()]+)")


def write_report(suite: Suite, written: Mapping[str, Any], outcomes: Outcomes) -> bool:
    """Writes results.json, table.csv, table.md and table.png; prints the table. True: something is wrong with it."""
    root = Path(suite.output_dir)
    rows = table_rows(suite, outcomes)
    metric, mode = suite.table_metric
    choices = [choose_rate(suite, method, outcomes) for method in suite.methods] if suite.tuning else []
    record = {
        "suite": suite.name,
        "metric": metric,
        "mode": mode,
        "reference": suite.reference,
        "machine": machine(),
        "settings": without_machine_paths(written),
        "tuning": {
            c.method: {
                "rate": c.rate, "scores": {f"{rate:g}": score for rate, score in c.scores.items()},
                "added": c.added, "edge": c.edge,
            }
            for c in choices
        },
        "verdicts": [*verdicts_over_budgets(suite, rows), *verdicts(suite, rows)],
        "notes": without_machine_paths(notes(suite, outcomes)),
        "rows": [row.to_json() for row in rows],
        "runs": [o.to_json() for _, o in sorted(outcomes.items()) if isinstance(o, RunResult)],
        "failed": {
            str(key): without_machine_paths(o.text) for key, o in sorted(outcomes.items()) if isinstance(o, Failure)
        },
    }  # fmt: skip
    replace_file(root / "results.json", json.dumps(record, indent=1) + "\n")
    replace_file(root / "table.csv", csv_text(rows))
    text = markdown_text(suite, outcomes)
    replace_file(root / "table.md", text)
    files = "results.json, table.csv, table.md, table.png"
    if rows:
        draw(suite, rows, root / "table.png")
    if rows and suite.budgets:
        draw_budgets(suite, rows, root / "budgets.png")
        files += ", budgets.png"
    print(f"\n{text}\nfiles: {root}/{files}", flush=True)
    lost = any(isinstance(o, RunResult) and o.key.part == "test" and o.value(metric) is None for o in outcomes.values())
    return bool(record["failed"] or lost or unequal_parameters(suite, outcomes) or not rows)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    names = ("torch", "deepspeed", "transformers", "peft")
    return {"ardtrain": __version__, **{name: importlib.metadata.version(name) for name in names}}


def machine() -> dict[str, Any]:
    """Where the figures came about."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def without_machine_paths(value: Any) -> Any:
    """Absolute paths cut to their last two parts, so that results can be kept elsewhere."""
    if isinstance(value, Mapping):
        return {key: without_machine_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_machine_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return _ABSOLUTE.sub(r".../\1", value)
