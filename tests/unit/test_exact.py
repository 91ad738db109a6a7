"""Sums that do not depend on the order or the dealing of grains, and the kernels that may follow them."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ardtrain import collectives
from ardtrain.collectives import CHUNK, LIMIT_BITS, START_EXPONENT, ExactSum, World, deal, idle_share, next_exponent
from ardtrain.engines import AdamSettings, make_optimizer
from tests.tiny import CPU, equal_bits

ALONE = World(0, 1, CPU)


class FakeWorld(World):
    """Adds the other processes' buffers by hand."""

    def __init__(self, others):
        super().__init__(0, len(others) + 1, CPU)
        self.others = others

    def add_integers(self, values):
        for other in self.others:
            values += other._buffer


def grains_of(count, numbers=1000, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.logspace(-6, 0, numbers)
    return [
        (torch.rand((), generator=generator) * 50, torch.randn(numbers, generator=generator) * magnitudes * size)
        for _ in range(count)
    ]


def summed(grains, dealing, exponent=START_EXPONENT, flags=None):
    """The StepSum of grains dealt as lists of indices, one list a process."""
    sums = []
    for process, own in enumerate(dealing):
        total = ExactSum(len(grains[0][1]), len(grains), exponent=exponent, device=CPU)
        for index in own:
            loss, gradient = grains[index]
            total.add(index, loss=loss, gradient=gradient, tokens=10 + index)
        total._buffer[total._head - 2] = flags[process] if flags else 0
        sums.append(total)
    return sums[0].reduce(FakeWorld(sums[1:]) if sums[1:] else ALONE, flag=flags[0] if flags else 0)


def test_any_order_gives_equal_bits():
    grains = grains_of(5)
    wanted = summed(grains, [range(5)])
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 7):
        result = summed(grains, [order])
        assert equal_bits(result.gradient, wanted.gradient)
        assert (result.losses, result.tokens) == (wanted.losses, wanted.tokens)


def test_any_dealing_gives_equal_bits():
    grains = grains_of(12)
    wanted = summed(grains, [range(12)])
    for world_size in range(1, 14):
        dealing = [[g for g, counted in deal(12, world_size, p) if counted] for p in range(world_size)]
        result = summed(grains, dealing)
        assert equal_bits(result.gradient, wanted.gradient)
        assert result.losses == wanted.losses
        assert result.largest == wanted.largest
        assert result.valid and result.finite


def test_ordinary_sums_would_not():
    """The premise: float32 sums of the same numbers do depend on the order."""
    gradients = [g for _, g in grains_of(12)]
    forward, backward = sum(gradients), sum(gradients[::-1])
    assert not equal_bits(forward, backward)


def test_sum_is_right_to_the_last_bit_of_float32():
    grains = grains_of(6)
    exact = np.sum([g.double().numpy() for _, g in grains], axis=0)
    got = summed(grains, [range(6)]).gradient.double().numpy()
    assert np.abs(got - exact).max() <= 6 * 2.0 ** -(START_EXPONENT + 1) + np.abs(exact).max() * 2.0**-24


def test_losses_travel_to_the_bit():
    values = [0.1, 1e-30, 123.456789012345678, 3.0000000000000004, 0.0]
    grains = [(torch.tensor(v, dtype=torch.float64), torch.ones(3)) for v in values]
    assert summed(grains, [[1, 3], [0], [2, 4]]).losses == tuple(values)
    grains = [(torch.tensor(v), torch.ones(3)) for v in values]
    assert summed(grains, [[1, 3], [0], [2, 4]]).losses == tuple(float(np.float32(v)) for v in values)


def test_tokens_and_flags_are_summed():
    result = summed(grains_of(4), [[0, 3], [1], [2]], flags=[1, 0, 1 << 20])
    assert result.tokens == (10, 11, 12, 13)
    assert result.flag == 1 + (1 << 20)


def test_long_gradients_are_converted_in_chunks(monkeypatch):
    grains = grains_of(3, numbers=1000)
    wanted = summed(grains, [range(3)])
    monkeypatch.setattr("ardtrain.collectives.CHUNK", 64)
    result = summed(grains, [range(3)])
    assert equal_bits(result.gradient, wanted.gradient)
    assert result.largest == wanted.largest
    assert CHUNK * 8 == 128 << 20


