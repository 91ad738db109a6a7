"""PaliGemma-2 as a base: which task and towers, where adapters sit, ranks that cross towers, ablation with pictures."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from ardtrain.adapters import bind_arena
from ardtrain.backbones import ModelSource, load_image_processor, load_model, meta_model
from ardtrain.config import ConfigError
from ardtrain.methods.lora import Lora
from ardtrain.planning.shapes import read_shapes
from ardtrain.preflight import check_model, make_method, prepare
from ardtrain.rehearse import write_base
from ardtrain.run_data import image_reader, open_data, tokenizer_of
from ardtrain.targets import never_run, tower_modules
from tests.runs import write_run
from tests.tiny import backbone_config, elalora, equal_bits, tiny_trainer, weights_digest
from tests.tiny_paligemma import save_tiny_paligemma, tiny_paligemma, write_rows
from tests.unit.test_ablation import TOLERANCE, Setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paligemma")
    save_tiny_paligemma(folder / "model")
    write_rows(folder, "train", 24)
    write_rows(folder, "dev", 8, seed=1)
    return folder


@pytest.fixture
def config_of(folder, monkeypatch):
    monkeypatch.setenv("ARDTRAIN_CACHE", str(folder / "cache"))

    def make(**settings):
        return prepare(write_run(folder, **({"task": "image_text_to_text"} | settings)), [], world_size=1).config

    return make


@pytest.fixture
def data(config_of):
    config = config_of(max_steps=24)
    return open_data(config, tokenizer_of(config))


def towers(table):
    out = {}
    for site, rank in zip(table.sites, table.ranks, strict=True):
        out.setdefault(site.tower, []).append(rank)
    return out


def test_loads_as_a_model_of_pictures(folder):
    source = ModelSource(str(folder / "model"))
    model = load_model(source, compute_dtype="fp32")
    assert type(model).__name__ == type(meta_model(source)).__name__ == "PaliGemmaForConditionalGeneration"
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight, tiny_paligemma().lm_head.weight, rtol=0, atol=0)


def test_all_linear_leaves_out_what_never_runs(config_of):
    """SigLIP's pooling head is in the model and its result is not used; the output embedding is never a target."""
    model = tiny_paligemma()
    assert never_run(model) == ["model.vision_tower.head"]
    table = check_model(config_of()).table
    assert {tower: len(ranks) for tower, ranks in towers(table).items()} == {
        "vision": 12, "projector": 1, "language": 28,
    }  # fmt: skip
    assert not [s.name for s in table.sites if ".head." in s.name or "lm_head" in s.name]
    by_name = check_model(config_of(target_modules=["out_proj"])).table  # the head has one as well
    assert [s.name for s in by_name.sites] == [
        f"model.vision_tower.encoder.layers.{i}.self_attn.out_proj" for i in range(2)
    ]


def test_each_tower_has_its_settings(config_of):
    table = check_model(config_of(r=4, targets={"vision": {"r": 3}, "projector": {"r": 6, "lora_alpha": 18}})).table
    assert {tower: set(ranks) for tower, ranks in towers(table).items()} == {
        "vision": {3}, "projector": {6}, "language": {4},
    }  # fmt: skip
    assert {s.tower: s.scaling for s in table.sites} == {"vision": 2.0, "projector": 3.0, "language": 2.0}


def test_towers_can_be_frozen(config_of):
    table = check_model(config_of(targets={"vision": {"frozen": True}, "projector": {"frozen": True}})).table
    assert list(towers(table)) == ["language"]
    only = check_model(config_of(targets={"language": {"frozen": True}})).table
    assert list(towers(only)) == ["vision", "projector"]
    every = {tower: {"frozen": True} for tower in ("vision", "projector", "language")}
    with pytest.raises(ConfigError, match="targets freezes every tower that target_modules reaches; leave one"):
        config_of(targets=every)
    with pytest.raises(ConfigError, match=r"targets\.vision.*r stands beside frozen=true, which leaves no adapter"):
        config_of(targets={"vision": {"frozen": True, "r": 4}})
    with pytest.raises(ConfigError, match=r"targets\.audio names a tower that has no targeted module; this model's"):
        config_of(targets={"audio": {"frozen": True}})


