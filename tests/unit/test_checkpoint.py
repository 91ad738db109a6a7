import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ardtrain import checkpoint
from ardtrain.arena import ArenaLayout
from ardtrain.checkpoint import CheckpointError, Identity, from_tensors, to_tensors
from ardtrain.engines import FullState
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable
from ardtrain.resize import Snapshot
from tests.tiny import ELALORA, equal_bits, random_plan, sites_of

SITES = tuple(sites_of((9, 7), (16, 16), (5, 33), (6, 6)))
METHOD = ElaLora(ELALORA)
KINDS = {"mean": "per_entry", "spread": "per_entry", "gate": "per_component", "alpha": "per_site"}
IDENTITY = Identity("b" * 64, "d" * 64, {"torch": "2"})
LOOP = {"step": 30, "exponent": 41, "best_loss": 0.1 + 0.2}


def random_snapshot(ranks=(4, 0, 3, 6), *, seed=0, parts=METHOD.entries):
    table = RankTable.start(SITES, ranks)
    table = random_plan(table, np.random.default_rng(seed)).apply(table) if seed else table
    layout = ArenaLayout(table, parts)
    generator = torch.Generator().manual_seed(seed)

    def flat():
        out = torch.zeros(layout.size)
        for block in layout.blocks:
            block.of(out).normal_(generator=generator)
        return out

    snapshot = Snapshot(
        table,
        FullState(flat(), flat(), flat().abs(), 30),
        torch.randint(0, 30, (table.total,), generator=generator),
        {"mean": flat(), "spread": flat()},
        {"gate": torch.rand(table.total, dtype=torch.float64, generator=generator)},
        {"alpha": torch.rand(len(SITES), dtype=torch.float64, generator=generator)},
    )
    return snapshot, layout


def assert_same(a, b):
    assert a.table == b.table
    assert a.full.steps == b.full.steps
    for name in checkpoint.FULL:
        assert equal_bits(getattr(a.full, name), getattr(b.full, name)), name
    assert equal_bits(a.age, b.age)
    for what in ("entries", "components", "sites"):
        mine, theirs = getattr(a, what), getattr(b, what)
        assert mine.keys() == theirs.keys()
        assert all(equal_bits(mine[n], theirs[n]) for n in mine), what


def write_adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def save(run_dir, snapshot, layout, *, step=30, identity=IDENTITY):
    return checkpoint.save(
        run_dir, snapshot, layout, step=step, loop=LOOP, identity=identity, write_adapter=write_adapter
    )


def load(path, *, sites=SITES, identity=IDENTITY, parts=METHOD.entries, kinds=KINDS):
    return checkpoint.load(path, sites=sites, parts=parts, kinds=kinds, identity=identity)


@pytest.fixture
def saved(tmp_path):
    snapshot, layout = random_snapshot()
    return save(tmp_path, snapshot, layout), snapshot, layout


# ---- tensors ----


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parts", [METHOD.entries, Lora().entries], ids=["diagonal", "plain"])
def test_tensors_round_trip_to_the_bit(seed, parts):
    snapshot, layout = random_snapshot(seed=seed, parts=parts)
    tensors = to_tensors(snapshot, layout)
    assert_same(from_tensors(tensors, snapshot.table, layout, kinds=KINDS, steps=30), snapshot)


