"""The block `data`: which files the rows come from, how sources are mixed, which fields of a row are what."""

from __future__ import annotations

import os
import re
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ardtrain.config.block import Block, tuple_of

Format = Literal["auto", "completion", "chat", "text"]
Files = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(tuple_of)]


class SourceBlock(Block):
    """One of several data sets; what is left out of its rows' fields follows the block `data`."""

    file: Files
    """As data.train_file: one path or a list."""
    weight: float | None = Field(default=None, gt=0)
    """Share of an epoch's rows beside the other weights; all sources have one, or none has: each row once an epoch."""
    eval_file: str | None = None
    """Held-out rows of this source, whose loss is also given apart."""
    format: Format | None = None
    prompt_field: str | None = None
    """Also puts data.prompt_template aside."""
    completion_field: str | None = None
    """Also puts data.completion_template aside."""
    messages_field: str | None = None
    loss_on: Literal["assistant", "last"] | None = None
    tools_field: str | None = None
    text_field: str | None = None
    prompt_template: str | None = None
    completion_template: str | None = None
    text_pair_field: str | None = None
    image_field: str | None = None
    label_field: str | None = None

    def cross_field_errors(self) -> list[str]:
        return _template_errors(self)


ROW_FIELDS = tuple(name for name in SourceBlock.model_fields if name not in ("file", "weight", "eval_file"))


class DataBlock(Block):
    """Where the rows come from and which of their fields are what."""

    train_file: Files | None = None
    """JSONL, Parquet or text, one path or a list; or hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT] (split train)."""
    sources: dict[str, SourceBlock] = {}
    """Instead of train_file: several data sets by name, such as {chat: {file: a.jsonl, weight: 3}, sums: {...}}."""
    eval_file: str | None = None
    """As train_file, one; or eval_file of the sources."""
    format: Format = "auto"
    """auto: by the fields of the first row."""
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    loss_on: Literal["assistant", "last"] = "assistant"
    """Of a chat: every turn of the assistant, or its last one alone."""
    tools_field: str | None = None
    """Field of a chat row whose list goes to the template as tools."""
    text_field: str = "text"
    prompt_template: str | None = None
    """str.format over the row's fields instead of prompt_field, such as "{instruction}\\n{input}\\n"."""
    completion_template: str | None = None
    """str.format over the row's fields instead of completion_field."""
    text_pair_field: str | None = None
    """Second text of a row (sequence classification)."""
    image_field: str = "image"
    """Path (relative to the data file), data URI or bytes of a row's picture (image_text_to_text)."""
    label_field: str = "label"
    """A number from 0 or a name (sequence classification)."""
    label_names: tuple[str, ...] | None = None
    """Names of the labels in order; None: found in the training rows."""
    allocation_file: str | None = None
    """Rows that the allocator may look at (ALoRA's batch, ARD-LoRA's alternation); None: eval_file."""
    on_bad_row: Literal["error", "skip"] = "error"
    """skip: left out and counted."""

    @property
    def training_files(self) -> tuple[str, ...]:
        """All of them, in their order."""
        return self.train_file or tuple(file for source in self.sources.values() for file in source.file)

    @property
    def held_out_sources(self) -> dict[str, str]:
        """Name -> held-out file of the sources that have one."""
        return {name: own.eval_file for name, own in self.sources.items() if own.eval_file is not None}

    @property
    def held_out_files(self) -> tuple[str, ...]:
        """eval_file, or those of the sources."""
        return tuple(self.held_out_sources.values()) if self.eval_file is None else (self.eval_file,)

    @property
    def allocation_files(self) -> tuple[str, ...]:
        """What the allocator may look at."""
        return self.held_out_files if self.allocation_file is None else (self.allocation_file,)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file the run may read rows from."""
        return tuple(dict.fromkeys((*self.training_files, *self.held_out_files, *self.allocation_files)))

    def row_fields(self, source: str | None = None) -> dict[str, Any]:
        """ROW_FIELDS of the block, or as a source has them."""
        values = {name: getattr(self, name) for name in ROW_FIELDS}
        if source is None:
            return values
        given = {n: v for n in ROW_FIELDS if (v := getattr(self.sources[source], n)) is not None}
        for part in ("prompt", "completion"):
            if f"{part}_field" in given:
                values[f"{part}_template"] = None
        return values | given

    def cross_field_errors(self) -> list[str]:
        errors = _template_errors(self)
        if self.train_file is None and not self.sources:
            errors.append(
                "train_file is missing; set it (JSONL, Parquet or text, one path or a list; or "
                "hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]), or sources for several data sets"
            )
        if self.train_file is not None and self.sources:
            errors.append(
                f"train_file={list(self.train_file)} stands beside sources; make it one of them, or remove it"
            )
        return [*errors, *self._source_errors()]

    def _source_errors(self) -> list[str]:
        errors = [
            f"sources.{name} is no name for a source: it becomes part of a metric's; use letters, digits and _"
            for name in self.sources
            if not re.fullmatch(r"\w+", name, re.ASCII)
        ]
        without = [name for name, own in self.sources.items() if own.weight is None]
        if without and len(without) < len(self.sources):
            errors.append(
                f"sources.{without[0]}.weight is missing, and other sources have one; give all a weight, or none (each "
                "row once an epoch)"
            )
        owners: dict[str, str] = {}
        for name, own in self.sources.items():
            for file in own.file:
                plain = file if file.startswith("hub:") else os.path.normpath(file)
                if plain in owners:
                    errors.append(
                        f"sources.{name}.file={file} stands in sources.{owners[plain]} already; remove it here and "
                        "raise that one's weight"
                    )
                owners.setdefault(plain, name)
        if self.eval_file is not None and self.held_out_sources:
            errors.append(
                f"eval_file={self.eval_file} stands beside sources.{next(iter(self.held_out_sources))}.eval_file; "
                "remove one of them"
            )
        return errors


def _template_errors(block: DataBlock | SourceBlock) -> list[str]:
    errors = []
    for name in ("prompt_template", "completion_template"):
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(getattr(block, name) or "")]
        except ValueError as error:
            errors.append(f"{name} is no str.format template ({error}); write {{{{ and }}}} for braces in the text")
            continue
        if any(field is not None and not field.isidentifier() for field in fields):
            errors.append(f"{name} may hold plain field names only, such as {{instruction}}; rename the others")
    return errors