def test_each_tower_has_its_modules(config_of):
    """The base's order stays; what a tower leaves out follows the top level."""
    settings = {
        "target_modules": ["q_proj", "v_proj", "linear"], "exclude_modules": ["0.self_attn.q_proj"],
        "targets": {
            "vision": {"target_modules": r".*layers\.1\.mlp\.fc[12]", "r": 3},
            "language": {"exclude_modules": ["v_proj", "layers.3.self_attn.q_proj"]},
        },
    }  # fmt: skip
    sites = check_model(config_of(**settings)).table.sites
    assert [s.module.removeprefix("model.") for s in sites] == [
        "vision_tower.encoder.layers.1.mlp.fc1", "vision_tower.encoder.layers.1.mlp.fc2",
        "multi_modal_projector.linear", *(f"language_model.layers.{i}.self_attn.q_proj" for i in range(3)),
    ]  # fmt: skip
    settings["targets"] = {"vision": {"target_modules": "all-linear"}}
    assert sum(s.tower == "vision" for s in check_model(config_of(**settings)).table.sites) == 11
    settings["targets"] = {"vision": {"target_modules": ["o_proj"]}}
    message = "targets.vision: target_modules='o_proj' matches no linear layer of the model; did you mean 'out_proj'"
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)
    with pytest.raises(
        ConfigError, match=r"targets\.vision.*target_modules stands beside frozen=true, which leaves no"
    ):
        config_of(targets={"vision": {"frozen": True, "target_modules": ["q_proj"]}})
    with pytest.raises(ConfigError, match=r"exclude_modules is empty"):
        config_of(targets={"vision": {"exclude_modules": []}})


METHOD_BLOCKS = {
    "elalora": {},
    "adalora": {"elalora": None, "adalora": {"target_r": 2, "tinit": 2, "tfinal": 4}},
    "alora": {"elalora": None, "alora": {"val_batch": 4}},
    "ard_lora": {"elalora": None},
    "probe_lora": {
        "elalora": None,
        "probe_lora": {"init_warmup": 2, "final_warmup": 4, "mask_interval": 6, "probe_steps": 2},
    },
}


@pytest.mark.parametrize("method", METHOD_BLOCKS)
def test_budget_of_each_tower_reaches_the_method(config_of, method):
    config = config_of(method=method, budget="per_tower", **METHOD_BLOCKS[method])
    assert make_method(config, check_model(config), total_steps=16).settings.per_tower
    shared = config_of(method=method, **METHOD_BLOCKS[method])
    assert not make_method(shared, check_model(shared), total_steps=16).settings.per_tower


def test_budget_of_each_tower_is_refused_or_told_where_there_is_none(config_of, folder):
    with pytest.raises(ConfigError, match=r"ard_lora.budget=false stands beside budget=per_tower, which divides a"):
        config_of(method="ard_lora", elalora=None, ard_lora={"budget": False}, budget="per_tower")
    with pytest.raises(ConfigError, match=r"alora.shortlist=0.5 picks .* over all towers and stands beside"):
        config_of(method="alora", elalora=None, alora={"val_batch": 4, "shortlist": 0.5}, budget="per_tower")
    for settings, why in (
        ({"method": "lora", "elalora": None}, "lora moves no rank"),
        ({"target_modules": ["o_proj"]}, "the adapters sit in one tower"),
    ):
        path = write_run(folder, task="image_text_to_text", budget="per_tower", **settings)
        assert f"budget=per_tower has no effect: {why}" in prepare(path, [], world_size=1).notes


def test_what_each_tower_holds_is_told(config_of):
    shape = check_model(config_of(r=4, target_modules=["q_proj", "linear"], targets={"projector": {"full": True}}))
    assert (
        shape.by_tower == "vision rank 8 and 520 numbers, language rank 16 and 1,040 numbers, projector 1,056 numbers"
    )
    assert check_model(config_of(target_modules=["o_proj"])).by_tower == ""


def test_projector_can_be_trained_in_full(config_of):
    shape = check_model(config_of(targets={"projector": {"full": True}}))
    assert list(towers(shape.table)) == ["vision", "language"]
    linear = "model.multi_modal_projector.linear"
    assert [(d.module, d.part, d.rows, d.columns) for d in shape.dense] == [
        (linear, "weight", 32, 32), (linear, "bias", 1, 32),
    ]  # fmt: skip
    message = (
        r"targets.language.full=true: the tower holds the embedding of all tokens, model.language_model.embed_tokens, "
        r"and its [\d,]+ numbers would be 0.000\d+ GiB of masters, moments and gradient on every process; use an adapt"
    )
    with pytest.raises(ConfigError, match=message):
        config_of(targets={"language": {"full": True}})
    with pytest.raises(ConfigError, match=r"targets\.audio\.full=true: the model has no such tower; use an adapter"):
        config_of(targets={"audio": {"full": True}})
    with pytest.raises(ConfigError, match=r"targets\.vision.*full stands beside frozen=true"):
        config_of(targets={"vision": {"full": True, "frozen": True}})
    for tower in ("projector", "vision"):
        message = f"targets.{tower}.full=true stands beside quantization=int8, whose weights"
        with pytest.raises(ConfigError, match=message):
            config_of(targets={tower: {"full": True}}, quantization="int8")


