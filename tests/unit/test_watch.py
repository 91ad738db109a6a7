import json
import os
import subprocess
import sys
import threading
import time

import pytest

from ardtrain import watch
from ardtrain.cli import main
from ardtrain.faults import host_name, write_status
from ardtrain.watch import look, status, stop

HERE = {"host": host_name(), "pid": os.getpid(), "launcher": "srun", "job_id": "4711_3", "world_size": 4}


def write_run(folder, state="started", step=0, *, last=60, **details):
    """A run of 100 steps that logs every tenth: half a second a step, 60 steps done, three events."""
    folder.mkdir(exist_ok=True)
    write_status(folder, state, step, **(HERE | {"num_steps": 100} | details))
    metrics = [
        {"step": s, "loss": 3 - s / 100, "tokens_per_second": 1000.0 + s, "elapsed_seconds": s / 2}
        for s in range(10, last + 1, 10)
    ]
    metrics.insert(3, {"step": 30, "eval_loss": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics) + '{"step": 7')  # in writing
    ranks = [{"step": 0, "event": 0, "table": {"a": 4, "b": 4, "c": 4}}]
    ranks += [{"step": 9, "event": 1, "changes": [{"site": "a", "before": 4, "after": 7}]}]
    ranks += [{"step": 19, "event": 2, "changes": [{"site": "b", "before": 4, "after": 1}]}]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ranks))
    (folder / "latest").write_text("checkpoint-50\n")
    return folder


def age(folder, seconds):
    """As if nothing had been written for so long; the status stays the oldest."""
    now = time.time()
    for path in folder.iterdir():
        old = seconds + (path.name.startswith("status"))
        os.utime(path, (now - old, now - old))


def gone_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_status_shows_what_a_run_is_doing(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / ".checkpoint-60.tmp-abc").mkdir()
    assert status([str(run)]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: text.strip() for name, text in lines.items() if name != "last written"} == {
        "run": str(run),
        "state": "started, step 60 of 100",
        "loss": "2.4000 at step 60",
        "held-out loss": "2.5000 at step 30",
        "speed": "1,060 tokens/s, 0.5 s/step, about 0:20 left",
        "checkpoint": "checkpoint-50, 10 steps behind, the next is being written",
        "ranks": "total 12 over 3 sites, 1 to 7, mean 4.00; 2 events so far",
        "where": f"4 processes, the first on {host_name()} (pid {os.getpid()}), launcher srun, job 4711_3",
    }


