"""Which settings the tests ran together and found equal; docs/support_matrix.md is made of it.

python -m benchmarks.support --out benchmarks/results/support.json

Runs the tests that record their runs, one file after another; nothing is written unless all of them pass. With --found
it joins what such runs kept (pytest --record-runs FILE) instead.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.common import described, machine, parser, write

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/distributed/test_matrix.py",
    "tests/distributed/test_hpz.py",
    "tests/launch/test_full_worlds.py",
    "tests/launch/test_paligemma_run.py",
    "tests/launch/test_token_rows.py",
)


def run_tests(folder):
    """Runs the tests; the files that they recorded. Exits with pytest's code where one fails."""
    kept = []
    for number, path in enumerate(TESTS):
        kept.append(folder / f"{number}.json")
        code = pytest.main(["-q", "-m", "", "--record-runs", str(kept[-1]), str(REPOSITORY / path)])
        if code:
            sys.exit(int(code))
    return kept


def main(arguments=None):
    """Runs or joins, and writes."""
    asked = parser(__doc__)
    asked.add_argument("--found", nargs="+", help="files of pytest --record-runs")
    asked.add_argument("--note", help="what a reader must know of how they came about")
    given = asked.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        runs = [run for path in given.found or run_tests(Path(folder)) for run in json.loads(Path(path).read_text())]
    missing = set(TESTS) - {run["test"] for run in runs}
    if missing:
        sys.exit(f"no runs of {', '.join(sorted(missing))}")
    note = f"{given.note} " if given.note else ""
    given.found = given.note = None
    write({"settings": described(given), "machine": machine(), "note": note, "runs": runs}, given.out)


if __name__ == "__main__":
    main()
