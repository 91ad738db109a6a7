"""PaliGemma-2 from config to adapter: equal bits on one and two processes, ZeRO-0 and ZeRO-3 with offload, resumed."""

import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed.processes import run_processes
from tests.runs import fingerprint, lines, write_run
from tests.tiny_paligemma import (
    NUM_IMAGE_TOKENS,
    image_processor,
    letter_tokenizer,
    picture,
    save_tiny_paligemma,
    tiny_paligemma,
    write_rows,
)

pytestmark = pytest.mark.launch
CUT = 7


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paligemma")
    save_tiny_paligemma(folder / "model")
    write_rows(folder, "train", 24)
    write_rows(folder, "dev", 8, seed=1)

    def run(name, count, *overrides, **settings):
        targets = {"vision": {"r": 3}, "projector": {"full": True}}
        settings = {"task": "image_text_to_text", "targets": targets, "save_steps": CUT} | settings
        config = write_run(folder, name, **settings)
        arguments = ["-m", "ardtrain", "train", str(config), *overrides]
        environment = {"ARDTRAIN_CACHE": str(folder / "cache")}
        ended = run_processes(count, arguments, folder=folder, timeout=500, environment=environment)
        assert ended.codes == [0] * count, ended.text()
        return folder / name, ended.outputs[0]

    return run


@pytest.fixture(scope="module")
def alone(start):
    return start("alone", 1)


def test_run_moves_ranks_and_its_adapter_is_read_back(alone):
    run, said = alone
    assert "PEFT's logits" in said
    counts = r"vision rank \d+ and [\d,]+ numbers, language rank \d+ and [\d,]+ numbers, projector 1,056 numbers"
    first, last = re.findall(rf"by tower: {counts}", said)  # in the summary, and at the end
    assert first.startswith("by tower: vision rank 36 and 2,724 numbers, language rank 112 and") and last != first
    events = lines(run / "ranks.jsonl")
    assert len(events) > 3
    assert {sum(event["towers"].values()) for event in events} == {148}
    assert len({tuple(event["towers"].items()) for event in events}) > 1, "no rank crossed a border of towers"
    base = tiny_paligemma()
    tokenizer = letter_tokenizer()
    ids = torch.tensor([[4] * NUM_IMAGE_TOKENS + [2, *tokenizer("what\n", add_special_tokens=False)["input_ids"]]])
    pixels = image_processor()(images=[picture(1)], return_tensors="pt")["pixel_values"]
    inputs = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        before = base(**inputs).logits
        after = PeftModel.from_pretrained(base, str(run / "adapter")).eval()(**inputs).logits
    assert (before - after).abs().max() > 1e-4
    names = [name for name, _ in base.named_modules() if name.endswith("lora_A")]
    assert {"vision_tower", "language_model"} <= {part for name in names for part in name.split(".")}
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.multi_modal_projector.linear"
    for part, own in tiny_paligemma().model.multi_modal_projector.linear.named_parameters():
        assert (trained[f"{prefix}.{part}"] - own).abs().max() > 1e-4


def test_resumed_on_two_processes_under_zero3_with_offload(start, alone, record_run):
    """In a copy of the run's folder as it was after the checkpoint; what lies beyond it is done again."""
    run = alone[0].with_name("resumed")
    shutil.copytree(alone[0], run)
    for later in ("checkpoint-14", "checkpoint-16", "adapter"):
        shutil.rmtree(run / later)
    start(
        "resumed",
        2,
        f"resume_from_checkpoint={run / f'checkpoint-{CUT}'}",
        "deepspeed=zero3_offload",
        "gradient_checkpointing=true",
    )
    found = fingerprint(alone[0])
    assert fingerprint(run) == found
    ran = {"method": "elalora", "family": "PaliGemma-2", "resizes": len(set(found["tables"])) - 1}
    features = ["lora_dropout", "targets", "task: image_text_to_text"]
    record_run(processes=1, features=features, **ran)
    offload = {"base_zero": 3, "base_offload": "cpu", "optimizer_offload": True}
    record_run(processes=2, resumed_from=1, features=["gradient_checkpointing", *features], **offload, **ran)


METHODS = {
    "elalora": {},
    "adalora": {"elalora": None, "adalora": {"target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2}},
    "alora": {"elalora": None, "alora": {"k1_steps": 3, "k2_steps": 3, "val_batch": 4, "n_a": 3}},
    "ard_lora": {
        "elalora": None, "r": 2,
        "ard_lora": {"init_warmup": 2, "final_warmup": 4, "alpha_interval": 1, "resize_interval": 2, "lr_alpha": 0.3},
    },
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_each_tower_keeps_its_budget_on_one_and_two_processes(start, method):
    """Vision, projector and language with settings of their own; the second run under ZeRO-3 with offload."""
    towers = {
        "vision": {"r": 3, "target_modules": ["fc1", "fc2"]}, "projector": {"r": 4},
        "language": {"exclude_modules": ["down_proj"]},
    }  # fmt: skip
    settings = {"method": method, "budget": "per_tower", "targets": towers, **METHODS[method]}
    alone, said = start(f"{method}_alone", 1, **settings)
    ranks = lines(alone / "ranks.jsonl")
    first, last = ranks[0]["towers"], ranks[-1]["towers"]
    share = {"adalora": 2 * 29 / 112}.get(method, 1.0)  # of 12 + 4 + 24 * 4 components
    assert {t: n for t, n in last.items() if abs(n - share * first[t]) >= 1} == {} and set(first) == set(towers)
    if method in ("elalora", "alora"):
        assert all(line["towers"] == first for line in ranks)
    assert len({line["digest"] for line in ranks}) > 1
    assert re.search(r"vision rank \d+ and .*projector rank \d+ and .*language rank \d+ and", said)
    together, _ = start(f"{method}_together", 2, "deepspeed=zero3_offload", **settings)
    assert fingerprint(together) == fingerprint(alone)


@pytest.mark.full
def test_vision_in_full_beside_adapters_on_one_and_two_processes(start):
    """The projector and the vision tower in full, ranks that move in the language tower; PEFT reads it back."""
    targets = {"targets": {"vision": {"full": True}, "projector": {"full": True}}}
    alone, said = start("vision_alone", 1, **targets)
    assert "PEFT's logits" in said
    assert re.search(r"by tower: language rank 112 and [\d,]+ numbers, vision [\d,]+ numbers, projector 1,056", said)
    together, _ = start("vision_together", 2, "deepspeed=zero3_offload", "gradient_checkpointing=true", **targets)
    found = fingerprint(alone)
    assert fingerprint(together) == found and len(set(found["tables"])) > 1
    stored = load_file(alone / "adapter" / "adapter_model.safetensors")
    for name, own in tiny_paligemma().named_parameters():
        if "vision_tower" in name and ".head." not in name:
            assert (stored[f"base_model.model.{name}"] - own).abs().max() > 1e-5, name


@pytest.mark.full
def test_two_processes_from_the_start_under_zero3(start, alone):
    run, _ = start("together", 2, "deepspeed=zero3_offload")
    assert fingerprint(run) == fingerprint(alone[0])
