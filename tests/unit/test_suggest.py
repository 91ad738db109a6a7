import json
import re

import pytest

from ardtrain.cli import main
from ardtrain.config import ConfigError, load_config, schedule_errors
from ardtrain.planning.hardware import machine_of
from ardtrain.planning.suggest import (
    FEWEST_STEPS,
    Facts,
    batch_changes,
    rate_changes,
    read_incomplete,
    schedule_changes,
    suggest,
    suggestion_text,
)
from tests.runs import write_run

METHODS = ("lora", "dora", "adalora", "elalora", "alora", "ard_lora", "probe_lora")


def facts(method="elalora", **changes):
    given = {"method": method, "task": "causal_lm", "num_rows": 50_000, "too_long": 0, "total_rank": 720, "r": 8}
    return Facts(**given | changes)


def config(tmp_path, method="lora", **settings):
    settings.setdefault("elalora", None)
    return read_incomplete(str(write_run(tmp_path, method=method, **settings)))


@pytest.mark.parametrize("method", METHODS)
def test_a_suggestion_is_a_config_that_fits_its_data(tmp_path, method):
    path = write_run(tmp_path, method=method, elalora=None, max_steps=None, num_train_epochs=40, max_length=64)
    out = tmp_path / "out.yaml"
    assert suggest([str(path), "--gpus", "2", "--out", str(out)]) == 0
    text = out.read_text()
    made = load_config(out)
    assert made.method == method and made.num_train_epochs == 40 and made.max_steps is None
    steps = -(-40 * 72 // made.global_batch_size)
    assert not schedule_errors(made, steps)
    assert made.global_batch_size % (2 * made.per_device_train_batch_size) == 0
    assert steps >= FEWEST_STEPS and f"72 rows an epoch, {steps} steps" in text
    assert (tmp_path / "ardtrain.schema.json").is_file()
    body = text.splitlines()[4:]
    for before, line in zip(body, body[1:], strict=False):
        assert "#" in line or line.endswith(":") or before.lstrip().startswith("#"), line
    assert "; was 0.005" in text  # the rate that the config had
    assert main(["validate", str(out)]) == 0


def test_batches_by_paper_and_by_size(tmp_path):
    lora = config(tmp_path, max_steps=100)
    assert batch_changes(facts("elalora"), lora, 1)["global_batch_size"][0] == 64
    assert batch_changes(facts("alora"), lora, 1)["global_batch_size"][0] == 128
    assert batch_changes(facts("alora", num_rows=9_999), lora, 1)["global_batch_size"][0] == 16
    assert batch_changes(facts("adalora"), lora, 12)["global_batch_size"][0] == 36
    short = config(tmp_path, max_steps=None, num_train_epochs=2)
    batch, why = batch_changes(facts("elalora", num_rows=3_000), short, 1)["global_batch_size"]
    assert batch == 16 and "64 were" in why  # 2 x 3,000 / 32 are 188 steps, / 16 are 375


def test_schedules_by_hand(tmp_path):
    given = config(tmp_path)
    ela = {name: value for name, (value, _) in schedule_changes(facts("elalora"), 2000, 100, given).items()}
    assert ela == {"elalora.init_warmup": 300, "elalora.final_warmup": 500, "elalora.mask_interval": 50,
                   "elalora.b": 4, "elalora.k": 2}  # fmt: skip
    assert schedule_changes(facts("elalora", total_rank=4480), 2000, 100, given)["elalora.b"][0] == 25
    ada = {name: value for name, (value, _) in schedule_changes(facts("adalora"), 50_000, 100, given).items()}
    assert (ada["r"], ada["adalora.target_r"], ada["lora_alpha"]) == (12, 8, given.lora_alpha / given.r * 12)
    assert (ada["adalora.tinit"], ada["adalora.tfinal"], ada["adalora.deltaT"]) == (6000, 22_500, 53)
    own = schedule_changes(facts("alora"), 1000, 250, given)  # 4 epochs: the paper's 1 + 8 / 4 fit
    assert (own["alora.k1_steps"][0], own["alora.k2_steps"][0]) == (250, 62)
    own = schedule_changes(facts("alora"), 1000, 500, given)  # 2 epochs: they do not
    assert (own["alora.k1_steps"][0], own["alora.k2_steps"][0]) == (250, 62) and "do not fit" in own["alora.k1_steps"][
        1
    ]
    ard = {name: value for name, (value, _) in schedule_changes(facts("ard_lora"), 2000, 100, given).items()}
    assert list(ard.values()) == [200, 500, 8, 100]
    assert schedule_changes(facts("lora"), 2000, 100, given) == {}


def test_every_rate_has_a_source():
    for method in (*METHODS, "full"):
        for task in ("causal_lm", "sequence_classification", "image_text_to_text"):
            rate, why = rate_changes(facts(method, task=task))["learning_rate"]
            assert 1e-6 < rate < 1e-2 and re.search(r"arXiv|PEFT|as LoRA", why)


def test_what_does_not_fit_is_said(tmp_path):
    path = write_run(tmp_path, method="lora", elalora=None)
    shape = json.loads((tmp_path / "model" / "config.json").read_text())
    shape |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 8, "num_attention_heads": 128,
              "num_key_value_heads": 16, "head_dim": 128}  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    text = suggestion_text(read_incomplete(str(path)), machine_of("h100", gpus=1, nodes=1))
    assert "does NOT fit" in text and "gradient_checkpointing: true" in text
    assert re.search(r"#   .*(zero3|offload|quantization|--gpus)", text)


def test_mistakes_are_told(tmp_path):
    path = str(write_run(tmp_path))
    with pytest.raises(ConfigError, match="is there already"):
        suggest([path, "--out", path])
    with pytest.raises(ConfigError, match="see ardtrain suggest --help"):
        suggest([path, "--fast"])
    with pytest.raises(ConfigError, match="config"):
        suggest([])
    with pytest.raises(ConfigError, match="learning_rte is no setting; did you mean learning_rate"):
        suggest([path, "learning_rte=1"])
