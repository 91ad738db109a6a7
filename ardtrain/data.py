"""From samples to grains: collation, training and held-out data.

data_samples.py turns files into samples, data_cache.py keeps these on disk, data_mix.py joins several sources,
data_order.py says which samples make up which step.
Letters: B batch (rows of a grain), T tokens.  Labels are -100 where there is no loss and are *not* shifted: the logits
at t are compared with `labels[:, t + 1]`.
Nothing here knows how many processes there are; none of it communicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ardtrain.data_cache import Samples, tokenizer_fingerprint
from ardtrain.data_labels import classification_pad_id, find_labels
from ardtrain.data_mix import Drawn, Mixture, Share, Source, open_samples
from ardtrain.data_order import Cursor, Grain, RowRef, TrainOrder, cut_grains, pack, permutation
from ardtrain.data_rows import DataSettings
from ardtrain.data_sources import DataError
from ardtrain.images import BadImageError, ImageReader
from ardtrain.prefix_mask import token_types
from ardtrain.ranks import named_seed

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Cursor",
    "DataError",
    "DataSettings",
    "EvalData",
    "Grain",
    "RowRef",
    "Samples",
    "Source",
    "TrainData",
    "build_batch",
    "find_labels",
    "tokenizer_fingerprint",
]

IGNORE_INDEX = -100
_PURPOSE_CHOICE = 3  # beside data_order's: held-out samples drawn by EvalData


@dataclass(frozen=True)
class Batch:
    """Tensors of one grain, on the CPU.

    input_ids: [B, T] int64.
    labels: [B, T] int64, not shifted; -100 on prompts, on padding and on every document's first token.
    position_ids: [B, T] int64, from 0 in each document; on padding 0, in packed rows from 0 as if it were a document.
    attention_mask: [B, T] bool, True on tokens; None when packed: position_ids tell documents apart (packing.py).
    num_target_tokens: terms of the summed loss: target tokens, in classification rows.
    num_tokens: tokens without padding.
    class_labels: [B] int64 class numbers; None outside classification.
    token_type_ids: [B, T] int64, 1 on the second text of a pair, 0 on padding; None where the tokenizer gives none.
        With pictures 0 on picture and prompt, 1 on the answer and on padding.
    pixel_values: [B, 3, height, width] float32, a picture a row; None without pictures. positions count from 1 then.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    num_target_tokens: int
    num_tokens: int
    class_labels: Tensor | None = None
    token_type_ids: Tensor | None = None
    pixel_values: Tensor | None = None

    def targets(self) -> tuple[Tensor, Tensor]:
        """Positions [n] among B * T whose next token is a target, in order, and those tokens [n]; both int64."""
        following = F.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)  # what each position predicts
        places = torch.nonzero(following != IGNORE_INDEX).view(-1)
        return places, following[places]


# ---- collation ----


def build_batch(
    rows: Sequence[Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.bool_]]]],
    *,
    packed: bool,
    pad_token_id: int,
    class_labels: Sequence[int] | None = None,
    token_type_ids: Sequence[npt.NDArray[np.integer]] | None = None,
) -> Batch:
    """The tensors of rows of samples, padded on the right to the longest row.

    Args:
        rows: B rows, each of (input_ids [length], loss_mask [length]) samples; one sample each unless `packed`.
        class_labels: B class numbers, for classification; no token has loss then.
        token_type_ids: of each row, [length].
    """
    assert packed or all(len(row) == 1 for row in rows)
    assert class_labels is None or (not packed and len(class_labels) == len(rows))
    width = max(sum(len(ids) for ids, _ in row) for row in rows)
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    is_token = np.zeros(shape, dtype=np.bool_)
    for b, row in enumerate(rows):
        end = 0
        for ids, loss_mask in row:
            start, end = end, end + len(ids)
            input_ids[b, start:end] = ids
            if class_labels is None:
                labels[b, start + 1 : end] = np.where(loss_mask[1:], ids[1:], IGNORE_INDEX)
            position_ids[b, start:end] = np.arange(len(ids))
            is_token[b, start:end] = True
        if packed:
            position_ids[b, end:] = np.arange(width - end)
    types = None if token_type_ids is None else np.zeros(shape, dtype=np.int64)
    if types is not None:
        for b, row_types in enumerate(token_type_ids or ()):
            types[b, : len(row_types)] = row_types
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=None if packed else torch.from_numpy(is_token),
        num_target_tokens=int((labels[:, 1:] != IGNORE_INDEX).sum()) if class_labels is None else len(rows),
        num_tokens=int(is_token.sum()),
        class_labels=None if class_labels is None else torch.tensor(class_labels, dtype=torch.int64),
        token_type_ids=None if types is None else torch.from_numpy(types),
    )


