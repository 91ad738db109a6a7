"""Fills a model on the meta device: whole on the device, or under ZeRO-3 each process's slices alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from torch import Tensor, nn

from ardtrain.loading import Filler, Weights


def can_fill_slices(config: Mapping[str, Any]) -> bool:
    """Can a backbone of this DeepSpeed config be filled by slices? Not where DeepSpeed quantises them."""
    return not config["zero_optimization"].get("zero_quantized_nontrainable_weights", False)


def fill(model: nn.Module, weights: Weights, *, stage: int, config: Mapping[str, Any], device: torch.device) -> None:
    """Gives the parameters on the meta device their numbers: what this process keeps. All processes must call this.

    stage: of ZeRO; 3 shards the model by this config, below it is whole on the device.
    Raises:
        ValueError: a file cannot be read.
    """
    if stage == 3:
        fill_slices(model, weights, config, device)
    else:
        fill_whole(model, weights, device)


def fill_whole(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Gives each parameter on the meta device its whole value on the device.

    Raises:
        ValueError: a file cannot be read.
    """
    with Filler(weights) as filler:
        for made in _Places(model).made(weights, device):
            for name, parameter in made.items():
                filler.add(name, 0, parameter)
    weights.close()


def fill_slices(model: nn.Module, weights: Weights, config: Mapping[str, Any], device: torch.device) -> None:
    """Shards the model by ZeRO-3, module by module, and reads this process's slices into place.

    One module's parameters exist whole at a time, without values (zero.Init sends process 0's around nevertheless:
    time, not correctness). Parameters that have values already are sharded as they are. All processes must call this.

    Raises:
        ValueError: a file cannot be read.
    """
    first: Any = None
    with Filler(weights) as filler:
        for made in _Places(model).made(weights, device):
            if first is None:
                deepspeed.zero.Init(module=nn.ParameterList(made.values()), config_dict_or_path=dict(config))
                first = next(iter(made.values()))
            else:  # the same Init: one swapper for NVMe, one set of groups
                first.convert_to_zero_parameters(param_list=list(made.values()))
            for name, parameter in made.items():
                _fill_slice(filler, name, parameter)
        rest = [p for p in model.parameters() if not hasattr(p, "ds_id")]
        if rest and first is not None:
            first.convert_to_zero_parameters(param_list=rest)
    weights.close()


def _fill_slice(filler: Filler, name: str, parameter: Any) -> None:
    """Reads what this process keeps of a sharded parameter: its partition, and under hpZ the node's as well."""
    swapped = parameter.ds_tensor.final_location is not None  # on NVMe already
    if swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    _fill_part(filler, name, parameter, parameter.ds_tensor, parameter.ds_process_group)
    if parameter.ds_secondary_tensor is not None:
        _fill_part(filler, name, parameter, parameter.ds_secondary_tensor, parameter.ds_zero_param_process_group)
    if swapped:
        filler.wait()
        parameter.nvme_swapper.swap_out_and_release([parameter])


def _fill_part(filler: Filler, name: str, parameter: Any, part: Tensor, group: Any) -> None:
    begin = part.numel() * comm.get_rank(group=group)
    count = max(0, min(part.numel(), parameter.ds_numel - begin))
    part[count:].zero_()  # the last one is padded
    filler.add(name, begin, part[:count])


class _Places:
    """Where the model holds its parameters on the meta device; a tied one is at several places."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.groups: dict[str, dict[str, nn.Parameter]] = {}  # module path -> its own parameters, a tied one once
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    self._places.setdefault(id(parameter), []).append((module, key))
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                self.groups.setdefault(name.rpartition(".")[0], {})[name] = parameter

    def replace(self, old: nn.Parameter, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        """A parameter with memory and without values in the place of one on the meta device."""
        new = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device), requires_grad=old.requires_grad)
        for module, key in self._places[id(old)]:
            module._parameters[key] = new
        return new

    def made(self, weights: Weights, device: torch.device) -> Iterator[dict[str, nn.Parameter]]:
        """Module by module the new parameters by name."""
        for group in self.groups.values():
            yield {name: self.replace(old, weights.sources[name].dtype, device) for name, old in group.items()}
