from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from ardtrain import schedule
from ardtrain.schedule import (
    LOSS_SCALE_GROWTH_STEPS,
    MoveSchedule,
    cubic_budget,
    falling_budget,
    learning_rate,
    next_loss_scale,
    reallocates,
)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_that_of_transformers(kind, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        ours = learning_rate(step, peak=3e-3, total_steps=40, warmup_steps=warmup, kind=kind)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_learning_rate_ends_at_zero_and_stays_there():
    for kind in ("linear", "cosine"):
        assert learning_rate(40, peak=1.0, total_steps=40, warmup_steps=4, kind=kind) == 0.0
        assert learning_rate(99, peak=1.0, total_steps=40, warmup_steps=4, kind=kind) == 0.0


def test_warmup_as_long_as_the_run_does_not_divide_by_zero():
    assert learning_rate(4, peak=1.0, total_steps=4, warmup_steps=4, kind="linear") == 1.0


def budget(step, amount=4, total=110, first=10, last=20):
    return cubic_budget(step, amount=amount, total_steps=total, init_warmup=first, final_warmup=last)


def test_budget_by_hand():
    """methods.md 2.9.5: b = 4: 4 at P = 0, round(3.5) = 4 at P = 0.5, 0 at P = 1."""
    assert [budget(10), budget(50), budget(90)] == [4, 4, 0]
    assert budget(50, amount=20) == 18  # 17.5, half to even
    assert budget(50, amount=4 * 3) == 10  # 10.5, half to even


def test_budget_never_rises_and_is_clipped():
    values = [budget(step, amount=9) for step in range(110)]
    assert values == sorted(values, reverse=True)
    assert set(values[:11]) == {9}
    assert set(values[90:]) == {0}


def test_budget_without_a_step_to_reallocate_is_refused():
    text = r"init_warmup=60 \+ elalora.final_warmup=50 leave no step of 110 for reallocation; lower them"
    with pytest.raises(ValueError, match=text):
        budget(5, first=60, last=50)


def test_events_lie_between_the_warmups_only():
    """methods.md 2.9.6 and 2.3: t > Wi, (t - Wi) % D == 0, t < T - Wf."""

    def at(t):
        return reallocates(t, total_steps=30, init_warmup=5, final_warmup=10, interval=5)

    assert [t for t in range(30) if at(t)] == [10, 15]


def test_every_step_may_be_an_event():
    found = [t for t in range(12) if reallocates(t, total_steps=12, init_warmup=0, final_warmup=0, interval=1)]
    assert found == list(range(1, 12))


def test_progress_of_a_budget_by_hand():
    """Events after steps 8, 12 and 16 of 20; the budget's way is 19, 26 and 27 of 27 done."""
    moves = MoveSchedule(20, b=2, init_warmup=4, final_warmup=3, mask_interval=4, enable_scheduler=True)
    assert [t for t in range(20) if moves.is_event(t)] == [8, 12, 16]
    assert [moves.progress(t) for t in (8, 12, 16, 19)] == pytest.approx([19 / 27, 26 / 27, 1.0, 1.0])


def test_loss_scale_doubles_after_enough_good_steps():
    scale, good = 2.0**16, 0
    for _ in range(LOSS_SCALE_GROWTH_STEPS - 1):
        scale, good = next_loss_scale(scale, good)
        assert scale == 2.0**16
    assert next_loss_scale(scale, good) == (2.0**17, 0)


def test_loss_scale_has_an_upper_end_and_one_stays():
    assert next_loss_scale(2.0**24, LOSS_SCALE_GROWTH_STEPS - 1) == (2.0**24, 0)
    assert next_loss_scale(1.0, LOSS_SCALE_GROWTH_STEPS) == (1.0, 0)
    assert schedule.LOSS_SCALE_START == 2.0**16


def falling(step, first=12, last=8):
    return falling_budget(step, first=first, last=last, total_steps=110, tinit=10, tfinal=20)


def test_falling_budget_by_hand():
    """methods.md 4.3: 9.6875, 8.5, 8.0625 and 8, floored; in units of 1/10000 before flooring."""
    steps = (30, 50, 70, 90)
    assert [falling(t) for t in steps] == [9, 8, 8, 8]
    assert [falling(t, first=120_000, last=80_000) for t in steps] == [96_875, 85_000, 80_625, 80_000]


def test_falling_budget_never_rises_and_is_flat_at_both_ends():
    values = [falling(t, first=97, last=31) for t in range(110)]
    assert values == sorted(values, reverse=True)
    assert set(values[:11]) == {97} and values[11] < 97  # the paper's printed numerator would exceed b0 here
    assert set(values[90:]) == {31}
    assert {falling(t, first=9, last=9) for t in range(110)} == {9}


def test_falling_budget_is_that_of_peft_but_for_its_rounding():
    """PEFT computes in floats: where the exact budget is whole it may come out one too low; nowhere else."""
    from peft.tuners.adalora.layer import RankAllocator

    allocator, apart = object.__new__(RankAllocator), []
    for total, tinit, tfinal, first, last in ((110, 10, 20, 12, 8), (60, 7, 13, 84, 28), (1000, 0, 0, 1000, 0)):
        allocator.peft_config = SimpleNamespace(tinit=tinit, tfinal=tfinal, total_step=total, deltaT=1)
        allocator.init_bgt, allocator.target_bgt = first, last
        for step in range(total):
            phases = {"total_steps": total, "tinit": tinit, "tfinal": tfinal}
            ours = falling_budget(step, first=first, last=last, **phases)
            theirs, _ = allocator.budget_schedule(step)
            span, left = total - tfinal - tinit, total - tfinal - step
            whole = (first - last) * left**3 % span**3 == 0
            assert ours == theirs or (whole and ours == theirs + 1), (step, ours, theirs)
            apart += [(total, step, ours, theirs)] * (ours != theirs)
    assert (1000, 900, 1, 0) in apart  # 1000 * (1 - 900 / 1000)^3 is 1, in floats 0.9999999999999993


def test_falling_budget_without_a_step_to_fall_in_is_refused():
    text = r"adalora.tinit=60 \+ adalora.tfinal=50 leave no step of 110 in which the budget could fall; lower them"
    with pytest.raises(ValueError, match=text):
        falling_budget(5, first=4, last=2, total_steps=110, tinit=60, tfinal=50)
