"""Right answers and groups of the held-out rows, read from the lines that the samples came from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ardtrain.config import EvaluationBlock
from ardtrain.data_rows import DataSettings, answers_of, detect_format
from ardtrain.data_sources import DataError

_TEXTS = str | int | float


@dataclass(frozen=True)
class Known:
    """Of each row, in the order asked for: its right answers (of rows to answer one at least), its group or None."""

    references: tuple[tuple[str, ...], ...]
    groups: tuple[str | None, ...]


def line_of(sample_id: str) -> str:
    """`file:line` of itself, or of `file:line#piece`."""
    return re.sub(r"#\d+$", "", sample_id)


def read_known(sources: Sequence[DataSettings], ids: Sequence[str], block: EvaluationBlock) -> Known:
    """References and groups of these samples of the sources' files.

    Raises:
        DataError: a row has no references_field, or one that holds no texts.
    """
    wanted = {line_of(name) for name in ids}
    found: dict[str, tuple[tuple[str, ...], str | None]] = {}
    for settings in sources:
        format_ = detect_format(settings) if settings.format == "auto" else settings.format
        for path in settings.train_files:
            for line, row, answer in answers_of(path, settings, format_):
                if f"{path}:{line}" in wanted:
                    references = () if answer is None else _references(path, line, row, answer, block.references_field)
                    found[f"{path}:{line}"] = (references, _group(row, block.group_field))
    rows = [found.get(line_of(name), ((), None)) for name in ids]
    return Known(tuple(references for references, _ in rows), tuple(group for _, group in rows))


def _references(path: str, line: int, row: dict[str, Any], answer: str, field: str | None) -> tuple[str, ...]:
    if field is None:
        return (answer,)
    values = row.get(field)
    listed = [values] if isinstance(values, _TEXTS) else values
    texts = [_answer(value) for value in listed] if isinstance(listed, list) else []
    if not texts or None in texts:
        raise DataError(
            path,
            line,
            f"field {field!r} holds no answers",
            "evaluation.references_field names a list of texts, one text, or VQA's list of {answer: text}",
        )
    return tuple(text for text in texts if text is not None)


def _answer(value: object) -> str | None:
    """A text, or the text in VQA's `{"answer": text, ...}`."""
    if isinstance(value, dict):
        value = value.get("answer")
    return str(value) if isinstance(value, _TEXTS) else None


def _group(row: dict[str, Any], field: str | None) -> str | None:
    value = None if field is None else row.get(field)
    return None if value is None else str(value)