class _Collator:
    """Grains -> tensors; a grain's tensors depend on the grain alone."""

    def __init__(
        self, samples: Samples | Mixture, tokenizer: PreTrainedTokenizerBase, packed: bool, images: ImageReader | None
    ) -> None:
        assert (images is not None) == (samples.format == "image_text")
        self._samples, self._images = samples, images
        self._packed = packed
        self._classifies = samples.format == "classification"
        # Of a language model padding is never seen and never a target, so any valid id serves.
        wanted = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = (
            classification_pad_id(tokenizer) if self._classifies else next(t for t in wanted if t is not None)
        )

    def collate(self, grain: Grain) -> Batch:
        """The grain's tensors."""
        samples = [sample for row in grain.rows for sample in row.samples]
        read = iter(self._samples.read(samples))
        rows = [list(islice(read, len(row.samples))) for row in grain.rows]
        if self._images is not None:
            return self._with_images(self._images, samples, [row for (row,) in rows])
        if not self._classifies:
            return build_batch(rows, packed=self._packed, pad_token_id=self.pad_token_id)
        labels, types = self._samples.classes(samples)
        return build_batch(
            rows,
            packed=False,
            pad_token_id=self.pad_token_id,
            class_labels=labels,
            token_type_ids=types if any(map(len, types)) else None,
        )

    def _with_images(
        self, reader: ImageReader, samples: Sequence[int], rows: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    ) -> Batch:
        """Picture tokens, then the row; positions from 1, as PaliGemma counts."""
        picture = np.full(reader.settings.num_tokens, reader.settings.token_id)
        whole = [
            (np.concatenate([picture, ids]), np.concatenate([np.zeros(len(picture), dtype=np.bool_), mask]))
            for ids, mask in rows
        ]
        batch = build_batch([[row] for row in whole], packed=False, pad_token_id=self.pad_token_id)
        types = token_types([int(mask.argmax()) for _, mask in whole], batch.input_ids.shape[1])
        pixels = []
        for sample in samples:
            try:
                pixels.append(reader.pixels(*self._samples.images([sample])))
            except BadImageError as reason:
                (place,) = self._samples.ids([sample])
                raise RuntimeError(
                    f"{place}: {reason}; put the file back, or remove {self._samples.cached_in(sample)} and start anew"
                ) from reason
        return replace(batch, position_ids=batch.position_ids + 1, token_type_ids=types, pixel_values=torch.cat(pixels))

    def sample_ids(self, grain: Grain) -> list[str]:
        """`file:line` of every sample in the grain, for messages."""
        return self._samples.ids([sample for row in grain.rows for sample in row.samples])


class TrainData:
    """The training data of a run: which samples make up each step, and their tensors.

    Args:
        settings: its train_files, unless there are sources, which then bring files and fields of their own.
        cache_dir: folder of the tokenised samples, shared by processes and runs.
        global_batch_size, grain_size: rows of a step and of a grain (per_device_train_batch_size).
        num_train_epochs, max_steps: length of the run; max_steps wins.
        images: makes pixels of the rows' pictures (format image_text).
        sources: named data sets instead of train_files, with weights or without.
    Raises:
        DataError, ValueError: see Samples, Mixture and TrainOrder.
    Attributes:
        num_steps: T.  num_grains: grains of a full step.  num_samples.  counts, format: see Samples.
        shares: what an epoch draws of each source; none without sources.
        pad_token_id: what batches are padded with; a classification model's config must say the same (load_model).
        fingerprint: sha256 (hex) of all that decides the lists of rows (samples, packing, seed): a checkpoint keeps
            it, and a cursor is valid under an equal fingerprint only.

    Not a function of the number of processes; any step may be asked for at any time.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        cache_dir: str | Path,
        *,
        global_batch_size: int,
        grain_size: int,
        num_train_epochs: float | None = None,
        max_steps: int | None = None,
        images: ImageReader | None = None,
        sources: Sequence[Source] = (),
    ) -> None:
        samples = open_samples(settings, sources, tokenizer, cache_dir)
        self._mixture = samples if isinstance(samples, Mixture) else None
        self.shares: Sequence[Share] = () if self._mixture is None else self._mixture.shares
        self._order = TrainOrder(
            samples.lengths,
            seed=settings.seed,
            capacity=settings.max_length if settings.packing else None,
            global_batch_size=global_batch_size,
            grain_size=grain_size,
            num_train_epochs=num_train_epochs,
            max_steps=max_steps,
            parts=() if self._mixture is None else self._mixture.parts,
        )
        self._collator = _Collator(samples, tokenizer, settings.packing, images)
        self.counts = samples.counts
        self.format = samples.format
        self.pad_token_id = self._collator.pad_token_id
        self.num_samples = len(samples.lengths)
        self.num_steps = self._order.num_steps
        self.num_grains = self._order.num_grains
        self.fingerprint = hashlib.sha256(f"{samples.cache_key} seed {settings.seed}".encode()).hexdigest()

    def num_rows(self, epoch: int) -> int:
        """Rows of `epoch`; with packing epochs differ."""
        return self._order.num_rows(epoch)

    def rows_of_step(self, step: int) -> list[RowRef]:
        """See TrainOrder.rows_of_step."""
        return self._order.rows_of_step(step)

    def grains(self, step: int) -> list[Grain]:
        """The micro-batches of `step` (from 0)."""
        return self._order.grains(step)

    def cursor(self, step: int) -> Cursor:
        """Where `step` begins."""
        return self._order.cursor(step)

    def drawn(self, step: int) -> dict[str, Drawn]:
        """What the steps before `step` trained on, by source; {} without sources. Cost: the order of all epochs."""
        return {} if self._mixture is None else self._mixture.drawn(self._order.samples_before(step))

    def collate(self, grain: Grain) -> Batch:
        """The grain's tensors."""
        return self._collator.collate(grain)

    def sample_ids(self, grain: Grain) -> list[str]:
        """`file:line` of every sample in the grain, for messages."""
        return self._collator.sample_ids(grain)


