"""Wheel and sdist hold the package, its templates and licence, and run outside a checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ardtrain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of both archives."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheel_runs_outside_a_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {"ardtrain", f"ardtrain-{ardtrain.__version__}.dist-info"}
    assert any(name.startswith("ardtrain/launcher/") for name in names)
    assert any(name.startswith("ardtrain/ds_configs/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for arguments in (["--version"], ["schema"]):
        command = [sys.executable, "-m", "ardtrain", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (
        ardtrain.__version__
        in subprocess.run(
            [sys.executable, "-m", "ardtrain", "--version"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        ).stdout
    )


def test_sdist_holds_what_the_wheel_is_made_of(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "ardtrain/cli.py", "ds_configs/zero3.json"} <= names
    assert not [name for name in names if name.startswith(("runs/", "shared/", ".venv"))]
