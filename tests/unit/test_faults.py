import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ardtrain import faults
from ardtrain.faults import (
    ERROR_KEY,
    STATE_AFTER,
    StopCode,
    StopRequest,
    Watchdog,
    guard_streams,
    host_name,
    lost_peer,
    read_status,
    write_failure,
    write_status,
)

STORES = """
import os, sys, time
from ardtrain.faults import ERROR_KEY, Watchdog

class Memory(dict):
    def check(self, keys): return all(key in self for key in keys)
    def get(self, key): return self[key]
    def set(self, key, value): self[key] = value
    def compare_set(self, key, expected, value): return self.setdefault(key, value.encode())

class Gone(Memory):
    def check(self, keys): raise ConnectionError("Connection reset by peer")
    def compare_set(self, *_): raise ConnectionError("Connection reset by peer")

class Silent(Memory):
    def check(self, keys): time.sleep(100)

def watch(store, **settings):
    dog = Watchdog(store, hosts_store=False, poll_seconds=0.05, **settings)
    dog.start()
    return dog
"""


def run_python(body, **settings):
    """Exit code, stderr and seconds of a process that runs `body` after the stores above."""
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", STORES + body], stderr=subprocess.PIPE, text=True, timeout=30, **settings
    )
    return result.returncode, result.stderr, time.monotonic() - start


class MemoryStore(dict):
    def check(self, keys):
        return all(key in self for key in keys)

    def compare_set(self, key, expected, value):
        assert expected == ""
        return self.setdefault(key, value.encode())


def test_stop_file_counts_on_process_0_only_and_is_removed_after_the_stop(tmp_path):
    first, other = StopRequest(tmp_path, reads_file=True), StopRequest(tmp_path, reads_file=False)
    assert first.requested() == StopCode.NONE
    (tmp_path / "STOP").touch()
    assert (first.requested(), other.requested()) == (StopCode.FILE, StopCode.NONE)
    other.carried_out()
    assert (tmp_path / "STOP").exists()
    first.carried_out()
    assert first.requested() == StopCode.NONE


def test_a_stop_file_that_cannot_be_removed_is_told_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "STOP").mkdir()
    StopRequest(tmp_path, reads_file=True).carried_out()
    assert "STOP cannot be removed (Is a directory); remove it, or the next start stops at once" in caplog.text


