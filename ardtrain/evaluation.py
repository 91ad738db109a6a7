"""Losses of a grain, and held-out loss and metrics: grains in a fixed order, dealt over the processes, summed exactly.

Letters: B batch, T tokens, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardtrain.collectives import ExactSum, World, deal
from ardtrain.data import Batch
from ardtrain.logits import LogitHead, replaced
from ardtrain.packing import packed_arguments
from ardtrain.tracing import part


class Grains(Protocol):
    """Held-out data (data.EvalData)."""

    def grains(self) -> Sequence[Any]: ...

    def collate(self, grain: Any) -> Batch: ...


@dataclass(frozen=True)
class HeldOut:
    """loss: mean over the terms of the loss, nats; num_tokens: those terms, target tokens or, in classification, rows.

    metrics: of classification (classification_metrics); of rows with pictures exact_match, the share of rows whose
    answer greedy decoding would write, eos included; else empty.
    others: NAME_loss of each source, where the rows come from several; metrics of generated answers.
    """

    loss: float
    num_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Of a language model; says nothing in classification."""
        return math.exp(min(self.loss, 700.0))

    def numbers(self) -> dict[str, float]:
        """Everything worth recording, by name: loss, perplexity or the metrics, the others."""
        return {"loss": self.loss, **(self.metrics or {"perplexity": self.perplexity}), **self.others}


def class_logits(module: nn.Module, batch: Batch, *, device: torch.device) -> Tensor:
    """[B, C] float32, the classes' logits of each row.

    No position_ids: a RoBERTa counts its own from the padding, the others count from 0 as rows are padded on the right.
    """
    assert batch.attention_mask is not None, "rows of classes are not packed"
    types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids.to(device)}
    logits: Tensor = module(
        input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device, torch.int64), **types
    ).logits
    return logits.float()


def image_inputs(batch: Batch, *, device: torch.device) -> dict[str, Tensor]:
    """What a model that sees pictures takes beside the text, on the device; nothing without pictures."""
    if batch.pixel_values is None:
        return {}
    assert batch.token_type_ids is not None
    return {"pixel_values": batch.pixel_values.to(device), "token_type_ids": batch.token_type_ids.to(device)}


