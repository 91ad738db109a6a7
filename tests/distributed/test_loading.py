"""The base read by 2 and 3 processes: equal to the whole model to the bit, and no number is read twice."""

import contextlib
import hashlib
import json

import pytest
import torch
import transformers as hf

from ardtrain.backbones import ModelSource, load_model
from tests.distributed.loading import DTYPES, digest
from tests.distributed.processes import run_processes
from tests.runs import write_run

pytestmark = pytest.mark.distributed

SHAPE = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {  # odd sizes: the last partition is padded, and some processes keep nothing of a small tensor
    "llama": hf.LlamaConfig(vocab_size=97, **SHAPE, tie_word_embeddings=False),
    "tied": hf.LlamaConfig(vocab_size=97, **SHAPE, tie_word_embeddings=True),
    "mixtral": hf.MixtralConfig(vocab_size=97, **SHAPE, num_local_experts=3),
    "large": hf.LlamaConfig(vocab_size=90_001, **SHAPE),
}


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_reads_its_slices_alone(count, tmp_path, has_async_io):
    nvme = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 8, "buffer_size": 4_000_000}
    cases = {
        "llama": {"compute": "fp32"},
        "tied": {"compute": "bf16", "offload": {"device": "cpu"}},
        "mixtral": {"compute": "bf16"},
        "large": {"compute": "fp32", "offload": nvme if has_async_io else {"device": "cpu"}},
    }
    expected = {}
    for name, case in cases.items():
        case["folder"] = str(tmp_path / name)
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=DTYPES[case["compute"]])
        model.save_pretrained(case["folder"], max_shard_size="30KB")
        whole = load_model(ModelSource(case["folder"]), compute_dtype=case["compute"])
        expected[name] = digest(whole, lambda *parameters: contextlib.nullcontext())
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    arguments = ["-m", "tests.distributed.loading", str(tmp_path / "cases.json"), str(tmp_path)]
    ended = run_processes(count, arguments, folder=tmp_path, timeout=300)
    assert ended.codes == [0] * count, ended.text()
    results = [json.loads((tmp_path / f"{count}-{i}.json").read_text()) for i in range(count)]
    for name in cases:
        found = [result[name] for result in results]
        assert [f["digest"] for f in found] == [expected[name]] * count, name
        stored, spread = found[0]["stored"], found[0]["parameters"] * count * 4  # a slice is rounded up
        assert sum(f["read"] for f in found) == stored, name
        assert max(f["read"] for f in found) <= stored / count + spread, name
    assert not has_async_io or all(result["large"]["swapped"] for result in results)


def test_a_run_verifies_its_weights_on_demand(tmp_path):
    """A run stops before its first step, with the file's name; with the right checksum it ends well."""
    config = write_run(tmp_path, eval_steps=None, deepspeed="zero3", verify_weights=True)
    model = tmp_path / "model" / "model.safetensors"
    right = hashlib.sha256(model.read_bytes()).hexdigest()
    arguments, environment = ["-m", "ardtrain", "train", str(config)], {"ARDTRAIN_CACHE": str(tmp_path / "cache")}
    for noted, code in (("0" * 64, 2), (right, 0)):
        (model.parent / "SHA256SUMS").write_text(f"{noted}  {model.name}\n")
        ended = run_processes(1, arguments, folder=tmp_path, timeout=300, environment=environment)
        assert ended.codes == [code], ended.text()
        told = f"{model} has the checksum {right[:16]}..., it should have 0000000000000000..."
        assert (told in ended.outputs[0]) == (code == 2), ended.text()
    assert "base: read 0.00 of 0.00 GiB in" in (tmp_path / "run" / "logs" / "process-0000.log").read_text()
