"""Where a config says that base, tokenizer and rows come from, in the forms of the layers below; opens the rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ardtrain.backbones import ModelSource, load_image_processor, load_tokenizer
from ardtrain.backbones import load_config as load_model_config
from ardtrain.config import AloraBlock, ConfigError, RunConfig, alora_steps, check_schedule
from ardtrain.data import DataSettings, EvalData, Source, TrainData
from ardtrain.data_labels import find_labels
from ardtrain.images import ImageReader, ImageSettings, image_settings
from ardtrain.reasons import first_line

_FORMATS: dict[str, Any] = {"sequence_classification": "classification", "image_text_to_text": "image_text"}


def model_source(config: RunConfig) -> ModelSource:
    """Where the config says the model comes from."""
    return ModelSource(config.model_name_or_path, config.revision, config.trust_remote_code, config.attn_implementation)


def tokenizer_of(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer the config names. Raises ConfigError."""
    try:
        return load_tokenizer(model_source(config), config.tokenizer_name_or_path)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


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
    try:
        return _eval_data(
            config, config.data.held_out_files, tokenizer, labels, images, max_samples=config.max_eval_samples
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
    choose = (block.val_batch, config.seed) if alora else None
    by_source = config.data.allocation_file is None
    try:
        return _eval_data(
            config, config.data.allocation_files, tokenizer, labels, images, by_source=by_source, choose=choose
        )
    except (OSError, ValueError) as error:
        source = f"alora.val_batch={block.val_batch}: " if alora else ""
        raise ConfigError([source + line for line in str(error).splitlines()]) from error


def _eval_data(
    config: RunConfig,
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    images: ImageReader | None,
    *,
    by_source: bool = True,
    **selection: Any,
) -> EvalData:
    """Held-out rows of `files` in their grains; by_source: with the fields of data.sources, where there are some."""
    settings = data_settings(config, labels, images.settings if images else None)
    return EvalData(
        settings,
        files,
        tokenizer,
        cache_dir(),
        grain_size=config.per_device_eval_batch_size,
        images=images,
        sources=held_out_sources(config, labels, settings.images) if by_source else (),
        **selection,
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
