"""`ardtrain merge`: files of the base's layout that give the unmerged model's logits, for every form and dtype."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ardtrain import export, merged_files
from ardtrain.cli import main
from ardtrain.config import ConfigError
from ardtrain.loading.sources import Conversion, Converted, Latest
from ardtrain.merging import load_merged, merge
from ardtrain.trained import bound_model, load_base, logits_of, open_trained, probe_inputs
from tests.quantized_files import save_by_bitsandbytes
from tests.tiny import equal_bits, save_tiny_llama
from tests.trained_runs import FORMS, PLAIN, classification_config, make_run, towers

REPOSITORY = Path(__file__).resolve().parents[2]


def headers(folder):
    """Of each weight file: the header as it stands."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        out[path.name] = raw[: 8 + int.from_bytes(raw[:8], "little")]
    return out


def sharded(folder, **shape):
    """A tiny Llama in several files with an index, as save_pretrained cuts it."""
    save_tiny_llama(folder, **shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB" if model.dtype == torch.float32 else "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def difference(trained, folder):
    """Largest logit difference of the merged folder to the unmerged model, and the largest logit; both in float32."""
    model = bound_model(trained)
    inputs = probe_inputs(trained, model)
    logits = logits_of(model, inputs).float()
    base = logits_of(load_base(trained), inputs).float()
    assert float((base - logits).abs().max()) > 0.1  # the adapter is not nothing
    merged = logits_of(load_merged(trained, folder), inputs).float()
    return float((merged - logits).abs().max()), float(logits.abs().max())


@pytest.mark.parametrize("kind", FORMS)
def test_every_form(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(merged_files, "BLOCK_NUMBERS", 100)  # several blocks a matrix
    monkeypatch.setattr(merged_files, "COPY_BYTES", 200)
    sharded(tmp_path / "model", tied=kind == "token rows")
    trained = open_trained(make_run(tmp_path, **rows(tmp_path), **FORMS[kind]))
    merge(trained, tmp_path / "out")
    found, largest = difference(trained, tmp_path / "out")
    assert found <= 1e-5 * largest
    base, out = tmp_path / "model", tmp_path / "out"
    assert headers(base) == headers(out)
    index = "model.safetensors.index.json"
    assert (base / index).read_bytes() == (out / index).read_bytes()
    changed = {f"{m}.weight" for m in export.module_ranks(trained.layout)}
    changed |= {"model.embed_tokens.weight"} if kind == "token rows" else set()
    for path in base.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        assert {n for n in before if not equal_bits(before[n], after[n])} == changed & before.keys()
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((out / name).read_bytes()).hexdigest()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (base / name).read_bytes() == (out / name).read_bytes()
    assert "library_name: transformers" in (out / "README.md").read_text()


def rows(folder):
    """The data files that write_run makes beside a model of its own, for a model that is there already."""
    (folder / "train.jsonl").write_text('{"prompt": "1 + 1 = ", "completion": "2."}\n' * 24)
    return {"data": {"train_file": str(folder / "train.jsonl")}, "eval_steps": None}


@pytest.mark.parametrize("kind", ["uneven", "dora"])
def test_dtype_is_kept_and_logits_are_its_rounding_away(tmp_path, kind):
    """A base in bf16, run in bf16: each merged number is the float32 one rounded once."""
    sharded(tmp_path / "model", dtype=torch.bfloat16)
    trained = open_trained(make_run(tmp_path, **rows(tmp_path), **FORMS[kind], bf16=True))
    assert trained.compute_dtype == "bf16"
    lines = merge(trained, tmp_path / "out", check=True)
    assert any(line.startswith("largest logit difference to the unmerged model") for line in lines)
    found, largest = difference(trained, tmp_path / "out")
    assert found <= 3e-2 * largest
    tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    if kind == "uneven":
        a, b = export.Pairs(trained.master, trained.layout).pair("model.layers.0.mlp.up_proj")
        model = load_base(trained)
        exact = model.get_submodule("model.layers.0.mlp.up_proj").weight.double() + b.double().t() @ a.double()
        own = tensors["model.layers.0.mlp.up_proj.weight"].double()
        assert bool(((own - exact).abs() <= exact.abs() * 2**-8 * 1.01).all())


@pytest.mark.parametrize("vision", [{"r": 2}, {"full": True}], ids=["adapters", "in full"])
def test_towers_and_a_projector_in_full(tmp_path, vision):
    trained = open_trained(make_run(tmp_path, **towers(tmp_path, vision=vision)))
    merge(trained, tmp_path / "out")
    found, largest = difference(trained, tmp_path / "out")
    assert found <= 1e-5 * largest
    assert headers(tmp_path / "model") == headers(tmp_path / "out")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "out"))
    kept = {n for n in before if "vision" in n and equal_bits(before[n], after[n])}
    assert {n.partition(".head.")[0] for n in kept} == {"vision_tower"} if "full" in vision else len(kept) > 20
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("files", ["one", "several", "another head"])
def test_a_classifiers_head_joins_the_files(tmp_path, files):
    (sharded if files == "several" else save_tiny_llama)(tmp_path / "model")
    if files == "another head":  # of a classifier for other classes
        path = tmp_path / "model" / "model.safetensors"
        tensors = load_file(path) | {"score.weight": torch.ones(5, 32)}
        save_file(tensors, path, metadata={"format": "pt"})
    config = classification_config(tmp_path)
    trained = open_trained(make_run(tmp_path, config=config, ranks=lambda i: 1 + i % 3))
    merge(trained, tmp_path / "out")
    found, largest = difference(trained, tmp_path / "out")
    assert found <= 1e-5 * largest
    model = load_merged(trained, tmp_path / "out")
    assert model.config.id2label == {0: "bad", 1: "good"} and type(model).__name__ == "LlamaForSequenceClassification"
    names = set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names |= set(file.keys())
    assert "score.weight" in names
    if files == "several":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        before = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
        added = set(index["weight_map"]) - set(before["weight_map"])
        assert added == {"score.weight"}
        assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + 2 * 32 * 4


