"""A disk that takes no more: every verb says so and what it could not write, and leaves nothing that looks finished.

The limit is the system's own on the size of a file (RLIMIT_FSIZE), which fails in write() as a full disk does.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ardtrain.cli import main
from ardtrain.collectives import World
from ardtrain.config import ConfigError
from ardtrain.evaluating.command import Evaluation
from ardtrain.evaluating.report import Report
from ardtrain.faults import replace_file
from tests.report_runs import site_names, write_folder
from tests.runs import write_run
from tests.tiny import CPU
from tests.trained_runs import PLAIN, make_run


@contextlib.contextmanager
def no_file_beyond(size):
    """Within it a write beyond `size` bytes of a file fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_replaced_is_the_old_one_alone(tmp_path):
    replace_file(tmp_path / "a", "before")
    with no_file_beyond(1000), pytest.raises(OSError, match="File too large"):
        replace_file(tmp_path / "a", "x" * 2000)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


@pytest.mark.parametrize("verb", ["export", "merge"])
def test_an_adapter_or_model_that_finds_no_room(tmp_path, capsys, verb):
    run_dir, out = make_run(tmp_path, **PLAIN), tmp_path / "out"
    without_base = ["--without-base"] if verb == "export" else []
    with no_file_beyond(3000):
        assert main([verb, str(run_dir), "--out", str(out), *without_base]) == 2
    error = capsys.readouterr().err
    assert f"--out {out}: cannot be written (" in error and "free some space there, or name another folder" in error
    assert not list(tmp_path.glob("*out*"))
    inside_a_file = tmp_path / "run.yaml" / "out"
    assert main([verb, str(run_dir), "--out", str(inside_a_file), *without_base]) == 2
    assert f"--out {inside_a_file}: cannot be written ([Errno 20] Not a directory" in capsys.readouterr().err


def test_a_page_pictures_and_a_first_config_that_find_no_room(tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    write_folder(run_dir, sites=site_names(2))
    page, figures, picture, config = (tmp_path / n for n in ("page.html", "figures", "ranks.png", "new.yaml"))
    new = ["new", "--task", "sft", "--model", "m", "--out"]
    with no_file_beyond(1000):
        for arguments, named in (
            (["report", str(run_dir), "--out", str(page)], page),
            (["ranks", str(run_dir), str(picture)], picture),
            ([*new, str(config)], config),
        ):
            assert main(arguments) == 2
            assert f"{named}: " in (error := capsys.readouterr().err) and "File too large" in error
    assert not page.exists() and not config.exists() and not list(tmp_path.glob(".*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ardtrain.report.figures.write_figures", full)
    assert main(["report", str(run_dir), "--out", str(page), "--figures", str(figures)]) == 2
    assert f"{figures}: cannot be written (No space left on device)" in capsys.readouterr().err
    assert main(["ranks", str(run_dir), str(tmp_path)]) == 2
    assert f"{tmp_path}: the picture's name has no ending" in capsys.readouterr().err


def test_figures_that_find_no_room(tmp_path, monkeypatch):
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.model = SimpleNamespace(bound=contextlib.nullcontext, release=lambda: None, step=3)
    evaluation.world, evaluation.metrics, evaluation.generates, evaluation.tasks = World(0, 1, CPU), (), False, None
    evaluation.bootstrap, evaluation.block = None, SimpleNamespace(group_field=None)
    monkeypatch.setattr(Evaluation, "_head", lambda self, target: {"text": "x" * 2000})
    monkeypatch.setattr(Report, "tell", lambda *_, **__: pytest.fail("told what is not there"))
    with no_file_beyond(1000), pytest.raises(ConfigError, match=r"--out=\S*/out: cannot be written \(.*File too large"):
        evaluation.execute(tmp_path / "out", None)
    assert "figures.json" not in os.listdir(tmp_path / "out")


def test_rows_that_find_no_room_in_the_cache(tmp_path, monkeypatch, capsys):
    config = write_run(tmp_path, **PLAIN)
    monkeypatch.setenv("ARDTRAIN_CACHE", str(tmp_path / "cache"))
    with no_file_beyond(500):
        assert main(["validate", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"tokenised rows cannot be kept in {tmp_path / 'cache' / 'rows'} (" in error
    assert "set ARDTRAIN_CACHE to another folder" in error
    assert not [name for name in os.listdir(tmp_path / "cache" / "rows") if not name.endswith(".lock")]
    monkeypatch.setenv("ARDTRAIN_CACHE", str(config))
    assert main(["validate", str(config)]) == 2
    assert "set ARDTRAIN_CACHE to another folder" in capsys.readouterr().err


def test_a_run_without_room_for_checkpoints_and_pictures_ends_well_and_says_so(tmp_path):
    config = write_run(tmp_path, save_steps=8)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    train = f"import sys; from ardtrain.cli import main; sys.exit(main(['train', {str(config)!r}]))"
    environment = os.environ | {"ARDTRAIN_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", f"{limit}\n{train}"],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told
    assert "checkpoint-8 was not saved" in told and "ranks.png was not drawn: File too large" in told
    run_dir = tmp_path / "run"
    assert (run_dir / "status").read_text() == "finished 16\n" and (run_dir / "adapter").is_dir()
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 16
