import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from ardtrain import schedule
from ardtrain.collectives import START_EXPONENT
from ardtrain.data import build_batch
from ardtrain.evaluation import held_out_loss, token_loss_sum
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.lora import Lora
from ardtrain.trainer import Hooks, LoopState, tensor_digest
from tests.tiny import CPU, ELALORA, HeldOutBatches, TokenBatches, elalora, equal_bits, single_world, tiny_trainer

pytestmark = pytest.mark.usefixtures("world")
QUICK = {"init_warmup": 1, "mask_interval": 3, "total_steps": 12, "final_warmup": 2}


@pytest.fixture
def trainers():
    """Makes trainers and ends their engines."""
    made = []

    def make(method=None, **settings):
        made.append(tiny_trainer(method or elalora(**QUICK), **{"total_steps": 12, **settings}))
        return made[-1]

    yield make
    for trainer in made:
        trainer.arena.engine.destroy()


def state_of(trainer):
    snapshot = trainer.arena.capture()
    full = snapshot.full
    return snapshot.table, [full.master, full.exp_avg, full.exp_avg_sq, snapshot.age, *snapshot.entries.values()]


def assert_same_state(a, b):
    (table, tensors), (other, others) = state_of(a), state_of(b)
    assert table == other
    assert all(equal_bits(x, y) for x, y in zip(tensors, others, strict=True))


# ---- the step ----


@pytest.mark.parametrize("method", [Lora, lambda: elalora(**QUICK)], ids=["lora", "elalora"])
def test_a_step_waits_for_the_device_once(trainers, monkeypatch, method):
    """Reads of a tensor's numbers by the host, but for data (which lies there) and inside DeepSpeed's own step."""
    trainer = trainers(method())
    trainer.train_step()  # looks at the adapters' inputs, and refuses those without a gradient
    reads, apart = [], []

    def watched(name):
        whole = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            if not apart:
                reads.append(name)
            apart.append(name)
            try:
                return whole(self, *args, **kwargs)
            finally:
                apart.pop()

        monkeypatch.setattr(torch.Tensor, name, read)

    def unwatched(owner, name):
        whole = getattr(owner, name)

        def run(*args, **kwargs):
            apart.append(name)
            try:
                return whole(*args, **kwargs)
            finally:
                apart.pop()

        monkeypatch.setattr(owner, name, run)

    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        watched(name)
    unwatched(trainer.data, "collate")
    unwatched(trainer.arena.engine, "step")
    unwatched(trainer.backbone, "module")  # transformers asks whether a mask hides anything
    result = trainer.train_step()
    # One copy to the host; what follows reads that copy.
    assert result.grad_norm > 0 and reads == ["cpu", *["tolist"] * 6]


def test_loss_is_the_mean_over_the_steps_target_tokens(trainers):
    trainer = trainers()
    data, tokens, real, total = trainer.data, 0, 0, 0.0
    trainer.backbone.module.eval()
    for grain in data.grains(0):
        batch = data.collate(grain)
        total += token_loss_sum(trainer.backbone.module, batch, device=CPU).item()
        tokens += batch.num_target_tokens
        real += int(batch.attention_mask.sum())
    result = trainer.train_step()
    assert (result.num_targets, result.num_tokens) == (tokens, real)
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)
    assert (result.step, trainer.state.step, trainer.state.tokens_seen) == (0, 1, real)


def test_gradient_is_that_of_the_global_mean(trainers, monkeypatch):
    """And the norm that is shown is the one before clipping."""
    trainer = trainers(Lora(), max_grad_norm=1e-3)
    given = []
    step = trainer.arena.engine.step
    monkeypatch.setattr(trainer.arena.engine, "step", lambda g, lr: (given.append(g.clone()), step(g, lr=lr)))
    leaf = trainer.arena.engine.leaf()
    from ardtrain.adapters import bind_arena

    bind_arena(trainer.adapters, trainer.arena.layout, leaf)
    batches = [trainer.data.collate(g) for g in trainer.data.grains(0)]
    losses = [token_loss_sum(trainer.backbone.module, b, device=CPU) for b in batches]
    (wanted,) = torch.autograd.grad(sum(losses) / sum(b.num_target_tokens for b in batches), leaf)
    result = trainer.train_step()
    norm = wanted.norm().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 1e-3
    torch.testing.assert_close(given[0], wanted * (1e-3 / (norm + 1e-6)), rtol=1e-4, atol=1e-10)


