"""The text of a job script: a run's settings and a template of launcher/. Pure but for reading the template."""

from __future__ import annotations

import re
import shlex
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jinja2

from ardtrain.config import ConfigError, RunConfig
from ardtrain.hostfile import Host

Route = Literal["slurm", "pbs", "hosts", "mpi"]
ROUTES: tuple[str, ...] = get_args(Route)
REHEARSAL = "rehearsal"  # a rehearsal's folder in output_dir
# Variables that processes on other hosts need and that ssh and mpirun do not bring; secrets stay out of files.
EXPORTED = (
    "^(NCCL|GLOO|TORCH|TRITON|HF|TRANSFORMERS|DS|DEEPSPEED|OMP|MKL|CUDA_HOME|CUDA_DEVICE|UCX|FI|PYTHON|ARDTRAIN|WANDB|"
    "MASTER)|^(PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX)$"
)
SECRET = "(^|_)TOKENS?$|SECRET|PASSWORD|_KEY$"
_PLAIN = re.compile(r"[A-Za-z0-9_./@+=:,-]+")  # survives shells, #SBATCH lines and pdsh, which quotes nothing


@dataclass(frozen=True)
class Elements:
    """An array job: the folder of its script, a run folder for each element, how many run at a time (0: all)."""

    place: Path
    runs: tuple[Path, ...]
    at_a_time: int = 0


def launcher_folder() -> Path:
    """Where the templates lie: data of the installed package, or the checkout's launcher/."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "launcher"
    return installed if installed.is_dir() else package.parent / "launcher"


def script_text(
    route: Route,
    config: RunConfig,
    *,
    folder: Path,
    hosts: tuple[Host, ...] = (),
    elements: Elements | None = None,
    max_hours: float | None = None,
    rehearsal: bool = False,
) -> str:
    """The script that trains `config` by this route; shell, with one header to edit.

    Args:
        folder: where the job works; relative paths of the config count from there.
        hosts: of launcher.hostfile, for the routes `hosts` and `mpi`.
        elements: slurm only: the runs of an array, in place of config.output_dir.
        max_hours: pbs only: what run.yaml says.
        rehearsal: `train --rehearse`; config.output_dir is the rehearsal's folder.
    Raises:
        ConfigError: a path that some shell on the way would change.
    """
    block = config.launcher
    run_dir = Path(folder, config.output_dir)
    # Not sys.executable's target: a virtual environment is its own path.
    python = Path(block.python or sys.executable)
    main = Path(__file__).resolve().parent.parent / "main.py"
    hostfile = Path(folder, block.hostfile) if block.hostfile else None
    named = [("output_dir", run_dir), ("launcher.hostfile", hostfile), ("the folder", folder)]
    for name, path in named + [("output_dir", run) for run in (elements.runs if elements else ())]:
        if path is not None and not _PLAIN.fullmatch(str(path)):
            raise ConfigError(
                [f"{name}={path} holds a character that job scripts and remote shells read otherwise; letters, digits "
                 "and _./@+=:,- are safe: choose another path"]
            )  # fmt: skip
    if block.command_prefix and route in ("hosts", "pbs"):
        raise ConfigError(
            [f"launcher.command_prefix={block.command_prefix} has no place with --to {route}: DeepSpeed's launcher "
             "starts python itself on the hosts; use --to slurm or mpi, or start all of it inside the container"]
        )  # fmt: skip
    place = run_dir if elements is None else elements.place
    by_run = "" if route in ("slurm", "pbs") else 20000 + zlib.crc32(str(run_dir).encode()) % 20000
    values = block.model_dump() | {
        "run": f'"{run_dir}"' if elements is None else "${runs[$SLURM_ARRAY_TASK_ID]:?}",
        "folder": str(folder),
        "script": str(place / "job.sh"),
        "logs": str(place / "logs"),
        "elements": [str(run) for run in elements.runs] if elements else [],
        "at_a_time": elements.at_a_time if elements else 0,
        "job_name": block.job_name or re.sub(r"[^A-Za-z0-9._-]", "-", place.name)[:64],
        "num_local": hosts[0].slots if hosts else block.num_local,
        "nodes": len(hosts) or block.nodes,
        "walltime": walltime(block.seconds),
        "interface": block.network_interface,
        "num_threads": config.num_threads,
        "ardtrain": f"{block.command_prefix} {python} -u -m ardtrain".strip(),
        "mpi_args": f" {block.mpi_args}" if block.mpi_args else "",
        "python": str(python),
        "guard": sys.executable if block.command_prefix else str(python),
        "deepspeed": str(python.with_name("deepspeed")),
        "main": str(main),
        "hostfile": str(hostfile),
        "master_addr": hosts[0].name if hosts else "",
        "port": block.master_port or by_run,
        "exported": EXPORTED,
        "rehearse": " --rehearse" if rehearsal else "",
        "max_hours": None if max_hours is None else f"{max_hours:g}",
    }  # fmt: skip
    return _rendered(f"{route}.sh.j2", values)


def walltime(seconds: int) -> str:
    """HH:MM:SS, as PBS wants it: hours go on beyond a day."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def exported_variables(environ: Mapping[str, str], also: tuple[str, ...] = ()) -> dict[str, str]:
    """Those variables that the processes of other hosts need, without secrets; `also` names more."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if (re.search(EXPORTED, name) or name in also) and not re.search(SECRET, name) and "\n" not in value
    }


def _rendered(template: str, values: Mapping[str, object]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(launcher_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML: `quote` where a value is free text
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(template).render(values)
