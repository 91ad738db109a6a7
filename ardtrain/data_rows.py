"""Rows of files: what decides their samples, which format they have, and the fields and messages in them.

data_samples.py makes token ids of them, data_labels.py classes; data_cache.py keeps samples on disk, data.py makes
batches of them, data_order.py says which make up which step.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ardtrain.data_sources import DataError, is_text, read_rows
from ardtrain.images import ImageSettings

FIX_OR_SKIP = "correct the row, or leave such rows out with data.on_bad_row: skip"


class BadRow(Exception):
    """Reason why a row gives no sample; becomes a DataError or a count."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What decides the samples and their order; the `data` block of the config.  Defaults stand in the config's model.

    train_files: JSONL (.jsonl, .jsonl.gz), Parquet or a data set of the hub (data_sources.HubSource), a document a row,
        or text (.txt, .txt.gz), a document a file.
    format: `auto` looks at the first row: a chat has `messages_field`, a completion `prompt_field` and
        `completion_field` (or templates are set), a text `text_field`.  `classification` is never guessed.
    prompt_template, completion_template: `str.format` text over the row's fields, in place of the two fields.
    chat_template: Jinja text in place of the tokenizer's.
    max_length: tokens of a sample and of a packed row, bos and eos counted.
    truncation: what happens to a sample longer than max_length.  Packed text is cut into pieces instead; of a
        classified pair `right` cuts the longer text first, as transformers does, and keeps the special tokens.
    label_field, text_pair_field: of classification rows, beside `text_field`; None: there is one text.
    labels: names of the classes, in the order of the model's outputs (find_labels).  Only classification has them;
        none (None or empty) until they are found.
    loss_on: of a chat, every turn of the assistant or its last; tools_field: what a row gives to its template as tools.
    images: of rows with a picture (format image_text): prompt and completion as of completions, with the newline behind
        the prompt that PaliGemma was trained with; None elsewhere.
    """

    train_files: tuple[str, ...]
    format: Literal["auto", "completion", "chat", "text", "classification", "image_text"]
    prompt_field: str
    completion_field: str
    messages_field: str
    text_field: str
    prompt_template: str | None
    completion_template: str | None
    chat_template: str | None
    max_length: int
    packing: bool
    truncation: Literal["error", "drop", "right"]
    on_bad_row: Literal["error", "skip"]
    seed: int
    label_field: str = "label"
    text_pair_field: str | None = None
    labels: tuple[str, ...] | None = None
    images: ImageSettings | None = None
    loss_on: Literal["assistant", "last"] = "assistant"
    tools_field: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("format", ("auto", "completion", "chat", "text", "classification", "image_text")),
            ("truncation", ("error", "drop", "right")),
            ("on_bad_row", ("error", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if not self.train_files or isinstance(self.train_files, str):
            raise ValueError(f"data.train_files={self.train_files!r} must list at least one file")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves no token to predict; use 2 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        if self.format == "classification" and self.packing:
            raise ValueError(
                "packing=true does not go with data.format=classification (a label a row); set it to false"
            )
        if self.format == "image_text" and self.packing:
            raise ValueError("packing=true does not go with data.format=image_text (a picture a row); set it to false")
        assert (self.images is not None) == (self.format == "image_text")
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"data.label_names={list(self.labels)} must be two or more different names")
        for name in ("prompt_template", "completion_template"):
            template = getattr(self, name)
            if template is not None and any(re.match(r"\d*(\W|$)", f) for f in _template_fields(template, name)):
                raise ValueError(
                    f"data.{name}={template!r} has an unnamed field; write the name of a row's field: {{name}}"
                )


# ---- reading ----


def parse_row(path: str, content: bytes | dict[str, Any]) -> dict[str, Any] | str:
    """A JSONL or table row as its object; a text file's content as its text."""
    if isinstance(content, dict):
        return content
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not valid UTF-8 at byte {error.start + 1}") from error
    if is_text(path):
        return text
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON at column {error.pos + 1} ({error.msg})") from error
    except RecursionError as error:
        raise BadRow("not valid JSON (nested too deeply)") from error
    if not isinstance(row, dict):
        raise BadRow(f"the row is {kind_of(row)}, not an object with fields")
    if b"\\ud" in content.lower():  # the one way by which JSON can hold what no tokenizer takes
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRow("half of a surrogate pair (\\ud800 to \\udfff) is no character") from error
    return row


