"""What a model family is: its towers, linear layers and classification head; loads config, model and tokenizer.

All of it through transformers.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from ardtrain.adapters import linear_modules, make_sites, select_modules
from ardtrain.arena import ArenaLayout
from ardtrain.quantized import Format, Packing, quantize_modules, unshared
from ardtrain.ranks import Site, named_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

VISION_PREFIXES = ("vision_tower", "model.vision_tower", "vision_model")
IMAGE_MODELS = ("paligemma",)  # model types that see pictures
PROJECTOR_PREFIXES = ("multi_modal_projector", "model.multi_modal_projector")


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
            f"model_name_or_path={source.name_or_path!r} holds no model config ({_first_line(error)}); give a folder "
            "with config.json, or a hub id that this machine can reach"
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
                f"model_name_or_path={source.name_or_path!r} has no form for this task ({_first_line(error)}); choose "
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
            f"model_name_or_path={source.name_or_path!r}: weights could not be loaded ({_first_line(error)}); "
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
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer_name_or_path={name!r} holds no tokenizer ({_first_line(error)}); give the folder or hub id "
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
            f"model_name_or_path={source.name_or_path!r} holds no image processor ({_first_line(error)}); give a "
            "folder with preprocessor_config.json, or a hub id that this machine can reach"
        ) from error


def never_run(model: PreTrainedModel) -> list[str]:
    """Modules whose results the model does not use, topmost ones with linears in them.

    SigLIP's pooling head, which PaliGemma passes by; where a model has towers for more than text but rows hold text
    alone (Gemma-3 from 4B on), all that stands beside its decoder.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if model.config.model_type in IMAGE_MODELS:
        heads = [n for n, _ in model.named_modules() if n.endswith(("vision_tower.head", "vision_model.head"))]
        return [head for head in heads if any(name.startswith(f"{head}.") for name in linears)]
    if model.config.get_text_config() is model.config:
        return []
    decoder = model.get_decoder()
    (inside,) = [name for name, module in model.named_modules() if module is decoder]
    around, _, _ = inside.rpartition(".")
    beside = [f"{around}.{n}" if around else n for n, _ in model.get_submodule(around).named_children()]
    return [n for n in beside if n != inside and any(f"{name}.".startswith(f"{n}.") for name in linears)]


