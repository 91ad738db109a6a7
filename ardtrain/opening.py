"""Opens a model's files without reading them: the model on the meta device, and where each of its numbers is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, initialization

from ardtrain.backbones import DTYPES, ModelSource, auto_class, load_config, load_model, set_padding, take_quantization
from ardtrain.fingerprint import INDEX, hub_weight_files
from ardtrain.loading import (
    NotMapped,
    Shards,
    TensorSource,
    Weights,
    check_finite,
    map_parameters,
    verify_files,
)
from ardtrain.loading.bitsandbytes import decoded
from ardtrain.loading.mapping import Mapped
from ardtrain.loading.verifying import SUMS
from ardtrain.observe import ReadingBar
from ardtrain.targets import head_linears

logger = logging.getLogger("ardtrain")


@dataclass(frozen=True)
class Opened:
    """A model whose parameters are on the meta device and where their numbers are; or, with weights None, all of it.

    decoded: the files are quantised, and read as if they were not.
    """

    model: PreTrainedModel
    weights: Weights | None
    shards: Shards | None = None
    decoded: bool = False


def open_model(
    source: ModelSource,
    *,
    compute_dtype: str,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    pad_token_id: int | None = None,
) -> Opened:
    """As `load_model`, but nothing is read yet except headers and what the files hold of buffers.

    Buffers are on the CPU, as transformers' own loading makes them. A classification head is left on the meta device
    as well: init_head must follow. What only transformers' own loader reads is loaded whole, and said.

    Raises:
        ValueError: files are missing, damaged or cut short; tensors of the base are missing or have other shapes.
    """
    try:
        model = _unread_model(source, DTYPES[compute_dtype], num_labels, label_names)
        reason = _needs_transformers(model)
        if not reason:
            return _opened(source, model, DTYPES[compute_dtype], pad_token_id)
    except NotMapped as error:
        reason = f"a transform of its checkpoint needs whole tensors ({error})"
    if take_quantization(source, load_config(source)):
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r} holds weights that bitsandbytes quantised, and {reason}; "
            "its loader would need that library: take the base in bf16 or fp32 and set quantization: int8 or nf4"
        )
    logger.warning("%s is loaded by transformers, whole on every process: %s", source.name_or_path, reason)
    arguments: dict[str, Any] = {"num_labels": num_labels, "label_names": label_names, "pad_token_id": pad_token_id}
    return Opened(load_model(source, compute_dtype=compute_dtype, **arguments), None)


def _needs_transformers(model: PreTrainedModel) -> str:
    """Why the model's files cannot be read directly, or ""."""
    if model.is_custom_code():
        return "its code is its own (trust_remote_code)"
    if getattr(model.config, "transformers_weights", None) is not None or type(model.config).extra_files:
        return "its config names weight files of its own"
    return ""


def _unread_model(
    source: ModelSource, dtype: torch.dtype, num_labels: int | None, label_names: Sequence[str] | None
) -> PreTrainedModel:
    """The model on the meta device as from_pretrained makes it before it reads (PreTrainedModel.get_init_context)."""
    config = load_config(source)
    take_quantization(source, config)
    auto = auto_class(config, num_labels)
    if num_labels is not None:
        names = [f"LABEL_{i}" for i in range(num_labels)] if label_names is None else list(label_names)
        assert len(names) == num_labels
        config.num_labels = num_labels
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    with torch.device("meta"), initialization.meta_device_safe_creation_ops(), initialization.no_tie_weights():
        model: PreTrainedModel = auto.from_config(
            config,
            dtype=dtype,
            attn_implementation=source.attn_implementation,
            trust_remote_code=source.trust_remote_code,
        )
    return model


