"""The only importer of deepspeed: the frozen backbone's engine and the arena's engine.

The backbone is sharded once (ZeRO-3, optional parameter offload) and has no optimizer; a resize never touches it. All
trained numbers are one flat float32 parameter of a second, small engine, made anew at each resize (deepspeed.md 1).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    logger as deepspeed_logger,
)
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STALE_LOCK_SECONDS = 1800.0  # a compile of one op takes up to some minutes, more on a busy machine


def start_deepspeed(device: torch.device) -> None:
    """Hands DeepSpeed the process group that `collectives.World.join` made. All processes must call this."""
    with quiet():
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False)


def remove_stale_locks(folder: Path) -> list[Path]:
    """Removes lock files that a killed compile of an op left behind: the next start would wait for them for ever.

    folder: where torch builds extensions (TORCH_EXTENSIONS_DIR). One process a machine calls this, before any op loads.
    """
    stale = [p for p in folder.glob("**/lock") if time.time() - p.stat().st_mtime > STALE_LOCK_SECONDS]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed logs a screenful at INFO and prints: a resize must be silent."""
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        deepspeed_logger.setLevel(level)


class BackboneEngine:
    """The frozen model, whole (stage 0) or sharded by ZeRO-3 with optional CPU or NVMe parameter offload.

    Call `module(...)`, not an engine: DeepSpeed's output hooks forbid a direct `loss.backward()`; ZeRO-3's own hooks
    sit on the modules and work.
    """

    def __init__(self, model: nn.Module, *, stage: int, config: Mapping[str, Any], device: torch.device) -> None:
        """All processes must call this.

        Args:
            model: the loaded model on the CPU, parameters in the compute dtype, buffers as its constructor made them.
            config: the backbone's DeepSpeed config (deepspeed_config.split_deepspeed).
        """
        assert not any(p.requires_grad for p in model.parameters()), "the backbone is frozen"
        self._engine: Any = None
        self.module = model
        if stage == 0:
            model.to(device)
            for module in model.modules():
                module.register_forward_pre_hook(_give_input_its_own_node)
            return
        _gather_layers_whole(model)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        with quiet():
            deepspeed.zero.Init(module=model, config_dict_or_path=dict(config))
            self._engine, *_ = deepspeed.initialize(model=model, config=dict(config))
        _restore_buffers(model, buffers, device)

    def release(self) -> None:
        """Frees weights that backward left gathered (the first layer's, whose inputs need no gradient)."""
        if self._engine is not None:
            self._engine.optimizer.partition_all_parameters()

    def gathered_parameters(self) -> int:
        """How many sharded parameters are whole on this process now; 0 after `release`."""
        if self._engine is None:
            return 0
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameters: Iterator[Any] = self.module.parameters()
        return sum(p.ds_status == ZeroParamStatus.AVAILABLE and not p.ds_persist for p in parameters)

    def destroy(self) -> None:
        """Ends the engine. All processes must call this."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None


def _gather_layers_whole(model: nn.Module) -> None:
    """Lets ZeRO-3 gather and release a decoder layer as one: one pair of hooks a layer instead of one a module.

    Not under activation checkpointing: there the layer's weights would be released after the recomputation, before the
    backward that needs them, and per-module hooks gather them again. The modules inside get the input nodes that
    ZeRO-3's hooks would have given them, so all three ways give the same bits.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    for layer in layers:
        for module in layer.modules():
            if module is not layer:
                module.register_forward_pre_hook(_give_input_its_own_node)


