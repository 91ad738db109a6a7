"""One run from config to adapter: this process's start and its end. `cli` calls `train`; every process runs it."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ardtrain import checkpoint, preflight, run_data
from ardtrain.adapter_run import AdapterRun
from ardtrain.collectives import World
from ardtrain.config import ConfigError, RunConfig
from ardtrain.environment import ProcessIdentity, discover
from ardtrain.environment import export as export_identity
from ardtrain.evaluating.answers import check_answers
from ardtrain.evaluating.request import FULL_MODEL
from ardtrain.faults import (
    EXIT_PEER_FAILED,
    StopRequest,
    Watchdog,
    guard_streams,
    host_name,
    lost_peer,
    read_status,
    write_failure,
)
from ardtrain.folder_lock import sole_user
from ardtrain.full_run import FullRun
from ardtrain.launching.job import REHEARSAL
from ardtrain.observe import RECORDS, ProcessLog, Startup, start_logging
from ardtrain.opening import verify_base
from ardtrain.preflight import prepare
from ardtrain.rehearse import rehearsal_config, rehearse
from ardtrain.run_info import RUN_INFO_FILE
from ardtrain.session import Session, Surroundings, logger
from ardtrain.trackers import check_trackers

FILES = (*RECORDS, "config.yaml", "status", "status.json", RUN_INFO_FILE)  # of a run's folder, which it writes by name
FOLDERS = ("adapter", FULL_MODEL)  # likewise
ENDING_SECONDS = 5.0  # that an earlier start of the same run may take to end
LOST_HOST_SECONDS = 120.0  # in which an NFS server lets go of the locks of a host that was lost
LOADING_SECONDS = 4 * 3600.0  # the watchdog's patience before the first step: 70B from a slow disk takes its time
OUT_OF_MEMORY = (
    "out of memory: lower per_device_train_batch_size (the grain) or max_length, set gradient_checkpointing=true, or "
    "shard and offload the base (deepspeed=zero3_offload); alora.ablations_per_forward multiplies its memory. "
    "`ardtrain plan CONFIG` says, without a GPU, what takes how much and what to change first\n"
)


def refuse_used_folder(config: RunConfig) -> None:
    """A new run must not share a folder with another run's checkpoints: a later `auto` could take the wrong one.

    Raises:
        ConfigError: output_dir holds checkpoints and the config does not resume.
    """
    try:
        found = checkpoint.candidates(Path(config.output_dir), "auto")
    except checkpoint.CheckpointError as error:
        raise ConfigError([str(error)]) from error
    earlier = found[0].name if found else checkpoint.pointed(Path(config.output_dir), "latest")
    if config.resume_from_checkpoint is None and earlier is not None:
        raise ConfigError(
            [
                f"output_dir={config.output_dir} holds an earlier run ({earlier}); go on with it by "
                "resume_from_checkpoint=auto, or choose another output_dir"
            ]
        )


def refuse_misplaced(config: RunConfig) -> None:
    """What stands in the run's folder under a name of a run's must be of its kind, or the run would end at it, late.

    Raises:
        ConfigError: a folder is in a file's place, a file in a folder's, or a file cannot be written.
    """
    errors = []
    for name, is_file in (*((name, True) for name in FILES), *((name, False) for name in FOLDERS)):
        path = Path(config.output_dir, name)
        if not path.exists():
            continue
        wrong = ""
        if not (path.is_file() if is_file else path.is_dir()):
            wrong = f"is no {'file' if is_file else 'folder'}, and a run writes one there"
        elif not os.access(path, os.R_OK | os.W_OK):
            wrong = "cannot be read and written"
        if wrong:
            errors.append(f"output_dir={config.output_dir}: {name} {wrong}; move it away, or choose another output_dir")
    if errors:
        raise ConfigError(errors)


def validate(path: str | Path, overrides: Sequence[str], *, verify: bool = False) -> str:
    """`ardtrain validate CONFIG`: all checks; returns the summary. Raises ConfigError.

    verify: read the weights as well: checksums, all tensors there, all numbers finite.
    """
    prepared = prepare(path, overrides, world_size=1)
    check_trackers(prepared.config)
    check_answers(prepared.config)
    tokenizer = run_data.tokenizer_of(prepared.config)
    data, _ = run_data.open_data(prepared.config, tokenizer, prepared.shape.labels)
    run_data.open_allocation_data(prepared.config, tokenizer, prepared.shape.labels)
    text = preflight.summary(prepared.config, prepared.shape, data, prepared.notes)
    if not verify:
        return text
    labels = prepared.shape.labels
    pad_token_id = data.pad_token_id if labels else None
    try:
        told = verify_base(
            run_data.model_source(prepared.config),
            compute_dtype=prepared.plan.compute_dtype,
            num_labels=len(labels) or None,
            pad_token_id=pad_token_id,
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return f"{text}\n{told}"


def train(path: str | Path, overrides: Sequence[str], *, rehearsal: bool = False) -> int:
    """`ardtrain train CONFIG` on this process; returns the exit code. All processes of the run call it.

    rehearsal: three steps of two random layers in a folder of their own instead (rehearse.py).
    """
    startup, identity, device = first_steps()
    prepared = prepare(path, overrides, world_size=identity.world_size)
    config = prepared.config
    check_trackers(config)
    check_answers(config)
    startup.mark("config and shapes")
    if rehearsal:
        rehearsal_config(config, world_size=identity.world_size)  # refuses what cannot be rehearsed
    else:
        refuse_used_folder(config)
        refuse_misplaced(config)
    run_dir = Path(config.output_dir, REHEARSAL) if rehearsal else Path(config.output_dir)

    def body(process: Process, around: Surroundings) -> None:
        if rehearsal:
            rehearse(prepared, around)
            return
        kind = FullRun if config.method == "full" else AdapterRun
        process.run = kind(prepared, around)
        process.run.execute()

    return run_together(config, run_dir, "output_dir", identity, device, startup, body)


def run_together(
    config: RunConfig,
    run_dir: Path,
    setting: str,
    identity: ProcessIdentity,
    device: torch.device,
    startup: Startup,
    body: Callable[[Process, Surroundings], None],
) -> int:
    """`body` on this process among the others of its run, with log, watchdog and stop requests; returns 0.

    A failure is told and ends the process with its exit code; another run in the folder is one. All processes must
    call this.

    Args:
        setting: what names run_dir.
    Raises:
        ConfigError: no log can be written.
    """
    torch.set_num_threads(config.num_threads)
    if config.reproducible:
        _choose_deterministic_kernels(device)
    try:
        process = Process(identity, run_dir, config.watchdog_seconds)
    except OSError as error:
        raise ConfigError([f"{setting}={run_dir}: no log can be written ({error}); choose another folder"]) from error
    try:
        with (
            StopRequest(run_dir, reads_file=process.is_main, signals=config.preemption_signal) as stop_request,
            contextlib.ExitStack() as held,
        ):
            world, watchdog = process.join(device, config.collective_timeout_seconds)
            startup.mark("meeting")
            world.ask_main(lambda: process.hold_folder(setting, held))
            body(process, Surroundings(world, identity, run_dir, watchdog, stop_request, startup))
            world.barrier("end of the run")
    except BaseException as error:
        # The others may hang in a collective that this process will never join; leaving the group could hang as well.
        _exit_at_once(process.failed(error))
    watchdog.stop()
    process.log.close()
    world.leave()
    return 0


def first_steps() -> tuple[Startup, ProcessIdentity, torch.device]:
    """What any verb on several processes begins with: which process is this one, and its device.

    Raises:
        ConfigError: the launcher's variables do not go together.
    """
    guard_streams()
    startup = Startup()
    startup.mark("imports")
    _put_own_tools_first()
    try:
        identity = discover(os.environ)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    export_identity(identity, os.environ)
    return startup, identity, _device(identity)


class Process:
    """This process among those of its run: its log, its watchdog, and what is told of its failure, where."""

    watchdog: Watchdog | None = None
    run: Session | None = None
    is_guest = False  # the folder, and the status in it, are another run's

    def __init__(self, identity: ProcessIdentity, run_dir: Path, stall_seconds: float | None) -> None:
        """Begins the log; all but process 0 leave the console."""
        self.identity, self.run_dir, self.stall_seconds = identity, run_dir, stall_seconds
        self.is_main = identity.global_rank == 0
        self.log: ProcessLog = start_logging(run_dir, global_rank=identity.global_rank)
        self.console = 2 if self.is_main else self.log.take_streams()
        faulthandler.enable(2)
        self.name = f"process {identity.global_rank} on {host_name()}"

    def join(self, device: torch.device, timeout_seconds: float) -> tuple[World, Watchdog]:
        """Meets the other processes. All processes must call this."""
        identity = self.identity
        world = World.join(
            global_rank=identity.global_rank,
            world_size=identity.world_size,
            device=device,
            timeout_seconds=timeout_seconds,
        )
        # Without process 0 there is no console: the next process speaks, and the first one of the next host.
        speaks = identity.global_rank in (1, identity.local_world_size)
        self.watchdog = Watchdog(
            world.watchdog_store(),
            hosts_store=self.is_main,
            stall_seconds=self.stall_seconds,
            process=f"{self.name} (log: {self.log.path})",
            console=2 if self.is_main else None,
            log=self.log.descriptor,
            last_words=self.console if speaks else None,
            on_failure=self._write_failure,
        )
        self.watchdog.start()
        self.watchdog.touch(LOADING_SECONDS)
        return world, self.watchdog

    def hold_folder(self, setting: str, held: contextlib.ExitStack) -> None:
        """Keeps every other run out of the folder, as long as `held`; on process 0.

        Raises:
            ConfigError: another run works there; its status is left as it is.
        """
        status = read_status(self.run_dir)
        who = f" (process {status['pid']} on {status['host']})" if {"pid", "host"} <= status.keys() else ""
        refusal = (
            f"{setting}={self.run_dir}: another run works there{who}; wait for it, stop it with `ardtrain stop "
            f"{self.run_dir}`, or choose another folder"
        )
        try:
            held.enter_context(sole_user(self.run_dir, refusal=refusal, patience_seconds=ENDING_SECONDS))
        except ConfigError:
            self.is_guest = True
            if status.get("host", host_name()) == host_name():
                raise
            logger.warning("%s; waiting up to %g s for it", refusal, LOST_HOST_SECONDS)
            held.enter_context(sole_user(self.run_dir, refusal=refusal, patience_seconds=LOST_HOST_SECONDS))
            self.is_guest = False

    def failed(self, error: BaseException) -> int:
        """Tells the run's first failure, which may be another process's, and returns this one's exit code.

        All of it goes to this process's log; the console of process 0 shows the first text and at most one line more.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher, before all is told
        consequence, own = lost_peer(error), self._text(error)
        if consequence or not self.is_main:
            logging.getLogger("failure").error("%s", own)  # not one of ours: into the log, not to the console
        text = self._lost_peer_text(error) if consequence else own
        first = text if self.watchdog is None else self.watchdog.report(text, lost_peer=consequence)
        if self.is_main:
            logger.error("%s", first)
            if first.splitlines()[-1] != text.splitlines()[-1]:  # else all met the same mistake at once
                logger.error("%s then ended: %s", self.name, _in_one_line(error))
            self._write_failure(first)
        if self.watchdog is not None:
            self.watchdog.linger()
        elif self.console is not None and self.identity.local_rank == 0 and not self.is_main:  # it met no process 0
            with contextlib.suppress(OSError):
                os.write(self.console, f"{self.name}: {_in_one_line(error)} (log: {self.log.path})\n".encode())
        if consequence:
            return EXIT_PEER_FAILED
        return 2 if isinstance(error, ValueError) else 1

    def _text(self, error: BaseException) -> str:
        what = str(error) if isinstance(error, ValueError) else "".join(traceback.format_exception(error)).rstrip()
        text = f"{self.name} failed (log: {self.log.path}):\n{what}"
        return f"{text}\n{OUT_OF_MEMORY}" if isinstance(error, torch.OutOfMemoryError) else text

    def _lost_peer_text(self, error: BaseException) -> str:
        return (
            f"{self.name} lost the connection to another process, and none has said why. That one was probably killed "
            "(kill -9, its host's memory ran out, its host was lost); its log, or the batch system, may tell\n"
            f"{_in_one_line(error)} (log: {self.log.path})"
        )

    def _write_failure(self, text: str) -> None:
        """Status `failed`; process 0 alone. A full disk must not keep the text from the others."""
        if self.is_main and not self.is_guest:
            trainer = getattr(self.run, "trainer", None)
            with contextlib.suppress(OSError):
                write_failure(self.run_dir, None if trainer is None else trainer.state.step, text)


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _exit_at_once(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _put_own_tools_first() -> None:
    """This Python's own folder goes to the front of PATH: DeepSpeed builds ops with the first `ninja` it finds.

    Under srun or an absolute python path the environment's ninja may not be found, and two ninja versions that take
    turns (the system's, the environment's) do not read each other's log and compile every op anew, a minute each time.
    """
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "").split(os.pathsep)
    if path[:1] != [own]:
        os.environ["PATH"] = os.pathsep.join([own, *path])


def _device(identity: ProcessIdentity) -> torch.device:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        torch.cuda.set_device(identity.local_rank)
        return torch.device("cuda", identity.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def _choose_deterministic_kernels(device: torch.device) -> None:
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers asks the kernel for it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
