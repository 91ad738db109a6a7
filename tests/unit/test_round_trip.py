"""A PEFT adapter into a run by init_from, or its ranks by ranks_from, and out again by export, untrained in between."""

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ardtrain.checkpoint.errors import OtherRunError
from ardtrain.checkpoint.identity import compare
from ardtrain.evaluating.command import evaluated_config
from ardtrain.evaluating.request import Target, read_request
from ardtrain.exporting import export_peft
from ardtrain.preflight import prepare
from ardtrain.session import run_identity
from ardtrain.trained import open_trained
from tests.tiny import equal_bits, save_tiny_llama
from tests.trained_runs import make_run

IDS = torch.arange(4, 44).reshape(2, 20)
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "total_step": 10}
PLAIN, DIAGONAL = {"method": "lora", "elalora": None}, {"method": "elalora"}
PROBES = {"init_warmup": 2, "final_warmup": 2, "mask_interval": 20}
PROBED = {"method": "probe_lora", "elalora": None, "probe_lora": PROBES}


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def saved(folder, config):
    """A PEFT adapter of random numbers in FOLDER/adapter, beside its base; its logits."""
    save_tiny_llama(folder / "model")
    (folder / "train.jsonl").write_text('{"prompt": "1 + 1 = ", "completion": "2."}\n' * 24)
    model = get_peft_model(base(folder), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    if isinstance(config, AdaLoraConfig):  # the allocator's masks: 4, 3, 2, 1 of 4 components are kept
        names = [n for n, _ in model.named_parameters() if "lora_E" in n]
        model.peft_config["default"].rank_pattern = {
            n.removeprefix("base_model.model."): [i < 4 - j % 4 for i in range(4)] for j, n in enumerate(names)
        }
    model.save_pretrained(folder / "adapter")
    return logits(PeftModel.from_pretrained(base(folder), folder / "adapter"))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def exported(folder, **settings):
    """The export of a run that starts from FOLDER/adapter; its folder."""
    data = {"train_file": str(folder / "train.jsonl")}
    run_dir = make_run(
        folder, start=True, init_from=str(folder / "adapter"), data=data, eval_steps=None, max_steps=100, **settings
    )
    export_peft(open_trained(run_dir), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("alpha", [6, 16, 7, 1])
@pytest.mark.parametrize("r", [3, 4])
def test_even_ranks_of_a_plain_form_keep_every_byte(tmp_path, r, alpha):
    wanted = saved(tmp_path, LoraConfig(**LORA | {"r": r, "lora_alpha": alpha}))
    out = exported(tmp_path, **PLAIN)
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(equal_bits(before[n], after[n]) for n in before)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (r, alpha)
    assert equal_bits(logits(PeftModel.from_pretrained(base(tmp_path), out)), wanted)


@pytest.mark.parametrize("method", [PLAIN, DIAGONAL, PROBED], ids=["plain", "diagonal", "probed"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
        LoraConfig(**LORA, use_rslora=True),
        LoraConfig(**LORA),
        AdaLoraConfig(**ADALORA),
    ],
    ids=["patterns", "rslora", "even", "adalora"],
)
def test_all_others_keep_the_logits(tmp_path, config, method):
    wanted = saved(tmp_path, config)
    found = logits(PeftModel.from_pretrained(base(tmp_path), exported(tmp_path, **method)))
    assert float((logits(base(tmp_path)) - wanted).abs().max()) > 0.5
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


def test_a_second_trip_changes_nothing_more(tmp_path):
    """Uneven ranks come back with the scale folded in; from then on every byte stays."""
    saved(tmp_path, LoraConfig(**LORA, rank_pattern={"q_proj": 2}))
    first = exported(tmp_path, **PLAIN)
    (tmp_path / "adapter").rename(tmp_path / "original")
    first.rename(tmp_path / "adapter")
    second = exported(tmp_path, **PLAIN)
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(second / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(equal_bits(before[n], after[n]) for n in before)


# ---- ranks alone ----


def run_with_ranks(folder, config):
    """A run with the ranks of a PEFT adapter: its folder."""
    saved(folder, config)
    rows = str(folder / "train.jsonl")
    data = {"train_file": rows, "eval_file": rows}
    return make_run(folder, ranks_from=str(folder / "adapter"), data=data, max_steps=100, **PLAIN)


def test_a_trained_run_needs_the_folder_of_its_first_ranks_no_more(tmp_path):
    run_dir = run_with_ranks(tmp_path, LoraConfig(**LORA))
    shutil.rmtree(tmp_path / "adapter")
    assert set(open_trained(run_dir).layout.table.ranks) == {0, 4}
    request = read_request([str(run_dir)])
    assert evaluated_config(request, Target(run_dir, run_dir / "checkpoint-16"), world_size=1).ranks_from is None


def test_a_resume_with_other_first_ranks_is_refused(tmp_path):
    run_dir = run_with_ranks(tmp_path, LoraConfig(**LORA))
    before = run_identity(prepare(run_dir / "config.yaml", [], world_size=1), "0" * 64)
    assert compare(before.to_json(), before, run_dir) == []
    saved(tmp_path, LoraConfig(**LORA | {"r": 3}))
    now = run_identity(prepare(run_dir / "config.yaml", [], world_size=1), "0" * 64)
    with pytest.raises(OtherRunError, match="first_ranks: the checkpoint has"):
        compare(before.to_json(), now, run_dir)
