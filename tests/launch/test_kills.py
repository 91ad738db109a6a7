"""The short form of benchmarks/kill_test.py: a run that is killed again and again ends as one that nobody touched."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.launch


def test_a_run_killed_ten_times_equals_the_unbroken_one(tmp_path):
    out = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kill_test", "--kills", "10", "--steps", "24", "--out", str(out)]
    environment = os.environ | {"ARDTRAIN_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    result = json.loads(out.read_text())
    assert ended.returncode == 0 and result["equal"], result["problems"]
    assert result["kills"] == 10 and result["finished_runs"] >= 1
    assert sum(n > 0 for n in result["kills_by_phase"].values()) >= 4, result["kills_by_phase"]