class EvalData:
    """Held-out data as grains in file order, never shuffled; packed if training is.

    Args:
        settings: the training's, or a changed copy (other fields); its train_files are not read.
        files: the held-out files; none where there are sources.
        max_samples: only the first so many samples, of each source.
        choose: (count, seed): instead, `count` samples drawn without replacement by the seed, in file order.
        images: see TrainData. sources: named held-out files, whose rows no grain mixes.
    Attributes:
        num_samples.  counts, format: see Samples (of the whole files).  pad_token_id: see TrainData.
    Raises:
        ValueError: the files hold fewer samples than are to be drawn.  DataError, ValueError: see Samples.
    """

    def __init__(
        self,
        settings: DataSettings,
        files: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        cache_dir: str | Path,
        *,
        grain_size: int,
        max_samples: int | None = None,
        choose: tuple[int, int] | None = None,
        images: ImageReader | None = None,
        sources: Sequence[Source] = (),
    ) -> None:
        if grain_size <= 0 or (max_samples is not None and max_samples <= 0):
            raise ValueError(f"grain_size={grain_size} and max_samples={max_samples} must be above 0")
        if choose is not None and max_samples is not None:
            raise ValueError(f"max_samples={max_samples} and choose={choose} exclude each other; give one")
        if not sources:
            settings = replace(settings, train_files=tuple(files))
        samples = open_samples(settings, sources, tokenizer, cache_dir)
        starts = samples.starts.tolist() if isinstance(samples, Mixture) else [0, len(samples.lengths)]
        chosen: Sequence[int] = range(len(samples.lengths))
        if choose is not None:
            named = files or [file for source in sources for file in source.settings.train_files]
            chosen = _choose(len(samples.lengths), *choose, files=named)
        names = [source.name for source in sources] or [""]
        self._grains: list[Grain] = []
        self.num_samples = num_rows = 0
        for name, (start, stop) in zip(names, pairwise(starts), strict=True):
            order = [sample for sample in chosen if start <= sample < stop][:max_samples]
            packed = pack(order, samples.lengths, settings.max_length) if settings.packing else [(s,) for s in order]
            rows = [RowRef(0, num_rows + i, row) for i, row in enumerate(packed)]
            cut = cut_grains(rows, grain_size, first=len(self._grains))
            self._grains += [replace(grain, source=name) for grain in cut]
            self.num_samples, num_rows = self.num_samples + len(order), num_rows + len(rows)
        self._collator = _Collator(samples, tokenizer, settings.packing, images)
        self.counts = samples.counts
        self.format = samples.format
        self.pad_token_id = self._collator.pad_token_id

    def grains(self) -> list[Grain]:
        """All grains, numbered from 0."""
        return list(self._grains)

    def collate(self, grain: Grain) -> Batch:
        """The grain's tensors."""
        return self._collator.collate(grain)

    def sample_ids(self, grain: Grain) -> list[str]:
        """`file:line` of every sample in the grain, for messages."""
        return self._collator.sample_ids(grain)


def _choose(num_samples: int, count: int, seed: int, *, files: Sequence[str]) -> Sequence[int]:
    """`count` of the samples 0 .. num_samples - 1, drawn without replacement by the seed, sorted.

    Through data_order.permutation, as Generator.choice may change between NumPy's versions.
    """
    if count <= 0:
        raise ValueError(f"count={count} samples to draw must be above 0")
    if num_samples < count:
        raise ValueError(f"{', '.join(files)} holds {num_samples} samples, fewer than count={count}; lower the count")
    order = permutation(num_samples, seed=named_seed("held-out samples", seed), epoch=0, purpose=_PURPOSE_CHOICE)
    return sorted(order[:count].tolist())
