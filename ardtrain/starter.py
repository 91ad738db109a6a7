"""`ardtrain new`: a commented config to start from. Looks at no model and no data."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ardtrain.config import METHODS, ConfigError, parse_config
from ardtrain.config.commented import Line, commented_yaml
from ardtrain.config.schema import FILE_NAME, schema_text
from ardtrain.config.text import parse_yaml
from ardtrain.faults import replace_file

TASKS = ("sft", "classification", "vqa")
MAX_STEPS = 1000
OPTIONS = {
    "--task": "",
    "--model": "",
    "--method": "elalora",
    "--data": "train.jsonl",
    "--eval": "dev.jsonl",
    "--out": "",
}


def new(arguments: Sequence[str]) -> int:
    """`ardtrain new --task sft|classification|vqa --model M [--method M] [--data F] [--eval F] [--out F]`.

    Prints the config, or writes it with the schema beside it. Returns 0. Raises ConfigError.
    """
    given = _options(arguments)
    text = starter_text(
        task=given["--task"], model=given["--model"], method=given["--method"], data=given["--data"],
        eval_data=given["--eval"], name=Path(given["--out"]).stem or "run",
    )  # fmt: skip
    if not given["--out"]:
        print(text, end="")
        return 0
    out = Path(given["--out"])
    if out.exists():
        raise ConfigError([f"--out {out}: is there already; remove it or name another"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, text)
        replace_file(out.with_name(FILE_NAME), schema_text())
    except OSError as error:
        raise ConfigError([f"{out}: cannot be written ({error.strerror})"]) from error
    print(f"{out}; next: ardtrain validate {out}")
    return 0


def _options(arguments: Sequence[str]) -> dict[str, str]:
    values, rest = dict(OPTIONS), list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in OPTIONS:
            raise ConfigError([f"{name}: is no option here; there are {', '.join(OPTIONS)}"])
        if not equals and not rest:
            raise ConfigError([f"{name} has no value"])
        values[name] = value if equals else rest.pop(0)
    errors = []
    if values["--task"] not in TASKS:
        errors.append(f"--task {values['--task'] or '(missing)'}: must be one of {', '.join(TASKS)}")
    if not values["--model"]:
        errors.append("--model (missing): name a folder or a model of the hub")
    if values["--method"] not in METHODS:
        near = difflib.get_close_matches(values["--method"], METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        errors.append(f"--method {values['--method']}: must be one of {', '.join(METHODS)}{hint}")
    if values["--task"] == "vqa" and values["--method"] == "full":
        errors.append("--method full: is not built for --task vqa; use an adapter")
    if errors:
        raise ConfigError(errors)
    return values


def starter_text(*, task: str, model: str, method: str, data: str, eval_data: str, name: str = "run") -> str:
    """The config's text; it passes `validate --schema-only` as it is."""
    lines = starter_lines(task=task, model=model, method=method, data=data, eval_data=eval_data, name=name)
    head = [
        "Settings: docs/settings.md. `ardtrain validate` checks them against model and data, `ardtrain plan` says what",
        "the run takes, `ardtrain suggest` fits schedule and batch to the data, `ardtrain train` starts it.",
        f"Editors complete settings with {FILE_NAME} beside this file (ardtrain schema {FILE_NAME}).",
    ]
    text = commented_yaml(lines, head=head)
    parse_config(parse_yaml(text, source="starter"))
    return text


