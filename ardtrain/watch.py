"""What a run is doing, and asking it to stop: `ardtrain status` and `ardtrain stop`, from its files alone.

Nothing here asks a process, so it works from any host that sees the run folder, and never imports torch.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ardtrain.config import ConfigError
from ardtrain.faults import host_name, read_status
from ardtrain.progress import duration

WAIT_SECONDS = 1800.0  # of `stop --wait`
POLL_SECONDS = 0.5
QUIET_SECONDS = 900.0  # without a line in any file; a run whose lines are further apart may be quiet longer
LOADING_SECONDS = 4 * 3600.0  # the same before the first step
SPEED_LINES = 20  # of metrics.jsonl: the seconds of a step are their mean
JOB_FILE = "job.json"  # what was submitted last
RUNNING = ("starting", "started")  # the first is a job script's word


@dataclass(frozen=True)
class RunView:
    """A run as its files show it. What they do not say is None; times are seconds since 1970."""

    run: str
    state: str
    step: int
    num_steps: int | None
    alive: bool  # as far as can be seen from here
    written: float  # when the newest of its files was
    loss: float | None
    loss_step: int | None
    eval_loss: float | None
    eval_step: int | None
    best_loss: float | None
    tokens_per_second: float | None
    seconds_per_step: float | None
    seconds_left: float | None
    checkpoint: str | None
    checkpoint_step: int | None
    checkpoint_in_writing: bool
    total_rank: int | None
    num_sites: int | None
    ranks: tuple[int, float, int] | None  # least, mean, largest
    num_events: int | None
    host: str | None  # of process 0
    pid: int | None
    launcher: str | None
    job_id: str | None
    world_size: int | None
    error: str | None


def status(arguments: Sequence[str]) -> int:
    """`ardtrain status RUN_DIR ... [--json]`: one run in full, several in a line each. Raises ConfigError."""
    folders = [a for a in arguments if a != "--json"]
    _refuse_unknown(folders, "--json")
    views = [look(folder) for folder in _existing(folders)]
    if "--json" in arguments:
        objects = [asdict(view) for view in views]
        print(json.dumps(objects[0] if len(objects) == 1 else objects, indent=2))
    elif len(views) == 1:
        print(full_text(views[0]))
    else:
        print("\n".join(one_line(view) for view in views))
    return 0


def stop(arguments: Sequence[str]) -> int:
    """`ardtrain stop RUN_DIR [--wait [SECONDS]]`: asks the run to save and stop at the end of its step.

    Returns:
        0: it was asked; with --wait: it stopped or finished. 1: it does not run, ended otherwise, or did not end.
    Raises:
        ConfigError.
    """
    folder, wait_seconds = _stop_arguments(arguments)
    view = look(folder)
    request = Path(folder) / "STOP"
    if view.state in ("submitted", "requeue"):
        job = f" (job {view.job_id})" if view.job_id else ""
        print(f"{folder}: {state_text(view)}; its job{job} may wait in a queue: cancel it there")
        return 1
    if not view.alive:
        _remove(request)  # it would stop the next start at once
        print(f"{folder} is not running: {state_text(view)}")
        return 0 if view.state in ("stopped", "finished") else 1
    try:
        request.touch()
    except OSError as error:
        raise ConfigError([f"{request}: cannot be made ({error.strerror}); ask as the user who runs it"]) from error
    if wait_seconds is None:
        print(f"{folder}: asked to save and stop at the end of the step (ardtrain status {folder})")
        return 0
    deadline = time.monotonic() + wait_seconds
    while view.alive and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        view = look(folder)
    if view.alive:
        print(f"{folder} has not stopped after {wait_seconds:g} s, at step {view.step}; the request stands")
        return 1
    _remove(request)  # it ended before it saw the file
    print(f"{folder}: {state_text(view)}")
    return 0 if view.state in ("stopped", "finished") else 1


def _remove(request: Path) -> None:
    """Raises ConfigError: it cannot be removed, or is no file."""
    try:
        request.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            [f"{request}: cannot be removed ({error.strerror}), and stops each start; remove it"]
        ) from error


def _stop_arguments(arguments: Sequence[str]) -> tuple[str, float | None]:
    waits, rest = "--wait" in arguments, [a for a in arguments if a != "--wait"]
    _refuse_unknown(rest, "--wait [SECONDS]")
    if len(rest) > 1 + waits:
        raise ConfigError([f"{rest[-1]}: stop takes one run folder and --wait [SECONDS]"])
    [folder] = _existing(rest[:1])
    if not waits:
        return folder, None
    try:
        seconds = float(rest[1]) if len(rest) > 1 else WAIT_SECONDS
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ConfigError([f"--wait {rest[1]}: must be a number of seconds"])
    return folder, seconds


def _refuse_unknown(arguments: Sequence[str], known: str) -> None:
    unknown = [a for a in arguments if a.startswith("--")]
    if unknown:
        raise ConfigError([f"{unknown[0]}: is no option here; there is {known}"])


def _existing(folders: Sequence[str]) -> Sequence[str]:
    wrong = [f"{f}: no such folder; name a run's output_dir" for f in folders if not Path(f).is_dir()]
    wrong += [
        f"{f}: holds no run (no file `status`); name a run's output_dir"
        for f in folders
        if Path(f).is_dir() and not any(os.path.isfile(Path(f, name)) for name in ("status", JOB_FILE))
    ]
    if wrong or not folders:
        raise ConfigError(wrong or ["which run folder? name a run's output_dir"])
    return folders


def look(folder: str | os.PathLike[str]) -> RunView:
    """Reads the files of a run folder that has a `status`."""
    run_dir = Path(folder)
    state, step = _state(run_dir)
    details = read_status(run_dir)
    if details.get("state") != state:  # a job script wrote `status` ahead of the run
        details = {}
    if state in ("submitted", "starting"):
        job = read_job(run_dir)
        details = {"job_id": job.get("job_id"), "launcher": job.get("route")}
    losses, held_out = _metrics(run_dir / "metrics.jsonl")
    last = losses[-1] if losses else {}
    if state == "started":
        step = max(step, last.get("step", 0))
    num_steps = details.get("num_steps")
    seconds_per_step = _seconds_per_step(losses)
    left = None
    if state == "started" and num_steps is not None and seconds_per_step is not None:
        left = max(0, num_steps - step) * seconds_per_step
    written = _last_written(run_dir)
    latest = _first_word(run_dir / "latest")
    latest_step = latest.rpartition("-")[2] if latest else ""
    ranks, num_events = _ranks(run_dir / "ranks.jsonl")
    return RunView(
        run=str(folder),
        state=state,
        step=step,
        num_steps=num_steps,
        alive=state in RUNNING and _alive(details, run_dir, written, losses),
        written=written,
        loss=last.get("loss"),
        loss_step=last.get("step"),
        eval_loss=held_out.get("eval_loss"),
        eval_step=held_out.get("step"),
        best_loss=details.get("best_loss"),
        tokens_per_second=last.get("tokens_per_second"),
        seconds_per_step=seconds_per_step,
        seconds_left=left,
        checkpoint=latest,
        checkpoint_step=int(latest_step) if latest_step.isdigit() else None,
        checkpoint_in_writing=state == "started" and any(run_dir.glob(".checkpoint-*.tmp-*")),
        total_rank=sum(ranks) if ranks else None,
        num_sites=len(ranks) if ranks else None,
        ranks=(min(ranks), sum(ranks) / len(ranks), max(ranks)) if ranks else None,
        num_events=num_events,
        **{name: details.get(name) for name in ("host", "pid", "launcher", "job_id", "world_size", "error")},
    )


def _state(run_dir: Path) -> tuple[str, int]:
    if _waits(run_dir):
        return "submitted", 0
    try:
        words = (run_dir / "status").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise ConfigError([f"{run_dir / 'status'}: cannot be read ({why}); make it a readable file"]) from error
    return (words[0] if words else "unknown"), int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def read_job(run_dir: Path) -> dict[str, Any]:
    """What `ardtrain submit` wrote last; {} if nothing."""
    try:
        record = json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _waits(run_dir: Path) -> bool:
    """Was a job submitted that has not written a status yet?"""
    try:
        submitted = (run_dir / JOB_FILE).stat().st_mtime_ns
    except OSError:
        return False
    try:
        return (run_dir / "status").stat().st_mtime_ns < submitted
    except OSError:
        return True


def _first_word(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError):
        return None


def _lines(path: Path) -> list[bytes]:
    """Whole lines of a file; the last may be in writing."""
    try:
        return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except OSError:
        return []


def _metrics(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The last records with a loss, oldest first, and the last one with a held-out loss."""
    losses: list[dict[str, Any]] = []
    held_out: dict[str, Any] = {}
    for line in reversed(_lines(path)):
        wants_loss = len(losses) < SPEED_LINES and b'"loss"' in line
        wants_held_out = not held_out and b'"eval_loss"' in line
        if wants_loss or wants_held_out:
            record = json.loads(line)
            losses += [record] if "loss" in record else []
            held_out = held_out or (record if "eval_loss" in record else {})
    return losses[::-1], held_out