def detect_format(settings: DataSettings) -> str:
    """Format of the first row that parses; the bad rows before it are reported when their turn comes."""
    path = settings.train_files[0]
    if is_text(path):
        return "text"
    for line, content in read_rows(path):
        try:
            row = parse_row(path, content)
        except BadRow as reason:
            if settings.on_bad_row == "error":
                raise DataError(path, line, str(reason), FIX_OR_SKIP) from reason
            continue
        found = []
        if settings.messages_field in row:
            found.append("chat")
        templates = settings.prompt_template is not None or settings.completion_template is not None
        if templates or (settings.prompt_field in row and settings.completion_field in row):
            found.append("completion")
        if settings.text_field in row and not found:  # beside a prompt or a chat it is no more than a further field
            found.append("text")
        if len(found) == 1:
            return found[0]
        raise DataError(
            path,
            line,
            f"data.format=auto cannot tell the format: the row's fields {', '.join(row) or '(none)'} fit "
            + (
                " and ".join(found)
                or f"neither a chat ({settings.messages_field}), a completion ({settings.prompt_field}, "
                f"{settings.completion_field}) nor a text ({settings.text_field})"
            ),
            "set data.format, and the field names or templates that go with it",
        )
    raise DataError(path, None, "no row to detect the format from", "set data.format or drop the empty file")


def answers_of(path: str, settings: DataSettings, format_: str) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(line, row, right answer) of a file's good rows: the completion, or what the assistant says last in a chat.

    None: rows of this format have none. Bad rows, which are told where rows are tokenised, and text files are left out.
    """
    for line, content in read_rows(path):
        answer = None
        try:
            row = parse_row(path, content)
            if not isinstance(row, dict):
                continue
            if format_ == "chat":
                said = [m for m in messages_of(row, settings.messages_field) if m["role"] == "assistant"]
                answer = str(said[-1].get("content") or "") if said else ""
            elif format_ in ("completion", "image_text"):
                answer = text_of(row, settings.completion_field, settings.completion_template)
        except BadRow:
            continue
        yield line, row, answer


# ---- what a row holds ----


def _template_fields(template: str, name: str) -> list[str]:
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"data.{name}={template!r} is no format text ({error}); write {{{{ for a brace") from error


def text_of(row: dict[str, Any], field: str, template: str | None) -> str:
    """The field, or the template filled from the row."""
    if template is not None:
        for path in _template_fields(template, "template"):
            try:
                value, _ = string.Formatter().get_field(path, (), row)
            except (LookupError, AttributeError, TypeError, ValueError) as error:
                raise BadRow(f"field {path!r} of the template is missing") from error
            if not isinstance(value, str | int | float):
                raise BadRow(f"field {path!r} is {kind_of(value)}, not text")
        try:
            return template.format(**row)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise BadRow(f"the template {template!r} cannot be filled ({error})") from error
    if field not in row:
        raise BadRow(f"field {field!r} is missing")
    if not isinstance(row[field], str):
        raise BadRow(f"field {field!r} is {kind_of(row[field])}, not text")
    return str(row[field])


def kind_of(value: object) -> str:
    """What JSON calls it, for messages."""
    return {type(None): "null", dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")


def messages_of(row: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """A chat's messages. Raises BadRow: one has no role or text, or nobody answers."""
    if field not in row:
        raise BadRow(f"field {field!r} is missing")
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise BadRow(
            f"field {field!r} is {kind_of(messages)}, not a list with messages" if messages else f"{field!r} is empty"
        )
    for i, message in enumerate(messages, start=1):
        calls = isinstance(message, dict) and message.get("role") == "assistant" and bool(message.get("tool_calls"))
        wanted = ("role",) if calls else ("role", "content")  # an answer that calls tools may say nothing
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in wanted):
            raise BadRow(f"message {i} of {field!r} has no text in 'role' and 'content'")
        if message["role"] == "assistant" and not calls and not message["content"].strip():
            raise BadRow(f"message {i} of {field!r} is an empty answer: no target token")
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow(f"{field!r} has no assistant turn: no target token")
    return messages
