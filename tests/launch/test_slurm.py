"""`ardtrain submit --to slurm` on two hosts with a real Slurm: trained, interrupted in every way, never lost."""

import json
import os
import re
import signal
import sys
import time

import pytest

from tests.launch.conftest import LONG, unbroken
from tests.runs import fingerprint, lines, write_run

pytestmark = pytest.mark.launch
ARDTRAIN = [sys.executable, "-m", "ardtrain"]


def submit(cluster, folder, name, *arguments, env=None, **settings):
    """Submits a run of two processes on two hosts under ZeRO-3; returns the job's number and the run folder."""
    launcher = {"nodes": 2, "time": "00:10:00", "signal_seconds": 60, "preflight": False} | settings.pop("launcher", {})
    values = {"deepspeed": "zero3_offload_param", "launcher": launcher, "watchdog_seconds": 120} | settings
    config = write_run(folder, name, **values)
    done = cluster.run("node1", [*ARDTRAIN, "submit", str(config), "--to", "slurm", *arguments], cwd=folder, env=env)
    assert done.returncode == 0, done.stdout
    match = re.search(r"job (\d+) submitted", done.stdout)
    assert match, done.stdout
    return match[1], folder / name


def job_state(cluster, job):
    """Slurm's word for it, such as RUNNING or COMPLETED."""
    return re.search(r"JobState=(\w+)", cluster.run("node1", ["scontrol", "show", "job", job]).stdout)[1]


def restarts(cluster, job):
    return int(re.search(r"Restarts=(\d+)", cluster.run("node1", ["scontrol", "show", "job", job]).stdout)[1])


def wait_state(cluster, job, *states, timeout=150):
    """Waits for one of these states; returns it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        state = job_state(cluster, job)
        if state in states:
            return state
        time.sleep(0.5)
    raise AssertionError(f"job {job} is {state}, not {states}, after {timeout} s\n{log(cluster, job)}")


def log(cluster, job):
    path = re.search(r"StdOut=(\S+)", cluster.run("node1", ["scontrol", "show", "job", job]).stdout)[1]
    try:
        return open(path, errors="replace").read()
    except OSError as error:
        return str(error)


def wait_step(run, step, timeout=120):
    """Waits until so many steps are recorded."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and max((m["step"] for m in lines(metrics)), default=0) >= step:
            return
        time.sleep(0.2)
    text = "\n".join(path.read_text(errors="replace")[-3000:] for path in (run / "logs").glob("slurm-*"))
    raise AssertionError(f"step {step} did not come in {timeout} s\n{text}")


def test_two_hosts_equal_one_process_to_the_bit(cluster, runs_folder, alone):
    job, run = submit(cluster, runs_folder, "slurm", launcher={"preflight": True})
    assert wait_state(cluster, job, "COMPLETED", "FAILED") == "COMPLETED", log(cluster, job)
    assert (run / "status").read_text() == "finished 16\n"
    assert fingerprint(run) == alone
    assert restarts(cluster, job) == 0
    assert "fit to train" in log(cluster, job)  # the preflight's last line


@pytest.mark.full
def test_the_time_limit_saves_requeues_and_resumes(cluster, runs_folder):
    slow = LONG | {"global_batch_size": 48}  # lasts until the limit, on a fast machine too
    expected = unbroken(cluster, runs_folder, "limit_alone", **slow)
    # The signal comes after about 35 s: Slurm counts whole minutes and may be early.
    launcher = {"time": "00:02:00", "signal_seconds": 60, "directives": ["--signal=B:USR1@85"]}
    job, run = submit(cluster, runs_folder, "limit", launcher=launcher, **slow)
    wait_for(lambda: restarts(cluster, job) == 1, 120)
    cluster.run("node1", ["scontrol", "update", f"JobId={job}", "TimeLimit=30"])  # once is enough
    wait_state(cluster, job, "COMPLETED", "FAILED", "TIMEOUT", timeout=240)
    assert (run / "status").read_text() == "finished 140\n", log(cluster, job)
    assert "requeued: it saved and stopped on a signal" in log(cluster, job)
    assert fingerprint(run) == expected


