"""The bench itself: hosts, links, ssh and Slurm do what the launch tests count on, and nothing is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import skip_without_cluster


@pytest.mark.full
def test_the_bench_keeps_its_promises():
    skip_without_cluster()
    script = Path(__file__).with_name("cluster_selftest.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed, 0 failed" in done.stdout
