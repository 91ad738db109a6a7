"""One run from config to adapter: wiring and effects around the loop. `cli` calls `train`; every process runs it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from ardtrain import __version__, checkpoint, export, preflight
from ardtrain.ablation import AblationScorer
from ardtrain.adapters import AdapterLinear, DenseLinear, Form, attach, attach_dense, bind_arena, first_dense
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import DTYPES, head_linears, init_head, load_model
from ardtrain.collectives import World, idle_share
from ardtrain.config import (
    AloraBlock,
    ArdLoraBlock,
    ConfigError,
    RunConfig,
    adapter_settings,
    dump_config,
    load_config,
    num_warmup_steps,
    updated,
    with_batch,
)
from ardtrain.deepspeed_config import DeepSpeedPlan, split_deepspeed, take_over
from ardtrain.engines import AdamSettings, BackboneEngine, remove_stale_locks, start_deepspeed
from ardtrain.environment import ProcessIdentity, discover
from ardtrain.environment import export as export_identity
from ardtrain.evaluation import HeldOut
from ardtrain.faults import STATE_AFTER, StopCode, StopRequest, Watchdog, guard_streams, replace_file, write_status
from ardtrain.observe import RunLog, start_logging
from ardtrain.records import Records
from ardtrain.report import draw_ranks
from ardtrain.resize import LiveArena, Snapshot
from ardtrain.schedule import LOSS_SCALE_START
from ardtrain.trainer import Hooks, LoopSettings, LoopState, Trainer

TIMEOUT_SECONDS = 1800.0  # of a collective: the first one waits for the slowest process's loading and tokenising
LOGITS_CHECK_BYTES = 4 << 30  # the exported adapter is run through PEFT where the base is no larger than this
SIGNAL_FLAG = 1 << 20  # stop requests travel as a sum: STOP file 1, a signal SIGNAL_FLAG, over all processes

_logger = logging.getLogger("ardtrain")


@dataclass(frozen=True)
class Prepared:
    """Config and everything that could be checked before weights are loaded."""

    config: RunConfig
    plan: DeepSpeedPlan
    notes: list[str]
    shape: preflight.Shape


def read_run_config(path: str | Path, overrides: Sequence[str], *, world_size: int) -> tuple[RunConfig, list[str]]:
    """The run's resolved config and notes for its user.

    The global batch size is fixed at the first start: a run folder that has a resolved config keeps that one's.
    """
    config, notes = take_over(load_config(path, overrides))
    resolved = Path(config.output_dir) / "config.yaml"
    if config.resume_from_checkpoint is not None and config.global_batch_size is None and resolved.is_file():
        earlier = load_config(resolved)
        config = updated(config, {"global_batch_size": earlier.global_batch_size, "gradient_accumulation_steps": None})
        notes.append(f"global_batch_size={earlier.global_batch_size} as at the first start ({resolved})")
    return with_batch(config, world_size), notes


def prepare(path: str | Path, overrides: Sequence[str], *, world_size: int) -> Prepared:
    """Config, shapes and DeepSpeed plan. Raises ConfigError."""
    config, notes = read_run_config(path, overrides, world_size=world_size)
    shape = preflight.check_model(config)
    plan = split_deepspeed(config, world_size=world_size, trainable_numbers=shape.num_trained)
    if config.num_grains < world_size:
        idle = world_size - config.num_grains
        notes.append(f"{config.num_grains} grains for {world_size} processes: {idle} repeat work that is dropped")
    elif config.num_grains % world_size:
        share = idle_share(config.num_grains, world_size)
        notes.append(f"{config.num_grains} grains over {world_size} processes: {share:.0%} of the rounds are idle")
    return Prepared(config, plan, [*notes, *plan.notes], shape)


def refuse_used_folder(config: RunConfig) -> None:
    """A new run must not share a folder with another run's checkpoints: a later `auto` could take the wrong one.

    Raises:
        ConfigError: output_dir holds checkpoints and the config does not resume.
    """
    earlier = checkpoint.pointed(Path(config.output_dir), "latest")
    if config.resume_from_checkpoint is None and earlier is not None:
        raise ConfigError(
            [
                f"output_dir={config.output_dir} holds an earlier run ({earlier}); go on with it by "
                "resume_from_checkpoint=auto, or choose another output_dir"
            ]
        )


def validate(path: str | Path, overrides: Sequence[str]) -> str:
    """`ardtrain validate CONFIG`: all checks, no weights; returns the summary. Raises ConfigError."""
    prepared = prepare(path, overrides, world_size=1)
    tokenizer = preflight.tokenizer_of(prepared.config)
    data, _ = preflight.open_data(prepared.config, tokenizer, prepared.shape.labels)
    preflight.open_allocation_data(prepared.config, tokenizer, prepared.shape.labels)
    return preflight.summary(prepared.config, prepared.shape, data, prepared.notes)


def train(path: str | Path, overrides: Sequence[str]) -> int:
    """`ardtrain train CONFIG` on this process; returns the exit code. All processes of the run call it."""
    guard_streams()
    _put_own_tools_first()
    identity = discover(os.environ)
    export_identity(identity, os.environ)
    device = _device(identity)
    prepared = prepare(path, overrides, world_size=identity.world_size)
    config = prepared.config
    refuse_used_folder(config)
    torch.set_num_threads(config.num_threads)
    if config.reproducible:
        _choose_deterministic_kernels(device)
    run_dir = Path(config.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    world = World.join(
        global_rank=identity.global_rank,
        world_size=identity.world_size,
        device=device,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    watchdog = Watchdog(world.watchdog_store(), hosts_store=world.is_main)
    watchdog.start()
    end_logging = start_logging(run_dir, global_rank=identity.global_rank)
    run: Run | None = None
    try:
        run = Run(prepared, world, identity, run_dir)
        run.execute()
        world.barrier("end of the run")
    except BaseException as error:
        mistake = isinstance(error, ValueError)
        text = f"process {identity.global_rank}: {error if mistake else traceback.format_exc()}"
        _logger.error(text)  # into this process's file, and on process 0 to the console
        if not world.is_main:
            print(text, file=sys.stderr)
        if world.is_main:
            write_status(run_dir, "failed", run.trainer.state.step if run else 0, error=str(error))
        watchdog.report(text)
        # The others may hang in a collective that this process will never join; leaving the group could hang as well.
        _exit_at_once(2 if mistake else 1)
    watchdog.stop()
    end_logging()
    world.leave()
    return 0


def _exit_at_once(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _put_own_tools_first() -> None:
    """This Python's own folder goes to the front of PATH: DeepSpeed builds ops with the first `ninja` it finds.

    Under srun or an absolute python path the environment's ninja may not be found, and two ninja versions that take
    turns (the system's, the environment's) do not read each other's log and compile every op anew, a minute each time.
    """
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "").split(os.pathsep)
    if path[:1] != [own]:
        os.environ["PATH"] = os.pathsep.join([own, *path])


def _device(identity: ProcessIdentity) -> torch.device:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        torch.cuda.set_device(identity.local_rank)
        return torch.device("cuda", identity.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def _choose_deterministic_kernels(device: torch.device) -> None:
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Run:
    """The parts of one run, built in order, and what happens around its steps."""

    def __init__(self, prepared: Prepared, world: World, identity: ProcessIdentity, run_dir: Path) -> None:
        self.prepared, self.config, self.world, self.run_dir = prepared, prepared.config, world, run_dir
        self.best_step = -1  # of the best evaluation; `best` names the checkpoint of the same step, if there is one
        config, shape = self.config, prepared.shape
        if identity.local_rank == 0:
            for lock in remove_stale_locks(_extensions_folder()):
                _logger.warning("removed %s, left by a compile that was killed", lock)
        world.barrier("ops may be built")
        start_deepspeed(world.device)
        tokenizer = preflight.tokenizer_of(config)
        if identity.local_rank == 0:
            preflight.open_data(config, tokenizer, shape.labels)
        world.barrier("rows tokenised")
        self.data, self.eval_data = preflight.open_data(config, tokenizer, shape.labels)
        self.allocation_data = preflight.open_allocation_data(config, tokenizer, shape.labels)
        self.identity = checkpoint.Identity(shape.backbone_fingerprint, self.data.fingerprint, _versions())
        world.agree("config, model or data", _digest(dump_config(config), shape, self.data.fingerprint), step=0)
        self.method = preflight.make_method(
            config,
            shape,
            total_steps=self.data.num_steps,
            steps_per_epoch=preflight.steps_per_epoch(config, self.data),
        )
        self.resumed = self._find_checkpoint()
        if world.is_main:
            write_status(run_dir, "started", self.resumed.loop["step"] if self.resumed else 0)
            if self.resumed is None:
                replace_file(run_dir / "config.yaml", dump_config(config))
        self.arena = LiveArena(
            self.method,
            world=world,
            engine_config=prepared.plan.adapter,
            adam=_adam(config),
            seed=config.seed,
            dense=shape.dense,
        )
        self._build_backbone()
        self.trainer = self._build_trainer()

    def _find_checkpoint(self) -> checkpoint.Loaded | None:
        path = checkpoint.find(self.run_dir, self.config.resume_from_checkpoint)
        chosen = self.world.broadcast_text("" if path is None else str(path))
        if not chosen:
            return None
        return checkpoint.load(
            Path(chosen),
            sites=self.prepared.shape.table.sites,
            parts=self.method.entries,
            kinds=self.method.state_tensors(),
            identity=self.identity,
            dense=self.prepared.shape.dense,
        )

    def _build_backbone(self) -> None:
        config, plan = self.config, self.prepared.plan
        shape = self.prepared.shape
        model = self._load_base()
        if config.gradient_checkpointing:  # non-reentrant: the views are no arguments of the checkpointed function
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sites = shape.table.sites
        dropout = {s.tower: adapter_settings(config, s.tower).lora_dropout for s in sites}
        form: Form = "plain"
        if config.method == "dora":
            form = "dora"
        elif config.method == "ard_lora":
            form = (config.ard_lora or ArdLoraBlock()).layout
        self.adapters: dict[str, AdapterLinear | DenseLinear] = {
            **attach(model, sites, dropout=dropout, form=form, heads=shape.heads)
        }
        if shape.labels:
            self.adapters |= attach_dense(model, list(head_linears(model)))
        self.first_dense = first_dense(self.adapters)
        self.backbone = BackboneEngine(model, stage=plan.backbone_stage, config=plan.backbone, device=self.world.device)

    def _load_base(self) -> PreTrainedModel:
        """The base as transformers loads it; a new classifier head is a function of the run's seed."""
        labels = self.prepared.shape.labels
        model = load_model(
            preflight.model_source(self.config),
            compute_dtype=self.prepared.plan.compute_dtype,
            num_labels=len(labels) or None,
            label_names=labels or None,
            pad_token_id=self.data.pad_token_id if labels else None,
        )
        if labels:
            init_head(model, self.config.seed)
        return model

    def _build_trainer(self) -> Trainer:
        config, loaded = self.config, self.resumed
        if loaded is None:
            self.arena.start(self.prepared.shape.table, self.first_dense)
            fp16 = self.prepared.plan.compute_dtype == "fp16"
            state = LoopState(loss_scale=LOSS_SCALE_START if fp16 else 1.0)
        else:
            self.arena.build(loaded.snapshot, loaded.layout)
            state = LoopState(**loaded.loop)
        settings = LoopSettings(
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
        )
        parts = (self.backbone, self.adapters, self.arena, self.method, self.data, self.eval_data)
        trainer = Trainer(settings, self.world, *parts, self.allocation_data, state=state)
        if self.method.needs.ablation:
            trainer.ablation = self._make_ablation()
        return trainer

    def _make_ablation(self) -> AblationScorer:
        assert self.allocation_data is not None
        block = self.config.alora or AloraBlock()
        return AblationScorer(
            self.backbone.module,
            {m: a for m, a in self.adapters.items() if isinstance(a, AdapterLinear)},
            self.allocation_data,
            world=self.world,
            mask_dtype=DTYPES[self.prepared.plan.compute_dtype],
            release=self.backbone.release,
            ablations_per_forward=block.ablations_per_forward,
            shortlist=block.shortlist,
        )

    def execute(self) -> None:
        """Trains, saves, exports. All processes must call this."""
        config, trainer = self.config, self.trainer
        with (
            RunLog(
                self.run_dir,
                is_main=self.world.is_main,
                num_steps=self.data.num_steps,
                first_step=trainer.state.step,
            ) as self.log,
            StopRequest(
                self.run_dir, reads_file=self.world.is_main, signals=config.preemption_signal
            ) as self.stop_request,
        ):
            self.records = Records(self.run_dir, self.log, trainer, config)
            self._announce()
            trainer.hooks = Hooks(self.records.step, self._on_evaluate, self._save, self._stop_flag)
            flag = trainer.fit()
            code = StopCode.SIGNAL if flag >= SIGNAL_FLAG else StopCode.FILE if flag else StopCode.NONE
            difference = self._export_final() if code is StopCode.NONE else None
            self._finish(code, difference)

    def _announce(self) -> None:
        self.log.say(
            preflight.summary(self.config, self.prepared.shape, self.data, self.prepared.notes)
            + f"\nprocesses: {self.world.world_size} on {self.world.device.type}, backbone ZeRO-"
            f"{self.prepared.plan.backbone_stage}, compute {self.prepared.plan.compute_dtype}"
        )
        if self.resumed is not None:
            self.log.say(f"resumed from {self.resumed.path} after step {self.trainer.state.step}")
        else:
            self.records.start(self.arena.table)

    def _stop_flag(self) -> int:
        code = self.stop_request.requested()
        return SIGNAL_FLAG if code is StopCode.SIGNAL else int(code)

    def _on_evaluate(self, step: int, held_out: HeldOut) -> None:
        self.records.evaluation(step, held_out)
        best = self.trainer.state.best_loss
        if best is None or held_out.loss < best:
            self.trainer.state.best_loss, self.best_step = held_out.loss, step

    def _save(self, reason: str) -> None:
        """A checkpoint at this step boundary: all capture and agree, process 0 writes."""
        step = self.trainer.state.step
        with self.trainer.clock.section("checkpoint"):
            snapshot = self.arena.capture()
            self.world.agree("weights or moments", weights_digest(snapshot), step=step)
            if self.world.is_main:
                path = checkpoint.save(
                    self.run_dir,
                    snapshot,
                    self.arena.layout,
                    step=step,
                    loop=asdict(self.trainer.state),
                    identity=self.identity,
                    write_adapter=lambda folder: self._write_adapter(folder, snapshot.full.master, self.arena.layout),
                )
                if self.best_step == step:
                    replace_file(self.run_dir / "best", path.name + "\n")
                checkpoint.prune(self.run_dir, self.config.save_total_limit)
            self.world.barrier("checkpoint written")

    def _write_adapter(self, folder: Path, master: torch.Tensor, layout: ArenaLayout) -> None:
        config = export.peft_config(
            layout,
            base_model=self.config.model_name_or_path,
            revision=self.config.revision,
            lora_dropout=self.config.lora_dropout,
            task_type="SEQ_CLS" if self.prepared.shape.labels else "CAUSAL_LM",
        )
        gates = self.method.gates(self.trainer.state.step)
        export.write_peft(folder, master, layout, config, heads=self.prepared.shape.heads, gates=gates)

    def _export_final(self) -> float | None:
        """The final adapter, complete and compared with PEFT's reading before it gets its name; all must call this.

        Returns:
            The largest logit difference to PEFT's, or None where the base is too large to load once more.
        """
        ids = torch.arange(1, 33, device=self.world.device).remainder(self._vocab_size())[None]
        module = self.backbone.module.eval()
        gates = self.method.gates(self.trainer.state.step)
        bind_arena(
            self.adapters,
            self.arena.layout,
            self.arena.engine.weights,
            None if gates is None else gates.to(self.world.device),
        )
        with torch.no_grad():
            logits = module(input_ids=ids).logits.cpu()
        difference, problem = None, ""
        if self.world.is_main:
            try:
                difference = self._export_and_compare(ids.cpu(), logits)
            except RuntimeError as error:
                problem = str(error)
        problem = self.world.broadcast_text(problem)
        if problem:
            raise RuntimeError(problem)
        return difference

    def _export_and_compare(self, ids: torch.Tensor, logits: torch.Tensor) -> float | None:
        building, final = self.run_dir / ".adapter.tmp", self.run_dir / "adapter"
        checkpoint.remove_folder(building)
        self._write_adapter(building, self.arena.engine.weights.cpu(), self.arena.layout)
        dtype = self.prepared.plan.compute_dtype
        difference = None
        if self.prepared.shape.num_base * DTYPES[dtype].itemsize <= LOGITS_CHECK_BYTES:
            base = self._load_base()
            difference = export.compare_with_peft(building, base, ids, logits)
            limit = export.LOGIT_TOLERANCE[dtype] * max(1.0, float(logits.abs().max()))
            if not difference <= limit:
                raise RuntimeError(
                    f"the exported adapter gives logits {difference:.2e} away from training's (limit {limit:.2e}); it "
                    f"was left in {building} and not published"
                )
        checkpoint.remove_folder(final)
        building.rename(final)
        return difference

    def _vocab_size(self) -> int:
        model: Any = self.backbone.module
        return int(model.get_input_embeddings().num_embeddings)

    def _finish(self, code: StopCode, difference: float | None) -> None:
        step = self.trainer.state.step
        self.stop_request.carried_out()
        if not self.world.is_main:
            return
        if code is StopCode.NONE:
            picture = self.run_dir / "ranks.png"
            draw_ranks(self.run_dir / "ranks.jsonl", picture)
            check = (
                "base too large to run through PEFT" if difference is None else f"PEFT's logits: {difference:.1e} off"
            )
            self.log.say(f"adapter: {self.run_dir / 'adapter'} ({check})\nranks: {picture}")
        else:
            self.log.say(
                f"stopped at step {step} on request; with resume_from_checkpoint=auto the same command goes on"
            )
        write_status(self.run_dir, STATE_AFTER[code], step, best_loss=self.trainer.state.best_loss)


def weights_digest(snapshot: Snapshot) -> str:
    """sha256 over table, master and moments; equal on every process, or something is broken."""
    digest = hashlib.sha256(snapshot.table.digest.encode())
    for tensor in (snapshot.full.master, snapshot.full.exp_avg, snapshot.full.exp_avg_sq, *snapshot.entries.values()):
        digest.update((tensor + 0.0).numpy().tobytes())
    return digest.hexdigest()


def _extensions_folder() -> Path:
    """Where torch builds DeepSpeed's ops at first use."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _adam(config: RunConfig) -> AdamSettings:
    o = config.optimizer
    return AdamSettings(o.betas, o.eps, o.weight_decay, config.offload_optimizer_kernel)


def _versions() -> dict[str, str]:
    others = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"ardtrain": __version__, **others}  # a checkout need not be installed


def _digest(config_text: str, shape: preflight.Shape, data_fingerprint: str) -> str:
    text = "\n".join([config_text, shape.table.digest, shape.backbone_fingerprint, data_fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()
