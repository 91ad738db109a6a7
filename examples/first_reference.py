"""Rows with a list of references -> rows with the first one, for a held-out loss.

python examples/first_reference.py DEV.JSONL OUT.JSONL
"""

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """`refs` becomes `ref`; all other fields stay."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        row["ref"] = row.pop("refs")[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
