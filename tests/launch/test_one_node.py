"""The command of the README on one node: started by DeepSpeed's launcher, stopped, resumed on another world size."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.processes import run_processes
from tests.launch.stories import Stories
from tests.runs import fingerprint, lines, write_run

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def environment(folder):
    return {"ARDTRAIN_CACHE": str(folder / "cache")}


CHUNKS = {"whole": None, "chunks": 3}  # loss_chunk_tokens


@pytest.fixture(scope="module")
def alone(folder):
    """The unbroken run of one process without ZeRO-3, and beside it the same with other chunks of logits."""
    stories = Stories(folder)
    stories.add("alone", write_run(folder, "alone"), 1)
    for name, chunk_tokens in CHUNKS.items():
        stories.add(name, write_run(folder, name, loss_chunk_tokens=chunk_tokens), 1,
                    [f"loss_chunk_tokens={chunk_tokens or 'null'}"])  # fmt: skip
    stories.play()
    stories.ended_well("alone", *CHUNKS)
    assert (folder / "alone" / "status").read_text() == "finished 16\n"
    return fingerprint(folder / "alone")


def test_deepspeed_launcher_trains_like_one_process(folder, environment, alone):
    config = write_run(folder, "launched", deepspeed="zero3_offload")
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "29871"]
    command = [*launcher, str(ROOT / "ardtrain" / "main.py"), str(config)]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    done = subprocess.run(
        command, env=clean | environment | {"PATH": path}, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert fingerprint(folder / "launched") == alone
    assert "step 16 of 16: loss " in done.stdout  # no terminal: a line in place of the bar
    assert "ranks.png" in done.stdout and (folder / "launched" / "ranks.png").stat().st_size > 10_000


def test_whole_logits_give_the_losses_of_logits_in_chunks(folder, alone):
    for name in CHUNKS:
        assert "has no effect" not in (folder / name / "logs" / "process-0000.log").read_text()
        losses = fingerprint(folder / name)["losses"]
        assert losses != alone["losses"]
        for step, loss in alone["losses"].items():
            assert float.fromhex(losses[step]) == pytest.approx(float.fromhex(loss), rel=1e-4)


def test_signal_and_stop_file_then_other_world_sizes_equal_the_unbroken_run(folder, environment, alone):
    config = write_run(folder, "cut", resume_from_checkpoint="auto")
    arguments = ["-m", "ardtrain", "train", str(config)]

    def start(count, *overrides, until=None, then=None):
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            if until is None:
                ended = run_processes(count, [*arguments, *overrides], folder=folder, timeout=200)
            else:
                ended = _cut(count, [*arguments, *overrides], folder, until, then)
        finally:
            os.environ.clear()
            os.environ.update(before)
        assert ended.codes == [0] * count, ended.text()

    run = folder / "cut"
    start(2, "deepspeed=zero3_offload", until=5, then="signal")
    state, step = (run / "status").read_text().split()
    assert state == "requeue" and 5 <= int(step) < 16
    start(1, "adapter_zero_stage=2", until=int(step) + 3, then="file")
    state, step = (run / "status").read_text().split()
    assert state == "stopped" and not (run / "STOP").exists()
    start(2, "deepspeed=zero3", "gradient_checkpointing=true")
    assert (run / "status").read_text() == "finished 16\n"
    assert fingerprint(run) == alone


def _cut(count, arguments, folder, until, then):
    """Runs, and asks for a stop once `until` steps are recorded: a signal to one process, or the STOP file."""
    import threading

    run = folder / "cut"

    def ask():
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and [m for m in lines(metrics) if "loss" in m][-1:] and _last_step(metrics) >= until:
                break
            time.sleep(0.05)
        if then == "file":
            (run / "STOP").touch()
            return
        for process in _children():
            if process["RANK"] == "1":
                os.kill(process["pid"], signal.SIGUSR1)

    asking = threading.Thread(target=ask)
    asking.start()
    ended = run_processes(count, arguments, folder=folder, timeout=200)
    asking.join()
    return ended


def _last_step(metrics):
    return max(m["step"] for m in lines(metrics))


def _children():
    """Our own training processes: pid and RANK."""
    import psutil

    out = []
    for child in psutil.Process().children(recursive=True):
        try:
            environment = child.environ()
        except psutil.Error:
            continue
        if "ardtrain" in " ".join(child.cmdline()) and "RANK" in environment:
            out.append({"pid": child.pid, "RANK": environment["RANK"]})
    return out
