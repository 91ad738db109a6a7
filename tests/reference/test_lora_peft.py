"""The trainer with LoRA against PEFT's on one tiny Llama: same A and B, same batches, one process.

PEFT's own forward gives its loss; AdamW, clipping and the schedule of the learning rate are torch's and transformers'.
"""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

from ardtrain import preflight
from ardtrain.adapters import bind_arena
from ardtrain.config import parse_config
from ardtrain.engines import AdamSettings
from ardtrain.methods.lora import Lora
from tests.tiny import TokenBatches, sites_of_model, tiny_llama, tiny_trainer

STEPS, R, ALPHA = 20, 4, 16.0
RATE, WARMUP, MAX_NORM, DECAY = 5e-3, 2, 0.2, 0.01
TOLERANCE = 1e-5


class OneGrain(TokenBatches):
    """PEFT's loss is the mean over a batch's target tokens; so one batch a step."""

    def __init__(self):
        super().__init__(seed=11, num_grains=1, rows=4)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")


def ours(method, *, form="plain", rslora=False):
    return tiny_trainer(
        method,
        form=form,
        data=OneGrain(),
        r=R,
        lora_alpha=ALPHA * math.sqrt(R) if rslora else ALPHA,  # as preflight does: scaling lora_alpha / sqrt(r)
        adam=AdamSettings(weight_decay=DECAY),
        total_steps=STEPS,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        max_grad_norm=MAX_NORM,
    )


def theirs(trainer, **settings):
    """PEFT's model with the arena's weights in it, and its layers in the arena's order of sites."""
    arena = trainer.arena
    modules = [s.module for s in arena.table.sites]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=modules, **settings
    )
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny_llama(), config)
    layers = [model.base_model.model.get_submodule(m) for m in modules]
    for index, layer in enumerate(layers):
        rows = arena.layout.site_rows(arena.engine.weights, index)
        layer.lora_A["default"].weight.data.copy_(rows["lora_A"])
        layer.lora_B["default"].weight.data.copy_(rows["lora_B"].T)
        if settings.get("use_dora"):
            magnitude = dense_of(arena, modules[index], arena.engine.weights)
            layer.lora_magnitude_vector["default"].weight.data.copy_(magnitude.view(-1))
    return model, layers


def dense_of(arena, module, flat):
    """A module's magnitude [1, O] in a flat tensor."""
    (block,) = (b for b in arena.layout.all_blocks if (b.module, b.part) == (module, "magnitude"))
    return block.of(flat)


def randomize(trainer, seed=1):
    """Numbers that matter in A and B, magnitudes near their norms."""
    arena, generator = trainer.arena, torch.Generator().manual_seed(seed)
    flat = arena.engine.weights.clone()
    for block in arena.layout.all_blocks:
        rows = block.of(flat)
        if block.part == "magnitude":
            rows.mul_(torch.empty_like(rows).uniform_(0.8, 1.2, generator=generator))
        else:
            rows.normal_(0.0, 0.15, generator=generator)
    arena.engine.set_weights(flat)


def inputs(step=0):
    data = OneGrain()
    batch = data.collate(data.grains(step)[0])
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "position_ids": batch.position_ids,
        "use_cache": False,
        "labels": batch.labels,
    }


def logits_of(trainer):
    bind_arena(trainer.adapters, trainer.arena.layout, trainer.arena.engine.weights)
    given = inputs()
    given.pop("labels")
    with torch.no_grad():
        return trainer.backbone.module(**given).logits


