"""One run as processes of their own: its command, its console file, and how it is asked to save and end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ardtrain.compare.results import CONSOLE_FILE
from ardtrain.compare.suite import RunKey, Suite
from ardtrain.config import ConfigError

GRACE_SECONDS = 120.0  # for a run to finish its step and save, before it is killed
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One run, ready to start: `config` is its YAML, `devices` the accelerators it may see (None: all)."""

    key: RunKey
    folder: Path
    config: Path
    processes: int
    devices: str | None = None


@dataclass
class Stop:
    """Somebody asked to stop: `requested` lets runs save first, `at_once` does not."""

    requested: threading.Event = field(default_factory=threading.Event)
    at_once: threading.Event = field(default_factory=threading.Event)
    signal_number: int = 0


def run_process(job: Job, stop: Stop) -> int:
    """Trains in processes of their own and waits; on a stop request they save first. Returns the exit code."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGE.parent), *_python_path()])}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if job.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = job.devices
    with (job.folder / CONSOLE_FILE).open("ab") as console:
        # A session of its own: Ctrl-C in the terminal reaches us alone, and we ask the run to save.
        process = subprocess.Popen(
            command(job, port=_free_port()),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None and not stop.requested.wait(0.2):
                pass
            if process.poll() is None:
                _ask_to_stop(process, job)
                deadline = time.monotonic() + GRACE_SECONDS
                while process.poll() is None and time.monotonic() < deadline and not stop.at_once.wait(0.2):
                    pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever is left of it
        return process.wait()


def command(job: Job, *, port: int) -> list[str]:
    """The command line of a run: one process, or DeepSpeed's launcher."""
    if job.processes == 1:
        return [sys.executable, "-m", "ardtrain", "train", str(job.config)]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(job.processes)]
    ours = [str(_PACKAGE / "main.py"), "train", str(job.config)]
    return [*launcher, "--log_level", "error", "--master_port", str(port), *ours]


def _ask_to_stop(process: subprocess.Popen[bytes], job: Job) -> None:
    """One process gets SIGTERM: it saves, or ends at once while it is still loading. A launcher would not pass that
    on as it is, so its run gets a STOP file."""
    if job.processes == 1:
        process.send_signal(signal.SIGTERM)
    else:
        (job.folder / "STOP").touch()


@contextlib.contextmanager
def stops_on_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop; a second one ends the runs without saving."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested.is_set():
            stop.at_once.set()
            return
        stop.signal_number = number
        stop.requested.set()
        print("\nstopping: the runs save and end; once more ends them at once", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def device_slots(suite: Suite) -> list[str | None]:
    """Devices of each of the runs that go at a time; None: it sees all.

    Raises:
        ConfigError: several runs of several processes each would share the GPUs.
    """
    import torch

    count = torch.cuda.device_count()
    if suite.jobs == 1 or count == 0:
        return [None] * suite.jobs
    if suite.processes > 1:
        raise ConfigError([f"jobs={suite.jobs} with processes={suite.processes} would share the GPUs; set jobs: 1"])
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible or [str(number) for number in range(count)]
    return [names[slot % len(names)] for slot in range(suite.jobs)]


def _python_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
