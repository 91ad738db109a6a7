"""Plans that edit the numbers of survivors (`fold`, `zero`), and dense entries on their way through resize and
checkpoint."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from ardtrain import checkpoint
from ardtrain.arena import ArenaLayout, Repacking, Shard
from ardtrain.checkpoint import CheckpointError, Identity, from_tensors, to_tensors
from ardtrain.engines import AdamSettings, FullState
from ardtrain.methods.base import FixedRank
from ardtrain.methods.dora import Dora
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.lora import Lora
from ardtrain.ranks import Dense, RankPlan, RankTable, SiteChange, identity_plan
from ardtrain.resize import LiveArena, Snapshot, edit_survivors, repack_snapshot, start_snapshot
from ardtrain.trainer import LoopState
from tests.tiny import ELALORA, adapter_config, equal_bits, random_plan, sites_of, tiny_trainer

SITES = tuple(sites_of((9, 6), (16, 16), (5, 12)))
RANKS = (4, 0, 3)
DENSE = (Dense("s0", "magnitude", 1, 6), Dense("head", "weight", 3, 11), Dense("head", "bias", 1, 3))
NAMES = ("master", "exp_avg", "exp_avg_sq")


def snapshot_of(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def flat():
        out = torch.zeros(layout.size)
        for block in layout.all_blocks:
            block.of(out).normal_(generator=generator)
        return out

    full = FullState(flat(), flat(), flat().abs(), 5)
    return Snapshot(layout.table, full, torch.arange(layout.table.total), {"mean": flat()})


PLAIN = Lora().entries


def made(parts=PLAIN, dense=(), ranks=RANKS):
    layout = ArenaLayout(RankTable.start(SITES, ranks), parts, dense)
    return layout, snapshot_of(layout)


def turned(snapshot, layout, changes, method=None):
    plan = RankPlan(layout.table.digest, changes)
    init = (method or Lora()).init
    return repack_snapshot(snapshot, layout, plan, init, seed=3, step=7)


def rows(snapshot, layout, index, name="master"):
    return layout.site_rows(getattr(snapshot.full, name), index)


# ---- fold ----


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_fold_multiplies_one_row_and_no_moment(part):
    layout, before = made()
    after, new = turned(before, layout, {0: SiteChange((0, 1, 2, 3), fold=((2, part, (0.25,)),))})
    for name in NAMES:
        for index in (0, 2):
            for p, old_rows in rows(before, layout, index, name).items():
                wanted = old_rows.clone()
                if (name, index, p) == ("master", 0, part):
                    wanted[2] *= 0.25
                assert equal_bits(rows(after, new, index, name)[p], wanted)
    assert equal_bits(after.entries["mean"], before.entries["mean"])
    assert torch.equal(after.age, before.age)


def test_a_fold_follows_its_component_to_its_new_place():
    layout, before = made()
    change = SiteChange((3, 1, 0), born=2, fold=((0, "lora_B", (0.5,)), (3, "lora_B", (4.0,)), (2, "lora_B", (9.0,))))
    after, new = turned(before, layout, {0: change})
    old, now = rows(before, layout, 0)["lora_B"], rows(after, new, 0)["lora_B"]
    assert equal_bits(now[0], old[3] * 4.0)
    assert equal_bits(now[1], old[1])
    assert equal_bits(now[2], old[0] * 0.5)
    assert not now[3:].any()  # the newborn; component 2 left, and its factor with it
    assert new.table.births[0] == (3, 1, 0, 4, 5)


def test_one_factor_for_each_head_that_shares_the_row():
    layout, before = made()
    after, new = turned(before, layout, {2: SiteChange((0, 2), fold=((2, "lora_B", (0.0, 0.5, 1.0, 2.0)),))})
    old, now = rows(before, layout, 2)["lora_B"], rows(after, new, 2)["lora_B"]
    assert equal_bits(now[0], old[0])
    assert equal_bits(now[1].view(4, 3), old[2].view(4, 3) * torch.tensor([[0.0], [0.5], [1.0], [2.0]]))


@pytest.mark.parametrize("seed", range(6))
def test_folds_and_zeros_by_the_naive_loop(seed):
    numbers = np.random.default_rng(seed)
    layout, before = made(ElaLora(ELALORA).entries, DENSE, ranks=(4, 5, 3))
    plan = random_plan(layout.table, numbers)
    changes = {}
    for index, change in plan.changes.items():
        rank = layout.table.ranks[index]
        folds = tuple(
            (int(p), ("lora_A", "lora_B")[int(numbers.integers(2))], (float(numbers.normal()),))
            for p in numbers.permutation(rank)[: numbers.integers(0, rank + 1)]
        )
        zeros = tuple(numbers.permutation(rank)[: numbers.integers(0, rank + 1)].tolist())
        changes[index] = change._replace(fold=folds, zero=zeros)
    method = ElaLora(ELALORA)
    after, new = turned(before, layout, changes, method)
    plain, _ = turned(before, layout, dict(plan.changes), method)
    for name in ("exp_avg", "exp_avg_sq"):
        assert equal_bits(getattr(after.full, name), getattr(plain.full, name))
    for index in range(3):
        wanted = {p: r.clone() for p, r in rows(plain, new, index).items()}
        if index in changes:
            for place, position in enumerate(changes[index].keep):
                for folded, part, (factor,) in changes[index].fold:
                    if folded == position:
                        wanted[part][place] *= factor
                if position in changes[index].zero:
                    wanted["diagonal"][place] = 0.0
        for part, now in rows(after, new, index).items():
            assert equal_bits(now, wanted[part])
    for block in new.all_blocks[len(new.blocks) :]:
        assert equal_bits(block.of(after.full.master), block.of(plain.full.master))


def test_folded_newborn_vectors_are_drawn_beside_the_unfolded_survivors():
    """Newborn vectors are orthogonal to what was there; a factor changes no direction."""
    layout, before = made(ElaLora(ELALORA).entries)
    method = ElaLora(ELALORA)
    folded, new = turned(before, layout, {0: SiteChange((0, 1), 1, fold=((0, "lora_A", (7.0,)),))}, method)
    plain, _ = turned(before, layout, {0: SiteChange((0, 1), 1)}, method)
    assert equal_bits(rows(folded, new, 0)["lora_A"][2], rows(plain, new, 0)["lora_A"][2])


def test_bad_edits_are_refused():
    layout, before = made(ElaLora(ELALORA).entries)
    for change, text in (
        (
            SiteChange((0, 1), fold=((4, "lora_B", (1.0,)),)),
            r"s0: fold=\(4,\) must be distinct positions below",
        ),
        (
            SiteChange((0, 1), fold=((1, "lora_B", (1.0,)), (1, "lora_A", (1.0,)))),
            r"s0: fold=\(1, 1\) must be",
        ),
        (SiteChange((0, 1), zero=(5,)), r"s0: zero=\(5,\) must be distinct positions"),
    ):
        with pytest.raises(ValueError, match=text):
            turned(before, layout, {0: change}, ElaLora(ELALORA))


def test_edits_count_in_the_digest_on_which_processes_agree():
    table = RankTable.start(SITES, RANKS)
    keep = tuple(range(4))
    plans = [
        RankPlan(table.digest, {0: c})
        for c in (
            SiteChange(keep),
            SiteChange(keep, fold=((1, "lora_B", (0.5,)),)),
            SiteChange(keep, fold=((1, "lora_B", (0.5 + 2**-53,)),)),
            SiteChange(keep, fold=((1, "lora_A", (0.5,)),)),
            SiteChange(keep, fold=((1, "lora_B", (0.5, 0.5)),)),
            SiteChange(keep, zero=(1,)),
        )
    ]
    assert len({p.digest for p in plans}) == len(plans)
    assert not any(p.reshapes(table) for p in plans)
    for change in (SiteChange(keep, 1), SiteChange((1, 0, 2, 3)), SiteChange((0, 1, 2))):
        assert RankPlan(table.digest, {0: change}).reshapes(table)


# ---- plans that keep all shapes ----


class Noted(FixedRank):
    """ElaLoRA's parts with one array of each kind; counts its bindings."""

    entries, init = ElaLora(ELALORA).entries, ElaLora(ELALORA).init

    def __init__(self):
        self.bindings = 0

    def state_tensors(self):
        return {"entry": "per_entry", "component": "per_component", "alpha": 5}

    def bind(self, binding):
        super().bind(binding)
        self.bindings += 1


