"""Two hosts made of namespaces on this machine, with sshd and a real Slurm: what the launch tests run on."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.runs import fingerprint, write_run

PACKAGES = {"ip": "iproute2", "/usr/sbin/sshd": "openssh-server", "pdsh": "pdsh", "munged": "munge",
            "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client"}  # fmt: skip
# What a user's shell brings: Slurm hands it on, ssh does not.
ENVIRONMENT = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/sbin:/usr/bin:/sbin:/bin"]),
    "PYTHONPATH": str(Path(__file__).parents[2]),  # the checkout that is tested
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
for name in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "ARDTRAIN_CACHE"):
    if name in os.environ:
        ENVIRONMENT[name] = os.environ[name]


def skip_without_cluster():
    """Skips unless hosts can be made here."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("hosts are made of network namespaces, which needs root on Linux")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin:/sbin"])
    missing = sorted({package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None})
    if missing:
        pytest.skip(f"needs Debian's packages {', '.join(missing)}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """node1 and node2. Tests leave them up, connected and without jobs."""
    skip_without_cluster()
    with Cluster(tmp_path_factory.mktemp("cluster") / "c", hosts=2, slurm=True, env=ENVIRONMENT) as both:
        yield both


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory):
    """Where the launch tests' runs lie: model, data, and a folder for each run."""
    return tmp_path_factory.mktemp("runs")


LONG = {"max_steps": 140, "eval_steps": 35, "save_steps": 20, "elalora": {"init_warmup": 2, "final_warmup": 20,
        "mask_interval": 6, "b": 4, "k": 2}, "resume_from_checkpoint": "auto"}  # fmt: skip


@pytest.fixture(scope="session")
def alone(cluster, runs_folder):
    """The unbroken short run of one process, ZeRO-0: what every route must equal to the bit."""
    return unbroken(cluster, runs_folder, "alone")


@pytest.fixture(scope="session")
def long_alone(cluster, runs_folder):
    """The same of the long run, which lasts until a test has interrupted it."""
    return unbroken(cluster, runs_folder, "long_alone", **LONG)


def unbroken(cluster, folder, name, **settings):
    """Fingerprint of a run of one process."""
    config = write_run(folder, name, **settings)
    done = cluster.run("node1", [sys.executable, "-m", "ardtrain", "train", str(config)], cwd=folder, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    return fingerprint(folder / name)
