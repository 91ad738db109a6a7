import errno
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ardtrain import checkpoint
from ardtrain.checkpoint import CheckpointError, OtherRunError, from_tensors, to_tensors
from ardtrain.checkpoint.format import named
from ardtrain.checkpoint.saving import deal, parts_of
from ardtrain.methods.lora import Lora
from tests.checkpoints import (
    ARENA,
    IDENTITY,
    KINDS,
    LOOP,
    METHOD,
    SITES,
    assert_same,
    load,
    load_newest,
    random_snapshot,
    reseal,
    save,
)
from tests.tiny import equal_bits


@pytest.fixture
def saved(tmp_path):
    snapshot, layout = random_snapshot()
    return save(tmp_path, snapshot, layout), snapshot, layout


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
        ARENA,
        "state/trainer.json",
    ]


def test_load_after_random_plans(tmp_path):
    for seed in range(1, 4):
        snapshot, layout = random_snapshot(seed=seed)
        assert_same(load(save(tmp_path, snapshot, layout, step=seed)).snapshot, snapshot)


@pytest.mark.parametrize("name", [ARENA, "state/trainer.json", "adapter/adapter_config.json"])
def test_a_damaged_byte_is_found_and_its_file_named(saved, name):
    path, _, _ = saved
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint-30/{name} is missing or damaged .*take another"):
        load(path)


@pytest.mark.parametrize("name", [ARENA, "state/trainer.json"])
def test_a_short_or_missing_file_is_named(saved, name):
    path, _, _ = saved
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        load(path)


def test_a_missing_tensor_is_named(saved):
    path, _, _ = saved
    file = path / ARENA
    tensors = load_file(file)
    del tensors["s3.diagonal.master"]
    save_file(tensors, file)
    reseal(path)
    with pytest.raises(CheckpointError, match="tensor s3.diagonal.master is missing"):
        load(path)


@pytest.mark.parametrize("what", ["backbone", "data"])
def test_another_runs_base_or_data_is_refused(saved, what):
    path, _, _ = saved
    text = f"checkpoint-30 was written by another run: another {what} .fingerprint [bd]{{12}}, now e{{12}}"
    with pytest.raises(OtherRunError, match=text):
        load(path, identity=replace(IDENTITY, **{what: "e" * 64}))
    loaded = load(path, identity=replace(IDENTITY, versions={"torch": "3"}))
    assert loaded.changes == ["torch: the checkpoint has '2', this run '3'"]  # told, not refused


def test_every_setting_that_differs_is_named_with_both_values(saved):
    path, _, _ = saved
    settings = {**IDENTITY.settings, "r": 8, "elalora": {"b": 4, "k": 3}, "target_modules": ["q_proj"]}
    with pytest.raises(OtherRunError) as caught:
        load(path, identity=replace(IDENTITY, settings=settings, method="adalora"))
    assert str(caught.value) == (
        f"{path} was written by another run: method: the checkpoint has 'elalora', this run 'adalora'; "
        "r: the checkpoint has 4, this run 8; target_modules: the checkpoint has ['q_proj', 'v_proj'], this run "
        "['q_proj']; elalora.k: the checkpoint has 2, this run 3; give the same again, or take a new output_dir"
    )


def test_a_changed_learning_rate_is_allowed_and_told(saved):
    path, snapshot, _ = saved
    assert load(path).changes == []
    changeable = {"learning_rate": 5e-4, "max_steps": 100, "save_steps": 7}
    loaded = load(path, identity=replace(IDENTITY, changeable=changeable))
    assert loaded.changes == [
        "learning_rate: the checkpoint has 0.001, this run 0.0005",
        "save_steps: the checkpoint does not say, this run has 7",
    ]
    assert_same(loaded.snapshot, snapshot)


def test_settings_of_another_version_of_the_program_are_told(saved):
    path, _, _ = saved
    settings = {name: value for name, value in IDENTITY.settings.items() if name != "r"} | {"new": True}
    assert load(path, identity=replace(IDENTITY, settings=settings)).changes == [
        "new: the checkpoint does not say, this run has True",
        "r: the checkpoint has 4, this run has none",
    ]


