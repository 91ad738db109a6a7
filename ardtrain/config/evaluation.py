"""The block `evaluation`: how `ardtrain evaluate` makes its figures."""

from __future__ import annotations

from pydantic import Field

from ardtrain.config.block import Block


class EvaluationBlock(Block):
    """`ardtrain evaluate`: generation and intervals. What a run's own held-out metrics are made of is not here."""

    bootstrap_samples: int = Field(default=1000, ge=0)
    """Resamples of the held-out rows behind each interval; 0: no intervals."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Share of the resamples that an interval covers."""
