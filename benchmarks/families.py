"""What the tests of the model families find: adapters, start, resizes, resume, export; docs/families.md is made of it.

python -m benchmarks.families --out benchmarks/results/families.json

Runs tests/unit/test_families.py and tests/distributed/test_families.py; nothing is written unless all of them pass.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.common import described, machine, parser, write

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = ("tests/unit/test_families.py", "tests/distributed/test_families.py")


def main(arguments=None):
    """Exits with pytest's code where a test fails."""
    given = parser(__doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        tests = [str(REPOSITORY / path) for path in TESTS]
        code = pytest.main(["-q", "-m", "", "-k", "not page", "--record-families", str(found), *tests])
        if code:
            sys.exit(int(code))
        families = json.loads(found.read_text())
    write({"settings": described(given), "machine": machine(), "families": families}, given.out)


if __name__ == "__main__":
    main()
