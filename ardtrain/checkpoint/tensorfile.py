"""safetensors files as streams: written from tensors where they lie and read into them, the sha256 on the way.

The library would need a second copy of the state in memory, and maps a file on reading, where a failing disk ends the
process instead of raising. The format: 8 bytes of header length (little endian, as the machines we run on), a JSON
header name -> dtype, shape, data_offsets, then the data without holes. Every file is readable by the library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardtrain.checkpoint.errors import CheckpointError
from ardtrain.checkpoint.strictjson import open_regular, parse, write_all

CHUNK_BYTES = 1 << 24  # written, hashed and compared at a time
LARGEST_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRecord:
    """A file's size and sha256 (hex), as the manifest has it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: where its data begins and ends behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def header_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The file's first bytes and the order of its data: wide numbers first, so that each is aligned to its width."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # stable
    header: dict[str, Any] = {}
    begin = 0
    for name in order:
        t = tensors[name]
        end = begin + t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes and syncs a new file. Raises OSError."""
    first, order = header_of(tensors)
    sha256, size = hashlib.sha256(first), len(first)
    with path.open("xb", buffering=0) as file:
        write_all(file, first)
        for name in order:
            for piece in _pieces(_flat_bytes(tensors[name])):
                content = _memory(piece)
                sha256.update(content)
                write_all(file, content)
                size += len(content)
        os.fsync(file.fileno())
    return FileRecord(size, sha256.hexdigest())


def compare_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a file back from the disk, if the system lets go of its own copy, and compares it to the bit.

    Raises:
        RuntimeError: it differs.
    """
    first, order = header_of(tensors)
    with path.open("rb", buffering=0) as file:
        with contextlib.suppress(OSError, AttributeError):  # not every system has it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read(len(first)) != first:
            raise RuntimeError(f"{path}: its header reads back other than written; is the disk full or failing?")
        buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        for name in order:
            for piece in _pieces(_flat_bytes(tensors[name])):
                own = buffer[: len(piece)]
                if not _fill(file, own) or not torch.equal(own, piece):
                    raise RuntimeError(f"{path}: {name} reads back other than written; is the disk full or failing?")
        if file.read(1):
            raise RuntimeError(f"{path} has more bytes than were written; is the disk failing?")


class TensorReader:
    """One safetensors file, read once from front to end, so that its sha256 is known when all tensors are.

    entries: in the order of the data. Raises CheckpointError for everything that is wrong with the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        self._sha256 = hashlib.sha256()
        try:
            self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()

    def _read_header(self) -> list[Entry]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._take(8), "little")
        if length > min(LARGEST_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{self.path} is damaged (a header of {length} bytes); take another checkpoint")
        header = parse(self._take(length), self.path)
        return check_header(header, size - 8 - length, self.path)

    def _take(self, count: int) -> bytes:
        buffer = torch.empty(count, dtype=torch.uint8)
        self._into(buffer)
        return bytes(buffer.numpy())

    def _into(self, target: Tensor) -> None:
        try:
            whole = _fill(self._file, target)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}); take another checkpoint") from error
        if not whole:
            raise CheckpointError(f"{self.path} is missing or damaged (it ends too early); take another checkpoint")
        self._sha256.update(_memory(target))

    def read_into(self, target: Tensor) -> None:
        """The next entry's data; target: contiguous, of its dtype and shape."""
        for piece in _pieces(_flat_bytes(target)):
            self._into(piece)

    def sha256(self) -> str:
        """Of the whole file; what was not asked for is read now."""
        buffer = bytearray(1 << 20)
        try:
            while count := self._file.readinto(buffer):
                self._sha256.update(memoryview(buffer)[:count])
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}); take another checkpoint") from error
        return self._sha256.hexdigest()


def check_header(header: Any, num_bytes: int, path: Path) -> list[Entry]:
    """A parsed header as entries in the order of the data; num_bytes: of the data.

    Raises:
        CheckpointError: a value of another type or size than the format has, holes, overlaps.
    """
    try:
        if not isinstance(header, dict):
            raise TypeError("no object")
        entries = [_entry(name, value) for name, value in header.items() if name != "__metadata__"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged (its header is no safetensors header); take another") from error
    entries.sort(key=lambda e: (e.begin, e.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise CheckpointError(
                f"{path} is damaged ({entry.name!a} begins at {entry.begin}, not {end}); take another"
            )
        end = entry.end
    if end != num_bytes:
        raise CheckpointError(f"{path} is damaged ({num_bytes} bytes of data, its header says {end}); take another")
    return entries


def _entry(name: str, value: Any) -> Entry:
    dtype, shape, (begin, end) = DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError("no shape")
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (*shape, begin, end)):
        raise ValueError("a number that is no size")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("its shape has another number of bytes")
    return Entry(name, dtype, tuple(shape), begin, end)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex. Raises CheckpointError where it is not there or cannot be read."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); take another checkpoint") from error


def _flat_bytes(tensor: Tensor) -> Tensor:
    """[n] uint8 view of a contiguous tensor's memory."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.detach().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a [n] uint8 tensor themselves."""
    numbers: Any = flat.numpy()
    return memoryview(numbers)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    for begin in range(0, len(flat), CHUNK_BYTES):
        yield flat[begin : begin + CHUNK_BYTES]


def _fill(file: FileIO, target: Tensor) -> bool:
    """Reads until target [n] uint8 is full; False where the file ends before."""
    rest = _memory(target)
    while rest:
        count = file.readinto(rest)
        if not count:
            return False
        rest = rest[count:]
    return True
