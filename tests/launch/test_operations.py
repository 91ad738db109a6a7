"""Runs the commands of docs/operations.md as they stand there, on two hosts with ssh and a real Slurm."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import ENVIRONMENT
from tests.launch.test_routes import AS_ROOT, mpirun
from tests.runs import fingerprint, write_run

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"<!-- (run[^>]*?) -->\n```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory):
    """A folder with the page's config, a hostfile, a base and rows, as a user has them."""
    folder = tmp_path_factory.mktemp("operations")
    write_run(folder)
    (folder / "ardtrain.yaml").write_text(re.search(r"<!-- config -->\n```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / "ardtrain").symlink_to(ROOT / "ardtrain")  # a checkout
    (folder / "bin").mkdir()
    ours = folder / "bin" / "ardtrain"  # what pip installs, for this checkout
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m ardtrain "$@"\n')
    ours.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def expected(cluster, place):
    """The page's run on one process without ZeRO-3: what every way to start it must equal to the bit."""
    settings = ["output_dir=runs/alone", "deepspeed=null"]
    command = [sys.executable, "-m", "ardtrain", "train", "ardtrain.yaml", *settings]
    done = cluster.run("node1", command, cwd=place, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    alone = fingerprint(place / "runs/alone")
    assert len(set(alone["tables"])) > 1  # ranks move
    return alone


def shell(cluster, place, host, text, **env):
    mpirun("openmpi")
    path = f"{place / 'bin'}:{ENVIRONMENT['PATH']}"
    return cluster.popen(host, ["bash", "-euc", text], cwd=place, env=AS_ROOT | {"PATH": path} | env)


def test_every_bash_block_is_marked():
    assert len(BLOCKS) == len(re.findall("^```bash", PAGE, re.MULTILINE)) >= 8


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(cluster, place, expected, number):
    kind, text = BLOCKS[number]
    shutil.rmtree(place / "runs/first", ignore_errors=True)
    home = Path(cluster.path) / "home" / ".deepspeed_env"
    by_hand = text.startswith("deepspeed --hostfile hostfile --num_nodes")
    if by_hand:
        home.write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    hosts = cluster.names if kind == "run on each host" else cluster.names[:1]
    log = place / f"block-{number}"
    started = [
        shell(cluster, place, host, f"exec >{log}-{host} 2>&1\n{text}", NODE_RANK=str(i))
        for i, host in enumerate(hosts)
    ]
    codes = [process.wait(200) for process in started]
    home.unlink(missing_ok=True)
    said = "".join(Path(f"{log}-{host}").read_text(errors="replace") for host in hosts)
    assert codes == [0] * len(hosts), said[-4000:]
    wait_for_jobs(cluster)
    for run in re.findall(r"output_dir=(\S+)", text):
        assert (place / run / "status").read_text() == "finished 8\n", said[-4000:]
        assert fingerprint(place / run) == expected
    if "--to" in text and "stop" not in text:
        job = json.loads((place / "runs/first/job.json").read_text())
        job_log = Path(job["log"]).read_text(errors="replace")
        assert (place / "runs/first/status").read_text() == "finished 8\n", job_log[-4000:]
        assert fingerprint(place / "runs/first") == expected


def wait_for_jobs(cluster, timeout=150):
    """Until Slurm and the hosts have no run left."""
    end = time.monotonic() + timeout

    def left():
        yield from cluster.run("node1", ["squeue", "-h"]).stdout.split()
        yield from (c for host in cluster.names for _, c in cluster.processes(host) if "ardtrain" in c and "runs/" in c)

    while remaining := list(left()):
        assert time.monotonic() < end, remaining
        time.sleep(0.3)
