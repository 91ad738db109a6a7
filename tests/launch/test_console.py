"""What a user sees when one of three processes fails (the cause, once, from process 0), and of a run from outside."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ardtrain.faults import host_name
from tests.runs import lines, write_run

pytestmark = pytest.mark.launch
SIZE = 3
FAILURES = {"raises": (2, "raise"), "own": (0, "raise"), "killed": (1, "kill"), "headless": (0, "kill")}
SHORT = {"method": "lora", "elalora": None, "eval_steps": None, "per_device_train_batch_size": 1}


def play(folder):
    """All starts, forked from one process that has imported everything; codes and consoles go to `NAME.json`."""
    import ardtrain.run  # noqa: F401 - once, before the forks
    from ardtrain.trainer import Trainer
    from tests.launch import starts

    def start(name, result, *overrides):
        codes = starts.run(
            {"config": f"{folder}/{name}.yaml", "world_size": SIZE, "overrides": overrides}, folder
        )  # fmt: skip
        consoles = [(folder / f"log-{i}.txt").read_text() for i in range(SIZE)]
        (folder / f"{result}.json").write_text(json.dumps({"codes": codes, "consoles": consoles}))

    honest = Trainer._grain
    for name, (victim, act) in FAILURES.items():
        Trainer._grain = failing(honest, victim, act)
        start(name, name)
    Trainer._grain = honest
    start("refused", "first")
    start("refused", "refused", "resume_from_checkpoint=auto", "lora_alpha=3")


def failing(honest, victim, act):
    """A grain that fails in the middle of step 1 on one process; the others then wait for it in a collective."""
    calls = 0

    def grain(self, *arguments):
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == str(victim) and calls == 5:
            if act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(2, b"words of C++\n")
            raise FloatingPointError("provoked in mid-step")
        return honest(self, *arguments)

    return grain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def played(folder):
    """Name of a start -> its exit codes and its consoles by process."""
    for name in FAILURES:
        write_run(folder, name, **SHORT)
    write_run(folder, "refused", **SHORT | {"max_steps": 2})
    code = "import pathlib, sys; from tests.launch.test_console import play; play(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"ARDTRAIN_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in (*FAILURES, "first", "refused")}


def log_of(folder, name, process):
    return folder / name / "logs" / f"process-{process:04d}.log"


@pytest.mark.parametrize(("name", "victim"), [("raises", 2), ("own", 0)])
def test_the_console_shows_the_failing_process_once(folder, played, name, victim):
    codes, consoles = played[name]["codes"], played[name]["consoles"]
    assert codes == [1 if i == victim else 70 for i in range(SIZE)], consoles
    assert consoles[0].count("Traceback (most recent call last)") == 1, consoles
    assert consoles[0].count("FloatingPointError: provoked in mid-step") == 1, consoles
    log = log_of(folder, name, victim)
    assert f"process {victim} on {host_name()} failed (log: {log}):\nTraceback" in consoles[0], consoles
    assert consoles[1:] == ["", ""]
    assert "provoked in mid-step" in log.read_text()
    assert ("words of C++" in log.read_text()) is (victim != 0)  # process 0 keeps the console for them
    status = json.loads((folder / name / "status.json").read_text())
    assert status["state"] == "failed" and status["error"].endswith("provoked in mid-step"), status
    assert (status["world_size"], status["num_steps"], status["host"]) == (SIZE, 16, host_name())


def test_a_killed_process_is_told_as_killed(folder, played):
    codes, consoles = played["killed"]["codes"], played["killed"]["consoles"]
    assert codes == [70, -9, 70], consoles
    assert consoles[0].count("lost the connection to another process, and none has said why") == 1, consoles
    assert "kill -9" in consoles[0] and "Traceback" not in consoles[0], consoles
    assert "Traceback" in log_of(folder, "killed", 0).read_text()  # the whole of it
    assert consoles[1:] == ["", ""]
    assert (folder / "killed" / "status").read_text().startswith("failed ")


def test_without_process_0_one_other_says_so(folder, played):
    codes, consoles = played["headless"]["codes"], played["headless"]["consoles"]
    assert codes == [-9, 70, 70], consoles
    (line,) = consoles[1].splitlines()
    log = log_of(folder, "headless", 1)
    assert line.startswith(f"ardtrain: process 1 on {host_name()} (log: {log}): the store on process 0 "), line
    assert consoles[2] == ""


def test_a_refused_resume_leaves_a_finished_run_finished(folder, played):
    assert played["first"]["codes"] == [0] * SIZE
    codes, consoles = played["refused"]["codes"], played["refused"]["consoles"]
    assert codes[0] == 2 and 0 not in codes
    assert consoles[0].count("lora_alpha: the checkpoint has 8.0, this run 3.0") == 1, consoles
    assert "Traceback" not in consoles[0] and consoles[1:] == ["", ""]
    assert (folder / "refused" / "status").read_text() == "finished 2\n"


def test_stop_waits_until_the_run_has_saved(folder):
    config = write_run(folder, "stopped", **SHORT | {"max_steps": 100_000})
    run = folder / "stopped"
    environment = os.environ | {"ARDTRAIN_CACHE": str(folder / "cache")}

    def ardtrain(*arguments):
        command = [sys.executable, "-m", "ardtrain", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    with (folder / "stopped.txt").open("w") as out:
        training = subprocess.Popen(
            [sys.executable, "-m", "ardtrain", "train", str(config)], env=environment, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 150
        while not (run / "metrics.jsonl").exists() or len(lines(run / "metrics.jsonl")) < 3:
            assert training.poll() is None and time.monotonic() < deadline, (folder / "stopped.txt").read_text()
            time.sleep(0.1)
        shown = ardtrain("status", run)
        assert "started, step " in shown.stdout and f"(pid {training.pid}), launcher single" in shown.stdout, shown
        stopped = ardtrain("stop", run, "--wait", "120")
        assert stopped.returncode == 0, stopped
        state, step = (run / "status").read_text().split()
        assert state == "stopped" and (run / f"checkpoint-{step}").is_dir() and not (run / "STOP").exists()
        assert stopped.stdout == f"{run}: stopped, step {step} of 100000\n"
        assert training.wait(60) == 0
        again = ardtrain("stop", run)
        assert again.returncode == 0 and "is not running: stopped" in again.stdout
    finally:
        training.kill()
        training.wait()
