"""Which stored tensors a parameter comes from, by transformers' own rules for names and transforms.

What from_pretrained does in `convert_and_load_state_dict_in_model` (transformers 5, core_model_loading.py) without
reading: the same renamings and converters, the same order, the same dtypes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ardtrain.loading.shards import Stored
from ardtrain.loading.sources import Conversion, Converted, Latest, Pieces, TensorSource, Unread


class NotMapped(Exception):
    """transformers transforms this checkpoint in a way that cannot be followed without reading it."""


@dataclass
class Mapped:
    """State-dict name of the model -> source; what the checkpoint lacks, has in other shapes, or has besides."""

    sources: dict[str, TensorSource] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    misshapen: dict[str, str] = field(default_factory=dict)  # name -> what is wrong
    unused: set[str] = field(default_factory=set)
    latest: Latest = field(default_factory=Latest)


@dataclass
class _Collected:
    """The stored tensors of one transform, each with the pattern that chose it, in the order of collection."""

    transform: WeightConverter | None
    parts: list[tuple[str, Stored, torch.dtype]] = field(default_factory=list)


def map_parameters(model: PreTrainedModel, tensors: Mapping[str, Stored], *, dtype: torch.dtype) -> Mapped:
    """Finds the source of each parameter and persistent buffer of a model on the meta device.

    Args:
        tensors: the checkpoint's, by name. dtype: compute dtype; what the model keeps in float32 stays so.
    Raises:
        NotMapped: a transform needs the numbers themselves.
    """
    wanted = model.state_dict()
    out = Mapped()
    dtype_of = _dtypes(model, wanted, dtype)
    for target, collected in _collect(model, tensors, wanted, dtype_of, out).items():
        if collected.transform is None:
            _, stored, kind = collected.parts[0]
            _place(out, target, Pieces.of(stored, kind), wanted)
        else:
            for name, source in _transformed(model, target, collected, out).items():
                _place(out, name, source, wanted)
    out.missing = set(wanted) - set(out.sources) - set(out.misshapen)
    return out


def _collect(
    model: PreTrainedModel,
    tensors: Mapping[str, Stored],
    wanted: Mapping[str, Tensor],
    dtype_of: Mapping[str, torch.dtype],
    out: Mapped,
) -> dict[str, _Collected]:
    """First target name -> what is collected for it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, known = model.base_model_prefix, dict(wanted)
    collected: dict[str, _Collected] = {}
    for key in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if target not in wanted and key in wanted:  # should not have been renamed
            target, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if target not in wanted:
            out.unused.add(key)
            continue
        group = collected.setdefault(target, _Collected(None if pattern is None else by_pattern[pattern]))
        group.parts.append((pattern or key, tensors[key], dtype_of[target]))
    model._weight_conversions = [t for t in transforms if t.was_used()]  # as from_pretrained leaves it, for saving
    return collected


def _dtypes(model: PreTrainedModel, wanted: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """transformers' rule: the model's list of what stays float32, else the dtype its constructor gives."""
    plan = model._get_dtype_plan(dtype)
    out = {name: tensor.dtype for name, tensor in wanted.items()}
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        for name in wanted:
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                out[name] = plan[by_group[match.lastgroup]]
    return out


def _place(out: Mapped, name: str, source: TensorSource, wanted: Mapping[str, Tensor]) -> None:
    if name not in wanted:
        out.unused.add(name)
    elif source.shape != tuple(wanted[name].shape):
        out.misshapen[name] = f"{list(source.shape)} in the files, {list(wanted[name].shape)} in the model"
    else:
        out.sources[name] = source


def _transformed(model: PreTrainedModel, target: str, collected: _Collected, out: Mapped) -> dict[str, TensorSource]:
    """The targets of one converter: in pieces where it only reorders, else by transformers on whole tensors."""
    try:
        laid = _convert(model, target, collected, lambda s, d: Unread(Pieces.of(s, d)))
        return {name: tensor.pieces for name, tensor in laid.items()}
    except Exception:  # it computes, transposes, or asks for more than the order, and fails as it likes
        pass
    try:
        shapes = _convert(model, target, collected, lambda s, d: torch.empty(s.shape, dtype=d, device="meta"))
    except Exception as error:
        raise NotMapped(f"{target}: {error}") from error

    def read(stored: Stored, dtype: torch.dtype) -> Tensor:
        return Pieces.of(stored, dtype).read(0, stored.numel).view(stored.shape)

    conversion = Conversion(lambda: _convert(model, target, collected, read), out.latest)
    return {name: Converted(name, tuple(t.shape), t.dtype, conversion) for name, t in shapes.items()}


def _convert(model: PreTrainedModel, target: str, collected: _Collected, make: Any) -> dict[str, Any]:
    """Runs the transform on what `make` gives for each stored tensor and its dtype."""
    transform: Any = copy.deepcopy(collected.transform)
    for pattern, stored, dtype in collected.parts:
        transform.add_tensor(target, stored.name, pattern, make(stored, dtype))
    made = transform.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
