"""What a config means for this model and this data, checked before any weight is loaded. Used by validate and train."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ardtrain.adapters import linear_modules
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import ModelSource, find_sites, load_tokenizer, meta_model
from ardtrain.config import ConfigError, RunConfig, adapter_settings, check_schedule, num_warmup_steps
from ardtrain.data import DataSettings, EvalData, TrainData
from ardtrain.methods import build
from ardtrain.methods.base import Method
from ardtrain.ranks import RankTable


@dataclass(frozen=True)
class Shape:
    """The run as far as shapes say: sites and first ranks, counts of numbers, a fingerprint of the base."""

    table: RankTable
    num_trained: int
    num_base: int
    backbone_fingerprint: str


def model_source(config: RunConfig) -> ModelSource:
    """Where the config says the model comes from."""
    return ModelSource(config.model_name_or_path, config.revision, config.trust_remote_code, config.attn_implementation)


def check_model(config: RunConfig) -> Shape:
    """Finds the sites on the meta device.

    Raises:
        ConfigError: a target matches nothing, a rank exceeds a module, an unknown tower.
    """
    try:
        model = meta_model(model_source(config))
        towers = {tower: adapter_settings(config, tower) for tower in config.targets}
        sites, ranks = find_sites(
            model,
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            r=config.r,
            lora_alpha=config.lora_alpha,
            tower_settings={tower: (s.r, s.lora_alpha) for tower, s in towers.items()},
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    table = RankTable.start(sites, ranks)
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters()]
    text = json.dumps([type(model).__name__, shapes, list(linear_modules(model))])
    layout = ArenaLayout(table, make_method(config, total_steps=1).entries)
    num_base = sum(p.numel() for p in model.parameters())
    return Shape(table, layout.num_trained, num_base, hashlib.sha256(text.encode()).hexdigest())


def data_settings(config: RunConfig) -> DataSettings:
    """The config's `data` block and the settings of rows, in the data layer's own form."""
    template = config.chat_template
    if template is not None and len(template) < 1024 and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    d = config.data
    return DataSettings(
        train_files=d.train_file,
        format=d.format,
        prompt_field=d.prompt_field,
        completion_field=d.completion_field,
        messages_field=d.messages_field,
        text_field=d.text_field,
        prompt_template=d.prompt_template,
        completion_template=d.completion_template,
        chat_template=template,
        max_length=config.max_length,
        packing=config.packing,
        truncation=config.truncation,
        on_bad_row=d.on_bad_row,
        seed=config.seed,
    )


def cache_dir() -> Path:
    """Where tokenised rows are kept: $ARDTRAIN_CACHE, else the user's cache folder."""
    root = os.environ.get("ARDTRAIN_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "ardtrain"
    )
    return Path(root) / "rows"


def open_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[TrainData, EvalData | None]:
    """Tokenises (or finds the cache) and lays out the steps.

    Raises:
        ConfigError: broken rows, too few rows, or a schedule that does not fit into the run's steps.
    """
    assert config.global_batch_size is not None
    settings = data_settings(config)
    try:
        train = TrainData(
            settings,
            tokenizer,
            cache_dir(),
            global_batch_size=config.global_batch_size,
            grain_size=config.per_device_train_batch_size,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
        )
        held_out = None
        if config.data.eval_file is not None:
            held_out = EvalData(
                settings,
                [config.data.eval_file],
                tokenizer,
                cache_dir(),
                grain_size=config.per_device_eval_batch_size,
                max_samples=config.max_eval_samples,
            )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error).splitlines()) from error
    check_schedule(config, train.num_steps)
    return train, held_out


def make_method(config: RunConfig, *, total_steps: int) -> Method:
    """The config's method with its own block's settings."""
    block = getattr(config, config.method, None)
    return build(config.method, block.model_dump() if block is not None else {}, total_steps=total_steps)


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
    lines = [
        f"model: {config.model_name_or_path}, {shape.num_base:,} frozen parameters",
        f"method: {config.method}, {len(shape.table.sites)} sites, total rank {shape.table.total}, "
        f"{shape.num_trained:,} trained numbers ({share:.2%})",
        schedule_text(config, train),
        f"data: {train.num_samples} samples; " + ", ".join(f"{k} {v}" for k, v in train.counts.items()),
        *(f"note: {n}" for n in notes),
    ]
    return "\n".join(lines)
