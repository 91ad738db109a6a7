"""Checkpoints of every format version are read by this one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ardtrain import checkpoint
from ardtrain.checkpoint import OtherRunError
from ardtrain.trainer import LoopState
from tests.goldens.make_checkpoint import IDENTITY, golden_trainer
from tests.tiny import equal_bits, weights_digest

FOLDERS = sorted((Path(__file__).parents[1] / "goldens").glob("checkpoint-v*"))


def golden(version):
    return Path(__file__).parents[1] / "goldens" / f"checkpoint-v{version}" / "checkpoint-12"


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
    table = loaded.snapshot.table
    digest = table.digest if loaded.manifest["format_version"] >= 3 else table.first_digest
    assert weights_digest(loaded.snapshot, digest) == expected["weights_digest"]
    assert loaded.snapshot.table.by_name() == expected["ranks"]
    trainer.arena.build(loaded.snapshot, loaded.layout)
    trainer.state = LoopState(**loaded.loop)
    assert weights_digest(trainer.arena.capture(), digest) == expected["weights_digest"]
    assert loaded.changes == []
    assert trainer.state.events == expected["events"] >= 3
    assert not trainer.train_step().void


@pytest.mark.usefixtures("world")
def test_golden_of_version_2_knows_whose_it_is():
    fresh = golden_trainer()
    wanted = {"sites": fresh.arena.table.sites, "parts": fresh.method.entries, "kinds": fresh.method.state_tensors()}
    settings = {**IDENTITY.settings, "r": 8}
    other = replace(IDENTITY, settings=settings, changeable={"learning_rate": 1.0})
    with pytest.raises(OtherRunError, match="12 was written by another run: r: the checkpoint has 4, this run 8"):
        checkpoint.load(golden(2), **wanted, identity=other)
    assert checkpoint.load(golden(1), **wanted, identity=other).changes == []  # version 1 did not say
    changed = replace(IDENTITY, changeable={"learning_rate": 1.0})
    assert checkpoint.load(golden(2), **wanted, identity=changed).changes == [
        "learning_rate: the checkpoint has 0.005, this run 1.0"
    ]


def test_the_same_run_gives_the_same_state_in_versions_1_and_2():
    """12 steps and 3 resizes, to the bit: what stood in one file stands in two parts. Version 3 came after adapters'
    products had moved inside the GEMMs, which changed last bits.
    """
    one = load_file(golden(1) / "state" / "arena.safetensors")
    parts = [load_file(path) for path in sorted((golden(2) / "state").glob("*.safetensors"))]
    assert len(parts) == 2
    two = parts[0] | parts[1]
    assert one.keys() == two.keys() and len(two) == len(parts[0]) + len(parts[1])
    assert all(equal_bits(one[name], two[name]) for name in one)