def test_vision_can_be_trained_in_full(config_of):
    """Its convolution, positions and norms as well; the pooling head, which never runs, is left out."""
    shape = check_model(config_of(targets={"vision": {"full": True}}))
    assert list(towers(shape.table)) == ["projector", "language"]
    own = {
        n: tuple(p.shape) for n, p in tiny_paligemma().named_parameters() if "vision_tower" in n and ".head." not in n
    }
    assert {f"{d.module}.{d.part}": d.own_shape for d in shape.dense} == own and len(own) == 37
    patches = next(d for d in shape.dense if d.module.endswith("patch_embedding"))
    assert (patches.rows, patches.columns, patches.own_shape) == (32, 48, (32, 3, 4, 4))
    numbers = sum(math.prod(s) for s in own.values())
    assert shape.by_tower.endswith(f"vision {numbers:,} numbers")
    plan = read_shapes(config_of(targets={"vision": {"full": True}}))
    assert plan.num_trained == shape.num_trained > numbers
    assert {name for name, _, _ in plan.weights if "vision" in name} == {
        n for n, _ in tiny_paligemma().named_parameters() if "vision_tower.head." in n
    }
    adapters = read_shapes(config_of(targets={"vision": {"frozen": True}}))
    kept = [p.grain_bytes(rows=1, length=32)["backward"] for p in (plan, adapters)]
    assert kept[0].total() > kept[1].total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_vision_in_full_starts_as_the_base_and_has_its_gradients(data, world, dtype, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)  # zero.Init of another test replaces it
    train, _ = data
    plain = tiny_paligemma(dtype=dtype)
    trainer = tiny_trainer(
        Lora(), model=tiny_paligemma(dtype=dtype), data=train, compute_dtype=dtype, full_towers=("vision",),
        target_modules=["q_proj", "out_proj"], backbone=backbone_config(dtype=dtype),
    )  # fmt: skip
    leaf = trainer.arena.engine.weights.detach().clone().requires_grad_()
    layout = trainer.arena.layout
    bind_arena(trainer.adapters, layout, leaf)
    batch = train.collate(train.grains(0)[0])
    inputs = {
        "input_ids": batch.input_ids, "pixel_values": batch.pixel_values, "token_type_ids": batch.token_type_ids,
    }  # fmt: skip
    model = trainer.backbone.module.eval()
    own = model(**inputs).logits
    for name in tower_modules(plain, "vision"):
        plain.get_submodule(name).requires_grad_(True)
    theirs = plain.eval()(**inputs).logits
    assert equal_bits(own, theirs)
    for logits in (own, theirs):
        logits.float().square().mean().backward()
    for entry, block in zip(layout.dense, layout.all_blocks[len(layout.blocks) :], strict=True):
        gradient = plain.get_submodule(entry.module).get_parameter(entry.part).grad.float()
        close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(block.of(leaf.grad).view(entry.own_shape), gradient, **close)
        assert bool(gradient.any()) or entry.module.endswith("k_proj")
    trainer.arena.engine.destroy()


class Counting(nn.LayerNorm):
    """A norm with state."""

    def __init__(self, size):
        super().__init__(size)
        self.calls = nn.Buffer(torch.zeros(()))


def test_a_tower_with_a_tensor_that_cannot_be_replaced_is_refused():
    vision = "model.vision_tower"
    model = tiny_paligemma()
    model.model.vision_tower.encoder.scale = nn.Parameter(torch.ones(3))
    message = rf"full=true: {vision}.encoder.scale is a tensor of a module that holds others \(SiglipEncoder\); use an"
    with pytest.raises(ValueError, match=message):
        tower_modules(model, "vision")
    model = tiny_paligemma()
    model.model.vision_tower.post_layernorm = Counting(32)
    with pytest.raises(ValueError, match=rf"{vision}.post_layernorm has state beside its parameters \(Counting\); use"):
        tower_modules(model, "vision")
    model = tiny_paligemma()
    first, second = model.model.vision_tower.encoder.layers
    first.mlp.fc1.weight = second.mlp.fc1.weight
    with pytest.raises(ValueError, match=rf"{vision}.encoder.layers.0.mlp.fc1.weight is another module's tensor as we"):
        tower_modules(model, "vision")


