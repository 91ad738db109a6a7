"""What a config means for this model and this data, checked before any weight is loaded. Used by validate and train."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ardtrain.adapters import Form
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import load_config as load_model_config
from ardtrain.backbones import meta_model, tower_config, tower_text
from ardtrain.collectives import idle_share
from ardtrain.config import (
    AloraBlock,
    ArdLoraBlock,
    ConfigError,
    RunConfig,
    adapter_settings,
    alora_steps,
    ard_lora_warmups,
    load_config,
    num_warmup_steps,
    updated,
    with_batch,
)
from ardtrain.data import TrainData
from ardtrain.deepspeed_config import DeepSpeedPlan, split_deepspeed, take_over
from ardtrain.dense import dense_entries
from ardtrain.gather_sizes import WeightSizes
from ardtrain.heads import Heads, find_heads, refuse_fused, split_heads
from ardtrain.importing import place, place_ranks, read_adapter, read_ranks
from ardtrain.methods import build
from ardtrain.methods.alora import num_matrix_types
from ardtrain.methods.base import Method
from ardtrain.ranks import Dense, RankTable, Site
from ardtrain.run_data import model_source, read_labels, tokenizer_of
from ardtrain.targets import IMAGE_MODELS, find_sites, head_linears, linear_modules, tower_modules, without_adapter
from ardtrain.token_rows import find_tokens, refuse_whole_embeddings, token_entry

MOVES_RANKS = ("elalora", "adalora", "alora", "ard_lora", "probe_lora")
UNKNOWN_STEPS = 1 << 40  # longer than any schedule


@dataclass(frozen=True)
class Shape:
    """The run as far as shapes say: sites and first ranks, counts of numbers, a fingerprint of the base."""

    table: RankTable
    num_trained: int
    num_base: int
    backbone_fingerprint: str
    heads: Mapping[str, Heads] = field(default_factory=dict)  # of ARD-LoRA
    dense: tuple[Dense, ...] = ()
    labels: tuple[str, ...] = ()  # of a classification run
    tokens: tuple[int, ...] = ()  # whose rows of the embedding are trained
    rows: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # of init_from: site -> part -> [r, columns]
    sizes: WeightSizes | None = None  # of the weights that ZeRO-3 shards
    notes: tuple[str, ...] = ()  # what gets no adapter
    by_tower: str = ""  # total rank and trained numbers, where there are several towers


def check_model(config: RunConfig) -> Shape:
    """Finds the sites on the meta device.

    Raises:
        ConfigError: a target matches nothing, a rank exceeds a module or a head, an unknown tower, labels that do not
            fit.
    """
    labels = read_labels(config)
    try:
        _check_task(config)
        model = meta_model(model_source(config), num_labels=len(labels) or None)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return shape_of(config, model, labels)


def shape_of(config: RunConfig, model: PreTrainedModel, labels: tuple[str, ...]) -> Shape:
    """`check_model` of a model that is there, on the meta device."""
    try:
        whole = in_full(config, model)
        refuse_whole_embeddings(model, modules_to_save=config.modules_to_save, target_modules=config.target_modules)
        tokens = _trained_tokens(config, model)
        trained = (*dense_entries(whole), *token_entry(model, tokens))
        sites, ranks, heads = _sites(config, model)
        rows: dict[str, dict[str, Tensor]] = {}
        if config.ranks_from is not None:
            ranks = place_ranks(read_ranks(config.ranks_from), sites, source=config.ranks_from)
        if config.init_from is not None:
            diagonal = config.method in ("elalora", "adalora")
            adapter = read_adapter(config.init_from)
            sites, ranks, rows = place(adapter, sites, source=config.init_from, diagonal=diagonal)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters()]
    text = json.dumps([type(model).__name__, shapes, list(linear_modules(model))])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    num_base = sum(p.numel() for p in model.parameters())
    table = RankTable.start(sites, ranks)
    sizes = weight_sizes(model)
    if config.method == "full":
        return Shape(RankTable.start((), ()), num_base, num_base, fingerprint, labels=labels, sizes=sizes)
    shape = Shape(table, 0, num_base, fingerprint, heads, trained, labels, tokens, rows, sizes)
    _check_shortlist(config, table)
    _check_probes(config, table)
    method = make_method(config, shape, total_steps=UNKNOWN_STEPS)  # for shapes alone
    dense = (*method.dense(sites), *shape.dense)
    layout = ArenaLayout(table, method.entries, dense)
    notes, by_tower = tuple(without_adapter(model)), tower_text(layout)
    return replace(shape, num_trained=layout.num_trained, dense=dense, notes=notes, by_tower=by_tower)


def in_full(config: RunConfig, model: PreTrainedModel) -> dict[str, nn.Module]:
    """Path -> module of what is trained in full beside adapters: a classification head, towers that are set so.

    Raises:
        ValueError: as targets.tower_modules.
    """
    out: dict[str, nn.Module] = {}
    if config.task == "sequence_classification":
        out |= head_linears(model)
    for tower, own in config.targets.items():
        out |= tower_modules(model, tower) if own.full else {}
    return out


def _check_task(config: RunConfig) -> None:
    """A model that sees pictures and the task with pictures belong together."""
    kind, images = load_model_config(model_source(config)).model_type, config.task == "image_text_to_text"
    if images != (kind in IMAGE_MODELS):
        raise ValueError(
            f"task={config.task} does not fit a model of type {kind!r}; "
            + (f"use one of {', '.join(IMAGE_MODELS)}" if images else "set task=image_text_to_text")
        )


def weight_sizes(model: PreTrainedModel) -> WeightSizes:
    """Of the model's weights; its largest repeated layer stands for all."""
    weights = list(model.parameters())
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if type(m).__name__ in names] or [model]
    largest = max(layers, key=lambda layer: sum(p.numel() for p in layer.parameters()))
    return WeightSizes(
        max((p.numel() for p in weights), default=0),
        max((p.numel() for p in weights if p.dim() == 1), default=0),
        sum(p.numel() for p in largest.parameters()),
        len(list(largest.parameters())),
    )


