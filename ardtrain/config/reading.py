"""From a file and overrides to a `RunConfig`, and back: aliases, unknown keys, error texts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ardtrain.config.block import Block
from ardtrain.config.data import DataBlock, SourceBlock
from ardtrain.config.evaluation import EvaluationBlock
from ardtrain.config.launcher import LauncherBlock
from ardtrain.config.methods import METHODS, AdaLoraBlock, AloraBlock, ArdLoraBlock, ElaLoraBlock, ProbeLoraBlock
from ardtrain.config.models import OptimizerBlock, RunConfig, TargetBlock, schedule_errors
from ardtrain.config.text import (
    ConfigError,
    merged,
    parse_overrides,
    read_deepspeed_json,
    read_yaml,
    secret_errors,
    tilde_errors,
    write_yaml,
)

# Blocks by dotted path; "*" is any name. `deepspeed` is no block of ours: its keys are DeepSpeed's.
BLOCKS: dict[str, type[Block]] = {
    "": RunConfig,
    "data": DataBlock,
    "data.sources.*": SourceBlock,
    "optimizer": OptimizerBlock,
    "elalora": ElaLoraBlock,
    "adalora": AdaLoraBlock,
    "alora": AloraBlock,
    "ard_lora": ArdLoraBlock,
    "probe_lora": ProbeLoraBlock,
    "launcher": LauncherBlock,
    "evaluation": EvaluationBlock,
    "targets.*": TargetBlock,
}
# Other trainers' names (LLaMA-Factory, Axolotl, NeMo AutoModel, PEFT) by the block they may stand in; "" = top level.
ALIASES: dict[str, dict[str, str]] = {
    "": {
        "base_model": "model_name_or_path",
        "model": "model_name_or_path",
        "model_revision": "revision",
        "tokenizer_name": "tokenizer_name_or_path",
        "finetuning_type": "method",
        "adapter": "method",
        "tuner_type": "method",
        "lora_r": "r",
        "lora_rank": "r",
        "dropout": "lora_dropout",
        "lora_target": "target_modules",
        "lora_target_modules": "target_modules",
        "lora_exclude_modules": "exclude_modules",
        "micro_batch_size": "per_device_train_batch_size",
        "local_batch_size": "per_device_train_batch_size",
        "num_epochs": "num_train_epochs",
        "lr": "learning_rate",
        "lr_scheduler": "lr_scheduler_type",
        "cutoff_len": "max_length",
        "sequence_len": "max_length",
        "seq_length": "max_length",
        "max_seq_length": "max_length",
        "sample_packing": "packing",
        "load_in_8bit": "quantization",
        "load_in_4bit": "quantization",
        "quantization_bit": "quantization",
    },
    "elalora": {
        "tinit": "init_warmup",
        "tfinal": "final_warmup",
        "deltaT": "mask_interval",
        "orth_reg_weight": "reg_orth_coef",
    },
}
ALIASES["targets.*"] = {alias: name for alias, name in ALIASES[""].items() if name in ("r", "lora_dropout")}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Config of a YAML file with command-line overrides (`a.b=c`, `--a.b c`, `--a.b=c`) put over it.

    Raises:
        ConfigError: all mistakes found, one line each.
    """
    errors: list[str] = []
    raw = _canonical(read_yaml(Path(path)), errors)
    over = _canonical(parse_overrides(overrides), errors)
    if isinstance(raw.get("deepspeed"), str) and isinstance(over.get("deepspeed"), dict):
        raw["deepspeed"] = read_deepspeed_json(raw["deepspeed"])  # so that deepspeed.a.b=c can go into the named file
    return _checked(merged(raw, over), errors)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """Config of a plain nested mapping, as YAML gives it.

    Raises:
        ConfigError: all mistakes found, one line each.
    """
    errors: list[str] = []
    return _checked(_canonical(dict(raw), errors), errors)


def dump_config(config: RunConfig) -> str:
    """YAML with every setting; `load_config` reads it back to an equal object.

    Defaults become explicit in it, so write the config that `with_deepspeed` and `with_batch` have completed.
    """
    return write_yaml(config.model_dump(mode="json"))


