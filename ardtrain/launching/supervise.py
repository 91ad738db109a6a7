"""Guards a launcher that loses signals and exit codes: asks by the STOP file, believes the status file.

    python -m ardtrain.launching.supervise RUN_DIR -- COMMAND...

SIGTERM to DeepSpeed's pdsh launcher loses the checkpoint and ends other jobs on the hosts (it runs `pkill -f` there);
mpirun of MPICH ends with 0 when a process was killed. So SIGTERM and SIGINT become the STOP file here, the command is
left alone until the run has written its status, and the exit code follows from that status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ardtrain.faults import replace_file
from ardtrain.launching.job import exported_variables

ENV_FILE = ".deepspeed_env"
ENDED = ("requeue", "stopped", "finished", "failed")
PATIENCE_SECONDS = 5.0  # a second signal counts after so long: batch systems and terminals send several at once
LINGER_SECONDS = 30.0  # for a launcher to see that its processes have ended; pdsh may never (a host hangs)
POLL_SECONDS = 0.2


def supervise(run_dir: Path, command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the command to its end; returns 0 if the run says that it finished or stopped, else 1.

    A first SIGTERM or SIGINT makes the STOP file, a second one ends the command without waiting for a save.
    """
    environ = {**environ, "DS_ENV_FILE": str(run_dir.resolve() / ENV_FILE)}
    write_env_file(run_dir, environ)
    asked: list[float] = []  # when

    def ask(number: int, frame: object) -> None:
        asked.append(time.monotonic())
        (run_dir / "STOP").touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    earlier = _text(run_dir)
    replace_file(run_dir / "status", "starting 0\n")  # what an earlier start wrote must not be taken for this one's
    # A session of its own: Ctrl-C in a terminal reaches us alone.
    child = subprocess.Popen(command, env=environ, start_new_session=True)
    ended_at: float | None = None
    told = False
    try:
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            if asked and not told:
                print("asked to stop: the run saves and ends; once more ends it at once", flush=True)
                told = True
            if ended_at is None and _state(run_dir) in ENDED:
                ended_at = time.monotonic()
            late = ended_at is not None and time.monotonic() - ended_at > LINGER_SECONDS
            if late or asked and asked[-1] - asked[0] > PATIENCE_SECONDS:
                _end(child)
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = child.wait()
    state = _state(run_dir)
    if state in ("requeue", "stopped", "finished"):
        (run_dir / "STOP").unlink(missing_ok=True)  # it came too late
        return 0
    print(f"the run did not end well: its status is `{state}`, the launcher's exit code {code}; see "
          f"{run_dir / 'logs'}", file=sys.stderr)  # fmt: skip
    if state == "starting":  # training never began; STOP is nobody's
        (run_dir / "STOP").unlink(missing_ok=True)
        kept = earlier.startswith(("finished", "stopped"))
        replace_file(run_dir / "status", earlier if kept else f"failed {_step(earlier)}\n")
    if state == "started":  # it died without a word; processes that still run somewhere find STOP
        replace_file(run_dir / "status", f"failed {_step(_text(run_dir))}\n")
    return 1


def write_env_file(run_dir: Path, environ: Mapping[str, str]) -> None:
    """DeepSpeed's file of variables for the other hosts: `NAME=value` lines only, or it ends in a traceback.

    DeepSpeed puts values with unusual characters into double quotes, so what a shell reads inside them is escaped.
    """
    values = exported_variables(environ, tuple(environ.get("ARDTRAIN_EXPORT", "").split()))
    values.pop("DS_ENV_FILE", None)
    lines = [f"{name}={_escaped(value)}\n" for name, value in values.items()]
    replace_file(run_dir / ENV_FILE, "".join(lines))


def _escaped(value: str) -> str:
    return "".join(f"\\{letter}" if letter in '\\"$`' else letter for letter in value)


def _text(run_dir: Path) -> str:
    try:
        return (run_dir / "status").read_text()
    except OSError:
        return ""


def _step(status: str) -> str:
    return (status.split() + ["0", "0"])[1]


def _state(run_dir: Path) -> str:
    return (_text(run_dir).split() or [""])[0]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends what the command started on this host, by its own process group. Never asks DeepSpeed to end itself: that
    runs a `pkill -f` on every host. Processes elsewhere find the STOP file, or their peers gone, and end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    if len(arguments) < 3 or arguments[1] != "--":
        print("usage: python -m ardtrain.launching.supervise RUN_DIR -- COMMAND...", file=sys.stderr)
        return 2
    return supervise(Path(arguments[0]), arguments[2:], os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