def _sites(config: RunConfig, model: PreTrainedModel) -> tuple[list[Site], list[int], dict[str, Heads]]:
    """Sites, first ranks and, where a head is a site or has a gate, the matrices that are cut by head."""
    frozen = [tower for tower, own in config.targets.items() if own.frozen or own.full]
    towers = {tower: adapter_settings(config, tower) for tower in config.targets if tower not in frozen}
    sites, ranks = find_sites(
        model,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        r=config.r,
        lora_alpha=config.lora_alpha,
        tower_settings={tower: (s.r, s.lora_alpha) for tower, s in towers.items()},
        frozen_towers=frozen,
        own_modules={t: (own.target_modules, own.exclude_modules) for t, own in config.targets.items()},
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
    )
    if config.use_rslora:
        sites = [replace(s, scaling=s.scaling * math.sqrt(r)) for s, r in zip(sites, ranks, strict=True)]
    form = adapter_form(config)
    if form not in ("own_a", "shared_a"):
        return sites, ranks, {}
    configs = {site.tower: tower_config(model, site.tower) for site in sites}
    ard = config.ard_lora or ArdLoraBlock()
    heads = find_heads(sites, configs, mlp_heads=ard.mlp_heads, chosen=ard.head_modules)
    if ard.tie == "head":
        refuse_fused(heads)
    if form == "own_a":
        sites, ranks = split_heads(sites, ranks, heads)
    return sites, ranks, heads


def _trained_tokens(config: RunConfig, model: PreTrainedModel) -> tuple[int, ...]:
    """Ids of the tokens whose rows are trained, ascending; the tokenizer is loaded for names alone."""
    wanted = config.trainable_tokens or ()
    tokenizer = tokenizer_of(config) if any(isinstance(token, str) for token in wanted) else None
    return find_tokens(wanted, tokenizer, num_rows=model.get_input_embeddings().num_embeddings) if wanted else ()


