"""Starts the processes of one run on this machine, as a launcher would, with a hard time limit."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """Exit codes and outputs (stdout and stderr together) by process, and the seconds until the last one ended."""

    codes: list[int]
    outputs: list[str]
    seconds: float

    def text(self):
        return "\n".join(
            f"--- process {i}, exit {c}\n{o[-6000:]}"
            for i, (c, o) in enumerate(zip(self.codes, self.outputs, strict=True))
        )


def run_processes(count, arguments, *, folder, timeout, environment=None, python=(sys.executable,)):
    """Runs `python *arguments` as `count` processes with torch's variables; ends them all at the time limit.

    Args:
        folder: where outputs are kept while the processes run.
    Raises:
        TimeoutError: they did not end in `timeout` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent.parent
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(root)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **(environment or {})}
    start = time.monotonic()
    logs = [Path(folder) / f"output-{i}.txt" for i in range(count)]
    running = []
    for i, log in enumerate(logs):
        own = shared | {"RANK": str(i), "LOCAL_RANK": str(i)}
        with log.open("w") as out:
            running.append(subprocess.Popen([*python, *arguments], env=own, stdout=out, stderr=subprocess.STDOUT))
    try:
        for process in running:
            process.wait(max(0.1, timeout - (time.monotonic() - start)))
    except subprocess.TimeoutExpired:
        for process in running:
            process.kill()
        tails = "\n".join(log.read_text()[-3000:] for log in logs)
        raise TimeoutError(f"{count} processes did not end in {timeout} s\n{tails}") from None
    outputs = [log.read_text(errors="replace") for log in logs]
    return Ended([p.returncode for p in running], outputs, time.monotonic() - start)