def test_settings_are_compared_as_they_are_read_back(saved):
    path, _, _ = saved
    settings = {**IDENTITY.settings, "target_modules": ("q_proj", "v_proj"), "lora_alpha": 8}
    assert load(path, identity=replace(IDENTITY, settings=settings)).changes == []


def test_base_weights_that_changed_on_disk_are_refused_by_file(saved):
    path, _, _ = saved
    text = "other base weights: 'model.safetensors' .fingerprint e{12}, now f{12}"
    with pytest.raises(OtherRunError, match=text):
        load(path, identity=replace(IDENTITY, weights={"model.safetensors": "f" * 64}))
    with pytest.raises(OtherRunError, match=r"'a' .fingerprint none, now f{12}.* and 1 more files"):
        load(path, identity=replace(IDENTITY, weights={"a": "f" * 64}))
    assert load(path, identity=replace(IDENTITY, weights={})).changes == []  # not looked at


def test_a_manifest_of_format_1_is_accepted_without_what_it_lacks(saved):
    path, snapshot, _ = saved
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("weights", "method", "settings", "changeable", "world_size", "digest"):
        del manifest[name]
    manifest["table_digest"] = snapshot.table.first_digest
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    assert_same(load(path).snapshot, snapshot)
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(CheckpointError, match=r"manifest.json lacks digest, weights, method, settings, changeable"):
        load(path)


def test_other_sites_are_refused(saved):
    path, _, _ = saved
    with pytest.raises(CheckpointError, match="checkpoint-30: the checkpoint's sites differ from this run's"):
        load(path, sites=SITES[:3])


def test_a_newer_format_is_refused(saved):
    path, _, _ = saved
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 4}))
    with pytest.raises(CheckpointError, match="checkpoint-30: format_version 4 is newer than this one, 3; upgrade"):
        load(path)


def test_nothing_of_a_checkpoint_is_a_pickle(saved, monkeypatch):
    path, snapshot, _ = saved
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert_same(load(path).snapshot, snapshot)


def test_the_library_reads_every_tensor(saved):
    path, snapshot, layout = saved
    with safe_open(path / ARENA, framework="pt") as stored:
        names = list(stored.keys())
    tensors = load_file(path / ARENA)
    wanted = named(snapshot, layout)
    assert set(names) == tensors.keys() == wanted.keys()
    assert all(equal_bits(tensors[name], wanted[name]) for name in wanted)


def test_what_the_library_wrote_is_read(saved):
    path, snapshot, layout = saved
    save_file(to_tensors(snapshot, layout), path / ARENA, metadata={"format": "pt"})  # another order of the tensors
    reseal(path)
    assert_same(load(path).snapshot, snapshot)


# ---- parts ----


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_tensors_are_dealt_in_order_by_bytes(count):
    generator = np.random.default_rng(count)
    for _ in range(20):
        sizes = generator.integers(0, 1000, size=40).tolist()
        shares = deal(sizes, count)
        assert [i for share in shares for i in share] == list(range(40))  # each once, neighbours together
        even = sum(sizes) / count
        assert all(sum(sizes[i] for i in share) <= even + max(sizes) for share in shares)
    assert deal([0, 0], 3) == [[0, 1], [], []]
    assert deal([], 2) == [[], []]
    assert deal([10, 10, 10, 10], 2) == [[0, 1], [2, 3]]
    assert deal([10, 10], 4) == [[], [0], [], [1]]


def test_a_process_without_a_tensor_has_no_file():
    parts = parts_of({"a": torch.zeros(3), "b": torch.zeros(3)}, 4)
    assert [part.file for part in parts] == [
        None,
        "state/arena-00001-of-00002.safetensors",
        None,
        "state/arena-00002-of-00002.safetensors",
    ]


