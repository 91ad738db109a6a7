"""Held-out rows: one file dealt into rows to tune on and rows to test on, and the check that two files share none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from ardtrain.compare.suite import Part, SplitBlock
from ardtrain.config import ConfigError
from ardtrain.faults import replace_file


def dealt(rows: list[dict[str, Any]], split: SplitBlock) -> dict[Part, list[dict[str, Any]]]:
    """Rows to tune on and rows to test on; a test row that also stands among the others is left out."""
    half = len(rows) // 2
    tune, test = (rows[:half], rows[half:]) if split.how == "halves" else (rows[::2], rows[1::2])
    tune, test = _one_row_an_item(tune, split), _one_row_an_item(test, split)
    seen = {json.dumps(row, sort_keys=True) for row in tune}
    return {"tune": tune, "test": [row for row in test if json.dumps(row, sort_keys=True) not in seen]}


def _one_row_an_item(rows: list[dict[str, Any]], split: SplitBlock) -> list[dict[str, Any]]:
    if split.list_field is None or split.item_field is None:
        return rows
    return [
        {**{name: value for name, value in row.items() if name != split.list_field}, split.item_field: item}
        for row in rows
        for item in row[split.list_field][: split.max_items]
    ]


def write_dealt(split: SplitBlock, folder: Path) -> dict[Part, int]:
    """Writes tune.jsonl and test.jsonl; returns their numbers of rows.

    Raises:
        ConfigError: the file cannot be read as JSONL, lacks the list's field, or a part is empty.
    """
    try:
        rows = [json.loads(line) for line in file_lines(split.file)]
        parts = dealt(rows, split)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            [f"split_eval.file={split.file} cannot be dealt ({type(error).__name__}: {error}); give a JSONL file"]
        ) from None
    for part, chosen in parts.items():
        if not chosen:
            raise ConfigError([f"split_eval.file={split.file} leaves no rows to {part} on; give a longer one"])
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / f"{part}.jsonl").is_file() or (folder / f"{part}.jsonl").read_text(encoding="utf-8") != text:
            replace_file(folder / f"{part}.jsonl", text)
    return {part: len(chosen) for part, chosen in parts.items()}


def refuse_common_rows(tune: str, test: str) -> None:
    """Refuses two files that have a line in common.

    Raises:
        ConfigError: they have, or one cannot be read.
    """
    common = set(_lines_of(tune, "tuning.eval_file")) & set(_lines_of(test, "base.data.eval_file"))
    if common:
        raise ConfigError(
            [
                f"tuning.eval_file={tune} and base.data.eval_file={test} share {len(common)} rows, so the rate would "
                "be chosen on rows that count; take them out of one"
            ]
        )


def _lines_of(path: str, setting: str) -> list[bytes]:
    try:
        return file_lines(path)
    except (OSError, EOFError) as error:  # the second: of a gzip that was cut
        raise ConfigError([f"{setting}={path} cannot be read ({error}); correct the path"]) from None


def file_lines(path: str | Path) -> list[bytes]:
    """Lines that are not blank, of a plain or gzipped file."""
    data = Path(path).read_bytes()
    if str(path).endswith(".gz"):
        data = gzip.decompress(data)
    return [line for line in data.splitlines() if line.strip()]
