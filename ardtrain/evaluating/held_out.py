"""Held-out loss and metrics as training computes them, and what each row adds to them.

The pass is evaluation.held_out_loss itself, so its figures are those that a run logs at the same checkpoint; the rows'
parts are noted on the way. Letters: B rows of a grain, N rows in all, n targets, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardtrain.collectives import World, deal
from ardtrain.data import Batch, EvalData, Grain
from ardtrain.evaluating.intervals import Bootstrap, Figure, Floats, Integers
from ardtrain.evaluation import (
    HeldOut,
    class_logits,
    classification_metrics,
    gather_rows,
    held_out_loss,
    language_arguments,
)
from ardtrain.logits import LogitHead

_COLUMNS = 4  # of a row: bits of its summed loss, its targets, class, predicted class


@dataclass(frozen=True)
class Rows:
    """What each sample adds, in the file's order, alike on every process.

    losses: [N] float64, summed cross-entropy. targets: [N] terms of it. classes, predicted: [N], -1 outside
    classification. ids: `file:line` of each. num_classes: 0 outside classification.
    """

    losses: Floats
    targets: Integers
    classes: Integers
    predicted: Integers
    ids: tuple[str, ...]
    num_classes: int = 0


class _Noting:
    """held_out_loss's data and its loss in one, which notes each row's part of a grain. See evaluation.loss_sum."""

    def __init__(self, data: EvalData, logit_head: LogitHead | None) -> None:
        self._data, self._logit_head = data, logit_head
        self._grain: Grain | None = None
        self.rows: dict[int, Tensor] = {}  # grain -> [B, _COLUMNS]

    def grains(self) -> Sequence[Grain]:
        return self._data.grains()

    def collate(self, grain: Grain) -> Batch:
        self._grain = grain
        return self._data.collate(grain)

    def __call__(self, module: nn.Module, batch: Batch, *, device: torch.device) -> Tensor:
        assert self._grain is not None
        if batch.class_labels is not None:
            logits, labels = class_logits(module, batch, device=device), batch.class_labels.to(device)
            losses = F.cross_entropy(logits, labels, reduction="none")
            self.rows[self._grain.index] = _table(losses, torch.ones_like(labels), labels, logits.argmax(-1))
            return F.cross_entropy(logits, labels, reduction="sum")
        total, losses = self._of_tokens(module, batch, device=device)
        places, _ = batch.targets()
        sample = sample_of_target(batch, places).to(device)
        num_samples = sum(len(row.samples) for row in self._grain.rows)
        summed = torch.zeros(num_samples, dtype=torch.float64, device=device)
        summed.scatter_add_(0, sample, losses.double())
        unknown = torch.full((num_samples,), -1, device=device)
        self.rows[self._grain.index] = _table(summed, sample.bincount(minlength=num_samples), unknown, unknown)
        return total

    def _of_tokens(self, module: nn.Module, batch: Batch, *, device: torch.device) -> tuple[Tensor, Tensor]:
        """The grain's loss, by the operations of evaluation.token_loss_sum, and [n] of each target."""
        arguments = language_arguments(module, batch, device=device)
        if self._logit_head is not None:
            places, targets = batch.targets()
            losses = self._logit_head.losses(module, arguments, places.to(device), targets.to(device))
            return losses.sum(), losses
        labels = batch.labels.to(device)[:, 1:].reshape(-1)
        logits = module(**arguments).logits
        flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        each = F.cross_entropy(flat, labels, ignore_index=-100, reduction="none")
        return F.cross_entropy(flat, labels, ignore_index=-100, reduction="sum"), each[labels != -100]


def _table(losses: Tensor, targets: Tensor, classes: Tensor, predicted: Tensor) -> Tensor:
    return torch.stack([losses.double().view(torch.int64), targets, classes, predicted], dim=1)


def sample_of_target(batch: Batch, places: Tensor) -> Tensor:
    """[n] which of the grain's samples, in order, each target belongs to; every sample has one at least.

    places: [n] of Batch.targets. Packed rows hold several samples, told apart by positions that start again at 0.
    """
    owner = places // batch.input_ids.shape[1]
    if batch.attention_mask is None:
        owner = (batch.position_ids.reshape(-1) == 0).cumsum(0)[places]
    return torch.unique_consecutive(owner, return_inverse=True)[1]


def evaluate_rows(
    module: nn.Module,
    data: EvalData,
    *,
    world: World,
    logit_head: LogitHead | None,
    num_classes: int,
    between: Callable[[], None],
) -> tuple[HeldOut, Rows]:
    """One pass over the held-out rows. All processes must call this; module in eval mode or not.

    between: see held_out_loss.
    """
    noting = _Noting(data, logit_head)
    held_out = held_out_loss(module, noting, world=world, loss_sum=noting, between=between)
    grains = data.grains()
    counted = {g for g, counts in deal(len(grains), world.world_size, world.global_rank) if counts}
    own = {grain: rows for grain, rows in noting.rows.items() if grain in counted}
    sizes = [sum(len(row.samples) for row in grain.rows) for grain in grains]
    table = gather_rows(own, sizes, world, columns=_COLUMNS)
    samples = [sample for grain in grains for row in grain.rows for sample in row.samples]
    ids = [name for grain in grains for name in data.sample_ids(grain)]
    order = np.argsort(samples)  # packing moves them
    table = table[order]
    losses = np.ascontiguousarray(table[:, 0]).view(np.float64)
    return held_out, Rows(losses, table[:, 1], table[:, 2], table[:, 3], tuple(ids[i] for i in order), num_classes)


def held_out_figures(held_out: HeldOut, rows: Rows, wanted: Sequence[str], bootstrap: Bootstrap) -> dict[str, Figure]:
    """The wanted metrics with intervals; values are those of `held_out`, to the bit."""
    loss = bootstrap.ratio(held_out.loss, rows.losses, rows.targets.astype(np.float64))
    known = {"loss": loss, "perplexity": loss.map(lambda value: HeldOut(value, 1).perplexity)}
    if rows.num_classes:
        known |= _of_classes(held_out.metrics, rows, bootstrap)
    elif "exact_match" in held_out.metrics:
        count = len(rows.losses)
        hits = round(held_out.metrics["exact_match"] * count)
        known["token_match"] = bootstrap.mean(np.repeat([1.0, 0.0], [hits, count - hits]))
    return {name: known[name] for name in wanted}


def _of_classes(values: Mapping[str, float], rows: Rows, bootstrap: Bootstrap) -> dict[str, Figure]:
    """Metrics of classes: they hang on how often each pair of class and prediction occurs, so pairs are counted."""
    if not bootstrap.samples:
        return {name: Figure(value) for name, value in values.items()}
    pairs, of_row = np.unique(np.stack([rows.classes, rows.predicted], axis=1), axis=0, return_inverse=True)
    resampled = []
    for draws in bootstrap.draws(len(of_row)):
        for numbers in of_row.reshape(-1)[draws]:
            weights = np.bincount(numbers, minlength=len(pairs))
            labels, predicted = pairs[weights > 0].T
            counts = weights[weights > 0]
            resampled.append(classification_metrics(labels, predicted, num_classes=rows.num_classes, weights=counts))
    return {
        name: bootstrap.interval(value, np.array([metrics[name] for metrics in resampled]))
        for name, value in values.items()
    }
