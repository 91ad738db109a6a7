"""`ardtrain plan`: bytes counted by hand, what grows and what shrinks, what does not fit, errors, the JSON's names."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from ardtrain.cli import main
from ardtrain.config import ConfigError, RunConfig, with_batch
from ardtrain.deepspeed_config import split_deepspeed
from ardtrain.dense import attach_dense
from ardtrain.gather_sizes import WeightSizes
from ardtrain.observe import RunLog
from ardtrain.planning.advice import suggestions
from ardtrain.planning.gathering import GatherSettings, play
from ardtrain.planning.hardware import CONSTANTS, GPUS, Machine, constant, find_gpu, gpu_of_device, machine_of
from ardtrain.planning.memory import Placement, memory, power_of_two
from ardtrain.planning.plan import make_plan, to_json
from ardtrain.planning.seconds import grain_flops
from ardtrain.planning.shapes import Hooks, Unit, read_shapes
from ardtrain.planning.text import render
from ardtrain.records import Records
from ardtrain.trainer import StepResult
from ardtrain.utilisation import matmul_numbers, utilisation
from tests.runs import lines
from tests.tiny_paligemma import IMAGE_ID, IMAGE_SIZE, NUM_IMAGE_TOKENS, save_tiny_paligemma, tiny_paligemma

REPOSITORY = Path(__file__).resolve().parents[2]
H100, CPU = GPUS["h100"], GPUS["cpu"]
HIDDEN, MLP, LAYERS, VOCAB, HEADS, KV = 32, 64, 3, 128, 4, 2
R = 4
# q, o: 32 x 32; k, v: 32 x 16 (two of four heads); gate, up: 32 x 64; down: 64 x 32
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
NORMS = 2 * 32  # of a layer
BASE = 2 * VOCAB * HIDDEN + LAYERS * (LAYER + NORMS) + HIDDEN
ADAPTER = LAYERS * R * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
ELALORA = {"method": "elalora", "elalora": {"init_warmup": 10, "final_warmup": 20, "mask_interval": 10, "b": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.json alone: no weights, no tokenizer, no data."""
    path = tmp_path_factory.mktemp("tiny")
    LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, tie_word_embeddings=False,
    ).save_pretrained(path)  # fmt: skip
    return path


def config_of(folder, world_size=1, **changes):
    """A resolved config of the tiny Llama."""
    values = {
        "model_name_or_path": str(folder), "method": "lora", "r": R, "data": {"train_file": "none.jsonl"},
        "output_dir": "runs/none", "max_steps": 100, "max_length": 16, "global_batch_size": 8, **changes,
    }  # fmt: skip
    return with_batch(RunConfig.model_validate(values), world_size)


def card(num_bytes):
    """An H100 with so little memory beside its context."""
    return replace(H100, memory_bytes=int(constant("context_bytes")) + num_bytes)


def zero3(**more):
    return {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **more}}


def planned(folder, machine=None, **changes):
    machine = machine or Machine(CPU, 1, 1)
    return make_plan(config_of(folder, machine.world_size, **changes), machine)


def test_counts_by_hand(folder):
    plan = planned(folder)
    assert plan.shapes.shape.num_base == BASE
    assert plan.shapes.num_trained == plan.shapes.arena_size == ADAPTER  # every block is a whole number of 128 bytes
    assert plan.shapes.matmul_numbers == LAYERS * LAYER + VOCAB * HIDDEN
    device = plan.memory.device["forward"]
    assert device["frozen base"] == 4 * BASE
    assert device["arena weights"] == device["master weights"] == 4 * ADAPTER
    assert device["Adam's moments"] == device["exact sum (int64)"] == 8 * ADAPTER
    assert "method's averages" not in device
    assert plan.checkpoint_bytes == 16 * ADAPTER + 16 * R * 7 * LAYERS


