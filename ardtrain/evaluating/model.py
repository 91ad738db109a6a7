"""A run's checkpoint as a model that runs forward, on the run's own roads: sharded and offloaded as in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ardtrain import checkpoint, preflight, run_data
from ardtrain.adapter_run import AdapterRun
from ardtrain.adapters import bind_arena, drop_views, group_adapters
from ardtrain.checkpoint.format import read_manifest
from ardtrain.collectives import World
from ardtrain.config import ConfigError
from ardtrain.data import EvalData
from ardtrain.engines_full import FullEngine
from ardtrain.evaluating.request import Target
from ardtrain.evaluation import loss_sum
from ardtrain.full_run import ENGINE_FOLDER, NO_PARTS
from ardtrain.logits import LogitHead
from ardtrain.preflight import Prepared
from ardtrain.resize import LiveArena
from ardtrain.session import Session, Surroundings, logger, loop_state, run_identity


class Evaluated(Protocol):
    """A checkpoint, ready to run forward. All processes must enter `bound` together."""

    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    eval_data: EvalData
    world: World
    step: int

    @property
    def module(self) -> nn.Module: ...

    @property
    def logit_head(self) -> LogitHead | None: ...

    def bound(self) -> Any: ...

    def release(self) -> None: ...


class _Rows(Session):
    """What both kinds share: no training rows, no trainer; held-out rows alone."""

    tokenizer: PreTrainedTokenizerBase
    eval_data: EvalData

    def _open_rows(self, around: Surroundings) -> None:
        """Tokenises the held-out rows once a machine. All processes must call this."""
        config, labels = self.config, self.prepared.shape.labels
        self.tokenizer = run_data.tokenizer_of(config)
        images = run_data.image_reader(config, self.tokenizer)
        if around.place.local_rank == 0:
            run_data.open_held_out(config, self.tokenizer, labels, images=images)
        self.world.barrier("rows tokenised")
        self.eval_data = run_data.open_held_out(config, self.tokenizer, labels, images=images)
        self.data: Any = self.eval_data  # says what pads a batch
        self.startup.mark("rows")


class EvaluatedAdapters(_Rows, AdapterRun):
    """A checkpoint of a run with adapters."""

    def __init__(self, prepared: Prepared, around: Surroundings, path: Path) -> None:
        """All processes must call this.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another run than the config says.
        """
        self._take(prepared, around)
        self._open_rows(around)
        config, shape = self.config, prepared.shape
        # The rows of training are not looked at: they are what the checkpoint says they are.
        self.identity = run_identity(prepared, read_manifest(path)["data"])
        first = preflight.make_method(config, shape, total_steps=preflight.UNKNOWN_STEPS)
        self.resumed = checkpoint.load(
            path,
            sites=shape.table.sites,
            parts=first.entries,
            kinds=first.state_tensors(),
            identity=self.identity,
            dense=shape.dense,
        )
        for change in self.resumed.changes:
            logger.info("since the checkpoint: %s", change)
        self.state = loop_state(self.resumed.loop)
        self.step = self.state.step
        total = self.state.allocator_steps or self.step
        self.method = preflight.make_method(config, shape, total_steps=total)
        self.startup.mark("checkpoint")
        self.arena = LiveArena(
            self.method,
            world=self.world,
            engine_config=prepared.plan.adapter,
            adam=self.adam(),
            seed=config.seed,
            dense=shape.dense,
        )
        self.arena.build(self.resumed.snapshot, self.resumed.layout)
        self._build_backbone()
        self.check_packing(self.backbone.module)
        self.logit_head = self._find_logit_head()
        self.startup.mark("base")

    @property
    def module(self) -> nn.Module:
        return self.backbone.module

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Inside, the adapters compute with the checkpoint's weights, in eval mode and without gradients."""
        gates = self.method.gates(self.step)
        gates = None if gates is None else gates.to(self.world.device)
        self.module.eval()
        with torch.no_grad():
            bind_arena(self.adapters, self.arena.layout, self.arena.engine.weights)
            if self.world.device.type != "cpu":  # as in training (Trainer._group_adapters)
                batch, device = self.eval_data.collate(self.eval_data.grains()[0]), self.world.device
                group_adapters(
                    self.adapters,
                    lambda: loss_sum(self.module, batch, device=device, logit_head=self.logit_head),
                )
            bind_arena(self.adapters, self.arena.layout, self.arena.engine.weights, gates)
            yield
        drop_views(self.adapters)

    def release(self) -> None:
        """Frees weights that a forward left gathered."""
        self.backbone.release()


class EvaluatedFull(_Rows):
    """All weights: a checkpoint of DeepSpeed's, which is unpickled, or the finished run's model as the base."""

    logit_head = None

    def __init__(self, prepared: Prepared, around: Surroundings, target: Target) -> None:
        """All processes must call this.

        target: without a path the config's base is the finished model.

        Raises:
            ConfigError: a checkpoint without allow_pickle.
        """
        self._take(prepared, around)
        self._open_rows(around)
        plan, config = prepared.plan, self.config
        assert plan.full is not None
        path, self.step = target.path, target.step
        if path is not None:
            if not config.allow_pickle:
                raise ConfigError(
                    [
                        f"{path} of method=full is DeepSpeed's own format, pickles that can run code; set "
                        "allow_pickle=true if you trust it, or evaluate the finished run's folder"
                    ]
                )
            identity = run_identity(prepared, read_manifest(path)["data"])
            loaded = checkpoint.load(path, sites=(), parts=NO_PARTS, kinds={}, identity=identity)
            self.step = loop_state(loaded.loop).step
        opened = self.open_base(stage=plan.full["zero_optimization"]["stage"], config=plan.full)
        opened.model.requires_grad_(True)
        self.engine = FullEngine(
            opened.model, config=plan.full, adam=self.adam(), device=self.world.device, weights=opened.weights
        )
        if path is not None:
            self.engine.load(path, ENGINE_FOLDER)
        self.check_packing(self.engine.module)
        self.startup.mark("base")

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Inside, eval mode and no gradients."""
        self.module.eval()
        with torch.no_grad():
            yield

    def release(self) -> None:
        """Frees weights that a forward left gathered."""
        self.engine.release()

    def save(self, reason: str) -> None:
        """Nothing is trained here."""
        raise AssertionError

    def end(self, code: Any) -> None:
        """Nothing is trained here."""
        raise AssertionError
