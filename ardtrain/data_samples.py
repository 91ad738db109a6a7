"""From rows to token ids: templates, chats, truncation.  One sample after the other, in file order.

A *sample* is one tokenised document, or a piece of one, with the line it came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from ardtrain.data_labels import ClassEncoder, Classified, ClassRow
from ardtrain.data_rows import FIX_OR_SKIP, BadRow, DataSettings, detect_format, messages_of, parse_row, text_of
from ardtrain.data_sources import DataError, is_text, read_rows
from ardtrain.images import BadImageError, StoredImage, check_images, image_of, text_problem

_ROWS_A_BATCH = 512  # rows tokenised at once


# ---- one row -> token ids and loss mask ----


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
            text = row if isinstance(row, str) else text_of(row, s.text_field, None)
            if not text.strip():
                raise BadRow("the text is empty")
            return [(text, True)]
        assert isinstance(row, dict)
        prompt = text_of(row, s.prompt_field, s.prompt_template)
        completion = text_of(row, s.completion_field, s.completion_template)
        if not completion.strip():
            raise BadRow("the completion is empty: no target token")
        if self.format == "image_text":
            problem = text_problem(prompt, completion, self.tokenizer)
            if problem:
                raise BadRow(problem)
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
        messages = messages_of(row, self.settings.messages_field)
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
            raise BadRow(f"the chat template refuses the messages: {error}") from error
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


# ---- all rows -> samples ----


class _Encoded(NamedTuple):
    """A row's token ids and loss mask [length]; class number (-1: none), token types ([]: none), and what it was.

    image: its picture; of image rows, whose ids do not hold the picture's tokens.
    """

    ids: list[int]
    mask: list[bool]
    label: int = -1
    token_type_ids: Sequence[int] = ()
    source: Classified | None = None
    image: StoredImage = StoredImage()


def _of_class(row: ClassRow) -> _Encoded:
    """A row without targets."""
    return _Encoded(row.ids, [False] * len(row.ids), row.label, row.token_type_ids, row.source)


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
        self.classes = ClassEncoder(settings, tokenizer) if self.format == "classification" else None
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
                row = parse_row(path, content)
                if self.classes is not None:
                    good.append((line, self.classes.row(row)))
                elif self.format == "chat":
                    good.append((line, self.encoder.encode_chat(row, f"{path}:{line}")))
                elif self.format == "image_text":
                    good.append((line, (self.encoder.segments(row), row)))
                else:
                    good.append((line, self.encoder.segments(row)))
            except BadRow as reason:
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
            return [_of_class(row) for row in self.classes.encode(rows)]
        return [_Encoded(*row) for row in (rows if self.format == "chat" else self.encoder.encode_segments(rows))]

    def _bad(self, path: str, line: int, reason: str, cause: Exception | None) -> None:
        if self.settings.on_bad_row == "error":
            raise DataError(path, line, reason, FIX_OR_SKIP) from cause
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
            (cut,) = map(_of_class, self.classes.encode([row.source], limit))
            self.counts["truncated"] += 1
            return [Sample(cut.ids, cut.mask, file, line, 0, cut.label, cut.token_type_ids)]
        if self.settings.truncation == "right" and any(mask[1:limit]):
            self.counts["truncated"] += 1
            return [Sample(ids[:limit], mask[:limit], file, line, 0, -1, (), *row.image)]
        self.counts["too_long"] += 1  # with `right`: the prompt alone fills max_length
        return []