def test_activations_by_hand(folder, monkeypatch):
    """What autograd keeps of T tokens in float32, layer by layer, at the loss's backward."""
    # An earlier test's zero.Init leaves its own linear in this process, which keeps the output embedding's input too.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    tokens, r = 20, 12  # so that no other tensor has an adapter's size
    layer = 2 * HIDDEN + 2  # inputs of the two norms, and their 1 / rms
    layer += 2 * HIDDEN  # the norms' results: what q, k, v and gate, up see
    layer += HIDDEN + 2 * 16 + HIDDEN + HEADS  # attention: q, k, v, its output and one number a head
    layer += 4 * MLP  # gate, silu(gate), up, their product
    ranks = 7 * r  # u = s A x of each matrix
    plan = planned(folder, r=r, loss_chunk_tokens=None)
    traced = plan.shapes.grain_bytes(rows=1, length=tokens)["forward"]
    assert traced["adapter activations"] == 4 * tokens * ranks * LAYERS
    # Outside the layers: the embedding's result is the first norm's input; the last norm's input and 1 / rms; rotary
    # tables and positions, a few tensors of head width 8.
    outside = traced["activations"] - 4 * tokens * layer * LAYERS
    assert 4 * tokens * (HIDDEN + 1) <= outside <= 4 * tokens * (3 * HIDDEN + 4 * 8)
    # log-probabilities that the loss keeps and their gradient, the logits and a copy.
    assert 3 * 4 * (tokens - 1) * VOCAB <= traced["logits and loss"] <= 5 * 4 * tokens * VOCAB


def test_chunked_loss_holds_a_chunk_of_logits(folder):
    whole, chunked = (
        planned(folder, loss_chunk_tokens=c, max_length=512).shapes.grain_bytes(rows=1, length=512)["forward"]
        for c in (None, 32)
    )
    assert chunked["logits and loss"] <= whole["logits and loss"] / 8
    assert chunked.total() < whole.total()


def test_checkpointing_keeps_the_inputs_of_layers(folder):
    whole, kept = planned(folder), planned(folder, gradient_checkpointing=True)
    size = [p.shapes.grain_bytes(rows=1, length=16)["forward"]["activations"] for p in (whole, kept)]
    assert size[1] < size[0] / 2
    assert size[1] >= 4 * 16 * HIDDEN * LAYERS


def test_offloaded_activations_wait_on_the_host(folder):
    kept = planned(folder, gradient_checkpointing=True, max_length=128)
    plan = planned(folder, gradient_checkpointing=True, activation_offload=True, max_length=128)
    waiting = 4 * 128 * HIDDEN * LAYERS
    assert plan.memory.host["activations of layers"] == waiting
    sizes = [p.memory.device["backward"]["activations"] for p in (kept, plan)]
    assert sizes[0] - sizes[1] == waiting


def test_traces_are_linear_in_rows(folder):
    """So the largest grain is found by the line through 2 and 3 rows; one row has no padding and no mask."""
    shapes = read_shapes(config_of(folder))
    direct = read_shapes(config_of(folder)).traced(rows=7, length=16)
    line = shapes.grain_bytes(rows=7, length=16)
    for phase in direct:
        assert line[phase].total() == pytest.approx(direct[phase].total(), rel=0.01)


def test_shards_by_hand(folder):
    machine = Machine(H100, 1, 4)
    plan = planned(folder, machine, bf16=True, deepspeed=zero3(), **ELALORA)
    device = plan.memory.device["forward"]
    assert device["frozen shard"] == 2 * BASE / 4
    numbers = plan.shapes.arena_size
    assert device["method's averages"] == 2 * 4 * numbers / 4
    assert device["Adam's moments"] == 8 * numbers / 4
    assert device["arena weights"] == 4 * numbers


