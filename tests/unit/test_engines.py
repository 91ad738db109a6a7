import logging
import os
import time
from collections import Counter
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import z3_leaf_module

from ardtrain.adapters import attach, bind_arena
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import enable_checkpointing, gathered_whole
from ardtrain.engines import (
    AdamSettings,
    AdapterEngine,
    BackboneEngine,
    FullState,
    quiet,
)
from ardtrain.evaluation import token_loss_sum
from ardtrain.methods.elalora import ElaLora
from ardtrain.ops import STALE_LOCK_SECONDS, remove_stale_locks
from ardtrain.ranks import RankTable
from tests.tiny import (
    CPU,
    ELALORA,
    TokenBatches,
    adapter_config,
    backbone_config,
    equal_bits,
    sites_of_model,
    tiny_llama,
)

pytestmark = pytest.mark.usefixtures("world")

SETTINGS = {
    "stage 1": adapter_config(),
    "stage 2": adapter_config(stage=2),
    "stage 1, offload": adapter_config(offload=True),
    "stage 2, offload": adapter_config(stage=2, offload=True),
}
each_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=list(SETTINGS))
NUMBERS = 997  # no multiple of any vector's length


def random(seed, size=1.0):
    return torch.randn(NUMBERS, generator=torch.Generator().manual_seed(seed)) * size


def adapter_engine(config, start=None, adam=None):
    flat = random(0) if start is None else start
    return AdapterEngine(flat, config=config, adam=adam or AdamSettings(weight_decay=0.01), device=CPU)


def train(engine, first, last):
    for step in range(first, last):
        engine.step(random(100 + step, 10.0 ** -(step % 5)), lr=1e-2 / (step + 1))


def assert_same(a, b):
    assert a.steps == b.steps
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert equal_bits(getattr(a, name), getattr(b, name)), name


# ---- the arena's engine ----


@each_setting
def test_gradient_reads_back_to_the_bit(config):
    """deepspeed.md 1: a rounding setter would go unseen; tiny numbers and zeros as well."""
    engine = adapter_engine(config)
    for size in (1.0, 1e-12, 1e-30):
        gradient = random(1, size)
        gradient[::7] = 0.0
        engine.set_gradient(gradient)
        assert equal_bits(engine.read_gradient().reshape(-1), gradient)
        engine._engine.step()
    engine.destroy()


@each_setting
def test_step_is_torchs_adamw_to_the_bit(config):
    engine = adapter_engine(config)
    parameter = torch.nn.Parameter(random(0))
    plain = torch.optim.AdamW([parameter], lr=0.0, weight_decay=0.01, foreach=False)
    for step in range(6):
        gradient, lr = random(100 + step, 10.0**-step), 1e-2 / (step + 1)
        engine.step(gradient, lr=lr)
        parameter.grad, plain.param_groups[0]["lr"] = gradient.clone(), lr
        plain.step()
        assert equal_bits(engine.weights, parameter.data)
    state, captured = plain.state[parameter], engine.capture()
    assert captured.steps == 6
    assert equal_bits(captured.master, parameter.data + 0.0)
    assert equal_bits(captured.exp_avg, state["exp_avg"] + 0.0)
    assert equal_bits(captured.exp_avg_sq, state["exp_avg_sq"] + 0.0)
    engine.destroy()


@each_setting
def test_restore_and_capture_round_trip_to_the_bit(config):
    state = FullState(random(1) + 0.0, random(2, 1e-3), random(3, 1e-9).abs(), 41)
    engine = adapter_engine(config, start=torch.zeros(NUMBERS))
    engine.restore(state)
    assert_same(engine.capture(), state)
    assert equal_bits(engine.weights, state.master)
    engine.destroy()


@pytest.mark.parametrize("after", SETTINGS.values(), ids=[f"then {s}" for s in SETTINGS])
@each_setting
def test_steps_after_a_restore_equal_the_unbroken_ones(config, after):
    unbroken = adapter_engine(config)
    train(unbroken, 0, 4)
    state = unbroken.capture()
    train(unbroken, 4, 8)
    resumed = adapter_engine(after, start=torch.zeros(NUMBERS))
    resumed.restore(state)
    train(resumed, 4, 8)
    assert_same(resumed.capture(), unbroken.capture())
    assert equal_bits(resumed.weights, unbroken.weights)
    unbroken.destroy()
    resumed.destroy()


