"""One host's facts -> findings. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ardtrain.doctor.facts import Facts
from ardtrain.doctor.finding import Finding
from ardtrain.doctor.network import BRIDGES, missing_interfaces
from ardtrain.ops import STALE_LOCK_SECONDS

GIB = 1 << 30
MEMLOCK_BYTES = GIB  # below it pinned buffers of an offload or of InfiniBand soon fail
SHM_BYTES = GIB
SLOW_CHECKPOINT_SECONDS = 600.0
SLOW_NVME = 1e9  # bytes per second of reads


@dataclass(frozen=True)
class KnownBad:
    """A package older than `below` is bad, for one method or (None) for all."""

    package: str
    below: str
    method: str | None
    why: str  # with its source


KNOWN_BAD = (
    KnownBad("torch", "2.11", None, "older ones were not run with our tests (pyproject.toml)"),
    KnownBad(
        "deepspeed",
        "0.19.3",
        None,
        "adapters with ZeRO-3 and gradient checkpointing fail on the recomputed shapes "
        "(deepspeedai/DeepSpeed#8130, #8148)",
    ),
    KnownBad("deepspeed", "0.19.8", "full", "a gradient that is not finite would be applied (FullEngine refuses it)"),
    KnownBad("transformers", "5.23", None, "older ones were not run with our tests (pyproject.toml)"),
    KnownBad("peft", "0.21.2", None, "the exported adapter is read back with it (pyproject.toml)"),
)

# CUDA's major version -> the oldest driver it runs with, by minor version compatibility (NVIDIA's release notes).
OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.0"}


def version_numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def check_versions(facts: Facts, method: str | None) -> Iterator[Finding]:
    """Known-bad versions and pairs. `method`: of the config, None without one."""
    host, versions = facts.host, facts.versions
    before = len(KNOWN_BAD)
    for known in KNOWN_BAD:
        version = versions.get(known.package)
        if version is None or version_numbers(version) >= version_numbers(known.below):
            continue
        before -= 1
        remedy = f"pip install -U '{known.package}>={known.below}', for the tested set -c constraints.txt"
        if known.method is None or known.method == method:
            yield Finding("fail", host, f"{known.package} {version} is older than {known.below}: {known.why}", remedy)
        elif method is None:
            what = f"{known.package} {version}: method={known.method} needs {known.below}, {known.why}"
            yield Finding("warn", host, what, remedy)
    missing = [name for name in ("torch", "deepspeed", "transformers", "peft") if versions.get(name) is None]
    if missing:
        remedy = "install ardtrain into the Python that runs here, or give every host the same environment"
        yield Finding("fail", host, f"{', '.join(missing)} not installed for Python {facts.python}", remedy)
    pairs = [*_pair_torchvision(facts), *_pair_cuda(facts)]
    yield from pairs
    if before == len(KNOWN_BAD) and not missing and not pairs:
        told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "transformers"))
        yield Finding("ok", host, f"Python {facts.python}, {told}: no known-bad version or pair")


def _pair_torchvision(facts: Facts) -> Iterator[Finding]:
    """torchvision 0.(N+15) belongs to torch 2.N (pytorch/vision's table); its ops register for no other."""
    torch, vision = facts.versions.get("torch"), facts.versions.get("torchvision")
    if torch is None or vision is None:
        return
    major, minor = (*version_numbers(torch), 0, 0)[:2]
    wanted = (0, minor + 15)
    builds = {v.partition("+")[2] for v in (torch, vision)} - {""}
    if major != 2 or (version_numbers(vision)[:2] == wanted and len(builds) < 2):
        return
    yield Finding(
        "fail",
        facts.host,
        f"torchvision {vision} does not belong to torch {torch}: importing transformers' models fails with 'operator "
        "torchvision::nms does not exist' (pytorch/pytorch#157648)",
        f"pip uninstall torchvision (not needed here), or install torchvision 0.{wanted[1]} of the same build",
    )


def _pair_cuda(facts: Facts) -> Iterator[Finding]:
    """torch's CUDA with the driver, and with the compiler that builds DeepSpeed's ops."""
    host = facts.host
    if facts.driver is not None and facts.cuda is None:
        yield Finding(
            "warn",
            host,
            f"torch {facts.versions.get('torch')} is built without CUDA and this host has NVIDIA's driver",
            "install torch's CUDA build, or set DS_ACCELERATOR=cpu to say that it is meant",
        )
    if facts.cuda is None:
        return
    major = version_numbers(facts.cuda)[0]
    oldest = OLDEST_DRIVER.get(major)
    if facts.driver is not None and oldest is not None and version_numbers(facts.driver) < version_numbers(oldest):
        yield Finding(
            "fail",
            host,
            f"torch is built for CUDA {facts.cuda}, which needs a driver from {oldest}; here is {facts.driver}",
            "have the driver updated, or install torch's build for an older CUDA",
        )
    elif facts.driver is not None and not facts.gpus:
        yield Finding(
            "warn",
            host,
            f"driver {facts.driver} is here, but torch sees no GPU",
            "ask the scheduler for GPUs (gpus_per_node), and look at CUDA_VISIBLE_DEVICES and nvidia-smi",
        )
    if facts.nvcc is not None and version_numbers(facts.nvcc)[0] != major:
        yield Finding(
            "fail",
            host,
            f"nvcc is of CUDA {facts.nvcc} and torch of CUDA {facts.cuda}: DeepSpeed refuses to build its ops",
            f"set CUDA_HOME to a CUDA {major} toolkit (module load cuda/{major})",
        )


def check_ops(facts: Facts) -> Iterator[Finding]:
    """Compiled ops and leftover locks."""
    host = facts.host
    for path, age in facts.locks.items():
        if age > STALE_LOCK_SECONDS:
            # No failure: `ardtrain train` removes it, and must not be kept from that.
            what = f"{path} is {age / 60:.0f} min old, left by a compile that was killed; others wait for it for ever"
            yield Finding("warn", host, what, f"`ardtrain train` removes it; for other programs: rm {path}")
        else:
            what = f"{path} is {age:.0f} s old: an op is being compiled, or its compile was killed just now"
            yield Finding("warn", host, what, f"if nothing compiles here (ps, ninja): rm {path}")
    wanted = ["deepspeed_shm_comm"] if facts.accelerator == "cpu" else []
    wanted += ["async_io"] if facts.nvme else []
    missing = [name for name in wanted if name not in facts.ops]
    if missing and not facts.can_compile:
        yield Finding(
            "fail",
            host,
            f"{', '.join(missing)} must be compiled and c++ or ninja is not on PATH here",
            "install a C++ compiler and ninja, or set TORCH_EXTENSIONS_DIR to a folder where the ops are compiled",
        )
    elif missing:
        yield Finding(
            "warn",
            host,
            f"{', '.join(missing)} not compiled in {facts.ops_folder}: the first start takes a minute or two",
            "start one process once, or set TORCH_EXTENSIONS_DIR to a folder where they are compiled",
        )
    elif wanted:
        yield Finding("ok", host, f"compiled in {facts.ops_folder}: {', '.join(wanted)}")


def check_memory(facts: Facts, *, num_local: int, num_hosts: int) -> Iterator[Finding]:
    """/dev/shm and ulimit -l."""
    host, small = facts.host, facts.shm_bytes < SHM_BYTES
    if small and (num_local > 1 or facts.gpus):
        yield Finding(
            "warn",
            host,
            f"/dev/shm has {facts.shm_bytes / GIB:.2f} GiB; NCCL and torch's workers share memory through it",
            "give the container --shm-size=8g (or --ipc=host), or remount /dev/shm larger",
        )
    limit = facts.memlock_bytes
    short = limit is not None and limit < MEMLOCK_BYTES
    text = "unlimited" if limit is None else f"{limit // 1024} KiB"
    remedy = (
        "set `* - memlock unlimited` in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd or sshd, or "
        "--ulimit memlock=-1 for the container"
    )
    if short and facts.rdma and num_hosts > 1 and facts.accelerator == "cuda":
        what = f"ulimit -l is {text}: NCCL cannot register memory with {', '.join(facts.rdma)}"
        yield Finding("fail", host, what, remedy)
    elif short and facts.nvme:
        yield Finding("warn", host, f"ulimit -l is {text}: the offload to NVMe pins its buffers", remedy)
    elif not small:
        yield Finding("ok", host, f"/dev/shm {facts.shm_bytes / GIB:.1f} GiB, ulimit -l {text}")


def check_gpu(facts: Facts) -> Iterator[Finding]:
    """Has this process a GPU of its own? For every process, not once a host."""
    if facts.accelerator == "cuda" and facts.local_rank >= len(facts.gpus):
        yield Finding(
            "fail",
            f"{facts.host} (process {facts.process})",
            f"its local number is {facts.local_rank}, and it sees {len(facts.gpus)} GPU(s)",
            "start at most as many processes on a host as it has GPUs; each must see all of them (no --gpus-per-task)",
        )


def check_interfaces(facts: Facts, *, num_hosts: int) -> Iterator[Finding]:
    """Interfaces that variables choose, the one that gloo takes by itself, and RDMA."""
    host = facts.host
    there = ", ".join(f"{name} {addresses[0]}" for name, addresses in facts.addresses.items() if addresses)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        nccl = name.startswith("NCCL")
        chosen = facts.variables.get(name)
        if not chosen or (nccl and facts.accelerator != "cuda"):
            continue
        if missing := missing_interfaces(chosen, facts.addresses, prefixes=nccl):
            yield Finding(
                "fail",
                host,
                f"{name}={chosen}: this host has no interface {', '.join(missing)}; it has {there}",
                f"set {name} to one that all hosts have, or unset it (launcher.network_interface)",
            )
    if num_hosts == 1:
        return
    address = gloo_address(facts)
    name = next((name for name, own in facts.addresses.items() if address in own), "")
    if name.startswith(BRIDGES):
        yield Finding(
            "fail",
            host,
            f"gloo would announce {address} of {name}, which other hosts cannot reach; it has {there}",
            "set GLOO_SOCKET_IFNAME to the interface of the hosts' common network, or correct this host's line in "
            "/etc/hosts",
        )
    if facts.accelerator != "cuda":
        return
    wanted = [part.split(":")[0] for part in facts.variables.get("NCCL_IB_HCA", "").lstrip("=").split(",") if part]
    if wanted and not wanted[0].startswith("^") and not any(d.startswith(tuple(wanted)) for d in facts.rdma):
        what = f"NCCL_IB_HCA={facts.variables['NCCL_IB_HCA']}: this host has no such device ({list(facts.rdma)})"
        yield Finding("fail", host, what, "correct NCCL_IB_HCA, or unset it; `ibv_devices` lists them")
    elif "ACTIVE" not in facts.rdma.values():
        states = ", ".join(f"{device} {state}" for device, state in facts.rdma.items()) or "no device"
        yield Finding(
            "warn",
            host,
            f"no active InfiniBand or RoCE ({states}): NCCL goes over TCP, many times slower",
            "if the cluster has it: load its modules, give the container /dev/infiniband, look at `ibstat`",
        )


def gloo_address(facts: Facts) -> str | None:
    """The address that gloo announces: of the chosen interface, else what the host's own name gives."""
    chosen = facts.variables.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    addresses = facts.addresses.get(chosen, ()) if chosen else facts.name_addresses
    return addresses[0] if addresses else None


def check_disk(facts: Facts) -> Iterator[Finding]:
    """Rights and speed where the run writes."""
    host, free = facts.host, f"{facts.free_bytes / GIB:,.1f} GiB free"
    if facts.write_error is not None:
        what = f"the run folder {facts.run_dir} cannot be written: {facts.write_error}"
        yield Finding("fail", host, what, "choose another output_dir, or have the rights given")
    elif facts.run_dir not in facts.speeds:
        yield Finding("ok", host, f"{facts.run_dir} can be written, {free}")
    for folder, error in facts.nvme.items():
        if error is not None:
            what = f"nvme_path={folder} cannot be written: {error}"
            yield Finding("fail", host, what, "make the folder on a local disk of every host, or correct nvme_path")
    for folder, (write, read) in facts.speeds.items():
        what = f"{folder}: {free}, " if folder == facts.run_dir else f"{folder}: "
        what += f"writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
        if folder in facts.nvme and read < SLOW_NVME:
            remedy = "choose a local NVMe disk as nvme_path, or offload to the CPU"
            yield Finding("warn", host, what + ", slow for an offload to NVMe", remedy)
        else:
            yield Finding("ok", host, what)


def check_room(facts: Facts, checkpoint: int) -> Finding:
    """Room and speed for checkpoints of so many bytes."""
    size, free = f"about {checkpoint / GIB:,.2f} GiB", f"{facts.free_bytes / GIB:,.1f} GiB free"
    if facts.free_bytes < 2 * checkpoint:  # a new one is complete before an old one goes
        what = f"{facts.run_dir}: {free}, and two checkpoints of {size} must fit"
        remedy = 'free some, choose another output_dir, or set zero_checkpoint: "off"'
        return Finding("fail", facts.host, what, remedy)
    write = facts.speeds.get(facts.run_dir, (0.0,))[0]
    if write and checkpoint / write > SLOW_CHECKPOINT_SECONDS:
        what = f"{facts.run_dir}: a checkpoint of {size} takes {checkpoint / write / 60:.0f} min to write"
        return Finding("warn", facts.host, what, "choose a faster disk as output_dir, or raise save_steps")
    return Finding("ok", facts.host, f"{facts.run_dir}: {free}, a checkpoint takes {size}")


def check_files(facts: Facts) -> Iterator[Finding]:
    """Data and model files that the config names."""
    missing = [path for path, size in facts.files.items() if size is None]
    if missing:
        remedy = "put them on a disk that every host sees under this path, or correct the config (data, model)"
        yield Finding("fail", facts.host, f"not there: {', '.join(missing)}", remedy)


def check_host(facts: Facts, *, method: str | None, num_local: int, num_hosts: int) -> list[Finding]:
    """All findings about one host by itself but the network's."""
    return [
        *check_versions(facts, method),
        *check_ops(facts),
        *check_memory(facts, num_local=num_local, num_hosts=num_hosts),
        *check_disk(facts),
        *check_files(facts),
    ]
