"""Pure functions of the step: learning rate, budgets, phases. Steps are optimizer steps, counted from 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LrSchedule = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, kind: LrSchedule) -> float:
    """Rate of optimizer step `step`; transformers' linear and cosine schedules, which users know.

    Warm-up rises from 0 (step 0 of a run with warm-up learns nothing, as in transformers' `get_scheduler`).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def cubic_budget(step: int, *, amount: int, total_steps: int, init_warmup: int, final_warmup: int) -> int:
    """ElaLoRA's b(t) = round(b * (1 - P^3)), P = clip((t - Wi) / (T - Wf - Wi), 0, 1), rounding half to even.

    Source: ElaLoRA (arXiv 2504.00254), the authors' code; methods.md 2.3.
    """
    span = total_steps - final_warmup - init_warmup
    if span <= 0:
        raise ValueError(
            f"elalora.init_warmup={init_warmup} + elalora.final_warmup={final_warmup} leave no step of {total_steps} "
            "for reallocation; lower them"
        )
    progress = min(1.0, max(0.0, (step - init_warmup) / span))
    return round(amount * (1.0 - progress**3))


def reallocates(step: int, *, total_steps: int, init_warmup: int, final_warmup: int, interval: int) -> bool:
    """ElaLoRA's event steps: t > Wi, (t - Wi) % D == 0, t < T - Wf (0-based t; methods.md 2.3)."""
    return init_warmup < step < total_steps - final_warmup and (step - init_warmup) % interval == 0


@dataclass(frozen=True)
class MoveSchedule:
    """When components move and how many, ElaLoRA's way. b: most in one event; phases and interval: optimizer steps."""

    total_steps: int
    b: int
    init_warmup: int
    final_warmup: int
    mask_interval: int
    enable_scheduler: bool

    def is_event(self, step: int) -> bool:
        """Is this one of the event steps?"""
        return reallocates(
            step, total_steps=self.total_steps, init_warmup=self.init_warmup, final_warmup=self.final_warmup,
            interval=self.mask_interval,
        )  # fmt: skip

    def amount(self, step: int) -> int:
        """Components to move after this step: b, or with the scheduler b(t), at event steps, else 0."""
        if not self.is_event(step):
            return 0
        if not self.enable_scheduler:
            return self.b
        phases = {"total_steps": self.total_steps, "init_warmup": self.init_warmup, "final_warmup": self.final_warmup}
        return cubic_budget(step, amount=self.b, **phases)

    def progress(self, step: int) -> float:
        """Share of a change of budget that is made by event step `step`: 1 - (1 - P)^3, 1 from the last event on.

        P: the event's number of all.
        """
        events = (self.total_steps - self.final_warmup - 1 - self.init_warmup) // self.mask_interval
        done = min(1.0, (step - self.init_warmup) // self.mask_interval / events)
        return 1.0 - (1.0 - done) ** 3

    @property
    def adapt_end(self) -> int:
        """Steps done from which on ranks stay."""
        return self.total_steps - self.final_warmup


LOSS_SCALE_START = 2.0**16
LOSS_SCALE_GROWTH_STEPS = 1000


def next_loss_scale(scale: float, good_steps: int) -> tuple[float, int]:
    """fp16's loss scale after a valid step: doubled after LOSS_SCALE_GROWTH_STEPS of them; 1 (no fp16) stays.

    Powers of two only, so scaling changes no bit of a gradient that float16 can hold.
    """
    if scale <= 1.0:
        return scale, 0
    if good_steps + 1 < LOSS_SCALE_GROWTH_STEPS:
        return scale, good_steps + 1
    return min(scale * 2.0, 2.0**24), 0


def falling_budget(step: int, *, first: int, last: int, total_steps: int, tinit: int, tfinal: int) -> int:
    """AdaLoRA's b(t) = floor(bT + (b0 - bT) * (1 - (t - ti) / (T - ti - tf))^3), b0 until ti, bT from T - tf.

    The paper's appendix prints t - ti - tf in the numerator, which exceeds b0 after warm-up; this is the form of its
    code. Here in whole numbers: in floats a budget that is whole may come out one too low.

    Args:
        first, last: b0 >= bT, in components. tinit, tfinal: ti and tf.
    Raises:
        ValueError: no step lies between the two phases.
    Source: AdaLoRA (arXiv 2303.10512), the authors' code and PEFT's; methods.md 4.3.
    """
    span = total_steps - tfinal - tinit
    if span <= 0:
        raise ValueError(
            f"adalora.tinit={tinit} + adalora.tfinal={tfinal} leave no step of {total_steps} in which the budget could "
            "fall; lower them"
        )
    left = min(span, max(0, total_steps - tfinal - step))
    return last + (first - last) * left**3 // span**3
