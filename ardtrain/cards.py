"""The model card of an exported adapter or a merged model: README.md with the YAML head that the hub reads."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData

from ardtrain import __version__
from ardtrain.config import RunConfig
from ardtrain.config.evaluation import best_metric
from ardtrain.config.models import is_greater_better
from ardtrain.data_sources import is_hub, parse_hub
from ardtrain.faults import replace_file

CARD = "README.md"
_PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "image_text_to_text": "image-text-to-text",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class Described:
    """What a card is made of.

    ranks: module -> rank of its pair. checks: lines on what was compared. labels: of a classifier.
    """

    kind: Literal["adapter", "merged"]
    config: RunConfig
    run_dir: Path
    step: int
    ranks: Mapping[str, int]
    versions: Mapping[str, str]
    checks: Sequence[str] = ()
    labels: Sequence[str] = ()


def write_card(folder: Path, described: Described) -> None:
    """Writes README.md into the folder."""
    replace_file(folder / CARD, card_text(described))


def card_text(d: Described) -> str:
    """The card. Local folders are named by their last part: a path says more than others should read."""
    config, base = d.config, base_name(d.config.model_name_or_path)
    sets = [parse_hub(f).name for f in config.data.training_files if is_hub(f) and not parse_hub(f).is_folder]
    head = ModelCardData(
        base_model=base,
        library_name="peft" if d.kind == "adapter" else "transformers",
        license="unknown",
        pipeline_tag=_PIPELINES[config.task],
        datasets=list(dict.fromkeys(sets)) or None,
        tags=["lora", "ardtrain", config.method],
    ).to_yaml()
    title = "Low-rank adapter" if d.kind == "adapter" else "Merged model"
    files = ", ".join(f if is_hub(f) else Path(f).name for f in config.data.training_files)
    weights = [f"{name} {own.weight:g}" for name, own in config.data.sources.items() if own.weight is not None]
    files += f" (weights: {', '.join(weights)})" if weights else ""
    trained = f"Trained from `{base}` by ardtrain with method `{config.method}`"
    parts = [
        f"---\n{head.strip()}\n---",
        f"# {title}: {base}, {config.method}",
        f"{trained}, {d.step:,} optimizer steps of {config.global_batch_size} rows. Data: {files}.",
        "**Licence: to be filled in above (`license`).** The base model's terms bind what is made of it.",
        _use(d, base),
        "## Ranks\n\n" + _ranks(d.ranks),
        "## Figures\n\n" + _figures(d.run_dir / "metrics.jsonl", d.step, config),
        *(["## Classes\n\n" + ", ".join(d.labels)] if d.labels else []),
        "## Checks\n\n" + "\n".join(f"- {line}" for line in (*d.checks, *_quantized(config))),
        "## Settings and versions\n\n" + _settings(d),
    ]
    return "\n\n".join(parts).encode("ascii", "replace").decode() + "\n"


def base_name(name_or_path: str) -> str:
    """The hub id of the base, also of a folder of the hub's cache; of another folder its name."""
    path = Path(name_or_path)
    if not path.is_dir() and _HUB_ID.fullmatch(name_or_path):
        return name_or_path
    for part in path.resolve().parts:
        if match := _CACHED.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return path.resolve().name


def _use(d: Described, base: str) -> str:
    auto = {
        "causal_lm": "AutoModelForCausalLM",
        "sequence_classification": "AutoModelForSequenceClassification",
        "image_text_to_text": "AutoModelForImageTextToText",
    }[d.config.task]
    labels = f", num_labels={len(d.labels)}" if d.labels and d.kind == "adapter" else ""
    if d.kind == "merged":
        return f"```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained(FOLDER)\n```"
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{base}"{labels})\nmodel = PeftModel.from_pretrained(base, FOLDER)\n```'
    )


def _ranks(ranks: Mapping[str, int]) -> str:
    """A table by kind of matrix (the last part of its path)."""
    kinds: dict[str, list[int]] = {}
    for module, rank in ranks.items():
        kinds.setdefault(module.rpartition(".")[2], []).append(rank)
    rows = [
        f"| {kind} | {len(own)} | {min(own)} | {sum(own) / len(own):.2f} | {max(own)} | {sum(own)} |"
        for kind, own in kinds.items()
    ]
    total, largest = sum(ranks.values()), max(ranks.values(), default=0)
    return (
        "| Matrix | adapted | smallest | mean | largest | total |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
        + "\n".join(rows)
        + f"\n\nTotal rank {total}, largest {largest}; matrices of rank 0 are not counted."
    )


def _figures(path: Path, step: int, config: RunConfig) -> str:
    """The last training loss and the first, best and last evaluation up to a step, with all that each measured.

    Best is by the run's metric_for_best_model, as its file `best` is.
    """
    lines = [line for line in _json_lines(path) if line.get("step", 0) <= step]
    losses = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    chosen: dict[str, dict[str, Any]] = {}
    if losses:
        chosen["last logged step"] = losses[-1]
    if evaluations:
        chosen["first evaluation"] = evaluations[0]
        metric = f"eval_{best_metric(config.metric_for_best_model)}"
        judged = [line for line in evaluations if _is_finite(line.get(metric))]
        if judged:
            best = max if is_greater_better(config) else min  # of equal ones the first, as `best` has it
            chosen[f"best evaluation (by {metric})"] = best(judged, key=lambda line: line[metric])
        chosen["last evaluation"] = evaluations[-1]
    if not chosen:
        return "The run's metrics.jsonl has no line up to this step."
    measured = dict.fromkeys(name for line in chosen.values() for name in line if name.startswith("eval_"))
    shown = ("step", "loss", *measured)
    names = [name for name in shown if any(isinstance(line.get(name), int | float) for line in chosen.values())]
    table = [f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for title, line in chosen.items():
        cells = [f"{value:.6g}" if isinstance(value := line.get(n), int | float) else "" for n in names]
        table.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(table)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are objects; a file that is not there has none."""
    out = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:  # cut by a crash
            continue
        if isinstance(values, dict):
            out.append(values)
    return out


def _quantized(config: RunConfig) -> list[str]:
    if config.quantization is None:
        return []
    return [f"trained on a base in {config.quantization}; in other precisions its figures are others"]


def _settings(d: Described) -> str:
    c = d.config
    settings = (
        f"r {c.r}, lora_alpha {c.lora_alpha:g}, lora_dropout {c.lora_dropout:g}, learning rate {c.learning_rate:g} "
        f"({c.lr_scheduler_type}), seed {c.seed}."
    )
    now = {"ardtrain": __version__, "peft": importlib.metadata.version("peft")}
    told = ", ".join(f"{name} {version}" for name, version in {**now, **d.versions}.items())
    return f"{settings} Trained with {told}."
