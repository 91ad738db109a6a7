"""A run that trains every weight: the whole model under one ZeRO engine, its checkpoints and its folder."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ardtrain import checkpoint
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import enable_checkpointing
from ardtrain.checkpoint import saving
from ardtrain.config import ConfigError
from ardtrain.engines import FullState
from ardtrain.engines_full import FullEngine
from ardtrain.evaluating.request import FULL_MODEL
from ardtrain.faults import StopCode
from ardtrain.full import FullTrainer, write_model
from ardtrain.preflight import Prepared
from ardtrain.ranks import RankTable
from ardtrain.resize import Snapshot
from ardtrain.session import Session, Surroundings, logger, loop_state
from ardtrain.trainer import LoopState

ENGINE_FOLDER = "deepspeed"
EXPORT_SECONDS = 3600.0  # the watchdog's patience while the model is gathered and written
NO_PARTS: Any = lambda site: {}  # noqa: E731 - there are no sites


class FullRun(Session):
    """Checkpoints are the engine's own (masters and moments of the whole model) beside our manifest, synchronous."""

    def __init__(self, prepared: Prepared, around: Surroundings) -> None:
        super().__init__(prepared, around)
        world, run_dir = self.world, self.run_dir
        config, plan = self.config, prepared.plan
        assert plan.full is not None
        if world.is_main:
            checkpoint.check_writable(run_dir)
        loaded = self._find_checkpoint()
        self.resumed = loaded
        state = LoopState() if loaded is None else loop_state(loaded.loop)
        self.begin(state.step, is_new=loaded is None)
        opened = self.open_base(stage=plan.full["zero_optimization"]["stage"], config=plan.full)
        model = opened.model
        model.requires_grad_(True)
        if config.gradient_checkpointing:
            enable_checkpointing(model, offload=config.activation_offload, device=self.world.device)
        self.model = model
        self.engine = FullEngine(model, config=plan.full, adam=self.adam(), device=world.device, weights=opened.weights)
        self.check_packing(self.engine.module)
        self.startup.mark("base")
        if loaded is not None:
            self.engine.load(loaded.path, ENGINE_FOLDER)
        self.trainer = FullTrainer(
            self.loop_settings(), world, self.engine, data=self.data, eval_data=self.eval_data, state=state
        )
        self.generates(self.engine.module, self.trainer, sharded=plan.full["zero_optimization"]["stage"] == 3)

    def _find_checkpoint(self) -> checkpoint.Loaded | None:
        """The newest intact checkpoint; its engine's files are pickles, so the config must allow them."""
        resume_from = self.config.resume_from_checkpoint
        known: dict[str, Any] = {"sites": (), "parts": NO_PARTS, "kinds": {}, "identity": self.identity}
        loaded = self.newest_checkpoint(**known)
        if loaded is not None and not self.config.allow_pickle:
            raise ConfigError(
                [
                    f"resume_from_checkpoint={resume_from}: {loaded.path} of method=full is DeepSpeed's own format, "
                    "pickles that can run code; set allow_pickle=true if you trust it"
                ]
            )
        return loaded

    def save(self, reason: str) -> None:
        """All processes write their part of the engine's checkpoint, then process 0 seals it."""
        if not self.engine.resumable:
            logger.warning(
                "no checkpoint: DeepSpeed does not bring an optimizer on NVMe back; the model is written at the end"
            )
            return
        step = self.trainer.state.step
        with self.trainer.clock.section("checkpoint"):
            building, problem = self.world.broadcast_text(self._new_attempt(step)), ""
            if not building:
                return
            try:
                self.engine.save(Path(building), ENGINE_FOLDER)
            except OSError as error:
                problem = saving.reason(error)
            failed = torch.tensor([int(bool(problem))], dtype=torch.int64, device=self.world.device)
            self.world.add_integers(failed)
            if problem:
                logger.error("this process's part of checkpoint-%d failed: %s", step, problem)
            if self.world.is_main:
                self._seal(Path(building), step, problem or ("another process's part failed" if int(failed) else ""))
            self.world.barrier("checkpoint sealed")

    def _new_attempt(self, step: int) -> str:
        if not self.world.is_main:
            return ""
        try:
            return str(saving.new_attempt(self.run_dir, step))
        except OSError as error:
            logger.error("checkpoint-%d was not saved: %s; the run goes on", step, saving.reason(error))
            return ""

    def _seal(self, building: Path, step: int, problem: str) -> None:
        """Manifest, name and pointers; a failure is told and the run goes on."""
        table = RankTable.start((), ())
        nothing = torch.zeros(0)
        snapshot = Snapshot(table, FullState(nothing, nothing, nothing, step), nothing.long())
        loop = asdict(self.trainer.state)
        content = saving.Content(snapshot, ArenaLayout(table, NO_PARTS), step, loop, self.identity, lambda folder: None)
        try:
            if problem:
                raise OSError(problem)
            saving.finish(
                self.run_dir,
                building,
                content,
                {},
                world_size=self.world.world_size,
                is_best=self.trainer.state.best_step == step,
                limit=self.config.save_total_limit,
            )
        except saving.AfterwardsError as error:
            logger.error("%s", error)
        except (OSError, RuntimeError, ValueError) as error:
            shutil.rmtree(building, ignore_errors=True)
            logger.error("checkpoint-%d was not saved: %s; the run goes on", step, saving.reason(error))

    def end(self, code: StopCode) -> None:
        final = self.run_dir / FULL_MODEL
        self.watchdog.touch(EXPORT_SECONDS)
        if code is StopCode.NONE:
            weights = self.engine.full_state_dict()
            problem = ""
            if self.world.is_main:
                building = self.run_dir / ".model.tmp"
                try:
                    checkpoint.remove_folder(building)
                    write_model(building, self.model, weights, self.tokenizer)
                    checkpoint.remove_folder(final)
                    building.rename(final)
                except OSError as error:
                    problem = f"the model was not written: {saving.reason(error)}"
            self.fail_together(problem)
        self.finish(code, f"model: {final}")