def test_same_run_twice_is_equal_to_the_bit_with_dropout(trainers):
    first, second = trainers(dropout=0.2), trainers(dropout=0.2)
    torch.manual_seed(1)
    losses = [first.train_step().loss for _ in range(6)]
    torch.manual_seed(2)  # the global generator is nobody's
    torch.rand(5)
    assert [second.train_step().loss for _ in range(6)] == losses
    assert_same_state(first, second)
    without = trainers()
    assert [without.train_step().loss for _ in range(6)] != losses  # dropout does something


def test_step_leaves_the_global_generator_alone(trainers):
    trainer = trainers(dropout=0.2)
    state = torch.random.get_rng_state()
    trainer.train_step()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_packed_documents_do_not_see_each_other(trainers):
    """The loss of a packed row is the sum of its documents' own losses."""
    trainer = trainers()
    numbers = np.random.default_rng(0)
    documents = [(numbers.integers(4, 128, size=n).astype(np.int32), np.arange(n) >= 2) for n in (5, 9, 7)]
    module = trainer.backbone.module

    def loss(rows, packed):
        batch = build_batch(rows, packed=packed, pad_token_id=0)
        return token_loss_sum(module, batch, device=CPU).item()

    assert loss([documents], True) == pytest.approx(sum(loss([[d]], False) for d in documents), rel=1e-5)


def test_exponent_follows_the_last_step(trainers):
    trainer = trainers()
    assert trainer.state.exponent == START_EXPONENT
    trainer.train_step()
    assert trainer.state.exponent != START_EXPONENT


def test_a_repeated_step_equals_one_that_started_with_the_right_exponent(trainers):
    repeated, plain = trainers(dropout=0.1), trainers(dropout=0.1)
    calls = []
    collate = repeated.data.collate
    repeated.data.collate = lambda grain: (calls.append(grain), collate(grain))[1]
    repeated.state.exponent = 70
    plain.train_step()
    right = plain.state.exponent
    fresh = trainers(dropout=0.1)
    fresh.state.exponent = right
    repeated.train_step()
    fresh.train_step()
    assert len(calls) == 8  # every grain twice, with the same random numbers
    assert repeated.state.exponent == right
    assert_same_state(repeated, fresh)


def test_score_at_chooses_weights_and_gradient(trainers, monkeypatch):
    seen = {}
    for when in ("after_step", "before_step"):
        method = ElaLora(replace(ELALORA, reg_orth_coef=0.0))
        trainer = trainers(method, score_at=when, max_grad_norm=1e-3, warmup_steps=0)
        start = trainer.arena.engine.weights.clone()
        monkeypatch.setattr(method, "observe", lambda step, s, when=when: seen.update({when: s}))
        result = trainer.train_step()
        weights = start if when == "before_step" else trainer.arena.engine.weights
        assert equal_bits(seen[when].weights, weights)
        norm = 1e-3 if when == "after_step" else result.grad_norm
        assert seen[when].gradient.norm().item() == pytest.approx(norm, rel=1e-2)
    assert not torch.equal(seen["after_step"].weights, seen["before_step"].weights)


# ---- the method's own loss ----


def test_extra_loss_counts_once_a_step(trainers, monkeypatch):
    """Not per grain; in the norm, apart from the loss that is shown."""
    for num_grains in (1, 4):
        method = ElaLora(replace(ELALORA, reg_orth_coef=0.0))
        plain = trainers(method, data=TokenBatches(num_grains=num_grains)).train_step()
        method, calls = ElaLora(replace(ELALORA, reg_orth_coef=10.0)), []
        extra = method.extra_loss
        monkeypatch.setattr(method, "extra_loss", lambda views, e=extra, c=calls: (c.append(1), e(views))[1])
        trainer = trainers(method, data=TokenBatches(num_grains=num_grains))
        leaf = trainer.arena.engine.leaf()
        penalty = extra(trainer.arena.layout.views(leaf))
        (own,) = torch.autograd.grad(penalty, leaf)
        result = trainer.train_step()
        assert len(calls) == 1
        assert result.loss == plain.loss and plain.extra_loss == 0.0
        assert result.extra_loss == pytest.approx(penalty.item())
        # The two gradients lie in different places at the start (E = 0): the norms add in squares.
        assert result.grad_norm**2 == pytest.approx(plain.grad_norm**2 + own.norm().item() ** 2, rel=1e-4)


