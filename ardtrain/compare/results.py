"""What a run folder says about a finished run: metrics at the end, parameters, ranks, time. Reads files only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ardtrain.compare.plan import RunResult

RESULT_FILE = "result.json"
CONSOLE_FILE = "console.log"
_TRAINED = re.compile(r"([\d,]+) trained (?:numbers|parameters)")
_NOT_FINITE = "not finite"  # the trainer's words when a loss or gradient ends a run


def run_state(folder: Path) -> tuple[str, int]:
    """State and step of the run's `status` line; ("", 0) where there is none."""
    try:
        state, step = (folder / "status").read_text().split()
    except (OSError, ValueError):
        return "", 0
    return state, int(step)


def stored_result(folder: Path, digest: str) -> RunResult | None:
    """The run's `result.json` if it was made from the config with this digest."""
    try:
        stored = RunResult(**json.loads((folder / RESULT_FILE).read_text()))
    except (OSError, ValueError, TypeError):  # absent, torn, or of another version
        return None
    return stored if stored.digest == digest else None


def collected(folder: Path, site_costs: Mapping[str, int]) -> dict[str, Any]:
    """RunResult's measured fields of a finished run.

    Args:
        site_costs: numbers of one component, I + O, by site.
    Raises:
        ValueError: no evaluation at the run's last step.
    """
    metrics = _records(folder / "metrics.jsonl")
    _, step = run_state(folder)
    evaluated: dict[str, float | None] = {}
    for record in metrics:
        if record["step"] == step:
            evaluated |= {name: value for name, value in record.items() if name.startswith("eval_")}
    if not evaluated:
        raise ValueError(f"{folder}/metrics.jsonl holds no evaluation at the last step, {step}")
    timed = [record for record in metrics if "elapsed_seconds" in record]
    seconds = timed[-1] if timed else {}
    tables = rank_tables(folder / "ranks.jsonl")
    console = console_text(folder)
    started = _TRAINED.search(console)
    final = exported_parameters(folder / "adapter", tables[-1] if tables else {}, site_costs)
    start = int(started[1].replace(",", "")) if started else None
    if final is None:
        final = start  # no adapter is exported (`full`): what trains never changes its size
    return {
        "metrics": evaluated,
        "step": step,
        "parameters_start": start,
        "parameters_final": final,
        "parameters_peak": peak_parameters(folder / "adapter", tables, site_costs) or final,
        "total_rank_start": sum(tables[0].values()) if tables else None,
        "total_rank_final": sum(tables[-1].values()) if tables else None,
        "seconds": seconds.get("elapsed_seconds"),
        "resumed": "resumed from" in console,
        "allocator_fraction": seconds.get("allocator_fraction"),
    }


def rank_tables(path: Path) -> list[dict[str, int]]:
    """Site -> rank at the start and after each event; empty where the run wrote no ranks."""
    tables: list[dict[str, int]] = []
    for record in _records(path):
        table = dict(record["table"]) if "table" in record else dict(tables[-1])
        table |= {change["site"]: change["after"] for change in record.get("changes", [])}
        tables.append(table)
    return tables


def exported_parameters(folder: Path, table: Mapping[str, int], site_costs: Mapping[str, int]) -> int | None:
    """Numbers in an exported PEFT folder that the model uses; None where there is no adapter.

    A component whose column of B is zero adds nothing and is not counted (AdaLoRA's masked ones). Heads of one matrix
    share a padded lora_A and lora_B in the export: they are counted by the final table, rank x (I + O) of the head.
    Diagonals are folded into B, so they are not counted; magnitudes and a classifier head are.
    """
    counted = _exported(folder)
    if counted is None:
        return None
    components, other = counted
    heads: dict[str, int] = {}
    for site, rank in table.items():
        module, colon, _ = site.partition(":")
        if colon:
            heads[module] = heads.get(module, 0) + rank * site_costs[site]
    return other + sum(heads.get(module, numbers) for module, numbers in components.items())


def peak_parameters(folder: Path, tables: list[dict[str, int]], site_costs: Mapping[str, int]) -> int | None:
    """Most numbers held at once: the largest rank table's, masked components too, and what has no rank."""
    counted = _exported(folder)
    if counted is None or not tables or any(site not in site_costs for site in tables[0]):
        return None
    return counted[1] + max(sum(rank * site_costs[site] for site, rank in table.items()) for table in tables)


def failure_text(folder: Path) -> str:
    """Last line of a failed run's error, and the log to read on in."""
    try:
        status = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        status = {}
    text = str(status.get("error", "")) if status.get("state") == "failed" else ""
    lines = [line.strip() for line in (text or console_text(folder)).replace("\r", "\n").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no word of it'} (log: {folder / CONSOLE_FILE})"


def diverged(folder: Path) -> bool:
    """Did the run end on a loss or gradient that was not finite?"""
    return run_state(folder)[0] == "failed" and _NOT_FINITE in failure_text(folder)


def console_text(folder: Path) -> str:
    """All that the run has printed, every start of it."""
    path = folder / CONSOLE_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _records(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a line torn by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _exported(folder: Path) -> tuple[dict[str, int], int] | None:
    """Numbers of the components by module, and of all other tensors; None where there is no adapter."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return None
    components: dict[str, int] = {}
    other = 0
    with safe_open(path, framework="pt") as file:  # pt: NumPy knows no bfloat16
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor = file.get_tensor(name)
            module, found, _ = name.partition(".lora_B.")
            if found:
                used = int(tensor.ne(0).any(dim=0).sum())  # lora_B [O, R]
                inputs = file.get_slice(f"{module}.lora_A.weight").get_shape()[1]  # lora_A [R, I]
                components[module.removeprefix("base_model.model.")] = used * (tensor.shape[0] + inputs)
            elif ".lora_A." not in name:
                other += tensor.numel()
    return components, other
