"""From rows to token ids: formats, templates, truncation.  One sample after the other, in file order.

A *sample* is one tokenised document, or a piece of one, with the line it came from.  data.py keeps samples on disk and
makes batches of them; data_order.py says which samples make up which step.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from ardtrain.data_sources import DataError, check_source, is_text, read_rows
from ardtrain.images import BadImageError, ImageSettings, StoredImage, check_images, image_of, text_problem

_ROWS_A_BATCH = 512  # rows tokenised at once
_MOST_LABELS = 1 << 16  # an integer label beyond it is a slip, not a class
_FIX_OR_SKIP = "correct the row, or leave such rows out with data.on_bad_row: skip"


class _BadRow(Exception):
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


def _parse(path: str, content: bytes | dict[str, Any]) -> dict[str, Any] | str:
    """A JSONL or table row as its object; a text file's content as its text."""
    if isinstance(content, dict):
        return content
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRow(f"not valid UTF-8 at byte {error.start + 1}") from error
    if is_text(path):
        return text
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRow(f"not valid JSON at column {error.pos + 1} ({error.msg})") from error
    except RecursionError as error:
        raise _BadRow("not valid JSON (nested too deeply)") from error
    if not isinstance(row, dict):
        raise _BadRow(f"the row is {_kind(row)}, not an object with fields")
    if b"\\ud" in content.lower():  # the one way by which JSON can hold what no tokenizer takes
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _BadRow("half of a surrogate pair (\\ud800 to \\udfff) is no character") from error
    return row


def detect_format(settings: DataSettings) -> str:
    """Format of the first row that parses; the bad rows before it are reported when their turn comes."""
    path = settings.train_files[0]
    if is_text(path):
        return "text"
    for line, content in read_rows(path):
        try:
            row = _parse(path, content)
        except _BadRow as reason:
            if settings.on_bad_row == "error":
                raise DataError(path, line, str(reason), _FIX_OR_SKIP) from reason
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
            row = _parse(path, content)
            if not isinstance(row, dict):
                continue
            if format_ == "chat":
                said = [m for m in _messages(row, settings.messages_field) if m["role"] == "assistant"]
                answer = str(said[-1].get("content") or "") if said else ""
            elif format_ in ("completion", "image_text"):
                answer = _text_of(row, settings.completion_field, settings.completion_template)
        except _BadRow:
            continue
        yield line, row, answer


# ---- one row -> token ids and loss mask ----


def _template_fields(template: str, name: str) -> list[str]:
    try:
        return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"data.{name}={template!r} is no format text ({error}); write {{{{ for a brace") from error


def _text_of(row: dict[str, Any], field: str, template: str | None) -> str:
    """The field, or the template filled from the row."""
    if template is not None:
        for path in _template_fields(template, "template"):
            try:
                value, _ = string.Formatter().get_field(path, (), row)
            except (LookupError, AttributeError, TypeError, ValueError) as error:
                raise _BadRow(f"field {path!r} of the template is missing") from error
            if not isinstance(value, str | int | float):
                raise _BadRow(f"field {path!r} is {_kind(value)}, not text")
        try:
            return template.format(**row)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise _BadRow(f"the template {template!r} cannot be filled ({error})") from error
    if field not in row:
        raise _BadRow(f"field {field!r} is missing")
    if not isinstance(row[field], str):
        raise _BadRow(f"field {field!r} is {_kind(row[field])}, not text")
    return str(row[field])