def _check_shortlist(config: RunConfig, table: RankTable) -> None:
    """What ALoRA prunes must be scored exactly."""
    block = config.alora
    if config.method != "alora" or block is None or block.shortlist is None:
        return
    pruned = block.n_a or num_matrix_types(table)
    exact = int(block.shortlist * table.total)
    if exact < pruned:
        raise ConfigError(
            [
                f"alora.shortlist={block.shortlist:g} scores {exact} of {table.total} components exactly and a round "
                f"prunes {pruned}; raise alora.shortlist or lower alora.n_a"
            ]
        )


def _check_probes(config: RunConfig, table: RankTable) -> None:
    """Raises ConfigError: a site has fewer rows than it is to have probes, target_r is too high, or nothing moves."""
    if config.method != "probe_lora" or config.probe_lora is None:
        return
    count = config.probe_lora.probe_components
    smallest = min(table.sites, key=lambda site: site.max_rank)
    if count > smallest.max_rank:
        raise ConfigError(
            [
                f"probe_lora.probe_components={count} exceeds the largest rank of {smallest.name}, "
                f"{smallest.max_rank}; lower it, or leave that module out with exclude_modules"
            ]
        )
    block = config.probe_lora
    if block.target_r is None:
        return
    aim, most = block.target_r * len(table.sites), sum(site.max_rank for site in table.sites)
    if aim > most:
        raise ConfigError(
            [
                f"probe_lora.target_r={block.target_r:g} asks for {aim:g} components and the {len(table.sites)} sites "
                f"have room for {most}; lower it"
            ]
        )
    if block.b == 0 and round(aim) == table.total:
        raise ConfigError(
            [
                f"probe_lora.b=0 moves no component and target_r={block.target_r:g} is where the ranks start; raise b, "
                "or set target_r or r to another value"
            ]
        )


def make_method(config: RunConfig, shape: Shape, *, total_steps: int, steps_per_epoch: float = 1.0) -> Method:
    """The config's method with its own block's settings."""
    block = getattr(config, config.method, None)
    settings: dict[str, Any] = block.model_dump() if block is not None else {}
    shared: dict[str, tuple[int, str]] = {}
    if config.method == "probe_lora":
        del settings["level"]
    if config.method == "elalora" and settings.pop("compat") == "reference":
        settings |= {"allow_swap": True, "newborn_immunity": False, "newborn_norm": "unit"}  # methods.md 2.3, 2.4
    if config.method == "alora":
        alora = config.alora or AloraBlock()
        k1, k2 = alora_steps(alora, steps_per_epoch)
        settings = {"k1": k1, "k2": k2} | {
            name: getattr(alora, name) for name in ("n_a", "rounds", "prune_only_harmful", "revive")
        }
    elif config.method == "ard_lora":
        ard = config.ard_lora or ArdLoraBlock()
        settings = ard.model_dump()
        for name in ("layout", "head_modules", "mlp_heads", "budget"):
            del settings[name]
        settings["init_warmup"], settings["final_warmup"] = ard_lora_warmups(ard, total_steps)
        start = shape.table.total / max(1, len(shape.table.sites))  # towers may start with other ranks than r
        settings["target_r"] = (ard.target_r or start) if ard.budget else None
        if ard.layout == "shared_a":
            shared = {m: (h.count, "lora_B" if h.side == "out" else "lora_A") for m, h in shape.heads.items()}
    if config.method in MOVES_RANKS:
        settings["per_tower"] = config.budget == "per_tower"
    return build(config.method, settings, total_steps=total_steps, table=shape.table, shared_heads=shared)


def adapter_form(config: RunConfig) -> Form:
    """The form of the method's adapters."""
    if config.method == "dora":
        return "dora"
    if config.method == "ard_lora":
        return (config.ard_lora or ArdLoraBlock()).layout
    return "own_a" if config.probe_lora is not None and config.probe_lora.level == "head" else "plain"


