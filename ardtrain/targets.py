"""Which modules of a model get an adapter, or are trained in full: by tower, target_modules and exclude_modules."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ardtrain.patterns import NO_PATTERN, by_pattern, refuse_unused
from ardtrain.ranks import Site

VISION_PREFIXES = ("vision_tower", "model.vision_tower", "vision_model")
PROJECTOR_PREFIXES = ("multi_modal_projector", "model.multi_modal_projector")
IMAGE_MODELS = ("paligemma",)  # model types that see pictures


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
    rank_pattern: Mapping[str, int] = NO_PATTERN,
    alpha_pattern: Mapping[str, float] = NO_PATTERN,
) -> tuple[list[Site], list[int]]:
    """Sites of the model and their first ranks, in base order; works on the meta device.

    frozen_towers: get no adapter. own_modules: tower -> its own (target_modules, exclude_modules), None for the run's.
    rank_pattern, alpha_pattern: as `make_sites` takes them.

    The output embedding is never a target (PEFT's rule for `all-linear`), nor is a classification head: it is trained
    in full. PEFT leaves out `score` and `classifier` alone; DeBERTa's `pooler.dense` is a target there.

    Raises:
        ValueError: a target matches nothing (or stacked experts alone), a rank exceeds a module, or `targets` names a
            tower the model lacks; a pattern's key names no adapted module.
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
    refuse_unused(rank_pattern, modules, setting="rank_pattern")
    refuse_unused(alpha_pattern, modules, setting="alpha_pattern")
    return make_sites(
        linears,
        modules,
        r=r,
        lora_alpha=lora_alpha,
        tower_of=towers,
        tower_settings=tower_settings,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


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


def select_modules(
    linears: Mapping[str, nn.Linear], *, target_modules: str | Sequence[str], exclude_modules: Any = None
) -> list[str]:
    """The targeted paths, in base order, by PEFT's rules.

    target_modules: "all-linear"; another string is a regular expression for the whole path; a list holds suffixes.

    Raises:
        ValueError: an entry matches nothing; the message names the nearest module.
    """
    names = list(linears)
    if isinstance(target_modules, str):
        if target_modules == "all-linear":
            chosen = names
        else:
            chosen = [n for n in names if re.fullmatch(target_modules, n)]
            _refuse_empty(target_modules, chosen, names)
    else:
        wanted = list(target_modules)
        for entry in wanted:
            _refuse_empty(entry, [n for n in names if _ends_with(n, entry)], names)
        chosen = [n for n in names if any(_ends_with(n, e) for e in wanted)]
    excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or [])
    kept = [n for n in chosen if not any(_ends_with(n, e) or re.fullmatch(e, n) for e in excluded)]
    if not kept:
        raise ValueError(
            f"exclude_modules={exclude_modules!r} removes every module that target_modules={target_modules!r} names; "
            "exclude fewer"
        )
    return kept


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _refuse_empty(entry: str, matches: Sequence[str], names: Sequence[str]) -> None:
    if matches:
        return
    leaves = sorted({n.rpartition(".")[2] for n in names})
    near = difflib.get_close_matches(entry.rpartition(".")[2], leaves, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"target_modules={entry!r} matches no linear layer of the model; {hint}the model has {', '.join(leaves)}; "
        "or use all-linear"
    )


def make_sites(
    linears: Mapping[str, nn.Linear],
    modules: Sequence[str],
    *,
    r: int,
    lora_alpha: float,
    tower_of: Mapping[str, str],
    tower_settings: Mapping[str, tuple[int, float]],
    rank_pattern: Mapping[str, int] = NO_PATTERN,
    alpha_pattern: Mapping[str, float] = NO_PATTERN,
) -> tuple[list[Site], list[int]]:
    """One matrix site per module and its first rank.

    A site's scale is its alpha over its own rank, as in PEFT: a rank alone leaves alpha as it is.

    Args:
        tower_settings: tower -> (r, lora_alpha) where they differ from the run's. rank_pattern, alpha_pattern: PEFT's,
            which go over both.

    Raises:
        ValueError: r exceeds min(in, out) of a module.
    """
    sites, ranks = [], []
    for name in modules:
        linear, tower = linears[name], tower_of[name]
        tower_r, tower_alpha = tower_settings.get(tower, (r, lora_alpha))
        site_r, alpha = by_pattern(rank_pattern, name, tower_r), by_pattern(alpha_pattern, name, tower_alpha)
        largest = min(linear.in_features, linear.out_features)
        if site_r > largest:
            raise ValueError(
                f"r={site_r} exceeds {name} ({linear.in_features} inputs, {linear.out_features} outputs; rank at most "
                f"{largest}); lower r or drop {name.rpartition('.')[2]} from target_modules, or give it a rank of its "
                "own in rank_pattern"
            )
        sites.append(Site(name, name, linear.in_features, linear.out_features, scaling=alpha / site_r, tower=tower))
        ranks.append(site_r)
    return sites, ranks


def base_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Path -> linear of the base, in `named_modules()` order: all but the output embedding, a classification head and
    what never runs.

    These are what adapters may sit on and, when the base is quantised, what is quantised.
    """
    output = model.get_output_embeddings()
    skip = [name for name, module in model.named_modules() if output is not None and module is output]
    return linear_modules(model, skip=[*skip, *head_linears(model), *never_run(model)])


def linear_modules(model: nn.Module, *, skip: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Path -> linear for every linear layer an adapter may sit on, in `named_modules()` order.

    skip: module paths to leave out (the output embedding; modules that never run).
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == s or name.startswith(s + ".") for s in skip)
    }


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


def tower_of(module: str) -> str:
    """vision, projector or language, by the module's path."""
    if module.startswith(VISION_PREFIXES):
        return "vision"
    if module.startswith(PROJECTOR_PREFIXES):
        return "projector"
    return "language"