def _seconds_per_step(losses: Sequence[dict[str, Any]]) -> float | None:
    """Mean over the last lines of the newest start; its clock begins at 0."""
    pairs = [(r["step"], r["elapsed_seconds"]) for r in losses if r.get("elapsed_seconds") is not None]
    for at in range(len(pairs) - 1, 0, -1):
        if pairs[at - 1][1] > pairs[at][1]:  # an earlier start's
            pairs = pairs[at:]
            break
    if len(pairs) < 2 or pairs[-1][0] <= pairs[0][0]:
        return None
    return float((pairs[-1][1] - pairs[0][1]) / (pairs[-1][0] - pairs[0][0]))


def _ranks(path: Path) -> tuple[list[int], int | None]:
    """Each site's rank now, and the number of events so far; ([], None) where no site has one."""
    table: dict[str, int] = {}
    num_events = None
    for line in _lines(path):
        record = json.loads(line)
        table |= record.get("table", {}) | {change["site"]: change["after"] for change in record.get("changes", ())}
        num_events = record.get("event", num_events)
    return list(table.values()), num_events


def _last_written(run_dir: Path) -> float:
    times = [0.0]
    for name in ("status", "status.json", "metrics.jsonl", "ranks.jsonl", "latest", "logs/process-0000.log", JOB_FILE):
        try:
            times.append((run_dir / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _alive(details: dict[str, Any], run_dir: Path, written: float, losses: Sequence[dict[str, Any]]) -> bool:
    """False where process 0 is gone from this very host, or where the files have been still for too long."""
    if details.get("host") == host_name() and isinstance(details.get("pid"), int):
        try:
            os.kill(details["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's
            pass
    return time.time() - written < _patience(run_dir, losses)


def _patience(run_dir: Path, losses: Sequence[dict[str, Any]]) -> float:
    try:
        loading = (run_dir / "metrics.jsonl").stat().st_mtime <= (run_dir / "status").stat().st_mtime
    except OSError:
        loading = True
    if loading:
        return LOADING_SECONDS
    between = (_seconds_per_step(losses) or 0.0) * (losses[-1]["step"] - losses[-2]["step"] if len(losses) > 1 else 0)
    return max(QUIET_SECONDS, 5 * between)


def state_text(view: RunView) -> str:
    """`started, step 120 of 400`; or why a run that should be running seems not to."""
    of = "" if view.num_steps is None else f" of {view.num_steps}"
    text = f"{view.state}, step {view.step}{of}"
    if view.state in RUNNING and not view.alive:
        text = f"{view.state}, but no sign of life since {_time(view.written)} (step {view.step}{of})"
    if view.error and view.state == "failed":
        text += f": {view.error.strip().splitlines()[-1]}"
    return text


def one_line(view: RunView) -> str:
    """A run among several."""
    parts = [f"{view.run}: {state_text(view)}"]
    if view.loss is not None:
        parts.append(f"loss {view.loss:.4f}")
    if view.eval_loss is not None:
        parts.append(f"held-out {view.eval_loss:.4f}")
    if view.alive and view.seconds_left is not None:
        parts.append(f"{duration(view.seconds_left)} left")
    return ", ".join(parts)


def full_text(view: RunView) -> str:
    """A run alone: what is known, a line for each thing."""
    lines = [("run", view.run), ("state", state_text(view))]
    if view.loss is not None:
        lines.append(("loss", f"{view.loss:.4f} at step {view.loss_step}"))
    if view.eval_loss is not None:
        best = "" if view.best_loss is None else f" (best {view.best_loss:.4f})"
        lines.append(("held-out loss", f"{view.eval_loss:.4f} at step {view.eval_step}{best}"))
    speed = []
    if view.tokens_per_second is not None:
        speed.append(f"{view.tokens_per_second:,.0f} tokens/s")
    if view.seconds_per_step is not None:
        speed.append(f"{view.seconds_per_step:.3g} s/step")
    if view.alive and view.seconds_left is not None:
        speed.append(f"about {duration(view.seconds_left)} left")
    if speed:
        lines.append(("speed", ", ".join(speed)))
    lines.append(("checkpoint", _checkpoint_text(view)))
    if view.ranks is not None:
        least, mean, largest = view.ranks
        lines.append(
            (
                "ranks",
                f"total {view.total_rank} over {view.num_sites} sites, {least} to {largest}, mean {mean:.2f}; "
                f"{view.num_events} events so far",
            )
        )
    if view.host is not None:
        job = "" if view.job_id is None else f", job {view.job_id}"
        count = f"{view.world_size} process{'' if view.world_size == 1 else 'es'}"
        lines.append(("where", f"{count}, the first on {view.host} (pid {view.pid}), launcher {view.launcher}{job}"))
    lines.append(("last written", f"{_time(view.written)} ({duration(time.time() - view.written)} ago)"))
    return "\n".join(f"{name + ':':<15}{text}" for name, text in lines)


def _checkpoint_text(view: RunView) -> str:
    text = view.checkpoint or "none yet"
    if view.checkpoint_step is not None and view.step > view.checkpoint_step:
        text += f", {view.step - view.checkpoint_step} steps behind"
    return text + (", the next is being written" if view.checkpoint_in_writing else "")


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
