import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from ardtrain import rehearse
from ardtrain.config import ConfigError
from ardtrain.faults import StopRequest
from ardtrain.observe import Startup
from ardtrain.preflight import prepare, prepare_config
from ardtrain.ranks import RankTable
from ardtrain.rehearse import Parts, RehearsalRun, cut_layers, forced_move, rehearsal_config, write_base
from ardtrain.session import Surroundings
from tests.runs import fingerprint, lines, write_run
from tests.tiny import save_tiny_llama, sites_of
from tests.tiny_paligemma import save_tiny_paligemma, write_rows

NO_BLOCK = {"elalora": None}


def run_of(folder, **settings):
    """The config's path and what is prepared of it; a base of 4 layers without its weights."""
    path = write_run(folder, **settings)
    if not (folder / "4 layers").exists():
        save_tiny_llama(folder / "model", layers=4)
        for weights in (folder / "model").glob("*.safetensors"):
            weights.unlink()
        (folder / "4 layers").touch()
    return path, prepare(path, (), world_size=1)


def around(world, run_dir):
    run_dir.mkdir(parents=True, exist_ok=True)
    place = SimpleNamespace(source="test", local_rank=0)
    watchdog = SimpleNamespace(touch=lambda *seconds: None)
    return Surroundings(world, place, run_dir, watchdog, StopRequest(run_dir, reads_file=True), Startup())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDTRAIN_CACHE", str(tmp_path / "cache"))


PROBE = {"init_warmup": 3, "final_warmup": 3, "mask_interval": 6, "probe_steps": 3}
METHODS = {
    "elalora": ({}, "elalora: pruned 4, grew 4"),
    "lora": (NO_BLOCK, "rehearsal: one component moved"),
    "dora": (NO_BLOCK, "rehearsal: one component moved"),
    "adalora": ({**NO_BLOCK, "adalora": {"target_r": 2, "tinit": 3, "tfinal": 3}}, "adalora: removed 28 masked"),
    "alora": ({**NO_BLOCK, "alora": {"val_batch": 4, "k1": 0.5}}, "alora: pruned 7"),
    "ard_lora": (NO_BLOCK, "ard_lora: "),
    "probe_lora": ({**NO_BLOCK, "probe_lora": PROBE}, "probe_lora: pruned 4, grew 4"),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_rehearsed(tmp_path, world, capsys, method):
    settings, resize = METHODS[method]
    _, prepared = run_of(tmp_path, method=method, **settings)
    folder = tmp_path / "run" / "rehearsal"
    rehearse.rehearse(prepared, around(world, folder))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rehearsal")]
    parts = [line.removeprefix("rehearsal: ").partition("  ")[0] for line in told]
    assert parts[:3] == ["random base of two layers on disk", "start: rows, base loaded and sharded, arena", "step 1"]
    resizes = [part for part in parts if part.startswith("resize (")]
    assert any(part.startswith(f"resize ({resize}") for part in resizes)
    assert [part for part in parts[3:] if part not in resizes] == [
        "step 2", "save", "engines removed", "resume: base loaded and sharded again, checkpoint read", "step 3",
        "held-out loss", "save", "adapter", told[-1],
    ]  # fmt: skip
    assert told[-1].startswith("rehearsal passed in ") and str(folder) in told[-1]
    assert all(" s, peak " in line and line.endswith(" GiB host") for line in told[:-1])
    start, *events = lines(folder / "ranks.jsonl")
    assert {site.split(".")[2] for site in start["table"]} == {"0", "1"} and events
    assert (folder / "status").read_text() == "finished 3\n"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "base").exists()


def test_resumed_rehearsal_equals_an_unbroken_one(tmp_path, world):
    """To the bit: losses, held-out loss, ranks, weights, adapter."""
    _, prepared = run_of(tmp_path, lora_dropout=0.1)
    folder = tmp_path / "run" / "rehearsal"
    rehearse.rehearse(prepared, around(world, folder))
    write_base(prepared.config, folder / "base", compute_dtype="fp32", num_labels=None)
    config = rehearsal_config(prepared.config, world_size=1)
    whole = config.model_copy(update={"output_dir": str(tmp_path / "unbroken")})
    run = RehearsalRun(
        prepare_config(whole, world_size=1), around(world, tmp_path / "unbroken"), Parts(world), until=None
    )
    run.execute()
    assert fingerprint(tmp_path / "unbroken") == fingerprint(folder)


def test_rehearsal_leaves_the_run_folder_alone_and_clears_its_own(tmp_path, world):
    _, prepared = run_of(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoint-7").mkdir(parents=True)
    (run / "latest").write_text("checkpoint-7\n")
    (run / "STOP").touch()
    folder = run / "rehearsal"
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "STOP").touch()
    (folder / "job.sh").touch()
    rehearse.rehearse(prepared, around(world, folder))
    assert sorted(p.name for p in run.iterdir()) == ["STOP", "checkpoint-7", "latest", "rehearsal"]
    assert (run / "latest").read_text() == "checkpoint-7\n" and not list((run / "checkpoint-7").iterdir())
    assert (folder / "job.sh").exists() and not (folder / "checkpoint-9").exists()