def test_tensors_are_named_by_module_and_hold_no_flat_vector():
    snapshot, layout = random_snapshot()
    tensors = to_tensors(snapshot, layout)
    assert tensors["s0.lora_A.master"].shape == (4, 9)
    assert tensors["s2.lora_B.exp_avg_sq"].shape == (3, 33)
    assert tensors["s3.diagonal.spread"].shape == (6, 1)
    assert tensors["s3.birth"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not any(name.startswith("s1.") for name in tensors)  # rank 0
    assert layout.size not in {t.numel() for t in tensors.values()}
    tensors["s0.lora_A.master"].zero_()  # copies: a background writer may keep them
    assert layout.site_rows(snapshot.full.master, 0)["lora_A"].any()


def test_missing_and_misshapen_tensors_are_named():
    snapshot, layout = random_snapshot()
    tensors = to_tensors(snapshot, layout)

    def read(changed):
        return from_tensors(changed, snapshot.table, layout, kinds=KINDS, steps=0)

    key = "s2.lora_B.exp_avg"
    with pytest.raises(CheckpointError, match=f"tensor {key} is missing from the checkpoint; take an earlier one"):
        read({n: t for n, t in tensors.items() if n != key})
    with pytest.raises(CheckpointError, match=rf"tensor {key} has shape \(2, 33\), its rank table says \(3, 33\)"):
        read({**tensors, key: tensors[key][:2]})
    with pytest.raises(CheckpointError, match="s0.birth disagrees with the rank table; the checkpoint is damaged"):
        read({**tensors, "s0.birth": torch.tensor([0, 1, 2, 7])})


@pytest.mark.parametrize("name", ["gate", "alpha"])
def test_a_missing_array_of_the_method_is_named(name):
    snapshot, layout = random_snapshot()
    tensors = to_tensors(snapshot, layout)
    del tensors[f"method.{name}"]
    with pytest.raises(CheckpointError, match=f"tensor method.{name} is missing from the checkpoint"):
        from_tensors(tensors, snapshot.table, layout, kinds=KINDS, steps=0)


# ---- folders ----


def test_save_and_load_round_trip_to_the_bit(saved):
    path, snapshot, layout = saved
    assert path.name == "checkpoint-30"
    assert (path.parent / "latest").read_text() == "checkpoint-30\n"
    loaded = load(path)
    assert_same(loaded.snapshot, snapshot)
    assert loaded.layout.blocks == layout.blocks
    assert loaded.loop == LOOP  # all digits
    assert loaded.manifest["table_digest"] == snapshot.table.digest
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        "adapter/adapter_config.json",
        "manifest.json",
        "state/arena.safetensors",
        "state/trainer.json",
    ]


def test_load_after_random_plans(tmp_path):
    for seed in range(1, 4):
        snapshot, layout = random_snapshot(seed=seed)
        assert_same(load(save(tmp_path, snapshot, layout, step=seed)).snapshot, snapshot)


@pytest.mark.parametrize("name", ["state/arena.safetensors", "state/trainer.json", "adapter/adapter_config.json"])
def test_a_damaged_byte_is_found_and_its_file_named(saved, name):
    path, _, _ = saved
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint-30/{name} is missing or damaged .*take another"):
        load(path)


@pytest.mark.parametrize("name", ["state/arena.safetensors", "state/trainer.json"])
def test_a_short_or_missing_file_is_named(saved, name):
    path, _, _ = saved
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        load(path)


