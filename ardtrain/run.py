"""One run from config to adapter: this process's start and its end. `cli` calls `train`; every process runs it."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ardtrain import checkpoint, preflight
from ardtrain.adapter_run import AdapterRun
from ardtrain.collectives import World
from ardtrain.config import ConfigError, RunConfig
from ardtrain.environment import ProcessIdentity, discover
from ardtrain.environment import export as export_identity
from ardtrain.faults import Watchdog, guard_streams, write_status
from ardtrain.full_run import FullRun
from ardtrain.observe import start_logging
from ardtrain.preflight import prepare
from ardtrain.session import Session, logger

LOADING_SECONDS = 4 * 3600.0  # the watchdog's patience before the first step: 70B from a slow disk takes its time
OUT_OF_MEMORY = (
    "out of memory: lower per_device_train_batch_size (the grain) or max_length, set gradient_checkpointing=true, or "
    "shard and offload the base (deepspeed=zero3_offload); alora.ablations_per_forward multiplies its memory\n"
)


def refuse_used_folder(config: RunConfig) -> None:
    """A new run must not share a folder with another run's checkpoints: a later `auto` could take the wrong one.

    Raises:
        ConfigError: output_dir holds checkpoints and the config does not resume.
    """
    found = checkpoint.candidates(Path(config.output_dir), "auto")
    earlier = found[0].name if found else checkpoint.pointed(Path(config.output_dir), "latest")
    if config.resume_from_checkpoint is None and earlier is not None:
        raise ConfigError(
            [
                f"output_dir={config.output_dir} holds an earlier run ({earlier}); go on with it by "
                "resume_from_checkpoint=auto, or choose another output_dir"
            ]
        )


def validate(path: str | Path, overrides: Sequence[str]) -> str:
    """`ardtrain validate CONFIG`: all checks, no weights; returns the summary. Raises ConfigError."""
    prepared = prepare(path, overrides, world_size=1)
    tokenizer = preflight.tokenizer_of(prepared.config)
    data, _ = preflight.open_data(prepared.config, tokenizer, prepared.shape.labels)
    preflight.open_allocation_data(prepared.config, tokenizer, prepared.shape.labels)
    return preflight.summary(prepared.config, prepared.shape, data, prepared.notes)


def train(path: str | Path, overrides: Sequence[str]) -> int:
    """`ardtrain train CONFIG` on this process; returns the exit code. All processes of the run call it."""
    guard_streams()
    _put_own_tools_first()
    identity = discover(os.environ)
    export_identity(identity, os.environ)
    device = _device(identity)
    prepared = prepare(path, overrides, world_size=identity.world_size)
    config = prepared.config
    refuse_used_folder(config)
    torch.set_num_threads(config.num_threads)
    if config.reproducible:
        _choose_deterministic_kernels(device)
    run_dir = Path(config.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    world = World.join(
        global_rank=identity.global_rank,
        world_size=identity.world_size,
        device=device,
        timeout_seconds=config.collective_timeout_seconds,
    )
    watchdog = Watchdog(world.watchdog_store(), hosts_store=world.is_main, stall_seconds=config.watchdog_seconds)
    watchdog.start()
    watchdog.touch(LOADING_SECONDS)
    end_logging = start_logging(run_dir, global_rank=identity.global_rank)
    run: Session | None = None
    try:
        kind = FullRun if config.method == "full" else AdapterRun
        run = kind(prepared, world, identity, run_dir, watchdog)
        run.execute()
        world.barrier("end of the run")
    except BaseException as error:
        mistake = isinstance(error, ValueError)
        text = f"process {identity.global_rank}: {error if mistake else traceback.format_exc()}"
        if isinstance(error, torch.OutOfMemoryError):
            text += OUT_OF_MEMORY
        logger.error(text)  # into this process's file, and on process 0 to the console
        if not world.is_main:
            print(text, file=sys.stderr)
        if world.is_main:
            with contextlib.suppress(OSError):  # a full disk must not keep the text from the others
                write_status(run_dir, "failed", _step_of(run), error=str(error))
        watchdog.report(text)
        # The others may hang in a collective that this process will never join; leaving the group could hang as well.
        _exit_at_once(2 if mistake else 1)
    watchdog.stop()
    end_logging()
    world.leave()
    return 0


def _step_of(run: Session | None) -> int:
    trainer = getattr(run, "trainer", None)
    return trainer.state.step if trainer is not None else 0


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
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
