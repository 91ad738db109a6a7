"""`ardtrain fetch`: what it asks the hub for, and how it says what is missing."""

import huggingface_hub
import pytest
import yaml
from datasets import Dataset

from ardtrain import preflight
from ardtrain.config import ConfigError, load_config
from ardtrain.fetching import fetch
from tests.tiny import save_tiny_llama


@pytest.fixture
def config(tmp_path):
    def write(**settings):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
        base = {
            "model_name_or_path": "org/base",
            "method": "lora",
            "output_dir": "runs",
            "data": {"train_file": str(tmp_path / "a.jsonl")},
            "max_steps": 3,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(base | settings))
        return str(path)

    return write


def test_base_and_tokenizer_are_fetched_once_each_with_the_pinned_revision(config, monkeypatch, capsys):
    asked = []

    def download(name, *, revision, ignore_patterns):
        asked.append((name, revision))
        assert "*.gguf" in ignore_patterns
        return f"/cache/{name}/snapshots/abc123"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("ardtrain.fetching.tokenise", lambda path, overrides: ["rows: 3"])
    assert fetch(config(revision="v2", tokenizer_name_or_path="org/words"), []) == 0
    assert asked == [("org/base", "v2"), ("org/words", None)]
    said = capsys.readouterr().out
    assert "org/words: /cache/org/words/snapshots/abc123; to pin it: revision: abc123" in said
    assert fetch(config(tokenizer_name_or_path="org/base"), []) == 0
    assert len(asked) == 3


def test_a_folder_needs_nothing_and_rows_are_tokenised_ahead(config, tmp_path, capsys, monkeypatch):
    """The run's own start then finds them and tokenises nothing."""
    monkeypatch.setenv("ARDTRAIN_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_llama(tmp_path / "model")
    path = config(model_name_or_path=str(folder))
    assert fetch(path, ["per_device_train_batch_size=1"]) == 0
    said = capsys.readouterr().out
    assert "a local folder, nothing to fetch" in said
    assert f"rows: 3 to train on, tokenised in {tmp_path / 'cache' / 'rows'}" in said
    monkeypatch.setattr("ardtrain.data.Tokenising", None)
    settings = load_config(path, ["global_batch_size=1"])
    train, _ = preflight.open_data(settings, preflight.tokenizer_of(settings))
    assert train.num_samples == 3


def test_a_data_set_of_the_hub_is_told_with_its_commit(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ARDTRAIN_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_llama(tmp_path / "model")
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 4)
    monkeypatch.setattr("ardtrain.data_sources.load_hub", lambda source: rows)
    monkeypatch.setattr("ardtrain.data_sources.commit_of", lambda source: "0" * 40)
    data = {"train_file": "hub:org/rows/plain", "eval_file": f"hub:org/rows@{'0' * 40}:dev"}
    assert fetch(config(model_name_or_path=str(folder), data=data), []) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"hub:org/rows/plain: to pin it: hub:org/rows/plain@{'0' * 40}:train"
    assert said[-2].startswith("rows: 4 to train on, 4 held out, ")


def test_broken_rows_are_told_before_any_job(config, tmp_path):
    path = config(model_name_or_path=str(save_tiny_llama(tmp_path / "model")))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:1"):
        fetch(path, [])


def test_without_network_it_says_what_to_check(config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="org/base: not fetched .*HF_HUB_OFFLINE is set; check the name"):
        fetch(config(), [])
