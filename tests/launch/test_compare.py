"""`ardtrain compare` on a real tiny suite: interrupted, gone on with, and with nothing left to do."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import lines, write_run

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parent.parent.parent
RATES, SEEDS = (2e-3,), (1, 2)  # four runs: each is a process, ten seconds before its first step
TARGETS = ["gate_proj", "up_proj", "down_proj"]  # of equal cost: ElaLoRA moves components, the parameters stay


def start(suite, folder):
    """`ardtrain compare SUITE` in a process of its own."""
    environment = os.environ | {"ARDTRAIN_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ardtrain", "compare", str(suite)]
    return subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(metrics, count, process):
    """Until a run has recorded that many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no {count} steps: {process.communicate()[0][-3000:]}")


def test_a_suite_is_interrupted_gone_on_with_and_then_done(tmp_path):
    run = json.loads(write_run(tmp_path, "base", max_steps=30, target_modules=TARGETS).read_text())
    elalora = run.pop("elalora")
    for name in ("method", "learning_rate", "output_dir", "eval_steps"):
        run.pop(name)
    suite = tmp_path / "suite.yaml"
    values = {
        "name": "tiny", "output_dir": str(tmp_path / "out"), "base": run,
        "methods": {"lora": {"method": "lora"}, "elalora": {"method": "elalora", "settings": {"elalora": elalora}}},
        "learning_rates": RATES, "seeds": SEEDS, "jobs": 2, "equal_parameters": {"tolerance": 0.0},
    }  # fmt: skip
    suite.write_text(json.dumps(values))
    first = tmp_path / "out" / "lora" / "lr-0.002" / "seed-1" / "test"

    process = start(suite, tmp_path)
    wait_for_steps(first / "metrics.jsonl", 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT, said
    assert "the same command goes on" in said and children
    assert not [child for child in children if child.is_running()]
    state, step = (first / "status").read_text().split()
    assert state == "requeue" and 3 <= int(step) < 30 and (first / "latest").is_file()

    process = start(suite, tmp_path)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    by_folder = {one["folder"]: one for one in record["runs"]}
    keys = [(method, rate) for method in ("lora", "elalora") for rate in RATES]
    assert set(by_folder) == {f"{method}/lr-{rate:g}/seed-{seed}/test" for method, rate in keys for seed in SEEDS}
    assert by_folder[f"lora/lr-{RATES[0]:g}/seed-{SEEDS[0]}/test"]["resumed"] and not record["failed"]
    for folder, one in by_folder.items():
        metrics = lines(tmp_path / "out" / folder / "metrics.jsonl")
        assert one["metrics"]["eval_loss"] == [m["eval_loss"] for m in metrics if "eval_loss" in m][-1]
        assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 31))  # none lost, none twice
        assert one["total_rank_start"] == one["total_rank_final"] == 6 * 4
        assert one["parameters_final"] == one["parameters_peak"] == 2 * 4 * 3 * (32 + 64)  # layers, rank, matrices
        diagonals = 6 * 4 if one["method"] == "elalora" else 0  # folded into B in the export
        assert one["parameters_start"] == one["parameters_final"] + diagonals
        assert one["seconds"] > 0 and 0 <= one["allocator_fraction"] < 1
    table = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [(row["method"], float(row["learning_rate"])) for row in table] == keys
    for row, (method, rate) in zip(table, keys, strict=True):
        ours = [by_folder[f"{method}/lr-{rate:g}/seed-{seed}/test"]["metrics"]["eval_loss"] for seed in SEEDS]
        assert float(row["median"]) == pytest.approx(statistics.median(ours), rel=1e-12)
    assert (tmp_path / "out" / "table.png").stat().st_size > 5000

    process = start(suite, tmp_path)
    again = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and again.count("(done before)") == len(by_folder), again