def test_a_quantised_run_is_merged_into_the_full_base_and_says_so(tmp_path):
    trained = open_trained(make_run(tmp_path, **PLAIN, quantization="int8"))
    lines = merge(trained, tmp_path / "out")
    assert any("warning: training saw the base in int8, and this is the base in full" in line for line in lines)
    assert "training saw the base in int8" in (tmp_path / "out" / "README.md").read_text()
    plain = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    a, b = export.Pairs(trained.master, trained.layout).pair("model.layers.0.mlp.up_proj")
    scale = export.common_scale(trained.layout)
    own = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(own, plain + scale * b.t() @ a)


def test_files_in_few_bits_are_refused(tmp_path):
    save_by_bitsandbytes(tmp_path / "model", "nf4")
    trained = open_trained(make_run(tmp_path, **rows(tmp_path), **PLAIN))
    with pytest.raises(ConfigError, match="is stored in few bits .* merge into the unquantised base"):
        merge(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.tmp").exists()


def test_what_transformers_computes_is_refused():
    conversion = Conversion(lambda: {"q.weight": torch.ones(2, 2)}, Latest())
    with pytest.raises(ConfigError, match="q.weight is computed from several stored tensors .* save the base anew"):
        merged_files._followed("q.weight", Converted("q.weight", (2, 2), torch.float32, conversion))


def test_the_command(tmp_path, capsys):
    run_dir = make_run(tmp_path, **PLAIN)
    assert main(["merge", str(run_dir), "--out", str(tmp_path / "out"), "--check"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"14 tensors changed, 0.00 GiB in .* s", told) and f"model: {tmp_path / 'out'}" in told
    assert main(["merge", str(run_dir), "--out", str(tmp_path / "out")]) == 2
    assert "exists; name another folder" in capsys.readouterr().err
    assert main(["merge", str(run_dir)]) == 2
    assert "ardtrain merge: the following arguments are required: --out" in capsys.readouterr().err
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    moved = f"model_name_or_path={tmp_path / 'moved'}"
    assert main(["merge", str(run_dir), "--out", str(tmp_path / "again"), moved]) == 0
    save_tiny_llama(tmp_path / "moved", seed=3)
    assert main(["merge", str(run_dir), "--out", str(tmp_path / "third"), moved]) == 2
    assert "was written by another run: other base weights" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_merged_number_beyond_its_dtype_is_refused(tmp_path):
    save_tiny_llama(tmp_path / "model", dtype=torch.float16)
    trained = open_trained(make_run(tmp_path, **rows(tmp_path), **PLAIN, std=1e4))
    with pytest.raises(ConfigError, match="would hold a number that is not finite in F16, as its file has it"):
        merge(trained, tmp_path / "out")
    assert not (tmp_path / ".out.tmp").exists()


def test_the_tokenizer_of_the_run_goes_along(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    trained = open_trained(make_run(tmp_path, **PLAIN, chat_template=template))
    merge(trained, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template is None


@pytest.mark.full
def test_a_base_of_the_hubs_cache_without_network(tmp_path):
    """In a process of its own: the cache's place is read when huggingface_hub is imported."""
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / ("a" * 40)
    save_tiny_llama(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    (tmp_path / "model").symlink_to(snapshot)
    run_dir = make_run(tmp_path, **rows(tmp_path), **PLAIN)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    code = "import sys; from ardtrain.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["merge", str(run_dir), "--out", str(tmp_path / "out"), "model_name_or_path=somebody/tiny"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in snapshot.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md", "SHA256SUMS"}
    assert "base_model: somebody/tiny" in (tmp_path / "out" / "README.md").read_text()
