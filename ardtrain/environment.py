"""Which process am I: one order of sources, and no silent second copy of a run.

Every launcher tells its processes their number in variables of its own. `discover` reads them in one order (the
variables that torch defines, srun, Open MPI, the PMI of MPICH and Intel MPI, a single process) and refuses a mix,
because N independent copies that all believe to be alone are the worst failure of a launch. `export` then sets
the five variables that DeepSpeed wants, all of them: if one is missing it asks MPI and overrules the others.
"""

import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Step numbers that Slurm gives to shells and not to a step that srun started: interactive, batch, extern.
_SLURM_SHELL_STEPS = {"4294967290", "4294967291", "4294967292", "interactive", "batch", "extern"}


@dataclass(frozen=True)
class ProcessIdentity:
    """Number and place of this process in its run."""

    global_rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None  # None: the launcher does not say
    source: str  # "torch", "srun", "Open MPI", "PMI" or "single"
    master_addr: str
    master_port: int | None  # None: a single process takes any free port


@dataclass(frozen=True)
class _Group:
    """A launcher's own words: this process is number `index` of `size`."""

    source: str
    index: int
    size: int
    local_rank: int
    local_size: int | None


def discover(environ: Mapping[str, str]) -> ProcessIdentity:
    """Identity of this process, from the first source that is complete. Pure.

    Raises:
        ValueError: a source is incomplete, a number does not parse or is out of range, or two sources contradict
            each other in a way that would start independent copies of the run.
    """
    srun, mpi = _srun(environ), _mpi(environ)
    torch = _torch(environ)
    outer = _inner_of(srun, mpi)
    if torch is not None:
        _refuse_copies(torch, outer)
        return _identity(torch, environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT"))
    if outer is not None and outer.size > 1:
        return _identity(outer, _master_addr(outer, environ), _master_port(environ))
    if srun is None and mpi is None:
        _refuse_unstarted(environ)
    return ProcessIdentity(0, 1, 0, 1, "single", environ.get("MASTER_ADDR", "127.0.0.1"), None)


def export(identity: ProcessIdentity, environ: MutableMapping[str, str]) -> None:
    """Set those of the five torch variables that are missing; a single process gets a port that is free now."""
    port = identity.master_port
    if port is None and "MASTER_PORT" not in environ:
        port = _free_port()
    values = (identity.global_rank, identity.world_size, identity.local_rank, identity.master_addr, port)
    for name, value in zip(TORCH_VARIABLES, values, strict=True):
        if value is not None:
            environ.setdefault(name, str(value))


def job_id(environ: Mapping[str, str]) -> str | None:
    """The batch system's name of this job, as its own commands take it; an array's element by its number."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"  # SLURM_JOB_ID may name all of it
    return environ.get("SLURM_JOB_ID") or environ.get("PBS_JOBID")


def speaks_for(environ: Mapping[str, str]) -> Literal["run", "host", "nobody"]:
    """For what this process prints a mistake that all may find: process 0 for the run, one on each other host."""
    try:
        identity = discover(environ)
    except ValueError:  # the mistake may be this one
        return "run" if environ.get("RANK", "0") == "0" else "nobody"
    if identity.global_rank == 0:
        return "run"
    return "host" if identity.local_rank == 0 else "nobody"


def _torch(environ: Mapping[str, str]) -> _Group | None:
    """What torchrun and DeepSpeed's launcher set; MASTER_ADDR and MASTER_PORT alone are no identity."""
    if not any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    missing = [name for name in TORCH_VARIABLES if name not in environ]
    if missing:
        present = [name for name in TORCH_VARIABLES if name in environ]
        raise ValueError(
            f"{', '.join(present)} set but {', '.join(missing)} not: a launcher sets all five; "
            f"set the rest, or unset {', '.join(present)} so that srun, MPI or a single process is found"
        )
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    return _group(environ, "torch", "RANK", "WORLD_SIZE", "LOCAL_RANK", local_size)


def _srun(environ: Mapping[str, str]) -> _Group | None:
    """A task of an srun step; the shell of a batch job has Slurm's variables too but no step of its own."""
    if environ.get("SLURM_STEP_ID", "batch") in _SLURM_SHELL_STEPS or "SLURM_PROCID" not in environ:
        return None
    # The step's own count first: SLURM_NTASKS may have been exported by an outer shell for the whole job.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    group = _group(environ, "srun", "SLURM_PROCID", size, "SLURM_LOCALID", None)
    return _Group(group.source, group.index, group.size, group.local_rank, _slurm_local_size(environ))


def _mpi(environ: Mapping[str, str]) -> _Group | None:
    """A process of Open MPI's mpirun, or of a launcher that speaks PMI (MPICH's hydra, Intel MPI)."""
    if "OMPI_COMM_WORLD_RANK" in environ:
        names = [f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return _group(environ, "Open MPI", names[0], names[1], names[2], names[3])
    if "PMI_RANK" in environ:
        local_size = "MPI_LOCALNRANKS" if "MPI_LOCALNRANKS" in environ else None
        return _group(environ, "PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", local_size)
    return None


def _group(
    environ: Mapping[str, str], source: str, index: str, size: str, local_rank: str, local_size: str | None
) -> _Group:
    # A group of one needs no local number: mpirun -np 1 and srun's PMI leave it out at times.
    local = _integer(environ, local_rank) if local_rank in environ or _integer(environ, size) > 1 else 0
    group = _Group(
        source,
        _integer(environ, index),
        _integer(environ, size),
        local,
        None if local_size is None else _integer(environ, local_size),
    )
    if not 0 <= group.index < group.size:
        raise ValueError(f"{index}={group.index} must lie in 0..{size}-1, and {size}={group.size}")
    if not 0 <= group.local_rank < (group.local_size or group.size):
        raise ValueError(f"{local_rank}={group.local_rank} must be below the {group.local_size or group.size} here")
    return group


def _inner_of(srun: _Group | None, mpi: _Group | None) -> _Group | None:
    """The group next to this process when srun's and MPI's variables are both there.

    `srun --mpi=pmi2` sets both alike. mpirun inside an allocation starts its daemons by srun, so that its
    processes inherit the numbers of the daemons' step: there mpirun's are the true ones.
    """
    if srun is None or mpi is None:
        return srun or mpi
    if (srun.index, srun.size) == (mpi.index, mpi.size):
        return srun
    _refuse_copies(mpi, srun)
    return mpi


def _refuse_copies(inner: _Group, outer: _Group | None) -> None:
    """Refuse an inner group that cannot hold all processes the outer launcher started."""
    if outer is None or outer.size == 1:
        return
    too_small = inner.size < outer.size
    all_local = inner.local_size == inner.size and (inner.index, inner.size) != (outer.index, outer.size)
    if too_small or all_local:
        where = " on this host" if all_local and not too_small else ""
        raise ValueError(
            f"{inner.source} says process {inner.index} of {inner.size}{where}, but {outer.source} started "
            f"{outer.size} tasks: that would be {outer.size} independent runs; start one group over all hosts, "
            f"or unset the variables of {inner.source}"
        )


def _refuse_unstarted(environ: Mapping[str, str]) -> None:
    """Refuse to train alone in an allocation that asked for more."""
    num_tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environ and num_tasks != "1":
        raise ValueError(
            f"SLURM_NTASKS={num_tasks}, but srun did not start this process; put `srun` before the command, use "
            "another launcher, or unset SLURM_NTASKS to train on this one process"
        )


def _identity(group: _Group, master_addr: str, master_port: int) -> ProcessIdentity:
    if not 0 < master_port < 65536:
        raise ValueError(f"MASTER_PORT={master_port} must lie in 1..65535")
    return ProcessIdentity(
        group.index, group.size, group.local_rank, group.local_size, group.source, master_addr, master_port
    )


def _master_addr(group: _Group, environ: Mapping[str, str]) -> str:
    """MASTER_ADDR if given; this host if all processes are here; the first host that Slurm names."""
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if group.local_size == group.size:
        return "127.0.0.1"
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if group.source == "srun" and name in environ:
            return first_host(environ[name])
    raise ValueError(
        f"MASTER_ADDR is not set, and {group.source} does not name the host of process 0; set it for all processes "
        "(mpirun: -x MASTER_ADDR=HOST, MPICH: -genv MASTER_ADDR HOST)"
    )


def _master_port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT if given, else a port from the job's name: two jobs on one host must not meet."""
    if "MASTER_PORT" in environ:
        return _integer(environ, "MASTER_PORT")
    if environ.get("SLURM_JOB_ID", "").isdigit():
        return 20000 + int(environ["SLURM_JOB_ID"]) % 20000
    job = environ.get("PBS_JOBID") or environ.get("PMIX_NAMESPACE")
    return 29500 if job is None else 20000 + zlib.crc32(job.encode()) % 20000


def first_host(nodelist: str) -> str:
    """First host of Slurm's compressed list: `gpu[07-09,12],login1` gives `gpu07`."""
    match = re.match(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodelist)
    assert match is not None
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix or ''}"


def _slurm_local_size(environ: Mapping[str, str]) -> int | None:
    """Tasks of the step on this host, from Slurm's `2(x3),1` and this host's number; None if not said."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def _integer(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise ValueError(f"{name} is not set, but the launcher's other variables are; set it or use another launcher")
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name}={environ[name]!r} must be a whole number") from None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
