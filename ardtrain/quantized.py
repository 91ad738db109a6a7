"""The frozen base in 8 or 4 bit: codes and scales, the linear that computes with them, and a model made so in place.

A quantised weight is one flat byte parameter in which each scale stands right behind the codes that it belongs to:

    int8  a unit is a row of the weight: I codes and one float32 scale, I + 4 bytes
    nf4   a unit is a block of 64 weights in row order: 32 bytes of two codes each and one float32 scale, 36 bytes

So any slice of the parameter comes from a contiguous run of weights: ZeRO-3 shards, offloads and gathers it like any
other, in one message a linear, and a process that loads its slice reads those rows alone. The product dequantises in
forward and again in backward; autograd keeps no float copy of a weight. Everything here is elementwise or a maximum
over one unit, so bits do not depend on slices, stages or the number of processes.

Letters: N leading dimensions of an activation, I in, O out, U units.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ardtrain.products import FrozenLinear

Format = Literal["int8", "nf4"]
FORMATS: tuple[str, ...] = get_args(Format)
BLOCK = 64  # weights that share a scale in nf4
SCALE_BYTES = 4
INT8_LARGEST = 127  # symmetric: -128 is never used
CHUNK = 1 << 24  # weights worked on at a time: bounds the temporaries beside the weight itself

# The 16 values of 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E; bitsandbytes' codebook, float32).
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows of a weight, each row by itself.

    scale = max|w| / 127; code = w / scale rounded to the nearest, ties to even. So |w - code scale| <= scale / 2 up to
    float32's rounding: at most 1/254 of the row's largest weight.

    Args:
        rows: [U, I] floating, finite.
    Returns:
        codes [U, I] int8 in -127..127; scales [U] float32, 0 for a row of zeros.
    """
    values = rows.float()
    scales = values.abs().amax(dim=1) / INT8_LARGEST
    # A row of zeros, or of numbers so small that their scale is 0 in float32, has codes 0.
    inverse_safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (values / inverse_safe[:, None]).round_().clamp_(-INT8_LARGEST, INT8_LARGEST)
    return codes.to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[U, I] in dtype: code times scale in float32, rounded once."""
    return (codes * scales[:, None]).to(dtype)


def quantize_nf4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of weights in row order, each block of 64 by itself (QLoRA, equation 1 and appendix E).

    scale = the block's max|w|; code = the nearest of NF4_VALUES to w / scale, the lower of two as near. The largest
    distance of two neighbours is 0.304, so |w - value scale| <= 0.152 scale. The scales are not quantised again:
    QLoRA's double quantisation would save 0.37 of 4.5 bits a weight, and its second scale spans 256 blocks, which a
    process that reads one slice does not have.

    Args:
        values: [n] floating, finite; a last block that is short counts as filled with zeros.
    Returns:
        codes [U, 32] uint8, the first of two in the high four bits (as bitsandbytes has it); scales [U] float32.
    """
    num_units = -(-values.numel() // BLOCK)
    blocks = values.new_zeros(num_units * BLOCK, dtype=torch.float32)
    blocks[: values.numel()] = values
    blocks = blocks.view(num_units, BLOCK)
    scales = blocks.abs().amax(dim=1)
    table = torch.tensor(NF4_VALUES, device=values.device)
    between = (table[1:].double() + table[:-1].double()).div(2).float()
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    nearest = torch.bucketize(blocks / safe[:, None], between).to(torch.uint8)  # a value on a border goes down
    return nearest[:, 0::2] << 4 | nearest[:, 1::2], scales


@functools.cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """[256, 2] float32: the values of a byte's two codes. Once a device: a copy from the host waits for the device."""
    table = torch.tensor(NF4_VALUES)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).to(device)


