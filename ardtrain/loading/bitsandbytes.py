"""Checkpoints that bitsandbytes quantised, read without it: to the rest of loading their weights look like float32.

The formats (bitsandbytes 0.50, functional.py QuantState.as_dict and nn/modules.py Linear8bitLt):

    NAME.weight [n / 2, 1] uint8, two codes a byte, the first in the high four bits; NAME.weight.quant_map [16], what
    a code means; NAME.weight.absmax [blocks], float32, or codes of nested_quant_map [256] with a nested_absmax for each
    nested_blocksize blocks and one offset; NAME.weight.quant_state.bitsandbytes__nf4 (or fp4), JSON: block sizes, shape
    NAME.weight [O, I] int8; NAME.SCB [O]: the weight is code SCB / 127

Decoded nf4 in blocks of 64 that is packed again (quantization: nf4) gives its own codes and scales back, to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ardtrain.loading.shards import Stored

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class Decoded(Stored):
    """A weight that reads as float32 and is stored in codes."""


@dataclass(frozen=True)
class Decoded4Bit(Decoded):
    """A 4-bit weight as float32: the value of its code times its block's scale."""

    codes: Stored
    state: Mapping[str, Any]
    absmax: Stored
    table: Tensor  # [16] float32
    nested: tuple[Stored, Tensor] | None  # nested_absmax, nested_quant_map [256]

    def read_into(self, target: Tensor, first: int) -> None:
        size, stop = int(self.state["blocksize"]), first + target.numel()
        begin, end = first // 2, -(-stop // 2)
        packed = _part(self.codes, begin, end)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[first - 2 * begin :][: target.numel()]
        torch.index_select(self.table, 0, codes.int(), out=target)
        blocks = torch.arange(first, stop).div_(size, rounding_mode="floor")
        lowest = first // size
        target.mul_(self._scales(lowest, -(-stop // size))[blocks - lowest])

    def _scales(self, begin: int, end: int) -> Tensor:
        """[blocks] float32."""
        stored = _part(self.absmax, begin, end)
        if self.nested is None:
            return stored.float()
        nested, table = self.nested
        size = int(self.state["nested_blocksize"])
        coarse = _part(nested, begin // size, -(-end // size)).float()
        owner = torch.arange(begin, end).div_(size, rounding_mode="floor") - begin // size
        return table[stored.int()] * coarse[owner] + float(self.state["nested_offset"])


@dataclass(frozen=True)
class Decoded8Bit(Decoded):
    """An int8 weight as float32: code times its row's scale."""

    codes: Stored
    scales: Stored

    def read_into(self, target: Tensor, first: int) -> None:
        width, stop = self.shape[1], first + target.numel()
        scales = _part(self.scales, first // width, -(-stop // width)).float() / 127
        rows = torch.arange(first, stop).div_(width, rounding_mode="floor") - first // width
        torch.mul(_part(self.codes, first, stop), scales[rows], out=target)


def decoded(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The checkpoint's tensors with each quantised weight as one of float32, its companions gone.

    Reads the descriptions (JSON, tables) and nothing else.

    Raises:
        ValueError: a description is broken or of another format.
    """
    out = dict(tensors)
    for name, stored in tensors.items():
        weight, state_mark, kind = name.partition(_STATE)
        try:
            if state_mark and kind in ("nf4", "fp4"):
                out[weight] = _four_bits(tensors, weight, stored)
                for part in (*_PARTS, f"{_STATE[1:]}{kind}"):
                    out.pop(f"{weight}.{part}", None)
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                codes = tensors[f"{module}.weight"]
                if codes.dtype != torch.int8 or stored.shape != codes.shape[:1]:
                    raise ValueError("SCB does not belong to an int8 weight of as many rows")
                out[codes.name] = Decoded8Bit(codes.name, codes.shard, torch.float32, codes.shape, 0, codes, stored)
                for part in ("SCB", "weight_format"):
                    out.pop(f"{module}.{part}", None)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{stored.shard.path}: {name} does not describe a bitsandbytes weight ({error}); get the model anew, "
                "or take the base in bf16 and set quantization"
            ) from error
    return out


def _four_bits(tensors: Mapping[str, Stored], weight: str, described: Stored) -> Stored:
    state = json.loads(bytes(_part(described, 0, described.numel).numpy()))
    codes, shape = tensors[weight], tuple(int(n) for n in state["shape"])
    if codes.dtype != torch.uint8 or codes.numel != -(-math.prod(shape) // 2) or int(state["blocksize"]) < 1:
        raise ValueError(f"{codes.numel} bytes of {codes.dtype} for a weight of shape {list(shape)}")
    table = _whole(tensors[f"{weight}.quant_map"])
    nested = None
    if "nested_offset" in state:
        nested = (tensors[f"{weight}.nested_absmax"], _whole(tensors[f"{weight}.nested_quant_map"]))
    return Decoded4Bit(
        weight, codes.shard, torch.float32, shape, 0, codes, state, tensors[f"{weight}.absmax"], table, nested
    )


def _whole(stored: Stored) -> Tensor:
    return _part(stored, 0, stored.numel).float()


def _part(stored: Stored, begin: int, end: int) -> Tensor:
    """[end - begin] the stored numbers in a row."""
    out = torch.empty(end - begin, dtype=stored.dtype)
    stored.read_into(out, begin)
    return out
