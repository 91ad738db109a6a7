"""`ardtrain export`: from a checkpoint of each form to a PEFT folder that gives training's logits, or to nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ardtrain import export, exporting
from ardtrain.cli import main
from ardtrain.config import ConfigError
from ardtrain.exporting import export_peft
from ardtrain.trained import bound_model, load_base, logits_of, open_trained, probe_inputs
from tests.runs import write_run
from tests.tiny import save_tiny_llama
from tests.trained_runs import FORMS, PLAIN, classification_config, make_run, towers

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = FORMS | {"int8": PLAIN | {"quantization": "int8"}}


@pytest.mark.parametrize("uniform", [False, True], ids=["", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_read_back_by_peft(tmp_path, kind, uniform):
    run_dir = make_run(tmp_path, **KINDS[kind])
    trained = open_trained(run_dir)
    assert (trained.gates is not None) is (kind in ("heads", "shared heads"))
    lines = export_peft(trained, tmp_path / "out", uniform_rank=uniform)
    difference = float(re.search(r"largest logit difference to training's (\S+)", "\n".join(lines))[1])
    inputs = probe_inputs(trained, load_base(trained))
    logits = logits_of(bound_model(trained), inputs)
    assert difference <= 1e-5 * float(logits.abs().max())
    with torch.no_grad():  # and the adapter is not nothing
        assert float((load_base(trained)(**inputs).logits - logits).abs().max()) > 0.1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {len(t) for n, t in tensors.items() if n.endswith("lora_A.weight")}
    if uniform:
        assert ranks == {config["r"]} and not config["rank_pattern"] and not config["alpha_pattern"]
        modules = set(export.module_ranks(trained.layout)) if kind == "dora" else set(trained.layout.site_ranks)
        assert set(config["target_modules"]) == modules
    else:
        assert max(ranks) == config["r"] and (len(ranks) > 1) is bool(config["rank_pattern"])
    assert not list(tmp_path.glob(".out*"))


def test_export_of_the_command_line(tmp_path, capsys):
    run_dir = make_run(tmp_path, **KINDS["heads"])
    (tmp_path / "train.jsonl").unlink()  # no data are needed any more
    assert main(["export", str(run_dir / "checkpoint-16"), "--to", "peft"]) == 0
    told = capsys.readouterr().out
    assert "heads have pairs of their own: each matrix is block-diagonal with the sum of its heads' ranks" in told
    assert f"adapter: {run_dir / 'peft-16'}" in told and "largest rank 8: vLLM's default --max-lora-rank 16" in told
    assert main(["export", str(run_dir), "--uniform-rank", "--out", str(tmp_path / "even")]) == 0
    assert sorted(p.name for p in (tmp_path / "even").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    capsys.readouterr()
    assert main(["export", str(run_dir)]) == 2
    assert f"--out {run_dir / 'peft-16'} exists; name another folder" in capsys.readouterr().err


def test_a_difference_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    trained = open_trained(make_run(tmp_path, **KINDS["uneven"]))
    true = export.peft_tensors
    monkeypatch.setattr(export, "peft_tensors", lambda *a, **k: {n: 1.01 * t for n, t in true(*a, **k).items()})
    with pytest.raises(RuntimeError, match=r"PEFT's logits are .* away from training's \(limit .*has not got its name"):
        export_peft(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.tmp").is_dir()
    monkeypatch.undo()
    export_peft(trained, tmp_path / "out")  # and takes the place of what was left
    assert not (tmp_path / ".out.tmp").exists()


def test_a_base_beyond_memory_is_refused_or_said(tmp_path, monkeypatch):
    trained = open_trained(make_run(tmp_path, **PLAIN))
    monkeypatch.setattr(exporting, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match="comparing logits loads the base, which needs about .* --without-base"):
        export_peft(trained, tmp_path / "out")
    (*_, check, _) = export_peft(trained, tmp_path / "out", without_base=True)
    assert check.startswith("logits not compared; each matrix's product is within")
    assert check in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("uniform", [False, True], ids=["", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_compared_without_the_base(tmp_path, kind, uniform, monkeypatch):
    trained = open_trained(make_run(tmp_path, **KINDS[kind]))
    export_peft(trained, tmp_path / "out", uniform_rank=uniform, without_base=True)
    true = export.peft_tensors
    module = next(iter(export.module_ranks(trained.layout)))
    wrong = f"base_model.model.{module}.lora_B.weight"
    monkeypatch.setattr(
        export, "peft_tensors", lambda *a, **k: {n: t * (1 + (n == wrong)) for n, t in true(*a, **k).items()}
    )
    with pytest.raises(
        RuntimeError, match=r"a matrix's product read from the folder is 1.00e\+00 away from training's"
    ):
        export_peft(trained, tmp_path / "wrong", without_base=True)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("verb", ["export", "merge"])
def test_a_misspelt_option_is_no_setting(capsys, verb):
    assert main([verb, "runs/a", "--out", "x", "--pushto-hub", "me/it"]) == 2
    assert "--pushto-hub: is no option here; did you mean --push-to-hub?" in capsys.readouterr().err
    assert main([verb, "nowhere", "--out", "x", "--per_device_eval_batch_size", "2"]) == 2  # a setting
    assert "nowhere does not exist; give a run's folder" in capsys.readouterr().err


def test_what_is_not_there_or_of_another_base_is_refused(tmp_path):
    run_dir = make_run(tmp_path, **PLAIN)
    save_tiny_llama(tmp_path / "second", seed=5)
    with pytest.raises(ConfigError, match="was written by another run: other base weights: 'model.safetensors'"):
        open_trained(run_dir, [f"model_name_or_path={tmp_path / 'second'}"])
    (run_dir / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=re.escape("holds no config.yaml, which says what was trained")):
        open_trained(run_dir)


def test_full_has_no_adapter(tmp_path):
    path = write_run(tmp_path, method="full", elalora=None, lora_dropout=0, r=8)
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1" / "manifest.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(path.read_text())
    with pytest.raises(ConfigError, match="method=full, which has no adapter: its model is"):
        open_trained(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize("vision", [{"r": 2}, {"full": True}], ids=["adapters", "in full"])
def test_towers(tmp_path, vision):
    """PaliGemma-2: pixels reach the vision tower, towers have ranks of their own, the projector is trained in full."""
    run_dir = make_run(tmp_path, **towers(tmp_path, vision=vision))
    trained = open_trained(run_dir)
    adapted = {"language"} if "full" in vision else {"vision", "language"}
    assert set(trained.shape.table.by_tower()) == adapted and trained.shape.dense
    inputs = probe_inputs(trained, load_base(trained))
    assert inputs["pixel_values"].shape[0] == 1
    lines = export_peft(trained, tmp_path / "out")
    assert any("modules that were trained in full" in line for line in lines)
    difference = float(re.search(r"largest logit difference to training's (\S+)", "\n".join(lines))[1])
    assert difference <= 1e-5 * float(logits_of(bound_model(trained), inputs).abs().max())
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, own in load_base(trained).named_parameters():
        whole = "multi_modal_projector" in name or (
            "full" in vision and "vision_tower" in name and ".head." not in name
        )
        assert (f"base_model.model.{name}" in stored) is whole
        assert not whole or stored[f"base_model.model.{name}"].shape == own.shape
    model = bound_model(trained)
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    assert not torch.equal(logits_of(model, inputs), logits_of(model, other))


def test_a_classifiers_head(tmp_path):
    path = classification_config(tmp_path)
    trained = open_trained(make_run(tmp_path, config=path, ranks=lambda i: 1 + i % 3))
    assert trained.shape.labels == ("bad", "good")
    export_peft(trained, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["base_model.model.score.weight"].shape == (2, 32)
    assert "num_labels=2" in (tmp_path / "out" / "README.md").read_text()


def test_notes_for_servers():
    config = {"r": 8, "use_dora": False, "modules_to_save": None, "trainable_token_indices": None}
    notes = export.serving_notes
    assert notes(config) == ["largest rank 8: vLLM's default --max-lora-rank 16 is enough"]
    assert "start it with --max-lora-rank 320;" in notes(config | {"r": 257})[0]
    assert "above every --max-lora-rank that vLLM takes (512); `ardtrain merge`" in notes(config | {"r": 513})[0]
    (_, held) = notes(config | {"use_dora": True, "modules_to_save": ["score"]})
    assert held.startswith("holds DoRA's magnitudes and modules that were trained in full, which PEFT reads and vLLM")
    assert "trained token rows" in notes(config | {"trainable_token_indices": [5]})[1]


def test_peft_reads_the_scale_that_stays_outside(tmp_path):
    trained = open_trained(make_run(tmp_path, **PLAIN, ranks=lambda i: 4, lora_alpha=6))
    export_peft(trained, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, False)
    model = PeftModel.from_pretrained(load_base(trained), tmp_path / "out")
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1.5}


ARD = {"init_warmup": 2, "final_warmup": 2, "alpha_interval": 1, "resize_interval": 2}


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        {"elalora": {"init_warmup": 2, "final_warmup": 4, "mask_interval": 2, "b": 4, "k": 2}},
        {"method": "dora"},
        {"method": "adalora", "adalora": {"tinit": 2, "tfinal": 6, "deltaT": 2, "target_r": 2}},
        {"method": "ard_lora", "r": 2, "ard_lora": ARD | {"layout": "own_a", "mask": "sigmoid"}},
        {"method": "ard_lora", "ard_lora": ARD | {"layout": "shared_a"}},
    ],
    ids=["elalora", "dora", "adalora", "own_a", "shared_a"],
)
def test_a_checkpoint_of_a_real_run_exports_the_bytes_that_training_wrote(tmp_path, settings):
    """The folder of each checkpoint, and RUN/adapter, are made by the run itself, with its own method and gates."""
    settings = {"elalora": None, "max_steps": 12, "save_steps": 4, "eval_steps": None} | settings
    path = write_run(tmp_path, **settings)
    base_fits = settings.get("method") != "ard_lora"
    fits = "" if base_fits else "run.LOGITS_CHECK_BYTES = 0; "
    code = f"import ardtrain.adapter_run as run; {fits}from ardtrain.cli import main; main(['train', {str(path)!r}])"
    command = [sys.executable, "-c", code]
    environment = {"ARDTRAIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for step in (4, 8, 12):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        export_peft(open_trained(checkpoint), tmp_path / str(step))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (checkpoint / "adapter" / name).read_bytes() == (tmp_path / str(step) / name).read_bytes()
    last = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert last == (tmp_path / "12" / "adapter_model.safetensors").read_bytes()
    what = "PEFT's logits: " if base_fits else "base too large to run through PEFT; each matrix's product: "
    assert f"adapter ({what}" in done.stdout + done.stderr
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    scale = r"\(logits up to \d+\.\d\d, fp32\)" if base_fits else r", as a share training's \(fp32\)"
    assert "| last logged step | 12 |" in card and re.search(scale, card)
