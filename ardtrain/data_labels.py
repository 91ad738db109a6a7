"""Classification: the classes that rows name, and rows of one text or a pair as token ids."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ardtrain.data_rows import FIX_OR_SKIP, BadRow, DataSettings, kind_of, parse_row, text_of
from ardtrain.data_sources import DataError, check_source, is_text, read_rows

_MOST_LABELS = 1 << 16  # an integer label beyond it is a slip, not a class


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
                row = parse_row(path, content)
                assert isinstance(row, dict)
                label = _label_of(row, settings.label_field)
                if labels:
                    _class_number(label, labels)
            except BadRow as reason:
                if settings.on_bad_row == "error":
                    raise DataError(path, line, str(reason), FIX_OR_SKIP) from reason
                continue
            other = first.get(str if isinstance(label, int) else int)
            if other is not None:
                raise DataError(
                    path, line, f"label {label!r} is {kind_of(label)}, unlike {other}", "write all labels the same way"
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
        raise BadRow(f"field {field!r} is missing")
    label = row[field]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise BadRow(f"label {label!r} in field {field!r} is {kind_of(label)}, neither a whole number nor text")
    if label == "":
        raise BadRow(f"the label in field {field!r} is empty")
    if isinstance(label, int) and not 0 <= label < _MOST_LABELS:
        raise BadRow(f"label {label} in field {field!r} is outside 0 .. {_MOST_LABELS - 1}")
    return label


def _class_number(label: int | str, labels: tuple[str, ...]) -> int:
    """Number of the class that a row's label means."""
    if isinstance(label, int):
        if label >= len(labels):
            raise BadRow(f"label {label} is unknown: there are {len(labels)} classes, 0 .. {len(labels) - 1}")
        return label
    if label not in labels:
        near = difflib.get_close_matches(label, labels, n=1)
        raise BadRow(f"label {label!r} is unknown: " + (f"did you mean {near[0]!r}?" if near else "no class has it"))
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


class Classified(NamedTuple):
    """A classification row: text, second text or None, class number."""

    text: str
    pair: str | None
    label: int


class ClassRow(NamedTuple):
    """Token ids of a classification row, its class number, its token types ([]: none), and what it was."""

    ids: list[int]
    label: int
    token_type_ids: Sequence[int]
    source: Classified


class ClassEncoder:
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

    def row(self, row: dict[str, Any] | str) -> Classified:
        assert isinstance(row, dict)
        s = self.settings
        label = _class_number(_label_of(row, s.label_field), self.labels)
        texts = []
        for field in (s.text_field, *(() if s.text_pair_field is None else (s.text_pair_field,))):
            texts.append(text_of(row, field, None))
            if not texts[-1].strip():
                raise BadRow(f"the text in field {field!r} is empty")
        return Classified(texts[0], texts[1] if len(texts) == 2 else None, label)

    def encode(self, rows: Sequence[Classified], max_length: int | None = None) -> list[ClassRow]:
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
        return [ClassRow(i, row.label, t, row) for row, i, t in zip(rows, ids, types or [[]] * len(ids), strict=True)]

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why a row cannot be used."""
        if not ids:
            return "the text gives no token"
        if self.pad in ids:
            name = self.tokenizer.convert_ids_to_tokens(self.pad)
            return f"the text holds the token that pads batches, {name!r} (id {self.pad})"
        return None