def _checked(raw: dict[str, Any], errors: list[str]) -> RunConfig:
    errors = [*secret_errors(raw), *tilde_errors(raw), *errors]
    known = _without_unknown(raw, errors)
    try:
        config = RunConfig.model_validate(known)
    except ValidationError as failure:
        raise ConfigError([*errors, *_lines(failure)]) from None
    if errors:
        raise ConfigError(errors)
    return config


def _block_key(path: tuple[str, ...]) -> str:
    by_name = ".".join((*path[:-1], "*"))
    return by_name if path and by_name in BLOCKS else ".".join(path)


def _canonical(raw: dict[Any, Any], errors: list[str], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """`raw` under our own names; adds a line to `errors` for a setting that is given under two."""
    aliases = ALIASES.get(_block_key(path), {})
    result: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in raw.items():
        name = aliases.get(str(key), str(key))
        if key in ("load_in_8bit", "load_in_4bit") and value in (False, None):
            continue  # the usual pair of the two says one thing
        if name in result:
            errors.append(
                f"{_dotted(path, key)} and {_dotted(path, said[name])} are the same setting; keep one of them"
            )
            continue
        inner = (*path, name)
        said[name] = str(key)
        if isinstance(value, dict) and inner[0] != "deepspeed":
            value = _canonical(value, errors, inner)
        translate = _TRANSLATED.get(str(key))
        result[name] = translate(value) if translate else value
    return result


def _llamafactory_targets(value: object) -> object:
    """LLaMA-Factory's `lora_target`: `all`, or names with commas between them."""
    if not isinstance(value, str):
        return value
    return "all-linear" if value == "all" else [part.strip() for part in value.split(",")]


def _bits(value: object) -> object:
    """LLaMA-Factory's `quantization_bit` as our format's name; what is neither 8 nor 4 stays, to be refused."""
    return {8: "int8", 4: "nf4"}.get(value, value) if type(value) is int else value


_TRANSLATED: dict[str, Callable[[object], object]] = {  # other trainers' names whose values differ from ours as well
    "lora_target": _llamafactory_targets,
    "load_in_8bit": lambda value: "int8" if value is True else value,
    "load_in_4bit": lambda value: "nf4" if value is True else value,
    "quantization_bit": _bits,
}


def _without_unknown(raw: dict[str, Any], errors: list[str], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """`raw` less its unknown keys; adds a line to `errors` for each."""
    model = BLOCKS.get(_block_key(path))
    result = {}
    for key, value in raw.items():
        if model is not None and key not in model.model_fields:
            if not secret_errors({key: None}):
                errors.append(_unknown(key, path, model))
            continue
        inner = (*path, key)
        if isinstance(value, dict) and inner[0] != "deepspeed":
            value = _without_unknown(value, errors, inner)
        result[key] = value
    return result


def _unknown(key: str, path: tuple[str, ...], model: type[Block]) -> str:
    name = _dotted(path, key)
    if not path and key in METHODS:
        return f"{name} is the block of a method that has no settings of its own here yet; remove it"
    elsewhere = [
        _dotted((block,) if block else (), key) for block, other in BLOCKS.items() if key in other.model_fields
    ]
    aliases = ALIASES.get(_block_key(path), {})
    near = difflib.get_close_matches(key, [*model.model_fields, *aliases], n=1, cutoff=0.6)
    very_near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.85)
    if elsewhere and not very_near:
        return f"{name} is no setting; write {elsewhere[0]}"
    if near:
        return f"{name} is no setting; did you mean {_dotted(path, aliases.get(near[0], near[0]))}?"
    return f"{name} is no setting; remove it (known here: {', '.join(model.model_fields)})"


def _dotted(path: tuple[str, ...], key: object) -> str:
    return ".".join([*path, str(key)])


def _lines(failure: ValidationError) -> list[str]:
    """One line for each setting that pydantic refused: setting, value, rule, remedy."""
    lines: dict[str, str] = {}
    for error in failure.errors(include_url=False):
        if error["type"] == "default_factory_not_called":
            continue  # follows from another line
        block, path, description = _locate(error["loc"])
        if error["type"] == "value_error" and path == block:  # rules between fields, written out by the model
            prefix = f"{block}." if block else ""
            lines |= {f"{prefix}{line}": f"{prefix}{line}" for line in str(error["ctx"]["error"]).split("\n")}
            continue
        rule = error["msg"].replace("Input should be", "must be", 1).removeprefix("Value error, ")
        if error["type"] == "missing":
            lines[path] = f"{path} is missing; set it" + (f" ({description})" if description else "")
        elif path in lines:  # another member of a union
            lines[path] += f", or {rule.removeprefix('must be ')}"
        else:
            lines[path] = _wrong_value(path, error, rule, description)
    return list(lines.values())


def _wrong_value(path: str, error: ErrorDetails, rule: str, description: str) -> str:
    value = error["input"]
    shown = value if isinstance(value, str) and value.isprintable() else repr(value)  # a mistake is one line
    quote = "; put it in quotes" if error["type"] == "string_type" and isinstance(value, int | float) else ""
    return f"{path}={shown} {rule}{quote}" + (f" ({description})" if description else "")


def _locate(loc: tuple[int | str, ...]) -> tuple[str, str, str]:
    """Dotted block, dotted setting and the setting's description of pydantic's location (which also names unions)."""
    path: list[str] = []
    block: tuple[str, ...] = ()
    key = ""  # in a setting that is a mapping, such as rank_pattern
    for part in loc:
        model = BLOCKS.get(_block_key(block))
        if model is None:  # a name, such as a tower's in `targets`
            block = (*block, str(part))
            path.append(str(part))
            continue
        if part not in model.model_fields:
            mapping = model.model_fields.get(path[-1]) if path else None
            if mapping is not None and get_origin(mapping.annotation) is dict:
                key = f".{part}"
            break
        path.append(str(part))
        inner = (*block, str(part))
        if _block_key(inner) in BLOCKS or ".".join((*inner, "*")) in BLOCKS:
            block = (*block, str(part))
    field = None
    owner = BLOCKS.get(_block_key(tuple(path[:-1])))
    if owner is not None and path:
        field = owner.model_fields.get(path[-1])
    return ".".join(block), ".".join(path) + key, (field.description or "").strip() if field else ""


def check_schedule(config: RunConfig, total_steps: int) -> None:
    """Refuse a config whose schedule does not fit into `total_steps` optimizer steps.

    Raises:
        ConfigError: `schedule_errors` has lines.
    """
    errors = schedule_errors(config, total_steps)
    if errors:
        raise ConfigError(errors)


def updated(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Copy of `config` with `changes`, checked anew; settings nobody set follow their defaults again."""
    values = {name: getattr(config, name) for name in config.model_fields_set}
    try:
        return RunConfig.model_validate(values | dict(changes))
    except ValidationError as failure:
        raise ConfigError(_lines(failure)) from None


def with_batch(config: RunConfig, world_size: int) -> RunConfig:
    """Config with `global_batch_size` fixed and `gradient_accumulation_steps`, now derived, unset.

    Given alone, gradient_accumulation_steps (default 1) means that many grains on each of `world_size` processes; both
    given, it must be ceil(G / world_size). Call it at the first start; a resume reads the resolved config.
    Raises:
        ConfigError: the two disagree.
    """
    accumulation = config.gradient_accumulation_steps
    grain = config.per_device_train_batch_size
    if config.global_batch_size is None:
        total = grain * (accumulation or 1) * world_size
        return updated(config, {"global_batch_size": total, "gradient_accumulation_steps": None})
    derived = accumulation_steps(config, world_size)
    if accumulation not in (None, derived):
        raise ConfigError(
            [
                f"gradient_accumulation_steps={accumulation} disagrees with global_batch_size="
                f"{config.global_batch_size}: {config.num_grains} grains of {grain} on {world_size} processes are "
                f"{derived} each; remove gradient_accumulation_steps"
            ]
        )
    return updated(config, {"gradient_accumulation_steps": None})


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Most grains that a process computes in one step, ceil(G / world_size); only after `with_batch`."""
    return -(-config.num_grains // world_size)
