"""The base through transformers: config, model, tokenizer, image processor; its classification head, its checkpointing.

Which of its modules get an adapter: targets.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ardtrain.arena import ArenaLayout
from ardtrain.quantized import Format, Packing, quantize_modules, unshared
from ardtrain.ranks import named_seed
from ardtrain.reasons import first_line, no_source
from ardtrain.targets import IMAGE_MODELS, base_linears, head_linears, tower_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, by transformers' names. Weights are safetensors only: nothing is unpickled."""

    name_or_path: str
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    def hub_arguments(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_config(source: ModelSource) -> Any:
    """transformers' config of the model.

    Raises:
        ValueError: the path or hub id has none.
    """
    try:
        return AutoConfig.from_pretrained(source.name_or_path, **source.hub_arguments())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r} holds no model config "
            f"({no_source(source.name_or_path, error)}); give a folder with config.json, or a hub id that this machine "
            "can reach"
        ) from error


def meta_model(source: ModelSource, *, num_labels: int | None = None) -> PreTrainedModel:
    """The model without weights (meta device): shapes and names, for checks before anything is loaded.

    num_labels: classes of a sequence classifier; None: a language model, with its towers if it sees pictures.
    """
    config = load_config(source)
    take_quantization(source, config)
    auto = auto_class(config, num_labels)
    if num_labels is not None:
        config.num_labels = num_labels
    with torch.device("meta"):
        try:
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=source.trust_remote_code)
        except ValueError as error:
            raise ValueError(
                f"model_name_or_path={source.name_or_path!r} has no form for this task ({first_line(error)}); choose "
                "another model or task"
            ) from error
    return model


def take_quantization(source: ModelSource, config: Any) -> bool:
    """Are the model's files quantised already? Takes the note of it from the config: loading decodes them.

    Raises:
        ValueError: by another method than bitsandbytes.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method != "bitsandbytes":
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r} holds weights that are quantised already ({method}), "
            "which are not read; take the base in bf16 or fp32 and set quantization: int8 or nf4"
        )
    del config.quantization_config
    return True


def auto_class(config: Any, num_labels: int | None) -> Any:
    """transformers' class that makes the model. num_labels: see meta_model."""
    if num_labels is not None:
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if config.model_type in IMAGE_MODELS else AutoModelForCausalLM