def test_signal_sets_the_flag_and_the_old_handler_comes_back(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    (tmp_path / "STOP").touch()
    with StopRequest(tmp_path, reads_file=True, signals=["SIGUSR1"]) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # a second one changes nothing
        assert stop.requested() == StopCode.FILE  # the user's word weighs more: after a signal the job comes again
        (tmp_path / "STOP").unlink()
        assert stop.requested() == StopCode.SIGNAL
    assert signal.getsignal(signal.SIGUSR1) is before
    assert [STATE_AFTER[code] for code in StopCode] == ["finished", "stopped", "requeue"]


def test_a_process_that_fails_has_the_time_to_say_why(tmp_path):
    body = f"""
import signal
from ardtrain.faults import StopRequest
try:
    with StopRequest({str(tmp_path)!r}, reads_file=True):
        raise FloatingPointError("boom")
except FloatingPointError as error:
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher's
    sys.exit(str(error))
"""
    assert run_python(body)[:2] == (1, "boom\n")


def test_status_is_one_line_beside_its_details(tmp_path):
    write_status(tmp_path, "started", 0)
    write_status(tmp_path, "failed", 7, error="loss is nan", path=tmp_path)
    assert (tmp_path / "status").read_text() == "failed 7\n"
    details = json.loads((tmp_path / "status.json").read_text())
    assert (details["state"], details["step"], details["error"]) == ("failed", 7, "loss is nan")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["status", "status.json"]


def test_status_line_is_written_last(tmp_path):
    (tmp_path / "status.json").mkdir()  # the details cannot be written
    with pytest.raises(OSError, match="status.json"):
        write_status(tmp_path, "finished", 9)
    assert not (tmp_path / "status").exists()


def test_a_failure_keeps_what_the_start_has_said(tmp_path):
    assert read_status(tmp_path) == {}
    write_failure(tmp_path, None, "no room")
    assert (tmp_path / "status").read_text() == "failed 0\n"
    write_status(tmp_path, "started", 3, host=host_name(), pid=os.getpid(), num_steps=9)
    write_failure(tmp_path, None, "killed")  # before the first step
    record = read_status(tmp_path)
    assert (record["state"], record["step"], record["num_steps"], record["error"]) == ("failed", 3, 9, "killed")


@pytest.mark.parametrize("state", ["finished", "stopped", "requeue", "failed", "started"])
def test_a_refused_start_leaves_the_status_of_an_earlier_run(tmp_path, state):
    write_status(tmp_path, state, 16, host=host_name(), pid=os.getpid() + (state == "started"), error="of before")
    before = (tmp_path / "status.json").read_bytes()
    write_failure(tmp_path, None, "refused")
    assert (tmp_path / "status").read_text() == f"{state} 16\n"
    assert (tmp_path / "status.json").read_bytes() == before


def test_consequences_are_told_from_causes():
    gloo = "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"
    assert lost_peer(RuntimeError(gloo)) and lost_peer(RuntimeError("NCCL communicator was aborted on rank 3."))
    assert not lost_peer(RuntimeError("step 3: processes [1] hold another rank plan than process 0"))
    assert not lost_peer(ConnectionResetError("Connection reset by peer"))  # of a download, say


def test_error_of_another_process_ends_this_one():
    code, text, seconds = run_python(
        "store = Memory(); watch(store); store.set(ERROR_KEY, b'process 3: boom'); time.sleep(20)"
    )
    assert code == 70
    assert "another one failed:\nprocess 3: boom" in text
    assert seconds < 5


def test_the_host_of_the_store_lets_the_others_read_before_it_ends():
    ended = []
    store = MemoryStore({ERROR_KEY: b"boom"})
    dog = Watchdog(store, hosts_store=True, poll_seconds=0.2, exit_process=ended.append)
    start = time.monotonic()
    dog.start()
    while not ended and time.monotonic() - start < 10:
        time.sleep(0.01)
    dog.stop()
    assert ended == [70]
    assert time.monotonic() - start > 0.2 + 2 * 0.2


def test_a_closed_stderr_does_not_keep_the_process():
    reader, writer = os.pipe()
    os.close(reader)
    body = "store = Memory(); watch(store); store.set(ERROR_KEY, b'boom'); time.sleep(20)"
    process = subprocess.Popen([sys.executable, "-c", STORES + body], stderr=writer)
    os.close(writer)
    assert process.wait(timeout=15) == 70


def test_a_full_stderr_does_not_keep_the_process():
    body = "store = Memory(); watch(store); store.set(ERROR_KEY, b'x' * 1_000_000); time.sleep(20)"
    process = subprocess.Popen([sys.executable, "-c", STORES + body], stderr=subprocess.PIPE)  # nobody reads
    assert process.wait(timeout=15) == 70
    process.stderr.close()


def test_a_store_that_is_gone_ends_the_process():
    code, text, _ = run_python("watch(Gone()); time.sleep(20)")
    assert code == 70
    assert "the store on process 0 is gone (Connection reset by peer)" in text


def test_a_store_that_does_not_answer_ends_the_process():
    code, text, _ = run_python("watch(Silent(), store_seconds=0.3); time.sleep(20)")
    assert code == 70
    assert "the store on process 0 has not answered for 0.3 s" in text


def test_a_failed_poll_or_two_are_forgiven():
    code, text, _ = run_python(
        """
class Flaky(Memory):
    calls = 0
    def check(self, keys):
        self.calls += 1
        if self.calls % 3: raise ConnectionError("busy")
        return False
watch(Flaky()); time.sleep(1)
"""
    )
    assert (code, text) == (0, "")


def test_stall_shows_all_stacks():
    code, text, _ = run_python("def stuck(): time.sleep(20)\nwatch(Memory(), stall_seconds=0.3); stuck()")
    assert code == 86
    assert "no step for 0.3 s" in text
    assert "in stuck" in text


def test_stall_is_seen_beside_a_store_that_hangs():
    assert run_python("watch(Silent(), stall_seconds=0.3); time.sleep(20)")[0] == 86


def test_touch_puts_the_stall_off():
    body = """
dog = watch(None, stall_seconds=0.5)
for _ in range(8): time.sleep(0.1); dog.touch()
dog.touch(extra_seconds=5); time.sleep(1)
dog.stop(); time.sleep(1)
"""
    assert run_python(body)[:2] == (0, "")


def test_report_keeps_the_first_text_and_does_not_end_the_reporter():
    store, ended, first = MemoryStore(), [], []
    for text in ("the cause", "its consequence"):
        dog = Watchdog(store, hosts_store=False, poll_seconds=0.05, exit_process=ended.append)
        dog.start()
        first.append(dog.report(text))
        dog.linger()
    assert first == ["the cause", "the cause"]
    assert store == {ERROR_KEY: b"the cause"}
    assert ended == []


@pytest.mark.parametrize("cause_comes", [True, False])
def test_a_consequence_waits_for_its_cause(cause_comes):
    store = MemoryStore()
    dog = Watchdog(store, hosts_store=True, poll_seconds=0.05, first_text_seconds=1.0 if cause_comes else 0.2)
    dog.start()
    if cause_comes:
        threading.Timer(0.2, store.setdefault, [ERROR_KEY, b"the cause"]).start()
    text = dog.report("connection closed", lost_peer=True)
    dog.linger()
    assert text == ("the cause" if cause_comes else "connection closed")
    assert store[ERROR_KEY].decode() == text


def test_texts_and_stacks_go_where_they_belong(tmp_path):
    """Process 0: console and log; another's failure costs no stacks on the console."""
    body = f"""
log = os.open({str(tmp_path / "log")!r}, os.O_CREAT | os.O_WRONLY)
def here(**settings):
    dog = Watchdog(Memory(ERROR_KEY_AND_TEXT), hosts_store=True, poll_seconds=0.05, log=log, **settings)
    dog.start(); time.sleep(20)
here(on_failure=lambda text: open({str(tmp_path / "status")!r}, "w").write(text), STALL)
"""
    failed = body.replace("ERROR_KEY_AND_TEXT", "{ERROR_KEY: b'boom'}").replace("STALL", "stall_seconds=None")
    code, console, _ = run_python(failed)
    log = (tmp_path / "log").read_text()
    assert code == 70 and "boom" in console and "boom" in log
    assert "in here" in log and "in here" not in console
    assert (tmp_path / "status").read_text() == "boom"
    stalled = body.replace("ERROR_KEY_AND_TEXT", "").replace("STALL", "stall_seconds=0.3, process='process 7'")
    code, console, _ = run_python(stalled)
    assert code == 86 and "in here" in console and "in here" in (tmp_path / "log").read_text()
    assert (tmp_path / "status").read_text() == "process 7: no step for 0.3 s"


def test_a_stall_is_told_to_the_others():
    code, text, _ = run_python(
        "store = Memory(); watch(store, stall_seconds=0.3, process='process 7 on b',"
        " exit_process=lambda code: os.write(2, f'{code} {store[ERROR_KEY]}'.encode())); time.sleep(3)"
    )
    assert "86 b'process 7 on b: no step for 0.3 s'" in text


@pytest.mark.parametrize("how", ["poll", "report"])
def test_one_process_says_on_the_console_that_process_0_is_gone(how):
    act = "time.sleep(20)" if how == "poll" else "dog.report('mine'); sys.exit(70)"
    reader, writer = os.pipe()
    body = f"dog = watch(Gone(), console=None, last_words={writer}, process='process 1 on b (log: l)'); {act}"
    code, text, _ = run_python(body, pass_fds=[writer])
    os.close(writer)
    words = os.read(reader, 10_000).decode()
    os.close(reader)
    assert (code, text) == (70, "")
    assert words.startswith("ardtrain: process 1 on b (log: l): the store on process 0 ")
    assert words.count("\n") == 1


TORCH_STORE = """
import datetime, sys, time
from torch.distributed import PrefixStore, TCPStore
from ardtrain.faults import Watchdog

host, port = sys.argv[1] == "host", int(sys.argv[2])
store = TCPStore("127.0.0.1", port, None, host, timeout=datetime.timedelta(seconds=30), wait_for_workers=False)
if host: print(store.port, flush=True)
shared = PrefixStore("ardtrain", store)
dog = Watchdog(PrefixStore("ardtrain", store.clone()), hosts_store=host, poll_seconds=0.1)
dog.start()
"""


def start_python(body, *arguments):
    command = [sys.executable, "-c", TORCH_STORE + body, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("failing", ["host", "peer"])
def test_over_torchs_store_the_text_reaches_a_process_that_waits(failing):
    """The peer hangs in a wait on the shared connection, as in a process group's first meeting."""
    fail = "shared.wait(['here']); print(dog.report('process x: boom')); dog.linger(); sys.exit(3)\n"
    hang = "shared.set('here', b''); shared.wait(['never'], datetime.timedelta(seconds=20))\n"
    host = start_python(fail if failing == "host" else hang, "host", "0")
    port = host.stdout.readline().strip()
    peer = start_python(hang if failing == "host" else fail, "peer", port)
    _, host_text = host.communicate(timeout=30)
    _, peer_text = peer.communicate(timeout=30)
    victim, text = (peer, peer_text) if failing == "host" else (host, host_text)
    assert (host if failing == "host" else peer).returncode == 3
    assert victim.returncode == 70
    assert "process x: boom" in text


def test_report_survives_a_dead_store():
    body = "dog = watch(Gone()); assert dog.report('boom') == 'boom'; dog.linger(); sys.exit(3)"
    assert run_python(body)[:2] == (3, "")


@pytest.mark.parametrize("guarded", [True, False])
def test_guarded_streams_survive_a_broken_pipe(guarded):
    body = f"""
import sys
from ardtrain.faults import guard_streams
if {guarded}: guard_streams(); guard_streams()
for _ in range(3): print("x" * 10000, flush=True)
print("saved", file=sys.stderr)
"""
    reader, writer = os.pipe()
    os.close(reader)
    code, text, _ = run_python(body, stdout=writer)
    os.close(writer)
    assert (code == 0, "saved" in text) == (guarded, guarded)


def test_guarded_streams_keep_the_rest_of_their_interface(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    guard_streams()
    print("hello")
    assert sys.stdout.encoding
    assert capsys.readouterr().out == "hello\n"


def test_a_signal_before_the_request_is_held_for_it(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with faults.held_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest(tmp_path, reads_file=True) as request:
            assert request.requested() == StopCode.SIGNAL
    assert signal.getsignal(signal.SIGTERM) == before
    with faults.held_signals(), StopRequest(tmp_path, reads_file=True) as request:
        assert request.requested() == StopCode.NONE  # of another run


def test_a_held_signal_that_the_run_does_not_want_ends_it_as_ever(tmp_path):
    body = f"""
import signal
from ardtrain.faults import StopRequest, held_signals
with held_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("held", file=sys.stderr, flush=True)
    with StopRequest({str(tmp_path)!r}, reads_file=True, signals=["SIGUSR1"]):
        print("not reached", file=sys.stderr, flush=True)
"""
    assert run_python(body)[:2] == (-signal.SIGTERM, "held\n")
