"""What a config means for this model and this data, checked before any weight is loaded. Used by validate and train."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ardtrain.adapters import Form
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import ModelSource, load_image_processor, load_tokenizer, meta_model, tower_config, tower_text
from ardtrain.backbones import load_config as load_model_config
from ardtrain.collectives import idle_share
from ardtrain.config import (
    AloraBlock,
    ArdLoraBlock,
    ConfigError,
    RunConfig,
    adapter_settings,
    alora_steps,
    ard_lora_warmups,
    check_schedule,
    load_config,
    num_warmup_steps,
    updated,
    with_batch,
)
from ardtrain.data import DataSettings, EvalData, Source, TrainData
from ardtrain.data_labels import find_labels
from ardtrain.deepspeed_config import DeepSpeedPlan, split_deepspeed, take_over
from ardtrain.dense import dense_entries
from ardtrain.gather_sizes import WeightSizes
from ardtrain.heads import Heads, find_heads, refuse_fused, split_heads
from ardtrain.images import ImageReader, ImageSettings, image_settings
from ardtrain.importing import place, place_ranks, read_adapter, read_ranks
from ardtrain.methods import build
from ardtrain.methods.alora import num_matrix_types
from ardtrain.methods.base import Method
from ardtrain.patterns import with_patterns
from ardtrain.ranks import Dense, RankTable, Site
from ardtrain.reasons import first_line
from ardtrain.targets import IMAGE_MODELS, find_sites, head_linears, linear_modules, tower_modules, without_adapter
from ardtrain.token_rows import find_tokens, refuse_whole_embeddings, token_entry

_FORMATS: dict[str, Any] = {"sequence_classification": "classification", "image_text_to_text": "image_text"}
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


def model_source(config: RunConfig) -> ModelSource:
    """Where the config says the model comes from."""
    return ModelSource(config.model_name_or_path, config.revision, config.trust_remote_code, config.attn_implementation)


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
    )
    own_ranks, alphas = config.rank_pattern, config.alpha_pattern
    sites, ranks = with_patterns(sites, ranks, rank_pattern=own_ranks, alpha_pattern=alphas)
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


def read_labels(config: RunConfig) -> tuple[str, ...]:
    """The classes of a classification run, found in the training rows unless the config names them; else ().

    Raises:
        ConfigError: a row without a label, or with one of another kind.
    """
    if config.task != "sequence_classification":
        return ()
    if config.data.label_names is not None:
        return config.data.label_names
    try:
        return find_labels([data_settings(config, source=name) for name in config.data.sources or (None,)])
    except (OSError, ValueError) as error:
        raise ConfigError(str(error).splitlines()) from error


def image_reader(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ImageReader | None:
    """What makes pixels of the rows' pictures, None for other tasks. Raises ConfigError."""
    if config.task != "image_text_to_text":
        return None
    source = model_source(config)
    try:
        processor = load_image_processor(source)
        settings = image_settings(
            load_model_config(source),
            tokenizer,
            processor,
            field=config.data.image_field,
            max_length=config.max_length,
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return ImageReader(processor, settings)


def template_text(config: RunConfig) -> str | None:
    """The chat template that the config gives, itself or by its file's name; None: the tokenizer's.

    Raises:
        ConfigError: it is neither.
    """
    given = config.chat_template
    if given is None:
        return None
    text, setting = given, f"chat_template={given[:200]!r}"
    if os.path.isfile(given):  # False for a text that is too long for a name
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"{setting} cannot be read ({first_line(error)}); give a text file"]) from error
    if "{" not in text:
        where = "holds" if text is not given else f"is no file in {Path.cwd()} and"
        raise ConfigError([f"{setting} {where} no Jinja2 template, which has braces; correct the path"])
    return text


def data_settings(
    config: RunConfig,
    labels: tuple[str, ...] = (),
    images: ImageSettings | None = None,
    *,
    source: str | None = None,
) -> DataSettings:
    """The config's `data` block, or one of its sources, and the settings of rows, in the data layer's own form."""
    d = config.data
    fields = d.row_fields(source)
    image_field = fields.pop("image_field")
    if images is not None:
        images = replace(images, field=image_field)
    fields["format"] = _FORMATS.get(config.task, fields["format"])
    return DataSettings(
        **fields,
        train_files=d.training_files if source is None else d.sources[source].file,
        chat_template=template_text(config),
        max_length=config.max_length,
        packing=config.packing,
        truncation=config.truncation,
        on_bad_row=d.on_bad_row,
        seed=config.seed,
        labels=labels or None,
        images=images,
    )


def training_sources(
    config: RunConfig, labels: tuple[str, ...] = (), images: ImageSettings | None = None
) -> list[Source]:
    """data.sources in the data layer's own form; none where the rows come from train_file."""
    return [
        Source(name, data_settings(config, labels, images, source=name), own.weight)
        for name, own in config.data.sources.items()
    ]


