"""Weight files against their checksums (the hub's own, or a SHA256SUMS beside them), and numbers that are finite."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ardtrain.loading.filling import CHUNK_BYTES, Weights
from ardtrain.loading.sources import TensorSource

SUMS = "SHA256SUMS"  # as `sha256sum *.safetensors > SHA256SUMS` writes it
BLOCK_BYTES = 8 << 20
_HEX = re.compile(r"[0-9a-f]{64}")


def known_checksum(path: Path) -> str | None:
    """The sha256 (hex) that a weight file should have, or None where nobody has said.

    In the hub's cache a large file is a link to a blob named by it; `hf download --local-dir` keeps it as the entity
    tag in `.cache/huggingface/download`; for other folders a SHA256SUMS is read.
    """
    blob = path.resolve()
    if blob.parent.name == "blobs" and _HEX.fullmatch(blob.name):
        return blob.name
    noted = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if noted.is_file():
        lines = noted.read_text().split("\n")
        tag = lines[1].strip() if len(lines) > 1 else ""
        if _HEX.fullmatch(tag):
            return tag
    sums = path.parent / SUMS
    for line in sums.read_text().splitlines() if sums.is_file() else ():
        digest, _, name = line.strip().partition(" ")
        if name.strip().removeprefix("*") == path.name and _HEX.fullmatch(digest.lower()):
            return digest.lower()
    return None


def verify_files(paths: Sequence[Path], *, progress: Callable[[int], None] = lambda count: None) -> list[str]:
    """Reads files whole and compares them.

    Args:
        progress: gets the bytes of each block that was read.
    Returns:
        Names of the files for which no checksum is known; they were not read.
    Raises:
        ValueError: a file has another checksum, or cannot be read.
    """
    unknown = []
    for path in paths:
        expected = known_checksum(path)
        if expected is None:
            unknown.append(path.name)
            continue
        found = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    found.update(block)
                    progress(len(block))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error}); get the model anew") from error
        if found.hexdigest() != expected:
            raise ValueError(
                f"{path} has the checksum {found.hexdigest()[:16]}..., it should have {expected[:16]}...: it was "
                "damaged or replaced; remove it and get the model anew (ardtrain fetch)"
            )
    return unknown


@dataclass(frozen=True)
class Checked:
    """A source whose numbers must be finite; what was not read is not looked at."""

    name: str
    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, begin: int, numel: int) -> Tensor:
        """As TensorSource says. Raises ValueError: a number is infinite or no number."""
        values = self.source.read(begin, numel)
        if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
            raise ValueError(
                f"{self.name} holds a number that is not finite; get the model anew (verify_weights=false loads it as "
                "it is)"
            )
        return values


def checked(weights: Weights) -> Weights:
    """The weights with every number looked at while it is read."""
    return replace(weights, sources={name: Checked(name, source) for name, source in weights.sources.items()})


def check_finite(sources: Mapping[str, TensorSource], *, progress: Callable[[int], None] = lambda count: None) -> None:
    """Reads all parameters once, in parallel, and keeps none.

    Raises:
        ValueError: a number is not finite, or a file cannot be read.
    """

    def check(part: tuple[Checked, int, int]) -> None:
        source, begin, count = part
        progress(source.read(begin, count).nbytes)

    once = {id(source): Checked(name, source) for name, source in sources.items()}  # tied ones share theirs
    parts = []
    for source in once.values():
        numel, step = math.prod(source.shape), max(1, CHUNK_BYTES // source.dtype.itemsize)
        parts += [(source, begin, min(step, numel - begin)) for begin in range(0, numel, step)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, parts))