def test_offload_moves_bytes_to_the_host(folder):
    machine = Machine(H100, 1, 2)
    offload = zero3(offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})
    plan = planned(folder, machine, bf16=True, deepspeed=offload)
    assert "frozen shard" not in plan.memory.device["forward"]
    assert plan.memory.host["frozen shard"] == 2 * BASE / 2
    assert plan.memory.host["Adam's moments"] == 8 * ADAPTER / 2
    shards = [size // 2 for _, _, size in plan.shapes.weights]
    rounding = sum(power_of_two(s) - s for s in shards)
    assert plan.memory.host.get("pinned memory's rounding", 0) == rounding
    unpinned = zero3(offload_param={"device": "cpu", "pin_memory": False})
    assert "pinned memory's rounding" not in planned(folder, machine, deepspeed=unpinned).memory.host


def test_nvme_takes_the_shard_and_the_host_its_buffers(folder):
    block = {"device": "nvme", "nvme_path": "nvme", "buffer_count": "auto", "buffer_size": "auto"}
    plan = planned(folder, Machine(H100, 1, 2), bf16=True, deepspeed=zero3(offload_param=block))
    assert plan.memory.nvme == {"frozen shard": BASE}
    largest = VOCAB * HIDDEN // 2
    assert plan.memory.host["NVMe buffers"] == 2 * largest * (2 * 9 + 2)  # a layer has seven matrices and two norms


def test_quantised_base_by_hand(folder):
    int8, nf4 = (planned(folder, bf16=True, quantization=f) for f in ("int8", "nf4"))
    rest = 2 * (2 * VOCAB * HIDDEN + LAYERS * NORMS + HIDDEN)
    rows = 2 * 32 + 2 * 16 + 2 * 64 + 32  # outputs of a layer's matrices, a scale each
    assert int8.memory.device["forward"]["frozen base"] == rest + LAYERS * (LAYER + 4 * rows)
    assert nf4.memory.device["forward"]["frozen base"] == rest + LAYERS * LAYER // 64 * 36


@pytest.mark.parametrize("method", ["dora", "ard_lora", "adalora", "alora", "probe_lora", "full"])
def test_every_method_is_planned(folder, method):
    changes = {"method": method}
    if method == "adalora":
        changes["adalora"] = {"target_r": 2, "tinit": 10, "tfinal": 10}
    if method == "probe_lora":
        changes["probe_lora"] = {"init_warmup": 10, "final_warmup": 10, "mask_interval": 20}
    if method == "alora":
        changes["data"] = {"train_file": "none.jsonl", "eval_file": "none.jsonl"}
    if method == "full":
        del changes["method"]
        plan = planned_full(folder)
        assert plan.memory.device["step"]["Adam's moments"] == 8 * BASE / 2
        assert plan.checkpoint_bytes == 14 * BASE
    else:
        plan = planned(folder, Machine(H100, 1, 2), bf16=True, deepspeed=zero3(), **changes)
    assert plan.fits
    assert plan.seconds.hours > 0
    assert plan.largest_rows > 100


def test_a_run_that_grows_is_planned_at_its_end(folder):
    block = {"init_warmup": 10, "final_warmup": 10, "mask_interval": 20}
    small, large, grown = (
        planned(folder, method="probe_lora", bf16=True, r=r, lora_alpha=8.0, probe_lora=block | own)
        for r, own in ((2, {}), (6, {}), (2, {"target_r": 6.0, "b": 0}))
    )
    weights = [plan.memory.device["step"]["arena weights"] for plan in (small, large, grown)]
    assert weights[0] < weights[1] == weights[2]


def planned_full(folder):
    values = {
        "model_name_or_path": str(folder), "method": "full", "data": {"train_file": "none.jsonl"}, "max_length": 16,
        "output_dir": "runs/none", "max_steps": 100, "global_batch_size": 8, "bf16": True, "deepspeed": zero3(),
    }  # fmt: skip
    return make_plan(with_batch(RunConfig.model_validate(values), 2), Machine(H100, 1, 2))


def test_more_gpus_never_take_more(folder):
    shapes = read_shapes(config_of(folder, bf16=True, deepspeed=zero3()))
    sizes = []
    for gpus in (2, 4, 8, 16, 64):
        config = config_of(folder, gpus, bf16=True, deepspeed=zero3())
        sizes.append(make_plan(config, machine_of("h100", gpus=gpus, nodes=None), shapes=shapes).memory.device_bytes)
    assert sizes == sorted(sizes, reverse=True)


def test_gathering_by_hand():
    """Four layers of 100 numbers of 2 bytes, each weight by itself; nothing ahead, nothing kept."""
    units = [Unit(((i, 100, 200),), layer=i) for i in range(4)]
    bare = GatherSettings(0, 10**9, 0, 0)
    found = play(units, bare, recompute=False)
    assert (found.forward_bytes, found.backward_bytes, found.passes) == (200, 200, 2.0)
    assert play(units, bare, recompute=True).passes == 3.0
    ahead = play(units, GatherSettings(100, 10**9, 0, 0), recompute=False)
    assert ahead.forward_bytes == 400  # one layer ahead
    kept = play(units, GatherSettings(0, 10**9, 10**9, 0), recompute=False)
    assert kept.passes == 1.0 and kept.backward_bytes == 800  # all stay from their forward to their backward
    once = play(units, GatherSettings(0, 10**9, 10**9, 0), recompute=False, forward_first=True)
    assert (once.forward_bytes, once.passes) == (200, 2.0)  # released as in the forward alone that was seen first
    front = [replace(unit, runs_back=unit.layer > 1) for unit in units]
    assert play(front, bare, recompute=True).passes == (2 * 1 + 2 * 3) / 4  # nothing runs back to two of them
    together = play(units, GatherSettings(400, 10**9, 0, 0), recompute=False)
    assert together.forward_bytes == 1600  # what holds the first layer fetches all of them in one buffer
    small = play(units, GatherSettings(0, 10**9, 0, 100), recompute=False)
    assert (small.forward_bytes, small.passes) == (0, 0.0)  # whole for good


def test_gathers_and_activations_are_not_highest_together(folder):
    """Gathers are highest while layers run, activations at the loss: the forward counts the higher moment, not both."""
    shapes = read_shapes(config_of(folder, deepspeed=zero3()))
    found = play(shapes.forward_units(), GatherSettings(param_persistence_threshold=0), recompute=False)
    assert 0 < found.loss_bytes <= found.forward_bytes
    traced = shapes.grain_bytes(rows=1, length=16)
    assert not traced["layers"]["logits and loss"]
    assert 0 < traced["layers"]["activations"] < traced["forward"]["activations"]
    for length in (16, 512):  # at few tokens the gathers decide, at many the logits
        made = memory(shapes, Machine(CPU, 1, 2), Placement(3, "device", "device", {}), rows=1, length=length)
        forward = made.device["forward"]
        traced = shapes.grain_bytes(rows=1, length=length)
        moments = [
            sum(traced["forward"].values()) + made.gathered.loss_bytes,
            sum(traced["layers"].values()) + made.gathered.forward_bytes,
        ]
        kinds = ("activations", "adapter activations", "logits and loss", "gathered layers")
        assert sum(forward.get(kind, 0) for kind in kinds) == max(moments)


def test_hooks_by_hand(folder):
    """A layer: itself, attention with 4 linears, feed-forward with 3 and its activation, 2 norms; 6 modules around.

    The embedding stands before everything trained, so nothing runs back to it; nor to the output embedding, whose
    gradient the loss in chunks takes in the forward.
    """
    shapes = planned(folder).shapes
    assert shapes.hooks() == Hooks(2 * (LAYERS + 6) - 2, 2 * (9 * LAYERS + 3) - 2)
    assert shapes.hooks(by_module=True) == Hooks(2 * (13 * LAYERS + 6) - 2, 2 * (9 * LAYERS + 3) - 2)
    whole = planned(folder, loss_chunk_tokens=None).shapes
    assert whole.hooks() == Hooks(2 * (LAYERS + 6) - 1, 2 * (9 * LAYERS + 3) - 1)
    again = planned(folder, gradient_checkpointing=True).shapes
    assert again.hooks() == shapes.hooks()  # around both runs of a layer
    by_module = again.hooks(by_module=True)
    assert by_module == Hooks(2 * (13 * LAYERS + 6) - 2 + 12 * LAYERS, 2 * (9 * LAYERS + 3) - 2 + 9 * LAYERS)


def test_nothing_runs_back_to_a_vision_tower_without_adapters(tmp_path):
    """As counted in steps of this model (fetch_sub_module): 170 weights and 221, and one for the output embedding."""
    save_tiny_paligemma(tmp_path, layers=5, vision_layers=3, pooling_head=False)
    both = {"task": "image_text_to_text", "loss_chunk_tokens": None, "deepspeed": zero3()}
    language = {**both, "target_modules": r".*language_model.*_proj"}
    towers, one = (read_shapes(config_of(tmp_path, **own)) for own in (both, language))
    assert towers.hooks(by_module=True).weights == 221
    assert (one.hooks().weights, one.hooks(by_module=True).weights) == (170, 170)


def test_checkpointed_layers_are_gathered_twice_a_grain(folder):
    """For the forward, and for the second run with the backward; module by module a layer is gathered three times.

    The embeddings are gathered once: nothing runs back to them.
    """
    bare = zero3(stage3_prefetch_bucket_size=0, stage3_max_reuse_distance=0)
    plan = planned(folder, Machine(CPU, 1, 2), deepspeed=bare, gradient_checkpointing=True)
    assert plan.memory.gathered.passes == pytest.approx(2.0 - 2 * VOCAB * HIDDEN / BASE)
    by_module = play(replace(plan.shapes, layout=None).forward_units(), plan.place.gathers, recompute=True)
    layers = LAYERS * (LAYER + NORMS)
    assert by_module.passes == pytest.approx((3 * layers + 2 * (BASE - layers)) / BASE)


def test_hooks_take_the_hosts_time_beside_the_products(folder):
    sharded = planned(folder, Machine(H100, 1, 1), bf16=True, deepspeed=zero3()).seconds
    whole = planned(folder, Machine(H100, 1, 1), bf16=True).seconds
    hooks = sharded.step["ZeRO-3's hooks on the host"]
    on_cpu = 16 * constant("hook_call") + 58 * constant("hook_weight")
    assert hooks == pytest.approx(8 * on_cpu * constant("hook_factor"))
    assert sharded.step_seconds == pytest.approx(whole.step_seconds + hooks)
    assert sharded.overlapped_step < sharded.step_seconds  # products run meanwhile


def test_a_gather_of_several_weights_holds_them_twice():
    units = [Unit(((0, 100, 200), (1, 100, 200)))]
    assert play(units, GatherSettings(0, 10**9, 0, 0), recompute=False).forward_bytes == 800
    assert play(units, GatherSettings(0, 10**9, 0, 0), recompute=False, copies=False).forward_bytes == 400


def test_operations_by_hand(folder):
    plan = planned(folder)
    tokens, n = 16, LAYERS * LAYER + VOCAB * HIDDEN
    flops = grain_flops(plan.shapes, rows=1, length=tokens)
    assert flops["products with the base"] == 4 * n * tokens
    assert flops["attention"] == 3.5 * 4 * tokens**2 * HIDDEN * LAYERS / 2
    assert flops["adapters"] == 6 * ADAPTER * tokens
    assert flops["recomputation"] == 0
    again = grain_flops(planned(folder, gradient_checkpointing=True).shapes, rows=1, length=tokens)
    assert again["recomputation"] == 2 * n * tokens + 4 * tokens**2 * HIDDEN * LAYERS / 2


def test_products_of_a_paligemma_are_those_that_torch_counts():
    """A row of nothing but a picture, so that each token passes both towers. Attention is a product of its own."""
    model = tiny_paligemma(pooling_head=False)
    ids = torch.full((1, NUM_IMAGE_TOKENS), IMAGE_ID)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            input_ids=ids, pixel_values=torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), token_type_ids=torch.zeros_like(ids)
        )
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted[op] for op in counted if op in (torch.ops.aten.addmm, torch.ops.aten.mm))
    patches = counted[torch.ops.aten.convolution]
    assert patches > 0
    assert products + patches == 2 * matmul_numbers(model) * NUM_IMAGE_TOKENS
    before = matmul_numbers(model)
    attach_dense(model, ["model.vision_tower.embeddings.patch_embedding"])  # trained in full
    assert matmul_numbers(model) == before


