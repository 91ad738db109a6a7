"""Checkpoints that bitsandbytes quantised, read without it. The golden is bitsandbytes' own (make_bitsandbytes.py)."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from ardtrain.backbones import ModelSource, meta_model, quantize_base
from ardtrain.engines import BackboneEngine
from ardtrain.loading import Shards, checked, quantized
from ardtrain.loading.bitsandbytes import decoded
from ardtrain.loading.quantizing import Quantized
from ardtrain.loading.sources import Pieces
from ardtrain.opening import open_model
from ardtrain.quantized import Packing, QuantizedLinear
from ardtrain.targets import base_linears
from tests.quantized_files import GOLDEN, save_by_bitsandbytes
from tests.tiny import CPU, backbone_config, equal_bits

WAYS = ("nf4", "nf4_nested", "fp4", "int8")


@pytest.fixture
def golden():
    shards = Shards([GOLDEN])
    yield decoded(shards.tensors), load_file(GOLDEN)
    shards.close()


@pytest.mark.parametrize("way", WAYS)
def test_decoded_as_bitsandbytes_does(golden, way):
    tensors, numbers = golden
    expected = numbers[f"{way}.expected"]
    source = Pieces.of(tensors[f"{way}.linear.weight"], torch.float32)
    assert source.shape == expected.shape
    assert sorted(n for n in tensors if n.startswith(f"{way}.")) == [f"{way}.expected", f"{way}.linear.weight"]
    whole = source.read(0, expected.numel()).view(expected.shape)
    if way == "int8":  # they multiply by SCB first and divide then
        torch.testing.assert_close(whole, expected, rtol=2e-7, atol=0)
    else:
        assert equal_bits(whole, expected)
    for begin, count in ((0, 1), (1, 1), (63, 2), (65, 700), (1535, 1), (130, 64)):
        assert equal_bits(source.read(begin, count), whole.view(-1)[begin : begin + count])


@pytest.mark.parametrize("way", ["nf4", "nf4_nested"])
def test_nf4_packed_again_is_its_own_codes_and_scales(golden, way):
    tensors, numbers = golden
    packing = Packing("nf4", 24, 64, torch.bfloat16)
    source = Pieces.of(tensors[f"{way}.linear.weight"], torch.float32)
    read = Quantized("w", source, packing).read(0, math.prod(packing.shape)).view(packing.shape)
    assert equal_bits(read[:, :32], numbers[f"{way}.linear.weight"].view(-1, 32))
    expected = numbers[f"{way}.expected"]
    assert equal_bits(packing.dequantize(read), expected.bfloat16())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("stage", [0, 3])
def test_model_is_the_decoded_one(kind, stage, tmp_path, world):
    reference = save_by_bitsandbytes(tmp_path / "base", kind)
    source = ModelSource(str(tmp_path / "base"))
    assert len(base_linears(meta_model(source))) == 14
    opened = open_model(source, compute_dtype="fp32")
    assert not hasattr(opened.model.config, "quantization_config")
    config = backbone_config(stage=stage)
    engine = BackboneEngine(opened.model, stage=stage, config=config, device=CPU, weights=opened.weights)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        assert equal_bits(opened.model(input_ids=ids).logits, reference(input_ids=ids).logits)
    engine.destroy()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_kept_in_its_own_codes(kind, tmp_path, world):
    reference = save_by_bitsandbytes(tmp_path / "base", kind)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    opened = open_model(ModelSource(str(tmp_path / "base")), compute_dtype="bf16")
    weights = quantized(checked(opened.weights), quantize_base(opened.model, kind))
    engine = BackboneEngine(opened.model, stage=0, config={}, device=CPU, weights=weights)
    for name, module in opened.model.named_modules():
        if isinstance(module, QuantizedLinear):
            codes = module.packing.units(module.weight)[:, :-4]
            assert equal_bits(codes.reshape(-1), stored[f"{name}.weight"].reshape(-1)), name
            torch.testing.assert_close(
                module.dequantized().weight.float(), reference.get_submodule(name).weight, rtol=2**-8, atol=1e-6
            )
    engine.destroy()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blocksize": 0}, "for a weight of shape"),
        ({"shape": [3, 3]}, "for a weight of shape"),
        ({"shape": None}, "not iterable"),
    ],
)
def test_broken_description_is_refused_by_name(change, reason, tmp_path):
    save_by_bitsandbytes(tmp_path / "base", "nf4")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | change
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"q_proj.weight.*does not describe a bitsandbytes weight.*{reason}"):
        open_model(ModelSource(str(tmp_path / "base")), compute_dtype="fp32")


def test_lost_companion_is_refused_by_name(tmp_path):
    save_by_bitsandbytes(tmp_path / "base", "nf4")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.q_proj.weight.absmax"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="q_proj.weight.*does not describe.*absmax"):
        open_model(ModelSource(str(tmp_path / "base")), compute_dtype="fp32")