def dequantize_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[U, 64] in dtype: value of the code times scale in float32, rounded once. codes [U, 32] uint8, scales [U]."""
    values = _nf4_pairs(codes.device).index_select(0, codes.reshape(-1).int()).view(len(codes), BLOCK)
    return values.mul_(scales[:, None]).to(dtype)


@dataclass(frozen=True)
class Packing:
    """How a weight [O, I] lies in its byte parameter.

    dtype: what the weight is dequantised to, the compute dtype. carried: the parameter has that dtype as well, its
    bytes unread, because DeepSpeed's NVMe swapper knows one dtype only and would convert any other.
    """

    format: Format
    out_features: int
    in_features: int
    dtype: torch.dtype
    carried: bool = False

    @property
    def unit_weights(self) -> int:
        """Weights that share a scale."""
        return self.in_features if self.format == "int8" else BLOCK

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit's codes and its scale."""
        return SCALE_BYTES + (self.in_features if self.format == "int8" else BLOCK // 2)

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def num_units(self) -> int:
        return -(-self.num_weights // self.unit_weights)

    @property
    def byte_dtype(self) -> torch.dtype:
        """int8 or uint8, as the codes are."""
        return torch.int8 if self.format == "int8" else torch.uint8

    @property
    def parameter_dtype(self) -> torch.dtype:
        """byte_dtype, or the compute dtype where it is carried."""
        return self.dtype if self.carried else self.byte_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter: [U, bytes], or flat where it is carried."""
        if not self.carried:
            return (self.num_units, self.unit_bytes)
        return (-(-self.num_units * self.unit_bytes // self.dtype.itemsize),)

    def pack(self, values: Tensor) -> Tensor:
        """[U, unit_bytes] int8 or uint8: the units of a contiguous run of weights, which starts at a unit's first.

        Args:
            values: floating, any shape, in row order.
        Raises:
            ValueError: a weight is not finite.
        """
        values = values.detach().reshape(-1)
        parts = []
        for part in values.split(max(1, CHUNK // self.unit_weights) * self.unit_weights):
            if self.format == "int8":
                codes, scales = quantize_int8(part.view(-1, self.in_features))
            else:
                codes, scales = quantize_nf4(part)
            if not bool(torch.isfinite(scales).all()):  # one host synchronisation, at loading
                raise ValueError("holds numbers that are not finite, which have no scale; get the model anew")
            parts.append(self.join(codes, scales))
        return torch.cat(parts)

    def join(self, codes: Tensor, scales: Tensor) -> Tensor:
        """[U, unit_bytes] of codes [U, I] int8 or [U, 32] uint8 and scales [U] float32."""
        assert scales.dtype == torch.float32
        return torch.cat([codes, scales[:, None].contiguous().view(codes.dtype)], dim=1)

    def parameter(self, units: Tensor) -> Tensor:
        """All units as the parameter's values."""
        if not self.carried:
            return units
        (size,) = self.shape
        flat = units.new_zeros(size * self.dtype.itemsize)
        flat[: units.numel()] = units.view(-1)
        return flat.view(self.dtype)

    def units(self, parameter: Tensor) -> Tensor:
        """[U, unit_bytes]: a view of the whole parameter."""
        if not self.carried:
            return parameter
        raw = parameter.view(self.byte_dtype)
        return raw[: self.num_units * self.unit_bytes].view(self.num_units, self.unit_bytes)

    def dequantize(self, parameter: Tensor) -> Tensor:
        """[O, I] in the compute dtype, on the parameter's device."""
        units = self.units(parameter.detach())
        out = units.new_empty(self.num_units * self.unit_weights, dtype=self.dtype)
        step = max(1, CHUNK // self.unit_weights)
        for first in range(0, self.num_units, step):
            part = units[first : first + step]
            # Copied: a float32 cannot be viewed at any byte of a gathered buffer.
            scales = part[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)[:, 0]
            codes = part[:, :-SCALE_BYTES]
            dequantize = dequantize_int8 if self.format == "int8" else dequantize_nf4
            own = out[first * self.unit_weights : (first + len(part)) * self.unit_weights]
            own.view(len(part), -1).copy_(dequantize(codes, scales, self.dtype))
        return out[: self.num_weights].view(self.out_features, self.in_features)


class QuantizedLinear(nn.Module):
    """A frozen linear whose `weight` is the byte parameter. An adapter adopts it as it adopts an nn.Linear."""

    def __init__(self, packing: Packing, weight: Tensor, bias: nn.Parameter | None) -> None:
        """
        Args:
            weight: the parameter's values (Packing.parameter), or a meta tensor of its shape. bias: [O].
        """
        super().__init__()
        assert weight.shape == packing.shape and weight.dtype == packing.parameter_dtype
        self.in_features, self.out_features = packing.in_features, packing.out_features
        self.packing = packing
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        out: Tensor = FrozenLinear.apply(x, self.weight, self.bias, self.packing)
        return out

    def dequantized(self) -> nn.Linear:
        """A plain frozen linear with the dequantised weight, for whom the format means nothing (PEFT, a merge)."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.packing.dtype)
        linear.weight = nn.Parameter(self.packing.dequantize(self.weight), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packing.format}"


def unshared(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """Those of the modules whose weight is no other module's as well (an embedding's, tied)."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return [name for name in modules if owners[id(model.get_submodule(name).weight)] == 1]


def packing_of(linear: nn.Linear, format: Format, *, carried: bool = False) -> Packing:
    """How this linear's weight will lie; its dtype is the compute dtype. Works on the meta device."""
    return Packing(format, linear.out_features, linear.in_features, linear.weight.dtype, carried)


def quantize_modules(
    model: nn.Module, modules: Sequence[str], format: Format, *, carried: bool = False
) -> dict[str, Packing]:
    """Puts a QuantizedLinear in the place of each of these linears, one after the other, where its weight lies.

    On the meta device the new weight is there as well, to be filled by who reads the files.

    Args:
        carried: for a base that DeepSpeed offloads to NVMe (Packing).
    Returns:
        Module path -> packing.
    Raises:
        ValueError: a weight is not finite; the message names it.
    """
    packings = {}
    for name in modules:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, child)
        packings[name] = packing = packing_of(linear, format, carried=carried)
        if linear.weight.is_meta:
            weight = torch.empty(packing.shape, dtype=packing.parameter_dtype, device="meta")
        else:
            try:
                weight = packing.parameter(packing.pack(linear.weight))
            except ValueError as error:
                raise ValueError(f"quantization={format}: {name}.weight {error}") from error
        setattr(parent, child, QuantizedLinear(packing, weight, linear.bias).train(linear.training))
    return packings


def dequantize_modules(model: nn.Module) -> None:
    """Puts a plain linear with the dequantised weight in the place of each QuantizedLinear."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, module.dequantized())
