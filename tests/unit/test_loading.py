"""The base read from its files: equal to transformers' own loading to the bit, each byte once, mistakes by name."""

import json
import struct

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Transpose, WeightConverter

from ardtrain.adapters import DoraLinear, attach
from ardtrain.backbones import ModelSource, init_head, load_model
from ardtrain.engines import AdamSettings, BackboneEngine
from ardtrain.engines_full import FullEngine
from ardtrain.loading import Filler, Shards, Weights, checked, mapping
from ardtrain.loading.sources import Converted, Given, Pieces, Run, Unread
from ardtrain.opening import open_model
from tests.tiny import CPU, backbone_config, equal_bits, sites_of_model, tiny_llama

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DECODER = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 66,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DECODERS = {
    "llama": lambda: hf.LlamaConfig(**DECODER, tie_word_embeddings=False),
    "llama tied": lambda: hf.LlamaConfig(**DECODER, tie_word_embeddings=True, rope_scaling=dict(LLAMA3_ROPE)),
    "mistral": lambda: hf.MistralConfig(**DECODER),
    "qwen2": lambda: hf.Qwen2Config(**DECODER),
    "qwen3": lambda: hf.Qwen3Config(**DECODER, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**DECODER, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**DECODER, head_dim=8),
    "phi3": lambda: hf.Phi3Config(**DECODER),
    "mixtral": lambda: hf.MixtralConfig(**DECODER, num_local_experts=4),  # its experts are merged while loading
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
ENCODERS = {
    "bert": lambda: hf.BertConfig(**ENCODER),
    "roberta": lambda: hf.RobertaConfig(**ENCODER, pad_token_id=1),
    "deberta": lambda: hf.DebertaV2Config(
        **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8,
        norm_rel_ebd="layer_norm",
    ),
}  # fmt: skip


def save(folder, config, dtype, *, classes=None, shard="20KB"):
    """A random model of the config; the folder then holds several shards and an index."""
    auto = hf.AutoModelForCausalLM if classes is None else hf.AutoModelForSequenceClassification
    if classes is not None:
        config.num_labels = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size=shard)


def engine_of(opened, stage, dtype=torch.float32, **zero):
    config = backbone_config(stage=stage, dtype=dtype, **zero)
    return BackboneEngine(opened.model, stage=stage, config=config, device=CPU, weights=opened.weights)


def assert_same_model(engine, model, reference):
    """Names, parameters, buffers and logits, to the bit."""
    named = dict(model.named_parameters(remove_duplicate=False))
    assert list(named) == [name for name, _ in reference.named_parameters(remove_duplicate=False)]
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        with engine.whole(named[name]):
            assert equal_bits(named[name], parameter), name
    buffers = dict(model.named_buffers())
    assert list(buffers) == [name for name, _ in reference.named_buffers()]
    for name, buffer in reference.named_buffers():
        assert equal_bits(buffers[name], buffer), name
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        assert equal_bits(model(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize(("compute", "stage"), [("fp32", 0), ("bf16", 3)])
@pytest.mark.parametrize("family", DECODERS)
def test_equal_to_transformers_loading(family, compute, stage, tmp_path, world):
    dtype = DTYPES[compute]
    save(tmp_path, DECODERS[family](), dtype)
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype=compute)
    assert all(p.is_meta and not p.requires_grad for p in opened.model.parameters())
    headers = opened.shards.bytes_read
    reference = load_model(ModelSource(str(tmp_path)), compute_dtype=compute)
    engine = engine_of(opened, stage, dtype)
    assert opened.shards.bytes_read - headers == opened.shards.nbytes  # each number once
    assert_same_model(engine, opened.model, reference)
    assert opened.model.generation_config.to_dict() == reference.generation_config.to_dict()
    engine.destroy()


@pytest.mark.parametrize(("compute", "stage"), [("fp32", 0), ("bf16", 3)])
@pytest.mark.parametrize("family", ENCODERS)
def test_classifier_is_equal_and_its_head_is_the_seeds(family, compute, stage, tmp_path, world):
    save(tmp_path, ENCODERS[family](), DTYPES[compute], classes=5)
    pad = 1 if family == "roberta" else 0
    arguments = {"compute_dtype": compute, "num_labels": 3, "label_names": ["a", "b", "c"], "pad_token_id": pad}
    opened = open_model(ModelSource(str(tmp_path)), **arguments)
    reference = load_model(ModelSource(str(tmp_path)), **arguments)
    for model in (opened.model, reference):
        init_head(model, seed=4)
    assert opened.model.config.id2label == reference.config.id2label
    engine = engine_of(opened, stage, DTYPES[compute])
    assert_same_model(engine, opened.model, reference)
    engine.destroy()


def test_files_in_another_dtype_are_cast(tmp_path, world):
    save(tmp_path, DECODERS["mixtral"](), torch.float32)
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="bf16")
    engine = engine_of(opened, 3, torch.bfloat16)
    assert_same_model(engine, opened.model, load_model(ModelSource(str(tmp_path)), compute_dtype="bf16"))
    engine.destroy()


