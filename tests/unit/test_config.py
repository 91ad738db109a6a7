"""The config: what is read, what is refused, and with which words."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from ardtrain import schedule
from ardtrain.config import (
    ALIASES,
    METHODS,
    AloraBlock,
    ArdLoraBlock,
    ConfigError,
    RunConfig,
    accumulation_steps,
    adapter_settings,
    alora_steps,
    ard_lora_warmups,
    check_schedule,
    dump_config,
    load_config,
    num_warmup_steps,
    parse_config,
    schedule_errors,
    updated,
    with_batch,
)

BASE = {"model_name_or_path": "m", "output_dir": "out", "method": "lora", "data": {"train_file": "a.jsonl"}}
ELALORA = {"init_warmup": 10, "final_warmup": 20, "mask_interval": 5}


def config_of(**settings) -> RunConfig:
    return parse_config(BASE | settings)


def lines_of(**settings) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_of(**settings)
    return caught.value.errors


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\nmethod: lora\ndata: {train_file: a.jsonl}\n" + text)
    return path


def test_defaults_that_follow_other_settings():
    config = config_of(r=4, per_device_train_batch_size=2)
    assert (config.lora_alpha, config.per_device_eval_batch_size, config.num_train_epochs) == (8.0, 2, 3.0)
    assert config_of(max_steps=5).num_train_epochs is None
    assert config_of(data={"train_file": ["a", "b"]}).data.train_file == ("a", "b")
    assert config.data.train_file == ("a.jsonl",)
    assert config_of(preemption_signal="SIGTERM").preemption_signal == ("SIGTERM",)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E4", 1e4), ("1.5e-3", 1.5e-3), ("5e+2", 500.0), (".5", 0.5), ("3", 3), ("1.", 1.0)],
)
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text, value):
    assert load_config(write(tmp_path, f"learning_rate: {text}\n")).learning_rate == value
    assert load_config(write(tmp_path, ""), [f"learning_rate={text}"]).learning_rate == value


@pytest.mark.parametrize("text", ["main", "v1.2", "e4", "1e", "2024-01-01", "1e4f", "1-4"])
def test_text_that_resembles_a_number_stays_text(tmp_path, text):
    assert load_config(write(tmp_path, f"revision: {text}\n")).revision == text


def test_number_where_text_is_needed_asks_for_quotes(tmp_path):
    with pytest.raises(ConfigError, match="^revision=12000000.0 must be a valid string; put it in quotes$"):
        load_config(write(tmp_path, "revision: 12e6\n"))
    assert load_config(write(tmp_path, "revision: '12e6'\n")).revision == "12e6"


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.eps=1e-6", "max_steps=7"],
        ["--optimizer.eps", "1e-6", "--max_steps", "7"],
        ["--optimizer.eps=1e-6", "--max-steps=7"],
        ["max_steps=1", "optimizer={eps: 1e-6}", "max_steps=7"],
    ],
)
def test_overrides_win_over_the_file(tmp_path, overrides):
    config = load_config(write(tmp_path, "max_steps: 3\noptimizer: {weight_decay: 0.1}\n"), overrides)
    assert (config.optimizer.eps, config.max_steps, config.optimizer.weight_decay) == (1e-6, 7, 0.1)


def test_override_with_an_alias_wins_over_the_name_in_the_file(tmp_path):
    assert load_config(write(tmp_path, "r: 4\n"), ["lora_rank=16"]).r == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--bf16"], "override bf16 has no value; write bf16=value"),
        (["--bf16", "--fp16=true"], "override bf16 has no value"),
        (["max_steps"], "override max_steps has no value"),
        (["a..b=1"], "override 'a..b' names no setting"),
        (["r=[1"], "^override r line 1: "),
    ],
)
def test_malformed_overrides(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, ""), overrides)


def test_unknown_keys_name_the_nearest_and_all_are_reported():
    lines = lines_of(
        learning_rte=1,
        optimizer={"beta": 1},
        weight_decay=0.1,
        targets={"vision": {"rr": 2}},
        zzz=1,
        max_steps=0,
        tinit=3,
    )
    assert "learning_rte is no setting; did you mean learning_rate?" in lines
    assert "optimizer.beta is no setting; did you mean optimizer.betas?" in lines
    assert "weight_decay is no setting; write optimizer.weight_decay" in lines
    assert "targets.vision.rr is no setting; did you mean targets.vision.r?" in lines
    assert any(line.startswith("zzz is no setting; remove it (known here: schema_version, ") for line in lines)
    assert any(line.startswith("max_steps=0 must be greater than or equal to 1 (Optimizer steps;") for line in lines)
    assert len(lines) == 7


def test_misspelled_alias_suggests_our_name():
    assert lines_of(cutof_len=4) == ["cutof_len is no setting; did you mean max_length?"]


ALIAS_VALUES = {
    "method": "lora",
    "lr_scheduler_type": "cosine",
    "packing": True,
    "lora_dropout": 0.5,
    "learning_rate": 0.5,
}
ALIAS_VALUES |= dict.fromkeys(("model_name_or_path", "revision", "tokenizer_name_or_path", "target_modules"), "x")
ALIAS_VALUES |= {"exclude_modules": "x", "quantization": "nf4"}


@pytest.mark.parametrize(("alias", "name"), ALIASES[""].items())
def test_alias_means_the_setting_and_not_both(alias, name):
    value = ALIAS_VALUES.get(name, 3)
    raw = {key: other for key, other in BASE.items() if key != name} | {alias: value}
    expected = ("x",) if alias == "lora_target" else value
    assert getattr(parse_config(raw), name) == expected
    with pytest.raises(ConfigError, match=f"{alias} and {name} are the same setting; keep one"):
        parse_config({name: value} | raw)


def test_aliases_inside_blocks():
    block = {"tinit": 1, "tfinal": 2, "deltaT": 3, "orth_reg_weight": 0.5}
    elalora = config_of(method="elalora", elalora=block).elalora
    assert (elalora.init_warmup, elalora.final_warmup, elalora.mask_interval, elalora.reg_orth_coef) == (1, 2, 3, 0.5)
    assert config_of(targets={"vision": {"lora_r": 2}}).targets["vision"].r == 2
    lines = lines_of(method="elalora", elalora=block | {"init_warmup": 1})
    assert lines == ["elalora.init_warmup and elalora.tinit are the same setting; keep one of them"]


@pytest.mark.parametrize(("value", "meaning"), [("all", "all-linear"), ("q_proj, v_proj", ("q_proj", "v_proj"))])
def test_llamafactory_target_values(value, meaning):
    assert config_of(lora_target=value).target_modules == meaning


@pytest.mark.parametrize(
    ("given", "meaning"),
    [
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_8bit": False, "load_in_4bit": True}, "nf4"),
        ({"load_in_8bit": False, "load_in_4bit": False}, None),
        ({"quantization_bit": 8}, "int8"),
        ({"quantization_bit": 4}, "nf4"),
        ({"quantization_bit": None}, None),
        ({}, None),
    ],
)
def test_other_trainers_words_for_a_quantised_base(given, meaning):
    assert config_of(**given).quantization == meaning


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"quantization_bit": 3}, "quantization=3 must be 'int8' or 'nf4'"),
        ({"quantization_bit": True}, "quantization=True must be 'int8' or 'nf4'"),
        ({"load_in_4bit": 8}, "quantization=8 must be 'int8' or 'nf4'"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_4bit and load_in_8bit are the same setting; keep one"),
        (
            {"method": "full", "quantization": "nf4"},
            "quantization=nf4 keeps a frozen base in few bits, and method=full",
        ),
    ],
)
def test_quantization_that_makes_no_sense(given, line):
    assert [found for found in lines_of(**given) if found.startswith(line)], lines_of(**given)


ADALORA = {"target_r": 4, "tinit": 10, "tfinal": 20}
PROBE = {"init_warmup": 10, "final_warmup": 20, "mask_interval": 12}
BLOCKS = {"elalora": ELALORA, "adalora": ADALORA, "alora": {}, "ard_lora": {}, "probe_lora": PROBE}
HELD_OUT = {"train_file": "a.jsonl", "eval_file": "b.jsonl"}


def test_every_method_is_known_and_an_unknown_one_is_refused():
    for method in METHODS:
        block = {method: BLOCKS[method]} if method in BLOCKS else {}
        assert config_of(method=method, data=HELD_OUT, **block).method == method
    (line,) = lines_of(method="qlora")
    assert line.startswith("method=qlora must be 'ard_lora', 'elalora'")


def test_schedules_in_parts_of_the_run_become_steps():
    assert ard_lora_warmups(ArdLoraBlock(), 200) == (20, 50)
    assert ard_lora_warmups(ArdLoraBlock(init_warmup=0, final_warmup=7), 200) == (0, 7)
    assert alora_steps(AloraBlock(), 400.0) == (400, 100)  # K1 = 1 epoch, K2 = 0.25 (methods.md 3.4)
    assert alora_steps(AloraBlock(k1_steps=30, k2=0.001), 400.0) == (30, 1)


def test_block_of_another_method_is_refused():
    (line,) = lines_of(elalora=ELALORA)
    assert line.startswith("elalora is the block of another method than method=lora; remove it")
    assert lines_of(dora={"r": 3})[0].startswith("dora is the block of a method that has no settings")
    assert lines_of(method="elalora") == [
        "method=elalora needs a block `elalora:` with init_warmup, final_warmup and mask_interval"
    ]
    assert lines_of(method="elalora", elalora={"init_warmup": 1, "final_warmup": 2}) == [
        "elalora.mask_interval is missing; set it (Steps between two reallocations.)"
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"bf16": True, "fp16": True}, "bf16=true and fp16=true; keep one of them"),
        ({"global_batch_size": 6, "per_device_train_batch_size": 4}, "global_batch_size=6 is no multiple of per_dev"),
        ({"r": 0}, "r=0 must be greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio=0.1 stands beside warmup_steps=5; remove one"),
        ({"max_steps": 4, "warmup_steps": 5}, "warmup_steps=5 exceeds the run's 4 steps; lower it"),
        ({"max_steps": None, "num_train_epochs": None}, "max_steps=null and num_train_epochs=null say no length"),
        ({"eval_steps": 5}, "eval_steps=5 has no rows; set data.eval_file"),
        ({"target_modules": "(a"}, "target_modules=(a is no regular expression (missing ), unterminated subpattern"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"exclude_modules": ["a", ""]}, "exclude_modules is empty"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas=1.0 must be less than 1"),
        ({"data": {"train_file": []}}, "data.train_file=[] Tuple should have at least 1 item"),
        ({"data": {"train_file": "a", "prompt_template": "{a"}}, "data.prompt_template is no str.format template"),
        ({"data": {"train_file": "a", "prompt_template": "{}"}}, "data.prompt_template may hold plain field names"),
        ({"data": {}}, "data.train_file is missing; set it (JSONL"),
        ({"target_modules": 3}, "target_modules=3 must be a valid string; put it in quotes"),
        ({"schema_version": 2}, "schema_version=2 must be 1"),
        ({"targets": {"vision": {"r": 0}}}, "targets.vision.r=0 must be greater"),
        ({"preemption_signal": ["SIGKILL"]}, "preemption_signal=SIGKILL must be 'SIGUSR1'"),
        ({"method": "elalora", "elalora": ELALORA | {"beta1": 1.0}}, "elalora.beta1=1.0 must be less than 1"),
        ({"method": "elalora", "elalora": ELALORA | {"k": 0}}, "elalora.k=0 must be greater"),
        ({"method": "elalora", "elalora": ELALORA, "r": 1}, "r=1 leaves ElaLoRA nothing to prune"),
        ({"method": "adalora"}, "method=adalora needs a block `adalora:` with target_r, tinit and tfinal"),
        ({"method": "adalora", "adalora": ADALORA | {"target_r": 9}}, "adalora.target_r=9 exceeds the first rank, r=8"),
        (
            {"method": "adalora", "adalora": ADALORA, "max_steps": 30},
            "adalora.tinit=10 + adalora.tfinal=20 leave none of the run's 30 steps to adapt",
        ),
        (
            {"method": "adalora", "adalora": ADALORA | {"deltaT": 90}, "max_steps": 100},
            "adalora.deltaT=90 gives no reduction in the 70 steps",
        ),
        ({"method": "ard_lora", "ard_lora": {"beta": 1.0}}, "ard_lora.beta=1.0 must be less than 1"),
        (
            {"method": "ard_lora", "ard_lora": {"target_r": 0.5}},
            "ard_lora.target_r=0.5 is a budget below one component",
        ),
        ({"method": "ard_lora", "ard_lora": {"target_r": 2, "budget": False}}, "ard_lora.budget=false stands beside"),
        (
            {"method": "ard_lora", "ard_lora": {"tv_form": "depth"}},
            "ard_lora.tv_form=depth stands beside ard_lora.tie=none, which has no such neighbours; set "
            "ard_lora.tie=matrix or layer",
        ),
        (
            {"method": "ard_lora", "ard_lora": {"tv_form": "heads", "tie": "layer"}},
            "ard_lora.tv_form=heads stands beside ard_lora.tie=layer",
        ),
        ({"method": "ard_lora", "ard_lora": {"r_max": 4}}, "ard_lora.r_max=4 lies below the first rank, r=8"),
        ({"method": "ard_lora", "ard_lora": {"meta_interval": 4}}, "ard_lora.meta_interval=4 needs held-out rows"),
        (
            {"method": "ard_lora", "max_steps": 20, "ard_lora": {"init_warmup": 12, "final_warmup": 8}},
            "ard_lora.init_warmup=12 + ard_lora.final_warmup=8 leave none of the run's 20 steps",
        ),
        (
            {"method": "ard_lora", "max_steps": 20, "ard_lora": {"alpha_interval": 14}},
            "ard_lora.alpha_interval=14 gives alpha no step in the 13 steps",
        ),
        ({"method": "alora"}, "method=alora judges components on held-out rows; set data.allocation_file or"),
        ({"method": "alora", "data": HELD_OUT, "alora": {"shortlist": 0.0}}, "alora.shortlist=0.0 must be greater"),
        ({"activation_offload": True}, "activation_offload=true moves what gradient_checkpointing keeps; set gradient"),
        ({"method": "full", "loss_chunk_tokens": 64}, "loss_chunk_tokens has no meaning for method=full"),
        ({"method": "full", "r": 4}, "r has no meaning for method=full, which trains every weight; remove it"),
        ({"task": "sequence_classification", "packing": True}, "packing=true has no meaning for task=sequence_class"),
        ({"optimizer": {"lora_plus_ratio": 0.5}}, "optimizer.lora_plus_ratio=0.5 must be greater than or equal to 1"),
    ],
)
def test_rules(settings, line):
    lines = lines_of(**settings)
    assert len(lines) == 1
    assert lines[0].startswith(line), lines


def test_several_broken_rules_are_reported_at_once():
    lines = lines_of(bf16=True, fp16=True, warmup_steps=5, max_steps=4, elalora=ELALORA)
    assert [line.split("=")[0].split(" ")[0] for line in lines] == ["elalora", "bf16", "warmup_steps"]


@pytest.mark.parametrize(
    "key", ["hf_token", "HF_TOKEN", "wandb_api_key", "password", "client_secret", "apikey", "tokens"]
)
def test_secrets_are_refused_without_quoting_them(key):
    (line,) = lines_of(**{key: "xyzzy"})
    assert line.startswith(f"{key} looks like a secret") and "set it in the environment" in line
    assert "xyzzy" not in line
    (line,) = lines_of(deepspeed={"wandb": [{key: "xyzzy"}]})
    assert line.startswith(f"deepspeed.wandb.0.{key} looks like a secret") and "xyzzy" not in line


@pytest.mark.parametrize("setting", ["r", "lora_dropout", "max_steps", "elalora.b"])
def test_truth_is_no_number(setting):
    block = {"init_warmup": 1, "final_warmup": 1, "mask_interval": 1}
    raw = {"model_name_or_path": "m", "method": "elalora", "output_dir": "o", "data": {"train_file": "a"}}
    raw |= {"elalora": block | {"b": True}} if setting == "elalora.b" else {"elalora": block, setting: True}
    with pytest.raises(ConfigError, match=f"^{setting}=True must be a number, not true or false; correct it"):
        parse_config(raw)


def test_a_path_from_home_is_refused_and_a_template_is_not():
    raw = {
        "model_name_or_path": "m",
        "method": "lora",
        "output_dir": "~/runs",
        "data": {"train_file": ["a", "~/b.jsonl"]},
    }
    with pytest.raises(ConfigError, match="^output_dir=~/runs begins with ~, which nothing expands here") as caught:
        parse_config(raw)
    assert caught.value.errors[1] == "data.train_file.1=~/b.jsonl begins with ~, which nothing expands here; " + (
        "write the whole path"
    )
    data = {"train_file": "a", "prompt_template": "~/{question}"}
    assert parse_config(raw | {"output_dir": "o", "data": data}).data.prompt_template == "~/{question}"


def test_token_counts_and_tokenizers_are_no_secrets():
    config = config_of(tokenizer_name_or_path="t", deepspeed={"max_tokens": 3, "tokenizer": 1})
    assert config.deepspeed == {"max_tokens": 3, "tokenizer": 1}


@pytest.mark.parametrize(
    ("settings", "total", "message"),
    [
        ({"init_warmup": 60, "final_warmup": 40}, 100, "elalora.init_warmup=60 + elalora.final_warmup=40 leave none"),
        ({"mask_interval": 70}, 100, "elalora.mask_interval=70 gives no reallocation in the 70 steps"),
        ({"b": 1, "mask_interval": 60}, 100, "elalora.b=1 has fallen to 0 by the first reallocation .step 70."),
    ],
)
def test_schedule_that_does_not_fit(settings, total, message):
    block = ELALORA | settings
    config = config_of(method="elalora", elalora=block)
    with pytest.raises(ConfigError, match=re.escape(message).replace(r"\.step", ".step").replace(r"70\.", "70.")):
        check_schedule(config, total)
    assert lines_of(method="elalora", elalora=block, max_steps=total) == schedule_errors(config, total)
    check_schedule(config, 10 * total)


@pytest.mark.parametrize("total", range(8, 40, 3))
@pytest.mark.parametrize("interval", [1, 2, 5, 9])
@pytest.mark.parametrize("b", [1, 4])
def test_schedule_is_accepted_exactly_when_it_has_an_event(total, interval, b):
    block = {"init_warmup": 3, "final_warmup": 4, "mask_interval": interval, "b": b}
    config = config_of(method="elalora", elalora=block)
    lengths = {"total_steps": total, "init_warmup": 3, "final_warmup": 4}
    events = [t for t in range(total) if schedule.reallocates(t, interval=interval, **lengths)]
    has_event = any(schedule.cubic_budget(t, amount=b, **lengths) for t in events)
    assert (schedule_errors(config, total) == []) == has_event


def test_batch_is_fixed_at_the_first_start_and_kept():
    first = with_batch(config_of(per_device_train_batch_size=2, gradient_accumulation_steps=4), 3)
    assert (first.global_batch_size, first.gradient_accumulation_steps, first.num_grains) == (24, None, 12)
    resumed = with_batch(first, 5)
    assert resumed == first
    assert [accumulation_steps(resumed, world_size) for world_size in (3, 5, 12, 13)] == [4, 3, 1, 1]
    assert with_batch(config_of(), 3).global_batch_size == 3


def test_batch_settings_must_agree():
    config = config_of(per_device_train_batch_size=2, gradient_accumulation_steps=3, global_batch_size=24)
    assert with_batch(config, 5).num_grains == 12
    with pytest.raises(
        ConfigError, match="^gradient_accumulation_steps=3 disagrees with global_batch_size=24: 12 grains"
    ):
        with_batch(config, 3)


def test_tower_keeps_the_runs_scale_unless_it_says_otherwise():
    config = config_of(r=8, lora_alpha=4, lora_dropout=0.1, targets={"vision": {"r": 2}, "text": {"lora_alpha": 3}})
    assert adapter_settings(config, "vision").model_dump() == {"r": 2, "lora_alpha": 1.0, "lora_dropout": 0.1}
    assert adapter_settings(config, "text").model_dump() == {"r": 8, "lora_alpha": 3.0, "lora_dropout": 0.1}
    assert adapter_settings(config, "other").r == 8


def test_warmup_ratio_rounds_up():
    assert num_warmup_steps(config_of(warmup_ratio=0.1), 11) == 2
    assert num_warmup_steps(config_of(warmup_steps=4), 11) == 4


def test_dump_is_read_back_equal(tmp_path):
    full = config_of(
        method="elalora",
        elalora=ELALORA,
        targets={"vision": {"r": 2}},
        target_modules=["q_proj"],
        exclude_modules=r".*\.lm_head",
        learning_rate=3e-5,
        optimizer={"eps": 1e-10},
        data={"train_file": "\u00e4.jsonl", "prompt_template": "{a}\n: {b}"},
        deepspeed={"zero_optimization": {"stage": 3}},
        revision="1e5",
        log_scores=True,
        global_batch_size=4,
    )
    path = tmp_path / "config.yaml"
    for config in (full, config_of(), config_of(max_steps=9)):
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
    assert set(yaml.safe_load(path.read_text())) == set(RunConfig.model_fields)


def test_update_checks_again_and_defaults_follow():
    config = config_of(r=4)
    assert updated(config, {"r": 16}).lora_alpha == 32.0
    with pytest.raises(ConfigError, match="^bf16=true and fp16=true"):
        updated(config, {"bf16": True, "fp16": True})


BOMB = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 1\nr: 2\n", "line 6: r stands twice"),
        ("r: [1\n", "line 6: expected"),
        ("hf_token: abc: xyzzy\n", "line 5: mapping values are not allowed here"),
        ("\x01\n", "line 5: a character that YAML does not take; remove it"),
        ("t: {{question}}\n", "line 5: a key is a list or a mapping; write a text with braces in quotes"),
        ("t: " + "[" * 3000 + "]" * 3000, "nested too deeply; correct"),
        ("t: &t [*t]\n", "line 5: stands, with its aliases, for more than 100,000 values, or for itself"),
        ("a: &a [x,x,x,x,x,x,x]\n" + BOMB, "for more than 100,000 values, or for itself"),
    ],
)
def test_yaml_mistakes_name_the_line_and_quote_nothing(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "xyzzy" not in str(caught.value)


def test_files_that_hold_no_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds no `setting: value` lines"):
        load_config(tmp_path / "list.yaml")


def test_config_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        config_of().r = 3


def test_override_inside_a_named_deepspeed_file_on_the_same_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nmethod: lora\noutput_dir: o\ndata: {train_file: a.jsonl}\n")
    nvme = "deepspeed.zero_optimization.offload_param.nvme_path"
    config = load_config(path, ["deepspeed=zero3_nvme", f"{nvme}=/fast"])
    assert config.deepspeed["zero_optimization"]["stage"] == 3
    assert config.deepspeed["zero_optimization"]["offload_param"]["nvme_path"] == "/fast"
    with pytest.raises(ConfigError, match="override seed.x lies inside seed=1"):
        load_config(path, ["seed=1", "seed.x=2"])
