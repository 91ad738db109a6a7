"""The JSON schema of a run's YAML, for editors: every setting, other trainers' names, and the short forms we read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ardtrain.config.reading import ALIASES, BLOCKS
from ardtrain.config.text import ConfigError

FILE_NAME = "ardtrain.schema.json"
_ONE_STANDS_FOR_A_LIST = {
    "RunConfig": ("trainable_tokens", "modules_to_save", "report_to", "preemption_signal"),
    "DataBlock": ("train_file",),
    "SourceBlock": ("file",),
}
_OFF = {"RunConfig": ("zero_checkpoint",)}  # YAML 1.1 reads a bare off as false


def run_schema() -> dict[str, Any]:
    """Draft 2020-12. What it accepts is a little more than a run accepts: rules between fields are `validate`'s."""
    from ardtrain.config.models import RunConfig

    schema: dict[str, Any] = RunConfig.model_json_schema()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "A run of ardtrain",
    }
    models = {block.__name__: path for path, block in BLOCKS.items()}
    for name, part in [("RunConfig", schema), *schema["$defs"].items()]:
        properties = part.get("properties", {})
        for field in _ONE_STANDS_FOR_A_LIST.get(name, ()):
            _allow(properties, field, {"type": ["string", "null"] if name == "RunConfig" else "string"})
        for field in _OFF.get(name, ()):
            _allow(properties, field, {"const": False})
        for alias, target in ALIASES.get(models.get(name, "?"), {}).items():
            if alias not in properties:
                properties[alias] = {**_free(properties[target], alias), "description": f"Another name of {target}."}
        if name == "DataBlock":
            part["anyOf"] = [{"properties": {}, "required": [one]} for one in ("train_file", "sources")]
        required = [field for field in part.get("required", ()) if not _has_alias(field, models.get(name, "?"))]
        if "required" in part:
            part["required"] = required
    return schema


def _has_alias(field: str, block: str) -> bool:
    """Such a field may stand under its other name, so a schema cannot ask for it."""
    return field in ALIASES.get(block, {}).values()


def _allow(properties: dict[str, Any], field: str, other: Mapping[str, Any]) -> None:
    own = properties[field]
    kept = {key: own[key] for key in ("description", "default", "title") if key in own}
    value = {key: inner for key, inner in own.items() if key not in kept}
    properties[field] = {**kept, "anyOf": [value, dict(other)]}


def _free(target: Mapping[str, Any], alias: str) -> dict[str, Any]:
    """The target's own rule; names whose values differ from ours (quantization_bit: 4) are left to `validate`."""
    differ = ("load_in_8bit", "load_in_4bit", "quantization_bit", "lora_target")
    return {} if alias in differ else {k: v for k, v in target.items() if k not in ("title", "default")}


def schema_text() -> str:
    """The schema as a file holds it."""
    return json.dumps(run_schema(), indent=1) + "\n"


def schema(arguments: list[str]) -> int:
    """`ardtrain schema [FILE]`: prints the schema, or writes it; returns 0. Raises ConfigError."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        raise ConfigError([f"{arguments[-1]}: schema takes the file to write, or nothing"])
    if not arguments:
        print(schema_text(), end="")
        return 0
    try:
        Path(arguments[0]).write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{arguments[0]}: cannot be written ({error.strerror})"]) from error
    print(arguments[0])
    return 0