def test_parameters_on_nvme(tmp_path, world, has_async_io):
    if not has_async_io:
        pytest.skip("libaio's header is not installed")
    save(tmp_path, hf.LlamaConfig(**DECODER | {"vocab_size": 40000}), torch.float32)
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 8, "buffer_size": 2_000_000}
    engine = engine_of(opened, 3, offload_param=offload)
    swapped = [p for p in opened.model.parameters() if p.ds_tensor.final_location is not None]
    assert swapped, "the test is about these"
    assert_same_model(engine, opened.model, load_model(ModelSource(str(tmp_path)), compute_dtype="fp32"))
    engine.destroy()


def test_offload_to_the_host(tmp_path, world):
    save(tmp_path, DECODERS["llama"](), torch.float32)
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    engine = engine_of(opened, 3, offload_param={"device": "cpu"})
    assert_same_model(engine, opened.model, load_model(ModelSource(str(tmp_path)), compute_dtype="fp32"))
    engine.destroy()


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_are_read_once_from_whichever_name_is_stored(kept, tmp_path, world):
    save(tmp_path, DECODERS["llama tied"](), torch.float32, shard="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, kept: table}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    model = opened.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    engine = engine_of(opened, 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_model(engine, model, load_model(ModelSource(str(tmp_path)), compute_dtype="fp32"))
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_dora_measures_the_weight_once_it_is_there(stage, tmp_path, world):
    save(tmp_path, DECODERS["llama"](), torch.float32)
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    reference = load_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    magnitudes = []
    for model in (opened.model, reference):
        sites, _ = sites_of_model(model, ["q_proj"], r=2, lora_alpha=4.0)
        adapters = attach(model, sites, dropout={}, form="dora")
        if model is opened.model:
            engine = engine_of(opened, stage)
            for adapter in adapters.values():
                assert isinstance(adapter, DoraLinear)
                with engine.whole(adapter.weight):
                    adapter.measure()
        magnitudes.append([adapter.first_magnitude for adapter in adapters.values()])
    assert all(equal_bits(a, b) for a, b in zip(*magnitudes, strict=True))
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning_starts_from_slices(stage, tmp_path, world):
    """Two steps of the whole model, read slice by slice and by transformers: the same weights to the bit."""
    save(tmp_path, DECODERS["llama tied"](), torch.bfloat16)
    ids = torch.arange(3, 27).view(2, 12)
    states = []
    for whole in (False, True):
        source = ModelSource(str(tmp_path))
        model = load_model(source, compute_dtype="bf16") if whole else None
        opened = open_model(source, compute_dtype="bf16")
        weights = None if whole else opened.weights
        config = backbone_config(stage=stage, dtype=torch.bfloat16) | {"gradient_clipping": 1.0}
        engine = FullEngine(model or opened.model, config=config, adam=AdamSettings(), device=CPU, weights=weights)
        for _ in range(2):
            engine.backward(engine.trained(input_ids=ids, labels=ids).loss, last=True)
            assert engine.step(lr=1e-2) > 0
        states.append(engine.full_state_dict())
        engine.destroy()
    own, reference = states
    assert list(own) == list(reference)
    assert all(equal_bits(own[name], reference[name]) for name in own)
    stored = {}
    for shard in tmp_path.glob("*.safetensors"):
        stored |= load_file(shard)
    assert not any(equal_bits(own[name], value) for name, value in stored.items()), "all of it was trained"


def stored_numbers(tmp_path, **tensors):
    save_file(tensors, tmp_path / "t.safetensors")
    return Shards([tmp_path / "t.safetensors"]).tensors


def test_merged_and_cut_tensors_are_runs_of_stored_ones(tmp_path):
    """torch.stack, cat, chunk and split on unread tensors give what they give on read ones, for every slice."""
    values = {name: torch.arange(24.0).view(4, 6) + 100 * i for i, name in enumerate("abc")}
    stored = stored_numbers(tmp_path, **values)
    unread = [Unread(Pieces.of(stored[name], torch.bfloat16)) for name in values]
    real = [value.to(torch.bfloat16) for value in values.values()]
    operations = {
        "stack": lambda t: [torch.stack(t, dim=0)],
        "cat 0": lambda t: [torch.cat(t, dim=0)],
        "cat 1": lambda t: [torch.cat(t, dim=-1)],
        "chunk 1": lambda t: torch.chunk(t[1], 3, dim=1),
        "chunk uneven": lambda t: torch.chunk(t[1], 4, dim=1),
        "split": lambda t: torch.split(t[2], [1, 3], dim=0),
        "experts": lambda t: [torch.cat([torch.stack(t, dim=0), torch.stack(t[::-1], dim=0)], dim=1).contiguous()],
    }
    for name, operation in operations.items():
        got, want = operation(unread), operation(real)
        assert len(got) == len(want), name
        for g, w in zip(got, want, strict=True):
            assert tuple(g.shape) == tuple(w.shape), name
            numel = w.numel()
            for begin, count in [(0, numel), (1, numel - 1), (numel // 3, numel // 2), (numel - 1, 1), (5, 0)]:
                assert equal_bits(g.pieces.read(begin, count), w.reshape(-1)[begin : begin + count]), (name, begin)
    with pytest.raises(TypeError):
        torch.transpose(unread[0], 0, 1)


def test_a_transposed_layout_goes_through_transformers_own_operation(tmp_path, world, monkeypatch):
    """Numbers change places within a tensor: transformers' Transpose runs on the whole one, and a slice is kept."""
    save(tmp_path, DECODERS["llama"](), torch.float32, shard="1GB")
    reference = load_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {k: v.t().contiguous() if k.endswith("gate_proj.weight") else v for k, v in tensors.items()}
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rule = WeightConverter("mlp.gate_proj.weight", "mlp.gate_proj.weight", [Transpose(0, 1)])
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: [rule])
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    kinds = {name for name, s in opened.weights.sources.items() if isinstance(s, Converted)}
    assert kinds == {f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)}
    engine = engine_of(opened, 3)
    assert_same_model(engine, opened.model, reference)
    engine.destroy()


def test_a_transform_that_cannot_be_followed_is_left_to_transformers(tmp_path, monkeypatch, caplog):
    save(tmp_path, DECODERS["llama"](), torch.float32)

    class Broken(Transpose):
        def convert(self, input_dict, **_):
            raise RuntimeError("looks at the numbers")

    rule = WeightConverter("mlp.gate_proj.weight", "mlp.gate_proj.weight", [Broken()])
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: [rule])
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    assert opened.weights is None and not any(p.is_meta for p in opened.model.parameters())
    assert "loaded by transformers, whole on every process: a transform of its checkpoint" in caplog.text