def starter_lines(*, task: str, model: str, method: str, data: str, eval_data: str, name: str) -> list[Line]:
    """The settings in the order of the file."""
    out = [Line("model_name_or_path", model, "folder or hub name of the frozen base")]
    if task == "classification":
        out.append(Line("task", "sequence_classification", "labels of rows; the head is trained in full and saved"))
    elif task == "vqa":
        out.append(Line("task", "image_text_to_text", "answers about a picture (PaliGemma-2)"))
    out.append(Line("method", method, f"one of {', '.join(METHODS)}"))
    if method != "full":
        out += [
            Line("r", 12 if method == "adalora" else 8, "rank of each site at the start"
                 + (", 1.5 x adalora.target_r (2303.10512)" if method == "adalora" else "")),
            Line("lora_alpha", 24 if method == "adalora" else 16, "scale is lora_alpha / r of the start"),
            Line("target_modules", "all-linear", "or name endings such as [q_proj, v_proj]"),
        ]  # fmt: skip
        if task == "vqa":
            out.append(
                Line("targets.vision.frozen", True, "no adapter in the vision tower; remove this to adapt it too")
            )
    out += method_lines(method)
    out += [
        Line("data.train_file", data, "JSONL, Parquet or text, or hub:OWNER/NAME[:SPLIT]"),
        Line("data.eval_file", eval_data, "held-out rows"),
        *_field_lines(task),
    ]
    length = {"sft": 1024, "classification": 256, "vqa": 384}[task]
    out += [
        Line(
            "max_length",
            length,
            "tokens of a row" + (", those of the picture (256 at 224 pixels) among them" if task == "vqa" else ""),
        ),
        Line("output_dir", f"runs/{name}", "all files of the run"),
        Line("seed", 42, "of rows' order, dropout and first weights"),
        Line("max_steps", MAX_STEPS, "optimizer steps; or num_train_epochs"),
        Line("global_batch_size", 16, "rows of a step, whatever the number of processes"),
        Line("per_device_train_batch_size", 4, "rows of a grain: computed at a time; the largest that fits is fastest"),
        Line("learning_rate", 2e-5 if method == "full" else 2e-4, "of the peak; try a third and three times of it"),
        Line("lr_scheduler_type", "linear", "after the warm-up: linear, cosine or constant"),
        Line("warmup_ratio", 0.06, "share of the steps"),
        Line("bf16", True, "compute in bfloat16; false: float32"),
        Line("gradient_checkpointing", False, "true: less memory, a third more time"),
        Line("eval_on_start", True, "the base's own held-out loss"),
        Line("eval_steps", 100, "steps between two held-out losses"),
        Line("save_steps", 250, "steps between two checkpoints"),
        Line("save_total_limit", 2, "checkpoints kept beside latest and best"),
        Line("resume_from_checkpoint", "auto", "the same command goes on after a stop"),
        Line(
            "deepspeed",
            "zero3",
            "a name in ds_configs/, a path, or the JSON itself; zero3_offload_param: base on the host",
        ),
    ]
    return out


def method_lines(method: str, steps: int = MAX_STEPS) -> list[Line]:
    """The method's own block, for a run of so many steps."""
    if method == "elalora":
        return [
            Line("elalora.init_warmup", steps // 10, "steps before the first interval (arXiv 2504.00254)"),
            Line("elalora.final_warmup", steps // 4, "last steps, in which ranks stay"),
            Line("elalora.mask_interval", max(1, steps // 40), "steps between two reallocations"),
            Line("elalora.b", 4, "most components moved in one, over all sites (published scripts)"),
            Line("elalora.k", 2, "most components a site loses or gains in one"),
        ]
    if method == "probe_lora":
        return [
            Line("probe_lora.init_warmup", steps // 10, "steps before the first interval (ours: docs/probe_lora.md)"),
            Line("probe_lora.final_warmup", steps // 4, "last steps, in which ranks stay"),
            Line("probe_lora.mask_interval", max(12, steps // 40), "steps between two reallocations"),
            Line("probe_lora.b", 4, "most components moved in one, over all sites"),
        ]
    if method == "adalora":
        return [
            Line("adalora.target_r", 8, "average rank at the end (arXiv 2303.10512)"),
            Line("adalora.tinit", steps // 10, "steps before the first reduction"),
            Line("adalora.tfinal", steps // 2, "last steps, in which the mask stays"),
            Line("adalora.deltaT", max(1, steps // 100), "steps between two reductions"),
        ]
    if method == "alora":
        return [
            Line("alora.k1_steps", steps // 5, "steps before the first round; the paper: 1 epoch (arXiv 2403.16187)"),
            Line("alora.k2_steps", max(1, steps // 20), "steps between two rounds; the paper: a quarter of an epoch"),
            Line("alora.rounds", 8, "rounds at most"),
            Line("alora.val_batch", 32, "held-out rows that components are judged on"),
        ]
    if method == "ard_lora":
        return [
            Line(
                "ard_lora.init_warmup",
                steps // 10,
                "steps with fixed ranks at the start (arXiv 2506.18267; values are ours)",
            ),
            Line("ard_lora.final_warmup", steps // 4, "last steps, with frozen ranks"),
            Line(
                "ard_lora.resize_interval",
                max(1, min(100, steps // 20)),
                "steps between two looks at the tensors' sizes",
            ),
        ]
    return []


def _field_lines(task: str) -> list[Line]:
    fields: list[tuple[str, Any, str]] = {
        "sft": [
            (
                "prompt_field",
                "prompt",
                "of a row; no loss on it. Rows with `messages` or `text` are found by themselves",
            ),
            ("completion_field", "completion", "of a row; the loss is on it alone"),
        ],
        "classification": [
            ("text_field", "text", "of a row"),
            ("label_field", "label", "of a row: a number from 0, or a name"),
        ],
        "vqa": [
            ("image_field", "image", "of a row: path, data URI or bytes"),
            ("prompt_field", "prompt", "of a row: the question"),
            ("completion_field", "completion", "of a row: the answer, on which the loss is"),
        ],
    }[task]
    return [Line(f"data.{name}", value, comment) for name, value, comment in fields]
