"""YAML with a comment on each line: what `ardtrain new` and `ardtrain suggest` write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from ardtrain.config.schema import FILE_NAME
from ardtrain.config.text import write_yaml

_COMMENT_AT = 40
_WIDTH = 118


class Line(NamedTuple):
    """One setting by its dotted name, its value, and why it is so."""

    name: str
    value: Any
    comment: str


def commented_yaml(lines: Sequence[Line], *, head: Sequence[str] = (), with_schema: bool = True) -> str:
    """The lines as YAML in their order; settings of one block must follow each other.

    head: comment lines at the top. with_schema: the line by which editors find the schema beside the file.
    """
    out = [f"# yaml-language-server: $schema=./{FILE_NAME}"] if with_schema else []
    out += [f"# {text}".rstrip() for text in head]
    open_blocks: list[str] = []
    for name, value, comment in lines:
        *blocks, last = name.split(".")
        shared = 0
        while shared < min(len(blocks), len(open_blocks)) and blocks[shared] == open_blocks[shared]:
            shared += 1
        out += [f"{'  ' * depth}{blocks[depth]}:" for depth in range(shared, len(blocks))]
        open_blocks = blocks
        out += _setting("  " * len(blocks), f"{last}: {scalar(value)}", comment)
    return "\n".join(out) + "\n"


def scalar(value: Any) -> str:
    """The value on one line."""
    if isinstance(value, (list, tuple, dict)):
        text: str = yaml.safe_dump(
            list(value) if not isinstance(value, dict) else value, default_flow_style=True, width=10_000
        )
        return text.strip()
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)  # a JSON string is YAML's in double quotes
    return write_yaml({"x": value}).removeprefix("x:").strip()


def _setting(indent: str, text: str, comment: str) -> list[str]:
    line = f"{indent}{text}"
    if not comment:
        return [line]
    beside = f"{line:<{_COMMENT_AT}}  # {comment}"
    return [beside] if len(beside) <= _WIDTH else [f"{indent}# {comment}", line]
