"""What the tests of the model families find: adapters, start, resizes, resume, export; docs/families.md is made of it.

python -m benchmarks.families --out benchmarks/results/families.json

Runs tests/unit/test_families.py and tests/distributed/test_families.py, one after the other; nothing is written unless
all of them pass. With --found it joins what such runs kept (pytest --record-families FILE) instead.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.common import described, machine, parser, write

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = ("tests/unit/test_families.py", "tests/distributed/test_families.py")


def run_tests(folder):
    """Runs the tests; the files that they recorded. Exits with pytest's code where one fails."""
    kept = []
    for number, path in enumerate(TESTS):
        kept.append(folder / f"{number}.json")
        selection = ["-m", "", "-k", "not page"]  # the page is made of what is being recorded
        code = pytest.main(["-q", *selection, "--record-families", str(kept[-1]), str(REPOSITORY / path)])
        if code:
            sys.exit(int(code))
    return kept


def joined(files):
    """Family -> findings, of all files."""
    out = {}
    for path in files:
        for name, found in json.loads(Path(path).read_text()).items():
            own = out.setdefault(name, {"methods": {}})
            for method, values in found.pop("methods", {}).items():
                own["methods"].setdefault(method, {}).update(values)
            own.update(found)
    return out


def main(arguments=None):
    """Runs or joins, and writes."""
    asked = parser(__doc__)
    asked.add_argument("--found", nargs="+", help="files of pytest --record-families")
    asked.add_argument("--note", help="what a reader must know of how they came about")
    given = asked.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        families = joined(given.found or run_tests(Path(folder)))
    note = f"{given.note} " if given.note else ""
    given.found = given.note = None
    write({"settings": described(given), "machine": machine(), "note": note, "families": families}, given.out)


if __name__ == "__main__":
    main()