def test_overflow_is_seen_and_the_next_exponent_fits():
    grains = grains_of(4, size=1.0e6)
    result = summed(grains, [range(4)])
    assert result.finite and not result.valid
    exponent = next_exponent(result.largest, 4, current=START_EXPONENT)
    assert exponent < START_EXPONENT
    again = summed(grains, [range(4)], exponent=exponent)
    assert again.valid
    exact = sum(g.double() for _, g in grains)
    assert ((again.gradient.double() - exact).abs() <= 2.0**-24 * exact.abs() + 4 * 2.0 ** -(exponent + 1)).all()


def test_validity_is_order_free_and_safe():
    """G * m * 2^e < 2^62 decides, not whether this order of additions happened to overflow."""
    grains = grains_of(4, size=1.0e6)
    for order in itertools.permutations(range(4)):
        assert not summed(grains, [order]).valid
    largest = 2.0**10
    just = [(torch.tensor(1.0), torch.full((1,), largest))] * 4
    assert not summed(just, [range(4)], exponent=LIMIT_BITS - 12).valid  # 4 * 2^10 * 2^50 = 2^62
    assert summed(just, [range(4)], exponent=LIMIT_BITS - 13).valid


@pytest.mark.parametrize("largest", [1e-30, 3e-7, 1.0, 1.5, 4096.0, 1e20])
@pytest.mark.parametrize("count", [1, 7, 512])
def test_next_exponent_leaves_eight_bits_of_room(largest, count):
    exponent = next_exponent(largest, count, current=0)
    assert -100 <= exponent <= 100
    if exponent == 100:
        return
    assert count * largest * 2.0**8 * 2.0**exponent < 2.0**LIMIT_BITS
    assert count * largest * 2.0**8 * 2.0 ** (exponent + 2) >= 2.0 ** (LIMIT_BITS - 1)


