"""The trainer with AdaLoRA against PEFT's AdaLoRA on one tiny Llama: same first A, B, E, same batches, one process.

PEFT's own forward gives its loss and penalty, its own allocator scores and masks; AdamW, clipping and the schedule of
the learning rate are torch's and transformers', as its users have them.
"""

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

from ardtrain.methods.adalora import AdaLora, AdaLoraSettings
from tests.tiny import TokenBatches, sites_of_model, tiny_llama, tiny_trainer

STEPS, R, TARGET, ALPHA = 20, 4, 2, 16.0
PHASES = {"tinit": 3, "tfinal": 5, "deltaT": 2}
EVENTS = [4, 6, 8, 10, 12, 14]
RATE, WARMUP, MAX_NORM, PENALTY = 1e-2, 2, 0.2, 0.5
TOLERANCE = 1e-5
# PEFT divides lora_alpha by r + 1e-5, in float32.
SCALE = float(torch.tensor(ALPHA) / (torch.tensor(float(R)) + 1e-5))


class OneGrain(TokenBatches):
    """PEFT's loss is the mean over a batch's target tokens; so one batch a step."""

    def __init__(self):
        super().__init__(seed=12, num_grains=1, rows=4)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")


def ours():
    method = AdaLora(
        AdaLoraSettings(
            total_steps=STEPS,
            target_r=TARGET,
            **PHASES,
            beta1=0.85,
            beta2=0.85,
            orth_reg_weight=PENALTY,
            reg_orth_form="mean_norm",
            compact="end",
        )
    )
    return tiny_trainer(
        method,
        data=OneGrain(),
        r=R,
        lora_alpha=SCALE * R,
        total_steps=STEPS,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        max_grad_norm=MAX_NORM,
    )


def theirs(arena):
    """PEFT's model with the arena's weights in it, and its layers in the arena's order of sites."""
    base = tiny_llama()
    sites, _ = sites_of_model(base, r=R, lora_alpha=ALPHA)
    assert [s.module for s in sites] == [s.module for s in arena.table.sites]
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=R,
        target_r=TARGET,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        total_step=STEPS,
        orth_reg_weight=PENALTY,
        target_modules=[s.module for s in sites],
        **PHASES,
    )
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, config)
    layers = [model.base_model.model.get_submodule(s.module) for s in sites]
    for index, layer in enumerate(layers):
        rows = arena.layout.site_rows(arena.engine.weights, index)
        layer.lora_A["default"].data.copy_(rows["lora_A"])
        layer.lora_B["default"].data.copy_(rows["lora_B"].T)
        layer.lora_E["default"].data.copy_(rows["diagonal"])
    return model, layers