def test_heads_of_both_towers(config_of):
    """ARD-LoRA cuts SigLIP's out_proj and Gemma's grouped k and v by their own head counts."""
    shape = check_model(config_of(method="ard_lora", elalora=None, r=2))
    count = {m.rpartition(".")[2]: (h.count, h.side) for m, h in shape.heads.items() if "layers.0" in m}
    assert count == {
        "q_proj": (4, "out"), "k_proj": (2, "out"), "v_proj": (2, "out"), "out_proj": (4, "in"), "o_proj": (4, "in"),
    }  # fmt: skip
    vision = [h.count for m, h in shape.heads.items() if "vision" in m and m.endswith("k_proj")]
    assert vision == [4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "causal_lm"}, "task=causal_lm does not fit a model of type 'paligemma'; set task=image_text_to_text"),
        ({"method": "full", "elalora": None, "r": 8}, "method=full is not built for task=image_text_to_text"),
        ({"packing": True}, "packing=true is not built for task=image_text_to_text"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation=flash_attention_2 cannot draw a mask"),
        ({"max_length": 18}, None),
    ],
)
def test_refused(config_of, folder, settings, message):
    if message is None:
        config = config_of(**settings)
        with pytest.raises(ConfigError, match="max_length=18 leaves no room for text beside 16 tokens of the picture"):
            open_data(config, tokenizer_of(config))
        return
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)


def test_other_formats_and_models_are_refused(config_of, folder, tmp_path):
    files = {"train_file": str(folder / "train.jsonl"), "format": "text"}
    with pytest.raises(ConfigError, match="data.format=text does not go with task=image_text_to_text"):
        config_of(data=files)
    path = write_run(tmp_path, task="image_text_to_text")  # a Llama
    with pytest.raises(ConfigError, match="does not fit a model of type 'llama'; use one of paligemma"):
        prepare(path, [], world_size=1)


