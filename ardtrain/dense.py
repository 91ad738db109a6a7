"""Modules that are trained in full beside adapters: their numbers are the arena's, handed over as views of the leaf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ardtrain.ranks import Dense


class DenseModule(nn.Module):
    """What is trained in full: the loop hands it the views of its entries, part -> view of the leaf."""

    views: Mapping[str, Tensor]
    first: Mapping[str, Tensor]  # part -> first values

    def __init__(self) -> None:
        super().__init__()
        self.views, self.first = {}, {}


class DenseLinear(DenseModule):
    """A linear that is trained in full: its weight and bias are views of the arena, cast to the compute dtype.

    Its own parameters are gone from the model, so ZeRO-3 neither shards nor gathers them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.first = {n: p.detach().float().clone() for n, p in linear.named_parameters(recurse=False)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        bias = self.views.get("bias")
        weight, x_NI = self.views["weight"].to(x.dtype), x.reshape(-1, x.shape[-1])
        # Not by F.linear: zero.Init replaces that one in the whole process. The sum is the base's own, to the bit.
        out = torch.mm(x_NI, weight.t()) if bias is None else torch.addmm(bias.view(-1).to(x.dtype), x_NI, weight.t())
        return out.view(*x.shape[:-1], self.out_features)


class DenseLayer(DenseModule):
    """A module without children that is trained in full and no linear, such as a convolution, an embedding or a norm.

    The module itself computes, with views of the arena in the place of its parameters. It lies outside the model's
    tree and its parameters on the meta device, so ZeRO-3 neither shards nor gathers them. Of torch's functions
    zero.Init replaces F.linear alone, so the others give the same bits with and without it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        parameters = dict(layer.named_parameters(recurse=False))
        self.first = {n: p.detach().float().clone() for n, p in parameters.items()}
        self._forms = {n: (p.shape, p.dtype) for n, p in parameters.items()}
        self._layer = (layer.to("meta"),)  # a tuple, which nn.Module does not look into

    @property
    def layer(self) -> nn.Module:
        """The module itself, without numbers."""
        return self._layer[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        return torch.func.functional_call(self._layer[0], {n: self._value(n) for n in self._forms}, args, kwargs)

    def _value(self, part: str) -> Tensor:
        shape, dtype = self._forms[part]
        return self.views[part].view(shape).to(dtype)

    def __getattr__(self, name: str) -> Any:
        """Its parameters' values while it has views: SigLIP reads the dtype of a convolution's weight."""
        return self._value(name) if name in self.__dict__.get("views", ()) else super().__getattr__(name)


def attach_dense(model: nn.Module, modules: Sequence[str]) -> dict[str, DenseModule]:
    """Puts a DenseLinear in the place of each of these linears, a DenseLayer in that of modules of other kinds."""
    out: dict[str, DenseModule] = {}
    for name in modules:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        own = getattr(parent, child)
        out[name] = DenseLinear(own) if isinstance(own, nn.Linear) else DenseLayer(own)
        setattr(parent, child, out[name])
    return out


def dense_entries(modules: Mapping[str, nn.Module]) -> tuple[Dense, ...]:
    """The arena's entries for modules that are trained in full; works on the meta device."""
    out = []
    for name, module in modules.items():
        for part, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, parameter.numel())
            out.append(Dense(name, part, rows, columns, None if shape == (rows, columns) else shape))
    return tuple(out)
