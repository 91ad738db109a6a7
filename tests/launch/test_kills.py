"""The short form of benchmarks/kill_test.py: a run that is killed again and again ends as one that nobody touched."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.full)])
def test_a_run_killed_again_and_again_equals_the_unbroken_one(tmp_path, kills):
    out = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kill_test", "--kills", str(kills), "--steps", "24", "--out", str(out)]
    environment = os.environ | {"ARDTRAIN_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    result = json.loads(out.read_text())
    assert ended.returncode == 0 and result["equal"], result["problems"]
    assert result["kills"] == kills and result["finished_runs"] >= 1
    assert sum(n > 0 for n in result["kills_by_phase"].values()) >= 3, result["kills_by_phase"]
