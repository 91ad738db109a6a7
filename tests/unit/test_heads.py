"""Which part of a matrix belongs to which head, and sites that are heads (methods.md 1.3, H1, H12, H13)."""

from types import SimpleNamespace

import pytest

from ardtrain.heads import Heads, find_heads, refuse_fused, split_heads
from ardtrain.ranks import RankTable, Site
from tests.tiny import sites_of_model, tiny_llama

LLAMA = {"language": SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)}


def site(module, inputs=64, outputs=64, tower="language"):
    return Site(module, module, inputs, outputs, scaling=2.0, tower=tower)


def llama_sites(r=2):
    model = tiny_llama()
    sites, ranks = sites_of_model(model, r=r)
    return model, sites, ranks


def test_heads_of_a_llama():
    """4 query heads, 2 key and value heads, none in the feed-forward part."""
    model, sites, _ = llama_sites()
    heads = find_heads(sites, {"language": model.config})
    wanted = {"q_proj": Heads(4, "out"), "k_proj": Heads(2, "out"), "v_proj": Heads(2, "out"), "o_proj": Heads(4, "in")}
    assert heads == {f"model.layers.{i}.self_attn.{n}": h for i in range(2) for n, h in wanted.items()}


def test_pseudo_heads_of_the_feed_forward_part():
    model, sites, _ = llama_sites()
    heads = find_heads(sites, {"language": model.config}, mlp_heads=8)
    assert {n: heads[f"model.layers.0.mlp.{n}"] for n in ("gate_proj", "up_proj", "down_proj")} == {
        "gate_proj": Heads(8, "out"),
        "up_proj": Heads(8, "out"),
        "down_proj": Heads(8, "in"),
    }
    assert heads["model.layers.0.self_attn.q_proj"] == Heads(4, "out")


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("bert.encoder.layer.0.attention.self.query", Heads(12, "out")),
        ("bert.encoder.layer.0.attention.self.value", Heads(12, "out")),
        ("bert.encoder.layer.0.attention.output.dense", Heads(12, "in")),
        ("bert.encoder.layer.0.intermediate.dense", Heads(6, "out")),
        ("bert.encoder.layer.0.output.dense", Heads(6, "in")),
        ("vision_model.encoder.layers.3.self_attn.out_proj", Heads(12, "in")),
        ("vision_model.encoder.layers.3.mlp.fc2", Heads(6, "in")),
        ("distilbert.transformer.layer.0.attention.q_lin", Heads(12, "out")),
    ],
)
def test_heads_by_the_names_of_other_families(module, wanted):
    """No num_key_value_heads: as many as there are query heads. attention.output.dense is no feed-forward matrix."""
    configs = {"language": SimpleNamespace(num_attention_heads=12)}
    assert find_heads([site(module, 96, 96)], configs, mlp_heads=6) == {module: wanted}


def test_fused_matrices():
    """q's 8 heads, then k's and v's 2; gate and up have as many pseudo-heads each as down."""
    sites = [
        site("m.0.self_attn.qkv_proj", 64, 96),
        site("m.0.mlp.gate_up_proj", 64, 96),
        site("m.0.mlp.down_proj", 48),
    ]
    assert find_heads(sites, LLAMA, mlp_heads=3) == {
        "m.0.self_attn.qkv_proj": Heads(12, "out"),
        "m.0.mlp.gate_up_proj": Heads(6, "out"),
        "m.0.mlp.down_proj": Heads(3, "in"),
    }
    refuse_fused(["m.0.self_attn.q_proj", "m.0.self_attn.o_proj"])
    with pytest.raises(ValueError, match="ard_lora.tie=head cannot tell which heads of m.0.self_attn.qkv_proj belong"):
        refuse_fused(["m.0.self_attn.o_proj", "m.0.self_attn.qkv_proj"])


def test_a_name_must_end_there_as_a_whole():
    assert find_heads([site("m.0.xq_proj"), site("m.0.q_proj_extra"), site("m.0.key_embed")], LLAMA) == {}


def test_each_tower_has_its_own_counts():
    configs = {**LLAMA, "vision": SimpleNamespace(num_attention_heads=4, num_key_value_heads=None)}
    heads = find_heads([site("a.0.k_proj"), site("v.0.k_proj", tower="vision")], configs)
    assert heads == {"a.0.k_proj": Heads(2, "out"), "v.0.k_proj": Heads(4, "out")}


def test_a_tower_without_head_counts_has_no_heads():
    assert find_heads([site("p.0.q_proj", tower="projector")], {"projector": SimpleNamespace()}) == {}