def _give_input_its_own_node(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """ZeRO-3 wraps each module's positional inputs in an autograd node; do the same without ZeRO-3.

    Backward then adds up the gradients of a module's own uses of its input before those of other users (a residual
    connection) in every stage. Without it the order of that float sum, and so the last bit, hangs on the stage.
    """
    return tuple(x.view_as(x) if torch.is_tensor(x) and x.requires_grad else x for x in inputs)


def _restore_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """zero.Init and engines may round buffers (rotary inv_freq became bfloat16): put the originals back."""
    for name, original in buffers.items():
        owner_name, _, key = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        owner._buffers[key] = original.to(device)


@dataclass
class FullState:
    """Master weights, both moments [N] float32 on the host, and the optimizer's step counter: rank-independent."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: int


@dataclass(frozen=True)
class AdamSettings:
    """AdamW's numbers. kernel: torch's AdamW gives equal bits for every partition; DeepSpeed's cpu_adam does not."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    kernel: str = "torch"


class _Arena(nn.Module):
    """Holds the flat parameter; DeepSpeed wants a module."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()
        self.flat = nn.Parameter(flat)

    def forward(self) -> Tensor:
        """A loss whose gradient is zero everywhere: the true gradient is written afterwards, exactly summed."""
        return (self.flat * 0.0).sum()


class AdapterEngine:
    """The arena under ZeRO-1 or 2 with AdamW, always float32. Full weights are on every process without a gather."""

    def __init__(self, flat: Tensor, *, config: Mapping[str, Any], adam: AdamSettings, device: torch.device) -> None:
        """All processes must call this.

        Args:
            flat: [N] float32 first weights. config: the adapter's DeepSpeed config (split_deepspeed).
        """
        assert flat.dtype == torch.float32 and flat.dim() == 1
        module = _Arena(flat.detach().clone().to(device))
        optimizer = _make_optimizer(module.flat, adam, device=device, config=config)
        with quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, model_parameters=[module.flat], config=dict(config)
            )
        self._parameter = module.flat

    @property
    def weights(self) -> Tensor:
        """[N] float32, the current weights; shares memory with the parameter."""
        return self._parameter.data

    def leaf(self) -> Tensor:
        """[N] the weights as a fresh autograd leaf, no copy."""
        return self._parameter.detach().requires_grad_()

    def step(self, gradient: Tensor, *, lr: float) -> None:
        """One AdamW step with this gradient [N] float32. All processes must call this."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self.set_gradient(gradient)
        self._engine.step()

    def read_gradient(self) -> Tensor:
        """[N] the gradient as DeepSpeed holds it between backward and step. All processes must call this."""
        return safe_get_full_grad(self._parameter)

    def set_gradient(self, gradient: Tensor) -> None:
        """Puts the exactly summed gradient [N] in the place of a zero loss's. All processes must call this."""
        self._engine.backward(self._engine.module())
        safe_set_full_grad(self._parameter, gradient)

    def capture(self) -> FullState:
        """Full tensors on the host. All processes must call this; `step` or `restore` must have come before."""
        master = safe_get_full_fp32_param(self._parameter)
        moments = [safe_get_full_optimizer_state(self._parameter, name) for name in MOMENTS]
        # + 0.0: the all-reduce inside turns -0.0 into 0.0 for more than one process; do so for one as well.
        tensors = [t.detach().reshape(-1).float().cpu() + 0.0 for t in (master, *moments)]
        return FullState(tensors[0], tensors[1], tensors[2], self._steps())

    def restore(self, state: FullState) -> None:
        """Writes master, moments and step counter. All processes must call this."""
        with quiet():
            self.step(torch.zeros_like(self.weights), lr=0.0)  # makes the optimizer's state exist
        device = self.weights.device
        safe_set_full_fp32_param(self._parameter, state.master.to(device))
        for name in MOMENTS:
            safe_set_full_optimizer_state(self._parameter, getattr(state, name).to(device), name)
        self._parameter.data.copy_(state.master.to(device))
        for entry in self._states():
            if torch.is_tensor(entry["step"]):
                entry["step"].fill_(float(state.steps))
            else:
                entry["step"] = state.steps

    def set_weights(self, weights: Tensor) -> None:
        """Writes the master weights [N] alone, between steps; no communication. All processes must call this."""
        safe_set_full_fp32_param(self._parameter, weights)
        self._parameter.data.copy_(weights)

    def _states(self) -> list[dict[str, Any]]:
        return [s for s in self._engine.optimizer.optimizer.state.values() if "step" in s]

    def _steps(self) -> int:
        states = self._states()
        return int(states[0]["step"]) if states else 0

    def destroy(self) -> None:
        """Ends the engine and drops its buffers. All processes must call this."""
        with quiet():
            self._engine.destroy()
        del self._engine, self._parameter


def _make_optimizer(
    parameter: nn.Parameter, adam: AdamSettings, *, device: torch.device, config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": 0.0, "betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay,
    }  # fmt: skip
    if adam.kernel == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam([parameter], adamw_mode=True, **settings)
    # On the host torch's fused kernel rounds the tail of a partition (numbers beyond the last full vector) otherwise
    # than its body, so bits would hang on how many processes cut the arena; the plain kernel does not (test_exact.py).
    on_host = device.type == "cpu" or "offload_optimizer" in config["zero_optimization"]
    return torch.optim.AdamW([parameter], fused=not on_host, foreach=False if on_host else None, **settings)
