"""The loop: one plain step readable on one screen, in the order of architecture.md 4.

Letters: N numbers of the arena, G grains of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ardtrain import schedule
from ardtrain.adapters import AdapterLinear, bind_arena, bind_probes, drop_views, group_adapters
from ardtrain.arena import ArenaLayout
from ardtrain.best import Judge
from ardtrain.collectives import START_EXPONENT, ExactSum, StepSum, World, deal, next_exponent
from ardtrain.data import Batch
from ardtrain.dense import DenseModule
from ardtrain.evaluation import Grains, HeldOut, LossSum, held_out_loss, loss_sum
from ardtrain.methods.base import Method, Statistics
from ardtrain.observe import Clock
from ardtrain.ranks import named_seed
from ardtrain.resize import LiveArena, ResizeRecord, no_collection
from ardtrain.tracing import part

LOSS_SCALE_MIN = 2.0  # of fp16; 1 means no scaling and stays
DIGEST_CHUNK = 1 << 18  # numbers
MAX_REPEATS = 64  # of one step, to find an exponent or a loss scale; each lowers one of them


class Backbone(Protocol):
    """The frozen model (engines.BackboneEngine)."""

    module: nn.Module

    def release(self) -> None: ...


class Steps(Protocol):
    """Training data (data.TrainData)."""

    def grains(self, step: int) -> Sequence[Any]: ...

    def collate(self, grain: Any) -> Batch: ...

    def sample_ids(self, grain: Any) -> list[str]: ...


class AblationResult(Protocol):
    """relative: [R] float64 on the host, importance beside that of an empty component; notes: numbers to log."""

    @property
    def relative(self) -> Tensor: ...

    @property
    def notes(self) -> Mapping[str, float]: ...


class Ablation(Protocol):
    """Scores by ablation on held-out rows (ablation.AblationScorer). All processes must call it."""

    def scores(self, layout: ArenaLayout, weights: Tensor) -> AblationResult: ...


class Interrupted(Exception):
    """A stop request found between the rounds of a long step, evaluation or ablation; raised on every process."""

    def __init__(self, flag: int) -> None:
        self.flag = flag


@dataclass
class StopPoll:
    """Asks all processes for stop requests about every `seconds` between rounds of grains.

    After which rounds they ask must be the same on every process: it follows from the mean time of a round, which
    travels with each step's exact sum. Where a step is shorter than `seconds` this costs nothing but that number.
    """

    world: World
    seconds: float
    every: int = 1  # rounds; nothing is known before the first step
    rounds: int = 0

    def learn(self, total: StepSum, num_rounds: int) -> None:
        """Takes the step's mean time of a round."""
        mean = total.milliseconds / 1000 / self.world.world_size / max(1, num_rounds)
        self.every = max(1, int(self.seconds / max(mean, 1e-3)))

    def __call__(self, own_flag: Callable[[], int]) -> None:
        """Counts a round. All processes must call this equally often. Raises Interrupted."""
        self.rounds += 1
        if self.rounds % self.every:
            return
        flag = torch.tensor([own_flag()], dtype=torch.int64, device=self.world.device)
        self.world.add_integers(flag)
        if int(flag):
            raise Interrupted(int(flag))


@dataclass(frozen=True)
class LoopSettings:
    """What the loop takes from the config. Steps are optimizer steps."""

    seed: int
    total_steps: int
    learning_rate: float
    lr_scheduler_type: schedule.LrSchedule
    warmup_steps: int
    max_grad_norm: float
    max_skipped_steps: int
    score_at: str
    compute_dtype: torch.dtype
    lora_plus_ratio: float
    eval_on_start: bool
    eval_steps: int | None
    save_steps: int | None
    stop_poll_seconds: float = 30.0
    check_every: int | None = None
    judge: Judge = Judge()

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return schedule.learning_rate(
            step,
            peak=self.learning_rate,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            kind=self.lr_scheduler_type,
        )


