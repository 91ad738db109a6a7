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
    result = subprocess.run(
        [sys.executable, "-m", "ardtrain", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, "run"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "run"),
        ({"RANK": "2", "LOCAL_RANK": "0"}, "host"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "nobody"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, "host"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, "nobody"),
        ({"RANK": "0"}, "run"),  # incomplete, which may be the mistake itself
        ({"RANK": "3"}, "nobody"),
    ],
)
def test_one_process_a_host_tells_mistakes(tmp_path, capsys, monkeypatch, variables, speaks):
    from ardtrain.cli import main
    from ardtrain.faults import host_name

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    complete = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"} if "LOCAL_RANK" in variables else {}
    for name, value in (address | complete | variables).items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "run.yaml"  # is not there
    assert main(["validate", str(config)]) == 2
    error = capsys.readouterr().err
    if speaks == "nobody":
        assert error == ""
    else:
        head = "ardtrain validate: 1 mistake(s)\n" if speaks == "run" else f"{host_name()}: "
        assert error.startswith(head) and str(config) in error
        assert error.count("\n") == (2 if speaks == "run" else 1)


def test_without_a_config_train_takes_the_default_or_shows_a_command(tmp_path, monkeypatch, capsys):
    import ardtrain.run
    from ardtrain.cli import main

    taken = []

    def train(config, overrides, *, rehearsal):
        taken.append((config, overrides) if not rehearsal else (config, overrides, "rehearsed"))
        return 0

    monkeypatch.setattr(ardtrain.run, "train", train)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARDTRAIN_CONFIG", raising=False)
    assert main([]) == 2
    assert "deepspeed --num_nodes 2 ardtrain/main.py train run.yaml" in capsys.readouterr().err
    (tmp_path / "ardtrain.yaml").touch()
    assert main(["--local_rank=0"]) == 0
    assert main(["train", "r=4"]) == 0
    monkeypatch.setenv("ARDTRAIN_CONFIG", "other.yaml")
    assert main([]) == 0
    assert main(["mine.yaml"]) == 0
    assert taken == [("ardtrain.yaml", []), ("ardtrain.yaml", ["r=4"]), ("other.yaml", []), ("mine.yaml", [])]
    assert main(["mine.yaml", "--rehearse", "r=4"]) == 0 and main(["--rehearse"]) == 0
    assert taken[4:] == [("mine.yaml", ["r=4"], "rehearsed"), ("other.yaml", [], "rehearsed")]