def load_model(
    source: ModelSource,
    *,
    compute_dtype: str,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The whole model on the CPU, frozen, parameters in the compute dtype, buffers as its constructor makes them.

    Args:
        num_labels: classes of a sequence classifier; None: a language model. Its head's values are whatever
            transformers drew: init_head must follow.
        label_names: of the classes, for the config; pad_token_id: what the rows are padded with (data's own), which
            decoders look for (data_labels.classification_pad_id). A classifier needs it.
    Raises:
        ValueError: weights cannot be loaded, or the base lacks some; the padding does not fit the model.
    """
    arguments: dict[str, Any] = {
        "dtype": DTYPES[compute_dtype],
        "attn_implementation": source.attn_implementation,
        "use_safetensors": True,
        **source.hub_arguments(),
    }
    try:
        if num_labels is None:
            model = auto_class(load_config(source), None).from_pretrained(source.name_or_path, **arguments)
        else:
            model = _load_classifier(source, arguments, num_labels, label_names)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r}: weights could not be loaded ({first_line(error)}); "
            "safetensors files are needed"
        ) from error
    if num_labels is not None:
        assert pad_token_id is not None, "a classifier must know what its rows are padded with"
        set_padding(model, pad_token_id)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _load_classifier(
    source: ModelSource, arguments: dict[str, Any], num_labels: int, label_names: Sequence[str] | None
) -> PreTrainedModel:
    """A classifier whose base is complete; a head in the files is not counted on, whatever its shape."""
    names = [f"LABEL_{i}" for i in range(num_labels)] if label_names is None else list(label_names)
    assert len(names) == num_labels
    with _quiet_loading():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.name_or_path,
            num_labels=num_labels,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            ignore_mismatched_sizes=True,  # a head for other classes
            output_loading_info=True,
            **arguments,
        )
    head = {f"{path}.{name}" for path, linear in head_linears(model).items() for name, _ in linear.named_parameters()}
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - head)
    if absent:
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r} lacks {len(absent)} tensors of the base (or has them in other "
            f"shapes), e.g. {absent[0]}; they would stay frozen at random values, so choose a model that has them"
        )
    return model


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Holds back transformers' report of keys not found: the head's are meant, others are refused above."""

    def no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(no_report)
    try:
        yield
    finally:
        logger.removeFilter(no_report)


def set_padding(model: PreTrainedModel, pad_token_id: int) -> None:
    """Tells a classifier what pads its rows.

    Raises:
        ValueError: the model has no such token, or has its positions counted from another padding (RoBERTa).
    """
    num_tokens = model.get_input_embeddings().num_embeddings
    if not 0 <= pad_token_id < num_tokens:
        raise ValueError(
            f"the tokenizer pads with token {pad_token_id}, but the model has {num_tokens} tokens; use the model's own "
            "tokenizer"
        )
    for name, module in model.named_modules():
        # RoBERTa's kind keeps the id beside its position embeddings and starts counting behind it.
        counted = getattr(module, "padding_idx", None) if hasattr(module, "position_embeddings") else None
        if counted is not None and counted != pad_token_id:
            raise ValueError(
                f"the tokenizer pads with token {pad_token_id}, but the model counts positions ({name}) from padding "
                f"{counted}; use the model's own tokenizer"
            )
    model.config.get_text_config().pad_token_id = pad_token_id


def enable_checkpointing(model: PreTrainedModel, *, offload: bool, device: torch.device) -> None:
    """Keeps of each decoder layer its input alone, and computes the rest again in backward.

    Non-reentrant: the adapters' views are no arguments of the checkpointed function.

    Args:
        offload: the inputs wait for backward in host memory, pinned where `device` is a GPU; no bit changes.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    if not offload:
        return
    # transformers' own offload pins in any case, which fails on a machine without an accelerator.
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = partial(_on_host, checkpoint, pinned=device.type != "cpu")


def gathered_whole(model: nn.Module) -> list[nn.Module]:
    """The modules that ZeRO-3 gathers and releases as one: decoder layers, and what else transformers never splits.

    Under activation checkpointing those that checkpoint within their `forward` alone: one pair of ZeRO-3's hooks stands
    around both runs of it, and the weights are gathered once for the second run and the backward. A layer that its
    model checkpoints from outside would run its hooks again, and they release the weights before the backward.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return [module for module in found if isinstance(module, GradientCheckpointingLayer)]
    return found


def _on_host(checkpoint: Callable[..., Any], *args: Any, pinned: bool, **kwargs: Any) -> Any:
    """A checkpointed function's run; the hooks see what it keeps, its arguments, and nothing from inside it."""
    with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
        return checkpoint(*args, **kwargs)


def load_tokenizer(source: ModelSource, tokenizer_name_or_path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or another one."""
    name = tokenizer_name_or_path or source.name_or_path
    try:
        return AutoTokenizer.from_pretrained(name, **source.hub_arguments())
    except (OSError, TypeError, ValueError) as error:  # TypeError: a JSON file that holds no object
        raise ValueError(
            f"tokenizer_name_or_path={name!r} holds no tokenizer ({no_source(name, error)}); give the folder or hub id "
            "that has tokenizer.json or tokenizer.model"
        ) from error


def load_image_processor(source: ModelSource) -> Any:
    """The model's own image processor, on Pillow whatever else is installed: the same pixels everywhere.

    Raises:
        ValueError: the path or hub id has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(source.name_or_path, backend="pil", **source.hub_arguments())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r} holds no image processor "
            f"({no_source(source.name_or_path, error)}); give a folder with preprocessor_config.json, or a hub id that "
            "this machine can reach"
        ) from error


def quantize_base(model: PreTrainedModel, format: Format, *, carried: bool = False) -> dict[str, Packing]:
    """Quantises the base's linears in place, adapted or not. Embeddings, norms, convolutions, biases, and weights that
    are no linear's (the stacked experts of some mixtures) or another module's as well stay as they are.

    Args, returns, raises: as quantized.quantize_modules.
    """
    return quantize_modules(model, unshared(model, list(base_linears(model))), format, carried=carried)


def head_values(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Parameter name -> first value (float32, CPU) of each number of the classification head.

    Weights are normal(0, config.initializer_range) from a generator named by (run seed, path), biases 0, as
    transformers has it for these families: alike on every process. A function of shapes: a meta model will do.
    """
    std = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    out: dict[str, Tensor] = {}
    for path, linear in head_linears(model).items():
        generator = torch.Generator().manual_seed(named_seed(seed, "head", path))
        shape = (linear.out_features, linear.in_features)
        out[f"{path}.weight"] = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        if linear.bias is not None:
            out[f"{path}.bias"] = torch.zeros(linear.out_features)
    return out


def init_head(model: PreTrainedModel, seed: int) -> None:
    """Overwrites the classification head's weights by head_values, in its dtype; a head from the files is lost."""
    for name, value in head_values(model, seed).items():
        owner_name, _, key = name.rpartition(".")
        owner, old = model.get_submodule(owner_name), model.get_parameter(name)
        # Anew, since one on the meta device holds no values.
        setattr(owner, key, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def tower_config(model: PreTrainedModel, tower: str) -> Any:
    """transformers' config of one tower: its head counts."""
    config = model.config
    return config.vision_config if tower == "vision" else config.get_text_config()


def tower_text(layout: ArenaLayout) -> str:
    """What each tower has, such as "vision rank 36 and 3,456 numbers, language rank 112 and ..."; "" for one alone."""
    ranks, numbers = layout.table.by_tower(), dict[str, int]()
    for block in layout.all_blocks:
        tower = tower_of(block.module)
        numbers[tower] = numbers.get(tower, 0) + block.rows * block.columns
    towers = dict.fromkeys([*ranks, *numbers])
    each = [
        f"{tower} " + (f"rank {ranks[tower]} and " if tower in ranks else "") + f"{numbers.get(tower, 0):,} numbers"
        for tower in towers
    ]
    return ", ".join(each) if len(each) > 1 else ""
