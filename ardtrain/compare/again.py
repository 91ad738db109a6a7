"""`ardtrain compare --table RESULTS.json`: the table of a finished suite written again, from its record alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ardtrain.compare.drawing import draw, draw_budgets
from ardtrain.compare.plan import Failure, Outcomes, RunResult
from ardtrain.compare.suite import Part, RunKey, Suite, with_budgets
from ardtrain.compare.tables import markdown_text, table_rows
from ardtrain.config import ConfigError
from ardtrain.faults import replace_file

_REMEDY = "name the one in the suite's output_dir, or a committed one"
_KEY = re.compile(r"(\S+) lr (\S+) seed (\d+) (tune|test)")


def table_again(arguments: Sequence[str]) -> int:
    """`RESULTS.json [--out FILE.md] [--picture FILE.png]`: the table beside the record, or in FILE.md. Returns 0.

    Raises:
        ConfigError: a wrong argument, or a file that is no record of a suite or cannot be written.
    """
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if name in ("--out", "--picture") and rest:
            given[name] = rest.pop(0)
        elif name.startswith("--") or "record" in given:
            raise ConfigError([f"{name}: --table takes RESULTS.json, --out FILE.md and --picture FILE.png"])
        else:
            given["record"] = name
    if "record" not in given:
        raise ConfigError(["--table: which results.json? for example runs/compare/e2e_nlg/results.json"])
    path = Path(given["record"])
    suite, outcomes = read_record(path)
    out = Path(given.get("--out", path.with_suffix(".md")))
    try:
        replace_file(out, markdown_text(suite, outcomes))
        print(out)
        if "--picture" in given:
            rows = table_rows(suite, outcomes)
            print((draw_budgets if suite.budgets else draw)(suite, rows, given["--picture"]))
    except OSError as error:
        raise ConfigError([f"{error.filename or out}: cannot be written ({error.strerror})"]) from error
    return 0


def read_record(path: Path) -> tuple[Suite, Outcomes]:
    """The suite and the outcomes of its runs in a results.json. Raises ConfigError."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        suite = Suite.model_validate(with_budgets(record["settings"]))
        outcomes: dict[RunKey, RunResult | Failure] = {}
        for run in record["runs"]:
            result = RunResult(**run)
            outcomes[result.key] = result
        for name, text in record["failed"].items():
            outcomes[_key(name)] = Failure(text)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            [f"{path}: no results.json of a suite ({type(error).__name__}: {error}); {_REMEDY}"]
        ) from error
    return suite, outcomes


def _key(name: str) -> RunKey:
    """What str(RunKey) gives, read back."""
    found = _KEY.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} names no run")
    part: Part = "tune" if found[4] == "tune" else "test"
    return RunKey(found[1], part, float(found[2]), int(found[3]))
