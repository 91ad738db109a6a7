"""Works through the runs of a suite: what is done is kept, what is not is started, what changed is put aside."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardtrain.compare.child import Job, Stop, device_slots, run_process, stops_on_signals
from ardtrain.compare.plan import Failure, RunResult, least_runs, next_runs
from ardtrain.compare.record import versions, write_report
from ardtrain.compare.results import RESULT_FILE, collected, diverged, failure_text, run_state, stored_result
from ardtrain.compare.rows import refuse_common_rows, write_dealt
from ardtrain.compare.suite import RunKey, Suite, first_key, read_suite, run_config, run_mapping
from ardtrain.config import ConfigError, RunConfig
from ardtrain.config.text import write_yaml
from ardtrain.faults import replace_file
from ardtrain.folder_lock import sole_user


@dataclass(frozen=True)
class Start:
    """What a method begins with; costs: numbers of one component, I + O, by site."""

    total_rank: int
    num_trained: int
    costs: Mapping[str, int]


Execute = Callable[[Job, Stop], int]
Describe = Callable[[RunConfig], Start]


def compare(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    execute: Execute | None = None,
    describe: Describe | None = None,
) -> int:
    """`ardtrain compare SUITE.yaml [a.b=c ...]`: runs what is not done yet, writes the report; returns the exit code.

    0: all runs done and the parameters equal; 1: a run failed, or they are not; 128 + signal number: stopped.

    Args:
        execute: runs one job to its end and returns its exit code; describe: what a config starts with. For tests.
    Raises:
        ConfigError: mistakes in the suite, or another `compare` works in the same folder.
    """
    suite, written = read_suite(path, overrides, os.environ)
    root = _made(suite.output_dir)
    with _locked(root):
        _prepare_rows(suite)
        starts = _say_starts(suite, describe or start_of)
        runner = Runner(suite, starts, execute or run_process)
        with stops_on_signals(runner.stop):
            runner.run()
        problems = write_report(suite, written, runner.outcomes)
    if runner.stop.signal_number:
        print("stopped; the same command goes on where the runs stopped")
        return 128 + runner.stop.signal_number
    return 1 if problems else 0


def suite_folder(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Where the suite's runs lie. Raises ConfigError."""
    return read_suite(path, overrides, os.environ)[0].output_dir


def prepared_runs(
    path: str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False
) -> tuple[Suite, RunConfig, list[Path]]:
    """The suite, a run's config, and the folders, each with its run.yaml, of all runs that can start now.

    For schedulers that start them (`ardtrain submit --array`); `compare` finds what they left. dry_run: makes nothing.

    Raises:
        ConfigError: mistakes in the suite, several processes for each run, or a `compare` works in the folder.
    """
    suite, _ = read_suite(path, overrides, os.environ)
    root = Path(suite.output_dir)
    config = run_config(suite, first_key(suite, next(iter(suite.methods))))
    if dry_run:
        return suite, config, [root / key.folder for key in next_runs(suite, {})]
    with _locked(_made(suite.output_dir)):
        _prepare_rows(suite)
        runner = Runner(suite, _say_starts(suite, start_of), run_process)
        return suite, config, [job.folder for job in runner.ready()]


