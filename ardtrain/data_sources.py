"""Where rows come from: JSONL, text and Parquet files, data sets of the Hugging Face hub; row after row, in order.

Nothing here is read whole into memory but a text file, which is one document: files are streams, the hub's data sets
are memory-mapped by the datasets library.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardtrain.reasons import first_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".parquet")
HUB = "hub:"
_HUB_FORM = re.compile(r"hub:(?P<name>[^:@]+)(?:@(?P<revision>[^:@]+))?(?::(?P<split>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROWS_A_BATCH = 512


class DataError(ValueError):
    """The data are at fault: `FILE:LINE: reason; remedy`.  `line` counts from 1, None when the whole file is meant."""

    def __init__(self, file: str, line: int | None, reason: str, remedy: str) -> None:
        super().__init__(f"{file}{'' if line is None else f':{line}'}: {reason}; {remedy}")
        self.file, self.line, self.reason, self.remedy = file, line, reason, remedy


@dataclass(frozen=True)
class HubSource:
    """`hub:owner/name[/config][@revision][:split]`, or a local folder in the place of the name.

    revision: of the hub; a commit is the only one that stays what it is.
    """

    name: str
    config: str | None
    revision: str | None
    split: str

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.name)


def is_hub(path: str) -> bool:
    """Is a `train_file` no file but a data set of the hub?"""
    return path.startswith(HUB)


def is_text(path: str) -> bool:
    """Is it a plain text file, one document?"""
    return not is_hub(path) and path.endswith((".txt", ".txt.gz"))


def parse_hub(path: str) -> HubSource:
    """The parts of `hub:...`; the split is `train` unless it says another.

    Raises:
        ValueError: it has another form.
    """
    match = _HUB_FORM.fullmatch(path)
    parts = match["name"].split("/") if match else []
    if match is None or not (os.path.isdir(match["name"]) or (len(parts) in (1, 2, 3) and all(parts))):
        raise ValueError(
            f"data source {path!r} is no hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT], nor hub:FOLDER[:SPLIT] with a "
            "folder that exists; correct it"
        )
    config = parts.pop() if len(parts) == 3 and not os.path.isdir(match["name"]) else None
    name = match["name"] if config is None else "/".join(parts)
    return HubSource(name, config, match["revision"], match["split"] or "train")


ANY_SETTING = "data.train_file (or eval_file, allocation_file, the source's file)"


def check_source(path: str, *, setting: str = ANY_SETTING) -> None:
    """ValueError unless `path` is one existing file of a kind that is read here, or the name of a data set.

    setting: what names it, where that is known.
    """
    if is_hub(path):
        parse_hub(path)
        return
    if not os.path.exists(path):
        if glob.has_magic(path):
            raise ValueError(f"data file {path!r} is a pattern; list the files, their order is part of the run")
        raise ValueError(f"data file {path!r} does not exist; correct {setting}")
    if os.path.isdir(path):
        raise ValueError(
            f"data file {path!r} is a folder; list its files, their order is part of the run (or, for a "
            f"data set's folder, write hub:{path})"
        )
    if not os.access(path, os.R_OK):
        raise ValueError(f"data file {path!r} may not be read (Permission denied); make it readable")
    if not path.endswith(SUFFIXES):
        raise ValueError(f"data file {path!r} is none of {', '.join(SUFFIXES)}; convert it to JSONL")


def identity(path: str) -> list[Any]:
    """What decides a source's rows, for a cache key: its kind and the sha256 of its contents; paths do not count.

    Of a data set of the hub: its name, config, commit and split.

    Raises:
        ValueError: the commit cannot be had. OSError: a file cannot be read.
    """
    if not is_hub(path):
        return [next(suffix for suffix in SUFFIXES if path.endswith(suffix)), _sha256(Path(path))]
    source = parse_hub(path)
    if source.is_folder:
        root = Path(source.name)
        files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        return ["folder", source.split, [[p.relative_to(root).as_posix(), _sha256(p)] for p in files]]
    return ["hub", source.name, source.config, commit_of(source), source.split]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit_of(source: HubSource) -> str:
    """The commit that a data set's revision means now; asks the hub unless it is a commit already.

    Raises:
        ValueError: the hub cannot be asked or does not know it.
    """
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.name, revision=source.revision).sha)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise ValueError(
            f"data set {source.name!r} of the hub: which commit {source.revision or 'main'!r} is cannot be asked "
            f"({first_line(error)}); where there is no network, run `ardtrain fetch` on a node that has it and pin the "
            f"commit it prints: hub:{source.name}@COMMIT:{source.split}"
        ) from None


def read_rows(path: str) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(line or row from 1, content) of each row that is not blank.

    Content: the bytes of a JSONL line; all bytes of a text file, its number 1; the fields of a Parquet or hub row, less
    those that are null, as a table has every field in every row.

    Raises:
        DataError: a file is damaged. ValueError: a data set cannot be had.
    """
    if is_hub(path):
        yield from enumerate(_table_rows(_hub_batches(path)), start=1)
    elif path.endswith(".parquet"):
        yield from enumerate(_table_rows(_parquet_batches(path)), start=1)
    else:
        yield from _read_lines(path)


def _read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Lines end at a newline byte alone: JSON strings may hold the other characters at which str.splitlines cuts."""
    opener: Callable[..., Any] = gzip.open if path.endswith(".gz") else open
    line = 0
    try:
        with opener(path, "rb") as file:
            if is_text(path):
                yield 1, file.read().removeprefix(b"\xef\xbb\xbf")
                return
            for line, content in enumerate(file, start=1):
                content = content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
                if content.strip():
                    yield line, content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(path, line + 1, f"the gzip file is damaged ({error})", "replace the file") from error


def _table_rows(batches: Iterator[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for row in batch:
            yield _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Also inside: a chat's messages have the union of all messages' fields."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parquet_batches(path: str) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(_ROWS_A_BATCH):
                yield batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, None, f"the Parquet file is damaged ({first_line(error)})", "replace the file") from error


def _hub_batches(path: str) -> Iterator[list[dict[str, Any]]]:
    table = load_hub(parse_hub(path)).with_format("arrow")
    for batch in table.iter(_ROWS_A_BATCH):
        yield batch.to_pylist()


def load_hub(source: HubSource) -> Any:
    """The data set (datasets.Dataset), memory-mapped from the datasets library's cache; downloaded if it is not there.

    Raises:
        ValueError: it cannot be had, or the cache holds another commit of it.
    """
    import datasets

    commit = None if source.is_folder else commit_of(source)
    try:
        table = datasets.load_dataset(source.name, source.config, split=source.split, revision=commit)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data set {source.name!r}, split {source.split!r}, could not be loaded ({first_line(error)}); check the "
            "name and the split, the network and HF_TOKEN. Where there is no network, run `ardtrain fetch` ahead with "
            "the same cache folders (HF_HOME, ARDTRAIN_CACHE), and pin the commit"
        ) from error
    held = {m[1] for name in table.download_checksums or {} if (m := re.search(r"@([0-9a-f]{40})/", str(name)))}
    if commit is not None and held - {commit}:
        raise ValueError(
            f"data set {source.name!r}: the local cache holds commit {', '.join(sorted(held))} and the run wants "
            f"{commit}, which cannot be reached; run `ardtrain fetch` where there is a network"
        )
    return table
