from pathlib import Path

import pytest

from ardtrain import cli
from ardtrain.config import ConfigError, load_config, parse_config
from ardtrain.run import refuse_misplaced, refuse_used_folder
from tests.runs import write_run


def config_in(folder, **settings):
    raw = {"model_name_or_path": "m", "method": "lora", "output_dir": str(folder), "data": {"train_file": "a.jsonl"}}
    return parse_config(raw | settings)


def test_a_new_run_is_refused_in_a_folder_that_holds_another(tmp_path):
    refuse_used_folder(config_in(tmp_path))
    (tmp_path / "latest").write_text("checkpoint-30\n")
    with pytest.raises(ConfigError, match=r"holds an earlier run \(checkpoint-30\); go on with it by resume_from"):
        refuse_used_folder(config_in(tmp_path))
    refuse_used_folder(config_in(tmp_path, resume_from_checkpoint="auto"))


def test_what_stands_under_a_runs_names_must_be_of_their_kind(tmp_path):
    """Before the work: the adapter is written at the end of it."""
    (tmp_path / "status").touch()
    (tmp_path / "model").mkdir()
    refuse_misplaced(config_in(tmp_path))
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "adapter").touch()
    with pytest.raises(ConfigError) as caught:
        refuse_misplaced(config_in(tmp_path))
    remedy = "move it away, or choose another output_dir"
    assert caught.value.errors == [
        f"output_dir={tmp_path}: metrics.jsonl is no file, and a run writes one there; {remedy}",
        f"output_dir={tmp_path}: adapter is no folder, and a run writes one there; {remedy}",
    ]


def test_a_run_does_not_begin_over_a_misplaced_folder(tmp_path, capsys):
    path = write_run(tmp_path)
    Path(load_config(path).output_dir, "ranks.jsonl").mkdir(parents=True)
    assert cli.main(["train", str(path)]) == 2
    assert "ranks.jsonl is no file, and a run writes one there; move it away" in capsys.readouterr().err