def test_status_as_json(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert status([runs[0], "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["step"], one["loss"], one["seconds_left"], one["ranks"]) == (60, 2.4, 20.0, [1, 4.0, 7])
    assert (one["alive"], one["checkpoint_step"], one["total_rank"], one["job_id"]) == (True, 50, 12, "4711_3")
    assert status([*runs, "--json"]) == 0
    assert [view["run"] for view in json.loads(capsys.readouterr().out)] == runs


@pytest.mark.parametrize("verb", ["status", "stop", "report"])
def test_files_that_cannot_be_read_are_named(tmp_path, capsys, verb):
    run = tmp_path / "run"
    write_run(run, step=3)
    (run / "status").write_bytes(b"\xff\xfe")
    assert main([verb, str(run)]) == 2
    assert f"{run / 'status'}: cannot be read (no text); make it a readable file" in capsys.readouterr().err
    (run / "status").unlink()
    (run / "status").mkdir()
    assert main([verb, str(run)]) == 2
    assert f"{run}: holds no run (no file `status`)" in capsys.readouterr().err


def test_records_that_cannot_be_read_are_named(tmp_path, capsys):
    write_run(tmp_path, step=3)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "metrics.jsonl").mkdir()
    for arguments in (["report"], ["ranks"]):
        assert main([*arguments, str(tmp_path)]) == 2
        assert f"{tmp_path / 'metrics.jsonl'}: " in capsys.readouterr().err


def test_status_of_several_runs_is_a_line_each(tmp_path, capsys):
    done = write_run(tmp_path / "done", "finished", 100, last=100, best_loss=2.25)
    broken = write_run(tmp_path / "broken", "failed", 33, error="Traceback\n...\nFloatingPointError: boom\n")
    running = write_run(tmp_path / "running")
    assert status([str(done), str(broken), str(running)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{done}: finished, step 100 of 100, loss 2.0000, held-out 2.5000",
        f"{broken}: failed, step 33 of 100: FloatingPointError: boom, loss 2.4000, held-out 2.5000",
        f"{running}: started, step 60 of 100, loss 2.4000, held-out 2.5000, 0:20 left",
    ]


def test_the_speed_is_that_of_the_newest_start(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("w") as file:
        for step, elapsed in ((10, 500.0), (20, 1000.0), (30, 3.0), (40, 5.0), (50, 7.0)):
            file.write(json.dumps({"step": step, "loss": 1.0, "elapsed_seconds": elapsed}) + "\n")
    assert look(run).seconds_per_step == 0.2


def test_a_run_before_its_first_step_has_few_lines(tmp_path, capsys):
    write_status(tmp_path, "started", 0)  # an older version said no more
    assert status([str(tmp_path)]) == 0
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["run", "state", "checkpoint", "last written"]
    assert look(tmp_path).alive


def test_a_status_that_a_job_script_wrote_has_no_details_of_the_start_before(tmp_path):
    write_run(tmp_path, "failed", 33, error="boom")
    (tmp_path / "status").write_text("started\n")
    view = look(tmp_path)
    assert (view.state, view.error, view.pid) == ("started", None, None)


@pytest.mark.parametrize(
    ("how", "details", "seconds", "alive"),
    [
        ("fresh", {}, 0, True),
        ("elsewhere", {"host": "another", "pid": 1}, 0, True),
        ("elsewhere, old", {"host": "another", "pid": 1}, 1000, False),
        ("hangs", {}, 1000, False),
        ("slow", {}, 800, True),
        ("gone", {"pid": None}, 0, False),
    ],
)
def test_signs_of_life(tmp_path, capsys, how, details, seconds, alive):
    if how == "gone":
        details = {"pid": gone_pid()}
    run = write_run(tmp_path / "run", **details)
    age(run, seconds)
    assert look(run).alive is alive
    status([str(run)])
    assert ("started, but no sign of life since " in capsys.readouterr().out) is not alive


def test_a_run_with_rare_lines_may_be_quiet_for_longer(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [{"step": s, "loss": 1.0, "elapsed_seconds": 60.0 * s} for s in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    age(run, 2900)
    assert look(run).alive
    age(run, 3100)
    assert not look(run).alive


@pytest.mark.parametrize("state", ["finished", "stopped", "requeue", "failed"])
def test_stop_of_a_run_that_does_not_run_leaves_no_file(tmp_path, capsys, state):
    run = write_run(tmp_path / "run", state, 60)
    (run / "STOP").touch()
    assert stop([str(run)]) == (0 if state in ("finished", "stopped") else 1)
    said = capsys.readouterr().out
    assert f"{state}, step 60 of 100" in said
    assert ("cancel it there" in said) == (state == "requeue")
    assert (run / "STOP").exists() == (state == "requeue")  # its job comes again


def test_stop_of_a_run_that_was_killed_says_so(tmp_path, capsys):
    run = write_run(tmp_path / "run", pid=gone_pid())
    assert stop([str(run), "--wait", "20"]) == 1
    assert "is not running: started, but no sign of life since" in capsys.readouterr().out
    assert not (run / "STOP").exists()


def test_stop_asks_and_does_not_wait(tmp_path):
    run = write_run(tmp_path / "run")
    assert stop([str(run)]) == 0
    assert (run / "STOP").exists()


@pytest.mark.parametrize(("state", "code"), [("stopped", 0), ("finished", 0), ("requeue", 1), ("failed", 1)])
def test_stop_waits_for_the_end(tmp_path, monkeypatch, capsys, state, code):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.02)
    run = write_run(tmp_path / "run")
    asked = []

    def end():
        while not (run / "STOP").exists():
            time.sleep(0.01)
        asked.append(True)
        write_status(run, state, 61)  # a finished run may not have seen the file

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    assert stop([str(run), "--wait"]) == code
    thread.join(10)
    assert asked and not (run / "STOP").exists()
    assert capsys.readouterr().out == f"{run}: {state}, step 61\n"


def test_stop_waits_for_a_limited_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.02)
    run = write_run(tmp_path / "run")
    assert stop(["--wait", str(run), "0.1"]) == 1
    assert "has not stopped after 0.1 s, at step 60; the request stands" in capsys.readouterr().out
    assert (run / "STOP").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["status", "FOLDER/nowhere"], "FOLDER/nowhere: no such folder; name a run's output_dir"),
        (["status", "FOLDER"], "FOLDER: holds no run"),
        (["status", "--all", "FOLDER"], "--all: is no option here"),
        (["status", "--json"], "which run folder"),
        (["stop", "FOLDER/nowhere"], "FOLDER/nowhere: no such folder"),
        (["stop", "--wait"], "which run folder"),
        (["stop", "FOLDER", "5"], "5: stop takes one run folder"),
        (["stop", "RUN", "--wait", "soon"], "--wait soon: must be a number of seconds"),
        (["stop", "RUN", "--wait", "nan"], "--wait nan: must be a number of seconds"),
    ],
)
def test_mistakes_have_a_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, error):
    monkeypatch.delenv("RANK", raising=False)
    write_run(tmp_path / "run")
    places = {"FOLDER": str(tmp_path), "RUN": str(tmp_path / "run")}
    for name, path in places.items():
        arguments = [a.replace(name, path) for a in arguments]
        error = error.replace(name, path)
    assert main(arguments) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "run" / "STOP").exists()


def test_a_request_that_cannot_be_removed_is_told(tmp_path, capsys):
    write_run(tmp_path / "run", state="finished")
    (tmp_path / "run" / "STOP").mkdir()
    assert main(["stop", str(tmp_path / "run")]) == 2
    assert "STOP: cannot be removed (Is a directory), and stops each start; remove it" in capsys.readouterr().err


def test_status_starts_without_torch(tmp_path):
    write_run(tmp_path / "run")
    code = "import sys; from ardtrain.cli import main; code = main(['status', sys.argv[1]])\n"
    code += "sys.exit(code or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True).returncode == 0


def test_a_job_that_waits_or_begins_is_told_and_can_be_stopped_once_it_begins(tmp_path, capsys):
    (tmp_path / "job.json").write_text('{"route": "slurm", "job_id": "77", "host": "login1"}')
    assert watch.look(tmp_path).state == "submitted" and watch.look(tmp_path).job_id == "77"
    assert watch.stop([str(tmp_path)]) == 1 and not (tmp_path / "STOP").exists()
    (tmp_path / "status").write_text("starting 0\n")
    assert watch.look(tmp_path).alive
    assert watch.stop([str(tmp_path)]) == 0 and (tmp_path / "STOP").exists()
