"""Full fine-tuning under DeepSpeed: one ordinary ZeRO engine over the model, for method `full` (deepspeed.md 7)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from ardtrain.engines import AdamSettings, adam_state, make_optimizer, quiet, restore_buffers
from ardtrain.engines_filling import fill
from ardtrain.full_shards import MASTER, MOMENTS, Shards, read_shards
from ardtrain.loading import Weights

FULL_NEEDS = (
    0,
    19,
    8,
)  # DeepSpeed that drops a step with a gradient norm that is not finite, at every stage
CUT_BY = ("sub_group_size", "round_robin_gradients", "parameter_alignment")  # settings of ZeRO that cut it otherwise
LAYOUT_FILE = "layout.json"  # in a full engine's checkpoint: into which partitions it was cut


class FullEngine:
    """The whole model trained under ZeRO-1 to 3 with AdamW: an ordinary DeepSpeed run, for method `full`.

    In bf16 and fp16 DeepSpeed keeps float32 masters and, for fp16, scales the loss. Sums are DeepSpeed's floats: losses
    hang, in their last digits, on the number of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: Mapping[str, Any],
        adam: AdamSettings,
        device: torch.device,
        weights: Weights | None = None,
    ) -> None:
        """All processes must call this.

        Args:
            model: on the CPU, parameters in the compute dtype; all of them become trainable.
            config: DeepSpeed's (deepspeed_config.split_deepspeed's `full`), ZeRO stage 1 to 3.
            weights: where the numbers of parameters on the meta device are; each process reads what it keeps.
        Raises:
            ValueError: DeepSpeed is too old, or a weight file cannot be read.
        """
        if tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3])) < FULL_NEEDS:
            raise ValueError(
                f"method=full needs DeepSpeed {'.'.join(map(str, FULL_NEEDS))}, this is {deepspeed.__version__}, which "
                "applies gradients that are not finite; upgrade it"
            )
        self.stage: int = config["zero_optimization"]["stage"]
        assert self.stage in (1, 2, 3), "stage 0 applies a gradient that is not finite"
        self.module = model
        self.grad_norm = math.nan
        offload = config["zero_optimization"].get("offload_optimizer", {})
        # DeepSpeed 0.19.8 copies the swapped files and restores nothing else of an optimizer on NVMe.
        self.resumable = offload.get("device") != "nvme"
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        with quiet():
            if weights is not None:
                fill(model, weights, stage=self.stage, config=config, device=device)
            elif self.stage == 3:
                deepspeed.zero.Init(module=model, config_dict_or_path=dict(config))
            if self.stage < 3:
                model.to(device)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = make_optimizer(trained, adam, device=device, config=config)
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
        restore_buffers(model, buffers, device)
        # The engine: a forward whose loss goes to `backward` must go through it, any other through `module`.
        self.trained: nn.Module = self._engine

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of this loss; a step's is that of the sum of all losses of all calls on all processes.

        All processes must call this equally often; last: `step` follows.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over processes.
        self._engine.backward(loss * self._engine.dp_world_size, scale_wrt_gas=False)

    def step(self, *, lr: float) -> float | None:
        """Clips by the config's gradient_clipping and steps. All processes must call this.

        Returns:
            The gradient's norm before clipping; None where it was not finite, then nothing was changed but, in fp16,
            the loss scale. One host synchronisation.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        self.grad_norm = math.nan
        if not self._engine.was_step_applied():
            return None
        self.grad_norm = float(self._engine.get_global_grad_norm())
        assert 0.0 <= self.grad_norm < math.inf, "DeepSpeed drops such a step"
        return self.grad_norm

    @property
    def loss_scale(self) -> float:
        """fp16's loss scale, else 1."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    @property
    def loss_scale_falls(self) -> bool:
        """Does an overflow lower the loss scale, so that the step may be tried again?"""
        return bool(self._engine.fp16_enabled() and self._engine.dynamic_loss_scale())

    def release(self) -> None:
        """Frees weights that backward left gathered (the embedding's, whose inputs need no gradient)."""
        if self.stage == 3:
            self._engine.optimizer.parameter_offload.partition_all_parameters()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, on the host of process 0 in their compute dtype; {} elsewhere.

        Tied parameters share their memory. Under ZeRO-3 one parameter is whole at a time. All processes must call this.
        """
        is_main = self._engine.global_rank == 0
        self.release()
        host: dict[int, Tensor] = {}
        out: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in host:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    host[id(parameter)] = parameter.detach().to("cpu", copy=True) if is_main else torch.empty(0)
            out[name] = host[id(parameter)]
        for prefix, module in self.module.named_modules():
            for key, buffer in module.named_buffers(prefix, recurse=False):
                if key.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    out[key] = buffer.detach().to("cpu", copy=True)
        return out if is_main else {}

    def save(self, folder: Path, tag: str) -> None:
        """DeepSpeed's own checkpoint in `folder/tag`: weights, masters, moments. All processes must call this."""
        assert self.resumable, "it could not be loaded"
        with quiet():
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        if self._engine.global_rank == 0:
            (folder / tag / LAYOUT_FILE).write_text(json.dumps(self._layout()))

    def load(self, folder: Path, tag: str) -> None:
        """What `save` wrote, into a new engine over the same model; bits of masters, moments and step counter stay.

        From another number of processes, ZeRO stage or cut each process reads its numbers out of all files. Either road
        unpickles. All processes must call this.

        Raises:
            ValueError: it is not there, is another model's, or the optimizer is on NVMe.
        """
        path = folder / tag
        if not self.resumable:
            raise ValueError(
                "deepspeed.zero_optimization.offload_optimizer.device=nvme: DeepSpeed does not bring such an optimizer "
                "back, so method=full cannot resume; write cpu from the start"
            )
        if not (path / LAYOUT_FILE).is_file():
            raise ValueError(f"{path} is no complete DeepSpeed checkpoint of this program ({LAYOUT_FILE} is missing)")
        saved = json.loads((path / LAYOUT_FILE).read_text())
        if saved != self._layout():
            self._take(read_shards(path, processes=saved["processes"], stage=saved["stage"]), path)
            return
        with quiet():
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise ValueError(f"{path} holds no DeepSpeed checkpoint; take another one")

    def _take(self, shards: Shards, path: Path) -> None:
        """Writes this process's part of masters and moments, the compute weights, and what DeepSpeed counts."""
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            numel = getattr(parameter, "ds_numel", parameter.numel())
            if shards.numel(name) != numel:
                raise ValueError(
                    f"{path} holds {shards.numel(name)} numbers of {name}, the model has {numel}; resume with the "
                    "model it was saved from"
                )
        self.release()
        if shards.steps:
            self._make_moments(shards.steps)
        for name, parameter in trained.items():
            self._take_parameter(parameter, name, shards)
        for name, buffer in self.module.named_buffers():
            if name in shards.weights:
                buffer.copy_(shards.weights[name])
        for name, count in shards.counters.items():
            setattr(self._engine, name, count)
        if self._engine.fp16_enabled():
            for name, value in shards.scaler.items():
                setattr(self._engine.optimizer, name, value)

    def _make_moments(self, steps: int) -> None:
        """Zeros for the moments, which torch's optimizer would make at its first step, and this step counter."""
        optimizer = self._engine.optimizer
        base = optimizer.optimizer
        rows = [p for group in base.param_groups for p in group["params"]]
        # ZeRO-3 hands the optimizer one array at a time, within a step only.
        for flat in optimizer.fp32_partitioned_groups_flat if self.stage == 3 else rows:
            base.state[flat] = adam_state(base, flat, steps)
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()  # lets the parameters find their moments

    @torch.no_grad()
    def _take_parameter(self, parameter: Any, name: str, shards: Shards) -> None:
        moments = MOMENTS if shards.steps else ()
        if self.stage == 3:
            size = parameter.partition_numel()
            mine = {"begin": self._engine.global_rank * size, "numel": size}
            safe_set_local_fp32_param(parameter, shards.read(name, MASTER, **mine))
            for moment in moments:
                safe_set_local_optimizer_state(parameter, shards.read(name, moment, **mine), moment)
            # Wherever the weights lie (device, host, NVMe), gathering with a modifier writes them back there.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self._engine.global_rank == 0:
                    parameter.copy_(shards.read(name, MASTER).view_as(parameter))
            return
        master = shards.read(name, MASTER)
        parameter.copy_(master.view_as(parameter))
        if parameter._hp_mapping is None:  # none of its numbers are in this process's partition
            return
        safe_set_full_fp32_param(parameter, master)
        for moment in moments:
            safe_set_full_optimizer_state(parameter, shards.read(name, moment), moment)

    def _layout(self) -> dict[str, Any]:
        """What two engines must have in common to read each other's files as they are."""
        zero = self._engine.config["zero_optimization"]
        return {
            "processes": int(self._engine.dp_world_size),
            "stage": self.stage,
            "optimizer": type(self._engine.optimizer).__name__,
            "cut": {name: zero[name] for name in CUT_BY if name in zero},
        }

    def destroy(self) -> None:
        """Ends the engine. All processes must call this."""
        with quiet():
            self._engine.destroy()
        del self._engine, self.trained
