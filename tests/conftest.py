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


FOUND = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--record-families", help="JSON file for what the tests of model families found, if all pass")


def pytest_configure(config):
    config.stash[FOUND] = {}
    if config.getoption("--record-families") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--record-families needs all tests in one process; leave -n out")


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
    path = session.config.getoption("--record-families")
    if path and exitstatus == 0:
        Path(path).write_text(json.dumps(session.config.stash[FOUND], indent=1) + "\n")


@pytest.fixture
def record(request):
    """Keeps what a test found of a family, or of it under a method, for `--record-families`; called after asserts."""

    def keep(family, method=None, **found):
        own = request.config.stash[FOUND].setdefault(family.name, {})
        if method is not None:
            own = own.setdefault("methods", {}).setdefault(method, {})
        own.update(found)

    return keep