# ---- evaluation ----


def test_evaluation_between_steps_changes_nothing(trainers):
    plain, watched = trainers(dropout=0.1), trainers(dropout=0.1)
    watched.eval_data = HeldOutBatches(seed=5, num_grains=3, length=17)
    losses = []
    for _ in range(9):
        watched.evaluate()
        losses.append((plain.train_step().loss, watched.train_step().loss))
        assert watched.backbone.module.training
    assert [a for a, _ in losses] == [b for _, b in losses]
    assert plain.state.events > 0
    assert_same_state(plain, watched)


def test_held_out_loss_is_the_mean_without_dropout(trainers):
    trainer = trainers(dropout=0.5)
    trainer.eval_data = HeldOutBatches(num_grains=3)
    assert trainer.evaluate() == trainer.evaluate()
    held_out = trainer.evaluate()
    batches = [trainer.eval_data.collate(g) for g in trainer.eval_data.grains()]
    module = trainer.backbone.module.eval()
    with torch.no_grad():
        losses = [token_loss_sum(module, b, device=CPU).item() for b in batches]
    tokens = sum(b.num_target_tokens for b in batches)
    assert held_out.num_tokens == tokens
    assert held_out.loss == math.fsum(losses) / tokens
    assert held_out.perplexity == math.exp(held_out.loss)
    again = held_out_loss(module, trainer.eval_data, world=single_world())
    assert again == held_out
    assert not module.training  # left as it was found


# ---- void steps ----


class Poisoned(TokenBatches):
    """Data whose grain 2 is bad at chosen steps: its loss is made NaN by the test's model hook."""

    bad_steps = ()

    def collate(self, grain):
        batch = super().collate(grain)
        if grain[0] in self.bad_steps and grain[1] == 2:
            return replace(batch, input_ids=torch.full_like(batch.input_ids, 99))
        return batch


def poisoned(trainers, *bad_steps, **settings):
    data = Poisoned(vocab=90)
    data.bad_steps = bad_steps
    trainer = trainers(data=data, **settings)
    embedding = trainer.backbone.module.get_input_embeddings()
    embedding.weight.data[99] = math.nan
    return trainer


def test_non_finite_loss_stops_the_run_naming_step_and_samples(trainers):
    trainer = poisoned(trainers, 1)
    trainer.train_step()
    before = state_of(trainer)
    text = r"step 1: loss or gradient is not finite in grains \[2\] \(samples tiny:1.2.0, tiny:1.2.1\); "
    with pytest.raises(RuntimeError, match=text + "max_skipped_steps=0 allows no more void steps in a row. Look at"):
        trainer.train_step()
    assert all(equal_bits(a, b) for a, b in zip(before[1], state_of(trainer)[1], strict=True))


def test_void_steps_are_skipped_up_to_the_limit_in_a_row(trainers):
    trainer = poisoned(trainers, 1, 2, 4, 5, 6, max_skipped_steps=2)
    trainer.train_step()
    before = state_of(trainer)
    for step in (1, 2):
        result = trainer.train_step()
        assert (result.step, result.void, result.record) == (step, True, None)
        assert all(equal_bits(a, b) for a, b in zip(before[1], state_of(trainer)[1], strict=True))
    assert not trainer.train_step().void
    assert trainer.state.skipped == 0
    assert trainer.train_step().void and trainer.train_step().void
    with pytest.raises(RuntimeError, match=r"step 6: .*tiny:6.2.0"):
        trainer.train_step()


@pytest.mark.parametrize("limit", [0, 1])
def test_non_finite_extra_loss_counts_as_void_too(trainers, monkeypatch, limit):
    """Every grain is finite here; the gradient's norm is not."""
    method = elalora(**QUICK)
    trainer = trainers(method, max_skipped_steps=limit)
    monkeypatch.setattr(method, "extra_loss", lambda views: math.nan * next(iter(views.values()))["lora_A"].sum())
    for _ in range(limit):
        assert trainer.train_step().void
    with pytest.raises(RuntimeError, match=rf"step {limit}: loss or gradient is not finite .*tiny:{limit}.0.0"):
        trainer.train_step()


def test_adapter_that_never_runs_is_named(trainers):
    trainer = trainers()
    layer = trainer.backbone.module.model.layers[1].mlp
    layer.forward = lambda x: x  # as SigLIP's pooling head in PaliGemma: it exists and is never used
    text = "3 adapters received no gradient in the first step, e.g. model.layers.1.mlp.gate_proj: .*exclude_modules"
    with pytest.raises(RuntimeError, match=text):
        trainer.train_step()


