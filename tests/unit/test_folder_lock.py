"""One run at a time in a folder."""

import contextlib
import os
import signal
import subprocess
import sys

import filelock
import pytest

from ardtrain import run
from ardtrain.config import ConfigError
from ardtrain.environment import discover
from ardtrain.faults import host_name, write_status
from ardtrain.folder_lock import LOCK_FILE, sole_user
from tests.runs import write_run

HOLDER = """
import sys, time
from ardtrain.folder_lock import sole_user
with sole_user(sys.argv[1], refusal=""):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_by_another(folder):
    """A process that holds the folder; it is killed, as by a lost memory."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.send_signal(signal.SIGKILL)


def test_a_folder_is_held_until_its_process_ends_however_it_ends(tmp_path):
    with (
        held_by_another(tmp_path),
        pytest.raises(ConfigError, match="taken"),
        sole_user(tmp_path, refusal="taken", patience_seconds=0.5),
    ):
        raise AssertionError("two at once")
    with sole_user(tmp_path, refusal="taken", patience_seconds=5):
        assert (tmp_path / LOCK_FILE).is_file()
    with sole_user(tmp_path, refusal="taken"):
        pass


def test_a_file_system_without_locks_warns_and_lets_the_run_go_on(tmp_path, monkeypatch, caplog):
    def refuse(self, **_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with sole_user(tmp_path, refusal="taken"):
        pass
    assert "not locked ([Errno 38] Function not implemented); start nothing else in this folder" in caplog.text


@pytest.fixture
def process(tmp_path):
    made = run.Process(discover({}), tmp_path, None)
    yield made
    made.log.close()


def test_a_folder_held_by_a_lost_host_is_waited_for(tmp_path, process, monkeypatch, caplog):
    monkeypatch.setattr(run, "ENDING_SECONDS", 0.1)
    write_status(tmp_path, "started", 3, host="elsewhere", pid=7)
    with held_by_another(tmp_path) as holder, contextlib.ExitStack() as held:
        monkeypatch.setattr(run.logger, "warning", lambda *_: holder.send_signal(signal.SIGKILL))
        process.hold_folder("output_dir", held)
    assert not process.is_guest


def test_a_second_run_is_refused_and_leaves_the_first_ones_status(tmp_path):
    config = write_run(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    write_status(folder, "started", 3, host=host_name(), pid=4711)
    before = (folder / "status.json").read_bytes()
    with sole_user(folder, refusal=""):
        second = subprocess.run(
            [sys.executable, "-m", "ardtrain", "train", str(config)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert second.returncode == 2, second.stderr
    said = f"output_dir={folder}: another run works there (process 4711 on {host_name()}); wait for it, stop it with"
    told = second.stdout + second.stderr
    assert said in told and "Traceback" not in told
    assert (folder / "status.json").read_bytes() == before
    assert not [name for name in os.listdir(folder) if name.startswith("checkpoint")]


def test_a_refused_run_writes_no_status_where_the_first_has_none_yet(tmp_path, process, monkeypatch):
    monkeypatch.setattr(run, "ENDING_SECONDS", 0.1)
    with held_by_another(tmp_path), contextlib.ExitStack() as held, pytest.raises(ConfigError, match="--out=.*another"):
        process.hold_folder("--out", held)
    process._write_failure("refused")
    assert not (tmp_path / "status").exists()
