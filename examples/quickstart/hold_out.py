"""Cuts a file into a part to train on and a held-out part: every 20th row, or the last twentieth of a text.

python examples/quickstart/hold_out.py FILE FOLDER    writes FOLDER/train.* and FOLDER/held_out.*, prints both paths
"""

import gzip
import sys
from pathlib import Path

EVERY = 20


def split(content: bytes, *, is_text: bool) -> tuple[bytes, bytes]:
    """(train, held-out); a text is cut at the end of a line."""
    lines = [line + b"\n" for line in content.removesuffix(b"\n").split(b"\n") if is_text or line.strip()]
    if len(lines) < EVERY:
        raise ValueError(f"{len(lines)} rows or lines are too few to hold some out (below {EVERY}); give --eval FILE")
    if is_text:
        cut = len(lines) - max(1, len(lines) // EVERY)
        return b"".join(lines[:cut]), b"".join(lines[cut:])
    held_out = lines[EVERY - 1 :: EVERY]
    return b"".join(line for number, line in enumerate(lines, start=1) if number % EVERY), b"".join(held_out)


def main(file: Path, folder: Path) -> None:
    """Reads, cuts, writes."""
    suffix = next((s for s in (".jsonl", ".jsonl.gz", ".txt", ".txt.gz") if file.name.endswith(s)), None)
    if suffix is None:
        raise ValueError(f"{file} is none of .jsonl, .txt (also with .gz); convert it")
    content = gzip.decompress(file.read_bytes()) if suffix.endswith(".gz") else file.read_bytes()
    suffix = suffix.removesuffix(".gz")
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(content.removeprefix(b"\xef\xbb\xbf"), is_text=suffix == ".txt")
    for name, part in zip(("train", "held_out"), parts, strict=True):
        path = folder / f"{name}{suffix}"
        path.write_bytes(part)
        print(path)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError) as error:
        sys.exit(f"hold_out: {error}")