@each_setting
def test_destroyed_engine_holds_no_array(config):
    """It lives on until the next garbage collection; gigabytes of arrays may not."""
    engine = adapter_engine(config)
    train(engine, 0, 2)
    optimizer, parameter = engine._engine.optimizer, engine._parameter
    before = {id(t): t.numel() for t in (parameter, *optimizer.single_partition_of_fp32_groups)}
    engine.destroy()
    assert min(before.values()) == NUMBERS
    assert parameter.numel() == 0 and not optimizer.optimizer.state
    assert [t.numel() for t in optimizer.single_partition_of_fp32_groups] == [0]
    assert not optimizer.bit16_groups_flat and not optimizer.parallel_partitioned_bit16_groups


def test_moments_are_taken_over_where_one_process_holds_all():
    engine = adapter_engine(adapter_config(), torch.zeros(64))
    given = {"exp_avg": torch.full((64,), 0.5), "exp_avg_sq": torch.full((64,), 0.25)}
    engine.set_moments(given, 7)
    assert engine.steps == 7
    for name, values in given.items():
        assert engine.moment(name).data_ptr() == values.data_ptr()


def test_captured_tensors_are_copies():
    engine = adapter_engine(adapter_config())
    train(engine, 0, 2)
    state = engine.capture()
    before = state.master.clone(), state.exp_avg.clone()
    train(engine, 2, 4)
    assert equal_bits(state.master, before[0]) and equal_bits(state.exp_avg, before[1])
    engine.destroy()


def test_engine_does_not_change_the_tensor_it_starts_from():
    start = random(0)
    before = start.clone()
    engine = adapter_engine(adapter_config(), start=start)
    train(engine, 0, 2)
    assert equal_bits(start, before)
    engine.destroy()


def test_leaf_is_the_weights_without_a_copy():
    engine = adapter_engine(adapter_config())
    leaf = engine.leaf()
    assert leaf.is_leaf and leaf.requires_grad
    assert leaf.data_ptr() == engine.weights.data_ptr()
    engine.destroy()


def test_rate_of_zero_moves_no_weight_even_with_decay():
    engine = adapter_engine(adapter_config(), adam=AdamSettings(weight_decay=0.5))
    engine.step(random(5), lr=0.0)
    assert equal_bits(engine.weights, random(0))
    engine.destroy()


# ---- silence ----


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_nontrainable_weights"])
def test_a_quantised_gather_is_refused_without_cuda(key):
    with pytest.raises(ValueError, match=f"{key}=true needs CUDA, .* set quantization=int8 or nf4"):
        BackboneEngine(tiny_llama(), stage=3, config=backbone_config(stage=3, **{key: True}), device=CPU)


def test_quiet_restores_the_loggers_level():
    before = deepspeed_logger.level
    with quiet():
        assert deepspeed_logger.level == logging.ERROR
    assert deepspeed_logger.level == before
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    assert deepspeed_logger.level == before


def test_making_an_engine_prints_nothing(capfd):
    engine = adapter_engine(adapter_config())
    engine.restore(FullState(random(1), random(2), random(3).abs(), 4))
    engine.destroy()
    assert capfd.readouterr() == ("", "")


# ---- the backbone's engine ----


def backbone(stage, dtype, *, checkpointing=False, offload=False, **zero):
    """(engine, loss, gradient) of one grain through adapters with numbers that matter; stage None: no engine."""
    model = tiny_llama(dtype=dtype)
    if checkpointing:
        enable_checkpointing(model, offload=offload, device=CPU)
    sites, ranks = sites_of_model(model)
    adapters = attach(model, sites, dropout={})
    engine = None
    if stage is not None:
        config = backbone_config(stage=stage, dtype=dtype, **zero)
        engine = BackboneEngine(model, stage=stage, config=config, device=CPU)
    layout = ArenaLayout(RankTable.start(sites, ranks), ElaLora(ELALORA).entries)
    leaf = torch.zeros(layout.size)
    for number, block in enumerate(layout.blocks):
        block.of(leaf).normal_(0.0, 0.2, generator=torch.Generator().manual_seed(number))
    leaf.requires_grad_()
    bind_arena(adapters, layout, leaf)
    data = TokenBatches()
    model.train()
    loss = token_loss_sum(model, data.collate((0, 0)), device=CPU)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return engine, loss.detach(), gradient


