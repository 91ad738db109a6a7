"""A dress rehearsal (`ardtrain train CONFIG --rehearse`): the run's widths in two layers, three steps, each act once.

The base's shapes come from its `config.json`, cut to two layers, with random weights on disk: they are loaded, sharded
and offloaded as the real ones will be. Data, method, DeepSpeed settings and processes are the run's own. Steps 1 and 2,
a resize, a save; the engines go; a resume, step 3, held-out loss, the adapter. All of it in `output_dir/rehearsal`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ardtrain import checkpoint, preflight, run_data
from ardtrain.adapter_run import AdapterRun
from ardtrain.backbones import DTYPES, load_config, load_image_processor, meta_model, take_quantization
from ardtrain.collectives import World
from ardtrain.config import AloraBlock, ArdLoraBlock, ConfigError, RunConfig, updated
from ardtrain.evaluation import HeldOut
from ardtrain.faults import StopCode
from ardtrain.folder_lock import LOCK_FILE
from ardtrain.launching.job import REHEARSAL
from ardtrain.methods.base import Method
from ardtrain.observe import Startup
from ardtrain.preflight import Prepared
from ardtrain.ranks import RankPlan, RankTable, named_seed, prune_and_grow
from ardtrain.run_info import peaks, reset_peaks
from ardtrain.session import Surroundings
from ardtrain.targets import IMAGE_MODELS
from ardtrain.trainer import StepResult

BASE = "base"  # in the rehearsal's folder: the random base, removed when all has passed
NUM_LAYERS, NUM_STEPS, STEPS_BEFORE_RESUME = 2, 3, 2
SHARD_BYTES = 1 << 30
KEPT = (LOCK_FILE, "logs", "run.yaml", "job.sh", "job.json", "hostfile", "resubmitted")  # of a submitted rehearsal


# ---- what is rehearsed: pure ----


def rehearsal_config(config: RunConfig, *, world_size: int) -> RunConfig:
    """The config of the rehearsal; pure.

    The allocator's schedule is squeezed so that its event falls into the second step. Held-out loss over one grain a
    process; no adapter to start from (it has the layers of the whole base), no trackers.

    Raises:
        ConfigError: method full, which has no arena.
    """
    if config.method == "full":
        raise ConfigError(["--rehearse is built for adapters; method=full has none: shorten its run by max_steps"])
    folder = Path(config.output_dir) / REHEARSAL
    grain = config.per_device_eval_batch_size * world_size
    changes: dict[str, Any] = {
        "model_name_or_path": str(folder / BASE),
        "tokenizer_name_or_path": config.tokenizer_name_or_path or config.model_name_or_path,
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "num_train_epochs": None,
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "eval_on_start": False,
        "eval_steps": None,
        "early_stopping_patience": None,
        "early_stopping_threshold": 0.0,
        "max_eval_samples": min(grain, config.max_eval_samples or grain),
        "logging_steps": 1,
        "check_every": 1,
        "save_steps": None,
        "save_total_limit": None,
        "report_to": (),
        "init_from": None,
        "ranks_from": None,
        "rank_pattern": {},  # it may name layers that are not there
        "alpha_pattern": {},
        "resume_from_checkpoint": None,
        # A stop between the grains of the second step would drop it: this part's own stop is asked once a step.
        "stop_poll_seconds": 1e9,
    }
    if config.method in SQUEEZED:
        block = getattr(config, config.method) or {"alora": AloraBlock(), "ard_lora": ArdLoraBlock()}[config.method]
        own = dict(SQUEEZED[config.method])
        if isinstance(block, ArdLoraBlock) and block.meta_interval:
            own["meta_interval"] = 1
        changes[config.method] = block.model_copy(update=own)
    return updated(config, changes)


# Settings by which each method's event follows step 2 of 3.
SQUEEZED: Mapping[str, Mapping[str, Any]] = {
    "elalora": {"init_warmup": 0, "final_warmup": 1, "mask_interval": 1},
    "adalora": {"tinit": 0, "tfinal": 1, "deltaT": 1},
    "probe_lora": {"init_warmup": 0, "final_warmup": 1, "mask_interval": 1, "probes": "separate", "probe_steps": 2},
    "alora": {"k1_steps": 2, "k2_steps": 1, "rounds": 1, "shortlist": None},
    "ard_lora": {"init_warmup": 1, "final_warmup": 1, "alpha_interval": 1, "resize_interval": 1},
}


def cut_layers(values: Mapping[str, Any], *, num_layers: int) -> dict[str, Any]:
    """What to change in a transformers config (`to_dict`) of `num_layers` layers to keep NUM_LAYERS of them; pure.

    The first layer is kept and the first that differs from it in a list of one entry a layer (sliding and full
    attention), so both kinds run; else the first two. All such lists are cut alike.
    """
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == num_layers > NUM_LAYERS}
    lists = {n: v for n, v in lists.items() if not n.endswith(("_id", "_ids", "architectures"))}  # of tokens
    kinds = [[str(v[i]) for v in lists.values()] for i in range(num_layers)]
    second = next((i for i in range(num_layers) if kinds[i] != kinds[0]), 1)
    return {"num_hidden_layers": min(NUM_LAYERS, num_layers)} | {n: [v[0], v[second]] for n, v in lists.items()}


def forced_move(table: RankTable) -> RankPlan | None:
    """A plan that moves the last component of the largest site to the smallest that has room, the first of equals."""
    ranks = table.ranks
    giver = max(range(len(ranks)), key=lambda i: ranks[i])
    takers = [i for i, site in enumerate(table.sites) if i != giver and ranks[i] < site.max_rank]
    if not takers or ranks[giver] < 1:
        return None
    taker = min(takers, key=lambda i: ranks[i])
    return prune_and_grow(table, [(giver, ranks[giver] - 1)], [taker], reason="rehearsal: one component moved")


class WithOneMove:
    """A method whose second step has an event in any case: its own, or one component moved.

    Everything else is the method's. told: called with each plan before it is applied.
    """

    def __init__(self, method: Method, told: Callable[[RankPlan], None]) -> None:
        self._method, self._told = method, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def due(self, step: int) -> bool:
        return step == STEPS_BEFORE_RESUME - 1 or self._method.due(step)

    def local_scores(self, step: int) -> Tensor | None:
        return self._method.local_scores(step) if self._method.due(step) else None

    def plan(self, step: int, scores: Tensor | None) -> RankPlan | None:
        plan = self._method.plan(step, scores) if self._method.due(step) else None
        if plan is None and step == STEPS_BEFORE_RESUME - 1:
            plan = forced_move(self._method.binding.table)  # type: ignore[attr-defined]
        if plan is not None:
            self._told(plan)
        return plan


# ---- the random base ----


def write_base(config: RunConfig, folder: Path, *, compute_dtype: str, num_labels: int | None) -> int:
    """A base of the config's widths with NUM_LAYERS layers and random weights, in `folder`; returns its bytes.

    A function of shapes, dtype and seed. Written tensor by tensor: memory stays below a shard and the largest tensor.

    Raises:
        ValueError: no model config, or no room on the disk.
    """
    source = run_data.model_source(config)
    cut = load_config(source)
    take_quantization(source, cut)  # of bitsandbytes' files: these are in the compute dtype
    for tower in {id(c): c for c in (cut.get_text_config(), getattr(cut, "vision_config", None)) if c}.values():
        for name, value in cut_layers(tower.to_dict(), num_layers=tower.num_hidden_layers).items():
            setattr(tower, name, value)
    if num_labels is not None:
        cut.num_labels = num_labels
    cut.dtype = DTYPES[compute_dtype]
    folder.mkdir(parents=True)
    cut.save_pretrained(folder)
    if Path(source.name_or_path).is_dir():
        for code in Path(source.name_or_path).glob("*.py"):  # of trust_remote_code
            shutil.copy(code, folder)
    if cut.model_type in IMAGE_MODELS:
        load_image_processor(source).save_pretrained(folder)
    model = meta_model(replace(source, name_or_path=str(folder)), num_labels=num_labels)
    parameters = dict(model.named_parameters())  # tied ones once
    sizes = {n: p.numel() * (DTYPES[compute_dtype].itemsize if p.is_floating_point() else p.itemsize)
             for n, p in parameters.items()}  # fmt: skip
    checkpoint.check_writable(folder, sum(sizes.values()))
    std = float(getattr(cut.get_text_config(), "initializer_range", 0.02))
    shards: list[list[str]] = [[]]
    for name in parameters:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: random_tensor(n, parameters[n], DTYPES[compute_dtype], seed=config.seed, std=std) for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes.values())


def random_tensor(name: str, like: nn.Parameter, dtype: torch.dtype, *, seed: int, std: float) -> Tensor:
    """A weight in `dtype`: matrices N(0, std), norms 1, biases 0; a function of name, shape and seed."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.dim() < 2:
        return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
    generator = torch.Generator().manual_seed(named_seed(seed, "rehearsal", name))
    out = torch.empty(like.shape, dtype=dtype)
    for row in out.view(len(out), -1).split(max(1, (1 << 26) // max(1, out[0].numel()))):
        row.copy_(torch.empty(row.shape).normal_(0.0, std, generator=generator))
    return out


# ---- what it tells ----


@dataclass
class Parts:
    """The parts of a rehearsal: seconds and peak memory of each, a line as each ends. All processes call alike."""

    world: World
    current: str = ""
    started: float = 0.0

    def begin(self, name: str) -> None:
        """Ends the part before and begins one. All processes must call this."""
        self.end()
        self.current, self.started = name, time.perf_counter()
        reset_peaks(self.world.device)

    def end(self) -> None:
        """Ends the current part and says what it took: of memory, the process that took most. All must call this."""
        if not self.current:
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        seconds = time.perf_counter() - self.started
        own = torch.tensor(peaks(self.world.device), dtype=torch.int64)
        every = torch.zeros(self.world.world_size, len(own), dtype=torch.int64, device=self.world.device)
        every[self.world.global_rank] = own.to(every)
        self.world.add_integers(every)
        host, device = (most / 2**30 for most in every.max(dim=0).values.tolist())
        on_device = f", {device:.2f} GiB device" if self.world.device.type == "cuda" else ""
        self.say(f"rehearsal: {self.current:<58}{seconds:9.2f} s, peak {host:.2f} GiB host{on_device}")
        self.current = ""

    def say(self, text: str) -> None:
        """A line for the user, from process 0, above the bar."""
        if self.world.is_main:
            with contextlib.suppress(OSError):
                tqdm.write(text)


# ---- the run ----


class RehearsalRun(AdapterRun):
    """An AdapterRun that tells its parts and, where `until` is set, saves and stops after so many steps."""

    def __init__(self, prepared: Prepared, around: Surroundings, parts: Parts, *, until: int | None) -> None:
        self.parts, self.until = parts, until
        super().__init__(prepared, around)

    def _make_method(self, total_steps: int) -> Method:
        method: Any = WithOneMove(super()._make_method(total_steps), self._before_resize)
        return method

    def _before_resize(self, plan: RankPlan) -> None:
        self.parts.begin(f"resize ({plan.reason})")

    def _stop_flag(self) -> int:
        if self.until is not None and self.world.is_main and self.trainer.state.step >= self.until - 1:
            return int(StopCode.FILE)
        return super()._stop_flag()

    def execute(self) -> None:
        self.parts.begin(f"step {self.trainer.state.step + 1}")
        super().execute()

    def _on_step(self, result: StepResult) -> None:
        super()._on_step(result)
        done = result.step + 1
        if done == NUM_STEPS and self.eval_data is not None:
            self.parts.begin("held-out loss")
        elif done in (NUM_STEPS, self.until):
            self.parts.begin("save")
        else:
            self.parts.begin(f"step {done + 1}")

    def _on_evaluate(self, step: int, held_out: HeldOut) -> None:
        super()._on_evaluate(step, held_out)
        self.parts.begin("save")

    def save(self, reason: str) -> None:
        super().save(reason)
        problems = self.writer.wait(self.watchdog.touch)
        self.fail_together(problems or "" if self.world.is_main else "")
        self.parts.begin("adapter" if self.until is None else "engines removed")

    def finish(self, code: StopCode, text: str) -> None:
        """Raises RuntimeError where somebody else asked for the stop."""
        if self.until is None:
            super().finish(code, text)
        if code is not (StopCode.NONE if self.until is None else StopCode.FILE):
            raise RuntimeError("stopped on request before its end")

    def dismantle(self) -> None:
        """Ends both engines and frees what they held. All processes must call this."""
        self.arena.engine.destroy()
        self.backbone.destroy()


def rehearse(prepared: Prepared, around: Surroundings) -> None:
    """The whole rehearsal on this process. All processes must call this.

    prepared: the real run's; around: of the rehearsal's own folder. What fails is raised as it is, with its part told.
    """
    parts = Parts(around.world)
    start = time.perf_counter()
    try:
        _rehearse(prepared, around, parts)
    except BaseException:
        parts.say(f"rehearsal failed in: {parts.current}")
        raise
    parts.say(f"rehearsal passed in {time.perf_counter() - start:.0f} s: {around.run_dir}")


def _rehearse(prepared: Prepared, around: Surroundings, parts: Parts) -> None:
    world, folder = around.world, around.run_dir
    parts.begin("random base of two layers on disk")
    config = rehearsal_config(prepared.config, world_size=world.world_size)
    problem = ""
    if world.is_main:
        try:
            _clear(folder)
            num_labels = len(prepared.shape.labels) or None
            write_base(prepared.config, folder / BASE, compute_dtype=prepared.plan.compute_dtype, num_labels=num_labels)
        except (OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    problem = world.broadcast_text(problem)
    if problem:
        raise RuntimeError(problem)
    parts.begin("start: rows, base loaded and sharded, arena")
    own = preflight.prepare_config(config, world_size=world.world_size)
    first = RehearsalRun(own, around, parts, until=STEPS_BEFORE_RESUME)
    before = first.arena.table.digest
    first.execute()
    if first.arena.table.digest == before and not first.trainer.state.events:
        raise RuntimeError("no rank could move: every site is at its largest rank, or there is one site alone")
    digests = first.trainer.digests()
    first.dismantle()
    del first
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    parts.begin("resume: base loaded and sharded again, checkpoint read")
    again = replace(own, config=updated(own.config, {"resume_from_checkpoint": "auto"}))
    startup = Startup()
    startup.mark("the rehearsal so far")
    second = RehearsalRun(again, replace(around, startup=startup), parts, until=None)
    for what, digest in second.trainer.digests().items():
        if digest != digests[what]:
            raise RuntimeError(f"after the resume {what} differs: {digest[:200]} against {digests[what][:200]}")
    second.execute()
    parts.end()
    world.barrier("rehearsed")
    if world.is_main:
        shutil.rmtree(folder / BASE)


def _clear(folder: Path) -> None:
    """Removes what an earlier rehearsal left. Raises OSError."""
    for entry in folder.iterdir():
        if entry.name not in KEPT:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
