import subprocess
import sys
from pathlib import Path

import pytest

from ardtrain.main import import_from_parent

REPOSITORY = Path(__file__).resolve().parents[2]


def test_package_folder_gives_way_to_its_parent():
    package = REPOSITORY / "ardtrain"
    assert import_from_parent([str(package), "", "elsewhere", str(package) + "/"], package) == [
        str(REPOSITORY), "", "elsewhere", str(REPOSITORY),
    ]  # fmt: skip


def test_started_by_path_the_modules_have_one_name(tmp_path):
    """As DeepSpeed's launcher does it: by path, from another folder, `--local_rank` first."""
    package = tmp_path / "ardtrain"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_bytes((REPOSITORY / "ardtrain/main.py").read_bytes())
    (package / "ranks.py").touch()
    (package / "cli.py").write_text(
        "import importlib.util\n"
        "def main(argv):\n"
        "    print(argv, importlib.util.find_spec('ranks'), importlib.util.find_spec('ardtrain.ranks') is not None)\n"
        "    return 3\n"
    )
    command = [sys.executable, "-u", str(package / "main.py"), "--local_rank=1", "run.yaml"]
    result = subprocess.run(command, cwd=tmp_path.parent, capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout == "['--local_rank=1', 'run.yaml'] None True\n"
    assert result.returncode == 3


def test_command_line_starts_as_a_module():
    if not (REPOSITORY / "ardtrain/cli.py").exists():
        pytest.skip("ardtrain/cli.py is not written yet")
    result = subprocess.run(
        [sys.executable, "-m", "ardtrain", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
