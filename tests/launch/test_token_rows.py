"""Trained token rows: the same bits on one and two processes, ZeRO 0 and 3, cut and resumed."""

import shutil

import pytest

from tests.distributed.processes import run_processes
from tests.runs import fingerprint, write_run
from tests.tiny import save_tiny_llama

pytestmark = [pytest.mark.launch, pytest.mark.full]
SETTINGS = {"trainable_tokens": ["+", "=", " ", "1", 77], "max_steps": 10, "eval_steps": 5, "save_steps": 5}


def test_trained_token_rows_give_the_same_bits_everywhere(tmp_path, record_run):
    """On tied embeddings: the rows act at both ends. The run's own end compares its logits with PEFT's."""
    write_run(tmp_path)
    save_tiny_llama(tmp_path / "model", tied=True)

    def train(name, processes, *overrides):
        config = write_run(tmp_path, name, **SETTINGS)
        command = ["-m", "ardtrain", "train", str(config), *overrides]
        cache = {"ARDTRAIN_CACHE": str(tmp_path / "cache")}
        ended = run_processes(processes, command, folder=tmp_path, timeout=600, environment=cache)
        assert ended.codes == [0] * processes, ended.text()
        return ended.outputs[0]

    text = train("alone", 1)
    assert "PEFT's logits: " in text
    alone = fingerprint(tmp_path / "alone")
    train("two", 2, "deepspeed=zero3")
    assert fingerprint(tmp_path / "two") == alone
    shutil.copytree(tmp_path / "alone", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-10")
    train("cut", 2, "deepspeed=zero3_offload", "gradient_checkpointing=true", "resume_from_checkpoint=auto")
    assert "resumed from" in (tmp_path / "output-0.txt").read_text()
    assert fingerprint(tmp_path / "cut") == alone
    used = {"method": "elalora", "resizes": len(set(alone["tables"])) - 1}
    features = ["lora_dropout", "trainable_tokens"]
    record_run(processes=1, features=features, **used)
    record_run(processes=2, features=features, base_zero=3, **used)
    offload = {"base_zero": 3, "base_offload": "cpu", "optimizer_offload": True}
    record_run(processes=2, resumed_from=1, features=["gradient_checkpointing", *features], **offload, **used)