def reseal(path):
    """Writes the manifest anew over files that a test changed."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (path / name).stat().st_size, "sha256": checkpoint.sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_missing_tensor_is_named(saved):
    path, _, _ = saved
    file = path / "state" / "arena.safetensors"
    tensors = load_file(file)
    del tensors["s3.diagonal.master"]
    save_file(tensors, file)
    reseal(path)
    with pytest.raises(CheckpointError, match="tensor s3.diagonal.master is missing"):
        load(path)


@pytest.mark.parametrize("what", ["backbone", "data"])
def test_another_runs_base_or_data_is_refused(saved, what):
    path, _, _ = saved
    text = f"checkpoint-30 was written with another {what} .*start in a new output_dir"
    with pytest.raises(CheckpointError, match=text):
        load(path, identity=replace(IDENTITY, **{what: "e" * 64}))
    load(path, identity=replace(IDENTITY, versions={"torch": "3"}))  # recorded, not refused


def test_other_sites_are_refused(saved):
    path, _, _ = saved
    with pytest.raises(CheckpointError, match="checkpoint-30: the checkpoint's sites differ from this run's"):
        load(path, sites=SITES[:3])


def test_a_newer_format_is_refused(saved):
    path, _, _ = saved
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(CheckpointError, match="checkpoint-30: format_version 2 is newer than .* upgrade"):
        load(path)


def test_nothing_of_a_checkpoint_is_a_pickle(saved):
    path, _, _ = saved
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    with safe_open(path / "state" / "arena.safetensors", framework="pt") as stored:
        assert "s0.lora_A.master" in stored.keys()  # noqa: SIM118


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, bad):
    snapshot, layout = random_snapshot()
    save(tmp_path, snapshot, layout, step=10)
    layout.site_rows(snapshot.full.exp_avg, 2)["lora_B"][1, 3] = bad
    with pytest.raises(RuntimeError, match="step 20: s2.lora_B.exp_avg holds a number that is not finite"):
        save(tmp_path, snapshot, layout, step=20)
    assert checkpoint.pointed(tmp_path, "latest") == "checkpoint-10"
    assert not (tmp_path / "checkpoint-20").exists()


def test_a_half_written_folder_is_no_checkpoint(tmp_path):
    snapshot, layout = random_snapshot()
    save(tmp_path, snapshot, layout, step=10)

    def fails(folder):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path, snapshot, layout, step=20, loop=LOOP, identity=IDENTITY, write_adapter=fails)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    assert checkpoint.find(tmp_path, "auto").name == "checkpoint-10"
    assert checkpoint.prune(tmp_path, 1) == []
    save(tmp_path, snapshot, layout, step=20)  # its rest is in nobody's way
    assert checkpoint.find(tmp_path, "auto").name == "checkpoint-20"
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_saving_a_step_again_replaces_it(tmp_path):
    snapshot, layout = random_snapshot()
    save(tmp_path, snapshot, layout)
    other, other_layout = random_snapshot(seed=3)
    path = save(tmp_path, other, other_layout)
    assert_same(load(path).snapshot, other)


# ---- finding and pruning ----


def test_find_knows_auto_paths_and_nothing(tmp_path):
    assert checkpoint.find(tmp_path, None) is None
    assert checkpoint.find(tmp_path, "auto") is None  # a first start
    snapshot, layout = random_snapshot()
    first, second = save(tmp_path, snapshot, layout, step=1), save(tmp_path, snapshot, layout, step=2)
    assert checkpoint.find(tmp_path, "auto") == second
    assert checkpoint.find(tmp_path, str(first)) == first
    with pytest.raises(CheckpointError, match="elsewhere holds no manifest.json; name a complete one"):
        checkpoint.find(tmp_path, str(tmp_path / "elsewhere"))


def test_prune_keeps_the_newest_and_never_latest_or_best(tmp_path):
    snapshot, layout = random_snapshot()
    for step in (5, 10, 100, 20):  # numbers, not text: 100 is the newest
        save(tmp_path, snapshot, layout, step=step)
    (tmp_path / "best").write_text("checkpoint-5\n")
    (tmp_path / "latest").write_text("checkpoint-10\n")
    assert checkpoint.prune(tmp_path, None) == []
    assert checkpoint.prune(tmp_path, 4) == []
    assert [p.name for p in checkpoint.prune(tmp_path, 1)] == ["checkpoint-20"]
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10", "checkpoint-100"}
    (tmp_path / "best").write_text("checkpoint-100\n")
    (tmp_path / "latest").write_text("checkpoint-100\n")
    assert [p.name for p in checkpoint.prune(tmp_path, 1)] == ["checkpoint-5", "checkpoint-10"]


def test_prune_leaves_folders_that_are_not_its_own_alone(tmp_path):
    snapshot, layout = random_snapshot()
    for step in (1, 2):
        save(tmp_path, snapshot, layout, step=step)
    (tmp_path / "checkpoint-1-kept").mkdir()  # a user's copy
    assert [p.name for p in checkpoint.prune(tmp_path, 1)] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1-kept").is_dir()


def test_a_new_run_is_refused_in_a_folder_that_holds_another(tmp_path):
    from ardtrain.config import ConfigError, parse_config
    from ardtrain.run import refuse_used_folder

    raw = {"model_name_or_path": "m", "method": "lora", "output_dir": str(tmp_path), "data": {"train_file": "a.jsonl"}}
    refuse_used_folder(parse_config(raw))
    (tmp_path / "latest").write_text("checkpoint-30\n")
    with pytest.raises(ConfigError, match=r"holds an earlier run \(checkpoint-30\); go on with it by resume_from"):
        refuse_used_folder(parse_config(raw))
    refuse_used_folder(parse_config(raw | {"resume_from_checkpoint": "auto"}))
