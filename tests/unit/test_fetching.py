"""`ardtrain fetch`: what it asks the hub for, and how it says what is missing."""

import huggingface_hub
import pytest
import yaml

from ardtrain.config import ConfigError
from ardtrain.fetching import fetch


@pytest.fixture
def config(tmp_path):
    def write(**settings):
        base = {
            "model_name_or_path": "org/base",
            "method": "lora",
            "output_dir": "runs",
            "data": {"train_file": "a.jsonl"},
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
    assert fetch(config(revision="v2", tokenizer_name_or_path="org/words"), []) == 0
    assert asked == [("org/base", "v2"), ("org/words", None)]
    said = capsys.readouterr().out
    assert "org/words: /cache/org/words/snapshots/abc123; to pin it: revision: abc123" in said
    assert fetch(config(tokenizer_name_or_path="org/base"), []) == 0
    assert len(asked) == 3


def test_a_folder_needs_nothing(config, tmp_path, capsys):
    assert fetch(config(model_name_or_path=str(tmp_path)), []) == 0
    assert "a local folder, nothing to fetch" in capsys.readouterr().out


def test_without_network_it_says_what_to_check(config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="org/base: not fetched .*HF_HUB_OFFLINE is set; check the name"):
        fetch(config(), [])