def held_out_sources(
    config: RunConfig, labels: tuple[str, ...] = (), images: ImageSettings | None = None
) -> list[Source]:
    """The held-out files of data.sources, each with its source's fields; none where the rows come from eval_file."""
    return [
        Source(name, replace(data_settings(config, labels, images, source=name), train_files=(file,)))
        for name, file in config.data.held_out_sources.items()
    ]


def held_out_settings(config: RunConfig, images: ImageSettings | None = None) -> list[DataSettings]:
    """Of each held-out file, in the order of their rows."""
    own = [source.settings for source in held_out_sources(config, images=images)]
    return own or [replace(data_settings(config, images=images), train_files=config.data.held_out_files)]


def cache_dir() -> Path:
    """Where tokenised rows are kept: $ARDTRAIN_CACHE, else the user's cache folder."""
    root = os.environ.get("ARDTRAIN_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "ardtrain"
    )
    return Path(root) / "rows"


def open_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()
) -> tuple[TrainData, EvalData | None]:
    """Tokenises (or finds the cache) and lays out the steps.

    Raises:
        ConfigError: broken rows, too few rows, or a schedule that does not fit into the run's steps.
    """
    assert config.global_batch_size is not None
    images = image_reader(config, tokenizer)
    settings = data_settings(config, labels, images.settings if images else None)
    try:
        train = TrainData(
            settings,
            tokenizer,
            cache_dir(),
            global_batch_size=config.global_batch_size,
            grain_size=config.per_device_train_batch_size,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            images=images,
            sources=training_sources(config, labels, settings.images),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error).splitlines()) from error
    held_out = None if not config.data.held_out_files else open_held_out(config, tokenizer, labels, images=images)
    check_schedule(config, train.num_steps)
    _check_rounds(config, train)
    return train, held_out


def open_held_out(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...] = (),
    *,
    images: ImageReader | None = None,
    packing: bool | None = None,
) -> EvalData:
    """The rows of data.eval_file or of the sources', which the config must have, in their grains.

    packing: None: as the config says.

    Raises:
        ConfigError: the file is missing, or its rows are broken.
    """
    assert config.data.held_out_files
    config = config if packing is None else config.model_copy(update={"packing": packing})
    settings = data_settings(config, labels, images.settings if images else None)
    try:
        return EvalData(
            settings,
            config.data.held_out_files,
            tokenizer,
            cache_dir(),
            grain_size=config.per_device_eval_batch_size,
            max_samples=config.max_eval_samples,
            images=images,
            sources=held_out_sources(config, labels, settings.images),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error).splitlines()) from error


def open_allocation_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()
) -> EvalData | None:
    """Held-out rows for the allocator, where the method looks at some: ALoRA's fixed batch, ARD-LoRA's alternation.

    Raises:
        ConfigError: the file holds fewer rows than ALoRA's batch.
    """
    alora = config.method == "alora"
    ard = config.method == "ard_lora" and config.ard_lora is not None and config.ard_lora.meta_interval > 0
    if not (alora or ard):
        return None
    assert config.data.allocation_files, "the config checks this"
    block = config.alora or AloraBlock()
    images = image_reader(config, tokenizer)
    settings = data_settings(config, labels, images.settings if images else None)
    shared = config.data.allocation_file is None
    try:
        return EvalData(
            settings,
            config.data.allocation_files,
            tokenizer,
            cache_dir(),
            grain_size=config.per_device_eval_batch_size,
            choose=(block.val_batch, config.seed) if alora else None,
            images=images,
            sources=held_out_sources(config, labels, settings.images) if shared else (),
        )
    except (OSError, ValueError) as error:
        source = f"alora.val_batch={block.val_batch}: " if alora else ""
        raise ConfigError([source + line for line in str(error).splitlines()]) from error


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


def _check_rounds(config: RunConfig, train: TrainData) -> None:
    """ALoRA's first round must leave a step to train (methods.md 3.3)."""
    if config.method != "alora":
        return
    k1, _ = alora_steps(config.alora or AloraBlock(), steps_per_epoch(config, train))
    if k1 >= train.num_steps:
        raise ConfigError(
            [
                f"alora.k1 is {k1} steps and the run has {train.num_steps}: no step is left to adapt; lower alora.k1 "
                "(epochs) or alora.k1_steps, or train longer"
            ]
        )


def steps_per_epoch(config: RunConfig, train: TrainData) -> float:
    """Optimizer steps of one pass over the rows."""
    assert config.global_batch_size is not None
    return train.num_rows(0) / config.global_batch_size


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


def tokenizer_of(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer the config names. Raises ConfigError."""
    try:
        return load_tokenizer(model_source(config), config.tokenizer_name_or_path)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


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