@dataclass
class LoopState:
    """What the loop carries from step to step beside the arena; a checkpoint stores every field.

    step: next optimizer step; exponent: of the exact sum; loss_scale: power of two, 1 unless fp16;
    good_steps: since the scale last changed; skipped: void steps in a row; events: resizes so far; best_metric,
    best_value, best_step, waited: see best.Best; evaluated: steps done at the last evaluation; pending_plan: the last
    step's plan was interrupted and is still to be made; allocator_steps: the run's length that the method's schedule
    goes by.
    """

    step: int = 0
    exponent: int = START_EXPONENT
    loss_scale: float = 1.0
    good_steps: int = 0
    skipped: int = 0
    events: int = 0
    tokens_seen: int = 0
    best_loss: float | None = None
    best_metric: str = ""
    best_value: float | None = None
    best_step: int = -1
    waited: int = 0
    evaluated: int = -1
    pending_plan: bool = False
    allocator_steps: int = 0


@dataclass(frozen=True)
class Event:
    """One event of the allocator after step `step`: scores [R] before it, what it did, numbers to log."""

    step: int
    record: ResizeRecord
    scores: Tensor | None
    notes: Mapping[str, float]


@dataclass(frozen=True)
class StepResult:
    """One step's numbers, alike on every process.

    num_targets: terms of the loss; num_tokens: without padding.
    """

    step: int
    loss: float
    extra_loss: float
    grad_norm: float
    lr: float
    num_targets: int
    num_tokens: int
    void: bool
    stop_flag: int = 0
    event: Event | None = None

    @property
    def record(self) -> ResizeRecord | None:
        """What the allocator did after this step, if anything."""
        return self.event.record if self.event is not None else None

    @property
    def scores(self) -> Tensor | None:
        """[R] the scores it decided by."""
        return self.event.scores if self.event is not None else None


@dataclass
class Hooks:
    """What happens around steps; effects that the loop itself does not know. Every process calls every hook."""

    on_step: Callable[[StepResult], None] = lambda result: None
    on_event: Callable[[Event], None] = lambda event: None
    on_evaluate: Callable[[int, HeldOut], None] = lambda step, held_out: None
    save: Callable[[str], None] = lambda reason: None
    stop_flag: Callable[[], int] = lambda: 0
    alive: Callable[[], None] = lambda: None  # something was done: for the watchdog


@dataclass(frozen=True)
class Heard:
    """What a step's probes add to its exact sum: their gradient; nothing without probes.

    leaves: the probes' zero part [P], or none. observe: takes the sum and the number of grains.
    """

    leaves: Sequence[Tensor] = ()
    observe: Callable[[Tensor, int], None] = lambda sums, num_grains: None

    @property
    def size(self) -> int:
        return sum(leaf.numel() for leaf in self.leaves)

    def tell(self, total: StepSum) -> None:
        """Hands the sum over."""
        if self.leaves:
            self.observe(total.gradient[-self.size :], len(total.losses))