def test_chosen_modules_alone_are_cut():
    sites = [site(f"m.0.{n}") for n in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")]
    assert find_heads(sites, LLAMA, chosen=["q_proj", "0.o_proj"]) == {
        "m.0.q_proj": Heads(8, "out"),
        "m.0.o_proj": Heads(8, "in"),
    }
    assert find_heads(sites, LLAMA, mlp_heads=4, chosen=["up_proj"]) == {"m.0.up_proj": Heads(4, "out")}


def test_a_chosen_matrix_without_heads_is_refused():
    for settings in ({}, {"mlp_heads": 1}):
        with pytest.raises(
            ValueError, match="ard_lora.head_modules names m.0.up_proj, a matrix without heads; leave it"
        ):
            find_heads([site("m.0.q_proj"), site("m.0.up_proj")], LLAMA, chosen=["q_proj", "up_proj"], **settings)
    with pytest.raises(ValueError, match="ard_lora.head_modules names m.0.router, a matrix without heads"):
        find_heads([site("m.0.router")], LLAMA, mlp_heads=4, chosen=["router"])


@pytest.mark.parametrize(
    ("module", "inputs", "outputs", "settings", "text"),
    [
        (
            "m.0.q_proj",
            64,
            60,
            {},
            "the model's head count=8 does not divide m.0.q_proj's 60 outputs; choose a divisor",
        ),
        ("m.0.v_proj", 64, 33, {}, "the model's head count=2 does not divide m.0.v_proj's 33 outputs"),
        ("m.0.o_proj", 60, 64, {}, "the model's head count=8 does not divide m.0.o_proj's 60 inputs"),
        ("m.0.up_proj", 64, 100, {"mlp_heads": 3}, "ard_lora.mlp_heads=3 does not divide m.0.up_proj's 100 outputs"),
        ("m.0.down_proj", 100, 64, {"mlp_heads": 3}, "ard_lora.mlp_heads=3 does not divide m.0.down.* 100 inputs"),
        (
            "m.0.attention.output.dense",
            60,
            64,
            {"mlp_heads": 3},
            "the model's head count=8 does not divide",
        ),
    ],
)
def test_a_count_that_does_not_divide_is_refused(module, inputs, outputs, settings, text):
    with pytest.raises(ValueError, match=text):
        find_heads([site(module, inputs, outputs)], LLAMA, **settings)


# ---- sites that are heads ----


def test_split_cuts_rows_or_columns():
    sites = [site("m.0.q_proj", 40, 64), site("m.0.o_proj", 64, 40), site("m.0.up_proj", 40, 100)]
    heads = {"m.0.q_proj": Heads(4, "out"), "m.0.o_proj": Heads(2, "in")}
    out, ranks = split_heads(sites, [3, 5, 7], heads)
    assert ranks == [3, 3, 3, 3, 5, 5, 7]
    assert [(s.name, s.module, s.kind, s.head, s.start, s.in_features, s.out_features) for s in out] == [
        ("m.0.q_proj:head.0", "m.0.q_proj", "head", 0, 0, 40, 16),
        ("m.0.q_proj:head.1", "m.0.q_proj", "head", 1, 16, 40, 16),
        ("m.0.q_proj:head.2", "m.0.q_proj", "head", 2, 32, 40, 16),
        ("m.0.q_proj:head.3", "m.0.q_proj", "head", 3, 48, 40, 16),
        ("m.0.o_proj:head.0", "m.0.o_proj", "head", 0, 0, 32, 40),
        ("m.0.o_proj:head.1", "m.0.o_proj", "head", 1, 32, 32, 40),
        ("m.0.up_proj", "m.0.up_proj", "matrix", None, 0, 40, 100),
    ]
    assert {(s.scaling, s.tower) for s in out} == {(2.0, "language")}
    assert out[-1] is sites[-1]


def test_ten_heads_and_more_stand_by_number_not_by_text():
    out, _ = split_heads([site("m.0.q_proj", 64, 96)], [1], {"m.0.q_proj": Heads(12, "out")})
    assert [s.head for s in out] == list(range(12))
    assert [s.start for s in out] == [8 * h for h in range(12)]
    table = RankTable.start(out, [1] * 12)
    assert RankTable.from_json(table.to_json(), tuple(out)) == table


def test_a_rank_that_no_head_can_use_is_refused():
    """A head of q can have rank 8 at most: the number of its outputs."""
    for module, cut, shape in (("m.q_proj", Heads(8, "out"), (64, 64)), ("m.o_proj", Heads(8, "in"), (64, 64))):
        split_heads([site(module, *shape)], [8], {module: cut})
        text = rf"r=9 exceeds a head of {module} \(.*rank at most 8\); lower r, or set ard_lora.layout=shared_a"
        with pytest.raises(ValueError, match=text):
            split_heads([site(module, *shape)], [9], {module: cut})


def test_parameters_of_the_layouts():
    """methods.md 1.2: own A and B of each head cost H (d + d_h) a rank, ordinary LoRA d + d."""
    whole = site("m.0.q_proj", 64, 64)
    out, _ = split_heads([whole], [1], {"m.0.q_proj": Heads(8, "out")})
    assert sum(s.in_features + s.out_features for s in out) == 8 * (64 + 8)
    assert whole.in_features + whole.out_features == 128
