"""Full fine-tuning in the same loop: all weights train under one ordinary ZeRO engine (deepspeed.md 7).

It is the 100 % of "x % of full". Data order, batches, dropout seeds, schedule, evaluation and the reported losses are
those of the other methods; the gradient is that of the global mean token loss. Its sums are DeepSpeed's floats, not
ours: what hangs on the last digit hangs on the number of processes.

Letters: G grains of a step.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ardtrain.collectives import ExactSum, StepSum, deal
from ardtrain.data import Batch
from ardtrain.evaluation import HeldOut
from ardtrain.ranks import named_seed
from ardtrain.trainer import LOSS_SCALE_MIN, MAX_REPEATS, Backbone, Event, StepResult, Trainer, tensor_digest


class WholeModel(Backbone, Protocol):
    """The model and its optimizer (engines_full.FullEngine). A forward whose loss goes to `backward` uses `trained`."""

    trained: nn.Module
    stage: int

    @property
    def loss_scale(self) -> float: ...

    @property
    def loss_scale_falls(self) -> bool: ...

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, *, lr: float) -> float | None: ...


@dataclass
class FullTrainer(Trainer):
    """The loop's outside (`fit`, hooks, state, clock, void steps) over a WholeModel; there is no arena and no method.

    The config of the engine clips (gradient_clipping), not `settings.max_grad_norm`.
    """

    backbone: WholeModel
    adapters: Any = field(init=False, default_factory=dict)
    arena: Any = field(init=False, default=None)
    method: Any = field(init=False, default=None)

    def train_step(self) -> StepResult:
        """One optimizer step of the whole global batch. All processes must call this."""
        step, s, engine = self.state.step, self.settings, self.backbone
        lr = s.rate(step)
        for _ in range(MAX_REPEATS):
            total = self._backward(step)
            scale_can_fall = engine.loss_scale_falls and engine.loss_scale > LOSS_SCALE_MIN
            norm = engine.step(lr=lr)
            # Only fp16's scaled gradient overflowed: again with the same seeds, at the scale that DeepSpeed lowered.
            if norm is not None or not total.finite or not scale_can_fall:
                break
        self.state.step, self.state.loss_scale = step + 1, engine.loss_scale
        num_targets, num_tokens = sum(total.tokens), sum(total.processed)
        loss = math.fsum(total.losses) / max(1, num_targets)
        if norm is None:
            return self._void(step, total, loss, lr)
        self.state.skipped = 0
        self.state.tokens_seen += num_tokens
        return StepResult(step, loss, 0.0, norm, lr, num_targets, num_tokens, False, stop_flag=total.flag)

    def _backward(self, step: int) -> StepSum:
        """Forward and backward of this process's grains; the exact sum of the losses, without gradient numbers.

        Idle rounds repeat a grain with a loss times 0: ZeRO needs every process in every backward. Where a loss is not
        finite, the last backward is that of NaN on every process, which makes the engine drop the whole gradient even
        if it happens to be finite.

        Raises:
            Interrupted: the engine may then be saved, not trained on: it holds a part of the step's gradient.
        """
        grains = self.data.grains(step)
        dealt = deal(len(grains), self.world.world_size, self.world.global_rank)
        batches = [self.data.collate(grains[index]) for index, _ in dealt]
        num_targets = self._count_targets([b for b, (_, counted) in zip(batches, dealt, strict=True) if counted])
        total = ExactSum(0, len(grains), exponent=0, device=self.world.device)
        start = time.perf_counter()
        for (index, counted), batch in zip(dealt[:-1], batches[:-1], strict=True):
            with self._seeded(step, index):
                loss = self._loss(total, index, batch, counted=counted)
                self.backbone.backward(loss * (counted / num_targets), last=False)
            self.backbone.release()
            self.between()
        index, counted = dealt[-1]
        with self._seeded(step, index):
            start_of_last = time.perf_counter()
            loss = self._loss(total, index, batches[-1], counted=counted)
            self.between()
            now = time.perf_counter()
            # The last backward is still to come: about twice its forward.
            spent = int(1000 * (now - start + 2 * (now - start_of_last)))
            result = total.reduce(self.world, flag=self.hooks.stop_flag(), milliseconds=spent)
            self.poll.learn(result, len(dealt))
            self.backbone.backward(loss * (counted / num_targets if result.finite else math.nan), last=True)
        return result

    def _loss(self, total: ExactSum, index: int, batch: Batch, *, counted: bool) -> Tensor:
        """Loss sum of one grain, put into the step's sum if it counts."""
        device = self.world.device
        loss = self.loss_sum(self.backbone.trained, batch, device=device)
        if counted:
            nothing = torch.zeros(0, device=device)
            counts = {"tokens": batch.num_target_tokens, "processed": batch.num_tokens}
            total.add(index, loss=loss, gradient=nothing, **counts)
        return loss

    @contextmanager
    def _seeded(self, step: int, index: int) -> Iterator[None]:
        """Dropout inside is seeded by (run seed, step, grain); torch's global generators are put back after it."""
        device = self.world.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(named_seed(self.settings.seed, step, index))
            yield

    def _count_targets(self, batches: list[Batch]) -> int:
        """Terms of the loss in the whole step, at least 1; one small all-reduce and host synchronisation."""
        count = torch.tensor(sum(b.num_target_tokens for b in batches), dtype=torch.int64, device=self.world.device)
        self.world.add_integers(count)
        return max(1, int(count))

    def evaluate(self) -> HeldOut:
        """Held-out loss with the weights as they are. All processes must call this."""
        assert self.eval_data is not None
        with self.clock.section("evaluate"):
            result = self._held_out(self.eval_data)
            self.backbone.release()
        return result

    def digests(self) -> dict[str, str]:
        """What must be alike on all processes: loop's counters, and weights where each process has all of them."""
        out = {"loop state": repr(self.state)}
        if self.backbone.stage < 3:
            parameters = self.backbone.module.named_parameters()
            parts = [f"{name} {tensor_digest(p.detach().float().reshape(-1))}" for name, p in parameters]
            out["weights"] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return out

    def _allocate(self, step: int) -> Event | None:
        """Nothing: no ranks."""
        return None


def write_model(
    folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A folder that `from_pretrained` reads: config, safetensors, tokenizer. Process 0 alone calls this.

    Args:
        model: gives config and names; its own weights may be sharded. weights: FullEngine.full_state_dict.
    """
    use_cache = model.config.use_cache
    model.config.use_cache = True  # backbones.load_model switched it off for training; generation wants it
    try:
        model.save_pretrained(folder, state_dict=dict(weights))
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(folder)