OFFLOAD = {"offload_param": {"device": "cpu"}}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@dtypes
@pytest.mark.parametrize("zero", [{}, OFFLOAD], ids=["no offload", "offload"])
def test_sharded_backbone_has_the_unsharded_buffers_loss_and_gradient(dtype, zero):
    """deepspeed.md 3, traps 1 and 3."""
    plain, plain_loss, plain_gradient = backbone(0, dtype)
    sharded, loss, gradient = backbone(3, dtype, **zero)
    wanted = dict(tiny_llama(dtype=dtype).named_buffers())
    assert {"inv_freq" in name for name in wanted} == {True}
    for engine in (plain, sharded):
        buffers = dict(engine.module.named_buffers())
        assert buffers.keys() == wanted.keys()
        assert all(equal_bits(buffers[name], wanted[name]) for name in wanted)
        rotary = engine.module.model.rotary_emb
        assert equal_bits(rotary.original_inv_freq, tiny_llama(dtype=dtype).model.rotary_emb.original_inv_freq)
    assert torch.isfinite(loss) and gradient.any()
    assert equal_bits(loss, plain_loss)
    assert equal_bits(gradient, plain_gradient)
    sharded.release()
    assert sharded.gathered_parameters() == 0
    assert {p.ds_tensor.dtype for p in sharded.module.parameters()} == {dtype}
    sharded.destroy()
    plain.destroy()


@dtypes
def test_unsharded_engine_gives_the_loss_of_a_model_without_hooks(dtype):
    """The hook that gives inputs their own node changes no value; sums of gradients only by their order."""
    _, loss, gradient = backbone(0, dtype)
    _, bare_loss, bare_gradient = backbone(None, dtype)
    assert equal_bits(loss, bare_loss)
    size = bare_gradient.abs().max().item()
    torch.testing.assert_close(gradient, bare_gradient, rtol=0, atol=size * (1e-6 if dtype == torch.float32 else 3e-2))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_no_bit(stage, offload):
    engine, loss, gradient = backbone(stage, torch.float32)
    engine.destroy()
    engine, again, again_gradient = backbone(stage, torch.float32, checkpointing=True, offload=offload)
    engine.release()
    assert engine.gathered_parameters() == 0
    engine.destroy()
    assert equal_bits(again, loss)
    assert equal_bits(again_gradient, gradient)