def stacked_experts(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape [E, O, I] of experts whose weights are one parameter and no linears; no adapter sits there."""
    return {
        f"{path}.{name}": tuple(parameter.shape)
        for path, module in model.named_modules()
        if path.endswith("experts")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def without_adapter(model: PreTrainedModel) -> list[str]:
    """What `all-linear` leaves out and a user may not expect, a line each; nothing for most models."""
    notes = [
        f"no adapter on {module}: the model's forward does not use it for such rows" for module in never_run(model)
    ]
    experts = stacked_experts(model)
    if experts:
        name, shape = next(iter(experts.items()))
        numbers = sum(math.prod(s) for s in experts.values())
        notes.append(
            f"no adapter on the experts: their weights are stacked ({name} {list(shape)}) and no linear layers; "
            f"{numbers:,} numbers stay as they are"
        )
    return notes


def find_sites(
    model: PreTrainedModel,
    *,
    target_modules: str | Sequence[str],
    exclude_modules: Any,
    r: int,
    lora_alpha: float,
    tower_settings: dict[str, tuple[int, float]],
    frozen_towers: Sequence[str] = (),
    own_modules: Mapping[str, tuple[Any, Any]] | None = None,
) -> tuple[list[Site], list[int]]:
    """Sites of the model and their first ranks, in base order; works on the meta device.

    frozen_towers: get no adapter. own_modules: tower -> its own (target_modules, exclude_modules), None for the run's.

    The output embedding is never a target (PEFT's rule for `all-linear`), nor is a classification head: it is trained
    in full. PEFT leaves out `score` and `classifier` alone; DeBERTa's `pooler.dense` is a target there.

    Raises:
        ValueError: a target matches nothing (or stacked experts alone), a rank exceeds a module, or `targets` names a
            tower the model lacks.
    """
    linears = base_linears(model)
    try:
        modules = _tower_modules(linears, target_modules, exclude_modules, own_modules or {})
    except ValueError as error:
        experts = next(iter(stacked_experts(model)), None)
        if experts is None:
            raise
        raise ValueError(
            f"{error}. Experts' weights are stacked in this model ({experts}) and take no adapter"
        ) from error
    towers = {name: tower_of(name) for name in modules}
    unknown = sorted({*tower_settings, *frozen_towers} - set(towers.values()))
    if unknown:
        raise ValueError(
            f"targets.{unknown[0]} names a tower that has no targeted module; this model's towers are "
            f"{', '.join(sorted(set(towers.values())))}"
        )
    modules = [name for name in modules if towers[name] not in frozen_towers]
    if not modules:
        raise ValueError("targets freezes every tower that target_modules reaches; leave one to train")
    return make_sites(linears, modules, r=r, lora_alpha=lora_alpha, tower_of=towers, tower_settings=tower_settings)


def _tower_modules(
    linears: Mapping[str, nn.Linear], target: Any, exclude: Any, own: Mapping[str, tuple[Any, Any]]
) -> list[str]:
    """The targeted paths in base order; a tower in `own` is asked by its own settings, where it has some."""
    every = select_modules(linears, target_modules=target)
    chosen = set(select_modules(linears, target_modules=target, exclude_modules=exclude)) if exclude else set(every)
    for tower, (own_target, own_exclude) in own.items():
        inside = {name: linear for name, linear in linears.items() if tower_of(name) == tower}
        wanted = own_target if own_target is not None else [name for name in every if name in inside]
        if not inside or not wanted or (own_target is None and own_exclude is None):
            continue  # the run's settings hold, or the caller names the tower
        excluded = own_exclude if own_exclude is not None else exclude
        try:
            kept = select_modules(inside, target_modules=wanted, exclude_modules=excluded)
        except ValueError as error:
            raise ValueError(f"targets.{tower}: {error}") from error
        chosen = (chosen - inside.keys()) | set(kept)
    return [name for name in linears if name in chosen]


def base_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Path -> linear of the base, in `named_modules()` order: all but the output embedding, a classification head and
    what never runs.

    These are what adapters may sit on and, when the base is quantised, what is quantised.
    """
    output = model.get_output_embeddings()
    skip = [name for name, module in model.named_modules() if output is not None and module is output]
    return linear_modules(model, skip=[*skip, *head_linears(model), *never_run(model)])


def tower_modules(model: PreTrainedModel, tower: str) -> dict[str, nn.Module]:
    """Path -> module with parameters of its own, of a tower that is trained in full; what never runs is left out.

    Raises:
        ValueError: the model has no such tower, it holds the embedding of the tokens, or a tensor that cannot be
            replaced: of a module that has modules of its own or state beside its parameters, or of two modules.
    """
    skip = tuple(f"{name}." for name in never_run(model))
    inside = {
        name: module
        for name, module in model.named_modules()
        if tower_of(name) == tower and not f"{name}.".startswith(skip) and list(module.parameters(recurse=False))
    }
    reason = "" if inside else "the model has no such tower"
    size = sum(p.numel() for module in inside.values() for p in module.parameters(recurse=False))
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in inside.items():
        own = dict(module.named_parameters(recurse=False))
        if module is model.get_input_embeddings():
            reason = (
                f"the tower holds the embedding of all tokens, {name}, and its {size:,} numbers would be "
                f"{16 * size / 2**30:.3g} GiB of masters, moments and gradient on every process"
            )
        elif list(module.children()):
            reason = f"{name}.{next(iter(own))} is a tensor of a module that holds others ({type(module).__name__})"
        elif list(module.buffers(recurse=False)):
            reason = f"{name} has state beside its parameters ({type(module).__name__})"
        elif shared := [part for part, p in own.items() if owners[id(p)] > 1]:
            reason = f"{name}.{shared[0]} is another module's tensor as well"
        if reason:
            break
    if reason:
        raise ValueError(f"targets.{tower}.full=true: {reason}; use an adapter there, with a larger r if need be")
    return inside


def quantize_base(model: PreTrainedModel, format: Format, *, carried: bool = False) -> dict[str, Packing]:
    """Quantises the base's linears in place, adapted or not. Embeddings, norms, convolutions, biases, and weights that
    are no linear's (the stacked experts of some mixtures) or another module's as well stay as they are.

    Args, returns, raises: as quantized.quantize_modules.
    """
    return quantize_modules(model, unshared(model, list(base_linears(model))), format, carried=carried)


def head_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Path -> linear of a classification head: the linears outside the base, in `named_modules()` order.

    `score` for Llama, `classifier` for BERT, `classifier.dense` and `.out_proj` for RoBERTa, `pooler.dense` and
    `classifier` for DeBERTa; BERT's own pooler is part of its base. Empty for a model with an output embedding (a
    language model) and for a bare base.
    """
    if model.get_output_embeddings() is not None or model.base_model is model:
        return {}
    inside = model.base_model_prefix
    return linear_modules(model, skip=[inside])


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


def tower_of(module: str) -> str:
    """vision, projector or language, by the module's path."""
    if module.startswith(VISION_PREFIXES):
        return "vision"
    if module.startswith(PROJECTOR_PREFIXES):
        return "projector"
    return "language"


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
