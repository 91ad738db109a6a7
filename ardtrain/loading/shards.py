"""The files of a checkpoint: safetensors headers, and positioned reads that are counted."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ardtrain.fingerprint import INDEX, LARGEST_HEADER_BYTES

# The format's names (github.com/huggingface/safetensors, README "Format"); what torch has no type for is refused.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Shard:
    """One open file; its reads are counted."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError: the file cannot be opened."""
        self.path, self.bytes_read = path, 0
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(
                f"{path}: the shard cannot be read ({error.strerror or error}); get the model anew, or make it readable"
            ) from error
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, target: memoryview, position: int) -> None:
        """Fills the memory from this byte on. Many threads may read at once.

        Raises:
            ValueError: the disk fails, or the file ends before (it was cut since its header was read).
        """
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:]], position + done)
            except OSError as error:
                raise ValueError(f"{self.path}: reading at byte {position + done} failed ({error.strerror})") from error
            if count == 0:
                raise ValueError(
                    f"{self.path} ends at byte {position + done}, before what its header names; get the model anew"
                )
            done += count
        with self._lock:
            self.bytes_read += done

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True)
class Stored:
    """One tensor of a shard: raw row-major numbers from byte `begin` of the file on."""

    name: str
    shard: Shard
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read_into(self, target: Tensor, first: int) -> None:
        """Fills a contiguous CPU tensor of this dtype with the numbers from `first` on (row-major)."""
        assert target.dtype == self.dtype and target.is_contiguous()
        if target.numel():
            memory = memoryview(target.view(-1).view(torch.uint8).numpy().data)
            self.shard.read_into(memory, self.begin + first * self.dtype.itemsize)


class Shards:
    """All tensors of a checkpoint by name, from the headers alone."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Args: the weight files, and the index if there is one (fingerprint.weight_files).

        Raises:
            ValueError: a file is missing, cut short or no safetensors file, a type is unknown, or the index names
                tensors that its file lacks.
        """
        self.shards = [Shard(path) for path in paths if path.name != INDEX]
        self.tensors: dict[str, Stored] = {}
        try:
            for shard in self.shards:
                self.tensors |= {stored.name: stored for stored in read_header(shard)}
            for path in paths:
                if path.name == INDEX:
                    self._check_index(path)
        except ValueError:
            self.close()
            raise

    def _check_index(self, index: Path) -> None:
        for name, file in json.loads(index.read_bytes())["weight_map"].items():
            if name not in self.tensors or self.tensors[name].shard.path.name != file:
                raise ValueError(f"{index} names {name} in {file}, which does not hold it; get the model anew")

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(stored.numel * stored.dtype.itemsize for stored in self.tensors.values())

    @property
    def bytes_read(self) -> int:
        """So far by this process, headers included."""
        return sum(shard.bytes_read for shard in self.shards)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def read_header(shard: Shard) -> list[Stored]:
    """The tensors of one file.

    Raises:
        ValueError: it is no safetensors file, names an unknown type, or holds more or fewer bytes than its header says.
    """
    path = shard.path
    length = int.from_bytes(_read(shard, 0, 8), "little") if shard.size >= 8 else shard.size
    if not 2 <= length <= min(LARGEST_HEADER_BYTES, shard.size - 8):
        raise ValueError(
            f"{path} is no safetensors file or was cut short (it has {shard.size} bytes and would have a header of "
            f"{length}); get the model anew"
        )
    out = []
    try:
        header = json.loads(_read(shard, 8, length))
        for name, described in header.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(size) for size in described["shape"])
            begin, end = (int(offset) for offset in described["data_offsets"])
            kind = described["dtype"]
            if kind not in DTYPES:
                raise ValueError(
                    f"{path}: {name} is of type {kind}, which is unknown here; known are {', '.join(DTYPES)}"
                )
            out.append(Stored(name, shard, DTYPES[kind], shape, 8 + length + begin))
            if end - begin != out[-1].numel * DTYPES[kind].itemsize or begin < 0:
                raise ValueError(
                    f"{path}: {name} has shape {list(shape)} of {kind}, but {end - begin} bytes; get the model anew"
                )
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: its header is damaged ({error!r}); get the model anew") from error
    expected = max((s.begin + s.numel * s.dtype.itemsize for s in out), default=8 + length)
    if shard.size != expected:
        what = "was cut short" if shard.size < expected else "is longer than it says"
        raise ValueError(f"{path} {what}: {shard.size} bytes, by its header {expected}; get the model anew")
    return out


def _read(shard: Shard, begin: int, count: int) -> bytes:
    memory = bytearray(count)
    shard.read_into(memoryview(memory), begin)
    return bytes(memory)