def test_next_exponent_stays_where_nothing_was_learnt():
    assert [next_exponent(x, 4, current=37) for x in (0.0, math.inf, math.nan)] == [37, 37, 37]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_names_its_grain(bad):
    grains = grains_of(5)
    grains[3][1][17] = bad
    for dealing in ([range(5)], [[0, 3], [1, 4], [2]], [[0], [1], [2], [3], [4]]):
        result = summed(grains, dealing)
        assert not result.finite
        assert result.bad_grains == (3,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_names_its_grain(bad):
    grains = grains_of(3)
    grains[1] = (torch.tensor(bad), grains[1][1])
    result = summed(grains, [[0, 1], [2]])
    assert (result.finite, result.bad_grains) == (False, (1,))
    assert [math.isfinite(x) for x in result.losses] == [True, False, True]


def test_no_numbers_is_a_sum_of_losses():
    grains = [(torch.tensor(v), torch.zeros(0)) for v in (1.5, 2.5)]
    result = summed(grains, [[1], [0]], exponent=0)
    assert (result.losses, result.gradient.numel(), result.valid, result.finite) == ((1.5, 2.5), 0, True, True)


@pytest.mark.parametrize("num_grains", [1, 2, 5, 12])
@pytest.mark.parametrize("world_size", range(1, 8))
def test_each_grain_is_counted_once_in_equal_rounds(num_grains, world_size):
    dealt = [deal(num_grains, world_size, p) for p in range(world_size)]
    assert sorted(g for own in dealt for g, counted in own if counted) == list(range(num_grains))
    assert len({len(own) for own in dealt}) == 1  # ZeRO-3 needs everyone in every forward
    rounds = sum(len(own) for own in dealt)
    assert {g for own in dealt for g, counted in own if not counted} <= {0}
    assert idle_share(num_grains, world_size) == pytest.approx((rounds - num_grains) / rounds)


def test_a_process_alone_takes_the_grains_in_order():
    assert deal(3, 1, 0) == [(0, True), (1, True), (2, True)]


# ---- the optimizer after the sum ----


def adam_steps(cut, *, length, offload, steps=5, decay=0.01):
    """[length] weights and moments after some AdamW steps, the parameter cut into parts of `cut` numbers."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(length, generator=generator)
    gradients = [torch.randn(length, generator=generator) * 10.0**-i for i in range(steps)]
    config = {"zero_optimization": {"stage": 1, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}}
    settings = AdamSettings(betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    pieces = []
    for begin in range(0, length, cut):
        parameter = nn.Parameter(start[begin : begin + cut].clone())
        optimizer = make_optimizer(parameter, settings, device=CPU, config=config)
        for step, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            parameter.grad = gradient[begin : begin + cut].clone()
            optimizer.step()
        state = optimizer.state[parameter]
        pieces.append(torch.stack([parameter.data, state["exp_avg"], state["exp_avg_sq"]]))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("cut", [1, 3, 7, 21])
def test_adam_is_equal_for_every_cut(cut, offload):
    """Guards the choice in engines.make_optimizer: torch's fused kernel rounds a partition's tail otherwise."""
    length = 210
    whole = adam_steps(length, length=length, offload=offload)
    assert equal_bits(adam_steps(cut, length=length, offload=offload), whole)


def test_adam_against_numpy():
    got = adam_steps(21, length=21, offload=False).double().numpy()
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(21, generator=generator).double().numpy()
    m, v = np.zeros(21), np.zeros(21)
    for step in range(5):
        g = (torch.randn(21, generator=generator) * 10.0**-step).double().numpy()
        lr = 1e-2 / (step + 1)
        w = w * (1 - lr * 0.01)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w -= lr * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
    np.testing.assert_allclose(got, np.stack([w, m, v]), rtol=2e-5, atol=1e-7)


# ---- agreement ----


def agreed(texts, monkeypatch):
    """What `agree` says on each of as many processes, their messages joined by hand; and how often each gathered."""
    words, hashes, messages, gathers = [], {}, [], []

    def remember(values, op):
        assert op == dist.ReduceOp.MAX and values.numel() == 16  # whatever the number of processes
        words.append(values.clone())

    monkeypatch.setattr(collectives.dist, "all_reduce", remember)
    for rank, text in enumerate(texts):
        World(rank, len(texts), CPU).agree("plan", text, step=3)
    largest = torch.stack(words).amax(0)
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda values, op: values.copy_(largest))
    for rank, text in enumerate(texts):
        hashes[rank] = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)

    def gather(boxes, own):
        gathers.append(own)
        for rank, box in enumerate(boxes):
            box.copy_(hashes[rank])

    monkeypatch.setattr(collectives.dist, "all_gather", gather)
    for rank, text in enumerate(texts):
        try:
            World(rank, len(texts), CPU).agree("plan", text, step=3)
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages, len(gathers)


def test_agreement_costs_one_small_all_reduce(monkeypatch):
    assert agreed(["same"] * 64, monkeypatch) == ([""] * 64, 0)


def test_disagreement_names_those_that_differ_on_every_process(monkeypatch):
    """Texts of unlike length too; a difference in either direction."""
    messages, gathers = agreed(["same", "longer than the others", "same", "x"], monkeypatch)
    assert gathers == 4
    for message in messages:
        assert message.startswith("step 3: processes [1, 3] hold another plan than process 0 (hashes ")


def test_what_finish_computes_comes_with_the_sum():
    """From the sum over the processes and the step's target tokens; it may change the sum."""
    grains = grains_of(3)
    parts = []
    for own in ([0, 2], [1]):
        total = ExactSum(1000, 3, exponent=START_EXPONENT, device=CPU)
        for index in own:
            total.add(index, loss=grains[index][0], gradient=grains[index][1], tokens=10 + index)
        parts.append(total)
    seen = parts[0].reduce(
        FakeWorld(parts[1:]),
        finish=lambda sum_, tokens: torch.stack([sum_.div_(2.0).double().sum(), tokens.double()]),
    )
    wanted = summed(grains, [range(3)])
    assert equal_bits(seen.gradient, wanted.gradient / 2.0)
    assert seen.numbers == ((wanted.gradient / 2.0).double().sum().item(), 33.0)
    assert (seen.losses, seen.tokens, seen.valid) == (wanted.losses, wanted.tokens, True)