def live(world, method=None, *, dense=(), config=None, ranks=RANKS):
    arena = LiveArena(
        method or Noted(),
        world=world,
        engine_config=config or adapter_config(),
        adam=AdamSettings(),
        seed=3,
        dense=dense,
    )
    arena.start(RankTable.start(SITES, ranks), {(d.module, d.part): torch.ones(d.rows, d.columns) for d in dense})
    return arena


def train(arena, steps, seed=0):
    for step in range(steps):
        gradient = torch.zeros(arena.layout.size)
        generator = torch.Generator().manual_seed(seed + step)
        for block in arena.layout.all_blocks:
            block.of(gradient).normal_(generator=generator)
        arena.engine.step(gradient, lr=1e-2)
        arena.age += 1


CONFIGS = {"stage 1": adapter_config(), "stage 2": adapter_config(stage=2), "offload": adapter_config(offload=True)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_an_edit_alone_rebuilds_nothing(world, config):
    """Master and weights change together; moments, ages, statistics, counters and the engine stay."""
    arena = live(world, config=config, dense=DENSE)
    train(arena, 3)
    engine, before, bindings = arena.engine, arena.capture(), arena.method.bindings
    changes = {
        0: SiteChange((0, 1, 2, 3), zero=(1,), fold=((0, "lora_B", (0.5,)), (3, "lora_A", (1.0, 2.0, 3.0)))),
        2: SiteChange((0, 1, 2), zero=(0, 2)),
    }
    record = arena.apply(RankPlan(arena.table.digest, changes), step=3)
    assert arena.engine is engine and arena.method.bindings == bindings
    assert record.before is record.after is arena.table
    assert list(record.seconds) == ["agree", "edit"]
    after, wanted = arena.capture(), before.full.master.clone()
    first = arena.layout.site_rows(wanted, 0)
    first["diagonal"][1] = 0.0
    first["lora_B"][0] *= 0.5
    first["lora_A"][3].view(3, 3).mul_(torch.tensor([[1.0], [2.0], [3.0]]))
    arena.layout.site_rows(wanted, 2)["diagonal"][[0, 2]] = 0.0
    assert equal_bits(after.full.master, wanted) and equal_bits(arena.engine.weights, wanted)
    assert equal_bits(after.full.exp_avg, before.full.exp_avg)
    assert equal_bits(after.full.exp_avg_sq, before.full.exp_avg_sq)
    assert after.full.steps == 3 and torch.equal(after.age, before.age)
    train(arena, 1, seed=9)  # the edited master is what the next step moves
    other = live(world, dense=DENSE)
    other.build(after, arena.layout)
    train(other, 1, seed=9)
    assert equal_bits(arena.engine.weights, other.engine.weights)
    assert arena.layout.site_rows(arena.engine.weights, 0)["diagonal"][1] != 0  # a zeroed one may come back
    arena.engine.destroy()
    other.engine.destroy()


def test_the_same_edit_with_and_without_a_rebuild_gives_the_same_bits(world):
    """A fold at site 0 on the quick road, and on the long one because site 2 grows."""
    quick, long = live(world), live(world)
    train(quick, 3)
    train(long, 3)
    fold = SiteChange((0, 1, 2, 3), zero=(2,), fold=((1, "lora_B", (0.3,)),))
    quick.apply(RankPlan(quick.table.digest, {0: fold}), step=3)
    long.apply(RankPlan(long.table.digest, {0: fold, 2: SiteChange((0, 1, 2), 1)}), step=3)
    a, b = quick.capture(), long.capture()
    for name in NAMES:
        for part, own in quick.layout.site_rows(getattr(a.full, name), 0).items():
            assert equal_bits(own, long.layout.site_rows(getattr(b.full, name), 0)[part])
    quick.engine.destroy()
    long.engine.destroy()


def test_a_stale_edit_changes_nothing(world):
    arena = live(world)
    train(arena, 2)
    before = arena.engine.weights.clone()
    good = RankPlan(arena.table.digest, {0: SiteChange((0, 1, 2, 3), zero=(1,))})
    with pytest.raises(ValueError, match="plan again"):
        arena.apply(replace(good, table_digest="0" * 64), step=2)
    with pytest.raises(ValueError, match="s0: zero="):
        arena.apply(RankPlan(arena.table.digest, {0: SiteChange((0, 1, 2, 3), zero=(8,))}), step=2)
    assert equal_bits(arena.engine.weights, before)
    arena.engine.destroy()


def test_edits_of_a_flat_vector_alone():
    layout, snapshot = made(ElaLora(ELALORA).entries)
    flat = snapshot.full.master.clone()
    edit_survivors(flat, layout, identity_plan(layout.table))
    assert equal_bits(flat, snapshot.full.master)


# ---- dense entries ----


def test_dense_entries_lie_behind_the_components_on_aligned_blocks():
    layout, _ = made(dense=DENSE)
    assert [(b.module, b.part, b.rows, b.columns, b.first) for b in layout.all_blocks[len(layout.blocks) :]] == [
        ("s0", "magnitude", 1, 6, -1),
        ("head", "weight", 3, 11, -1),
        ("head", "bias", 1, 3, -1),
    ]
    assert all(b.offset % 32 == 0 for b in layout.all_blocks)
    assert layout.num_trained == 4 * 15 + 3 * 17 + 6 + 33 + 3
    leaf = torch.arange(float(layout.size)).requires_grad_()
    views = layout.views(leaf)
    assert views["s0"].keys() == {"lora_A", "lora_B", "magnitude"} and views["head"].keys() == {"weight", "bias"}
    assert "s1" not in views
    (gradient,) = torch.autograd.grad(views["head"]["weight"].sum() * 2 + views["s0"]["magnitude"].sum(), leaf)
    assert gradient.sum() == 2 * 33 + 6
    assert gradient[views["head"]["weight"].detach().long().view(-1)].eq(2).all()


@pytest.mark.parametrize("seed", range(6))
def test_dense_entries_keep_every_bit_through_any_repack(seed):
    layout, before = made(ElaLora(ELALORA).entries, DENSE)
    for step in range(3):
        plan = random_plan(layout.table, np.random.default_rng(10 * seed + step))
        after, new = turned(before, layout, dict(plan.changes), ElaLora(ELALORA))
        for old, now in zip(layout.all_blocks[len(layout.blocks) :], new.all_blocks[len(new.blocks) :], strict=True):
            for name in NAMES:
                assert equal_bits(now.of(getattr(after.full, name)), old.of(getattr(before.full, name)))
            assert equal_bits(now.of(after.entries["mean"]), old.of(before.entries["mean"]))
        gaps = torch.ones(new.size, dtype=torch.bool)
        for block in new.all_blocks:
            gaps[block.offset : block.stop] = False
        for name in NAMES:
            assert not getattr(after.full, name)[gaps].any()
        before, layout = after, new


def test_dense_entries_alone_survive_when_all_ranks_are_zero():
    layout, before = made(dense=DENSE)
    after, new = turned(before, layout, {0: SiteChange(()), 2: SiteChange(())})
    assert new.blocks == () and new.num_trained == 42
    for old, now in zip(layout.all_blocks[len(layout.blocks) :], new.all_blocks, strict=True):
        assert equal_bits(now.of(after.full.master), old.of(before.full.master))
    back, again = turned(after, new, {0: SiteChange((), 4)})
    assert again.num_trained == 42 + 4 * 15
    assert equal_bits(again.all_blocks[-1].of(back.full.master), new.all_blocks[-1].of(after.full.master))


def test_no_shard_holds_a_dense_entry():
    """Statistics are of components; a dense entry is in no process's share."""
    layout, _ = made(ElaLora(ELALORA).entries, DENSE)
    taken = torch.zeros(layout.size)
    for process in range(3):
        shard = Shard(layout, process, 3)
        shard.put(torch.ones(shard.size), taken)
    for block in layout.blocks:
        assert block.of(taken).all()
    assert not taken[layout.all_blocks[len(layout.blocks)].offset :].any()


def test_first_values_of_dense_entries():
    layout, _ = made(dense=DENSE)
    first = {(d.module, d.part): torch.randn(d.rows, d.columns) for d in DENSE}
    first["s0", "magnitude"] = first["s0", "magnitude"].view(-1)  # a vector is one row
    start = start_snapshot(layout.table, layout, Lora().init, seed=1, dense=first)
    for entry, block in zip(DENSE, layout.all_blocks[len(layout.blocks) :], strict=True):
        assert equal_bits(block.of(start.full.master), first[entry.module, entry.part].view(entry.rows, entry.columns))
    assert not start.full.exp_avg.any()
    with pytest.raises(KeyError):
        start_snapshot(layout.table, layout, Lora().init, seed=1, dense={})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_dense_entries_live_through_an_engine_event(world, config):
    arena = live(world, dense=DENSE, config=config)
    train(arena, 3)
    before, old = arena.capture(), arena.layout
    arena.apply(RankPlan(arena.table.digest, {0: SiteChange((2,), 1), 1: SiteChange((), 5)}), step=3)
    after = arena.capture()
    for a, b in zip(
        old.all_blocks[len(old.blocks) :], arena.layout.all_blocks[len(arena.layout.blocks) :], strict=True
    ):
        for name in NAMES:
            assert equal_bits(b.of(getattr(after.full, name)), a.of(getattr(before.full, name)))
            assert b.of(getattr(after.full, name)).any()
    arena.engine.destroy()


# ---- checkpoints ----

IDENTITY = Identity("b" * 64, "d" * 64, {})


def test_dense_entries_are_in_a_checkpoint_by_name(tmp_path):
    layout, snapshot = made(dense=DENSE)
    snapshot.entries.clear()
    tensors = to_tensors(snapshot, layout)
    assert tensors["s0.magnitude.master"].shape == (1, 6)
    assert tensors["head.weight.exp_avg_sq"].shape == (3, 11) and tensors["head.bias.exp_avg"].shape == (1, 3)
    assert "head.birth" not in tensors
    path = checkpoint.save(
        tmp_path, snapshot, layout, step=5, loop={}, identity=IDENTITY, write_adapter=lambda folder: folder.mkdir()
    )
    wanted = {"sites": SITES, "parts": Lora().entries, "kinds": {}, "identity": IDENTITY}
    loaded = checkpoint.load(path, **wanted, dense=DENSE)
    assert loaded.layout.all_blocks == layout.all_blocks
    for name in NAMES:
        assert equal_bits(getattr(loaded.snapshot.full, name), getattr(snapshot.full, name))
    wider = (*DENSE[:1], Dense("head", "weight", 4, 11), DENSE[2])
    with pytest.raises(CheckpointError, match=r"tensor head.weight.master has shape \(3, 11\), its rank table says"):
        checkpoint.load(path, **wanted, dense=wider)
    with pytest.raises(CheckpointError, match="tensor other.weight.master is missing from the checkpoint"):
        checkpoint.load(path, **wanted, dense=(*DENSE, Dense("other", "weight", 2, 2)))


def test_dense_tensors_round_trip_beside_any_table():
    for seed in range(4):
        layout, before = made(ElaLora(ELALORA).entries, DENSE)
        plan = random_plan(layout.table, np.random.default_rng(seed))
        after, new = turned(before, layout, dict(plan.changes), ElaLora(ELALORA))
        again = from_tensors(to_tensors(after, new), after.table, new, kinds={"mean": "per_entry"}, steps=5)
        for name in NAMES:
            assert equal_bits(getattr(again.full, name), getattr(after.full, name))


def test_a_dora_run_resumes_to_the_bit(world, tmp_path):
    def make(start=True):
        return tiny_trainer(Dora(), form="dora", r=2, start=start)

    unbroken = make()
    for _ in range(4):
        unbroken.train_step()
    path = checkpoint.save(
        tmp_path,
        unbroken.arena.capture(),
        unbroken.arena.layout,
        step=4,
        loop=asdict(unbroken.state),
        identity=IDENTITY,
        write_adapter=lambda folder: folder.mkdir(),
    )
    other = make(start=False)
    wanted = {"parts": other.method.entries, "kinds": {}, "identity": IDENTITY, "dense": other.arena.dense}
    loaded = checkpoint.load(path, sites=unbroken.arena.table.sites, **wanted)
    other.arena.build(loaded.snapshot, loaded.layout)
    other.state = LoopState(**loaded.loop)
    for _ in range(4):
        assert other.train_step().loss == unbroken.train_step().loss
    assert equal_bits(other.arena.engine.weights, unbroken.arena.engine.weights)
    other.arena.engine.destroy()
    unbroken.arena.engine.destroy()


def test_nothing_that_left_comes_along_in_a_run_of_copies():
    """A pruned last row of a diagonal lies where the gap after its block is: a run may not carry it over."""
    entries = ElaLora(ELALORA).entries
    layout = ArenaLayout(RankTable.start(SITES, [4, 3, 3]), entries, DENSE)
    numbers = np.random.default_rng(5)
    plans = [{0: SiteChange((0, 1, 2))}, {0: SiteChange((0, 1, 2), 1)}, {1: SiteChange((0, 2), 1)}]
    plans += [dict(random_plan(layout.table, numbers).changes) for _ in range(20)]
    for changes in plans:
        new = ArenaLayout(RankPlan(layout.table.digest, changes).apply(layout.table), entries, DENSE)
        repacking = Repacking(layout, new)
        flat = torch.arange(1.0, layout.size + 1)  # gaps too: only rows of survivors may be read
        for block in layout.all_blocks:
            block.of(flat).neg_()
        out, survivors = repacking.apply(flat), torch.zeros(new.size, dtype=torch.bool)
        for block in new.all_blocks:
            alive = slice(None) if block.first < 0 else repacking.source[block.first : block.first + block.rows] >= 0
            block.of(survivors)[alive] = True
        assert (out[survivors] < 0).all()
        rows = torch.zeros(new.size, dtype=torch.bool)
        for block in new.all_blocks:
            block.of(rows)[:] = True
        assert not out[rows & ~survivors].any()


def test_repacking_is_worked_out_once_for_all_arrays():
    layout, snapshot = made(dense=DENSE)
    new = ArenaLayout(
        RankPlan(layout.table.digest, {0: SiteChange((3, 0), 1)}).apply(layout.table), layout.parts, DENSE
    )
    repacking = Repacking(layout, new)
    for flat in (snapshot.full.master, snapshot.full.exp_avg.double(), torch.arange(layout.size)):
        out = repacking.apply(flat)
        assert out.dtype == flat.dtype
        assert torch.equal(new.site_rows(out, 0)["lora_A"][:2], layout.site_rows(flat, 0)["lora_A"][[3, 0]])
        assert not new.site_rows(out, 0)["lora_A"][2].any()
