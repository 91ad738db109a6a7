"""What every kind of run shares: data, identity, records, stop requests, saves, status. The kinds: adapters, full."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ardtrain import __version__, checkpoint, preflight, run_data
from ardtrain.backbones import DTYPES, init_head, load_config, load_model, quantize_base, take_quantization
from ardtrain.best import Judge
from ardtrain.collectives import World
from ardtrain.config import (
    ConfigError,
    RunConfig,
    best_metric,
    dump_config,
    is_greater_better,
    num_warmup_steps,
)
from ardtrain.config.resuming import CHANGEABLE, ELSEWHERE
from ardtrain.engines import AdamSettings, start_deepspeed
from ardtrain.engines_filling import can_fill_slices, fill_whole
from ardtrain.environment import ProcessIdentity, job_id
from ardtrain.evaluating.answers import Answers
from ardtrain.evaluation import HeldOut
from ardtrain.faults import STATE_AFTER, StopCode, StopRequest, Watchdog, host_name, replace_file, write_status
from ardtrain.fingerprint import INDEX, fingerprint, hub_weight_files
from ardtrain.loading import checked, known_checksum, quantized, verify_files
from ardtrain.observe import ReadingBar, RunLog, Startup
from ardtrain.opening import Opened, open_model
from ardtrain.ops import extensions_folder, remove_stale_locks
from ardtrain.packing import check_packing
from ardtrain.preflight import Prepared
from ardtrain.quantized import Packing
from ardtrain.records import Records
from ardtrain.run_info import write_run_info
from ardtrain.trackers import Trackers
from ardtrain.trainer import Hooks, LoopSettings, LoopState, StepResult, Trainer
from ardtrain.utilisation import utilisation

SIGNAL_FLAG = 1 << 20  # stop requests travel as a sum: STOP file 1, a signal SIGNAL_FLAG, over all processes
STARTED = time.monotonic()  # of this process, near enough: max_hours counts from here

logger = logging.getLogger("ardtrain")


@dataclass(frozen=True)
class Surroundings:
    """What a process has before its run is built."""

    world: World
    place: ProcessIdentity
    run_dir: Path
    watchdog: Watchdog
    stop_request: StopRequest
    startup: Startup


class Session(ABC):
    """One run on this process: built in order, then `execute`. Subclasses build the trainer, save and export."""

    trainer: Trainer
    resumed: checkpoint.Loaded | None

    def __init__(self, prepared: Prepared, around: Surroundings) -> None:
        """All processes must call this."""
        self._take(prepared, around)
        world, run_dir, config, shape = self.world, self.run_dir, self.config, prepared.shape
        self.tokenizer = run_data.tokenizer_of(config)
        if around.place.local_rank == 0:
            run_data.open_data(config, self.tokenizer, shape.labels)
        world.barrier("rows tokenised")
        self.data, self.eval_data = run_data.open_data(config, self.tokenizer, shape.labels)
        self.allocation_data = run_data.open_allocation_data(config, self.tokenizer, shape.labels)
        self.identity = run_identity(prepared, self.data.fingerprint)
        world.agree("config, model or data", _digest(dump_config(config), shape, self.identity), step=0)
        self.startup.mark("rows")
        if world.is_main:
            for note in checkpoint.clean(run_dir):
                logger.warning(note)

    def _take(self, prepared: Prepared, around: Surroundings) -> None:
        """What stands before the run's own parts; DeepSpeed starts. All processes must call this."""
        world, identity = around.world, around.place
        self.prepared, self.config, self.world, self.run_dir = prepared, prepared.config, world, around.run_dir
        self.watchdog, self.stop_request, self.startup = around.watchdog, around.stop_request, around.startup
        self.launcher = identity.source
        if identity.local_rank == 0:
            for lock in remove_stale_locks(extensions_folder()):
                logger.warning("removed %s, left by a compile that was killed", lock)
        world.barrier("ops may be built")
        start_deepspeed(world.device)
        self.startup.mark("DeepSpeed's ops")

    def newest_checkpoint(self, **known: Any) -> checkpoint.Loaded | None:
        """The newest intact checkpoint: process 0 finds and verifies it, the others take the same one.

        Args:
            known: what `checkpoint.load` asks for. All processes must call this.
        """
        loaded = None
        if self.world.is_main:
            loaded, notes = checkpoint.load_newest(self.run_dir, self.config.resume_from_checkpoint, **known)
            for note in notes:
                logger.warning(note)
        chosen = self.world.broadcast_text("" if loaded is None else str(loaded.path))
        if chosen and loaded is None:
            loaded = checkpoint.load(Path(chosen), **known)
        return loaded

    def begin(self, step: int, *, is_new: bool) -> None:
        """Says on disk that the run has started, and where."""
        if self.world.is_main:
            write_status(self.run_dir, "started", step, **self._place())
            if is_new or not (self.run_dir / "config.yaml").is_file():  # goes on from a checkpoint of another folder
                replace_file(self.run_dir / "config.yaml", dump_config(self.config))

    def load_base(self) -> PreTrainedModel:
        """The base as transformers loads it, quantised if so set; a new classifier head is a function of the seed.

        Files that bitsandbytes quantised are read by us, without that library.
        """
        source = run_data.model_source(self.config)
        if take_quantization(source, load_config(source)):
            opened = self._open(shares=1)
            assert opened.weights is not None, "or open_model refuses"
            fill_whole(opened.model, opened.weights, torch.device("cpu"))
            return opened.model
        model = load_model(source, **self._base_arguments())
        if self.prepared.shape.labels:
            init_head(model, self.config.seed)
        self._quantize(model)
        return model

    def _quantize(self, model: PreTrainedModel) -> dict[str, Packing]:
        """Quantises the base's linears if so set; where they lie on the meta device, their shapes."""
        if self.config.quantization is None:
            return {}
        return quantize_base(model, self.config.quantization, carried=self.prepared.plan.base_on_nvme)

    def open_base(self, *, stage: int, config: Mapping[str, Any]) -> Opened:
        """The base without its weights, and where they are, for an engine of this ZeRO stage and config to fill.

        Where they cannot be read directly it is `load_base`'s, whole. All processes must call this.

        Raises:
            ValueError: files are missing, damaged or lack tensors; or, with verify_weights, have other checksums.
        """
        if self.config.verify_weights:
            self._verify_files()
        if stage == 3 and not can_fill_slices(config):
            logger.warning("DeepSpeed quantises the slices of the base, so every process loads all of it")
            return Opened(self.load_base(), None)
        return self._open(shares=self.world.world_size if stage == 3 else 1)

    def _open(self, *, shares: int) -> Opened:
        """The base for an engine that keeps one of this many shares of it on each process; no communication."""
        opened = open_model(run_data.model_source(self.config), **self._base_arguments())
        if self.prepared.shape.labels:
            init_head(opened.model, self.config.seed)
        if opened.decoded and self.config.quantization is None:
            logger.warning(
                "the base's files are quantised by bitsandbytes and are decoded to %s; quantization: nf4 or int8 keeps "
                "them in few bits", self.prepared.plan.compute_dtype,
            )  # fmt: skip
        packings = self._quantize(opened.model)
        if opened.weights is None or opened.shards is None:
            return opened
        shards, start = opened.shards, time.monotonic()
        weights = checked(opened.weights) if self.config.verify_weights else opened.weights
        weights = quantized(weights, packings)
        bar = ReadingBar(weights.nbytes(opened.model) // shares, is_main=self.world.is_main)

        def close() -> None:
            bar.close()
            weights.close()
            gib, seconds = shards.bytes_read / 2**30, time.monotonic() - start
            logger.info("base: read %.2f of %.2f GiB in %.1f s", gib, shards.nbytes / 2**30, seconds)

        return replace(opened, weights=replace(weights, progress=bar.add, close=close))

    def _verify_files(self) -> None:
        """Each process compares its share of the weight files to their checksums. All processes must call this."""
        found = hub_weight_files(self.config.model_name_or_path, self.config.revision)
        paths = [path for path in found if path.name != INDEX]
        if self.world.is_main:
            unknown = [path.name for path in paths if known_checksum(path) is None]
            if unknown:
                logger.warning("verify_weights: no checksum is known of %s", ", ".join(unknown))
        world = self.world
        verify_files(paths[world.global_rank :: world.world_size])
        world.barrier("weight files verified")

    def _base_arguments(self) -> dict[str, Any]:
        labels = self.prepared.shape.labels
        return {
            "compute_dtype": self.prepared.plan.compute_dtype,
            "num_labels": len(labels) or None,
            "label_names": labels or None,
            "pad_token_id": self.data.pad_token_id if labels else None,
        }

    def check_packing(self, module: nn.Module) -> None:
        """Refuses packed rows of which the model makes one document. All processes must call this.

        Raises:
            ConfigError: see packing.check_packing.
        """
        if self.config.packing:
            try:
                check_packing(module, device=self.world.device)
            except ValueError as error:
                raise ConfigError([str(error)]) from error

    def loop_settings(self) -> LoopSettings:
        """What the loop takes from the config."""
        config = self.config
        return LoopSettings(
            seed=config.seed,
            total_steps=self.data.num_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=num_warmup_steps(config, self.data.num_steps),
            max_grad_norm=config.max_grad_norm,
            max_skipped_steps=config.max_skipped_steps,
            score_at=config.score_at,
            compute_dtype=DTYPES[self.prepared.plan.compute_dtype],
            lora_plus_ratio=config.optimizer.lora_plus_ratio,
            eval_on_start=config.eval_on_start,
            eval_steps=config.eval_steps,
            save_steps=config.save_steps,
            stop_poll_seconds=config.stop_poll_seconds,
            check_every=config.check_every,
            judge=Judge(
                best_metric(config.metric_for_best_model),
                is_greater_better(config),
                config.early_stopping_patience,
                config.early_stopping_threshold,
            ),
        )

    def generates(self, module: nn.Module, trainer: Trainer, *, sharded: bool) -> None:
        """Has the trainer's evaluations answer the held-out rows, where the config wants it. All must call this."""
        if self.eval_data is not None and self.config.generated_metrics:
            trainer.answers = Answers(
                self.config,
                self.tokenizer,
                self.eval_data,
                module,
                world=self.world,
                sharded=sharded,
                between=trainer.between,
            )

    def execute(self) -> None:
        """Trains, saves, exports. All processes must call this."""
        trainer = self.trainer
        with RunLog(
            self.run_dir,
            is_main=self.world.is_main,
            num_steps=self.data.num_steps,
            first_step=trainer.state.step,
            resumed=self.resumed is not None,
            trackers=lambda: Trackers(self.config, self.run_dir, first_step=trainer.state.step),
        ) as self.log:
            known = self._utilisation(trainer)
            self.records = Records(self.run_dir, self.log, trainer, self.config, utilisation=known)
            self.announce()
            trainer.hooks = Hooks(
                on_step=self._on_step,
                on_event=self.records.event,
                on_evaluate=self._on_evaluate,
                save=self.save,
                stop_flag=self._stop_flag,
                alive=self.watchdog.touch,
            )
            flag = trainer.fit()
            code = StopCode.FILE if flag % SIGNAL_FLAG else StopCode.SIGNAL if flag else StopCode.NONE
            if code is StopCode.NONE and self.world.is_main:
                self.records.drawn(self.data.drawn(trainer.state.step))
            self.end(code)

    def _utilisation(self, trainer: Trainer) -> Callable[[float], float] | None:
        """Of a frozen base on GPUs whose speed is known."""
        device = self.world.device
        if device.type != "cuda" or self.config.method == "full":
            return None
        gpu, module = torch.cuda.get_device_name(device), trainer.backbone.module
        return utilisation(module, gpu=gpu, world_size=self.world.world_size)

    def announce(self) -> None:
        """What a run begins with, on the console."""
        plan = self.prepared.plan
        self.log.say(
            preflight.summary(self.config, self.prepared.shape, self.data, self.prepared.notes)
            + f"\nprocesses: {self.world.world_size} on {self.world.device.type}, base ZeRO-{plan.backbone_stage}, "
            f"compute {plan.compute_dtype}"
        )
        if self.world.is_main:
            shape = self.prepared.shape
            write_run_info(
                self.run_dir,
                step=self.trainer.state.step,
                sites=shape.table.sites,
                num_trained=shape.num_trained,
                num_base=shape.num_base,
                world_size=self.world.world_size,
                device=self.world.device,
                sources={s.name: {**asdict(s), "passes": s.passes} for s in self.data.shares},
            )
        if self.resumed is not None:
            self.log.say(f"resumed from {self.resumed.path} after step {self.trainer.state.step}")
            for change in self.resumed.changes:
                logger.warning("since the checkpoint: %s", change)

    def _stop_flag(self) -> int:
        """This process's part of the sum of stop requests; the time limit is process 0's and counts as a signal."""
        limit = self.config.max_hours
        out_of_time = limit is not None and self.world.is_main and time.monotonic() - STARTED > limit * 3600
        code = self.stop_request.requested()
        if code is StopCode.NONE and out_of_time:
            code = StopCode.SIGNAL
        return SIGNAL_FLAG if code is StopCode.SIGNAL else int(code)

    def _on_step(self, result: StepResult) -> None:
        self.records.step(result)
        if self.startup.seconds.get("first step") is None:
            self.startup.mark("first step")
            logger.info("%s", self.startup.text())
            self.log.metrics(result.step + 1, {"startup_seconds": self.startup.seconds})

    def _on_evaluate(self, step: int, held_out: HeldOut) -> None:
        self.records.evaluation(step, held_out)
        best = self.trainer.state.best_loss
        if best is None or held_out.loss < best:
            self.trainer.state.best_loss = held_out.loss

    @abstractmethod
    def save(self, reason: str) -> None:
        """A checkpoint at this step boundary. All processes must call this."""

    @abstractmethod
    def end(self, code: StopCode) -> None:
        """What follows the last step or a stop. All processes must call this."""

    def finish(self, code: StopCode, text: str) -> None:
        """The last lines and the status, after everything else stands."""
        step = self.trainer.state.step
        self.stop_request.carried_out()
        if not self.world.is_main:
            return
        if code is not StopCode.NONE:
            text = f"stopped at step {step} on request; with resume_from_checkpoint=auto the same command goes on"
        elif self.trainer.waited_enough:
            self.log.say(self._waited_text())
        self.log.say(text)
        best_loss = self.trainer.state.best_loss
        write_status(self.run_dir, STATE_AFTER[code], step, **self._place(), best_loss=best_loss)

    def _waited_text(self) -> str:
        state = self.trainer.state
        best = "none" if state.best_value is None else f"{state.best_value:.4f} at step {state.best_step}"
        return (
            f"ended early at step {state.step}: {state.waited} evaluations were no better than the best "
            f"eval_{state.best_metric}, {best} (early_stopping_patience={self.config.early_stopping_patience})"
        )

    def _place(self) -> dict[str, Any]:
        """What `status.json` says of the processes, and how long the run is."""
        return {
            "num_steps": self.data.num_steps,
            "world_size": self.world.world_size,
            "host": host_name(),  # of process 0
            "pid": os.getpid(),
            "launcher": self.launcher,
            "job_id": job_id(os.environ),
        }

    def fail_together(self, problem: str) -> None:
        """Raises process 0's problem on every process, "" for none. All processes must call this."""
        problem = self.world.broadcast_text(problem)
        if problem:
            raise RuntimeError(problem)

    def adam(self) -> AdamSettings:
        """AdamW's numbers."""
        o = self.config.optimizer
        return AdamSettings(o.betas, o.eps, o.weight_decay, self.config.offload_optimizer_kernel)


def run_identity(prepared: Prepared, data_fingerprint: str) -> checkpoint.Identity:
    """What a checkpoint of this run belongs to."""
    config = prepared.config
    values = config.model_dump(mode="json")
    changeable = {name: values[name] for name in CHANGEABLE}
    settings = {n: v for n, v in values.items() if n not in CHANGEABLE and n not in ELSEWHERE and v is not None}
    settings["compute_dtype"] = prepared.plan.compute_dtype
    settings["quantization"] = config.quantization or "none"  # a base in full is another one than in few bits
    if config.ranks_from is not None:  # a budget may follow from them, and the folder may hold another adapter by now
        settings["first_ranks"] = prepared.shape.table.digest
    return checkpoint.Identity(
        backbone=prepared.shape.backbone_fingerprint,
        data=data_fingerprint,
        versions=_versions(),
        weights=_weights(config),
        method=config.method,
        settings=settings,
        changeable=changeable,
    )


def _weights(config: RunConfig) -> dict[str, str]:
    """The base's weight files, sampled; empty where they cannot be found ahead of loading."""
    try:
        return fingerprint(hub_weight_files(config.model_name_or_path, config.revision))
    except (OSError, ValueError) as error:
        logger.warning("the base's weight files are not fingerprinted: %s", error)
        return {}


def loop_state(stored: dict[str, Any]) -> LoopState:
    """The loop's state from a checkpoint; what an older one lacks has its default."""
    known = LoopState.__dataclass_fields__
    return LoopState(**{name: value for name, value in stored.items() if name in known})


def _versions() -> dict[str, str]:
    others = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"ardtrain": __version__, **others}  # a checkout need not be installed


def _digest(config_text: str, shape: preflight.Shape, identity: checkpoint.Identity) -> str:
    own = json.dumps(identity.to_json(), sort_keys=True)
    text = "\n".join([config_text, shape.table.digest, own])
    return hashlib.sha256(text.encode()).hexdigest()
