"""Checkpoints of every format version are read by this one."""

import json
from pathlib import Path

import pytest

from ardtrain import checkpoint
from ardtrain.trainer import LoopState
from tests.goldens.make_checkpoint import IDENTITY, golden_trainer
from tests.tiny import weights_digest

FOLDERS = sorted((Path(__file__).parents[1] / "goldens").glob("checkpoint-v*"))


def test_there_is_a_golden_checkpoint_of_the_present_version():
    assert f"checkpoint-v{checkpoint.FORMAT_VERSION}" in [folder.name for folder in FOLDERS]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_golden_checkpoint_loads_and_trains_on(folder):
    expected = json.loads((folder / "expected.json").read_text())
    fresh = golden_trainer()
    trainer = golden_trainer(start=False)
    method = trainer.method
    loaded = checkpoint.load(
        folder / "checkpoint-12",
        sites=fresh.arena.table.sites,
        parts=method.entries,
        kinds=method.state_tensors(),
        identity=IDENTITY,
    )
    assert weights_digest(loaded.snapshot) == expected["weights_digest"]
    assert loaded.snapshot.table.by_name() == expected["ranks"]
    trainer.arena.build(loaded.snapshot, loaded.layout)
    trainer.state = LoopState(**loaded.loop)
    assert weights_digest(trainer.arena.capture()) == expected["weights_digest"]
    assert trainer.state.events == expected["events"] >= 3
    assert not trainer.train_step().void