def test_image_processor_is_the_models_own_on_pillow(config_of, folder, tmp_path):
    processor = load_image_processor(ModelSource(str(folder / "model")))
    assert type(processor).__name__ == "SiglipImageProcessorPil"
    config = config_of(data={"train_file": str(folder / "train.jsonl"), "image_field": "photo"}, eval_steps=None)
    assert image_reader(config, tokenizer_of(config)).settings.field == "photo"
    with pytest.raises(ConfigError, match="train.jsonl:1: field 'photo' is missing"):
        open_data(config, tokenizer_of(config))
    shutil.copy(folder / "model" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no image processor"):
        load_image_processor(ModelSource(str(tmp_path)))


def test_ranks_cross_towers(data, world):
    """One budget over all towers: a plan that takes from the language tower and gives to the vision tower."""
    train, _ = data
    trainer = tiny_trainer(elalora(b=8, k=3), model=tiny_paligemma(), data=train, r=4, total_steps=60)
    start = {tower: sum(ranks) for tower, ranks in towers(trainer.arena.table).items()}
    moved = []
    for _ in range(22):
        trainer.train_step()
        moved.append({tower: sum(ranks) for tower, ranks in towers(trainer.arena.table).items()})
    assert all(sum(now.values()) == sum(start.values()) for now in moved)
    assert any(now["vision"] != start["vision"] and now["language"] != start["language"] for now in moved)
    trainer.arena.engine.destroy()


class PictureSetup(Setup):
    """test_ablation's, with pictures: adapters in three towers, the stack of layers is the language model's."""

    def __init__(self, data):
        super().__init__(3, model=tiny_paligemma(layers=2, vision_layers=1), r=1)
        self.data = FewGrains(data)


class FewGrains:
    def __init__(self, data):
        self.data = data

    def grains(self):
        return self.data.grains()[:2]

    def collate(self, grain):
        return self.data.collate(grain)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_ablation_with_pictures_equals_the_naive_loop(data, prefix_cache):
    setup = PictureSetup(data[1])
    cs, cs0 = setup.naive()
    got = setup.scores(ablations_per_forward=3, prefix_cache=prefix_cache)
    assert float((got.cs - cs).abs().max()) < TOLERANCE and abs(got.cs0 - cs0) < TOLERANCE
    assert float(cs.max() - cs.min()) > 1e-3
    vision = [i for i, s in enumerate(setup.table.sites) for _ in range(setup.table.ranks[i]) if s.tower == "vision"]
    assert vision and float(cs[: len(vision)].abs().max()) > 0.0


def trained(
    data, *, steps, resume=None, stage=0, dtype=torch.float32, checkpointing=False, quantization=None, full_towers=(),
    **zero,
):  # fmt: skip
    """Losses by step, the last table and a digest of weights and moments, of a run or what follows a snapshot."""
    model = tiny_paligemma(dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = tiny_trainer(
        elalora(init_warmup=1, mask_interval=2, final_warmup=2, total_steps=12, b=8, k=3),
        model=model, data=data, total_steps=12, start=resume is None, compute_dtype=dtype, dropout=0.1,
        quantization=quantization, backbone=backbone_config(stage=stage, dtype=dtype, **zero), full_towers=full_towers,
    )  # fmt: skip
    if resume is not None:
        snapshot, layout, state = resume
        trainer.arena.build(snapshot, layout)
        trainer.state = replace(state)
    losses = {}
    while trainer.state.step < steps:
        step = trainer.train_step()
        losses[step.step] = step.loss.hex()
    snapshot = trainer.arena.capture()
    kept = (snapshot, trainer.arena.layout, replace(trainer.state))
    gathered = trainer.backbone.gathered_parameters()
    trainer.arena.engine.destroy()
    trainer.backbone.destroy()
    assert gathered == 0
    return losses, weights_digest(snapshot), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_bits_sharded_offloaded_checkpointed_and_resumed(data, world, dtype):
    """Five resizes; the second run is cut in the middle and goes on under another stage."""
    train, _ = data
    losses, weights, _ = trained(train, steps=12, dtype=dtype)
    first, _, kept = trained(train, steps=5, dtype=dtype, stage=3, offload_param={"device": "cpu"})
    second, resumed, _ = trained(train, steps=12, dtype=dtype, resume=kept, stage=3, checkpointing=True)
    assert first | second == losses
    assert resumed == weights
    assert len({*losses.values()}) == 12


def test_equal_bits_with_vision_in_full(data, world):
    """As above; two resizes in the language tower are among the steps."""
    train, _ = data
    settings = {"dtype": torch.bfloat16, "full_towers": ("vision",)}
    losses, weights, kept = trained(train, steps=6, **settings)
    assert kept[1].num_trained > 20_000
    first, _, kept = trained(train, steps=3, **settings, stage=3, offload_param={"device": "cpu"}, checkpointing=True)
    second, resumed, _ = trained(train, steps=6, **settings, resume=kept, stage=3)
    assert first | second == losses
    assert resumed == weights


def test_equal_bits_where_linears_have_no_adapter(data, world, monkeypatch):
    """The vision tower's, with a bias, and the language model's, without one, in bfloat16; zero.Init leaves its
    F.linear behind, which a run with ZeRO 0 does not have."""
    train, dtype = data[0], torch.bfloat16
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)
    losses = []
    for stage in (0, 3):
        trainer = tiny_trainer(
            Lora(), model=tiny_paligemma(dtype=dtype), data=train, total_steps=12, compute_dtype=dtype,
            target_modules=["o_proj"], backbone=backbone_config(stage=stage, dtype=dtype),
        )  # fmt: skip
        losses.append([trainer.train_step().loss.hex() for _ in range(2)])
        trainer.arena.engine.destroy()
        trainer.backbone.destroy()
    assert losses[0] == losses[1]


def test_equal_bits_on_a_quantised_base(data, world):
    """Of all three towers; the first resize is among the steps."""
    train, _ = data
    losses, weights, _ = trained(train, steps=4, quantization="nf4")
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "checkpointing": True}
    again = trained(train, steps=4, quantization="nf4", **zero)
    assert again[:2] == (losses, weights)


def test_rehearsal_has_two_layers_of_each_tower_and_the_image_processor(config_of, tmp_path):
    config = config_of()
    write_base(config, tmp_path / "base", compute_dtype="fp32", num_labels=None)
    source = ModelSource(str(tmp_path / "base"))
    model = load_model(source, compute_dtype="fp32").model
    assert len(model.language_model.layers) == len(model.vision_tower.encoder.layers) == 2
    assert model.config.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert (
        load_image_processor(source).to_dict() == load_image_processor(ModelSource(config.model_name_or_path)).to_dict()
    )
