"""Writes docs/settings.md: every setting, from the models that define it.

python docs/generate_settings.py
"""

from __future__ import annotations

import types
import typing
from collections import defaultdict
from pathlib import Path

from pydantic.fields import FieldInfo

from ardtrain.config import (
    ALIASES,
    BLOCKS,
    OptimizerBlock,
)

TARGET = Path(__file__).with_name("settings.md")
TITLES = {"": "Top level", "targets.*": "Block `targets.<tower>`", "data.sources.*": "Block `data.sources.<name>`"}
SECTIONS = [(block, TITLES.get(block, f"Block `{block}`"), model) for block, model in BLOCKS.items()]
HEAD = """# Settings

Generated from ardtrain/config/ by `python docs/generate_settings.py`; a test keeps it up to date.
One YAML file holds all; `a.b=c` on the command line goes over it. Unknown names are refused with the nearest known
one. "From others" is a default that follows from other settings. Under "Also" stand other trainers' names for the same
setting, accepted in its place.
"""


def type_text(annotation: object) -> str:
    """A type as a user reads it: choices one by one, lists as lists."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin is typing.Literal:
        return ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(a) for a in arguments if a is not type(None)))
    if origin is tuple:
        kinds = dict.fromkeys(type_text(a) for a in arguments if a is not Ellipsis)
        return ("list of " if Ellipsis in arguments else f"{len(arguments)} x ") + " or ".join(kinds)
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return names.get(typing.cast(type, annotation), "block")


def bounds_text(field: FieldInfo) -> str:
    """Bounds such as `>= 1, < 2`; empty where there are none."""
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    found = [f"{sign} {getattr(m, name)}" for name, sign in signs for m in field.metadata if hasattr(m, name)]
    return ", ".join(found)


def default_text(field: FieldInfo) -> str:
    """The default as YAML writes it."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "from others"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, OptimizerBlock):
        return "see below"
    if isinstance(value, tuple):
        return f"[{', '.join(str(v) for v in value)}]"
    return str(value)


def table(model: type, block: str) -> list[str]:
    """The rows of one block's table."""
    also = defaultdict(list)
    for alias, name in ALIASES.get(block, {}).items():
        also[name].append(alias)
    lines = ["| Setting | Values | Default | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        kind = " ".join(filter(None, (type_text(field.annotation), bounds_text(field))))
        meaning = " ".join((field.description or "").split())
        if also[name]:
            meaning = f"{meaning} Also: {', '.join(f'`{alias}`' for alias in also[name])}.".strip()
        cells = (f"`{name}`", kind, default_text(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def render() -> str:
    """The whole page."""
    lines = [HEAD]
    for block, title, model in SECTIONS:
        lines += [f"## {title}", "", *table(model, block), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