# ---- fp16's loss scale ----


def test_loss_scale_changes_no_bit_of_a_step(trainers):
    plain, scaled = trainers(), trainers()
    scaled.state.loss_scale = 2.0**6
    for _ in range(5):
        a, b = plain.train_step(), scaled.train_step()
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    assert_same_state(plain, scaled)
    assert scaled.state.good_steps == 5


def test_step_that_doubles_the_scale_is_divided_by_the_scale_it_used(trainers, monkeypatch):
    monkeypatch.setattr(schedule, "LOSS_SCALE_GROWTH_STEPS", 2)
    plain, scaled = trainers(), trainers()
    scaled.state.loss_scale = 2.0**6
    for _ in range(5):
        assert plain.train_step().grad_norm == scaled.train_step().grad_norm
    assert scaled.state.loss_scale == 2.0**8
    assert_same_state(plain, scaled)


def test_overflowing_scale_is_halved_and_the_step_repeated(trainers, monkeypatch):
    plain, scaled = trainers(), trainers()
    scaled.state.loss_scale = 2.0**12
    grain = type(scaled)._grain

    def overflows(self, step, index, batch, leaf):
        loss, gradient = grain(self, step, index, batch, leaf)
        if self is scaled and index == 2 and self.state.loss_scale > 2.0**9:
            gradient = [piece + math.inf for piece in gradient]
        return loss, gradient

    monkeypatch.setattr(type(scaled), "_grain", overflows)
    assert not scaled.train_step().void
    plain.train_step()
    assert (scaled.state.loss_scale, scaled.state.good_steps) == (2.0**9, 1)
    assert_same_state(plain, scaled)


# ---- the loop ----


def test_fit_calls_its_hooks_at_their_steps(trainers):
    calls = []
    trainer = trainers(total_steps=7, eval_steps=3, save_steps=2)
    trainer.eval_data = HeldOutBatches(num_grains=1)
    trainer.hooks = Hooks(
        on_step=lambda result: calls.append(("step", result.step)),
        on_evaluate=lambda step, held_out: calls.append(("evaluate", step)),
        save=lambda reason: calls.append(("save", trainer.state.step, reason)),
    )
    assert trainer.fit() == 0
    assert [c for c in calls if c[0] == "step"] == [("step", i) for i in range(7)]
    assert [c[1] for c in calls if c[0] == "evaluate"] == [3, 6, 7]
    saves = [c[1:] for c in calls if c[0] == "save"]
    assert saves == [(2, "step"), (4, "step"), (6, "step"), (7, "last")]


def test_stop_request_ends_at_a_step_boundary_with_a_save(trainers):
    saved = []
    trainer = trainers()
    trainer.hooks = Hooks(save=saved.append, stop_flag=lambda: 5 if trainer.state.step == 3 else 0)
    assert trainer.fit() == 5
    assert (trainer.state.step, saved) == (4, ["stop"])


def test_resumed_run_equals_the_unbroken_one(trainers):
    unbroken = trainers(dropout=0.1)
    for _ in range(5):
        unbroken.train_step()
    snapshot, layout = unbroken.arena.capture(), unbroken.arena.layout
    loop = asdict(unbroken.state)
    losses = [unbroken.train_step().loss for _ in range(7)]
    resumed = trainers(dropout=0.1, start=False)
    resumed.arena.build(snapshot, layout)
    resumed.state = LoopState(**loop)
    assert [resumed.train_step().loss for _ in range(7)] == losses
    assert unbroken.state.events >= 2
    assert_same_state(unbroken, resumed)


def test_digest_follows_every_bit_and_its_place(monkeypatch):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = tensor_digest(values)
    flipped = values.clone()
    flipped.view(torch.int32)[999] ^= 1
    swapped = values.clone()
    swapped[[3, 700]] = swapped[[700, 3]]
    assert len({whole, tensor_digest(flipped), tensor_digest(swapped), tensor_digest(values[:999])}) == 4
    assert tensor_digest(torch.tensor([0.0, 1.0])) == tensor_digest(torch.tensor([-0.0, 1.0]))
    monkeypatch.setattr("ardtrain.trainer.DIGEST_CHUNK", 64)
    assert tensor_digest(values) == whole
