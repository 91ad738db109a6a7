"""The only importer of deepspeed, with its engines_*.py: the frozen backbone's engine and the arena's.

The backbone is sharded once (ZeRO-3, optional parameter offload) and has no optimizer; a resize never touches it. All
trained numbers are one flat float32 parameter of a second, small engine, made anew at each resize (deepspeed.md 1).
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    logger as deepspeed_logger,
)
from deepspeed.utils import (
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    set_z3_leaf_modules,
)
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from ardtrain.backbones import gathered_whole
from ardtrain.engines_filling import fill
from ardtrain.full_shards import MOMENTS
from ardtrain.loading import Weights
from ardtrain.reasons import first_line

QUANTIZED_GATHER = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def start_deepspeed(device: torch.device) -> None:
    """Hands DeepSpeed the process group that `collectives.World.join` made. All processes must call this."""
    with quiet():
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed logs a screenful at INFO and prints: a resize must be silent."""
    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        deepspeed_logger.setLevel(level)


@contextlib.contextmanager
def _no_first_gradient() -> Iterator[None]:
    """DeepSpeed gives new masters a gradient of zeros and, without offload, takes it away at once: leave that out.

    Of the seconds of a new engine at 70B's adapter size (CPU) it is almost half.
    """
    original = DeepSpeedZeroOptimizer.initialize_optimizer_states

    def give_what_stays(optimizer: DeepSpeedZeroOptimizer) -> None:
        if optimizer.cpu_offload:
            original(optimizer)

    DeepSpeedZeroOptimizer.initialize_optimizer_states = give_what_stays
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer.initialize_optimizer_states = original