def model_inputs(batch: Batch, *, device: torch.device) -> dict[str, Tensor]:
    """What a language model's forward takes, each [B, ...] on the device."""
    inputs = {"input_ids": batch.input_ids.to(device), "position_ids": batch.position_ids.to(device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask.to(device, torch.int64)
    return inputs | image_inputs(batch, device=device)


def language_arguments(module: nn.Module, batch: Batch, *, device: torch.device) -> dict[str, Any]:
    """All that a language model's forward takes for a grain's losses: no cache, and the documents of packed rows."""
    arguments: dict[str, Any] = {**model_inputs(batch, device=device), "use_cache": False}
    if batch.attention_mask is None:
        arguments |= packed_arguments(module, arguments["position_ids"])
    return arguments


def token_loss_sum(
    module: nn.Module,
    batch: Batch,
    *,
    device: torch.device,
    logit_head: LogitHead | None = None,
) -> Tensor:
    """Scalar float32: sum of the cross-entropy over the grain's target tokens.

    Args:
        logit_head: computes the logits at the targets alone, chunk by chunk; None: those of all tokens at once.
    """
    arguments = language_arguments(module, batch, device=device)
    if logit_head is not None:
        places, targets = batch.targets()
        return logit_head.loss_sum(module, arguments, places.to(device), targets.to(device))
    labels = batch.labels.to(device)
    logits = module(**arguments).logits
    with part("loss"):
        return F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
            labels[:, 1:].reshape(-1),
            ignore_index=-100,
            reduction="sum",
        )


class LossSum(Protocol):
    """A grain's summed loss, as `loss_sum`."""

    def __call__(self, module: nn.Module, batch: Batch, *, device: torch.device) -> Tensor: ...


def loss_sum(
    module: nn.Module,
    batch: Batch,
    *,
    device: torch.device,
    logit_head: LogitHead | None = None,
) -> Tensor:
    """Scalar float32: the grain's summed cross-entropy, over rows where they have classes, else over target tokens.

    Args:
        logit_head: see token_loss_sum.
    """
    if batch.class_labels is None:
        return token_loss_sum(module, batch, device=device, logit_head=logit_head)
    return F.cross_entropy(class_logits(module, batch, device=device), batch.class_labels.to(device), reduction="sum")


@contextmanager
def _record_logits(module: nn.Module, *, wanted: bool) -> Iterator[list[Tensor]]:
    """The logits of the module's forwards meanwhile, where wanted: a loss and its predictions need one forward."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return

    def record(module: nn.Module, inputs: object, output: Any) -> None:
        seen.append(output.logits.detach())

    handle = module.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _record_predictions(module: nn.Module, *, wanted: bool) -> Iterator[list[Tensor]]:
    """The likeliest token wherever the output embedding runs meanwhile, where wanted; soft caps do not change it."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return

    def remember(own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        logits = own(x)
        seen.append(logits.detach().argmax(-1).view(-1))
        return logits

    get_head: Any = module.get_output_embeddings
    with replaced(get_head(), remember):
        yield seen


def count_answers(batch: Batch, predictions: Tensor) -> int:
    """Rows whose every target is the likeliest token after those before it: what greedy decoding would write.

    predictions: [n] at the batch's targets, or [B * T] at all tokens.
    """
    places, targets = (values.to(predictions.device) for values in batch.targets())
    found = predictions if len(predictions) == len(places) else predictions[places]
    wrong = (places // batch.input_ids.shape[1])[found != targets].unique()
    return len(batch.input_ids) - len(wrong)


def held_out_loss(
    module: nn.Module,
    data: Grains,
    *,
    world: World,
    loss_sum: LossSum = loss_sum,
    between: Callable[[], None] = lambda: None,
) -> HeldOut:
    """The loss over all held-out grains; the same bits for any number of processes. All processes must call this.

    Of classification and of rows with pictures also the metrics; one more sum over the processes.

    Args:
        between: called after each round of grains, equally often on every process; it may raise.
    """
    grains = data.grains()
    total = ExactSum(0, len(grains), exponent=0, device=world.device)
    nothing = torch.zeros(0, device=world.device)
    predicted: dict[int, Tensor] = {}  # grain -> [B, 2] class and predicted class
    num_classes, pictures = 0, False
    answers = torch.zeros(2, dtype=torch.int64, device=world.device)  # rows answered as they should be, rows
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for index, counted in deal(len(grains), world.world_size, world.global_rank):
            batch = data.collate(grains[index])
            classes = batch.class_labels
            # Not of a language model: its logits are large, and would be kept longer than they are needed.
            pictures = batch.pixel_values is not None
            with (
                _record_logits(module, wanted=classes is not None) as logits,
                _record_predictions(module, wanted=pictures) as predictions,
            ):
                loss = loss_sum(module, batch, device=world.device)
            if counted:
                total.add(index, loss=loss, gradient=nothing, tokens=batch.num_target_tokens)
            if pictures and counted:
                hits = count_answers(batch, torch.cat(predictions))
                answers += torch.tensor([hits, len(batch.input_ids)], device=world.device)
            if classes is not None:
                num_classes = logits[-1].shape[1]
                if counted:
                    predicted[index] = torch.stack([classes.to(world.device), logits[-1].argmax(-1)], dim=1)
            between()
    module.train(was_training)
    result = total.reduce(world)
    tokens = sum(result.tokens)
    # Every process ran a grain, if only one that is not counted: all of them know whether there are classes, pictures.
    metrics = {}
    if pictures:
        world.add_integers(answers)
        metrics["exact_match"] = int(answers[0]) / int(answers[1])
    if num_classes:
        rows = gather_rows(predicted, result.tokens, world, columns=2)
        metrics = classification_metrics(rows[:, 0], rows[:, 1], num_classes=num_classes)
    sources = [getattr(grain, "source", "") for grain in grains]  # Grains may be of any kind
    others = source_losses(sources, result.losses, result.tokens)
    return HeldOut(math.fsum(result.losses) / max(1, tokens), tokens, metrics, others)


def source_losses(sources: Sequence[str], losses: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """NAME_loss of each source, nats a term of the loss; {} where no grain names one.

    sources: of each grain; losses, tokens: its sum of the loss and that sum's terms.
    """
    out = {}
    for name in dict.fromkeys(name for name in sources if name):
        own = [grain for grain, source in enumerate(sources) if source == name]
        out[f"{name}_loss"] = math.fsum(losses[g] for g in own) / max(1, sum(tokens[g] for g in own))
    return out


def gather_rows(
    own: Mapping[int, Tensor], rows_of_grain: Sequence[int], world: World, *, columns: int
) -> npt.NDArray[np.int64]:
    """[rows, columns] int64 of all grains in their order, each row written by one process. All processes must call.

    own: grain -> its rows [B, columns], of the grains that count for this process alone.
    """
    starts = np.concatenate([[0], np.cumsum(rows_of_grain)])
    rows = torch.zeros((int(starts[-1]), columns), dtype=torch.int64, device=world.device)
    for grain, values in own.items():
        rows[starts[grain] : starts[grain + 1]] = values
    world.add_integers(rows)
    out: npt.NDArray[np.int64] = rows.cpu().numpy()
    return out


def classification_metrics(
    labels: npt.NDArray[np.int64],
    predictions: npt.NDArray[np.int64],
    *,
    num_classes: int,
    weights: npt.NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """accuracy, f1 and matthews_correlation of predicted classes, by scikit-learn.

    f1: of class 1 where there are two classes, else the plain mean over the classes that occur in either argument.
    What has no answer (nothing predicted or nothing there) is 0.

    Args:
        weights: how often each of them counts; None: once.
    """
    from sklearn import metrics  # type: ignore[import-untyped]  # a second to import, and for classification alone

    average = "binary" if num_classes == 2 else "macro"
    known: dict[str, Any] = {"sample_weight": weights}
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions, **known)),
        "f1": float(metrics.f1_score(labels, predictions, average=average, zero_division=0.0, **known)),
        "matthews_correlation": float(metrics.matthews_corrcoef(labels, predictions, **known)),
    }
