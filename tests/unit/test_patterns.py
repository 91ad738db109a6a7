import pytest
from torch import nn

from ardtrain.config import ConfigError, parse_config
from ardtrain.patterns import by_pattern, refuse_unused
from ardtrain.targets import make_sites

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.down_proj"


def config_of(**settings):
    base = {"model_name_or_path": "m", "method": "lora", "output_dir": "o", "data": {"train_file": "a.jsonl"}}
    return parse_config(base | settings)


@pytest.mark.parametrize("key", [Q, "q_proj", "layers.1.self_attn.q_proj", r".*\.1\.self_attn\..*", "q_proj|k_proj"])
def test_a_key_names_a_path_an_ending_or_a_regular_expression(key):
    assert by_pattern({key: 3}, Q, 8) == 3
    assert by_pattern({key: 3}, DOWN, 8) == 8


def test_an_ending_begins_at_a_part_of_the_path():
    assert by_pattern({"proj": 3, "1.mlp.down_proj": 4}, DOWN, 8) == 8


def test_the_first_key_that_fits_counts():
    assert by_pattern({"mlp.down_proj": 3, "down_proj": 4}, DOWN, 8) == 3


def sites_and_ranks(r=8, **patterns):
    linears = {Q: nn.Linear(32, 32), DOWN: nn.Linear(64, 32)}
    towers = dict.fromkeys(linears, "language")
    return make_sites(linears, list(linears), r=r, lora_alpha=16.0, tower_of=towers, tower_settings={}, **patterns)


def test_ranks_and_scales():
    """A rank alone leaves alpha, 16 here; alpha alone leaves the rank."""
    sites, ranks = sites_and_ranks(rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 4.0})
    assert (ranks, [s.scaling for s in sites]) == ([4, 8], [4.0, 0.5])
    assert [s.module for s in sites] == [Q, DOWN]


def test_without_patterns_nothing_changes():
    sites, ranks = sites_and_ranks()
    assert (ranks, [s.scaling for s in sites]) == ([8, 8], [2.0, 2.0])


def test_a_module_with_a_rank_of_its_own_may_be_too_small_for_r():
    """The rule is for the rank that a module gets."""
    _, ranks = sites_and_ranks(r=40, rank_pattern={"q_proj": 4, "down_proj": 32})
    assert ranks == [4, 32]
    with pytest.raises(ValueError, match=f"r=33 exceeds {Q} .*; rank at most 32.*; lower r .* in rank_pattern"):
        sites_and_ranks(rank_pattern={"q_proj": 33})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"v_proj": 4}, "rank_pattern names v_proj, and no adapted module's path ends so"),
        ({"proj": 4}, "rank_pattern names proj, and no adapted module's path ends so"),
        ({"(": 3}, "is no regular expression"),
    ],
)
def test_a_key_that_names_no_module_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        refuse_unused(pattern, [Q, DOWN], setting="rank_pattern")
    refuse_unused({"q_proj": 4}, [Q, DOWN], setting="rank_pattern")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj=0 must be greater than or equal to 1"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj=0 must be greater than 0"),
        ({"rank_pattern": {"*": 4}}, "rank_pattern names *, which is no regular expression"),
        ({"rank_pattern": {"q_proj": 4}, "init_from": "a"}, "rank_pattern stands beside init_from=a"),
        ({"rank_pattern": {"q_proj": 4}, "ranks_from": "a"}, "rank_pattern stands beside ranks_from=a"),
        ({"init_from": "b", "ranks_from": "a"}, "init_from stands beside ranks_from=a"),
        (
            {"ranks_from": "a", "method": "ard_lora"},
            "ranks_from=a starts whole matrices and does not fit method=ard_lora",
        ),
        ({"ranks_from": "a", "method": "full"}, "ranks_from=a starts whole matrices and does not fit method=full"),
        ({"rank_pattern": {"q_proj": 4}, "method": "full"}, "rank_pattern has no meaning for method=full"),
    ],
)
def test_what_the_config_refuses(settings, message):
    with pytest.raises(ConfigError) as raised:
        config_of(**settings)
    assert any(message in line for line in raised.value.errors), raised.value.errors


def test_methods_start_from_the_largest_rank_they_are_given():
    elalora = {"init_warmup": 2, "final_warmup": 2, "mask_interval": 2}
    assert config_of(method="elalora", elalora=elalora, r=1, rank_pattern={"q_proj": 4}).r == 1
    adalora = {"target_r": 4, "tinit": 1, "tfinal": 1}
    assert config_of(method="adalora", adalora=adalora, r=2, rank_pattern={"q_proj": 8}).r == 2