def run_peft(model, layers, data):
    """PEFT's training loop: loss and penalty of each step, {event: scores [R]}, {step: [R] bool, what it kept}."""
    parameters = [p for n, p in model.named_parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    rates = get_linear_schedule_with_warmup(adam, WARMUP, STEPS)
    allocator, losses, scores, kept = model.base_model.rankallocator, [], {}, {}
    model.train()
    for step in range(STEPS):
        batch = data.collate(data.grains(step)[0])
        loss = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
            labels=batch.labels,
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        adam.step()
        rates.step()
        if step == STEPS - PHASES["tfinal"]:
            scores[step] = component_scores(model, allocator, layers)  # forgotten by the call
        model.base_model.update_and_allocate(step)
        if step in EVENTS:
            scores[step] = component_scores(model, allocator, layers)
        if step in EVENTS or step >= STEPS - PHASES["tfinal"]:
            pattern, names = model.base_model.peft_config["default"].rank_pattern, names_of(model)
            kept[step] = torch.tensor([bit for x in layers for bit in pattern[names[id(x.lora_E["default"])]]])
        adam.zero_grad()
        losses.append(loss.item())
    return losses, scores, kept


def names_of(model):
    """id of each parameter -> the name PEFT's allocator has for it."""
    return {id(p): n for n, p in model.base_model.model.named_parameters()}


def component_scores(model, allocator, layers):
    """[R] of PEFT's own averages by its own combination."""
    names, out = names_of(model), []
    for layer in layers:
        e, a, b = (
            allocator._element_score(names[id(p["default"])]) for p in (layer.lora_E, layer.lora_A, layer.lora_B)
        )
        vectors = torch.cat([a.mean(dim=1, keepdim=True), b.mean(dim=0).view(-1, 1)], dim=1)
        out.append(allocator._combine_ipt(e, vectors))
    return torch.cat(out).double()


def apart(a, b):
    """Largest difference as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


def test_forward_gives_pefts_logits():
    trainer = ours()
    generator = torch.Generator().manual_seed(1)
    flat = trainer.arena.engine.weights.clone()
    for index in range(len(trainer.arena.table.sites)):
        trainer.arena.layout.site_rows(flat, index)["diagonal"].normal_(generator=generator)
        trainer.arena.layout.site_rows(flat, index)["lora_A"].normal_(0.0, 0.2, generator=generator)
        trainer.arena.layout.site_rows(flat, index)["lora_B"].normal_(0.0, 0.2, generator=generator)
    plain = logits_of(trainer, trainer.arena.engine.weights)
    trainer.arena.engine.weights.copy_(flat)
    model, _ = theirs(trainer.arena)
    with torch.no_grad():
        wanted = model(**inputs()).logits
    got = logits_of(trainer, flat)
    trainer.arena.engine.destroy()
    assert apart(got, wanted) <= TOLERANCE
    assert apart(plain, wanted) > 0.1  # the adapters matter


def inputs():
    batch = OneGrain().collate((0, 0))
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "position_ids": batch.position_ids,
        "use_cache": False,
    }


def logits_of(trainer, flat):
    views = trainer.arena.layout.views(flat)
    for module, adapter in trainer.adapters.items():
        adapter.views = views[module]
    with torch.no_grad():
        return trainer.backbone.module(**inputs()).logits


def test_masks_scores_and_weights_after_the_whole_schedule():
    trainer = ours()
    arena = trainer.arena
    model, layers = theirs(arena)
    losses, scores, kept = run_peft(model, layers, OneGrain())
    whole, found, norms = arena.table, [], []
    for step in range(STEPS):
        result = trainer.train_step()
        found.append(result.loss + result.extra_loss)
        norms.append(result.grad_norm)
        if result.scores is not None:
            difference = (result.scores - scores[step]).abs().max()
            assert apart(result.scores, scores[step]) <= TOLERANCE
            cut = result.record.plan.scores
            gap = cut["lowest_kept"] - cut["highest_masked"]
            assert gap >= 100 * difference, f"step {step}: choose a seed with wider gaps"
            zero = {whole.offsets[i] + p for i, change in result.record.plan.changes.items() for p in change.zero}
            assert zero == set(torch.nonzero(~kept[step]).flatten().tolist()), f"step {step}"
    assert sorted(kept) == [*EVENTS, *range(15, 20)] and sorted(scores) == [*EVENTS, 15]
    np.testing.assert_allclose(found, losses, rtol=TOLERANCE)
    stays = torch.tensor_split(kept[STEPS - 1], whole.offsets[1:-1])
    assert arena.table.births == tuple(tuple(torch.nonzero(s).flatten().tolist()) for s in stays)
    for index, (layer, stay) in enumerate(zip(layers, stays, strict=True)):
        if not stay.any():
            continue
        rows = arena.layout.site_rows(arena.engine.weights, index)
        assert not layer.lora_E["default"].detach()[~stay].any()
        assert apart(rows["lora_A"], layer.lora_A["default"].detach()[stay]) <= TOLERANCE
        assert apart(rows["lora_B"], layer.lora_B["default"].detach().T[stay]) <= TOLERANCE
        assert apart(rows["diagonal"], layer.lora_E["default"].detach()[stay]) <= TOLERANCE
    arena.engine.destroy()
    assert min(norms) < MAX_NORM < max(norms)  # clipping was at work
    assert arena.table.total == TARGET * len(layers) and len(set(arena.table.ranks)) > 1