def _opened(source: ModelSource, model: PreTrainedModel, dtype: torch.dtype, pad_token_id: int | None) -> Opened:
    shards = Shards(hub_weight_files(source.name_or_path, source.revision))
    try:
        tensors = decoded(shards.tensors)
        mapped = map_parameters(model, tensors, dtype=dtype)
        head = {
            f"{path}.{name}" for path, linear in head_linears(model).items() for name, _ in linear.named_parameters()
        }
        model.tie_weights(missing_keys=mapped.missing, recompute_mapping=False)
        _check_complete(source, model, mapped, head)
        _build_buffers(model, mapped.sources)
    except BaseException:
        shards.close()
        raise
    if pad_token_id is not None:
        set_padding(model, pad_token_id)
    if model.can_generate():  # the last of what from_pretrained does
        nothing: dict[str, Any] = dict.fromkeys(("cache_dir", "proxies", "token"))
        model.adjust_generation_fn(
            None, True, None, source.name_or_path, **nothing, **source.hub_arguments(), force_download=False,
            local_files_only=False, subfolder="",
        )  # fmt: skip
    model.requires_grad_(False)
    model.eval()
    model.config.name_or_path = source.name_or_path
    model.config.use_cache = False

    def close() -> None:
        mapped.latest.drop()
        shards.close()

    return Opened(model, Weights(mapped.sources, close=close), shards, len(tensors) < len(shards.tensors))


def _check_complete(source: ModelSource, model: PreTrainedModel, mapped: Mapped, head: set[str]) -> None:
    """Gives tied parameters one source under all their names; refuses what would stay without values."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    absent = []
    for same in names.values():
        found = [mapped.sources[name] for name in same if name in mapped.sources]
        mapped.sources.update((name, found[0]) for name in same if found)
        if not found and not head.intersection(same):
            absent.append(same[0])
    if absent:
        wrong = [f"{name} ({mapped.misshapen[name]})" for name in absent if name in mapped.misshapen]
        example = wrong[0] if wrong else absent[0]
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r} lacks {len(absent)} tensors of the base (or has them in other "
            f"shapes), e.g. {example}; they would stay frozen at random values, so choose a model that has them"
        )


def _build_buffers(model: PreTrainedModel, sources: Mapping[str, TensorSource]) -> None:
    """Puts the buffers on the CPU: those of the files with their values, the others by transformers' initialisation.

    Outside any of DeepSpeed's patches, which would round them. Parameters are marked, so that nothing is drawn.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner_name, _, key = name.rpartition(".")
        owner, stored = model.get_submodule(owner_name), sources.get(name)
        if stored is None:
            owner._buffers[key] = torch.empty_like(buffer, device="cpu")
        else:
            values = stored.read(0, buffer.numel()).view(buffer.shape)
            values._is_hf_initialized = True  # type: ignore[attr-defined]
            owner._buffers[key] = values
    model.initialize_weights()


def verify_base(
    source: ModelSource, *, compute_dtype: str, num_labels: int | None = None, pad_token_id: int | None = None
) -> str:
    """Reads all weight files: checksums, every tensor that the model needs, finite numbers; returns a line on it.

    Raises:
        ValueError: something is wrong; the text names it.
    """
    paths = hub_weight_files(source.name_or_path, source.revision)
    weights = [path for path in paths if path.name != INDEX]
    total = sum(path.stat().st_size for path in weights)
    with ReadingBar(2 * total, is_main=True) as bar:
        unknown = verify_files(weights, progress=bar.add)
        opened = open_model(source, compute_dtype=compute_dtype, num_labels=num_labels, pad_token_id=pad_token_id)
        if opened.weights is not None:
            check_finite(opened.weights.sources, progress=bar.add)
            opened.weights.close()
    finite = "numbers not looked at" if opened.weights is None else "all tensors there, all numbers finite"
    right = f"checksums of {len(weights) - len(unknown)} right"
    without = f", of {len(unknown)} unknown ({SUMS} beside them would tell)" if unknown else ""
    return f"weights: {len(weights)} files, {total / 2**30:.2f} GiB: {right}{without}; {finite}"
