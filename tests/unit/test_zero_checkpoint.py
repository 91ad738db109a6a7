import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ardtrain import checkpoint, zero_checkpoint
from ardtrain.checkpoint import CheckpointError
from ardtrain.trainer import LoopState
from tests.tiny import elalora, equal_bits, tiny_trainer, weights_digest

IDENTITY = checkpoint.Identity("tiny", "tokens", {}, settings={"r": 4})


@pytest.fixture
def saved(world, tmp_path):
    """(trainer after 12 steps, its snapshot, the folder that DeepSpeed wrote)."""
    trainer = tiny_trainer(elalora(), adapter=None)
    for _ in range(12):
        trainer.train_step()
    snapshot = trainer.arena.capture()
    state = zero_checkpoint.client_state(snapshot, loop=asdict(trainer.state), identity=IDENTITY)
    size = zero_checkpoint.save(tmp_path, trainer.arena.engine, state, world)
    folder = tmp_path / zero_checkpoint.FOLDER
    assert size == sum(p.stat().st_size for p in folder.iterdir()) > 12 * trainer.arena.layout.num_trained
    assert not (tmp_path / ".deepspeed.tmp").exists()
    yield trainer, snapshot, folder
    trainer.arena.engine.destroy()
    trainer.backbone.destroy()


def load(trainer, folder, *, identity=IDENTITY, allow_pickle=False):
    method = trainer.method
    return zero_checkpoint.load(
        folder,
        allow_pickle=allow_pickle,
        sites=trainer.first_table.sites,
        parts=method.entries,
        kinds=method.state_tensors(),
        identity=identity,
    )


def test_everything_comes_back_without_unpickling(saved):
    trainer, snapshot, folder = saved
    assert zero_checkpoint.holds_zero(folder) and not zero_checkpoint.holds_zero(folder.parent)
    loaded = load(trainer, folder)
    assert weights_digest(loaded.snapshot) == weights_digest(snapshot)
    assert loaded.snapshot.full.steps == snapshot.full.steps and loaded.snapshot.table == snapshot.table
    assert equal_bits(loaded.snapshot.age, snapshot.age)
    assert all(equal_bits(loaded.snapshot.entries[n], t) for n, t in snapshot.entries.items())
    assert LoopState(**loaded.loop) == trainer.state


def test_the_universal_format_gives_the_same_numbers(saved, tmp_path):
    trainer, snapshot, folder = saved
    out = tmp_path / "universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    arguments = ["--input_folder", str(folder), "--output_folder", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights_digest(load(trainer, out).snapshot) == weights_digest(snapshot)


def test_another_runs_checkpoint_is_refused_with_both_values(saved):
    trainer, _, folder = saved
    other = checkpoint.Identity("tiny", "tokens", {}, settings={"r": 8})
    with pytest.raises(CheckpointError, match="r: the checkpoint has 4, this run 8"):
        load(trainer, folder, identity=other)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_damage_is_refused_with_the_file_named(saved, name, damage):
    trainer, _, folder = saved
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "truncated" else b"no checkpoint")
    with pytest.raises(CheckpointError, match=name):
        load(trainer, folder)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-ran"),))


def test_a_file_that_would_run_code_needs_the_flag(saved, tmp_path, monkeypatch):
    trainer, _, folder = saved
    monkeypatch.chdir(tmp_path)
    path = folder / "mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    torch.save(states | {"lr_scheduler": Evil()}, path)
    with pytest.raises(CheckpointError, match="allow_pickle=true reads it, and lets the file run code"):
        load(trainer, folder)
    assert not (tmp_path / "evil-ran").exists()
    load(trainer, folder, allow_pickle=True)
    assert (tmp_path / "evil-ran").exists()


def test_an_interrupted_save_leaves_no_folder_of_that_name(saved, tmp_path, world, monkeypatch):
    trainer, _, folder = saved
    shutil.rmtree(folder)

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(trainer.arena.engine, "save_zero", fails)
    with pytest.raises(OSError, match="disk full"):
        zero_checkpoint.save(tmp_path, trainer.arena.engine, {}, world)
    assert not folder.exists()