def test_throughput_and_mfu_agree(folder):
    s = planned(folder, Machine(H100, 1, 2), bf16=True, deepspeed=zero3()).seconds
    assert s.tokens == 8 * 16
    assert s.tokens_per_second(s.step_seconds) * s.step_seconds * 2 == pytest.approx(s.tokens)
    assert s.overlapped_step <= s.step_seconds
    rate = 4 * (LAYERS * LAYER + VOCAB * HIDDEN) * s.tokens_per_second(2.0)
    assert s.mfu(2.0) == pytest.approx(rate / 989e12)


def test_a_run_logs_utilisation_by_the_plans_formula(folder, tmp_path):
    plan = planned(folder, Machine(H100, 1, 2), bf16=True, deepspeed=zero3())
    s = plan.seconds
    known = utilisation(plan.shapes.model, gpu="NVIDIA H100 80GB HBM3", world_size=2)
    assert known(2 * s.tokens_per_second(2.0)) == s.mfu(2.0)
    assert utilisation(plan.shapes.model, gpu="NVIDIA GeForce RTX 4090", world_size=2) is None
    names = {
        "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA L40S": "l40s", "NVIDIA A100-PCIE-40GB": "a100-40", "NVIDIA B200": "b200",
    }  # fmt: skip
    assert {name: gpu_of_device(name).name for name in names} == names
    assert gpu_of_device("NVIDIA H100 NVL") is gpu_of_device("NVIDIA GB200") is gpu_of_device("AMD MI300X") is None
    clock = SimpleNamespace(
        report=lambda: {"tokens_per_second": 100.0}, fraction=lambda name: 0.0, count_tokens=lambda count: None
    )
    trainer = SimpleNamespace(
        clock=clock,
        arena=None,
        settings=SimpleNamespace(total_steps=1),
        world=SimpleNamespace(device=torch.device("cpu")),
    )
    with RunLog(tmp_path, is_main=True, num_steps=1, show_bar=False) as log:
        records = Records(tmp_path, log, trainer, SimpleNamespace(logging_steps=1), utilisation=known)
        records.step(StepResult(0, 1.0, 0.0, 1.0, 0.1, 8, 8, False))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["mfu_4n"] == known(100.0) and line["tokens_per_second"] == 100.0


