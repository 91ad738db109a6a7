"""The trainer with DoRA against PEFT's on one tiny Llama: same A, B and magnitudes, same batches, one process."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ardtrain.methods.dora import Dora
from tests.reference.test_lora_peft import (
    SCALES,
    TOLERANCE,
    R,
    apart,
    assert_same_after_training,
    assert_same_logits_and_gradients,
    dense_of,
    inputs,
    logits_of,
    ours,
    pairs,
    randomize,
    theirs,
)
from tests.tiny import tiny_llama


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_magnitudes_start_as_pefts():
    """The norm of the weight over its inputs; both leave the base's function as it is."""
    trainer = ours(Dora(), form="dora")
    arena = trainer.arena
    modules = [s.module for s in arena.table.sites]
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny_llama(), LoraConfig(r=R, target_modules=modules, use_dora=True))
    for module in modules:
        own = model.base_model.model.get_submodule(module).lora_magnitude_vector["default"].weight.detach()
        torch.testing.assert_close(dense_of(arena, module, arena.engine.weights).view(-1), own, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert apart(logits_of(trainer), tiny_llama()(**inputs()).logits) <= 1e-6
    trainer.arena.engine.destroy()


@SCALES
def test_logits_and_gradients(rslora):
    trainer = ours(Dora(), form="dora", rslora=rslora)
    assert_same_logits_and_gradients(trainer, use_dora=True, use_rslora=rslora)
    trainer.arena.engine.destroy()


@SCALES
@pytest.mark.parametrize("start", ["B = 0", "random"])
def test_training(rslora, start):
    """From B = 0 gradients of A are near 0 for steps and Adam divides their last bits by themselves: 1e-4 there."""
    trainer = ours(Dora(), form="dora", rslora=rslora)
    if start == "random":
        randomize(trainer)
    tolerance = TOLERANCE if start == "random" else 1e-4
    assert_same_after_training(trainer, tolerance=tolerance, use_dora=True, use_rslora=rslora)
    trainer.arena.engine.destroy()


def test_magnitudes_are_among_what_is_compared():
    trainer = ours(Dora(), form="dora")
    _, layers = theirs(trainer, use_dora=True)
    names = [name for name, _, _ in pairs(trainer, layers, trainer.arena.engine.weights)]
    assert sum(name.endswith("magnitude") for name in names) == 14
    for name, mine, peft in pairs(trainer, layers, trainer.arena.engine.weights):
        assert apart(mine, peft) <= TOLERANCE if peft.any() else not mine.any(), name
    trainer.arena.engine.destroy()
