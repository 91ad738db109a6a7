"""docs/70b.md is what the code gives, the shapes of public models build, the calibration holds."""

import importlib.util
import json
from pathlib import Path

import pytest

from ardtrain.planning.shapes import read_shapes

REPOSITORY = Path(__file__).resolve().parents[2]


def generator():
    spec = importlib.util.spec_from_file_location("generate_70b", REPOSITORY / "docs" / "generate_70b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COUNTS = {  # billions of parameters, as published
    "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "llama-3.1-405b": 405.85, "llama-2-70b": 68.98,
    "paligemma-2-3b": 3.03, "paligemma-2-10b": 9.66, "paligemma-2-28b": 27.65,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_shapes_of_public_models_build(name):
    page = generator()
    config = page.config_of(name, 1024, 8, offload=False)
    assert read_shapes(config).shape.num_base / 1e9 == pytest.approx(COUNTS[name], abs=0.006)


def test_page_has_the_calibration_and_70b_as_the_code_gives_them():
    page, committed = generator(), (REPOSITORY / "docs" / "70b.md").read_text()
    assert "\n".join(page.calibration()) in committed
    assert "\n".join(page.measured()) in committed
    assert page.hooks() in committed
    page.MODELS = {"llama-3.1-70b": page.MODELS["llama-3.1-70b"]}
    for line in page.table():
        assert line in committed, "run: python docs/generate_70b.py"


@pytest.mark.full
def test_page_is_what_the_code_gives():
    assert generator().render() == (REPOSITORY / "docs" / "70b.md").read_text(), "run: python docs/generate_70b.py"


@pytest.mark.parametrize("variant", ["zero3", "zero3_offload"])
def test_steps_of_the_h200_are_within_a_tenth_of_the_plan_with_hooks_as_they_were(variant):
    """ZeRO-3's is what the hooks' factor was fitted to; the one with the base on the host was not looked at."""
    page = generator()
    measured = page.on_gpu()[f"step_{variant}"]["deterministic"]["step_seconds"]["median"]
    then, _ = page.hook_seconds_of(variant)
    assert then == pytest.approx(measured, rel=0.1)


def test_calibration_is_within_a_tenth():
    """The goal of the plan's memory; the committed file is made by benchmarks/plan_check.py."""
    runs = json.loads((REPOSITORY / "benchmarks" / "results" / "plan_check.json").read_text())["runs"]
    alone = [case["planned_over_measured"]["peak"] for case in runs["cpu 1 process(es)"].values()]
    assert len(alone) >= 15
    assert all(0.9 <= ratio <= 1.1 for ratio in alone)
    pairs = [case["planned_over_measured"]["peak"] for case in runs["cpu 2 process(es)"].values()]
    assert len(pairs) >= 7
    assert all(0.9 <= ratio <= 1.1 for ratio in pairs)