def _kind(value: object) -> str:
    return {type(None): "null", dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")


class _Encoder:
    """Rows of one format -> (token ids, loss mask), with exactly one bos in front when the tokenizer has a bos."""

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, format_: str) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.format = format_
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        if format_ in ("completion", "image_text") and self.eos is None:
            raise ValueError("the tokenizer has no eos token, so completions would never end; set tokenizer.eos_token")
        self.chat_template = _chat_template(settings, tokenizer) if format_ == "chat" else ""

    def segments(self, row: dict[str, Any] | str) -> list[tuple[str, bool]]:
        """(text, has loss) pieces of a completion or text row, tokenised apart: no token crosses a border."""
        s = self.settings
        if self.format == "text":
            text = row if isinstance(row, str) else _text_of(row, s.text_field, None)
            if not text.strip():
                raise _BadRow("the text is empty")
            return [(text, True)]
        assert isinstance(row, dict)
        prompt = _text_of(row, s.prompt_field, s.prompt_template)
        completion = _text_of(row, s.completion_field, s.completion_template)
        if not completion.strip():
            raise _BadRow("the completion is empty: no target token")
        if self.format == "image_text":
            problem = text_problem(prompt, completion, self.tokenizer)
            if problem:
                raise _BadRow(problem)
            prompt += "\n"
        return [(prompt, False), (completion, True)]

    def encode_segments(self, rows: Sequence[list[tuple[str, bool]]]) -> list[tuple[list[int], list[bool]]]:
        """Token ids and loss masks of many rows with one call of the tokenizer; the eos is a target."""
        texts = [text for row in rows for text, _ in row]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        result = []
        for row in rows:
            ids: list[int] = []
            mask: list[bool] = []
            for _, has_loss in row:
                piece = next(encoded)
                ids += piece
                mask += [has_loss] * len(piece)
            ids, mask = self._one_bos(ids, mask)
            if self.eos is not None and ids[-1:] != [self.eos]:
                ids, mask = [*ids, self.eos], [*mask, True]
            result.append((ids, mask))
        return result

    def encode_chat(self, row: dict[str, Any] | str, where: str) -> tuple[list[int], list[bool]]:
        """Token ids of a rendered chat, loss on the assistant's turns.

        The template writes the ends of turns; no eos is added.
        A token is a target when any of its characters is the assistant's, as in transformers' assistant_masks.
        """
        assert isinstance(row, dict)
        messages = _messages(row, self.settings.messages_field)
        tools = row.get(self.settings.tools_field) if self.settings.tools_field else None
        try:
            if re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template):
                encoded = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.chat_template,
                    tokenize=True,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                    tokenizer_kwargs={"verbose": False},
                )
                ids, mask = list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
            else:
                text, spans = self._assistant_spans(messages, tools, where)
                encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                ids = list(encoded["input_ids"])
                mask = [any(s < end and e > start for start, end in spans) for s, e in encoded["offset_mapping"]]
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat_template is no Jinja template: {error}; correct it") from error
        except jinja2.TemplateError as error:
            raise _BadRow(f"the chat template refuses the messages: {error}") from error
        if self.settings.loss_on == "last":
            mask = _last_run(mask)
        return self._one_bos(ids, mask)

    def _assistant_spans(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat and the character ranges that the assistant wrote, found by rendering prefixes."""

        def render(count: int, prompt: bool) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages[:count],
                    tools=tools,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )

        text = render(len(messages), False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, through = render(i, True), render(i + 1, False)
            if not (text.startswith(through) and through.startswith(before)):
                raise ValueError(
                    f"{where}: chat_template: the chat up to message {i + 1}, rendered alone, is not how the "
                    "whole chat begins, so the assistant's part cannot be found; mark it with {% generation %} ... "
                    "{% endgeneration %} in the template"
                )
            spans.append((len(before), len(through)))
        return text, spans

    def _one_bos(self, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        if self.bos is None:
            return ids, mask
        skip = next((i for i, token in enumerate(ids) if token != self.bos), len(ids))
        return [self.bos, *ids[skip:]], [False, *mask[skip:]]


def _last_run(mask: list[bool]) -> list[bool]:
    """The mask with its last unbroken run of targets alone."""
    stop = next((i for i in range(len(mask), 0, -1) if mask[i - 1]), 0)
    start = next((i for i in range(stop, 0, -1) if not mask[i - 1]), 0)
    return [start <= i < stop for i in range(len(mask))]


def _chat_template(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, which chat needs; use a fast tokenizer"
        )
    if settings.chat_template is None and tokenizer.chat_template is None:
        raise ValueError("data.format=chat, but the tokenizer has no chat template; set chat_template")
    return str(tokenizer.get_chat_template(settings.chat_template))


def _messages(row: dict[str, Any], field: str) -> list[dict[str, Any]]:
    if field not in row:
        raise _BadRow(f"field {field!r} is missing")
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise _BadRow(
            f"field {field!r} is {_kind(messages)}, not a list with messages" if messages else f"{field!r} is empty"
        )
    for i, message in enumerate(messages, start=1):
        calls = isinstance(message, dict) and message.get("role") == "assistant" and bool(message.get("tool_calls"))
        wanted = ("role",) if calls else ("role", "content")  # an answer that calls tools may say nothing
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in wanted):
            raise _BadRow(f"message {i} of {field!r} has no text in 'role' and 'content'")
        if message["role"] == "assistant" and not calls and not message["content"].strip():
            raise _BadRow(f"message {i} of {field!r} is an empty answer: no target token")
    if all(message["role"] != "assistant" for message in messages):
        raise _BadRow(f"{field!r} has no assistant turn: no target token")
    return messages


# ---- classification: labels, texts and pairs ----


def find_labels(sources: Sequence[DataSettings]) -> tuple[str, ...]:
    """The names of the classes in the sources' rows, in the order of the model's outputs; reads the label field alone.

    Integer labels are class numbers: the names are "0" to the largest.  Text labels are sorted by code point.  Where
    labels are given, in all sources the same, every row is checked against them and they are returned.
    Call it with the training files: held-out rows may lack a class.

    Raises:
        DataError: a row has no label, a wrong or an unknown one (left out with on_bad_row: skip); numbers and texts are
            mixed; there are fewer than two classes.
        ValueError: a file is missing or plain text.
    """
    found: set[int | str] = set()
    first: dict[type, str] = {}  # int or str -> its first row
    labels = sources[0].labels
    files = [(path, settings) for settings in sources for path in settings.train_files]
    for path, settings in files:
        check_source(path)
        if is_text(path):
            raise ValueError(f"{path!r} is plain text and holds no labels; use JSONL for data.format: classification")
        for line, content in read_rows(path):
            try:
                row = _parse(path, content)
                assert isinstance(row, dict)
                label = _label_of(row, settings.label_field)
                if labels:
                    _class_number(label, labels)
            except _BadRow as reason:
                if settings.on_bad_row == "error":
                    raise DataError(path, line, str(reason), _FIX_OR_SKIP) from reason
                continue
            other = first.get(str if isinstance(label, int) else int)
            if other is not None:
                raise DataError(
                    path, line, f"label {label!r} is {_kind(label)}, unlike {other}", "write all labels the same way"
                )
            first.setdefault(type(label), f"{path}:{line}")
            found.add(label)
    names = labels or ()
    if not names:
        numbers = [label for label in found if isinstance(label, int)]
        texts = sorted(label for label in found if isinstance(label, str))
        names = tuple(map(str, range(max(numbers) + 1))) if numbers else tuple(texts)
    if len(names) < 2 or not found:
        raise DataError(
            ", ".join(path for path, _ in files),
            None,
            f"the rows' field {sources[0].label_field!r} holds "
            + (f"the one label {names[0]!r}" if found else "no label"),
            "two classes at least are needed; correct data.label_field or the files, or give data.label_names",
        )
    return names


def _label_of(row: dict[str, Any], field: str) -> int | str:
    """The row's label as it is written: a class number or a name."""
    if field not in row:
        raise _BadRow(f"field {field!r} is missing")
    label = row[field]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise _BadRow(f"label {label!r} in field {field!r} is {_kind(label)}, neither a whole number nor text")
    if label == "":
        raise _BadRow(f"the label in field {field!r} is empty")
    if isinstance(label, int) and not 0 <= label < _MOST_LABELS:
        raise _BadRow(f"label {label} in field {field!r} is outside 0 .. {_MOST_LABELS - 1}")
    return label


def _class_number(label: int | str, labels: tuple[str, ...]) -> int:
    """Number of the class that a row's label means."""
    if isinstance(label, int):
        if label >= len(labels):
            raise _BadRow(f"label {label} is unknown: there are {len(labels)} classes, 0 .. {len(labels) - 1}")
        return label
    if label not in labels:
        near = difflib.get_close_matches(label, labels, n=1)
        raise _BadRow(f"label {label!r} is unknown: " + (f"did you mean {near[0]!r}?" if near else "no class has it"))
    return labels.index(label)


def classification_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads classified rows: one that is no real token of any row.

    transformers' decoders classify by the rightmost token that is not `config.pad_token_id`
    (GenericForSequenceClassification), so a real last token equal to it would be passed over.  Order: the tokenizer's
    pad token unless it doubles as unk; eos; another special token; unk.  Tokens which the tokenizer adds to rows (some
    end them with eos) are out; a row whose text brings the chosen one is a bad row (Tokenising).

    Raises:
        ValueError: the tokenizer has no such token.
    """
    added = {*tokenizer("a")["input_ids"], *tokenizer("a", "a")["input_ids"]}
    unk = tokenizer.unk_token_id
    wanted = [tokenizer.pad_token_id if tokenizer.pad_token_id != unk else None, tokenizer.eos_token_id]
    special = sorted(set(tokenizer.all_special_ids) - {unk})
    for token in (*wanted, *special, unk):
        if token is not None and token not in added:
            return int(token)
    raise ValueError(
        "the tokenizer has no special token free for padding (each one is missing or put into rows); set "
        "tokenizer.pad_token and give the folder as tokenizer_name_or_path"
    )


class _Classified(NamedTuple):
    """A classification row: text, second text or None, class number."""

    text: str
    pair: str | None
    label: int


class _ClassEncoder:
    """Classification rows -> token ids, with the special tokens that the tokenizer itself adds.

    A pair is handed to the tokenizer as a pair if it separates the two with its sep token (BERT, RoBERTa, DeBERTa).  A
    tokenizer without one (Llama's would put a second bos between them) gets both texts joined by a newline.
    """

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        if not settings.labels:
            raise ValueError("data.format=classification needs the names of its labels; find_labels finds them")
        self.settings, self.tokenizer, self.labels = settings, tokenizer, settings.labels
        self.pad = classification_pad_id(tokenizer)
        pair, single = tokenizer("a", "a")["input_ids"], tokenizer("a")["input_ids"]
        sep = tokenizer.sep_token_id
        self.joins = sep is not None and pair.count(sep) > single.count(sep)
        num_added = tokenizer.num_special_tokens_to_add(pair=self.joins and settings.text_pair_field is not None)
        if settings.max_length <= num_added:
            raise ValueError(
                f"max_length={settings.max_length} leaves no room for text beside {num_added} special tokens; raise it"
            )

    def row(self, row: dict[str, Any] | str) -> _Classified:
        assert isinstance(row, dict)
        s = self.settings
        label = _class_number(_label_of(row, s.label_field), self.labels)
        texts = []
        for field in (s.text_field, *(() if s.text_pair_field is None else (s.text_pair_field,))):
            texts.append(_text_of(row, field, None))
            if not texts[-1].strip():
                raise _BadRow(f"the text in field {field!r} is empty")
        return _Classified(texts[0], texts[1] if len(texts) == 2 else None, label)

    def encode(self, rows: Sequence[_Classified], max_length: int | None = None) -> list[_Encoded]:
        """The rows with one call of the tokenizer; nothing is cut without `max_length` (tokens)."""
        if not rows:
            return []
        texts = [row.text if self.joins or row.pair is None else f"{row.text}\n{row.pair}" for row in rows]
        pairs = [row.pair or "" for row in rows] if self.joins and rows[0].pair is not None else None
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "right"
        try:
            encoded = self.tokenizer(
                texts, pairs, truncation=max_length is not None, max_length=max_length, verbose=False
            )
        finally:
            self.tokenizer.truncation_side = side
        ids = encoded["input_ids"]
        # Of a single text the types are all 0, which models assume by themselves.
        types = encoded.get("token_type_ids") if pairs is not None else None
        return [
            _Encoded(i, [False] * len(i), row.label, t, row)
            for row, i, t in zip(rows, ids, types or [[]] * len(ids), strict=True)
        ]

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why a row cannot be used."""
        if not ids:
            return "the text gives no token"
        if self.pad in ids:
            name = self.tokenizer.convert_ids_to_tokens(self.pad)
            return f"the text holds the token that pads batches, {name!r} (id {self.pad})"
        return None


# ---- all rows -> samples ----


class _Encoded(NamedTuple):
    """A row's token ids and loss mask [length]; class number (-1: none), token types ([]: none), and what it was.

    image: its picture; of image rows, whose ids do not hold the picture's tokens.
    """

    ids: list[int]
    mask: list[bool]
    label: int = -1
    token_type_ids: Sequence[int] = ()
    source: _Classified | None = None
    image: StoredImage = StoredImage()


class Sample(NamedTuple):
    """Token ids and loss mask [length]; number of the file, line from 1, piece from 0 of a text that was cut.

    label: class number, -1 outside classification; token_type_ids: [length] where a pair has them, else empty.
    image_path, image_data, image_digest: StoredImage's, of image rows.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    file: int
    line: int
    piece: int
    label: int = -1
    token_type_ids: Sequence[int] = ()
    image_path: str = ""
    image_data: bytes = b""
    image_digest: str = ""


class Tokenising:
    """Walks the files in order and yields samples; counts what it leaves out."""

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings = settings
        self.format = detect_format(settings) if settings.format == "auto" else settings.format
        for path in settings.train_files:
            if is_text(path) and self.format != "text":
                raise ValueError(
                    f"data.format={self.format}, but {path!r} is plain text; use JSONL or data.format: text"
                )
        self.classes = _ClassEncoder(settings, tokenizer) if self.format == "classification" else None
        self.encoder = _Encoder(settings, tokenizer, self.format)
        self.counts = {"rows": 0, "bad": 0, "too_long": 0, "truncated": 0, "samples": 0}

    def batches(self) -> Iterator[list[Sample]]:
        for file, path in enumerate(self.settings.train_files):
            lines = read_rows(path)
            while batch := list(islice(lines, _ROWS_A_BATCH)):
                samples = [s for line, row in self._encode(path, batch) for s in self._fit(file, line, row)]
                self.counts["samples"] += len(samples)
                yield samples

    def _encode(self, path: str, lines: Iterable[tuple[int, bytes | dict[str, Any]]]) -> Iterator[tuple[int, _Encoded]]:
        """(line, row) of every good row of `lines`."""
        good: list[tuple[int, Any]] = []
        for line, content in lines:
            self.counts["rows"] += 1
            try:
                row = _parse(path, content)
                if self.classes is not None:
                    good.append((line, self.classes.row(row)))
                elif self.format == "chat":
                    good.append((line, self.encoder.encode_chat(row, f"{path}:{line}")))
                elif self.format == "image_text":
                    good.append((line, (self.encoder.segments(row), row)))
                else:
                    good.append((line, self.encoder.segments(row)))
            except _BadRow as reason:
                self._bad(path, line, str(reason), reason)
        images: dict[int, StoredImage] = {}
        if self.settings.images is not None:
            images = self._images(path, [(line, row) for line, (_, row) in good])
            good = [(line, segments) for line, (segments, _) in good if line in images]
        encoded = self._encode_rows([row for _, row in good])
        for (line, _), one in zip(good, encoded, strict=True):
            if images:
                one = one._replace(image=images[line])
            if self.classes is not None:
                problem = self.classes.problem(one.ids)
            else:
                problem = None if any(one.mask[1:]) else "no target token"
            if problem is None:
                yield line, one
            else:
                self._bad(path, line, problem, None)

    def _images(self, path: str, rows: list[tuple[int, dict[str, Any]]]) -> dict[int, StoredImage]:
        """Line -> picture of the rows whose picture is whole."""
        assert self.settings.images is not None
        found: list[StoredImage | BadImageError] = []
        for _, row in rows:
            try:
                found.append(image_of(row, self.settings.images.field))
            except BadImageError as reason:
                found.append(reason)
        out = {}
        for (line, _), image in zip(rows, check_images(found, os.path.dirname(path)), strict=True):
            if isinstance(image, BadImageError):
                self._bad(path, line, str(image), image)
            else:
                out[line] = image
        return out

    def _encode_rows(self, rows: list[Any]) -> list[_Encoded]:
        if self.classes is not None:
            return self.classes.encode(rows)
        return [_Encoded(*row) for row in (rows if self.format == "chat" else self.encoder.encode_segments(rows))]

    def _bad(self, path: str, line: int, reason: str, cause: Exception | None) -> None:
        if self.settings.on_bad_row == "error":
            raise DataError(path, line, reason, _FIX_OR_SKIP) from cause
        self.counts["bad"] += 1

    def _fit(self, file: int, line: int, row: _Encoded) -> list[Sample]:
        """The row as samples of at most max_length tokens, as truncation and packing say."""
        room = 0 if self.settings.images is None else self.settings.images.num_tokens
        limit = self.settings.max_length - room
        ids, mask = row.ids, row.mask
        if len(ids) <= limit:
            return [Sample(ids, mask, file, line, 0, row.label, row.token_type_ids, *row.image)]
        if self.format == "text" and self.settings.packing:
            starts = range(0, len(ids), limit)
            cuts = [*starts, len(ids)]
            if cuts[-1] - cuts[-2] == 1 and limit > 2:
                cuts[-2] -= 1  # a piece of one token would have no target
            spans = [(a, b) for a, b in pairwise(cuts) if b - a > 1]
            return [Sample(ids[a:b], mask[a:b], file, line, piece) for piece, (a, b) in enumerate(spans)]
        if self.settings.truncation == "error":
            raise DataError(
                self.settings.train_files[file],
                line,
                f"the row has {len(ids) + room} tokens, max_length={self.settings.max_length}",
                "raise max_length, or set truncation to drop or right",
            )
        if self.classes is not None and self.settings.truncation == "right":
            assert row.source is not None
            (cut,) = self.classes.encode([row.source], limit)
            self.counts["truncated"] += 1
            return [Sample(cut.ids, cut.mask, file, line, 0, cut.label, cut.token_type_ids)]
        if self.settings.truncation == "right" and any(mask[1:limit]):
            self.counts["truncated"] += 1
            return [Sample(ids[:limit], mask[:limit], file, line, 0, -1, (), *row.image)]
        self.counts["too_long"] += 1  # with `right`: the prompt alone fills max_length
        return []