def test_first_failure_is_told_with_its_part(tmp_path, world, capsys, monkeypatch):
    _, prepared = run_of(tmp_path)

    def fail(run):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(RehearsalRun, "_export_final", fail)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        rehearse.rehearse(prepared, around(world, tmp_path / "run" / "rehearsal"))
    out = capsys.readouterr().out
    assert "rehearsal failed in: adapter\n" in out and "passed" not in out


def test_somebody_elses_stop_is_no_pass(tmp_path, world, capsys, monkeypatch):
    _, prepared = run_of(tmp_path)
    folder = tmp_path / "run" / "rehearsal"
    monkeypatch.setattr(RehearsalRun, "_on_evaluate", lambda *_: None)
    surroundings = around(world, folder)
    monkeypatch.setattr(surroundings.stop_request, "_signalled", True)
    with pytest.raises(RuntimeError, match="stopped on request before its end"):
        rehearse.rehearse(prepared, surroundings)
    assert "passed" not in capsys.readouterr().out


def test_config_keeps_what_the_run_is_and_squeezes_the_schedule(tmp_path):
    _, prepared = run_of(tmp_path, deepspeed="zero3_offload", report_to="tensorboard", warmup_steps=3, save_steps=2)
    config = rehearsal_config(prepared.config, world_size=4)
    for name in ("method", "r", "data", "deepspeed", "global_batch_size", "per_device_train_batch_size", "max_length"):
        assert getattr(config, name) == getattr(prepared.config, name), name
    assert (config.max_steps, config.warmup_steps, config.report_to, config.max_eval_samples) == (3, 0, (), 8)
    assert config.output_dir == str(tmp_path / "run" / "rehearsal")
    assert (config.elalora.b, config.elalora.mask_interval) == (4, 1)
    full = prepared.config.model_copy(update={"method": "full"})
    with pytest.raises(ConfigError, match="method=full has none: shorten its run by max_steps"):
        rehearsal_config(full, world_size=1)


def test_cut_keeps_both_kinds_of_layers():
    five = ["sliding_attention"] * 5 + ["full_attention"]
    values = {"layer_types": five, "no_rope_layers": [1, 1, 1, 1, 1, 0], "eos_token_id": [1, 2, 3, 4, 5, 6], "x": [1]}
    assert cut_layers(values, num_layers=6) == {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "no_rope_layers": [1, 0],
    }  # fmt: skip
    assert cut_layers({"layer_types": ["a"] * 4}, num_layers=4) == {"num_hidden_layers": 2, "layer_types": ["a", "a"]}
    assert cut_layers({"layer_types": ["a"]}, num_layers=1) == {"num_hidden_layers": 1}


def test_forced_move_by_hand():
    table = RankTable.start(sites_of((4, 4), (8, 8), (2, 2)), [3, 5, 2])
    plan = forced_move(table)
    assert plan.apply(table).ranks == (4, 4, 2)  # the third is at its largest rank
    assert forced_move(RankTable.start(sites_of((4, 4)), [3])) is None
    assert forced_move(RankTable.start(sites_of((4, 4), (4, 4)), [0, 0])) is None


def test_base_is_a_function_of_the_seed_and_loads_like_any_other(tmp_path, monkeypatch):
    """Gemma-2: layers of two kinds, tied embeddings; several files."""
    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )  # fmt: skip
    run_of(tmp_path)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}  # of the real base's files
    config.save_pretrained(tmp_path / "model")
    _, prepared = run_of(tmp_path)
    monkeypatch.setattr(rehearse, "SHARD_BYTES", 8192)
    sizes = [write_base(prepared.config, tmp_path / name, compute_dtype="bf16", num_labels=None) for name in ("a", "b")]
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.layer_types == ["sliding_attention", "full_attention"] and len(model.model.layers) == 2
    assert sum(p.numel() * 2 for p in model.parameters()) == sizes[0] == sizes[1]
    assert float(model.model.embed_tokens.weight.float().std()) == pytest.approx(0.02, rel=0.1)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["num_hidden_layers"] == 2 and "quantization_config" not in written


def test_a_model_with_pictures_is_rehearsed(tmp_path, world, capsys):
    """Both towers are cut; the image processor comes along."""
    save_tiny_paligemma(tmp_path / "model", layers=4, vision_layers=3)
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    rows = str(write_rows(tmp_path))
    path = write_run(
        tmp_path, task="image_text_to_text", data={"train_file": rows, "eval_file": rows}, r=2, global_batch_size=4
    )
    rehearse.rehearse(prepare(path, (), world_size=1), around(world, tmp_path / "run" / "rehearsal"))
    assert "rehearsal passed in " in capsys.readouterr().out
    start, *events = lines(tmp_path / "run" / "rehearsal" / "ranks.jsonl")
    layers = {
        re.search(r"(vision|language).*layers\.(\d)", site)[0][-1] for site in start["table"] if "layers." in site
    }
    assert layers == {"0", "1"} and len(events) == 1
