"""Tokenised samples on disk: written once by data_samples.py's walk over the files, memory-mapped by everyone after."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from ardtrain.data_rows import DataSettings
from ardtrain.data_samples import Tokenising
from ardtrain.data_sources import DataError, check_source
from ardtrain.data_sources import identity as source_identity
from ardtrain.images import StoredImage

_CACHE_FORMAT = 2  # raise when the meaning of the cached columns changes
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_IMAGE_FEATURES = {"image_path": Value("string"), "image_data": Value("binary"), "image_digest": Value("string")}
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "loss_mask": List(Value("bool")),
        "file": Value("int32"),
        "line": Value("int64"),
        "piece": Value("int32"),
        "label": Value("int32"),  # class number, -1 outside classification
        "token_type_ids": List(Value("int8")),  # empty where there are none
    }
)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of all that decides token ids: vocabulary, merges, normaliser, special tokens, chat template."""
    state: dict[str, Any] = {
        "special_tokens": {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        "chat_template": tokenizer.chat_template,
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are the last caller's arguments, not the tokenizer's.
        state["backend"] = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        state["vocab"] = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


def _cache_key(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over contents, the settings that decide samples, and the tokenizer; paths do not count."""
    contents = [source_identity(path) for path in settings.train_files]
    values = {key: value for key, value in asdict(settings).items() if key not in ("train_files", "seed")}
    if values["images"] is None:  # keys of rows without pictures stay what they were
        del values["images"]
    for name, default in (("loss_on", "assistant"), ("tools_field", None)):  # likewise of rows as they always were
        if values[name] == default:
            del values[name]
    state = [_CACHE_FORMAT, contents, values, tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _folder_name(settings: DataSettings, key: str) -> str:
    """Name of the cache folder: the key of the rows; with pictures also where their relative paths start from."""
    if settings.images is None:
        return key
    places = [os.path.realpath(os.path.dirname(path)) for path in settings.train_files]
    return hashlib.sha256(json.dumps([key, places]).encode()).hexdigest()


def _write_cache(folder: Path, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise into a temporary folder beside `folder`, then rename: `folder` is whole or absent."""
    tokenising = Tokenising(settings, tokenizer)
    features = _FEATURES if settings.images is None else Features({**_FEATURES, **_IMAGE_FEATURES})
    pictures = hashlib.sha256()
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        lengths: list[npt.NDArray[np.int32]] = []
        with ArrowWriter(path=str(partial / "samples.arrow"), features=features) as writer:
            for batch in tokenising.batches():
                if batch:
                    writer.write_batch({name: [getattr(s, name) for s in batch] for name in features})
                    pictures.update("".join(s.image_digest for s in batch).encode())
                    lengths.append(np.array([len(s.input_ids) for s in batch], dtype=np.int32))
            if not lengths:
                counts = ", ".join(f"{name} {count}" for name, count in tokenising.counts.items())
                raise DataError(
                    ", ".join(settings.train_files),
                    None,
                    f"no row is left to use ({counts})",
                    "raise max_length, set truncation: right (text: packing: true), or correct the files",
                )
            writer.finalize()
        np.save(partial / "lengths.npy", np.concatenate(lengths))
        meta = {"counts": tokenising.counts, "format": tokenising.format, "pictures": pictures.hexdigest()}
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was first; its folder has the same content.
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Samples:
    """Tokenised samples on disk, memory-mapped; tokenised on first use, loaded by every later process.

    Attributes:
        cache_key: sha256 (hex) of files, settings and tokenizer, and of the pictures where there are some.
        folder: where they are cached.
        counts: rows read, and of them bad, too_long, truncated; samples kept.
        format: the format found or given.
        lengths: [num_samples] int32, tokens of each sample without those of its picture, memory-mapped.
    Raises:
        DataError: a row is broken or too long and the settings say error; no row is left.
        ValueError: a file is missing, or a setting does not fit the data.
    """

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path) -> None:
        for path in settings.train_files:
            check_source(path)
        self._files = settings.train_files
        self.cache_key = _cache_key(settings, tokenizer)
        self.folder = folder = Path(cache_dir) / _folder_name(settings, self.cache_key)
        if not folder.exists():
            with _telling_of_the_cache(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder), _telling_of_the_cache(folder.parent, only=_NO_ROOM):
                if not folder.exists():
                    _write_cache(folder, settings, tokenizer)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.counts: dict[str, int] = meta["counts"]
        self.format: str = meta["format"]
        if settings.images is not None:
            self.cache_key = hashlib.sha256(f"{self.cache_key} {meta['pictures']}".encode()).hexdigest()
        self.lengths: npt.NDArray[np.int32] = np.load(folder / "lengths.npy", mmap_mode="r")
        self._table = Dataset.from_file(str(folder / "samples.arrow")).with_format("arrow")

    def read(self, samples: Sequence[int]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """(input_ids, loss_mask) of each sample, both [length]."""
        table: Any = self._table[list(samples)]
        ids, masks = table.column("input_ids"), table.column("loss_mask")
        return [(ids[i].values.to_numpy(), masks[i].values.to_numpy(zero_copy_only=False)) for i in range(len(samples))]

    def classes(self, samples: Sequence[int]) -> tuple[list[int], list[npt.NDArray[np.int8]]]:
        """Class number of each sample (-1: none) and its token types, [length] or empty."""
        table: Any = self._table[list(samples)]
        types = table.column("token_type_ids")
        return table.column("label").to_pylist(), [types[i].values.to_numpy() for i in range(len(samples))]

    def images(self, samples: Sequence[int]) -> tuple[list[StoredImage], list[str]]:
        """Picture of each sample and the folder that its path starts from."""
        table: Any = self._table[list(samples)]
        columns = (table.column(name).to_pylist() for name in _IMAGE_FEATURES)
        folders = [os.path.dirname(self._files[file]) for file in table.column("file").to_pylist()]
        return [StoredImage(*row) for row in zip(*columns, strict=True)], folders

    def cached_in(self, sample: int) -> Path:
        """The folder of the cache that holds a sample."""
        return self.folder

    def ids(self, samples: Sequence[int]) -> list[str]:
        """`file:line` of each sample, with `#piece` (from 0) behind it for the later pieces of a long text."""
        table: Any = self._table[list(samples)]
        columns = (table.column(name).to_pylist() for name in ("file", "line", "piece"))
        return [
            f"{self._files[file]}:{line}{f'#{piece}' if piece else ''}"
            for file, line, piece in zip(*columns, strict=True)
        ]


@contextmanager
def _telling_of_the_cache(root: Path, *, only: Sequence[int] | None = None) -> Iterator[None]:
    """ValueError for an OSError, of these numbers if some are given: others may be of the rows' own files."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise ValueError(
            f"tokenised rows cannot be kept in {root} ({error.strerror or error}); free some space there, or set "
            "ARDTRAIN_CACHE to another folder"
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process of a machine tokenises, the others wait.  Saves work only: without it the last rename would lose."""
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    with suppress(NotImplementedError, OSError):  # a file system without locks
        lock.acquire()
    try:
        yield
    finally:
        lock.release()  # does nothing when it is not held
