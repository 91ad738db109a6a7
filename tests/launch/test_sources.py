"""Weighted sources in whole runs: equal bits on one process and on two, cut in the middle of an epoch and resumed."""

import json

import pytest

from tests.launch.stories import Stories
from tests.runs import fingerprint, lines
from tests.unit.test_data_mix import mixed_run

pytestmark = pytest.mark.launch
STEPS = 18  # two epochs of 96 rows, and some


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def done(folder):
    """All starts of this file in one process."""
    stories = Stories(folder)
    settings = {"max_steps": STEPS, "eval_steps": 9, "metric_for_best_model": "chats_loss", "save_steps": 9}
    stories.add("one", mixed_run(folder, "one", **settings), 1)
    stories.add("two", mixed_run(folder, "two", deepspeed="zero3", **settings), 2)
    cut = mixed_run(folder, "cut", **settings)
    stories.add("cut", cut, 2, ["resume_from_checkpoint=auto"], stop_after=5)
    stories.add("cut", cut, 1, ["resume_from_checkpoint=auto"])
    other = mixed_run(folder, "other", output_dir=str(folder / "cut"), **settings)
    other.write_text(other.read_text().replace('"weight": 3.0', '"weight": 2.0'))
    stories.add("other", other, 1, ["resume_from_checkpoint=auto"])
    stories.play()
    return stories


def test_any_number_of_processes_and_a_cut_inside_an_epoch_give_equal_bits(folder, done):
    done.ended_well("one", "two", "cut")
    one, two, cut = (fingerprint(folder / name) for name in ("one", "two", "cut"))
    assert one == two == cut and len(one["losses"]) == STEPS
    named = [[m for m in lines(folder / name / "metrics.jsonl") if "eval_chats_loss" in m] for name in ("one", "two")]
    assert named[0] == named[1] and [m["step"] for m in named[0]] == [9, 18]
    best = min(named[0], key=lambda m: m["eval_chats_loss"])
    assert (folder / "one" / "best").read_text().strip() == f"checkpoint-{best['step']}"


def test_a_run_tells_what_it_took_of_each_source(folder, done):
    (told,) = [m for m in lines(folder / "cut" / "metrics.jsonl") if "sources" in m]
    assert told["step"] == STEPS
    counts = {name: own["samples"] for name, own in told["sources"].items()}
    assert sum(counts.values()) == 12 * STEPS and 144 < counts["sums"] < 144 + 24
    assert sum(own["tokens"] for own in told["sources"].values()) == sum(
        m["tokens"] for m in lines(folder / "one" / "metrics.jsonl") if "tokens" in m
    )
    info = json.loads((folder / "one" / "run_info.json").read_text())
    assert info["sources"]["chats"] == {
        "name": "chats", "samples": 9, "drawn": 24, "fraction": 0.25, "passes": 24 / 9,
    }  # fmt: skip


def test_other_weights_are_another_run(folder, done):
    (result,) = done.results["other"]
    assert set(result["codes"]) == {2} and "data" in result["logs"]