def test_the_number_of_bytes_is_foretold(saved):
    path, snapshot, layout = saved
    foretold = checkpoint.state_bytes(layout, KINDS)
    adapter = 4 * layout.num_trained  # these tests write none
    header = int.from_bytes((path / ARENA).read_bytes()[:8], "little") + 8
    per_site = 8 * len(SITES)
    assert foretold == (path / ARENA).stat().st_size - header - per_site + adapter


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
    assert checkpoint.candidates(tmp_path, "auto")[0].name == "checkpoint-10"
    assert checkpoint.prune(tmp_path, 1) == []
    save(tmp_path, snapshot, layout, step=20)  # its rest is in nobody's way
    assert checkpoint.candidates(tmp_path, "auto")[0].name == "checkpoint-20"
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_saving_a_step_again_replaces_it(tmp_path):
    snapshot, layout = random_snapshot()
    save(tmp_path, snapshot, layout)
    other, other_layout = random_snapshot(seed=3)
    path = save(tmp_path, other, other_layout)
    assert_same(load(path).snapshot, other)


# ---- finding and pruning ----


def test_candidates_are_auto_s_or_the_one_that_is_named(tmp_path):
    assert checkpoint.candidates(tmp_path, None) == []
    assert checkpoint.candidates(tmp_path, "auto") == []  # a first start
    snapshot, layout = random_snapshot()
    first, second = save(tmp_path, snapshot, layout, step=1), save(tmp_path, snapshot, layout, step=2)
    assert checkpoint.candidates(tmp_path, "auto") == [second, first]
    assert checkpoint.candidates(tmp_path, str(first)) == [first]
    with pytest.raises(CheckpointError, match="elsewhere holds no manifest.json; name a complete checkpoint"):
        checkpoint.candidates(tmp_path, str(tmp_path / "elsewhere"))


def test_auto_tries_latest_then_the_older_ones_and_last_those_beyond_it(tmp_path):
    def order():
        return [path.name.removeprefix("checkpoint-") for path in checkpoint.candidates(tmp_path, "auto")]

    assert order() == []
    for name in ("checkpoint-5", "checkpoint-20", "checkpoint-100", "checkpoint-30", "checkpoint-30-kept", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("no folder")
    assert order() == ["100", "30", "20", "5"]
    (tmp_path / "latest").write_text("checkpoint-30\n")
    assert order() == ["30", "20", "5", "100"]
    (tmp_path / "latest").write_text("checkpoint-40\n")
    assert order() == ["100", "30", "20", "5"]
    assert checkpoint.candidates(tmp_path, None) == []


@pytest.mark.parametrize(
    "content", [b"", b"../elsewhere", b"/etc", b"checkpoint-1/../..", b"checkpoint-", b"\xff\xfe", b"checkpoint-1\nx"]
)
def test_a_pointer_that_names_no_checkpoint_is_none(tmp_path, content):
    (tmp_path / "latest").write_bytes(content)
    assert checkpoint.pointed(tmp_path, "latest") is None
    (tmp_path / "best").mkdir()
    assert checkpoint.pointed(tmp_path, "best") is None
    (tmp_path / "latest").write_bytes(b"checkpoint-12\n")
    assert checkpoint.pointed(tmp_path, "latest") == "checkpoint-12"


def test_auto_takes_the_newest_intact_one_and_says_what_it_passed_over(tmp_path):
    snapshots = {step: random_snapshot(seed=step) for step in (1, 2, 3)}
    for step, (snapshot, layout) in snapshots.items():
        save(tmp_path, snapshot, layout, step=step)
    loaded, skipped = load_newest(tmp_path)
    assert (loaded.path.name, skipped) == ("checkpoint-3", [])
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    with (tmp_path / "checkpoint-2" / ARENA).open("r+b") as file:
        file.truncate(100)
    loaded, skipped = load_newest(tmp_path)
    assert_same(loaded.snapshot, snapshots[1][0])
    assert len(skipped) == 2
    assert "checkpoint-3/manifest.json is missing or damaged" in skipped[0]
    assert f"checkpoint-2/{ARENA} is missing or damaged (100 bytes, the manifest says" in skipped[1]
    for step in (2, 3):  # named, it is that one or none
        with pytest.raises(CheckpointError):
            load_newest(tmp_path, str(tmp_path / f"checkpoint-{step}"))
    (tmp_path / "checkpoint-1" / "state" / "trainer.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"no intact checkpoint:\n- .*-3/man.*\n- .*-2/state.*\n- .*-1/st.*\nRest"
    ):
        load_newest(tmp_path)


def test_auto_starts_anew_only_where_there_is_nothing(tmp_path):
    assert load_newest(tmp_path) == (None, [])
    assert load_newest(tmp_path / "not there yet") == (None, [])
    assert load_newest(tmp_path, None) == (None, [])
    (tmp_path / "latest").write_text("checkpoint-30\n")  # somebody removed the folder: not a first start
    with pytest.raises(CheckpointError, match="no intact checkpoint:\n- .*latest names checkpoint-30, which is not"):
        load_newest(tmp_path)


def test_another_runs_checkpoint_is_refused_not_passed_over(tmp_path):
    snapshot, layout = random_snapshot()
    save(tmp_path, snapshot, layout, step=1)
    save(tmp_path, snapshot, layout, step=2, identity=replace(IDENTITY, data="f" * 64))
    with pytest.raises(OtherRunError, match="checkpoint-2 was written by another run: another data"):
        load_newest(tmp_path)


def test_what_a_crash_left_is_taken_back_or_removed(tmp_path):
    snapshot, layout = random_snapshot()
    save(tmp_path, snapshot, layout, step=10)
    save(tmp_path, snapshot, layout, step=20)
    (tmp_path / "checkpoint-20").rename(tmp_path / ".checkpoint-20.old")  # between the two renames
    for name in (".checkpoint-10.old", ".checkpoint-30.tmp", ".checkpoint-30.tmp-0a1b", ".checkpoint-5.removed"):
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / ".latest.4711.tmp").write_text("check")
    (tmp_path / ".checkpoint-notes").mkdir()  # not ours
    notes = checkpoint.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".checkpoint-notes", "checkpoint-10", "checkpoint-20", "latest"]
    assert len(notes) == 5
    assert sum("has its name again" in note for note in notes) == 1
    loaded, skipped = load_newest(tmp_path)
    assert (loaded.path.name, skipped) == ("checkpoint-20", [])
    assert checkpoint.clean(tmp_path) == []
    assert checkpoint.clean(tmp_path / "not there") == []


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