def test_what_does_not_fit_is_told_what_to_change(folder):
    """A card of 8 MiB beside what is planned for nothing else: each change is planned again."""
    small = Machine(card(2**23), 1, 1)
    plan = planned(folder, small, per_device_train_batch_size=8, max_length=512, bf16=True)
    assert not plan.fits and plan.largest_rows is not None
    advice = suggestions(plan)
    assert advice and advice[-1].fits
    assert [s.fits for s in advice[:-1]] == [False] * (len(advice) - 1)
    assert all(s.frees_device_bytes > 0 for s in advice)
    assert "gradient_checkpointing=true" in [s.change for s in advice]
    text = render(plan, advice)
    assert "DOES NOT FIT" in text and advice[0].change in text


def test_the_largest_grain_fits_and_one_more_does_not(folder):
    small = Machine(card(2**25), 1, 1)
    plan = planned(folder, small, bf16=True, max_length=128)
    assert 1 <= plan.largest_rows < 4096
    at = planned(folder, small, bf16=True, max_length=128, per_device_train_batch_size=plan.largest_rows,
                 global_batch_size=plan.largest_rows)  # fmt: skip
    over = planned(folder, small, bf16=True, max_length=128, per_device_train_batch_size=plan.largest_rows + 1,
                   global_batch_size=plan.largest_rows + 1)  # fmt: skip
    assert at.fits_device and not over.fits_device


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match="--gpu h1000 is unknown; did you mean h100"):
        find_gpu("h1000")
    with pytest.raises(ConfigError, match="--gpus 9 is the number of all GPUs and does not divide over --nodes 2"):
        machine_of("h100", gpus=9, nodes=2)
    with pytest.raises(ConfigError, match="--gpus 0 must be 1 or more; correct it"):
        machine_of("h100", gpus=0, nodes=None)


