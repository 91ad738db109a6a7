"""Quantised weights as sources: the rows or blocks that cover a slice are read and quantised, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ardtrain.loading.bitsandbytes import Decoded
from ardtrain.loading.filling import Weights
from ardtrain.loading.sources import Pieces, TensorSource
from ardtrain.loading.verifying import Checked
from ardtrain.quantized import Packing


@dataclass(frozen=True)
class Quantized:
    """The byte parameter of a quantised linear, made of the weight's own numbers while they are read.

    A slice is cut at bytes; the units (rows of int8, blocks of nf4) that it touches are read, so two processes may both
    read the unit that lies on the border of their slices.
    """

    name: str
    weight: TensorSource
    packing: Packing

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packing.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.packing.parameter_dtype

    def read(self, begin: int, numel: int) -> Tensor:
        """[numel] of dtype, as TensorSource says. Raises ValueError: a weight is not finite."""
        packing, size = self.packing, self.dtype.itemsize
        first, last = begin * size, (begin + numel) * size  # bytes
        units = range(first // packing.unit_bytes, min(packing.num_units, -(-last // packing.unit_bytes)))
        out = torch.zeros(numel * size, dtype=packing.byte_dtype)  # a carried parameter may be padded at its end
        if units:
            start = units.start * packing.unit_weights
            count = min(units.stop * packing.unit_weights, packing.num_weights) - start
            values = self.weight.read(start, count)
            try:
                own = packing.pack(values).view(-1)[first - units.start * packing.unit_bytes :]
            except ValueError as error:
                raise ValueError(f"quantization={packing.format}: {self.name} {error}") from error
            kept = min(len(out), len(own))
            out[:kept] = own[:kept]
        return out.view(self.dtype)


def quantized(weights: Weights, packings: Mapping[str, Packing]) -> Weights:
    """The weights with these linears (module path -> packing) quantised while they are read."""
    sources = dict(weights.sources)
    for module, packing in packings.items():
        name = f"{module}.weight"
        sources[name] = Quantized(name, _exact(sources[name]), packing)
    return replace(weights, sources=sources)


def _exact(source: TensorSource) -> TensorSource:
    """A weight that was decoded from codes, not rounded to the compute dtype: then its own codes come back."""
    if isinstance(source, Checked):
        return replace(source, source=_exact(source.source))
    if isinstance(source, Pieces) and all(isinstance(run.stored, Decoded) for run in source.runs):
        return Pieces(source.shape, torch.float32, source.runs)
    return source
