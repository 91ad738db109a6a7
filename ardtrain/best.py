"""Which evaluation is the best so far, and when training has waited long enough for a better one.

Hugging Face's rules (Trainer and EarlyStoppingCallback): a strictly better value is the best; one that is better by
more than the threshold ends the waiting, any other evaluation lengthens it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Best(Protocol):
    """What is carried from evaluation to evaluation, in checkpoints too (trainer.LoopState).

    best_metric: its name, "" before the first; best_value, best_step: of the best evaluation, None and -1 before it;
    waited: evaluations in a row that were no better. best_loss: the smallest held-out loss.
    """

    best_metric: str
    best_value: float | None
    best_step: int
    waited: int
    best_loss: float | None


@dataclass(frozen=True)
class Judge:
    """metric: a name of HeldOut.numbers(). patience: evaluations, None for no early stop; threshold: of the metric."""

    metric: str = "loss"
    greater_is_better: bool = False
    patience: int | None = None
    threshold: float = 0.0

    def look(self, state: Best, step: int, numbers: Mapping[str, float]) -> None:
        """Takes an evaluation after so many steps into the state.

        Another metric than the state's begins anew. A value that is no number is no better than any.
        """
        if state.best_metric != self.metric:
            is_older = (
                state.best_metric == "" and self.metric == "loss"
            )  # than these fields: a checkpoint's loss counts
            state.best_value, state.best_step, state.waited = (state.best_loss if is_older else None), -1, 0
            state.best_metric = self.metric
        value, best = numbers[self.metric], state.best_value
        sign = 1.0 if self.greater_is_better else -1.0
        if math.isfinite(value) and (best is None or sign * (value - best) > 0):
            state.best_value, state.best_step = value, step
        better = math.isfinite(value) and (best is None or sign * (value - best) > self.threshold)
        state.waited = 0 if better else state.waited + 1

    def is_done(self, state: Best) -> bool:
        """Has training waited in vain for as long as the settings say?"""
        return self.patience is not None and state.waited >= self.patience
