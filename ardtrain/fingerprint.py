"""A fingerprint of the base's weight files: sizes, the index, every file's header and 64 ranges, not 141 GB.

Two bases of equal shapes have equal configs, and weights may be replaced on disk between two starts of a run. Sizes,
header bytes (names, types, offsets) and the index are exact; of the values 64 ranges of 256 KiB spread evenly over all
files are hashed, so a base of up to 16 MiB is read whole, and in a larger one a change that touches few tensors and
keeps every size can be missed. The ranges depend on the sizes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ardtrain.reasons import no_source

NUM_RANGES = 64
RANGE_BYTES = 1 << 18
LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The weight files of a model's folder as transformers would take them, with the index in front if there is one.

    Raises:
        ValueError: the folder has no safetensors weights, the index is broken, or it names a file that is not there.
    """
    folder = Path(folder)
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # transformers looks for it first
        return [folder / SINGLE]
    if not index.is_file():
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; safetensors weights are needed")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        paths = [folder / name for name in names]
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index of weights ({error!r}); get the model anew") from error
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{index} names {missing[0].name}, which is not there; get the model anew")
    return [index, *paths]


def hub_weight_files(name_or_path: str, revision: str | None = None) -> list[Path]:
    """`weight_files` of a folder or of a hub id; the id's files are fetched as loading would fetch them.

    Raises:
        ValueError: as `weight_files`, or the hub id cannot be had.
    """
    if os.path.isdir(name_or_path):
        return weight_files(name_or_path)
    from transformers.utils.hub import cached_file

    def fetch(name: str, *, needed: bool) -> str | None:
        found: str | None = cached_file(
            name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=needed
        )
        return found

    try:
        single = fetch(SINGLE, needed=False)
        if single is not None:
            return [Path(single)]
        index = Path(fetch(INDEX, needed=True) or "")
        for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values())):
            fetch(name, needed=True)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={name_or_path!r}: no safetensors weights could be had "
            f"({no_source(name_or_path, error)}); give a folder, or a hub id that this machine can reach"
        ) from error
    return weight_files(index.parent)


def fingerprint(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> sha256 (hex) over its size, its header and the ranges that fall into it; an index is hashed whole.

    Reads at most 16 MiB, the headers and the index. Equal on every process that sees the same files.

    Raises:
        ValueError: a file cannot be read.
    """
    try:
        weights = [path for path in paths if path.name != INDEX]
        sizes = [path.stat().st_size for path in weights]
        out = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.name == INDEX}
        ranges = sample(sizes)
        for path, size, own in zip(weights, sizes, ranges, strict=True):
            digest = hashlib.sha256(str(size).encode())
            with path.open("rb") as file:
                digest.update(_header(file, size))
                for begin, end in own:
                    file.seek(begin)
                    digest.update(file.read(end - begin))
            out[path.name] = digest.hexdigest()
        return out
    except OSError as error:
        raise ValueError(
            f"{error.filename or paths[0]}: the base's weights cannot be read ({error.strerror or error}); make them "
            "readable, or get the model anew"
        ) from error


def _header(file: BinaryIO, size: int) -> bytes:
    """A safetensors file's first bytes, up to the data; 8 of a file that is none (loading will say so)."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    return first + file.read(length) if length <= min(LARGEST_HEADER_BYTES, size - 8) else first


def sample(sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """For each file the (begin, end) ranges to hash; a function of the sizes.

    The files' bytes in a row are cut into 64 stretches, and one range is taken in each, at a place drawn from its
    number: evenly spaced ranges would meet the same tensor of every layer.
    """
    total = sum(sizes)
    if total <= NUM_RANGES * RANGE_BYTES:
        return [[(0, size)] for size in sizes]
    out: list[list[tuple[int, int]]] = []
    starts: list[int] = []
    for number in range(NUM_RANGES):
        low, high = total * number // NUM_RANGES, total * (number + 1) // NUM_RANGES
        drawn = int.from_bytes(hashlib.sha256(f"{total}:{number}".encode()).digest()[:8], "little")
        starts.append(low + drawn % (high - low - RANGE_BYTES + 1))
    before = 0
    for size in sizes:
        cut = [(max(0, start - before), min(size, start + RANGE_BYTES - before)) for start in starts]
        out.append([(begin, end) for begin, end in cut if begin < end])
        before += size
    return out
