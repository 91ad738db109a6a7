import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types

import pytest

from ardtrain import trackers
from ardtrain.config import ConfigError, parse_config
from ardtrain.observe import RunLog
from ardtrain.trackers import Trackers, check_trackers


def config_of(folder, **settings):
    values = {
        "model_name_or_path": "m",
        "method": "lora",
        "output_dir": str(folder),
        "data": {"train_file": "t.jsonl"},
        "global_batch_size": 1,
        "max_steps": 6,
    }
    return parse_config(values | settings)


def run(folder, first, last, **settings):
    """Steps first + 1 to last of a run that logs each and evaluates every second one."""
    config = config_of(folder, **settings)
    start = lambda: Trackers(config, folder, first_step=first)  # noqa: E731
    with RunLog(
        folder, is_main=True, num_steps=6, first_step=first, show_bar=False, trackers=start
    ) as log:  # fmt: skip
        for step in range(first + 1, last + 1):
            log.metrics(step, {"loss": 1 / (step + first), "void": False, "norm": float("nan") if step == 2 else 0.5})
            if step % 2 == 0:
                log.metrics(step, {"eval_loss": 2 / step})


def numbers_in_metrics(folder):
    out = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "step" and value is not None:
                out[record["step"], name] = float(value)
    return out


def numbers_in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = [((e.step, tag), e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len(dict(found)) == len(found)  # no step twice
    return dict(found)


class Recorder(types.ModuleType):
    """Stands in for the package wandb: the calls it gets, over all starts."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.starts, self.logged, self.finished = [], [], []

    def init(self, **arguments):
        self.starts.append(arguments)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


def test_tensorboard_holds_the_numbers_of_the_records(tmp_path):
    run(tmp_path, 0, 6, report_to="tensorboard")
    wanted = numbers_in_metrics(tmp_path)
    assert len(wanted) == 6 * 3 - 1 + 3  # the nan is in neither
    assert numbers_in_tensorboard(tmp_path) == pytest.approx(wanted)


def test_a_resume_cuts_tensorboard_back_as_it_does_the_records(tmp_path):
    run(tmp_path, 0, 5, report_to="tensorboard")
    before = numbers_in_tensorboard(tmp_path)
    run(tmp_path, 3, 4, report_to="tensorboard")
    wanted, now = numbers_in_metrics(tmp_path), numbers_in_tensorboard(tmp_path)
    assert now == pytest.approx(wanted)
    assert now[3, "loss"] == before[3, "loss"] and now[4, "loss"] != before[4, "loss"]


def test_wandb_gets_the_records_under_one_id(tmp_path, wandb):
    settings = {"report_to": ["wandb"], "run_name": "mine"}
    run(tmp_path, 0, 5, **settings)
    assert {(s, n): float(v) for s, numbers in wandb.logged for n, v in numbers.items()} == numbers_in_metrics(tmp_path)
    run(tmp_path, 3, 6, **settings)
    first, second = wandb.starts
    assert first["id"] == second["id"] == json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    assert (first["resume"], first["name"], first["dir"]) == ("allow", "mine", tmp_path)
    assert first["config"]["max_steps"] == 6
    assert [step for step, _ in wandb.logged[-5:]] == [4, 4, 5, 6, 6]
    assert wandb.finished == [0, 0]
    other = tmp_path / "other"
    other.mkdir()
    run(other, 0, 1, **settings)
    assert wandb.starts[2]["id"] != first["id"]


def test_a_tracker_that_fails_is_told_once_and_ends_no_run(tmp_path, wandb, monkeypatch, caplog):
    def fails(*arguments, **named):
        raise ConnectionError("no route")

    monkeypatch.setattr(wandb, "log", fails)
    run(tmp_path, 0, 6, report_to=["wandb", "tensorboard"])
    assert [r.getMessage() for r in caplog.records] == [
        "wandb gets no more numbers (ConnectionError: no route); the run goes on, and metrics.jsonl has them all"
    ]
    assert numbers_in_tensorboard(tmp_path) == pytest.approx(numbers_in_metrics(tmp_path))
    caplog.clear()
    monkeypatch.setattr(wandb, "init", fails)
    run(tmp_path, 0, 6, report_to="wandb")
    assert len(caplog.records) == 1 and len(numbers_in_metrics(tmp_path)) == 20


def test_after_a_failure_no_tracker_keeps_the_others_waiting(tmp_path, wandb, monkeypatch):
    """W&B may upload for minutes, while the other processes wait in a collective."""
    uploaded, ended = threading.Event(), []

    def finish(exit_code):
        uploaded.wait(60)
        ended.append(exit_code)

    monkeypatch.setattr(wandb, "finish", finish)
    monkeypatch.setattr(trackers, "FAILED_SECONDS", 0.1)
    config = config_of(tmp_path, report_to="wandb")
    start = lambda: Trackers(config, tmp_path, first_step=0)  # noqa: E731
    with pytest.raises(FloatingPointError), RunLog(tmp_path, is_main=True, num_steps=1, trackers=start):
        raise FloatingPointError
    assert ended == []
    uploaded.set()


def test_other_processes_start_no_tracker(tmp_path):
    def start():
        raise AssertionError

    with RunLog(tmp_path, is_main=False, num_steps=1, trackers=start) as log:
        log.metrics(1, {"loss": 1.0})


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_a_mistake_of_the_config(tmp_path, monkeypatch, name):
    check_trackers(config_of(tmp_path, report_to="none"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(ConfigError, match=f"report_to={name}: .* pip install {name}"):
        check_trackers(config_of(tmp_path, report_to=name))


def test_unknown_trackers_are_refused(tmp_path):
    assert config_of(tmp_path, report_to="none").report_to == ()
    with pytest.raises(ConfigError, match="report_to"):
        config_of(tmp_path, report_to="comet")


def test_the_real_wandb_takes_it_offline(tmp_path):
    """In a process of its own, with the package itself."""
    pytest.importorskip("wandb")
    code = (
        "import sys, pathlib; from tests.unit.test_trackers import run\n"
        "for first, last in ((0, 5), (3, 6)): run(pathlib.Path(sys.argv[1]), first, last, report_to='wandb')"
    )
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "gets no more numbers" not in done.stdout + done.stderr, done.stdout + done.stderr
    number = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))) == 2
