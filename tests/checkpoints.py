"""Small checkpoints that tests share: random snapshots, saving and loading them, resealing what a test changed."""

import json

import numpy as np
import torch

from ardtrain import checkpoint
from ardtrain.arena import ArenaLayout
from ardtrain.checkpoint import Identity
from ardtrain.engines import FullState
from ardtrain.methods.elalora import ElaLora
from ardtrain.ranks import RankTable
from ardtrain.resize import Snapshot
from tests.tiny import ELALORA, equal_bits, random_plan, sites_of

SITES = tuple(sites_of((9, 7), (16, 16), (5, 33), (6, 6)))
METHOD = ElaLora(ELALORA)
KINDS = {"mean": "per_entry", "spread": "per_entry", "gate": "per_component", "alpha": "per_site"}
IDENTITY = Identity(
    "b" * 64,
    "d" * 64,
    {"torch": "2"},
    weights={"model.safetensors": "e" * 64},
    method="elalora",
    settings={"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "elalora": {"b": 4, "k": 2}},
    changeable={"learning_rate": 1e-3, "max_steps": 100},
)
LOOP = {"step": 30, "exponent": 41, "best_loss": 0.1 + 0.2}
ARENA = "state/arena-00001-of-00001.safetensors"


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


def save(run_dir, snapshot, layout, *, step=30, identity=IDENTITY, loop=LOOP):
    return checkpoint.save(
        run_dir, snapshot, layout, step=step, loop=loop, identity=identity, write_adapter=write_adapter
    )


def load(path, *, sites=SITES, identity=IDENTITY, parts=METHOD.entries, kinds=KINDS):
    return checkpoint.load(path, sites=sites, parts=parts, kinds=kinds, identity=identity)


def load_newest(run_dir, resume_from="auto", *, identity=IDENTITY):
    return checkpoint.load_newest(
        run_dir, resume_from, sites=SITES, parts=METHOD.entries, kinds=KINDS, identity=identity
    )


def reseal(path, **changed):
    """Writes the manifest anew over files that a test changed, and with other values."""
    manifest = json.loads((path / "manifest.json").read_text()) | changed
    for name, entry in dict(manifest["files"]).items():
        if (path / name).is_file():
            entry |= {"bytes": (path / name).stat().st_size, "sha256": checkpoint.sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(checkpoint.seal(manifest)))