@dataclass
class Trainer:
    """Owns backward, clip, step, score and resize."""

    settings: LoopSettings
    world: World
    backbone: Backbone
    adapters: Mapping[str, AdapterLinear | DenseModule]
    arena: LiveArena
    method: Method
    data: Steps
    eval_data: Grains | None = None
    allocation_data: Grains | None = None  # rows that the allocator may look at
    ablation: Ablation | None = None  # over allocation_data, where the method asks for it
    state: LoopState = field(default_factory=LoopState)
    clock: Clock = field(default_factory=Clock)
    hooks: Hooks = field(default_factory=Hooks)
    loss_sum: LossSum = loss_sum
    answers: Callable[[], Mapping[str, float]] | None = None  # metrics of generated answers; all processes call it
    grouped: bool = False  # adapters that share an input were looked for

    def __post_init__(self) -> None:
        self.poll = StopPoll(self.world, self.settings.stop_poll_seconds)

    def fit(self) -> int:
        """Trains to the last step or to a stop request; returns the stop flag (0: finished). All must call this."""
        self.backbone.module.train()
        try:
            return self._fit()
        except Interrupted as stop:  # the work since the last boundary is dropped, and done again after the resume
            self.backbone.release()
            self.backbone.module.train()
            self.hooks.save("stop")
            return stop.flag

    def _fit(self) -> int:
        total, state = self.settings.total_steps, self.state
        if state.pending_plan:
            self._allocate(state.step - 1)
        self._evaluate_if_due()  # the one before the first step, or one that a stop interrupted
        while state.step < total and not self.waited_enough:
            result = self.train_step()
            self.hooks.on_step(result)
            self.hooks.alive()
            if not state.pending_plan:
                self._evaluate_if_due()
                self._check()
            if result.stop_flag:
                self.hooks.save("stop")
                return result.stop_flag
            is_last = state.step == total or self.waited_enough
            if _due(state.step, self.settings.save_steps) or is_last:
                self.hooks.save("last" if is_last else "step")
                self.hooks.alive()
        return 0

    @property
    def waited_enough(self) -> bool:
        """Does training end early, as its held-out metric no longer gets better?"""
        return self.settings.judge.is_done(self.state)

    def _evaluate_if_due(self) -> None:
        """Evaluates where the schedule says so and this step was not evaluated yet."""
        done, s = self.state.step, self.settings
        if self.eval_data is None or self.state.evaluated >= done:
            return
        if done == 0:
            wanted = s.eval_on_start
        else:
            wanted = _due(done, s.eval_steps) or done == s.total_steps
        if wanted:
            result = self.evaluate()
            self.state.evaluated = done
            self.settings.judge.look(self.state, done, result.numbers())
            self.hooks.on_evaluate(done, result)
            self.hooks.alive()

    def _check(self) -> None:
        """Compares what must be alike on all processes; RuntimeError names the processes and the thing that differs."""
        if self.settings.check_every is None or self.state.step % self.settings.check_every:
            return
        for what, digest in self.digests().items():
            self.world.agree(what, digest, step=self.state.step)

    def digests(self) -> dict[str, str]:
        """What must be alike on all processes: rank table, loop's counters, weights."""
        return {
            "rank table": self.arena.table.digest,
            "loop state": repr(self.state),
            "weights": tensor_digest(self.arena.engine.weights),
        }

    def train_step(self) -> StepResult:
        """One optimizer step of the whole global batch. All processes must call this."""
        step, s = self.state.step, self.settings
        total, heard = self._sum_of_grains(step)
        self.state.step = step + 1
        num_targets, num_tokens = sum(total.tokens), sum(total.processed)
        loss = math.fsum(total.losses) / max(1, num_targets)
        lr = s.rate(step)
        if not total.finite:
            return self._void(step, total, loss, lr)
        size = self.arena.layout.size
        gradient, gates = total.gradient[:size], total.gradient[size : total.gradient.numel() - heard.size]  # means
        norm, extra_loss = total.numbers
        if step == 0:
            self._refuse_untouched(gradient)
        if not math.isfinite(norm):
            return self._void(step, total, loss, lr)
        self._good_step()
        before = None
        if s.score_at == "before_step":
            before = Statistics(gradient.clone(), self.arena.engine.weights.clone())
        if s.max_grad_norm and norm > s.max_grad_norm:
            gradient.mul_(s.max_grad_norm / (norm + 1e-6))
        self._update(gradient, lr)
        with self.clock.section("allocator"):
            self.arena.age += 1
            if self.method.wants_held_out_gates(step):
                gates = self._held_out_gates(step)
            seen = before or Statistics(gradient, self.arena.engine.weights)
            with part("scores"):
                self.method.observe(step, replace(seen, gates=gates))
                heard.tell(total)
                self.method.after_step(step)
            self.state.tokens_seen += num_tokens
            result = StepResult(step, loss, extra_loss, norm, lr, num_targets, num_tokens, False, total.flag)
            try:
                return replace(result, event=self._allocate(step))
            except Interrupted as stop:  # the step stands, its plan is made after the resume
                return replace(result, stop_flag=stop.flag)

    def _update(self, gradient: Tensor, lr: float) -> None:
        """AdamW's step; with LoRA+ (arXiv 2402.12354) that of B is `lora_plus_ratio` times the others'."""
        engine, ratio = self.arena.engine, self.settings.lora_plus_ratio
        before = engine.weights.clone() if ratio != 1.0 else None
        longest = max(ratio, 1.0)  # AdamW's step is linear in the rate: shortening it loses no bits, lengthening does
        with part("optimizer"):
            engine.step(gradient, lr=lr * longest)
        if before is None:
            return
        weights = engine.weights.clone()
        for block in self.arena.layout.all_blocks:
            share = (ratio if block.part == "lora_B" else 1.0) / longest
            if share != 1.0:
                old, new = block.of(before), block.of(weights)
                new.copy_(old + (new - old) * share)
        engine.set_weights(weights)

    def _sum_of_grains(self, step: int) -> tuple[StepSum, Heard]:
        """Forward and backward of this process's grains and the exact sum over all: arena's numbers, gates, probes.

        Its gradient is the mean over the target tokens, with the method's own loss in it; its numbers are the norm and
        that loss. The step's one host synchronisation is in `reduce`.
        """
        leaf, gates, views = self._bind(step)
        leaves = [leaf] if gates is None else [leaf, gates]
        own = sum(t.numel() for t in leaves)
        heard = Heard()
        if self.method.probes is not None and (riding := self.method.probes.riding(step)) is not None:
            heard = self._bind_probes(*riding)

        def finish(gradient: Tensor, num_targets: Tensor) -> Tensor:
            with part("clip"):
                mean = gradient[:own].div_(num_targets.double() * self.state.loss_scale)[: len(leaf)]
                extra = self._add_extra_loss(mean, leaf, views)
                return torch.stack([torch.linalg.vector_norm(mean, dtype=torch.float64), extra.double()])

        return self._exact(step, self.data.grains(step), leaves, heard, finish), heard

    def _exact(
        self,
        step: int,
        grains: Sequence[Any],
        leaves: Sequence[Tensor],
        heard: Heard,
        finish: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> StepSum:
        """The exact sum over grains of the gradients by the leaves and by probes.

        Repeated until it is valid: a sum is invalid when a number might have left fixed point's range, or (fp16) when
        only the scaled gradient left float16's. Every process sees the same numbers and lowers the same exponent or
        scale.
        """
        for _ in range(MAX_REPEATS):
            numbers = sum(t.numel() for t in leaves) + heard.size
            total = ExactSum(numbers, len(grains), exponent=self.state.exponent, device=self.world.device)
            dealt = deal(len(grains), self.world.world_size, self.world.global_rank)
            start = time.perf_counter()
            for index, counted in dealt:
                batch = self.data.collate(grains[index])
                loss, pieces = self._grain(step, index, batch, [*leaves, *heard.leaves])
                if heard.leaves:
                    pieces[-1] = pieces[-1] / self.state.loss_scale
                if counted:
                    counts = {"tokens": batch.num_target_tokens, "processed": batch.num_tokens}
                    with part("sum"):
                        total.add(index, loss=loss, gradient=pieces, **counts)
                self.between()
            spent = int(1000 * (time.perf_counter() - start))
            with part("sum"):
                result = total.reduce(self.world, flag=self.hooks.stop_flag(), milliseconds=spent, finish=finish)
            self.poll.learn(result, len(dealt))
            scale_can_fall = self.state.loss_scale > LOSS_SCALE_MIN and all(map(math.isfinite, result.losses))
            if not result.finite and scale_can_fall:
                self.state.loss_scale, self.state.good_steps = self.state.loss_scale / 2, 0
                continue
            exponent = next_exponent(result.largest, len(grains), current=self.state.exponent)
            valid, self.state.exponent = result.valid, exponent
            if valid:
                return result
        raise RuntimeError(f"step {step}: no exponent made the gradient's sum valid in {MAX_REPEATS} tries")

    def between(self) -> None:
        """After a round of grains: the process lives; a stop may be due. Raises Interrupted."""
        self.hooks.alive()
        self.poll(self.hooks.stop_flag)

    def _bind(self, step: int) -> tuple[Tensor, Tensor | None, dict[str, dict[str, Tensor]]]:
        """Fresh leaves of the weights [N] and of the method's gates, handed to the adapters; and the views."""
        leaf, gates = self.arena.engine.leaf(), self.method.gates(step)
        if gates is not None:
            gates = gates.to(self.world.device).requires_grad_()
        self._group_adapters()
        return leaf, gates, bind_arena(self.adapters, self.arena.layout, leaf, gates)

    def _bind_probes(self, index: int, event: int) -> Heard:
        """Hands the adapters this round's probes, with a fresh leaf of zeros."""
        rounds, device = self.method.probes, self.world.device
        assert rounds is not None
        probes = rounds.make(index, event, self.settings.seed)
        leaf = torch.zeros(probes.size, device=device, requires_grad=True)
        bind_probes(
            self.adapters,
            self.arena.table,
            count=probes.count,
            part=probes.part,
            leaf=leaf,
            fixed=probes.fixed.to(device),
        )
        return Heard([leaf], lambda sums, grains: rounds.observe(index, event, sums, grains))

    def _probe(self, step: int) -> None:
        """Rounds of probes that do not ride along: grains of the last steps once more, with the weights as they are."""
        rounds, exponent = self.method.probes, self.state.exponent
        count = 0 if rounds is None else rounds.separate(step)
        try:
            for index in range(count):
                self._bind(step)
                heard = self._bind_probes(index, step)
                grains = self.data.grains(max(0, step - count + 1 + index))
                total = self._exact(step, grains, [], heard, None)
                if total.finite:
                    heard.tell(total)
        finally:  # also where a stop comes between: a checkpoint holds the exponent of the arena's gradients
            self.state.exponent = exponent

    def _group_adapters(self) -> None:
        """Before anything else runs the model: one forward that shows which adapters share an input.

        Of the run's first grain, so that experts that see no token are the same on every process and after a resume:
        bits hang on the groups. On a GPU alone: on a CPU under ZeRO-3 a step with groups takes 1.15 times as long
        (products of this size gain nothing, cutting and joining their results costs). All processes must call this.
        """
        if self.grouped or self.world.device.type == "cpu":
            return
        self.grouped = True
        bind_arena(self.adapters, self.arena.layout, self.arena.engine.weights)
        batch, device = self.data.collate(self.data.grains(0)[0]), self.world.device
        with torch.no_grad(), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            group_adapters(self.adapters, lambda: self.loss_sum(self.backbone.module, batch, device=device))

    def _grain(self, step: int, index: int, batch: Batch, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss sum of one grain and its gradient by each leaf; dropout is seeded by (run seed, step, grain)."""
        device = self.world.device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(named_seed(self.settings.seed, step, index))
            with part("forward"):
                loss = self.loss_sum(self.backbone.module, batch, device=device)
            with part("backward"):
                gradients = torch.autograd.grad(loss * self.state.loss_scale, leaves, retain_graph=False)
        self.backbone.release()
        return loss.detach(), list(gradients)

    def _held_out_gates(self, step: int) -> Tensor:
        """dL/dgate of one held-out grain, drawn by (seed, step), in eval mode (ARD-LoRA's alternation)."""
        assert self.allocation_data is not None
        grains = self.allocation_data.grains()
        grain = grains[named_seed("held out", self.settings.seed, step) % len(grains)]
        _, gates, _ = self._bind(step)
        assert gates is not None
        self.backbone.module.eval()
        batch = self.allocation_data.collate(grain)
        _, (gradient,) = self._grain(step, len(grains), batch, [gates])
        self.backbone.module.train()
        return gradient / (batch.num_target_tokens * self.state.loss_scale)

    def _add_extra_loss(self, gradient: Tensor, leaf: Tensor, views: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Adds the method's own loss's gradient, once a step, after the exact sum; returns that loss (scalar)."""
        extra = self.method.extra_loss(views)
        if extra is None:
            return gradient.new_zeros(())
        (own,) = torch.autograd.grad(extra, leaf)
        gradient.add_(own)
        return extra.detach()

    def _allocate(self, step: int) -> Event | None:
        """Scores, the plan and its resize, if this step has one."""
        self.state.pending_plan = False
        if not self.method.due(step):
            return None
        self._group_adapters()
        self.state.pending_plan = True
        self._probe(step)
        scores, notes = self._scores(step)
        self.state.pending_plan = False
        with no_collection():
            plan = self.method.plan(step, scores)
            if plan is None:
                return None
            drop_views(self.adapters)
            with self.clock.section("resize"):
                record = self.arena.apply(plan, step=step)
        if plan.again:
            return None
        self.state.events += 1
        event = Event(step, record, scores, notes)
        self.hooks.on_event(event)
        return event

    def _scores(self, step: int) -> tuple[Tensor | None, Mapping[str, float]]:
        """[R] float64 on the host, gathered, or by ablation; and numbers to log."""
        if not self.method.needs.ablation:
            return self.arena.scores(step), {}
        assert self.ablation is not None
        with self.clock.section("ablation"):
            result = self.ablation.scores(self.arena.layout, self.arena.engine.weights)
        return result.relative, result.notes

    def _good_step(self) -> None:
        """Counts a step whose numbers were all finite; the next one may use another loss scale."""
        state = self.state
        state.skipped = 0
        state.loss_scale, state.good_steps = schedule.next_loss_scale(state.loss_scale, state.good_steps)

    def _void(self, step: int, total: StepSum, loss: float, lr: float) -> StepResult:
        """A non-finite loss or gradient voids the step on all processes; too many in a row end the run."""
        self.state.skipped += 1
        if self.state.skipped > self.settings.max_skipped_steps:
            grains = self.data.grains(step)
            ids = [i for g in (total.bad_grains or range(len(grains))) for i in self.data.sample_ids(grains[g])]
            raise RuntimeError(
                f"step {step}: loss or gradient is not finite in grains {list(total.bad_grains)} "
                f"(samples {', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}); max_skipped_steps="
                f"{self.settings.max_skipped_steps} allows no more void steps in a row. Look at those samples, lower "
                "learning_rate, or raise max_skipped_steps"
            )
        last = step == self.settings.total_steps - 1  # AdaLoRA's last step removes what is masked, void or not
        event = self._allocate(step) if last else None
        counts = (sum(total.tokens), sum(total.processed))
        return StepResult(step, loss, 0.0, math.nan, lr, *counts, True, total.flag, event)

    def _refuse_untouched(self, gradient: Tensor) -> None:
        """At the first step every adapter must have received a gradient.

        Raises:
            RuntimeError: naming the modules that did not run.
        """
        last = {b.module: b for b in self.arena.layout.blocks}  # of components: the part that starts at zero comes last
        untouched = [m for m, block in last.items() if not bool(block.of(gradient).any())]
        if untouched:
            raise RuntimeError(
                f"{len(untouched)} adapters received no gradient in the first step, e.g. {untouched[0]}: the module is "
                "never run by this model's forward; leave it out with exclude_modules"
            )

    def evaluate(self) -> HeldOut:
        """Held-out loss with the weights as they are. All processes must call this."""
        assert self.eval_data is not None
        with self.clock.section("evaluate"):
            with torch.no_grad():
                self._bind(self.state.step)
                result = self._held_out(self.eval_data)
            drop_views(self.adapters)
        return result

    def _held_out(self, data: Grains) -> HeldOut:
        """Loss, metrics and, where some are wanted, those of generated answers, of the model as it stands."""
        module = self.backbone.module
        result = held_out_loss(module, data, world=self.world, loss_sum=self.loss_sum, between=self.between)
        if self.answers is None:
            return result
        return replace(result, others={**result.others, **self.answers()})


def tensor_digest(values: Tensor) -> str:
    """A number that follows every bit of a float32 tensor and its place, at the speed of memory; -0.0 counts as 0.0.

    It finds accidents, not intent: sums of the bits times odd numbers, modulo 2^64.
    """
    total = 0
    for start in range(0, values.numel(), DIGEST_CHUNK):
        bits = (values[start : start + DIGEST_CHUNK] + 0.0).view(torch.int32).to(torch.int64)
        places = torch.arange(start, start + len(bits), device=bits.device, dtype=torch.int64)
        total += int((bits * (places * 0x9E3779B1 * 2 + 1)).sum())
    return f"{total & (2**64 - 1):016x}"


def _due(done: int, interval: int | None) -> bool:
    return interval is not None and done % interval == 0
