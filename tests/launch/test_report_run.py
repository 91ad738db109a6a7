"""A report of a real run that was stopped and went on: every number that it shows was written."""

import json
import os
import subprocess
import sys

import pytest

from ardtrain.report.page import run_object
from ardtrain.report.reading import read_run
from ardtrain.report.terminal import ranks_text
from tests.runs import lines, write_run

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    config = write_run(folder, deepspeed="zero3")
    auto = ["resume_from_checkpoint=auto"]
    starts = [{"config": str(config), "world_size": 1, "overrides": auto, "stop_after": 7},
              {"config": str(config), "world_size": 1, "overrides": auto}]  # fmt: skip
    (folder / "starts.json").write_text(json.dumps(starts))
    command = [sys.executable, "-m", "tests.launch.starts", str(folder / "starts.json"), str(folder / "results.json")]
    environment = os.environ | {"ARDTRAIN_CACHE": str(folder / "cache")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    return folder


def test_the_report_shows_both_starts_and_all_that_was_recorded(folder):
    results = json.loads((folder / "results.json").read_text())
    assert [set(result["codes"]) for result in results] == [{0}, {0}], results
    run = read_run(str(folder / "run"))
    info = run.info
    assert [(start["step"], start["world_size"]) for start in info["starts"]] == [(0, 1), (7, 1)]
    assert set(info["starts"][1]["versions"]) == {"ardtrain", "torch", "deepspeed", "transformers", "peft", "numpy"}
    assert info["modules"]["model.layers.0.mlp.down_proj"] == [64, 32, "language"]
    shown = run_object(run)
    assert shown["state"] == "finished" and shown["starts"] == [0, 7]
    for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "host_memory_peak_bytes"):
        assert len(shown["curves"][name][0]) >= 2, name
    assert shown["curves"]["loss"][0] == list(range(1, 17))
    assert shown["phases"]["evaluate"] > 0 and shown["startup"]["imports"] > 0
    ranks = shown["ranks"]
    recorded = lines(folder / "run" / "ranks.jsonl")
    assert ranks["numEvents"] == len(recorded) - 1 > 0 and ranks["scores"]["steps"] == ranks["steps"][1:]
    assert ranks["totals"][1][-1] == recorded[-1]["total_rank"] == ranks["budget"]
    assert ranks["parameters"][1][0] == ranks["budgetParameters"]
    assert shown["trained"] == ranks["budgetParameters"] + ranks["budget"]  # ElaLoRA's diagonals: a number a component


def test_the_console_told_how_far_it_was(folder):
    first, second = (result["logs"] for result in json.loads((folder / "results.json").read_text()))
    assert "step 1 of 16: loss " in first and "tokens/s, rank " in first and "\r" not in first
    assert "step 16 of 16: loss " in second and "held-out " in second and "about 0:00 left" in second


def test_the_terminal_shows_the_last_ranks(folder):
    run = read_run(str(folder / "run"), "run")
    text = ranks_text(run)
    assert (
        text.startswith("run: elalora, finished, step 16 of 16") and f"total rank {run.history.ranks[-1].sum()}" in text
    )
