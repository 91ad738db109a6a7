"""What every test may count on: the test data's folder, one thread, the CPU unless a GPU is there."""

import json
import os
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Before any import of torch or DeepSpeed: float sums differ with the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Where examples/environment.sh builds DeepSpeed's ops ahead; elsewhere a test would compile for a minute.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
# The environment's own ninja first: another version of it would not read this one's log and compile all ops anew.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# No test reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the shared test data (`e2e_nlg`, `stories260k_llama`, ...)."""
    folder = Path(os.environ.get("ARDTRAIN_TEST_DATA", REPOSITORY.parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set ARDTRAIN_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def has_async_io() -> bool:
    """Can DeepSpeed build its NVMe swapper here (Debian: libaio-dev)?"""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


@pytest.fixture
def world(monkeypatch):
    """This process alone; DeepSpeed asks for LOCAL_RANK whenever an engine is made."""
    from tests.tiny import single_world

    monkeypatch.setenv("LOCAL_RANK", "0")
    return single_world()


FOUND, RUNS = pytest.StashKey[dict](), pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--record-families", help="JSON file for what the tests of model families found, if all pass")
    parser.addoption("--record-runs", help="JSON file for the runs that the tests found equal, if all pass")


def pytest_configure(config):
    config.stash[FOUND], config.stash[RUNS] = {}, []
    recording = config.getoption("--record-families") or config.getoption("--record-runs")
    if recording and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--record-families and --record-runs need all tests in one process; leave -n out")


# Of pytest-xdist's two workers (-n 2) one takes the launch tests, one after another, from the start on; the other the
# rest, file by file, so that a file's fixtures are made once; last the tests of several processes, which fill two cores
# alone. Tests of such a folder share hosts, ports and fixtures, so one worker has them all.
CHAINS = {"launch": 0, "distributed": 2}


def chain_of(nodeid):
    """The folder of a chain, or the test's own file."""
    path = nodeid.partition("::")[0]
    folder = path.removeprefix("tests/").partition("/")[0]
    return folder if folder in CHAINS else path


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: CHAINS.get(chain_of(item.nodeid), 1))  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Chains(LoadScopeScheduling):
        """(--dist loadgroup finds no marks under pytest 9.2.)"""

        def _split_scope(self, nodeid):
            return chain_of(nodeid)

    config.option.loadscopereorder = False  # not by the number of tests
    return Chains(config, log)


def pytest_sessionfinish(session, exitstatus):
    for option, key in (("--record-families", FOUND), ("--record-runs", RUNS)):
        path = session.config.getoption(option)
        if path and exitstatus == 0:
            Path(path).write_text(json.dumps(session.config.stash[key], indent=1) + "\n")


@pytest.fixture
def record(request):
    """Keeps what a test found of a family, or of it under a method, for `--record-families`; called after asserts."""

    def keep(family, method=None, **found):
        own = request.config.stash[FOUND].setdefault(family.name, {})
        if method is not None:
            own = own.setdefault("methods", {}).setdefault(method, {})
        own.update(found)

    return keep


# A run in the words of docs/support_matrix.md; what a test does not name is as simple as can be.
SIMPLE_RUN = {
    "form": "plain",  # of the adapters
    "family": "Llama",  # of docs/families.md
    "base_zero": 0,
    "base_offload": None,  # or cpu, nvme
    "adapter_zero": 1,
    "optimizer_offload": False,
    "dtype": "float32",  # that the base computes in
    "features": (),  # settings in use beside these
    "resumed_from": None,  # or the number of processes that wrote the checkpoint
    "resizes": 0,
    "equal": "bits",  # or the largest relative difference of losses
}


@pytest.fixture
def record_run(request):
    """Keeps a run that a test found equal to another, for `--record-runs`; called after asserts."""

    def keep(*, method, processes, **settings):
        found = {"test": request.node.nodeid.partition("::")[0], "method": method, "processes": processes}
        assert not set(settings) - set(SIMPLE_RUN)
        request.config.stash[RUNS].append(found | SIMPLE_RUN | settings)

    return keep