class Runner:
    """Holds the outcomes so far and works until nothing is left to start."""

    def __init__(self, suite: Suite, starts: Mapping[str, Start], execute: Execute) -> None:
        self.suite, self.starts, self.execute = suite, starts, execute
        self.stop = Stop()
        self.outcomes: dict[RunKey, RunResult | Failure] = {}
        self._file_digests: dict[str, str] = {}
        self._devices = device_slots(suite)

    def run(self) -> None:
        """Until all runs have an outcome, or a stop is asked for.

        Raises:
            ConfigError: no run writes the metric.
        """
        running: dict[Future[int], Job] = {}
        with ThreadPoolExecutor(self.suite.jobs) as pool:
            try:
                while True:
                    while not self.stop.requested.is_set() and len(running) < self.suite.jobs:
                        job = self._next({job.key for job in running.values()}, self._devices[-1])
                        if job is None:
                            break
                        self._devices.pop()
                        running[pool.submit(self.execute, job, self.stop)] = job
                    if not running:
                        return
                    done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)  # signals are seen in between
                    for future in done:
                        job = running.pop(future)
                        self._devices.append(job.devices)
                        self._ended(job, future.result())
            except BaseException:
                self.stop.requested.set()  # leaving the pool waits for the other runs: let them save and end
                raise

    def ready(self) -> list[Job]:
        """All runs that can start now, their folders ready."""
        jobs: list[Job] = []
        while (job := self._next({other.key for other in jobs}, devices=None)) is not None:
            jobs.append(job)
        return jobs

    def _next(self, running: set[RunKey], devices: str | None) -> Job | None:
        """The next run that is neither done nor running, its folder ready; keeps results that are there already."""
        while True:
            waiting = [key for key in next_runs(self.suite, self.outcomes) if key not in running]
            if not waiting:
                return None
            key = waiting[0]
            folder = Path(self.suite.output_dir) / key.folder
            digest = self.digest(key)
            outcome: RunResult | Failure | None = stored_result(folder, digest)
            if outcome is None and _marked(folder) == digest and run_state(folder)[0] == "finished":
                outcome = self._read(key, folder, digest)  # it ended while nobody watched
            if outcome is None:
                return self._job(key, folder, digest, devices)
            self._record(key, outcome, "done before")

    def digest(self, key: RunKey) -> str:
        """sha256 over the settings written for this run and its held-out rows, not over where it lies.

        Settings left to their defaults are not in it: a new version's new setting makes no run anew. The versions of
        every run are in its result.
        """
        settings = run_config(self.suite, key).model_dump(mode="json", exclude_unset=True)
        for name in ("output_dir", "resume_from_checkpoint"):
            settings.pop(name, None)
        for name in ("eval_file", "allocation_file"):
            if path := settings["data"].get(name):
                is_tuning = name == "eval_file" and key.part == "tune"
                setting = "tuning.eval_file" if is_tuning else f"base.data.{name}"
                settings["data"][name] = self._digest_of_file(path, setting)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _digest_of_file(self, path: str, setting: str) -> str:
        if path not in self._file_digests:
            self._file_digests[path] = _file_digest(path, setting)
        return self._file_digests[path]

    def _job(self, key: RunKey, folder: Path, digest: str, devices: str | None) -> Job:
        """Makes the folder ready: another config's run in it is put aside, never mixed with this one."""
        if folder.is_dir() and _marked(folder) != digest:
            aside = _free_name(folder)
            folder.rename(aside)
            print(f"{key}: the settings have changed; the earlier run is now {aside}")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("STOP", "status", "status.json"):  # of an earlier start
            (folder / name).unlink(missing_ok=True)
        replace_file(folder / "digest", digest + "\n")
        replace_file(folder / "run.yaml", write_yaml(run_mapping(self.suite, key)))
        return Job(key, folder, folder / "run.yaml", self.suite.processes, devices)

    def _ended(self, job: Job, code: int) -> None:
        state, step = run_state(job.folder)
        if state == "finished" and code == 0:
            self._record(job.key, self._read(job.key, job.folder, _marked(job.folder)))
        elif diverged(job.folder):
            result = RunResult(**self._identity(job.key, _marked(job.folder)), diverged=True, step=step)
            self._record(job.key, _stored(result, job.folder))
        elif self.stop.requested.is_set():
            print(f"{job.key}: stopped at step {step}", flush=True)
        elif state in ("stopped", "requeue") and code == 0:
            self._record(job.key, Failure(f"stopped at step {step} on request; the same command goes on with it"))
        else:
            self._record(job.key, Failure(failure_text(job.folder)))

    def _read(self, key: RunKey, folder: Path, digest: str) -> RunResult | Failure:
        """Reads a finished run and writes its result.json."""
        try:
            measured = collected(folder, self.starts[key.method].costs)
        except (OSError, ValueError, KeyError) as error:
            return Failure(f"its files cannot be read ({type(error).__name__}: {error})")
        return _stored(RunResult(**self._identity(key, digest), **measured), folder)

    def _identity(self, key: RunKey, digest: str) -> dict[str, Any]:
        return {
            "method": key.method, "part": key.part, "learning_rate": key.learning_rate, "seed": key.seed,
            "folder": key.folder.as_posix(), "digest": digest, "versions": versions(),
        }  # fmt: skip

    def _record(self, key: RunKey, outcome: RunResult | Failure, how: str = "") -> None:
        metric = self.suite.tuning_metric[0] if key.part == "tune" else self.suite.metric
        self.outcomes[key] = outcome
        total = max(least_runs(self.suite), len(self.outcomes))
        at = f"[{len(self.outcomes)} of {total}]"
        if isinstance(outcome, Failure):
            print(f"{at} {key}: FAILED: {outcome.text}", flush=True)
            return
        if not outcome.diverged and metric not in outcome.metrics:
            names = ", ".join(outcome.metrics)
            raise ConfigError([f"metric={metric} is written by no run; {key} has {names}; name one of them"])
        value = outcome.value(metric)
        said = "diverged" if value is None else f"{metric} {value:.4f}"
        seconds = f", {outcome.seconds:.0f} s" if outcome.seconds is not None else ""
        print(f"{at} {key}: {said}{seconds}{f' ({how})' if how else ''}", flush=True)


