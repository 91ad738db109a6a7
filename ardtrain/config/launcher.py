"""Settings of `ardtrain submit`: where a job runs, for how long, and what its script's header says."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ardtrain.config.block import Block, tuple_of

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d\d):(\d\d)")


class LauncherBlock(Block):
    """What `ardtrain submit` puts into the job script; training itself never reads it."""

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    """0: no GPU is asked for."""
    processes_per_node: int | None = Field(default=None, ge=1)
    """None: one for each GPU, or one."""
    cpus_per_process: int | None = Field(default=None, ge=1)
    account: str | None = None
    partition: str | None = None
    """Slurm's partition, PBS's queue."""
    time: str = "24:00:00"
    """Walltime, [D-]HH:MM:SS; in quotes."""
    job_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """None: the run folder's name."""
    directives: Annotated[tuple[str, ...], BeforeValidator(tuple_of)] = ()
    """More of the scheduler's options, one each, such as --constraint=h100 or -l filesystems=home."""
    signal_seconds: int = Field(default=300, ge=10)
    """The run is asked to save and stop so long before the walltime ends."""
    max_requeues: int = Field(default=20, ge=0)
    singleton: bool = False
    """Slurm: wait for other jobs of this name and user."""
    exclusive: bool = True
    """Whole nodes."""
    setup: Annotated[tuple[str, ...], BeforeValidator(tuple_of)] = ()
    """Shell lines before the run, such as module load cuda."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Variables of all processes."""
    command_prefix: str = ""
    """Before python, such as apptainer exec --nv image.sif."""
    python: str | None = None
    """Path of Python on the nodes; None: the one that submits."""
    network_interface: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+(,[A-Za-z0-9_.-]+)*$")
    """For NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, such as ib0; None: they choose."""
    cache_dir: str = "/tmp/ardtrain-$(id -un)"
    """For compiled ops and kernels, on a disk of each node; variables that are set already win."""
    hostfile: str | None = None
    """DeepSpeed's format (HOST slots=N); for --to hosts and --to mpi."""
    master_port: int | None = Field(default=None, ge=1024, le=65535)
    """None: from the job's number."""
    mpi: Literal["openmpi", "mpich"] = "openmpi"
    mpi_args: str = ""
    """More arguments of mpirun."""
    preflight: bool = True
    """Before a start on several nodes: `ardtrain doctor`'s quick part on all of them."""

    @property
    def num_local(self) -> int:
        """Processes of a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def seconds(self) -> int:
        """The walltime."""
        match = _TIME.fullmatch(self.time)
        assert match is not None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def cross_field_errors(self) -> list[str]:
        errors = []
        if _TIME.fullmatch(self.time) is None:
            return [f'time={self.time} is no walltime; write [D-]HH:MM:SS in quotes, such as "24:00:00"']
        if self.seconds < 2 * self.signal_seconds:
            errors.append(
                f"time={self.time} is shorter than twice signal_seconds={self.signal_seconds}, the time to save in; "
                "ask for more time or lower signal_seconds"
            )
        if self.gpus_per_node and self.num_local > self.gpus_per_node:
            errors.append(
                f"processes_per_node={self.num_local} exceeds gpus_per_node={self.gpus_per_node}, one process each; "
                "lower it or remove it"
            )
        for name in ("account", "partition", *(() if self.python is None else ("python",))):
            value = getattr(self, name)
            if value is not None and re.search(r"[\s'\"`$;&|<>\\]", value):
                errors.append(f"{name}={value} holds a blank or a character that a shell reads; correct it")
        for name, lines in (("directives", self.directives), ("setup", self.setup), ("env", self.env.values())):
            if any("\n" in line for line in lines):
                errors.append(f"{name} holds a line break; give one line each")
        return errors
