"""LoRA+ (arXiv 2402.12354): B learns `lora_plus_ratio` times as fast as A."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from ardtrain.engines import AdamSettings
from ardtrain.methods.dora import Dora
from ardtrain.methods.lora import Lora
from tests.tiny import TokenBatches, adapter_config, ard_lora, elalora, equal_bits, tiny_llama, tiny_trainer

TOLERANCES = {"lora_A": 1e-6, "lora_B": 1e-6}
STEPS, R, ALPHA, RATE, WARMUP, MAX_NORM, DECAY = 20, 4, 8.0, 2e-3, 2, 0.2, 0.1


def trained_parts(trainer, flat):
    """part -> its numbers of all matrices in a flat tensor, in one vector."""
    out = {}
    for block in trainer.arena.layout.all_blocks:
        out.setdefault(block.part, []).append(block.of(flat).reshape(-1))
    return {part: torch.cat(values) for part, values in out.items()}


def moves(trainer):
    """part -> what one step adds to it."""
    before = trained_parts(trainer, trainer.arena.engine.weights.clone())
    trainer.train_step()
    after = trained_parts(trainer, trainer.arena.engine.weights)
    return {part: after[part].double() - before[part].double() for part in after}


def forked(ratio, method=None, **settings):
    """A trainer two plain steps from its start, then with this ratio: the same gradient for every ratio."""
    trainer = tiny_trainer(method or Lora(), learning_rate=RATE, warmup_steps=1, **settings)
    trainer.train_step()
    trainer.train_step()
    trainer.settings = type(trainer.settings)(**{**vars(trainer.settings), "lora_plus_ratio": ratio})
    return trainer


@pytest.mark.parametrize("ratio", [16.0, 2.0, 0.5])
@pytest.mark.parametrize("form", ["plain", "dora", "own_a"])
def test_the_step_of_b_is_ratio_times_its_plain_one(world, form, ratio):
    """And all else makes its plain step. Rounding: half a unit of a part's largest number, in B ratio times."""
    method = {"plain": Lora(), "dora": Dora(), "own_a": ard_lora()}[form]
    runs = {}
    for each in (1.0, ratio):
        trainer = forked(each, method, form=form, r=2)
        runs[each] = moves(trainer)
        parts = trained_parts(trainer, trainer.arena.engine.weights)
        largest = {part: float(values.abs().max()) for part, values in parts.items()}
        trainer.arena.engine.destroy()
    for part, plain in runs[1.0].items():
        factor = ratio if part == "lora_B" else 1.0
        difference = (runs[ratio][part] - factor * plain).abs().max()
        assert float(difference) <= 2.0**-23 * largest[part] * max(1.0, factor), part
        assert float(plain.abs().max()) > 1e-4


def test_a_ratio_of_one_is_the_plain_step_to_the_bit(world):
    a, b = forked(1.0), forked(1.0 + 2**-52)
    a.train_step()
    b.train_step()
    torch.testing.assert_close(a.arena.engine.weights, b.arena.engine.weights, rtol=1e-6, atol=1e-8)
    again = forked(1.0)
    again.train_step()
    assert equal_bits(a.arena.engine.weights, again.arena.engine.weights)
    for trainer in (a, b, again):
        trainer.arena.engine.destroy()


@pytest.mark.parametrize(
    "adapter", [adapter_config(), adapter_config(stage=2), adapter_config(offload=True)], ids=["1", "2", "offload"]
)
def test_the_longer_step_is_in_the_master_weights(world, adapter):
    """The next step starts from it, and a checkpoint holds it."""
    trainer = forked(16.0, adapter=adapter)
    trainer.train_step()
    assert equal_bits(trainer.arena.engine.capture().master, trainer.arena.engine.weights + 0.0)
    weights = trainer.arena.engine.weights.clone()
    trainer.arena.engine.step(torch.zeros_like(weights), lr=0.0)
    assert equal_bits(trainer.arena.engine.weights, weights)
    trainer.arena.engine.destroy()