def _stored(result: RunResult, folder: Path) -> RunResult:
    replace_file(folder / RESULT_FILE, json.dumps(result.to_json(), indent=1) + "\n")
    return result


def start_of(config: RunConfig) -> Start:
    """Sites, first ranks and trained numbers on the meta device, as `ardtrain validate` counts them."""
    from ardtrain.deepspeed_config import take_over
    from ardtrain.preflight import check_model

    shape = check_model(take_over(config)[0])
    costs = {site.name: site.in_features + site.out_features for site in shape.table.sites}
    return Start(shape.table.total, shape.num_trained, costs)


def _made(output_dir: str) -> Path:
    """The suite's folder. Raises ConfigError."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"output_dir={output_dir} cannot be made ({error.strerror}); choose another"]) from None
    return Path(output_dir)


def _locked(root: Path) -> contextlib.AbstractContextManager[None]:
    """One `compare` at a time in a folder."""
    return sole_user(root, refusal=f"output_dir={root}: another `ardtrain compare` works there; wait for it")


def _say_starts(suite: Suite, describe: Describe) -> dict[str, Start]:
    """Counts and prints what each method starts with; the final parameters are compared after the runs."""
    starts = {method: describe(run_config(suite, first_key(suite, method))) for method in suite.methods}
    print(f"{suite.name}: {least_runs(suite)} runs or more, {suite.jobs} at a time, {suite.processes} process(es) each")
    width = max(len(method) for method in starts)
    for method, start in starts.items():
        print(f"  {method:<{width}}  starts with total rank {start.total_rank}, {start.num_trained:,} trained numbers")
    return starts


def _prepare_rows(suite: Suite) -> None:
    if suite.split_eval is not None:
        counts = write_dealt(suite.split_eval, Path(suite.output_dir) / "data")
        print(f"held-out rows: {counts['tune']} to tune on, {counts['test']} to test on")
    elif suite.tuning is not None:
        refuse_common_rows(suite.eval_file("tune"), suite.eval_file("test"))


def _file_digest(path: str, setting: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError([f"{setting}={path} cannot be read ({error.strerror}); correct the path"]) from None


def _marked(folder: Path) -> str:
    """Digest of the config whose run lies in the folder."""
    try:
        return (folder / "digest").read_text().strip()
    except OSError:
        return ""


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.earlier-{number}")).exists():
        number += 1
    return aside
