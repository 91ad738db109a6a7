"""Model cards: a YAML head that the hub reads, ranks and figures, no path of this machine; and the road to the hub."""

import json
import math

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from ardtrain.cards import Described, base_name, card_text
from ardtrain.cli import main
from ardtrain.config import load_config
from ardtrain.publishing import check_hub
from tests.runs import write_run
from tests.trained_runs import make_run

RANKS = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.self_attn.q_proj": 5, "model.layers.0.mlp.up_proj": 2}


def described(folder, kind="adapter", **settings):
    config = load_config(write_run(folder, **settings))
    (folder / "run").mkdir(exist_ok=True)
    lines = [{"step": 8, "loss": 2.5}, {"step": 8, "eval_loss": 2.25, "eval_accuracy": 0.5}, {"step": 16, "loss": 1.5},
             {"step": 16, "eval_loss": 2.75}, {"step": 24, "loss": 0.25}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 32, "lo'
    (folder / "run" / "metrics.jsonl").write_text(text)
    return Described(kind, config, folder / "run", 16, RANKS, {"torch": "2.0"}, ["logits compared"], ("no", "yes"))


def test_the_head_is_what_the_hub_reads(tmp_path):
    data = {"train_file": "hub:owner/set@" + "0" * 40 + ":train", "eval_file": str(tmp_path / "dev.jsonl")}
    text = card_text(described(tmp_path, model_name_or_path="owner/base", data=data))
    head = ModelCard(text).data.to_dict()
    assert head == {
        "base_model": "owner/base",
        "datasets": ["owner/set"],
        "library_name": "peft",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "ardtrain", "elalora"],
    }
    assert ModelCard(card_text(described(tmp_path, "merged"))).data.library_name == "transformers"


def test_ranks_figures_and_no_paths(tmp_path):
    text = card_text(described(tmp_path))
    assert "| q_proj | 2 | 3 | 4.00 | 5 | 8 |" in text and "Total rank 10, largest 5" in text
    assert "| last logged step | 16 | 1.5 |" in text and "0.25" not in text  # step 24 came after the checkpoint
    assert "| best evaluation (by eval_loss) | 8 |  | 2.25 | 0.5 |" in text
    assert "| last evaluation | 16 |  | 2.75 |" in text
    assert "- logits compared" in text and "no, yes" in text and "torch 2.0" in text
    assert str(tmp_path) not in text and "`model`" in text and "train.jsonl" in text


def test_best_is_by_the_runs_metric_and_all_that_was_measured_is_shown(tmp_path):
    card = described(tmp_path, metric_for_best_model="rougeL", eval_steps=8, save_steps=8)
    lines = [{"step": 8, "eval_loss": 2.25, "eval_rougeL": 0.25, "eval_chat_loss": 2.125},
             {"step": 12, "eval_loss": 2.375, "eval_rougeL": 0.5, "eval_chat_loss": 2.0},
             {"step": 16, "eval_loss": 2.5, "eval_rougeL": math.nan, "eval_chat_loss": 1.75}]  # fmt: skip
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card_text(card)
    assert "| | step | eval_loss | eval_rougeL | eval_chat_loss |" in text
    assert "| best evaluation (by eval_rougeL) | 12 | 2.375 | 0.5 | 2 |" in text


def test_the_cache_of_the_hub_knows_the_name(tmp_path):
    folder = tmp_path / "models--owner--some-model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert base_name(str(folder)) == "owner/some-model"
    assert base_name("owner/base") == "owner/base" and base_name(str(tmp_path)) == tmp_path.name


class Hub:
    """What is asked of huggingface_hub.HfApi."""

    def __init__(self, calls, known=True):
        self.calls, self.known = calls, known

    def whoami(self):
        self.calls.append("whoami")
        if not self.known:
            raise OSError("401 Unauthorized\nmore")

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, *, repo_id, folder_path, repo_type, commit_message):
        self.calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir()), repo_type))


FILES = {
    "export": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
    "merge": [
        "README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ],
}  # fmt: skip


@pytest.mark.parametrize("verb", FILES)
def test_push(tmp_path, monkeypatch, capsys, verb):
    calls, files = [], FILES[verb]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    run_dir = make_run(tmp_path, method="lora", elalora=None)
    arguments = [verb, str(run_dir), "--out", str(tmp_path / "out"), "--push-to-hub", "me/it", "--private"]
    assert main(arguments) == 0
    assert calls == [
        "whoami",
        ("create", "me/it", {"private": True, "repo_type": "model", "exist_ok": True}),
        ("upload", "me/it", files, "model"),
    ]
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/it\n")


def test_who_cannot_push_hears_of_it_first(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub([], known=False))
    with pytest.raises(
        ValueError, match=r"--push-to-hub me/it: the hub does not know you \(401 Unauthorized\); log in"
    ):
        check_hub("me/it")
    with pytest.raises(ValueError, match="a repository is called OWNER/NAME"):
        check_hub("a/b/c")
