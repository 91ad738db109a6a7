"""What one process sees of its host: collected on every host, compared on one. Collecting changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ardtrain
from ardtrain import ops
from ardtrain.doctor import disk, network
from ardtrain.doctor.needs import Needs
from ardtrain.environment import ProcessIdentity

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "safetensors", "numpy", "torchvision", "mpi4py")
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")


@dataclass(frozen=True)
class Facts:
    """JSON-able; None where a thing is not there (or, for memlock_bytes, not limited)."""

    process: int
    local_rank: int
    host: str
    addresses: dict[str, list[str]]  # by interface
    name_addresses: list[str]  # what this host's own name resolves to
    variables: dict[str, str]  # of VARIABLES, those that are set
    python: str
    versions: dict[str, str | None]  # of PACKAGES, and of ardtrain
    package_digest: str  # of the code of ardtrain
    accelerator: str  # cuda or cpu: what a run would train on
    cuda: str | None = None  # what torch was built for
    nvcc: str | None = None
    driver: str | None = None
    gpus: list[str] = field(default_factory=list)
    rdma: dict[str, str] = field(default_factory=dict)  # InfiniBand or RoCE device -> state of its port
    ops_folder: str = ""
    ops: list[str] = field(default_factory=list)
    locks: dict[str, float] = field(default_factory=dict)  # lock file -> age in seconds
    can_compile: bool = True
    memlock_bytes: int | None = None  # ulimit -l
    shm_bytes: int = 0
    run_dir: str = ""
    free_bytes: int = 0
    write_error: str | None = None
    config_digest: str | None = None
    files: dict[str, int | None] = field(default_factory=dict)  # data and model -> size; None: not there
    speeds: dict[str, list[float]] = field(default_factory=dict)  # folder -> bytes a second, write and read
    nvme: dict[str, str | None] = field(default_factory=dict)  # folder to offload to -> why it cannot be written

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        known = {f.name for f in dataclasses.fields(cls)}  # another version's facts must still be compared
        return cls(**{name: value for name, value in values.items() if name in known})


def collect(identity: ProcessIdentity, needs: Needs, *, quick: bool) -> Facts:
    """This process's facts; one process a host measures its disks, unless `quick`. Takes seconds: imports torch."""
    host = socket.gethostname()
    folder = ops.extensions_folder()
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    accelerator, cuda, gpus = _accelerator()
    measured = () if quick or identity.local_rank else (needs.run_dir, *needs.nvme)
    return Facts(
        process=identity.global_rank,
        local_rank=identity.local_rank,
        host=host,
        addresses=network.interfaces(),
        name_addresses=network.resolve(host)[0],
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES} | {"ardtrain": ardtrain.__version__},
        package_digest=package_digest(Path(ardtrain.__file__).parent),
        accelerator=accelerator,
        cuda=cuda,
        nvcc=_nvcc() if cuda is not None else None,
        driver=driver_version(_text(Path("/proc/driver/nvidia/version"))),
        gpus=gpus,
        rdma=_rdma(Path("/sys/class/infiniband")),
        ops_folder=str(folder),
        ops=sorted({*ops.compiled_ops(folder), *_prebuilt_ops()}),
        locks={str(path): age for path, age in ops.locks(folder).items()},
        can_compile=all(_tool(name) for name in ("c++", "ninja")),
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        shm_bytes=_size_of_disk(Path("/dev/shm")),
        run_dir=str(needs.run_dir),
        free_bytes=disk.free_bytes(needs.run_dir),
        write_error=disk.write_error(needs.run_dir),
        config_digest=_file_digest(needs.config_path),
        files={str(path): _size(path) for path in needs.files},
        speeds=_speeds(measured),
        nvme={str(path): disk.write_error(path) for path in needs.nvme},
    )


def package_digest(folder: Path) -> str:
    """sha256 (hex) over names and contents of a package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix().encode()
        content = path.read_bytes()
        digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()


def driver_version(text: str) -> str | None:
    """NVIDIA's driver from the text of /proc/driver/nvidia/version. Pure."""
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def _accelerator() -> tuple[str, str | None, list[str]]:
    """What a run would train on, the CUDA that torch was built for, and the GPUs it sees."""
    import torch

    gpus: list[str] = []
    with contextlib.suppress(RuntimeError):  # a driver that does not fit: told by its version
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    on_gpu = bool(gpus) and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return "cuda" if on_gpu else "cpu", torch.version.cuda, gpus


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)  # no import: that of deepspeed takes seconds
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str) -> bool:
    """On PATH, or beside this Python, which `ardtrain train` puts in front of PATH."""
    return shutil.which(name) is not None or (Path(sys.executable).parent / name).is_file()


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    program = shutil.which(str(Path(home, "bin/nvcc")) if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if program is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
        if match := re.search(r"release (\d+\.\d+)", told):
            return match[1]
    return None


def _prebuilt_ops() -> list[str]:
    """Ops that were compiled when DeepSpeed was installed (DS_BUILD_OPS), under the names that JIT gives them."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return []
    return [path.name.split(".")[0].removesuffix("_op") for path in Path(spec.origin).parent.glob("ops/**/*.so")]


def _rdma(folder: Path) -> dict[str, str]:
    """Device -> `ACTIVE`, `DOWN`, ... of its first port."""
    found: dict[str, str] = {}
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        state = next((_text(path) for path in sorted(device.glob("ports/*/state"))), "")
        found[device.name] = state.split(":")[-1].strip() or "unknown"
    return found


def _speeds(folders: Sequence[Path]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for folder in folders:
        with contextlib.suppress(OSError):  # write_error tells
            speed = disk.measure(folder)
            found[str(folder)] = [speed.write, speed.read]
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _size_of_disk(path: Path) -> int:
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0
    return stat.f_blocks * stat.f_frsize


def _file_digest(path: Path | None) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else None