def test_weight_files_of_a_configs_own_are_left_to_transformers(tmp_path, caplog):
    save(tmp_path, DECODERS["llama"](), torch.float32, shard="1GB")
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    assert opened.weights is None
    assert equal_bits(opened.model.lm_head.weight, load_file(tmp_path / "other.safetensors")["lm_head.weight"])
    assert "its config names weight files of its own" in caplog.text


def damaged(folder, kind):
    """Writes one mistake into the checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / index["weight_map"][name]
    raw = shard.read_bytes()
    tensors = load_file(shard)
    if kind == "file":
        shard.unlink()
    elif kind == "short":
        shard.write_bytes(raw[:-5])
    elif kind == "header":
        shard.write_bytes(raw[:8] + b"?" * (len(raw) - 8))
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "type":
        length = struct.unpack("<Q", raw[:8])[0]
        shard.write_bytes(raw[:8] + raw[8 : 8 + length].replace(b'"F32"', b'"F77"', 1) + raw[8 + length :])
    elif kind == "index":
        del tensors[name]
        save_file(tensors, shard)
    elif kind == "missing":
        del tensors[name], index["weight_map"][name]
        save_file(tensors, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "shape":
        save_file({**tensors, name: tensors[name][:-1].contiguous()}, shard)
    return shard.name


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("file", "index.json names {shard}, which is not there; get the model anew"),
        ("short", "{shard} was cut short: .* bytes, by its header .*; get the model anew"),
        ("header", "{shard}: its header is damaged"),
        ("empty", "{shard} is no safetensors file or was cut short"),
        ("type", "{shard}: .* is of type F77, which is unknown here"),
        ("index", "index.json names model.layers.1.mlp.up_proj.weight in {shard}, which does not hold it"),
        ("missing", r"lacks 1 tensors of the base .*, e.g. model.layers.1.mlp.up_proj.weight; they would stay"),
        ("shape", r"e.g. model.layers.1.mlp.up_proj.weight \(\[47, 32\] in the files, \[48, 32\] in the model\)"),
    ],
)
def test_mistakes_are_named(kind, text, tmp_path):
    save(tmp_path, DECODERS["llama"](), torch.float32)
    shard = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=text.format(shard=shard)):
        open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")


def test_a_shard_cut_after_its_header_was_read(tmp_path, world):
    save(tmp_path, DECODERS["llama"](), torch.float32, shard="1GB")
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model.safetensors ends at byte \d+, before what its header names"):
        engine_of(opened, 0)


def test_numbers_that_are_not_finite_are_refused_on_demand():
    bad = torch.ones(100)
    bad[70] = float("inf")
    target = torch.zeros(100)
    with Filler(Weights({"w": Given(bad)})) as filler:
        filler.add("w", 0, target)
    assert equal_bits(target, bad)
    weights = checked(Weights({"w": Given(bad)}))
    with Filler(weights) as filler:
        filler.add("w", 0, target[:70])
    with pytest.raises(ValueError, match="w holds a number that is not finite"), Filler(weights) as filler:
        filler.add("w", 60, target[:40])


def test_progress_counts_every_byte(monkeypatch):
    monkeypatch.setattr("ardtrain.loading.filling.CHUNK_BYTES", 64)
    seen = []
    values = torch.arange(1000.0)
    target = torch.empty(990)
    with Filler(Weights({"w": Given(values)}, progress=seen.append)) as filler:
        filler.add("w", 7, target)
    assert equal_bits(target, values[7:997])
    assert sum(seen) == 990 * 4 and max(seen) == 64


def test_pieces_must_cover_the_shape(tmp_path):
    stored = stored_numbers(tmp_path, a=torch.arange(6.0))["a"]
    with pytest.raises(AssertionError, match="cover"):
        Pieces((2, 2), torch.float32, [Run(stored, 0, 3)])


def test_what_has_values_already_is_sharded_as_it_is(world):
    """The classification head comes from the seed, the rest from files."""
    model, values = tiny_llama(layers=1), tiny_llama(layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    sources = {name: Given(values.get_parameter(name))}
    owner = model.model.layers[0].mlp.up_proj
    owner.weight = torch.nn.Parameter(owner.weight.to("meta"), requires_grad=False)
    engine = BackboneEngine(model, stage=3, config=backbone_config(stage=3), device=CPU, weights=Weights(sources))
    assert_same_model(engine, model, values)
    engine.destroy()


def test_open_model_reads_no_weights(tmp_path):
    save(tmp_path, DECODERS["llama"](), torch.float32)
    opened = open_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    headers = sum(8 + struct.unpack("<Q", p.read_bytes()[:8])[0] for p in tmp_path.glob("*.safetensors"))
    assert opened.shards.bytes_read == headers