def preempt(cluster):
    """A job of the urgent partition takes both hosts for a moment."""
    command = [
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=:",
    ]
    done = cluster.run("node1", command)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_a_preempted_run_loses_nothing(cluster, runs_folder, long_alone):
    job, run = submit(cluster, runs_folder, "preempted", **LONG)
    wait_step(run, 30)
    urgent = preempt(cluster)
    wait_state(cluster, urgent, "COMPLETED", timeout=60)
    wait_state(cluster, job, "COMPLETED", "FAILED", timeout=150)
    assert (run / "status").read_text() == "finished 140\n", log(cluster, job)
    assert restarts(cluster, job) == 1
    assert fingerprint(run) == long_alone


@pytest.mark.full
def test_ten_preemptions_in_a_row_lose_nothing(cluster, runs_folder):
    long = LONG | {"max_steps": 520, "eval_steps": 130}
    expected = unbroken(cluster, runs_folder, "ten_alone", **long)
    job, run = submit(cluster, runs_folder, "ten", **long)
    for number in range(10):
        wait_step(run, 45 * (number + 1))
        wait_state(cluster, preempt(cluster), "COMPLETED", timeout=60)
    wait_state(cluster, job, "COMPLETED", "FAILED", timeout=240)
    assert (run / "status").read_text() == "finished 520\n", log(cluster, job)
    assert restarts(cluster, job) == 10
    assert fingerprint(run) == expected


@pytest.mark.full
def test_cancelled_stays_cancelled_and_the_next_submit_goes_on_with_other_hosts(cluster, runs_folder, long_alone):
    job, run = submit(cluster, runs_folder, "cancelled", **LONG)
    wait_step(run, 25)
    second = cluster.run("node1", [*ARDTRAIN, "submit", str(run) + ".yaml", "--to", "slurm"], cwd=runs_folder)
    assert second.returncode == 2 and f"its job {job} is RUNNING" in second.stdout  # one job a run folder
    cluster.run("node1", ["scancel", job])
    wait_state(cluster, job, "CANCELLED", timeout=60)
    assert (run / "status").read_text().startswith("requeue ")  # it saved
    assert restarts(cluster, job) == 0
    wait_for(lambda: not running(cluster), 30)
    saved = int((run / "status").read_text().split()[1])
    one, _ = submit(cluster, runs_folder, "cancelled", launcher={"nodes": 1}, **LONG)
    wait_step(run, saved + 10)
    stop = cluster.run("node1", [*ARDTRAIN, "stop", str(run), "--wait", "60"], cwd=runs_folder)
    assert stop.returncode == 0, stop.stdout
    assert wait_state(cluster, one, "COMPLETED", "FAILED", timeout=60) == "COMPLETED"
    assert (run / "status").read_text().startswith("stopped ")
    assert restarts(cluster, one) == 0
    two, _ = submit(cluster, runs_folder, "cancelled", **LONG)
    wait_state(cluster, two, "COMPLETED", "FAILED", timeout=150)
    assert (run / "status").read_text() == "finished 140\n", log(cluster, two)
    assert fingerprint(run) == long_alone


def running(cluster):
    return cluster.run("node1", ["squeue", "-h"]).stdout.strip()


@pytest.mark.full
def test_scontrol_requeue_saves_and_resumes(cluster, runs_folder, long_alone):
    job, run = submit(cluster, runs_folder, "requeued", **LONG)
    wait_step(run, 25)
    cluster.run("node1", ["scontrol", "requeue", job])
    wait_state(cluster, job, "PENDING", "CONFIGURING", timeout=30)
    wait_state(cluster, job, "COMPLETED", "FAILED", timeout=150)
    assert (run / "status").read_text() == "finished 140\n", log(cluster, job)
    assert fingerprint(run) == long_alone


def kill_one(cluster, host, number=9):
    """Signals the training process of a host."""
    pids = training(cluster, host)
    assert pids, cluster.processes(host)
    os.kill(pids[-1], number)


