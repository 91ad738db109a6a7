"""The base quantised while it is read: each process its own slices, equal to the whole one's to the bit."""

import math

import pytest
import torch

from ardtrain.backbones import ModelSource, load_model, quantize_base
from ardtrain.engines import BackboneEngine
from ardtrain.loading import quantized
from ardtrain.loading.quantizing import Quantized
from ardtrain.loading.sources import Given
from ardtrain.opening import open_model
from ardtrain.quantized import FORMATS, Packing, QuantizedLinear
from tests.tiny import CPU, backbone_config, equal_bits, tiny_llama

formats = pytest.mark.parametrize("format", FORMATS)


class Counted(Given):
    """A source that says what was read of it."""

    def read(self, begin, numel):
        asked.append((begin, numel))
        return super().read(begin, numel)


asked = []


@formats
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(19, 37), (64, 128), (1, 5)])
def test_slices_make_up_the_whole_parameter(format, carried, processes, shape):
    """Cut as ZeRO-3 cuts: ceil(numel / processes) each; every slice reads the units it touches and no more."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    packing = Packing(format, *shape, torch.bfloat16, carried)
    whole = packing.parameter(packing.pack(weight)).reshape(-1)
    source = Quantized("w", Counted(weight), packing)
    assert (source.shape, source.dtype) == (packing.shape, packing.parameter_dtype)
    size = -(-math.prod(source.shape) // processes)
    asked.clear()
    for begin in range(0, len(whole), size):
        count = min(size, len(whole) - begin)
        assert equal_bits(source.read(begin, count), whole[begin : begin + count])
    read = sum(count for _, count in asked)
    assert weight.numel() <= read <= weight.numel() + (processes - 1) * packing.unit_weights


def test_padding_behind_a_carried_parameter_is_zero():
    packing = Packing("int8", 1, 5, torch.float32, carried=True)
    assert packing.num_units * packing.unit_bytes == 9 and packing.shape == (3,)
    weight = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    whole = packing.parameter(packing.pack(weight))
    for begin in range(len(whole)):
        assert equal_bits(Quantized("w", Given(weight), packing).read(begin, 1), whole[begin : begin + 1])


def opened_and_whole(folder, format, *, compute, carried=False):
    """The opened model, quantised on the meta device with its sources; and the loaded one, quantised in place."""
    source = ModelSource(str(folder))
    opened = open_model(source, compute_dtype=compute)
    weights = quantized(opened.weights, quantize_base(opened.model, format, carried=carried))
    reference = load_model(source, compute_dtype=compute)
    quantize_base(reference, format, carried=carried)
    return opened, weights, reference


@formats
@pytest.mark.parametrize(("compute", "stage"), [("fp32", 0), ("bf16", 3)])
def test_quantised_while_read_is_quantised_after_loading(format, compute, stage, tmp_path, world):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    tiny_llama(dtype=dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    opened, weights, reference = opened_and_whole(tmp_path, format, compute=compute)
    assert all(p.is_meta for p in opened.model.parameters())
    assert weights.nbytes(opened.model) == sum(p.nbytes for p in reference.parameters())
    headers = opened.shards.bytes_read
    config = backbone_config(stage=stage, dtype=dtype)
    engine = BackboneEngine(opened.model, stage=stage, config=config, device=CPU, weights=weights)
    assert opened.shards.bytes_read - headers == opened.shards.nbytes  # each number once
    for (name, ours), (other, wanted) in zip(
        opened.model.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert name == other
        with engine.whole(ours):
            assert equal_bits(ours, wanted), name
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        assert equal_bits(opened.model(input_ids=ids).logits, reference(input_ids=ids).logits)
    engine.destroy()


@formats
def test_quantised_while_read_to_nvme(format, tmp_path, world, has_async_io):
    if not has_async_io:
        pytest.skip("libaio's header is not installed")
    tiny_llama(layers=1, hidden=1024, heads=8, kv_heads=8, mlp=2048, dtype=torch.bfloat16).save_pretrained(tmp_path)
    opened, weights, reference = opened_and_whole(tmp_path, format, compute="bf16", carried=True)
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 8, "buffer_size": 2_000_000}
    config = backbone_config(stage=3, dtype=torch.bfloat16, offload_param=offload)
    engine = BackboneEngine(opened.model, stage=3, config=config, device=CPU, weights=weights)
    swapped = [m for m in opened.model.modules() if isinstance(m, QuantizedLinear)
               and m.weight.ds_tensor.final_location is not None]  # fmt: skip
    assert swapped, "the test is about these"
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        assert equal_bits(opened.model(input_ids=ids).logits, reference(input_ids=ids).logits)
    engine.destroy()


@formats
def test_number_that_is_not_finite_names_its_tensor(format, tmp_path, world):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    weights = quantized(opened.weights, quantize_base(opened.model, format))
    with pytest.raises(ValueError, match=rf"quantization={format}: model.layers.1.mlp.up_proj.weight .* not finite"):
        BackboneEngine(opened.model, stage=0, config={}, device=CPU, weights=weights)