@pytest.mark.parametrize("ratio", [16.0, 4.0])
def test_the_same_gradients_through_adamw_with_two_groups(world, ratio):
    """Each step's clipped gradient handed to plain AdamW, B in a group at ratio times the rate.

    1e-6 of the largest number for A; in B float32's rounding of the plain step counts ratio times: 5e-6.
    """
    trainer = tiny_trainer(
        Lora(),
        adam=AdamSettings(weight_decay=DECAY),
        total_steps=STEPS,
        learning_rate=RATE,
        max_grad_norm=MAX_NORM,
        lora_plus_ratio=ratio,
    )
    engine, layout, given = trainer.arena.engine, trainer.arena.layout, []
    inner = engine.step
    engine.step = lambda gradient, *, lr: given.append(gradient.clone()) or inner(gradient, lr=lr)
    blocks = {part: [b for b in layout.blocks if b.part == part] for part in ("lora_A", "lora_B")}
    own = {part: [b.of(engine.weights).clone().requires_grad_() for b in blocks[part]] for part in blocks}
    adam = torch.optim.AdamW([{"params": own["lora_A"]}, {"params": own["lora_B"]}], weight_decay=DECAY)
    norms = []
    for _ in range(STEPS):
        result = trainer.train_step()
        norms.append(result.grad_norm)
        gradient, rate = given[-1], result.lr
        assert float(gradient.norm()) == pytest.approx(min(norms[-1], MAX_NORM), rel=1e-4)
        for group, part, factor in zip(adam.param_groups, blocks, (1.0, ratio), strict=True):
            group["lr"] = rate * factor
            for value, block in zip(own[part], blocks[part], strict=True):
                value.grad = block.of(gradient).clone()
        adam.step()
    assert max(norms) > MAX_NORM
    for part, values in own.items():
        for value, block in zip(values, blocks[part], strict=True):
            mine = block.of(engine.weights)
            assert float((mine - value.detach()).abs().max() / value.detach().abs().max()) <= TOLERANCES[part], part
    engine.destroy()


class Plain(torch.nn.Module):
    """`W x + s (x A^T) B` with A [R, I] and B [R, O] as parameters of their own."""

    def __init__(self, linear, a, b):
        super().__init__()
        self.weight = linear.weight
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())

    def forward(self, x):
        return x @ self.weight.T + ALPHA / R * (x @ self.a.T) @ self.b


@pytest.mark.parametrize("ratio", [16.0, 4.0])
def test_against_adamw_with_two_groups(world, ratio):
    """Plain PyTorch: one AdamW, B's group at ratio times the rate, decay and clipping included; losses and weights.

    Losses to 1e-6 at every step. Weights to 1e-5: the two programs' gradients round differently, and AdamW's division
    lengthens that, as without LoRA+ (test_lora_peft.py).
    """
    data = TokenBatches(seed=3, num_grains=1, rows=4)
    trainer = tiny_trainer(
        Lora(),
        data=data,
        r=R,
        lora_alpha=ALPHA,
        adam=AdamSettings(weight_decay=DECAY),
        total_steps=STEPS,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        max_grad_norm=MAX_NORM,
        lora_plus_ratio=ratio,
    )
    model, layers, arena = tiny_llama(), [], trainer.arena
    for index, site in enumerate(arena.table.sites):
        rows = arena.layout.site_rows(arena.engine.weights, index)
        parent, _, child = site.module.rpartition(".")
        owner = model.get_submodule(parent)
        layers.append(Plain(getattr(owner, child), rows["lora_A"], rows["lora_B"]))
        setattr(owner, child, layers[-1])
    groups = [
        {"params": [layer.a for layer in layers], "lr": RATE},
        {"params": [layer.b for layer in layers], "lr": RATE * ratio},
    ]
    adam = torch.optim.AdamW(groups, weight_decay=DECAY)

    def share(step):
        return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)

    rates, clipped, fell = LambdaLR(adam, share), 0, []
    for step in range(STEPS):
        batch = data.collate(data.grains(step)[0])
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], MAX_NORM)
        clipped += bool(norm > MAX_NORM)
        adam.step()
        rates.step()
        adam.zero_grad()
        result = trainer.train_step()
        assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6), step
        fell.append(result.loss)
    assert clipped > 0
    for index, layer in enumerate(layers):
        rows = arena.layout.site_rows(arena.engine.weights, index)
        for mine, wanted in ((rows["lora_A"], layer.a.detach()), (rows["lora_B"], layer.b.detach())):
            assert float((mine - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    assert math.isfinite(fell[-1])
    trainer.arena.engine.destroy()


def test_resizing_goes_with_it(world):
    """ElaLoRA's events and LoRA+: newborn rows of B and diagonals; only B is lengthened."""
    method = elalora(init_warmup=0, mask_interval=2, newborn_immunity=False)
    trainer = tiny_trainer(method, target_modules=["q_proj"], lora_plus_ratio=8.0, total_steps=60)
    for _ in range(12):
        trainer.train_step()
    assert trainer.state.events >= 3
    assert torch.isfinite(trainer.arena.engine.weights).all()
    trainer.arena.engine.destroy()