def test_prune_never_removes_the_last_complete_one(tmp_path):
    snapshot, layout = random_snapshot()
    for step in (1, 2, 3):
        save(tmp_path, snapshot, layout, step=step)
    (tmp_path / "latest").unlink()
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    (tmp_path / "checkpoint-2" / ARENA).write_bytes(b"short")
    assert checkpoint.prune(tmp_path, 1) == [tmp_path / "checkpoint-2"]
    assert load_newest(tmp_path)[0].path.name == "checkpoint-1"


def test_prune_leaves_a_link_to_another_disk_alone(tmp_path):
    snapshot, layout = random_snapshot()
    (tmp_path / "disk").mkdir()
    elsewhere = save(tmp_path / "disk", snapshot, layout, step=1)
    (tmp_path / "checkpoint-1").symlink_to(elsewhere)
    for step in (2, 3):
        save(tmp_path, snapshot, layout, step=step)
    assert [p.name for p in checkpoint.prune(tmp_path, 1)] == ["checkpoint-2"]
    assert load(tmp_path / "checkpoint-1").manifest["step"] == 1


# ---- before the first step ----


def test_a_writable_folder_passes_and_keeps_nothing(tmp_path):
    checkpoint.check_writable(tmp_path / "deep" / "new", 1 << 20)
    assert list((tmp_path / "deep" / "new").iterdir()) == []


def test_an_unwritable_folder_is_found_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=rf"output_dir={run_dir} cannot be written .*; make it a writ"):
            checkpoint.check_writable(run_dir)
    with pytest.raises(CheckpointError, match=r"free, one checkpoint takes about 1073741824.0 GiB; free some space"):
        checkpoint.check_writable(tmp_path, 1 << 60)

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("mkdir", "fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, refuse)
            with pytest.raises(CheckpointError, match="cannot be written .Read-only file system"):
                checkpoint.check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
