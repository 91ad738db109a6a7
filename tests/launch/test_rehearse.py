"""A rehearsal by DeepSpeed's launcher, on two processes with the base in ZeRO-3 and offloaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import lines, write_run
from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parent.parent.parent


def test_rehearsal_by_deepspeeds_launcher(tmp_path):
    config = write_run(tmp_path, deepspeed="zero3_offload", gradient_checkpointing=True)
    save_tiny_llama(tmp_path / "model", layers=4)
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "29873"]
    command = [*launcher, str(ROOT / "ardtrain" / "main.py"), "train", str(config), "--rehearse"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    clean |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"}
    clean |= {"ARDTRAIN_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-6000:]
    assert text.count("rehearsal passed in ") == 1 and "processes: 2 on cpu, base ZeRO-3" in text
    for part in ("step 1", "step 2", "resize (elalora: pruned 4, grew 4)", "save", "resume: ", "step 3", "held-out"):
        assert f"rehearsal: {part}" in text
    folder = tmp_path / "run" / "rehearsal"
    assert (folder / "status").read_text() == "finished 3\n"
    assert len(lines(folder / "ranks.jsonl")) == 2 and (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["rehearsal"]
