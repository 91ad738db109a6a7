"""Held-out loss: grains in a fixed order, dealt over the processes, summed exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardtrain.collectives import ExactSum, World, deal
from ardtrain.data import Batch, additive_mask


class Grains(Protocol):
    """Held-out data (data.EvalData)."""

    def grains(self) -> Sequence[Any]: ...

    def collate(self, grain: Any) -> Batch: ...


@dataclass(frozen=True)
class HeldOut:
    """loss: mean over target tokens, nats."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def token_loss_sum(module: nn.Module, batch: Batch, *, device: torch.device, mask_dtype: torch.dtype) -> Tensor:
    """Scalar float32: sum of the cross-entropy over the grain's target tokens.

    Args:
        mask_dtype: dtype of the queries; a packed grain's block mask becomes an additive mask of it.
    """
    labels = batch.labels.to(device)
    if batch.block_mask is None:
        mask = batch.attention_mask
        mask = None if mask is None else mask.to(device, torch.int64)
    else:
        mask = additive_mask(batch.block_mask.to(device), mask_dtype)
    logits = module(
        input_ids=batch.input_ids.to(device),
        attention_mask=mask,
        position_ids=batch.position_ids.to(device),
        use_cache=False,
    ).logits
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
        labels[:, 1:].reshape(-1),
        ignore_index=-100,
        reduction="sum",
    )


class LossSum(Protocol):
    """A grain's summed loss, as `loss_sum`."""

    def __call__(
        self, module: nn.Module, batch: Batch, *, device: torch.device, mask_dtype: torch.dtype
    ) -> Tensor: ...


def loss_sum(module: nn.Module, batch: Batch, *, device: torch.device, mask_dtype: torch.dtype) -> Tensor:
    """The grain's summed loss, by what its rows are."""
    return token_loss_sum(module, batch, device=device, mask_dtype=mask_dtype)


def held_out_loss(
    module: nn.Module, data: Grains, *, world: World, mask_dtype: torch.dtype, loss_sum: LossSum = loss_sum
) -> HeldOut:
    """The loss over all held-out grains; the same bits for any number of processes. All processes must call this."""
    grains = data.grains()
    total = ExactSum(0, len(grains), exponent=0, device=world.device)
    nothing = torch.zeros(0, device=world.device)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for index, counted in deal(len(grains), world.world_size, world.global_rank):
            batch = data.collate(grains[index])
            loss = loss_sum(module, batch, device=world.device, mask_dtype=mask_dtype)
            if counted:
                total.add(index, loss=loss, gradient=nothing, tokens=batch.num_target_tokens)
    module.train(was_training)
    result = total.reduce(world)
    tokens = sum(result.tokens)
    return HeldOut(math.fsum(result.losses) / max(1, tokens), tokens)
