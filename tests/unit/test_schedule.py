import pytest
import torch
from transformers import get_scheduler

from ardtrain import schedule
from ardtrain.schedule import LOSS_SCALE_GROWTH_STEPS, cubic_budget, learning_rate, next_loss_scale, reallocates


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