def test_offload_takes_what_checkpointing_keeps_the_layers_inputs(monkeypatch):
    """On a CPU nothing moves: what the hooks would move, and what autograd keeps beside it, is counted."""
    moved, kept, entered = [], [], []

    class Recorded(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert not pin_memory, "there is no GPU"
            super().__init__(lambda tensor: moved.append(tensor) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorded)
    model = tiny_llama(layers=3)
    enable_checkpointing(model.train(), offload=True, device=CPU)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    embedded = model.model.embed_tokens(torch.arange(4, 20).view(2, 8)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(inputs_embeds=embedded).logits.sum()
    assert len(moved) == len(entered) == 3
    assert all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(moved, entered, strict=True))
    layers = {id(p) for p in model.model.layers.parameters()}
    assert not any(id(t) in layers for t in kept) and len(kept) < 10, "the last norm's and the output embedding's alone"
    (gradient,) = torch.autograd.grad(loss, embedded)
    (wanted,) = torch.autograd.grad(tiny_llama(layers=3)(inputs_embeds=embedded).logits.sum(), embedded)
    assert equal_bits(gradient, wanted)


def test_without_release_the_first_layer_stays_gathered():
    """The trap that `release` is there for; if this fails, DeepSpeed has changed and `release` may go."""
    engine, _, _ = backbone(3, torch.float32)
    assert engine.gathered_parameters() > 0
    engine.release()
    assert engine.gathered_parameters() == 0
    engine.destroy()


def test_trained_base_is_refused():
    model = tiny_llama().requires_grad_()
    with pytest.raises(AssertionError, match="the backbone is frozen"):
        BackboneEngine(model, stage=0, config={}, device=CPU)


# ---- what starts need ----


def test_only_stale_locks_are_removed(tmp_path):
    old, fresh = tmp_path / "async_io" / "lock", tmp_path / "cpu_adam" / "lock"
    for path in (old, fresh):
        path.parent.mkdir()
        path.touch()
    past = time.time() - 2 * STALE_LOCK_SECONDS
    os.utime(old, (past, past))
    assert remove_stale_locks(tmp_path) == [old]
    assert not old.exists() and fresh.exists()
    old.mkdir()  # what cannot be unlinked
    os.utime(old, (past, past))
    with pytest.raises(ValueError, match="left by a compile that was killed, cannot be removed .*TORCH_EXTENSIONS_DIR"):
        remove_stale_locks(tmp_path)


def test_cpu_adam_follows_torchs_adamw(world):
    """DeepSpeed's own kernel: close to torch's, and its state goes through capture and restore to the bit."""
    config = adapter_config(offload=True)
    del config["zero_force_ds_cpu_optimizer"]  # as deepspeed_config writes it for this kernel
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1000, generator=generator)
    gradients = [torch.randn(1000, generator=generator) for _ in range(4)]
    weights = {}
    for kernel, settings in (("torch", adapter_config(offload=True)), ("cpu_adam", config)):
        engine = AdapterEngine(first.clone(), config=settings, adam=AdamSettings(kernel=kernel), device=world.device)
        for gradient in gradients[:3]:
            engine.step(gradient, lr=1e-2)
        state = engine.capture()
        other = AdapterEngine(state.master, config=settings, adam=AdamSettings(kernel=kernel), device=world.device)
        other.restore(state)
        for each in (engine, other):
            each.step(gradients[3], lr=1e-2)
        assert equal_bits(engine.weights, other.weights), kernel
        weights[kernel] = engine.weights.clone()
        engine.destroy()
        other.destroy()
    torch.testing.assert_close(weights["cpu_adam"], weights["torch"], rtol=1e-5, atol=1e-6)


GATHER = "_PartitionedParameterCoordinator__all_gather_params"


def gathers(checkpointing, **zero):
    """(which layers are leaves of ZeRO-3, how often the weights of the first were gathered in one grain)."""
    counts, gather = Counter(), getattr(PartitionedParameterCoordinator, GATHER)

    def counted(self, parameters, forward):
        counts.update(p.ds_id for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        return gather(self, parameters, forward)

    with mock.patch.object(PartitionedParameterCoordinator, GATHER, counted):
        engine, *_ = backbone(3, torch.float32, checkpointing=checkpointing, **zero)
    layers = engine.module.model.layers
    out = [z3_leaf_module(layer) for layer in layers], {counts[p.ds_id] for p in layers[0].parameters()}
    engine.destroy()
    return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_is_gathered_whole_once_for_its_forward_and_once_for_its_backward(checkpointing):
    """Also where the layer runs again before its backward: the hooks stand around both runs."""
    leaves, times = gathers(checkpointing, stage3_max_reuse_distance=0)
    assert leaves == [True, True]
    assert times == {2}


class CheckpointedFromOutside(torch.nn.Module):
    """A model that checkpoints its layers itself, by their `__call__`."""

    _no_split_modules = ("Linear",)
    gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))


def test_layers_that_their_model_checkpoints_from_outside_are_gathered_by_module():
    model = CheckpointedFromOutside()
    assert gathered_whole(model) == []
    model.gradient_checkpointing = False
    assert gathered_whole(model) == list(model.layers)
    assert gathered_whole(tiny_llama().get_output_embeddings()) == []  # says of nothing that it is never split