class BackboneEngine:
    """The frozen model, whole (stage 0) or sharded by ZeRO-3 with optional CPU or NVMe parameter offload.

    Call `module(...)`, not an engine: DeepSpeed's output hooks forbid a direct `loss.backward()`; ZeRO-3's own hooks
    sit on the modules and work.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stage: int,
        config: Mapping[str, Any],
        device: torch.device,
        weights: Weights | None = None,
    ) -> None:
        """All processes must call this.

        Args:
            model: on the CPU, parameters in the compute dtype, buffers as its constructor made them.
            config: the backbone's DeepSpeed config (deepspeed_config.split_deepspeed).
            weights: where the numbers of parameters on the meta device are; each process reads what it keeps.
        Raises:
            ValueError: a weight file cannot be read; the config asks for a quantised gather without CUDA.
        """
        assert not any(p.requires_grad for p in model.parameters()), "the backbone is frozen"
        asked = [key for key in QUANTIZED_GATHER if config.get("zero_optimization", {}).get(key)]
        if asked and device.type == "cpu":
            raise ValueError(
                f"deepspeed.zero_optimization.{asked[0]}=true needs CUDA, where alone DeepSpeed has its kernels; "
                "remove it, or set quantization=int8 or nf4, which gathers codes on any device"
            )
        self._engine: Any = None
        self.module = model
        if stage == 0:
            if weights is not None:
                fill(model, weights, stage=0, config=config, device=device)
            model.to(device)
            for module in model.modules():
                module.register_forward_pre_hook(_give_input_its_own_node)
            return
        _gather_layers_whole(model)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        with quiet():
            if weights is not None:
                fill(model, weights, stage=3, config=config, device=device)
            else:
                deepspeed.zero.Init(module=model, config_dict_or_path=dict(config))
            self._engine, *_ = deepspeed.initialize(model=model, config=dict(config))
        restore_buffers(model, buffers, device)

    def release(self) -> None:
        """Frees weights that backward left gathered (the first layer's, whose inputs need no gradient)."""
        if self._engine is not None:
            self._engine.optimizer.partition_all_parameters()

    @contextlib.contextmanager
    def whole(self, *parameters: Tensor) -> Iterator[None]:
        """These parameters are whole on every process inside. All processes must call this."""
        with deepspeed.zero.GatheredParameters(list(parameters), enabled=self._engine is not None):
            yield

    def read_rows(self, path: str, rows: Sequence[int]) -> Tensor:
        """[n, D] float32 on the host: rows of a module's weight, which is gathered once. All processes must call this.

        path: of the module. rows: their numbers.
        """
        weight = self.module.get_parameter(f"{path}.weight")
        with self.whole(weight), torch.no_grad():
            return weight[torch.tensor(rows, device=weight.device)].float().cpu()

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

    The modules inside get the input nodes that ZeRO-3's hooks would have given them, so all three ways give the same
    bits.
    """
    layers = gathered_whole(model)
    if not layers:
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


def restore_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
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
            flat: [N] float32 first weights, taken over, not copied. config: the adapter's DeepSpeed config
                (split_deepspeed).
        """
        assert flat.dtype == torch.float32 and flat.dim() == 1
        module = _Arena(flat.detach().to(device))
        optimizer = make_optimizer(module.flat, adam, device=device, config=config)
        with quiet(), _no_first_gradient():
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, model_parameters=[module.flat], config=dict(config)
            )
        self._parameter = module.flat

    @property
    def weights(self) -> Tensor:
        """[N] float32, the current weights; shares memory with the parameter."""
        return self._parameter.data

    @property
    def copy_of_weights(self) -> Tensor | None:
        """[N] the optimizer's own copy of `weights` where one process holds all of it, live; else None.

        Between steps it may be written over, if `set_weights` or `destroy` follows.
        """
        return self._partition.data if self._engine.dp_world_size == 1 else None

    @property
    def _partition(self) -> Tensor:
        (partition,) = (p for group in self._engine.optimizer.optimizer.param_groups for p in group["params"])
        assert isinstance(partition, Tensor)
        return partition

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

    def moment(self, name: str) -> Tensor:
        """[N] one of MOMENTS where the optimizer keeps it; the live one where a process holds it all, else gathered.

        All processes must call this; `step`, `restore` or `set_moments` must have come before.
        """
        own: Tensor = self._states()[0][name]
        if self._engine.dp_world_size == 1:
            return own[: self._parameter.numel()]
        return safe_get_full_optimizer_state(self._parameter, name).detach().reshape(-1).to(own.device)

    @property
    def steps(self) -> int:
        """Optimizer steps that the moments have seen."""
        states = self._states()
        return int(states[0]["step"]) if states else 0

    def capture(self) -> FullState:
        """Copies of the full tensors on the host. All processes must call this, under the same condition."""
        # The weights are the masters: both are float32, and every process has them whole. + 0.0: the all-reduce that
        # gathers moments turns -0.0 into 0.0 for more than one process; do so for one as well, and for the masters.
        tensors = [t.detach().cpu() + 0.0 for t in (self.weights, *(self.moment(name) for name in MOMENTS))]
        return FullState(tensors[0], tensors[1], tensors[2], self.steps)

    def restore(self, state: FullState) -> None:
        """Writes master, moments and step counter; the state is copied. All processes must call this."""
        self.set_weights(state.master.to(self.weights.device))
        self.set_moments({name: getattr(state, name).clone() for name in MOMENTS}, state.steps)

    def set_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Writes both moments [N] float32, which are taken over, and the step counter. All processes must call this."""
        optimizer = self._engine.optimizer
        base, partition = optimizer.optimizer, self._partition
        given = {name: values.to(partition.device) for name, values in moments.items()}
        if not self._states():
            whole = all(values.shape == partition.shape for values in given.values())  # one process, nothing padded
            base.state[partition] = adam_state(base, partition, steps, given if whole else None)
            optimizer._lazy_init_hp_params_optimizer_state()  # lets the parameter find its moments
        for entry in self._states():
            entry["step"] = torch.full_like(entry["step"], steps) if torch.is_tensor(entry["step"]) else steps
            for name, values in given.items():
                if entry[name].data_ptr() != values.data_ptr():
                    safe_set_full_optimizer_state(self._parameter, values, name)

    def set_weights(self, weights: Tensor) -> None:
        """Writes the master weights [N] alone, between steps; no communication. All processes must call this."""
        safe_set_full_fp32_param(self._parameter, weights)
        self._parameter.data.copy_(weights)

    def save_zero(self, folder: Path, tag: str, client_state: Mapping[str, Any]) -> None:
        """DeepSpeed's own checkpoint of the arena in `folder/tag`. All processes must call this; it is synchronous.

        The universal format's note in the client state lets `deepspeed.checkpoint.ds_to_universal` convert it.
        """
        note = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        with quiet():
            self._engine.save_checkpoint(str(folder), tag=tag, client_state={**client_state, **note}, save_latest=False)

    def _states(self) -> list[dict[str, Any]]:
        return [s for s in self._engine.optimizer.optimizer.state.values() if "step" in s]

    def destroy(self) -> None:
        """Ends the engine and frees its arrays. All processes must call this.

        Engine and optimizer hold each other, so they go at the next garbage collection; their arrays, gigabytes for a
        large base, must not wait for it.
        """
        optimizer, partition = self._engine.optimizer, self._partition
        with quiet():
            self._engine.destroy()
        partition.data = partition.new_empty(0)
        optimizer.optimizer.state.clear()
        optimizer.bit16_groups_flat.clear()
        optimizer.parallel_partitioned_bit16_groups.clear()
        self._parameter.data = self._parameter.new_empty(0)
        del self._engine, self._parameter


def read_zero(folder: Path, *, allow_pickle: bool) -> tuple[FullState, dict[str, Any]]:
    """The trained numbers of a checkpoint that `AdapterEngine.save_zero` wrote, for any number of processes.

    The arena is one flat parameter, so the processes' partitions in a row are the arena. The universal format, which
    `deepspeed.checkpoint.ds_to_universal` makes of it, is read as well. Reads files only.

    Returns:
        Masters and moments, not yet cut to the arena's size (DeepSpeed pads the last partition); the client state.
    Raises:
        ValueError: files are missing or damaged, or hold more than torch reads without running code from them
            (allow_pickle lets it).
    """
    # What DeepSpeed pickles beside tensors: plain holders of numbers.
    known = [ZeroStageEnum, fragment_address, *(getattr(loss_scaler, n) for n in ("LossScaler", "DynamicLossScaler"))]

    def load(path: Path) -> Any:
        try:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds more than tensors and plain values ({first_line(error)}); allow_pickle=true "
                "reads it, and lets the file run code: only for files you trust"
            ) from error
        except (OSError, RuntimeError, EOFError, KeyError) as error:
            raise ValueError(f"{path} is missing or damaged ({first_line(error)})") from error

    states = load(folder / "mp_rank_00_model_states.pt")
    universal = folder / "zero" / "flat"
    if universal.is_dir():
        master, exp_avg, exp_avg_sq = (
            load(universal / f"{name}.pt")["param"].detach().float() for name in ("fp32", *MOMENTS)
        )
        return FullState(master, exp_avg, exp_avg_sq, int(load(universal / "step.pt"))), states
    count = int(states["dp_world_size"])
    parts = [
        load(folder / f"zero_pp_rank_{p}_mp_rank_00_optim_states.pt")["optimizer_state_dict"] for p in range(count)
    ]
    moments = [part["base_optimizer_state"]["state"][0] for part in parts]
    master = torch.cat([part["single_partition_of_fp32_groups"][0].detach().float() for part in parts])
    exp_avg, exp_avg_sq = (torch.cat([m[name].float() for m in moments]) for name in MOMENTS)
    return FullState(master, exp_avg, exp_avg_sq, int(moments[0]["step"])), states


def adam_state(
    base: torch.optim.Optimizer, flat: Tensor, steps: int, moments: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """What AdamW keeps for one array after so many steps; zeros where no moments are given."""
    step: Any = steps
    if isinstance(base, torch.optim.AdamW):  # DeepSpeed's own counts in an integer
        step = torch.tensor(float(steps), device=flat.device if base.defaults["fused"] else "cpu")
    return {"step": step, **(moments or {name: torch.zeros_like(flat) for name in MOMENTS})}


def make_optimizer(
    parameters: nn.Parameter | list[nn.Parameter],
    adam: AdamSettings,
    *,
    device: torch.device,
    config: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """AdamW at learning rate 0, which each step sets, with the kernel that the settings and the device ask for.

    config: DeepSpeed's, of the engine that will own it: does it keep the optimizer on the host?
    """
    parameters = [parameters] if isinstance(parameters, nn.Parameter) else parameters
    settings: dict[str, Any] = {
        "lr": 0.0, "betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay,
    }  # fmt: skip
    if adam.kernel == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    # On the host torch's fused kernel rounds the tail of a partition (numbers beyond the last full vector) otherwise
    # than its body, so bits would hang on how many processes cut the arena; the plain kernel does not (test_exact.py).
    on_host = device.type == "cpu" or "offload_optimizer" in config["zero_optimization"]
    return torch.optim.AdamW(parameters, fused=not on_host, foreach=False if on_host else None, **settings)
