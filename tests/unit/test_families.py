"""Each family that users bring, on tiny random models of the real classes: adapters' places, start, export."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FuyuConfig

from ardtrain.backbones import ModelSource, auto_class, meta_model
from ardtrain.config import ConfigError
from ardtrain.engines import AdamSettings
from ardtrain.engines_full import FullEngine
from ardtrain.evaluation import loss_sum
from ardtrain.export import compare_with_peft, write_peft
from ardtrain.full import FullTrainer, write_model
from ardtrain.planning.hardware import machine_of
from ardtrain.planning.plan import make_plan
from ardtrain.preflight import prepare_config, read_run_config
from ardtrain.targets import head_linears, never_run, stacked_experts, without_adapter
from tests.distributed.test_families import MOVING
from tests.families import (
    FAMILIES,
    METHODS,
    adapter_json,
    as_classifier,
    batches,
    build_model,
    family_trainer,
    heads_of,
    inputs_of,
    trained_logits,
)
from tests.runs import write_run
from tests.tiny import CPU, LOOP, equal_bits, sites_of_model
from tests.tiny_paligemma import letter_tokenizer
from tests.unit.test_full import full_config

REPOSITORY = Path(__file__).resolve().parents[2]
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
each_method = pytest.mark.parametrize("method", METHODS)


def all_linear(model, r=2):
    sites, _ = sites_of_model(model, r=r, lora_alpha=4.0)
    return sites


def linears_that_get_a_gradient(family):
    """Paths of all linears, heads and towers among them, whose weight moves the loss of one grain."""
    model = build_model(family)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    loss_sum(model, batches(family).collate((0, 0)), device=CPU).backward()
    return {n for n, m in linears.items() if m.weight.grad is not None and bool(m.weight.grad.any())}, set(linears)


@each_family
def test_all_linear_is_what_runs_without_the_heads(family, record, tmp_path):
    """Adapters sit on every linear that moves the loss; not on the output embedding, nor a classification head."""
    model = build_model(family)
    names = {site.module for site in all_linear(model)}
    moving, every = linears_that_get_a_gradient(family)
    output = {n for n, m in model.named_modules() if m is model.get_output_embeddings()}
    assert names == moving - output - set(head_linears(model))
    assert names == family.sites
    assert tuple(head_linears(model)) == family.head
    assert tuple(never_run(model)) == family.left_out
    assert all(name.startswith(tuple(f"{m}." for m in family.left_out)) for name in every - moving)
    config = family.config()
    config.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    assert {s.module for s in all_linear(meta_model(source, num_labels=family.num_labels))} == names
    record(
        family, model=type(model).__name__, adapters=len(names), head=list(head_linears(model)),
        left_out=never_run(model), stacked_experts=list(stacked_experts(model)),
    )  # fmt: skip


@each_family
def test_heads_of_attention(family, record):
    """Grouped and fused matrices too; DeBERTa's in_proj holds q, k and v of a head side by side."""
    model = build_model(family)
    wanted = {f"{family.stack}.{i}.{name}": cut for i in range(2) for name, cut in family.heads.items()}
    found = heads_of(family, model, all_linear(model))
    assert {name: cut for name, cut in found.items() if "vision" not in name} == wanted
    first = {n: cut for n, cut in found.items() if n.startswith(f"{family.stack}.0.")}
    record(family, heads={n.rpartition(".")[2]: [cut.count, cut.side] for n, cut in first.items()})


def test_texts_of_a_pair_are_told_apart():
    """Token types reach the models whose tokenizer gives them; RoBERTa's gives none."""
    for family in (f for f in FAMILIES.values() if f.kind == "classes"):
        inputs = inputs_of(family)
        assert ("token_type_ids" in inputs) is family.typed and "position_ids" not in inputs
        if family.typed:
            model, one_text = build_model(family), inputs | {"token_type_ids": 0 * inputs["token_type_ids"]}
            with torch.no_grad():
                assert float((model(**inputs).logits - model(**one_text).logits).abs().max()) > 0.01


