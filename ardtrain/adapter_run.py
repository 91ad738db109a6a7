"""A run with adapters: the frozen backbone, the arena, the method; its checkpoints and its PEFT folder."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ardtrain import checkpoint, export, preflight, run_data, zero_checkpoint
from ardtrain.ablation import AblationScorer
from ardtrain.adapters import AdapterLinear, DoraLinear, attach, bind_arena, first_dense
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import DTYPES, enable_checkpointing, tower_text
from ardtrain.cards import Described, write_card
from ardtrain.checkpoint import saving
from ardtrain.config import AloraBlock, adapter_settings
from ardtrain.dense import DenseModule, attach_dense
from ardtrain.engines import BackboneEngine
from ardtrain.evaluation import image_inputs, loss_sum
from ardtrain.faults import StopCode
from ardtrain.loading import read_modules
from ardtrain.logits import LogitHead, find_logit_head
from ardtrain.methods.base import Method
from ardtrain.prefix_mask import check_first_masks
from ardtrain.preflight import Prepared
from ardtrain.quantized import dequantize_modules
from ardtrain.resize import LiveArena
from ardtrain.schedule import LOSS_SCALE_START
from ardtrain.session import Session, Surroundings, logger, loop_state
from ardtrain.token_rows import TokenRows, embedding_path
from ardtrain.trainer import LoopState, Trainer, tensor_digest

EXPORT_SECONDS = 3600.0  # the watchdog's patience while the base is loaded once more
LOGITS_CHECK_BYTES = 4 << 30  # the exported adapter is run through PEFT where the base is no larger than this


class AdapterRun(Session):
    """Parts in the order in which they are built: method, checkpoint, arena, backbone, trainer."""

    def __init__(self, prepared: Prepared, around: Surroundings) -> None:
        super().__init__(prepared, around)
        world, run_dir = self.world, self.run_dir
        config, shape = self.config, prepared.shape
        self.writer = checkpoint.Writer(
            run_dir, global_rank=world.global_rank, world_size=world.world_size, limit=config.save_total_limit
        )
        self.method = self._make_method(self.data.num_steps)
        layout = ArenaLayout(shape.table, self.method.entries, shape.dense)
        if world.is_main:
            checkpoint.check_writable(run_dir, checkpoint.state_bytes(layout, self.method.state_tensors()))
        self.resumed = self._find_checkpoint()
        self.state = self._first_state()
        self.startup.mark("checkpoint")
        self.begin(self.state.step, is_new=self.resumed is None)
        self.arena = LiveArena(
            self.method,
            world=world,
            engine_config=prepared.plan.adapter,
            adam=self.adam(),
            seed=config.seed,
            dense=shape.dense,
        )
        self.startup.mark("adapters")
        self._build_backbone()
        self.startup.mark("base")
        self.trainer = self._build_trainer()

    def _make_method(self, total_steps: int) -> Method:
        per_epoch = run_data.steps_per_epoch(self.config, self.data)
        shape = self.prepared.shape
        return preflight.make_method(self.config, shape, total_steps=total_steps, steps_per_epoch=per_epoch)

    def _find_checkpoint(self) -> checkpoint.Loaded | None:
        """The checkpoint to go on from, ours or one of DeepSpeed's folders."""
        shape, resume_from = self.prepared.shape, self.config.resume_from_checkpoint
        known: dict[str, Any] = {
            "sites": shape.table.sites,
            "parts": self.method.entries,
            "kinds": self.method.state_tensors(),
            "identity": self.identity,
            "dense": shape.dense,
        }
        if resume_from is not None and zero_checkpoint.holds_zero(Path(resume_from)):
            return zero_checkpoint.load(Path(resume_from), allow_pickle=self.config.allow_pickle, **known)
        return self.newest_checkpoint(**known)

    def _first_state(self) -> LoopState:
        """The loop's state, and the method for the length that its allocator has.

        A run that is made longer or shorter while ranks still adapt gets the schedule of its new length; afterwards
        its ranks stay as they are.
        """
        total = self.data.num_steps
        if self.resumed is None:
            fp16 = self.prepared.plan.compute_dtype == "fp16"
            return LoopState(loss_scale=LOSS_SCALE_START if fp16 else 1.0, allocator_steps=total)
        state = loop_state(self.resumed.loop)
        before = state.allocator_steps or total
        if before != total:
            earlier = self._make_method(before)
            if state.step >= earlier.adapt_end():
                self.method = earlier
                logger.warning("the run has %d steps now, not %d; ranks had settled and stay", total, before)
            else:
                state.allocator_steps = total
                logger.warning("the run has %d steps now, not %d; the allocator's schedule follows", total, before)
        return state

    def _build_backbone(self) -> None:
        config, plan, shape = self.config, self.prepared.plan, self.prepared.shape
        opened = self.open_base(stage=plan.backbone_stage, config=plan.backbone)
        model = opened.model
        if config.gradient_checkpointing:
            enable_checkpointing(model, offload=config.activation_offload, device=self.world.device)
        sites = shape.table.sites
        dropout = {s.tower: adapter_settings(config, s.tower).lora_dropout for s in sites}
        self.adapters: dict[str, AdapterLinear | DenseModule] = {
            **attach(model, sites, dropout=dropout, form=preflight.adapter_form(config), heads=shape.heads)
        }
        in_full = list(preflight.in_full(config, model))
        if opened.weights is not None:
            read_modules(model, opened.weights, in_full)
        self.adapters |= attach_dense(model, in_full)
        self.backbone = BackboneEngine(
            model,
            stage=plan.backbone_stage,
            config=plan.backbone,
            device=self.world.device,
            weights=opened.weights,
        )
        if opened.weights is not None:
            for adapter in self.adapters.values():
                if isinstance(adapter, DoraLinear):
                    with self.backbone.whole(adapter.weight):
                        adapter.measure()
        if config.task == "image_text_to_text":
            check_first_masks(model)
        if shape.tokens:
            self._attach_tokens(model)

    def _attach_tokens(self, model: PreTrainedModel) -> None:
        """Binds the trained rows to the embeddings; the first start reads them. All processes must call this."""
        path, first = embedding_path(model), None
        if self.resumed is None:
            first = self.backbone.read_rows(path, self.prepared.shape.tokens)
        self.adapters[path] = TokenRows(model, self.prepared.shape.tokens, first)

    def _build_trainer(self) -> Trainer:
        if self.resumed is None:
            self.arena.start(self.prepared.shape.table, first_dense(self.adapters), self.prepared.shape.rows)
        else:
            self.arena.build(self.resumed.snapshot, self.resumed.layout)
        for adapter in self.adapters.values():
            if isinstance(adapter, DenseModule):
                adapter.first = {}  # the arena has them
        parts = (self.backbone, self.adapters, self.arena, self.method, self.data, self.eval_data)
        trainer = Trainer(self.loop_settings(), self.world, *parts, self.allocation_data, state=self.state)
        self.check_packing(self.backbone.module)
        self.logit_head = self._find_logit_head()
        trainer.loss_sum = partial(loss_sum, logit_head=self.logit_head)
        if self.method.needs.ablation:
            trainer.ablation = self._make_ablation(trainer)
        self.generates(self.backbone.module, trainer, sharded=self.prepared.plan.backbone_stage == 3)
        return trainer

    def _find_logit_head(self) -> LogitHead | None:
        """What computes logits chunk by chunk, if the settings and the model allow it. All processes must call this."""
        chunk_tokens = self.config.loss_chunk_tokens
        if chunk_tokens is None or self.prepared.shape.labels:
            return None
        found = find_logit_head(self.backbone.module, chunk_tokens=chunk_tokens, device=self.world.device)
        self.backbone.release()
        text = found if isinstance(found, str) else repr(found.form)
        self.world.agree("form of the logits", hashlib.sha256(text.encode()).hexdigest(), step=self.state.step)
        if isinstance(found, str):
            logger.warning("loss_chunk_tokens=%d has no effect, logits are computed whole: %s", chunk_tokens, found)
            return None
        return found

    def _make_ablation(self, trainer: Trainer) -> AblationScorer:
        assert self.allocation_data is not None
        block = self.config.alora or AloraBlock()
        return AblationScorer(
            self.backbone.module,
            self.adapters,
            self.allocation_data,
            world=self.world,
            release=self.backbone.release,
            ablations_per_forward=block.ablations_per_forward,
            shortlist=block.shortlist,
            prefix_cache=block.prefix_cache,
            logit_head=self.logit_head,
            between=trainer.between,
        )

    def announce(self) -> None:
        super().announce()
        records = self.run_dir / "ranks.jsonl"  # empty where a checkpoint of another folder is gone on with
        if self.resumed is None or not (records.is_file() and records.stat().st_size):
            self.records.start(self.arena.table)

    def save(self, reason: str) -> None:
        """All capture and agree, then each process writes its part in the background; the loop waits for the copy."""
        step = self.trainer.state.step
        with self.trainer.clock.section("checkpoint"):
            self._tell_problems(self.writer.wait(self.watchdog.touch))  # of the last save
            attempt = self.world.broadcast_text(self.writer.prepare(step) if self.world.is_main else "")
            snapshot = self.arena.capture()
            full = snapshot.full
            if self.world.world_size > 1:  # one process has nothing to compare
                for name, tensor in (("weights", full.master), ("moments", full.exp_avg), ("moments", full.exp_avg_sq)):
                    self.world.agree(name, tensor_digest(tensor), step=step)
            layout, gates = self.arena.layout, self.method.gates(step)
            master = full.master
            self.writer.start(
                attempt,
                snapshot,
                layout,
                step=step,
                loop=asdict(self.trainer.state),
                identity=self.identity,
                write_adapter=lambda folder: self._write_adapter(folder, master, layout, gates),
                is_best=self.trainer.state.best_step == step,
            )
            wanted = self.config.zero_checkpoint
            if wanted == "all" or (wanted == "last" and reason in ("last", "stop")):
                self._save_zero(step, snapshot)

    def _save_zero(self, step: int, snapshot: Any) -> None:
        """DeepSpeed's own checkpoint beside ours, once ours stands; synchronous. All processes must call this."""
        self._tell_problems(self.writer.wait(self.watchdog.touch))
        start = time.perf_counter()
        folder = self.run_dir / f"{checkpoint.PREFIX}{step}"
        # DeepSpeed's save is collective and cannot fail on one process alone: look for room before it begins.
        if not self.world.broadcast_text("yes" if self.world.is_main and self._has_room(folder) else ""):
            return
        loop = asdict(self.trainer.state)
        state = zero_checkpoint.client_state(snapshot, loop=loop, identity=self.identity)
        size = zero_checkpoint.save(folder, self.arena.engine, state, self.world)
        if self.world.is_main:
            seconds = time.perf_counter() - start
            logger.info("DeepSpeed's checkpoint: %.1f MiB in %.2f s, the loop waited", size / 2**20, seconds)

    def _has_room(self, folder: Path) -> bool:
        """Does our own checkpoint stand, and does DeepSpeed's fit beside it?"""
        if not folder.is_dir():
            return False
        layout = self.arena.layout
        try:
            checkpoint.check_writable(folder, checkpoint.state_bytes(layout, self.method.state_tensors()))
        except checkpoint.CheckpointError as error:
            logger.error("DeepSpeed's checkpoint was not written, ours stands: %s", error)
            return False
        return True

    def _tell_problems(self, problems: str | None) -> None:
        if problems:
            logger.error(problems)

    def _write_adapter(
        self, folder: Path, master: torch.Tensor, layout: ArenaLayout, gates: torch.Tensor | None
    ) -> None:
        config = export.peft_config(
            layout,
            base_model=self.config.model_name_or_path,
            revision=self.config.revision,
            lora_dropout=self.config.lora_dropout,
            task_type="SEQ_CLS" if self.prepared.shape.labels else "CAUSAL_LM",
            token_ids=self.prepared.shape.tokens,
        )
        export.write_peft(folder, master, layout, config, heads=self.prepared.shape.heads, gates=gates)

    def end(self, code: StopCode) -> None:
        problems = self.writer.wait(self.watchdog.touch)
        self._tell_problems(problems)
        if code is not StopCode.NONE:
            step = self.trainer.state.step
            saved = self.writer.saved is not None and self.writer.saved.name == f"{checkpoint.PREFIX}{step}"
            lost = (
                "" if saved or not self.world.is_main else f"stopped at step {step}, and it was not saved: {problems}"
            )
            self.fail_together(lost)
            self.finish(code, "")
            return
        self.watchdog.touch(EXPORT_SECONDS)
        check = self._export_final()
        if self.method.needs.ranks and self.trainer.state.events == 0:
            logger.warning(
                "no rank moved in this run: %s made no plan that changed one. Its schedule may have had no event, "
                "scores may never have told components apart, or every site may be at its smallest or largest rank",
                self.config.method,
            )
        picture = self.run_dir / "ranks.png"
        if self.world.is_main:
            # matplotlib: 0.3 s that no other process and no start needs
            from ardtrain.report.pictures import draw_ranks

            try:
                draw_ranks(self.run_dir / "ranks.jsonl", picture)
            except OSError as error:  # the run has all it is for; `ardtrain ranks` draws it again
                logger.warning("%s was not drawn: %s", picture, saving.reason(error))
        by_tower = tower_text(self.arena.layout)
        lines = [f"adapter: {self.run_dir / 'adapter'} ({check})", f"ranks: {picture}"]
        self.finish(code, "\n".join([*([f"by tower: {by_tower}"] if by_tower else []), *lines]))

    def _export_final(self) -> str:
        """The final adapter, complete and compared with PEFT's reading before it gets its name; all must call this.

        Returns:
            What was compared, and the largest difference; on process 0.
        """
        model: Any = self.backbone.module.eval()
        inputs = self._export_inputs(model)
        gates = self.method.gates(self.trainer.state.step)
        on_device = None if gates is None else gates.to(self.world.device)
        bind_arena(self.adapters, self.arena.layout, self.arena.engine.weights, on_device)
        with torch.no_grad():
            logits = model(**{name: values.to(self.world.device) for name, values in inputs.items()}).logits.cpu()
        check, problem = "", ""
        if self.world.is_main:
            try:
                check = self._export_and_compare(inputs, logits, gates)
            except RuntimeError as error:
                problem = str(error)
        self.fail_together(problem)
        return check

    def _export_inputs(self, model: Any) -> dict[str, torch.Tensor]:
        """What both are run on: a few tokens; with pictures a row of the first grain, which reaches every tower."""
        if self.config.task == "image_text_to_text":
            batch = self.data.collate(self.data.grains(0)[0])
            device = torch.device("cpu")
            whole = {"input_ids": batch.input_ids, **image_inputs(batch, device=device)}
            return {name: values[:1] for name, values in whole.items()}
        some = torch.tensor([*range(1, 33), *self.prepared.shape.tokens[:32]])
        return {"input_ids": some.remainder(model.get_input_embeddings().num_embeddings)[None]}

    def _export_and_compare(
        self, inputs: dict[str, torch.Tensor], logits: torch.Tensor, gates: torch.Tensor | None
    ) -> str:
        building, final = self.run_dir / ".adapter.tmp", self.run_dir / "adapter"
        checkpoint.remove_folder(building)
        master, shape = self.arena.engine.weights.cpu(), self.prepared.shape
        self._write_adapter(building, master, self.arena.layout, gates)
        dtype = self.prepared.plan.compute_dtype
        if shape.num_base * DTYPES[dtype].itemsize <= LOGITS_CHECK_BYTES:
            base = self.load_base()
            dequantize_modules(base)  # the same numbers, in linears that PEFT knows
            difference = export.compare_with_peft(building, base, inputs, logits)
            largest = float(logits.abs().max())
            limit = export.LOGIT_TOLERANCE[dtype] * max(1.0, largest)
            check, scale = f"PEFT's logits: {difference:.1e} off", f"logits up to {largest:.2f}, "
        else:
            form, limit = preflight.adapter_form(self.config), export.PRODUCT_TOLERANCE
            difference = export.compare_products(
                building, master, self.arena.layout, form=form, heads=shape.heads, gates=gates
            )
            check = f"base too large to run through PEFT; each matrix's product: {difference:.1e} off, as a share"
            scale = ""
        if not difference <= limit:
            raise RuntimeError(
                f"the exported adapter, {check} training's, which is more than {limit:.2e}; it was left in {building} "
                "and not published"
            )
        self._write_card(building, f"{check} training's ({scale}{dtype})")
        checkpoint.remove_folder(final)
        building.rename(final)
        return check

    def _write_card(self, folder: Path, check: str) -> None:
        for note in export.serving_notes(json.loads((folder / "adapter_config.json").read_text())):
            logger.info("adapter: %s", note)
        write_card(
            folder,
            Described(
                "adapter",
                self.config,
                self.run_dir,
                self.trainer.state.step,
                export.module_ranks(self.arena.layout),
                self.identity.versions,
                [check],
                self.prepared.shape.labels,
            ),
        )
