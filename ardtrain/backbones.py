"""What a model family is: its towers and linear layers; loads config, model and tokenizer through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ardtrain.adapters import linear_modules, make_sites, select_modules
from ardtrain.ranks import Site

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

VISION_PREFIXES = ("vision_tower", "model.vision_tower", "vision_model")
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


def meta_model(source: ModelSource) -> PreTrainedModel:
    """The model without weights (meta device): shapes and names, for checks before anything is loaded."""
    config = load_config(source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)


def load_model(source: ModelSource, *, compute_dtype: str) -> PreTrainedModel:
    """The whole model on the CPU, frozen, parameters in the compute dtype, buffers as its constructor makes them."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.name_or_path,
            dtype=DTYPES[compute_dtype],
            attn_implementation=source.attn_implementation,
            use_safetensors=True,
            **source.hub_arguments(),
        )
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={source.name_or_path!r}: weights could not be loaded ({_first_line(error)}); "
            "safetensors files are needed"
        ) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


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


def find_sites(
    model: PreTrainedModel,
    *,
    target_modules: str | Sequence[str],
    exclude_modules: Any,
    r: int,
    lora_alpha: float,
    tower_settings: dict[str, tuple[int, float]],
) -> tuple[list[Site], list[int]]:
    """Sites of the model and their first ranks, in base order; works on the meta device.

    The output embedding is never a target of `all-linear` (PEFT's rule).

    Raises:
        ValueError: a target matches nothing, a rank exceeds a module, or `targets` names a tower the model lacks.
    """
    output = model.get_output_embeddings()
    skip = [name for name, module in model.named_modules() if output is not None and module is output]
    linears = linear_modules(model, skip=skip)
    modules = select_modules(linears, target_modules=target_modules, exclude_modules=exclude_modules)
    towers = {name: tower_of(name) for name in modules}
    unknown = sorted(set(tower_settings) - set(towers.values()))
    if unknown:
        raise ValueError(
            f"targets.{unknown[0]} names a tower that has no targeted module; this model's towers are "
            f"{', '.join(sorted(set(towers.values())))}"
        )
    return make_sites(linears, modules, r=r, lora_alpha=lora_alpha, tower_of=towers, tower_settings=tower_settings)


def tower_of(module: str) -> str:
    """vision, projector or language, by the module's path."""
    if module.startswith(VISION_PREFIXES):
        return "vision"
    if module.startswith(PROJECTOR_PREFIXES):
        return "projector"
    return "language"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
