"""`ardtrain fetch`: what it asks the hub for, and how it says what is missing."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import huggingface_hub
import pytest
import torch
import yaml
from datasets import Dataset

from ardtrain import fetching, run_data
from ardtrain.config import ConfigError, load_config
from ardtrain.fetching import fetch
from tests.conftest import REPOSITORY
from tests.tiny import save_tiny_llama, tiny_llama


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
    monkeypatch.setattr(fetching, "_weights", lambda name, revision: f"looked at {revision}")
    assert fetch(config(revision="v2", tokenizer_name_or_path="org/words"), []) == 0
    assert asked == [("org/base", "v2"), ("org/words", None)]
    said = capsys.readouterr().out
    assert "org/base: looked at v2" in said and "snapshots/abc123; to pin it: revision: abc123" in said
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
    assert "a local folder, nothing to fetch" in said and "weights complete: 21 tensors" in said
    assert f"rows: 3 to train on, tokenised in {tmp_path / 'cache' / 'rows'}" in said
    monkeypatch.setattr("ardtrain.data_cache.Tokenising", None)
    settings = load_config(path, ["global_batch_size=1"])
    train, _ = run_data.open_data(settings, run_data.tokenizer_of(settings))
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


COMMIT = "c" * 40


@contextlib.contextmanager
def hub(folder):
    """A hub on this machine with one model, `org/base`; yields its address, what was asked, and files it refuses."""
    asked, refused = [], set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, code, content=b"", **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.partition("?")[0]
            files = sorted(p.name for p in folder.iterdir())
            if path == "/api/models/org/base/revision/main":
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, json.dumps({"id": "org/base", "sha": COMMIT, "siblings": siblings}).encode())
            if path.startswith("/api/models/org/base/tree/"):
                tree = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": n} for n in files]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            name = path.removeprefix(f"/org/base/resolve/{COMMIT}/")
            if name not in files:
                return self.answer(404)
            if self.command == "GET":
                asked.append(name)
                if name in refused:
                    return self.answer(403)
            content = (folder / name).read_bytes()
            return self.answer(200, content, ETag=hashlib.sha256(content).hexdigest(), X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, refused
    finally:
        server.shutdown()


def test_a_fetch_that_was_cut_goes_on_file_by_file_and_says_what_to_pin(config, tmp_path):
    model = save_tiny_llama(tmp_path / "published")
    (model / "model.safetensors").unlink()
    tiny_llama(dtype=torch.bfloat16).save_pretrained(model, max_shard_size="40KB")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    run = config()
    with hub(model) as (address, asked, refused):
        own = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

        def fetched():
            command = [sys.executable, "-m", "ardtrain", "fetch", run]
            return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, cwd=REPOSITORY)

        refused.add(shards[-1])
        first = fetched()
        assert first.returncode == 2 and "then say it again: it goes on where it stopped" in first.stderr
        have = set(asked) - refused
        assert set(shards[:-1]) & have
        refused.clear()
        asked.clear()
        second = fetched()
        assert second.returncode == 0, second.stderr
        assert shards[-1] in asked and not have & set(asked) and "pytorch_model.bin" not in asked
        assert f"to pin it: revision: {COMMIT}" in second.stdout
        assert "org/base: weights complete: 21 tensors" in second.stdout
        run = config(revision=COMMIT)
        assert "to pin it" not in fetched().stdout


def test_incomplete_weights_are_told(config, tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="model.safetensors was cut short"):
        fetch(config(model_name_or_path=str(folder)), [])
