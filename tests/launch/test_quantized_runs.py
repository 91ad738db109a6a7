"""Whole runs on a quantised base: cut, resumed on other processes and stages, exported; equal to the bit."""

import json
import shutil

import pytest

from tests.launch.stories import Stories
from tests.quantized_files import save_by_bitsandbytes
from tests.runs import fingerprint, lines, write_run

pytestmark = [pytest.mark.launch, pytest.mark.full]
RUNS = {
    "int8": {"quantization": "int8", "bf16": True},  # ElaLoRA
    "nf4": {"load_in_4bit": True, "method": "dora", "elalora": None},
    "plain": {"method": "dora", "elalora": None},
}
CUT = ["resume_from_checkpoint=auto", "deepspeed=zero3_offload_param"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def done(folder):
    """All starts of this file in one process."""
    stories = Stories(folder)
    for name, settings in RUNS.items():
        stories.add(name, write_run(folder, name, max_steps=12, eval_steps=6, **settings), 1)
    for name in ("int8", "nf4"):
        cut = write_run(folder, f"{name}-cut", max_steps=12, eval_steps=6, **RUNS[name])
        stories.add(f"{name}-cut", cut, 2, CUT, stop_after=5)
        stories.add(
            f"{name}-cut", cut, 1, ["resume_from_checkpoint=auto", "deepspeed=zero3", "gradient_checkpointing=true"]
        )
    stored = folder / "stored"  # the same base as bitsandbytes keeps it
    shutil.copytree(folder / "model", stored)
    save_by_bitsandbytes(stored, "nf4")
    for name, settings, size in (("from-stored", RUNS["nf4"], 2), ("decoded", RUNS["plain"], 1)):
        config = write_run(folder, name, max_steps=12, eval_steps=6, model_name_or_path=str(stored), **settings)
        stories.add(name, config, size, ["verify_weights=true", "deepspeed=zero3"])
    other = write_run(folder, "other", output_dir=str(folder / "nf4"), max_steps=12, **RUNS["plain"])
    stories.add("other", other, 1, ["resume_from_checkpoint=auto", "max_steps=14"])
    stories.play()
    return stories


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_cut_run_on_two_processes_and_one_is_the_unbroken_one(folder, done, name):
    for result in (*done.results[name], *done.results[f"{name}-cut"]):
        assert set(result["codes"]) == {0}, result["logs"]
    assert fingerprint(folder / f"{name}-cut") == fingerprint(folder / name)
    losses = [m["loss"] for m in lines(folder / name / "metrics.jsonl") if "loss" in m]
    assert len(losses) == 12 and losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_export_is_compared_with_peft_on_the_dequantised_base(folder, done, name):
    (result,) = done.results[name]
    assert "PEFT's logits: " in result["logs"] and f"linears in {name}" in result["logs"]
    described = json.loads((folder / name / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(folder / "model")


def test_the_format_makes_another_run(folder, done):
    assert set(done.results["plain"][0]["codes"]) == {0}, done.results["plain"][0]["logs"]
    assert fingerprint(folder / "plain")["losses"] != fingerprint(folder / "nf4")["losses"]
    (result,) = done.results["other"]
    assert 0 not in result["codes"] and "quantization" in result["logs"]


def test_files_of_bitsandbytes_give_the_run_that_quantises_itself(folder, done):
    """And without a format they are decoded, whole: the same numbers in plain linears."""
    for name in ("from-stored", "decoded"):
        (result,) = done.results[name]
        assert set(result["codes"]) == {0}, result["logs"]
        assert "PEFT's logits: " in result["logs"]
        assert fingerprint(folder / name) == fingerprint(folder / "nf4")
    assert "quantised by bitsandbytes and are decoded to fp32" in done.results["decoded"][0]["logs"]
    assert "quantised by bitsandbytes" not in done.results["from-stored"][0]["logs"]