def apart(a, b):
    """Largest difference as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def pairs(trainer, layers, flat, *, gradient=False):
    """(name, ours, PEFT's) of each trained tensor, or of its gradient."""

    def read(parameter):
        return parameter.grad if gradient else parameter.detach()

    for index, (site, layer) in enumerate(zip(trainer.arena.table.sites, layers, strict=True)):
        rows = trainer.arena.layout.site_rows(flat, index)
        yield f"{site.module}.lora_A", rows["lora_A"], read(layer.lora_A["default"].weight)
        yield f"{site.module}.lora_B", rows["lora_B"], read(layer.lora_B["default"].weight).T
        if trainer.arena.layout.dense:
            magnitude = read(layer.lora_magnitude_vector["default"].weight)
            yield f"{site.module}.magnitude", dense_of(trainer.arena, site.module, flat).view(-1), magnitude


def assert_same_logits_and_gradients(trainer, **settings):
    randomize(trainer)
    model, layers = theirs(trainer, **settings)
    given = model(**inputs())
    given.loss.backward()
    with torch.no_grad():
        base = tiny_llama()(**inputs()).logits
    assert apart(logits_of(trainer), given.logits.detach()) <= TOLERANCE
    assert apart(base, given.logits.detach()) > 0.1  # the adapters matter
    gradient = trainer._sum_of_grains(0)[0].gradient
    for name, mine, peft in pairs(trainer, layers, gradient, gradient=True):
        assert mine.shape == peft.shape, name
        assert apart(mine, peft) <= TOLERANCE, name
        assert peft.abs().max() > 1e-6, name


def assert_same_after_training(trainer, *, tolerance=TOLERANCE, **settings):
    """20 steps from where the trainer is."""
    model, layers = theirs(trainer, **settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    rates = get_linear_schedule_with_warmup(adam, WARMUP, STEPS)
    first = {name: mine.clone() for name, mine, _ in pairs(trainer, layers, trainer.arena.engine.weights)}
    clipped = 0
    for step in range(STEPS):
        loss = model(**inputs(step)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        clipped += bool(norm > MAX_NORM)
        adam.step()
        rates.step()
        adam.zero_grad()
        result = trainer.train_step()
        assert result.loss == pytest.approx(float(loss.detach()), rel=TOLERANCE)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert clipped > 0
    for name, mine, peft in pairs(trainer, layers, trainer.arena.engine.weights):
        assert apart(mine, peft) <= tolerance, name
        assert apart(first[name], peft) > 0.01, name


SCALES = pytest.mark.parametrize("rslora", [False, True], ids=["alpha / r", "alpha / sqrt r"])


@SCALES
def test_logits_and_gradients(rslora):
    trainer = ours(Lora(), rslora=rslora)
    assert_same_logits_and_gradients(trainer, use_rslora=rslora)
    trainer.arena.engine.destroy()


@SCALES
def test_training(rslora):
    """From B = 0."""
    trainer = ours(Lora(), rslora=rslora)
    assert_same_after_training(trainer, use_rslora=rslora)
    trainer.arena.engine.destroy()


PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.\d+\.mlp\..*": 5},
    "alpha_pattern": {"up_proj": 3.0, "o_proj": 7.0},
}


@SCALES
@pytest.mark.parametrize("patterns", [{}, PATTERNS], ids=["even", "patterns"])
def test_the_configs_ranks_and_scales_are_pefts(rslora, patterns):
    """Through our config, r and lora_alpha as PEFT's users give them."""
    config = parse_config(
        {
            "model_name_or_path": "m",
            "method": "lora",
            "r": R,
            "lora_alpha": ALPHA,
            "use_rslora": rslora,
            **patterns,
            "target_modules": "all-linear",
            "output_dir": "o",
            "data": {"train_file": "a.jsonl"},
        }
    )
    sites, ranks, _ = preflight._sites(config, tiny_llama())
    wanted, _ = sites_of_model(tiny_llama(), r=R, lora_alpha=ALPHA)
    settings = LoraConfig(
        r=R, lora_alpha=ALPHA, use_rslora=rslora, target_modules=[s.module for s in wanted], **patterns
    )
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny_llama(), settings)
    theirs = [model.base_model.model.get_submodule(s.module) for s in sites]
    assert [s.scaling for s in sites] == pytest.approx([own.scaling["default"] for own in theirs], rel=1e-12)
    assert ranks == [own.r["default"] for own in theirs]
    assert set(ranks) == ({2, R, 5} if patterns else {R})