def test_gpus_are_counted_over_all_nodes():
    assert machine_of("h100", gpus=16, nodes=None) == Machine(H100, 2, 8)
    assert machine_of("h100", gpus=None, nodes=2).world_size == 16
    assert machine_of("h100", gpus=1, nodes=None) == Machine(H100, 1, 1)


def test_every_constant_has_a_source():
    for gpu in GPUS.values():
        assert "datasheet" in gpu.source or gpu.name == "cpu"
    for c in CONSTANTS.values():
        assert c.source and c.value > 0
    for name, key in (("resize", "resize_seconds"), ("save", "stall_seconds")):
        file = re.search(r"benchmarks/results/\w+\.json", CONSTANTS[f"{name}_seconds"].source)[0]
        result = json.loads((REPOSITORY / file).read_text())
        assert constant(f"{name}_seconds") == pytest.approx(result[key]["median"], rel=1e-3)
        assert constant(f"{name}_numbers") == result["trained_numbers"]
    hooks = json.loads((REPOSITORY / "benchmarks" / "results" / "zero_hooks.json").read_text())["hooks"]
    assert constant("hook_call") == pytest.approx(hooks["seconds_a_call"], rel=1e-3)
    assert constant("hook_weight") == pytest.approx(hooks["seconds_a_weight"], rel=1e-3)