def test_stacked_experts_take_no_adapter_and_this_is_said():
    model = build_model(FAMILIES["Mixtral"])
    assert set(stacked_experts(model).values()) == {(4, 96, 32), (4, 32, 48)}
    assert without_adapter(model) == [
        "no adapter on the experts: their weights are stacked (model.layers.0.mlp.experts.gate_up_proj [4, 96, 32]) "
        "and no linear layers; 36,864 numbers stay as they are"
    ]
    for target in (["down_proj"], ["q_proj", "w1"], ["experts"], r".*mlp.*"):
        with pytest.raises(ValueError, match=r"matches no linear layer .*Experts' weights are stacked in this model"):
            sites_of_model(model, target, r=2, lora_alpha=4.0)
    assert without_adapter(build_model(FAMILIES["Llama"])) == []
    assert without_adapter(build_model(FAMILIES["Gemma-3 with a vision tower, on text"])) == [
        "no adapter on model.vision_tower: the model's forward does not use it for such rows"
    ]


def test_a_lone_linear_beside_the_decoder_is_left_out_as_well():
    """Fuyu's projection of picture patches, on text."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FuyuConfig())
    assert never_run(model) == ["model.vision_embed_tokens"]


def config_of(folder, family, **settings):
    """A run's config over the family's config.json; no weights, one row."""
    family.config().save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (folder / "dev.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    return read_run_config(write_run(folder, **settings), [], world_size=1)[0]


def test_a_run_says_what_gets_no_adapter(tmp_path):
    found = prepare_config(config_of(tmp_path, FAMILIES["Mixtral"]), ["first"], world_size=1).notes
    assert found[0] == "first" and found[1].startswith("no adapter on the experts: their weights are stacked")


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.kind != "pictures"], ids=lambda f: f.name)
def test_a_plan_is_made_of_config_json(family, tmp_path):
    """In float32, for which torch has no grouped product on the meta device (experts)."""
    settings = {}
    if family.kind == "classes":
        data = {"train_file": str(tmp_path / "train.jsonl"), "eval_file": str(tmp_path / "dev.jsonl")}
        settings = {"task": "sequence_classification", "data": data | {"label_names": ["a", "b", "c"]}}
    plan = make_plan(config_of(tmp_path, family, **settings), machine_of("h100", gpus=1, nodes=None))
    adapters = {s.module for s in plan.shapes.shape.table.sites}
    assert adapters == family.sites and plan.memory.device_bytes > 4 * plan.shapes.shape.num_base
    settings |= {"method": "full", "elalora": None, "r": None, "lora_dropout": None}
    full = make_plan(config_of(tmp_path, family, **settings), machine_of("h100", gpus=1, nodes=None))
    assert full.memory.device_bytes > 16 * full.shapes.shape.num_base


def test_heads_in_one_matrix_cannot_be_tied_to_those_of_another(tmp_path):
    settings = {"method": "ard_lora", "elalora": None, "r": 2}
    config = config_of(tmp_path, FAMILIES["Phi-3"], **settings)
    assert {cut.count for cut in prepare_config(config, world_size=1).shape.heads.values()} == {8, 4}
    tied = config_of(tmp_path, FAMILIES["Phi-3"], **settings, ard_lora={"tie": "head"})
    with pytest.raises(ConfigError, match=r"tie=head cannot tell .*qkv_proj.*set ard_lora.tie=none, matrix or layer"):
        prepare_config(tied, world_size=1)


@each_family
@each_method
def test_the_start_is_the_bases_to_the_bit(family, method, world, record):
    inputs = inputs_of(family)
    with torch.no_grad():
        base = build_model(family)(**inputs).logits
    trainer = family_trainer(family, method)
    logits, _ = trained_logits(trainer, inputs)
    assert float(base.std()) > 0.1
    assert equal_bits(logits, base)
    record(family, method, start=float((logits - base).abs().max()))
    trainer.arena.engine.destroy()


@each_family
@each_method
def test_peft_reads_what_was_trained(family, method, world, tmp_path, record):
    """After real steps and, where the method has them, resizes."""
    trainer, inputs = family_trainer(family, method, num_grains=1), inputs_of(family)
    first = trainer.arena.table.digest
    for _ in range(8):
        trainer.train_step()
    moves = trainer.method.needs.ranks and method != "adalora"
    assert (trainer.arena.table.digest != first) is moves
    logits, gates = trained_logits(trainer, inputs)
    with torch.no_grad():
        base = build_model(family)(**inputs).logits
    assert float((base - logits).abs().max()) > 0.01
    arena, model = trainer.arena, build_model(family)
    heads = heads_of(family, model, all_linear(model)) if method.startswith("ard") else {}
    write_peft(tmp_path, arena.engine.weights, arena.layout, adapter_json(family, trainer), heads=heads, gates=gates)
    difference, largest = compare_with_peft(tmp_path, model, inputs, logits), float(logits.abs().max())
    assert difference <= 1e-5 * max(1.0, largest)
    record(family, method, export=difference, largest_logit=largest)
    arena.engine.destroy()


@pytest.mark.parametrize(
    "family", [as_classifier(f) for f in FAMILIES.values() if f.kind == "text"], ids=lambda f: f.name
)
def test_decoders_are_classifiers_too(family, world, tmp_path):
    """Their `score` is trained in full; adapters sit where they sit in the language model."""
    trainer, inputs = family_trainer(family, "elalora", num_grains=1), inputs_of(family)
    assert {site.module for site in trainer.first_table.sites} == family.sites
    moving, _ = linears_that_get_a_gradient(family)
    assert moving - family.sites == {"score"}
    logits, _ = trained_logits(trainer, inputs)
    with torch.no_grad():
        assert equal_bits(logits, build_model(family)(**inputs).logits)
    for _ in range(6):
        trainer.train_step()
    assert trainer.state.events >= 2
    logits, _ = trained_logits(trainer, inputs)
    write_peft(tmp_path, trainer.arena.engine.weights, trainer.arena.layout, adapter_json(family, trainer))
    difference = compare_with_peft(tmp_path, build_model(family), inputs, logits)
    assert difference <= 1e-5 * max(1.0, float(logits.abs().max()))
    trainer.arena.engine.destroy()


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.kind != "pictures"], ids=lambda f: f.name)
def test_a_model_trained_in_full_reads_back_to_the_bit(family, world, tmp_path, record):
    """Two steps of every weight; `full` is refused for rows with pictures."""
    model, inputs = build_model(family).requires_grad_(True), inputs_of(family)
    with torch.no_grad():
        before = model(**inputs).logits
    engine = FullEngine(model, config=full_config(2), adam=AdamSettings(), device=CPU)
    trainer = FullTrainer(replace(LOOP, total_steps=2), world, engine, data=batches(family))
    engine.module.train()
    for _ in range(2):
        trainer.train_step()
    with torch.no_grad():
        logits = engine.module.eval()(**inputs).logits
    write_model(tmp_path, engine.module, engine.full_state_dict(), letter_tokenizer())
    again = auto_class(model.config, family.num_labels).from_pretrained(tmp_path).eval()
    again.config.use_cache = False
    with torch.no_grad():
        read = again(**inputs).logits
    assert equal_bits(read, logits) and float((logits - before).abs().max()) > 1e-3
    record(family, "full", export=float((read - logits).abs().max()), largest_logit=float(logits.abs().max()))
    engine.destroy()


# ---- the page ----

RESULTS = REPOSITORY / "benchmarks" / "results" / "families.json"


def test_page_is_made_of_the_results_of_all_families():
    spec = importlib.util.spec_from_file_location("generate_families", REPOSITORY / "docs" / "generate_families.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.render() == (REPOSITORY / "docs" / "families.md").read_text(), "run: python docs/generate_families.py"
    found = json.loads(RESULTS.read_text())["families"]
    assert list(found) == list(FAMILIES)
    for name, family in FAMILIES.items():
        own = found[name]["methods"]
        assert set(own) == {*METHODS} | ({"full"} if family.kind != "pictures" else set())
        assert all(method["start"] == 0.0 for key, method in own.items() if key != "full")
        assert all(method["export"] <= 1e-5 * max(1.0, method["largest_logit"]) for method in own.values())
        assert all(own[method]["equal_bits_on"] == [1, 2, 3] for method in MOVING)
