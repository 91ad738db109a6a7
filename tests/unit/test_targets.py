import pytest
from torch import nn

from ardtrain.targets import linear_modules, make_sites, select_modules
from tests.tiny import sites_of_model, tiny_llama


def test_all_linear_is_every_linear_but_the_output_in_base_order():
    sites, ranks = sites_of_model(tiny_llama())
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert [s.name for s in sites] == [f"model.layers.{i}.{p}" for i in range(2) for p in parts]
    assert ranks == [4] * 14
    assert {s.scaling for s in sites} == {2.0}
    assert (sites[1].in_features, sites[1].out_features) == (32, 16)
    assert (sites[6].in_features, sites[6].out_features) == (64, 32)


@pytest.mark.parametrize(
    ("target", "exclude", "wanted"),
    [
        (["v_proj", "q_proj"], None, ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj"]),
        (r".*layers\.1\..*(up|down)_proj", None, ["1.mlp.up_proj", "1.mlp.down_proj"]),
        (["layers.0.mlp.up_proj"], None, ["0.mlp.up_proj"]),
        ("all-linear", [r".*layers\.0\..*", "up_proj", "self_attn.q_proj"], ["1.self_attn.k_proj"]),
        (["q_proj"], "layers.0.self_attn.q_proj", ["1.self_attn.q_proj"]),
    ],
)
def test_targets_by_pefts_rules(target, exclude, wanted):
    linears = linear_modules(tiny_llama(), skip=["lm_head"])
    names = select_modules(linears, target_modules=target, exclude_modules=exclude)
    assert [n.removeprefix("model.layers.") for n in names[: len(wanted)]] == wanted


def test_a_suffix_is_whole_path_parts():
    linears = {"a.xq_proj": nn.Linear(2, 2), "a.q_proj": nn.Linear(2, 2)}
    assert select_modules(linears, target_modules=["q_proj"]) == ["a.q_proj"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"target_modules": ["q_proj", "k_prj"]},
            "target_modules='k_prj' matches no linear layer of the model; did you mean 'k_proj'. the model has "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or use all-linear",
        ),
        ({"target_modules": "q_proj"}, "target_modules='q_proj' matches no linear layer"),  # a regex of whole paths
        ({"target_modules": ["lm_head"]}, "target_modules='lm_head' matches no linear layer"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
            r"exclude_modules=\['self_attn.q_proj'\] removes every module that target_modules=\['q_proj'\] names",
        ),
        (
            {"r": 17},
            r"r=17 exceeds model.layers.0.self_attn.k_proj \(32 inputs, 16 outputs; rank at most 16\); lower r or drop "
            "k_proj from target_modules",
        ),
        (
            {"tower_settings": {"vision": (4, 8.0)}},
            "targets.vision names a tower that has no targeted module; this model's towers are language",
        ),
    ],
)
def test_bad_targets_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        sites_of_model(tiny_llama(), **change)


def test_tower_settings_override_rank_and_scale():
    linears = {"vision_tower.q": nn.Linear(8, 8), "lm.q": nn.Linear(8, 8)}
    towers = {"vision_tower.q": "vision", "lm.q": "language"}
    sites, ranks = make_sites(
        linears, list(linears), r=4, lora_alpha=4.0, tower_of=towers, tower_settings={"vision": (2, 8.0)}
    )
    assert ranks == [2, 4]
    assert [s.scaling for s in sites] == [4.0, 1.0]
    assert [s.tower for s in sites] == ["vision", "language"]