def test_a_killed_process_is_requeued_after_progress_and_fails_without(cluster, runs_folder):
    job, run = submit(cluster, runs_folder, "killed", **LONG | {"max_steps": 4000, "save_steps": 400})
    wait_step(run, 15)
    (run / "STOP").touch()  # a checkpoint, and then another start of the same run
    wait_state(cluster, job, "COMPLETED", timeout=60)
    job, run = submit(cluster, runs_folder, "killed", **LONG | {"max_steps": 4000, "save_steps": 20})
    first = (run / "latest").read_text()
    wait_for(lambda: (run / "latest").read_text() != first, 60)
    kill_one(cluster, "node2")
    wait_for(lambda: restarts(cluster, job) == 1, 60)
    wait_state(cluster, job, "RUNNING", timeout=60)
    assert "requeued: it failed after progress" in log(cluster, job)
    wait_for(lambda: bool(training(cluster, "node2")), 60)
    kill_one(cluster, "node2")  # before the next checkpoint
    assert wait_state(cluster, job, "FAILED", "COMPLETED", timeout=60) == "FAILED"
    assert restarts(cluster, job) == 1


def training(cluster, host):
    return [pid for pid, command in cluster.processes(host) if "ardtrain train" in command and "srun" not in command]


def wait_for(test, timeout):
    end = time.monotonic() + timeout
    while not test():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


@pytest.mark.full
def test_a_stopped_process_is_ended_by_the_watchdog_of_the_others(cluster, runs_folder):
    job, run = submit(
        cluster, runs_folder, "hung", **LONG | {"max_steps": 4000, "save_steps": 400, "watchdog_seconds": 8}
    )
    wait_step(run, 5)
    kill_one(cluster, "node2", signal.SIGSTOP)
    assert wait_state(cluster, job, "FAILED", "COMPLETED", timeout=60) == "FAILED"
    text = log(cluster, job) + (run / "logs" / "process-0000.log").read_text()
    assert "no step for 8 s" in text


@pytest.mark.full
def test_a_lost_host_is_requeued_and_the_run_goes_on(cluster, runs_folder, long_alone):
    job, run = submit(cluster, runs_folder, "lost", **LONG)
    wait_step(run, 25)
    cluster.poweroff("node2")
    try:
        wait_for(lambda: restarts(cluster, job) == 1, 90)
    finally:
        cluster.boot("node2")
    wait_state(cluster, job, "COMPLETED", "FAILED", timeout=200)
    assert (run / "status").read_text() == "finished 140\n", log(cluster, job)
    assert fingerprint(run) == long_alone


@pytest.mark.full
def test_one_element_of_an_array_requeues_alone(cluster, runs_folder):
    values = json.loads(write_run(runs_folder, "element", **LONG | {"max_steps": 200}).read_text())
    suites_own = ("output_dir", "method", "elalora", "resume_from_checkpoint", "learning_rate")
    base = {k: v for k, v in values.items() if k not in suites_own}
    base |= {"launcher": {"time": "00:10:00", "signal_seconds": 60}}
    suite = {"name": "sweep", "output_dir": str(runs_folder / "sweep"), "base": base,
             "methods": {"lora": {"method": "lora"}}, "learning_rates": [5e-3], "seeds": [1, 2],
             "metric": "eval_loss", "reference": "lora"}  # fmt: skip
    (runs_folder / "suite.yaml").write_text(json.dumps(suite))
    command = [*ARDTRAIN, "submit", "--array", "suite.yaml", "--to", "slurm"]
    done = cluster.run("node1", command, cwd=runs_folder)
    assert done.returncode == 0 and "2 runs; when all have ended" in done.stdout, done.stdout
    job = re.search(r"job (\d+) submitted", done.stdout)[1]
    first, second = (runs_folder / "sweep/lora" / f"lr-0.005/seed-{seed}/test" for seed in (1, 2))
    for run in (first, second):
        wait_step(run, 15)
    # As at a time limit; the last element has the whole array's number.
    cluster.run("node1", ["scancel", "--batch", "--signal=USR1", f"{job}_1"])
    for element in ("0", "1"):
        wait_state(cluster, f"{job}_{element}", "COMPLETED", "FAILED", timeout=150)
    assert [restarts(cluster, f"{job}_{element}") for element in ("0", "1")] == [0, 1]
    assert (first / "status").read_text() == (second / "status").read_text() == "finished 200\n"
    logs = sorted(path.name for path in (runs_folder / "sweep" / "logs").iterdir())
    assert logs == [f"slurm-{job}_0.out", f"slurm-{job}_1.out"]
    table = cluster.run("node1", [*ARDTRAIN, "compare", "suite.yaml"], cwd=runs_folder, timeout=60)  # runs nothing
    assert table.returncode == 0 and "done before" in table.stdout and "2 of 2" in table.stdout, table.stdout
