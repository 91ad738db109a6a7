"""`ardtrain evaluate`: figures of a run's checkpoint on held-out rows, on any number of processes."""

from ardtrain.evaluating.command import evaluate

__all__ = ["evaluate"]
