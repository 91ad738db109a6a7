"""The frozen base in 8 and 4 bit: the codes, the linear, and the base's engine around it."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ardtrain.adapters import AdapterLinear, DoraLinear, attach, bind_arena, frozen_weight
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import ModelSource, meta_model, quantize_base
from ardtrain.engines import BackboneEngine
from ardtrain.evaluation import token_loss_sum
from ardtrain.methods.dora import Dora
from ardtrain.methods.elalora import ElaLora
from ardtrain.quantized import (
    BLOCK,
    CHUNK,
    FORMATS,
    NF4_VALUES,
    Packing,
    QuantizedLinear,
    dequantize_int8,
    dequantize_modules,
    dequantize_nf4,
    packing_of,
    quantize_int8,
    quantize_modules,
    quantize_nf4,
)
from ardtrain.ranks import RankTable
from ardtrain.targets import base_linears
from tests.tiny import CPU, ELALORA, TokenBatches, backbone_config, equal_bits, sites_of_model, tiny_llama

formats = pytest.mark.parametrize("format", FORMATS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- int8 ----


def test_int8_by_hand():
    """Scales 127/127 = 1 and 2/127; ties to even; a row of zeros; -128 is not used."""
    rows = torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5], [2.0, -1.0, 0.0, 1.0, 0.004], [0.0] * 5])
    codes, scales = quantize_int8(rows)
    assert codes.tolist() == [[127, -127, 0, 2, -2], [127, -64, 0, 64, 0], [0] * 5]
    assert codes.dtype == torch.int8
    assert scales.tolist() == [1.0, float(np.float32(2.0) / np.float32(127.0)), 0.0]
    assert dequantize_int8(codes, scales, torch.float32)[0].tolist() == [127.0, -127.0, 0.0, 2.0, -2.0]


@dtypes
def test_int8_is_the_numpy_transcription(dtype):
    rows = random(37, 91, dtype=dtype)
    values = rows.float().numpy()
    scales = np.abs(values).max(axis=1) / np.float32(127)
    codes = np.clip(np.rint(values / scales[:, None]), -127, 127).astype(np.int8)
    ours, own_scales = quantize_int8(rows)
    assert np.array_equal(ours.numpy(), codes) and np.array_equal(own_scales.numpy(), scales)
    back = torch.from_numpy(codes * scales[:, None]).to(dtype)
    assert equal_bits(dequantize_int8(ours, own_scales, dtype), back)


def test_int8_error_is_half_a_scale():
    rows = random(64, 512)
    codes, scales = quantize_int8(rows)
    error = (dequantize_int8(codes, scales, torch.float32) - rows).abs()
    assert bool((error <= scales[:, None] * (0.5 + 1e-5)).all())
    assert float((error / scales[:, None]).max()) > 0.49  # the bound is reached: codes use the whole range


# ---- nf4 ----


def test_codebook_is_the_papers_formula():
    """arXiv 2305.14314, appendix E: quantiles of a normal, 8 below and 9 above with 0 shared, scaled to [-1, 1]."""
    offset = 0.9677083
    below, above = norm.ppf(np.linspace(offset, 0.5, 8)[:-1]), norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    values = np.sort(np.concatenate([-below, [0.0], above]))
    np.testing.assert_allclose(NF4_VALUES, values / values.max(), atol=3e-7)


def test_nf4_by_hand():
    """The largest is the scale; 0.12 lies nearer to 0.0796 than to 0.1609 (border 0.12026), 0.1203 does not."""
    values = torch.zeros(BLOCK)
    values[:6] = torch.tensor([-4.0, 4.0, 0.48, 0.4812, -2.0, 1e-3])
    codes, scales = quantize_nf4(values)
    assert scales.tolist() == [4.0]
    first = [0, 15, 8, 9, 2, 7]  # -0.5 is nearer to -0.525 (2) than to -0.395 (3)
    assert codes[0, :3].tolist() == [first[0] << 4 | first[1], first[2] << 4 | first[3], first[4] << 4 | first[5]]
    assert set(codes[0, 3:].tolist()) == {7 << 4 | 7}
    back = dequantize_nf4(codes, scales, torch.float32)[0]
    assert back[:6].tolist() == [4.0 * NF4_VALUES[code] for code in first]
    assert not back[6:].any()


@dtypes
def test_nf4_is_the_numpy_transcription(dtype):
    values = random(9 * BLOCK + 11, dtype=dtype)  # a short last block
    blocks = np.concatenate([values.float().numpy(), np.zeros(BLOCK - 11, np.float32)]).reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1)
    table = np.array(NF4_VALUES, dtype=np.float32)
    nearest = np.abs((blocks / scales[:, None])[..., None].astype(np.float64) - table.astype(np.float64)).argmin(axis=2)
    codes, own_scales = quantize_nf4(values)
    assert np.array_equal(own_scales.numpy(), scales)
    assert np.array_equal(codes.numpy(), (nearest[:, 0::2] * 16 + nearest[:, 1::2]).astype(np.uint8))
    back = torch.from_numpy(table[nearest] * scales[:, None]).to(dtype)
    assert equal_bits(dequantize_nf4(codes, own_scales, dtype), back)


def test_nf4_error_is_half_the_widest_step():
    values = random(200 * BLOCK)
    codes, scales = quantize_nf4(values)
    error = (dequantize_nf4(codes, scales, torch.float32) - values.view(-1, BLOCK)).abs() / scales[:, None]
    widest = max(b - a for a, b in zip(NF4_VALUES, NF4_VALUES[1:], strict=False))
    assert 0.8 * widest / 2 < float(error.max()) <= widest / 2 + 1e-6 and widest == pytest.approx(0.304, abs=1e-3)


# ---- both, in one byte parameter ----

SHAPES = [(19, 37), (1, 5), (64, 64), (3, 200)]


@formats
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("carried", [False, True])
def test_packed_weight_comes_back_as_dequantised_codes(format, dtype, shape, carried):
    weight = random(*shape, dtype=dtype)
    packing = Packing(format, *shape, dtype, carried)
    parameter = packing.parameter(packing.pack(weight))
    assert tuple(parameter.shape) == packing.shape and parameter.dtype == packing.parameter_dtype
    if format == "int8":
        wanted = dequantize_int8(*quantize_int8(weight), dtype)
    else:
        wanted = dequantize_nf4(*quantize_nf4(weight.reshape(-1)), dtype).reshape(-1)[: weight.numel()].view(shape)
    assert equal_bits(packing.dequantize(parameter), wanted)
    moved = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)[1:].view(parameter.shape).copy_(parameter)
    assert equal_bits(packing.dequantize(moved), wanted)  # at any offset, as in a gathered buffer


@formats
def test_bytes_a_weight(format):
    packing = Packing(format, 8, 128, torch.bfloat16)
    weights = 8 * 128
    assert packing.num_units * packing.unit_bytes == {"int8": weights + 4 * 8, "nf4": weights * 4.5 / 8}[format]


@formats
def test_chunks_change_no_bit(format, monkeypatch):
    weight = random(33, 100)
    packing = Packing(format, 33, 100, torch.float32)
    whole = packing.pack(weight)
    back = packing.dequantize(whole)
    monkeypatch.setattr("ardtrain.quantized.CHUNK", 256)
    assert weight.numel() < CHUNK
    assert equal_bits(packing.pack(weight), whole)
    assert equal_bits(packing.dequantize(whole), back)


@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused_by_name(format, bad):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match=rf"quantization={format}: model.layers.1.mlp.up_proj.weight .* not finite"):
        quantize_base(model, format)


# ---- the product ----


@formats
@dtypes
def test_product_and_its_gradient_are_the_dequantised_linears(format, dtype):
    linear = torch.nn.Linear(48, 40, dtype=dtype).requires_grad_(False)
    packing = packing_of(linear, format)
    quantized = QuantizedLinear(packing, packing.parameter(packing.pack(linear.weight)), linear.bias)
    x = random(3, 7, 48, dtype=dtype).requires_grad_()
    y = random(3, 7, 48, dtype=dtype).requires_grad_()
    y.data.copy_(x.data)
    weight = quantized.dequantized().weight
    out, wanted = quantized(x), torch.addmm(linear.bias, y.flatten(0, 1), weight.t()).view(3, 7, 40)
    assert equal_bits(out, wanted)
    grad = random(3, 7, 40, seed=1, dtype=dtype)
    out.backward(grad)
    wanted.backward(grad)
    assert equal_bits(x.grad, y.grad)


@formats
@pytest.mark.parametrize("form", [None, "plain", "dora"], ids=["no adapters", "plain", "dora"])
def test_autograd_keeps_no_float_copy_of_a_weight(format, form):
    model = tiny_llama()
    sites, ranks = sites_of_model(model)
    quantize_base(model, format)
    if form is not None:
        adapters = attach(model, sites, dropout={}, form=form)
        method = Dora() if form == "dora" else ElaLora(ELALORA)
        layout = ArenaLayout(RankTable.start(sites, ranks), method.entries, method.dense(sites))
        bind_arena(adapters, layout, torch.ones(layout.size).requires_grad_())
    weights = {tuple(m.weight.shape) for m in tiny_llama().modules() if isinstance(m, torch.nn.Linear)}
    weights |= {shape[::-1] for shape in weights}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    embeds = random(2, 9, 32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(inputs_embeds=embeds).last_hidden_state.sum().backward()
    kept = {t.data_ptr() for t in saved if not t.is_floating_point()}
    own = {m.weight.data_ptr() for m in model.modules() if isinstance(getattr(m, "packing", None), Packing)}
    assert len(own) == 14 and kept >= own  # references to the parameters themselves, no copies
    assert not [t for t in saved if t.is_floating_point() and tuple(t.shape) in weights]


@formats
def test_the_base_but_embeddings_head_and_norms_is_quantised(format):
    model = tiny_llama()
    quantize_base(model, format)
    chosen = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert chosen == set(base_linears(tiny_llama())) and "lm_head" not in chosen and len(chosen) == 14
    others = {n for n, p in model.named_parameters() if p.is_floating_point()}
    assert "model.embed_tokens.weight" in others and "lm_head.weight" in others and "model.norm.weight" in others
    assert not any(name.removesuffix(".weight") in chosen for name in others)


def test_a_weight_that_two_modules_own_is_left_alone():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    quantize_base(model, "int8")
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears == {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}


def test_files_that_are_quantised_already_are_refused(tmp_path):
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised already \(gptq\).*set quantization: int8 or nf4"):
        meta_model(ModelSource(str(tmp_path)))


@formats
def test_an_adapter_adopts_the_codes(format):
    linear = torch.nn.Linear(48, 40).requires_grad_(False)
    holder = torch.nn.Sequential(linear)
    quantize_modules(holder, ["0"], format)
    adapter = AdapterLinear(holder[0], scaling=1.0)
    assert adapter.weight is holder[0].weight and dict(adapter.named_parameters()).keys() == {"weight", "bias"}
    x = random(4, 48)
    assert equal_bits(adapter(x), holder[0](x))


@formats
def test_dora_takes_the_norm_of_the_dequantised_weight(format):
    model = torch.nn.Sequential(torch.nn.Linear(48, 40).requires_grad_(False))
    quantize_modules(model, ["0"], format)
    plain = DoraLinear(model[0].dequantized(), scaling=0.5)
    ours = DoraLinear(model[0], scaling=0.5)
    assert equal_bits(ours.first_magnitude, plain.first_magnitude)
    views = {"lora_A": random(3, 48), "lora_B": random(3, 40, seed=1), "magnitude": ours.first_magnitude}
    x = random(4, 48, seed=2)
    for adapter in (ours, plain):
        adapter.bind(views, (3,))
    assert equal_bits(frozen_weight(ours), plain.weight.detach())
    assert equal_bits(ours(x), plain(x))


# ---- the base's engine ----


def backbone(format, *, stage=0, dtype=torch.float32, checkpointing=False, exclude=None, plain=False, **zero):
    """(engine, loss, gradient) of one grain; exclude: modules without an adapter; plain: dequantised linears."""
    model = tiny_llama(dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sites, ranks = sites_of_model(model, exclude_modules=exclude)
    quantize_base(model, format, carried=zero.get("offload_param", {}).get("device") == "nvme")
    if plain:
        dequantize_modules(model)
    adapters = attach(model, sites, dropout={})
    engine = BackboneEngine(model, stage=stage, config=backbone_config(stage=stage, dtype=dtype, **zero), device=CPU)
    layout = ArenaLayout(RankTable.start(sites, ranks), ElaLora(ELALORA).entries)
    leaf = torch.zeros(layout.size)
    for number, block in enumerate(layout.blocks):
        block.of(leaf).normal_(0.0, 0.2, generator=torch.Generator().manual_seed(number))
    leaf.requires_grad_()
    bind_arena(adapters, layout, leaf)
    model.train()
    loss = token_loss_sum(model, TokenBatches().collate((0, 0)), device=CPU)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return engine, loss.detach(), gradient


def assert_same_step(first, second):
    assert equal_bits(first[1], second[1])
    assert equal_bits(first[2], second[2])


@formats
@dtypes
@pytest.mark.usefixtures("world")
def test_quantised_base_computes_as_the_dequantised_one(format, dtype):
    assert_same_step(backbone(format, dtype=dtype), backbone(format, dtype=dtype, plain=True))


@formats
@dtypes
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("zero", [{}, {"offload_param": {"device": "cpu"}}], ids=["sharded", "offloaded"])
@pytest.mark.usefixtures("world")
def test_sharded_codes_give_the_unsharded_loss_and_gradient(format, dtype, zero, checkpointing):
    exclude = ["mlp.up_proj", "self_attn.o_proj"]  # without an adapter, and quantised all the same
    unsharded = backbone(format, dtype=dtype, exclude=exclude)
    sharded = backbone(format, stage=3, dtype=dtype, exclude=exclude, checkpointing=checkpointing, **zero)
    engine = sharded[0]
    byte = {n: p for n, p in engine.module.named_parameters() if not p.is_floating_point()}
    assert len(byte) == 14
    assert all(p.ds_tensor.dtype == (torch.int8 if format == "int8" else torch.uint8) for p in byte.values())
    assert_same_step(sharded, unsharded)
    engine.release()
    assert engine.gathered_parameters() == 0
    engine.destroy()


@formats
@pytest.mark.usefixtures("world")
def test_codes_travel_through_nvme(format, has_async_io, tmp_path):
    """DeepSpeed swaps tensors of 1 MiB and more only, through buffers of one dtype."""
    if not has_async_io:
        pytest.skip("libaio's header is not installed")
    wide = torch.nn.Sequential(torch.nn.Linear(2048, 1200, dtype=torch.bfloat16)).requires_grad_(False)
    quantize_modules(wide, ["0"], format, carried=True)
    x = random(3, 2048, dtype=torch.bfloat16).requires_grad_()
    wanted = wide[0](x)
    (wanted_gradient,) = torch.autograd.grad(wanted.float().square().sum(), x)
    nvme = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_size": 4_000_000}
    config = backbone_config(stage=3, dtype=torch.bfloat16, offload_param=nvme)
    engine = BackboneEngine(wide, stage=3, config=config, device=CPU)
    assert wide[0].weight.ds_tensor.final_location == "nvme"
    out = wide(x)
    assert equal_bits(out, wanted)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    assert equal_bits(gradient, wanted_gradient)
    engine.destroy()