KEYS = {  # of the JSON, schema version 1
    "schema_version", "config", "machine", "model", "placement", "memory", "largest_rows", "largest_grain", "seconds",
    "checkpoint_bytes", "fits", "suggestions",
}  # fmt: skip


def test_json_keeps_its_names(folder):
    plan = planned(folder, Machine(H100, 1, 2), bf16=True, deepspeed=zero3(), **ELALORA)
    made = json.loads(json.dumps(to_json(plan, [])))
    assert made["schema_version"] == 1 and set(made) == KEYS
    assert set(made["memory"]) == {
        "device", "device_peak_phase", "device_peak_bytes", "host", "host_bytes", "host_node_bytes",
        "host_node_start_bytes", "nvme", "nvme_bytes", "gathers_per_grain",
    }  # fmt: skip
    assert set(made["seconds"]) == {
        "step", "step_seconds", "step_seconds_overlapped", "resize", "resizes", "save", "run", "hours",
        "tokens_per_step", "tokens_per_second_per_gpu", "tokens_per_second_per_gpu_overlapped", "mfu_4n",
        "mfu_4n_overlapped",
    }  # fmt: skip
    assert made["seconds"]["resizes"] > 0
    assert set(made["memory"]["device"]) == {"forward", "backward", "gradient", "step", "resize"}


def test_command_line(folder, tmp_path, capsys):
    """No weights, tokenizer, data or GPU; the exit code says whether it fits."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {folder}\nmethod: lora\noutput_dir: {tmp_path}/run\ndata: {{train_file: none.jsonl}}\n"
        "max_steps: 5\nmax_length: 32\nglobal_batch_size: 4\nbf16: true\n"
    )
    assert main(["plan", str(path), "--gpus", "2", "r=2"]) == 0
    text = capsys.readouterr().out
    assert "2 x h100 on 1 node(s)" in text and "device: fits" in text
    assert all(len(line) <= 250 for line in text.splitlines())
    assert main(["plan", str(path), "--json", "--gpu", "a100-40", "--gpus", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["gpus"] == 4
    assert main(["plan", str(path), "--host-gib", "1", "--gpus", "1"]) == 1
    assert "host: DOES NOT FIT" in capsys.readouterr().out
    assert main(["plan", str(path), "--gpu", "h1oo"]) == 2
    assert "did you mean h100" in capsys.readouterr().err
    assert main(["plan", "--constants"]) == 0
    assert "peers.md 3C" in capsys.readouterr().out


def test_planning_touches_no_engine():
    """It must run where DeepSpeed's accelerator does not exist."""
    code = "import sys, ardtrain.planning; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


SIZES = WeightSizes(largest=4096, vector=32, layer=9280, in_layer=9)


def test_auto_is_chosen_by_shapes_and_told(folder):
    block = {"device": "nvme", "nvme_path": "nvme", "pin_memory": "auto", "buffer_size": "auto", "buffer_count": "auto",
             "max_in_cpu": "auto"}  # fmt: skip
    names = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
    zero = {"stage": 3, "offload_param": block, **{f"stage3_{name}": "auto" for name in names}}
    config = config_of(folder, deepspeed={"zero_optimization": zero})
    plan = split_deepspeed(config, world_size=3, sizes=SIZES)
    made = plan.backbone["zero_optimization"]
    assert made["stage3_prefetch_bucket_size"] == 9280
    assert made["stage3_max_live_parameters"] == 2 * 9280 + 4096
    assert made["stage3_max_reuse_distance"] == 2 * 9280
    assert made["stage3_param_persistence_threshold"] == 32
    assert made["offload_param"] == {
        "device": "nvme", "nvme_path": "nvme", "pin_memory": True, "buffer_size": 1366, "buffer_count": 20,
        "max_in_cpu": 1_000_000_000,
    }  # fmt: skip
    assert len([n for n in plan.notes if "auto is" in n]) == 8
    assert "deepspeed.zero_optimization.stage3_prefetch_bucket_size: auto is 9,280 (" in "\n".join(plan.notes)


def test_sizes_of_the_tiny_llama(folder):
    assert read_shapes(config_of(folder)).shape.sizes == WeightSizes(VOCAB * HIDDEN, HIDDEN, LAYER + NORMS, 9)


def test_shapes_are_on_no_device(folder):
    assert all(p.device == torch.device("meta") for p in read_shapes(config_of(folder)).model.parameters())
