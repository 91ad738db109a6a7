"""What is wrong with a checkpoint: damaged, or another run's."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text says which file, why, and what to do."""


class OtherRunError(CheckpointError):
    """An intact checkpoint of another run (base, data, method, settings): no older one of its folder is any better."""