def schedule_text(config: RunConfig, train: TrainData) -> str:
    """One line: how many steps, and what they come from."""
    warmup = num_warmup_steps(config, train.num_steps)
    source = f"max_steps={config.max_steps}" if config.max_steps is not None else f"{config.num_train_epochs} epochs"
    return (
        f"schedule: {train.num_steps} steps ({source}) of {config.global_batch_size} rows in {config.num_grains} "
        f"grains, {train.num_rows(0)} rows an epoch; warm-up {warmup} steps, then {config.lr_scheduler_type} from "
        f"{config.learning_rate:g}"
    )


def summary(config: RunConfig, shape: Shape, train: TrainData, notes: Sequence[str]) -> str:
    """What `ardtrain validate` prints and a run begins with."""
    share = shape.num_trained / shape.num_base
    bits = "" if config.quantization is None else f", linears in {config.quantization}"
    lines = [
        f"model: {config.model_name_or_path}, {shape.num_base:,} frozen parameters{bits}",
        f"method: {config.method}, {len(shape.table.sites)} sites, total rank {shape.table.total}, "
        f"{shape.num_trained:,} trained numbers ({share:.2%})",
        *([f"by tower: {shape.by_tower}"] if shape.by_tower else []),
        schedule_text(config, train),
        f"data: {train.num_samples} samples; " + ", ".join(f"{k} {v}" for k, v in train.counts.items()),
        *(f"  {share.text()}" for share in train.shares),
        *(f"note: {n}" for n in notes),
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """Config and everything that could be checked before weights are loaded."""

    config: RunConfig
    plan: DeepSpeedPlan
    notes: list[str]
    shape: Shape


def read_run_config(path: str | Path, overrides: Sequence[str], *, world_size: int) -> tuple[RunConfig, list[str]]:
    """The run's resolved config and notes for its user.

    The global batch size is fixed at the first start: a run folder that has a resolved config keeps that one's.
    """
    config, notes = take_over(load_config(path, overrides))
    resolved = Path(config.output_dir) / "config.yaml"
    if config.resume_from_checkpoint is not None and config.global_batch_size is None and resolved.is_file():
        earlier = load_config(resolved)
        config = updated(config, {"global_batch_size": earlier.global_batch_size, "gradient_accumulation_steps": None})
        notes.append(f"global_batch_size={earlier.global_batch_size} as at the first start ({resolved})")
    return with_batch(config, world_size), notes


def prepare(path: str | Path, overrides: Sequence[str], *, world_size: int) -> Prepared:
    """Config, shapes and DeepSpeed plan of a file. Raises ConfigError."""
    config, notes = read_run_config(path, overrides, world_size=world_size)
    return prepare_config(config, notes, world_size=world_size)


def prepare_config(config: RunConfig, notes: Sequence[str] = (), *, world_size: int) -> Prepared:
    """Shapes and DeepSpeed plan of a resolved config. Raises ConfigError."""
    shape = check_model(config)
    notes = [*notes, *shape.notes]
    if config.budget == "per_tower" and (config.method not in MOVES_RANKS or len(shape.table.by_tower()) < 2):
        why = "the adapters sit in one tower" if config.method in MOVES_RANKS else f"{config.method} moves no rank"
        notes.append(f"budget=per_tower has no effect: {why}")
    plan = split_deepspeed(config, world_size=world_size, trainable_numbers=shape.num_trained, sizes=shape.sizes)
    if config.num_grains < world_size:
        idle = world_size - config.num_grains
        notes.append(f"{config.num_grains} grains for {world_size} processes: {idle} repeat work that is dropped")
    elif config.num_grains % world_size:
        share = idle_share(config.num_grains, world_size)
        notes.append(f"{config.num_grains} grains over {world_size} processes: {share:.0%} of the rounds are idle")
    return Prepared(config, plan, [*notes, *plan.notes], shape)
