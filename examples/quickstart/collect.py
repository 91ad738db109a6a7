"""Writes docs.jsonl, code.jsonl and held_out.jsonl: text that every Python installation has.

Documentation: the standard library's docstrings and pydoc's topics. Code: the same files without their docstrings, one
in HELD_OUT_EVERY of them kept apart (its first part). Nothing is downloaded.

    python examples/quickstart/collect.py FOLDER
"""

import ast
import json
import sys
import sysconfig
import textwrap
from pathlib import Path

HELD_OUT_EVERY = 12  # files
HELD_OUT_CHARACTERS = 2_000  # of each: enough to compare by, few enough to evaluate in seconds
SMALLEST = 2_000  # characters of a file that is worth a document
# Tests, tables of characters, demonstrations, and what was installed later.
SKIPPED = {
    "__pycache__", "config-3", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo", "ensurepip",
}  # fmt: skip


def source_files(library: Path) -> list[Path]:
    """Modules of the standard library, sorted by name; the same on every machine with the same Python."""
    return [
        path
        for path in sorted(library.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(library).parts) and path.name.isascii()
    ]


def split_docstrings(source: str) -> tuple[list[str], str]:
    """The docstrings of a module, and its code without them."""
    lines = source.splitlines()
    docstrings = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        docstrings.append(f"{getattr(node, 'name', 'module')}: {text}")
        first = node.body[0]
        for number in range(first.lineno - 1, first.end_lineno or first.lineno):
            lines[number] = ""
    code = "\n".join(line.rstrip() for line in lines)
    while "\n\n\n" in code:
        code = code.replace("\n\n\n", "\n\n")
    return docstrings, code.strip() + "\n"


def pydoc_topics() -> list[str]:
    """What `help("topics")` knows: parts of the language reference. Some distributions leave it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [textwrap.dedent(text).strip() for _, text in sorted(topics.items())]


def write(path: Path, rows: list[dict[str, str]]) -> int:
    """Writes JSONL; returns the characters of text in it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sum(len(row["text"]) for row in rows)


def main(folder: Path) -> None:
    """Collects and writes the three files, and says how much text each holds."""
    library = Path(sysconfig.get_path("stdlib"))
    docs = [{"text": text} for text in pydoc_topics()]
    code = []
    for path in source_files(library):
        name = path.relative_to(library).as_posix()
        try:
            docstrings, source = split_docstrings(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        if docstrings:
            docs.append({"text": f"{name}\n\n" + "\n\n".join(docstrings) + "\n"})
        if len(source) >= SMALLEST:
            code.append({"text": source, "file": name})
    held_out = code[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    code = [row for row in code if row not in held_out]
    held_out = [row | {"text": row["text"][:HELD_OUT_CHARACTERS]} for row in held_out]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("docs", docs), ("code", code), ("held_out", held_out)):
        size = write(folder / f"{name}.jsonl", rows)
        print(f"  {name}.jsonl: {len(rows)} documents, {size / 1e6:.2f} million characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
