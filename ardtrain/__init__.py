"""Trainer for low-rank adapters whose ranks adapt while they train, on DeepSpeed ZeRO-3.

The number of processes changes nothing but the speed. Start with `ardtrain.cli`, which wires the parts, and
`ardtrain.trainer`, which holds one training step on one screen.
"""

__version__ = "0.1.0"
