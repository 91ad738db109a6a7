import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from ardtrain.arena import ArenaLayout, sources
from ardtrain.engines import MOMENTS, AdamSettings
from ardtrain.methods.base import FixedRank
from ardtrain.methods.elalora import ElaLora
from ardtrain.ranks import RankPlan, RankTable, SiteChange, identity_plan
from ardtrain.resize import LiveArena, repack_snapshot
from ardtrain.schedule import learning_rate
from tests.tiny import ELALORA, adapter_config, elalora, equal_bits, random_plan, sites_of, tiny_trainer

SITES = sites_of((9, 7), (16, 16), (5, 33), (6, 6))


class Stateful(FixedRank):
    """One state tensor of each kind, in ElaLoRA's form."""

    entries, init = ElaLora(ELALORA).entries, ElaLora(ELALORA).init

    def state_tensors(self):
        return {"entry": "per_entry", "component": "per_component", "site": "per_site"}


def live(world, method=None, ranks=(4, 5, 3, 2), config=None):
    arena = LiveArena(
        method or ElaLora(ELALORA), world=world, engine_config=config or adapter_config(), adam=AdamSettings(), seed=3
    )
    arena.start(RankTable.start(SITES, ranks))
    return arena


def train(arena, steps, seed=0):
    for step in range(steps):
        gradient = torch.zeros(arena.layout.size)
        generator = torch.Generator().manual_seed(seed + step)
        for block in arena.layout.blocks:
            block.of(gradient).normal_(generator=generator)
        arena.engine.step(gradient, lr=1e-2)
        arena.age += 1


def assert_survivors_equal(before, old, after, new):
    where = sources(before.table, after.table)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        a, b = getattr(before.full, name), getattr(after.full, name)
        earlier = {(o.module, o.part): o for o in old.blocks}
        for block in new.blocks:
            origin = earlier.get((block.module, block.part))
            for row in range(block.rows):
                source = int(where[block.first + row])
                if source >= 0:
                    assert equal_bits(block.of(b)[row], origin.of(a)[source - origin.first])


@pytest.mark.parametrize(
    "config",
    [adapter_config(), adapter_config(stage=2), adapter_config(offload=True)],
    ids=["stage 1", "stage 2", "offload"],
)
def test_survivors_keep_every_bit_across_live_events(world, config):
    """methods.md 2.9.8, through DeepSpeed's own tensors."""
    arena, numbers = live(world, config=config), np.random.default_rng(2)
    for event in range(5):
        train(arena, 3, seed=10 * event)
        before, old = arena.capture(), arena.layout
        plan = random_plan(arena.table, numbers)
        wanted, _ = repack_snapshot(before, old, plan, arena.method.init, seed=3, step=event)
        record = arena.apply(plan, step=event)
        after = arena.capture()
        assert (record.before, record.after, record.plan) == (before.table, after.table, plan)
        assert list(record.seconds) == [
            "agree",
            "layout",
            "repack",
            "gather",
            "method",
            "destroy",
            "rebuild",
            "restore",
        ]
        assert_survivors_equal(before, old, after, arena.layout)
        for name in ("master", "exp_avg", "exp_avg_sq"):
            assert equal_bits(getattr(after.full, name), getattr(wanted.full, name))
        assert after.full.steps == 3 * (event + 1)
        assert torch.equal(after.age, wanted.age)
        assert equal_bits(arena.engine.weights, after.full.master)
    arena.engine.destroy()


def test_identity_plan_goes_through_the_engine_unseen(world):
    arena, other = live(world), live(world)
    train(arena, 3)
    train(other, 3)
    arena.apply(identity_plan(arena.table), step=3)
    train(arena, 3, seed=50)
    train(other, 3, seed=50)
    assert equal_bits(arena.engine.weights, other.engine.weights)
    arena.engine.destroy()
    other.engine.destroy()


def test_build_from_a_capture_goes_on_as_if_unbroken(world):
    """What a checkpoint load does."""
    arena = live(world)
    train(arena, 3)
    arena.apply(random_plan(arena.table, np.random.default_rng(0)), step=3)
    snapshot, layout = arena.capture(), arena.layout
    train(arena, 3, seed=50)
    other = LiveArena(ElaLora(ELALORA), world=world, engine_config=adapter_config(stage=2), adam=AdamSettings(), seed=3)
    other.build(snapshot, layout)
    train(other, 3, seed=50)
    assert equal_bits(arena.engine.weights, other.engine.weights)
    assert torch.equal(arena.age, other.age)
    arena.engine.destroy()
    other.engine.destroy()


def test_every_kind_of_state_is_kept_for_survivors_and_zero_for_the_newborn(world):
    arena = live(world, Stateful(), ranks=(2, 1, 1, 1))
    state = arena.method.binding.state
    assert (state["entry"].numel(), state["component"].shape, state["site"].shape) == (arena.shard.size, (5,), (4,))
    state["component"][:] = torch.arange(1.0, 6.0)
    state["site"][:] = torch.arange(4.0)
    for block in arena.layout.blocks:
        block.of(state["entry"]).fill_(7.0)  # one process's shard is laid out like the arena
    plan = RankPlan(arena.table.digest, {0: SiteChange((1,), 2), 3: SiteChange((), 1)})
    arena.apply(plan, step=0)
    state = arena.method.binding.state
    assert state["component"].tolist() == [2.0, 0.0, 0.0, 3.0, 4.0, 0.0]
    assert state["site"].tolist() == [0.0, 1.0, 2.0, 3.0]
    rows = arena.layout.site_rows(state["entry"], 0)
    assert rows["lora_A"][0].unique().tolist() == [7.0] and not rows["lora_A"][1:].any()
    assert arena.method.binding.table is arena.table
    assert arena.method.binding.age is arena.age
    arena.engine.destroy()


def test_snapshot_shares_no_memory_with_the_live_arena(world):
    """A snapshot that is written in the background must not move with training."""
    arena = live(world, Stateful())
    train(arena, 1)
    snapshot = arena.capture()
    live_tensors = [arena.age, arena.engine.weights, *arena.method.binding.state.values()]
    taken = [snapshot.age, snapshot.full.master, *snapshot.entries.values()]
    taken += [*snapshot.components.values(), *snapshot.sites.values()]
    assert {t.data_ptr() for t in taken}.isdisjoint({t.data_ptr() for t in live_tensors})
    arena.engine.destroy()


def test_bad_plan_leaves_the_old_engine_alive(world):
    arena = live(world)
    train(arena, 2)
    before, engine = arena.capture(), arena.engine
    stale = replace(identity_plan(arena.table), table_digest="0" * 64)
    too_large = RankPlan(arena.table.digest, {0: SiteChange((0,), 99)})
    for plan, text in ((stale, "plan again"), (too_large, "s0: rank 100 after the plan")):
        with pytest.raises(ValueError, match=text):
            arena.apply(plan, step=2)
        assert arena.engine is engine
        assert equal_bits(arena.capture().full.master, before.full.master)
    train(arena, 1)  # it still steps
    arena.engine.destroy()


def test_newborn_that_fail_leave_the_old_engine_alive(world, monkeypatch):
    """On one process the new weights go where the optimizer had its copy of the old ones: it gets that back."""
    arena, other = live(world), live(world)
    train(arena, 2)
    train(other, 2)

    def fail(*names):
        raise RuntimeError("linalg.qr: not finite")

    with monkeypatch.context() as patch:
        patch.setattr(arena.method, "init", fail)
        with pytest.raises(RuntimeError, match="not finite"):
            arena.apply(RankPlan(arena.table.digest, {0: SiteChange((1,), 1)}), step=2)
    train(arena, 2, seed=50)
    train(other, 2, seed=50)
    assert equal_bits(arena.engine.weights, other.engine.weights)
    arena.engine.destroy()
    other.engine.destroy()


def test_a_resize_on_one_process_goes_without_new_arrays(world):
    """Each array is written over the one before, as long as the arena does not grow."""
    arena = live(world, Stateful())
    train(arena, 1)
    engine = arena.engine
    old = [engine.copy_of_weights, engine.weights, *(engine.moment(name) for name in MOMENTS), arena.state["entry"]]
    places = {array.untyped_storage().data_ptr() for array in old}
    del old, engine
    arena.apply(RankPlan(arena.table.digest, {0: SiteChange((1, 2))}), step=1)
    new = [arena.engine.weights, *(arena.engine.moment(name) for name in MOMENTS), arena.state["entry"]]
    assert len({array.untyped_storage().data_ptr() for array in new} & places) == 4
    arena.engine.destroy()


def test_disagreement_changes_nothing(world, monkeypatch):
    arena = live(world)
    engine, table = arena.engine, arena.table

    def differ(what, digest, *, step):
        raise RuntimeError(f"step {step}: processes [1] hold another {what} than process 0")

    monkeypatch.setattr(arena.world, "agree", differ)
    plan = random_plan(table, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match=r"step 4: processes \[1\] hold another rank plan than process 0"):
        arena.apply(plan, step=4)
    assert arena.engine is engine and arena.table is table
    engine.destroy()


def test_all_sites_may_reach_rank_zero_and_come_back(world):
    arena = live(world)
    train(arena, 2)
    arena.apply(RankPlan(arena.table.digest, {i: SiteChange(()) for i in range(4)}), step=2)
    assert (arena.table.total, arena.layout.num_trained) == (0, 0)
    train(arena, 1)
    arena.apply(RankPlan(arena.table.digest, {1: SiteChange((), 2)}), step=3)
    assert arena.table.births[1] == (5, 6)
    train(arena, 1)
    assert arena.layout.site_rows(arena.engine.weights, 1)["lora_A"].any()
    arena.engine.destroy()


def test_old_engines_are_collected(world):
    trainer = tiny_trainer(elalora(init_warmup=0, mask_interval=2, newborn_immunity=False), target_modules=["q_proj"])
    engines, events = [], 0
    while events < 5:
        engines.append(weakref.ref(trainer.arena.engine._engine))
        result = trainer.train_step()
        if result.record is None:
            engines.pop()
        else:
            events += 1
        del result
    gc.collect()
    assert len(engines) == 5
    assert [e() for e in engines] == [None] * 5
    trainer.arena.engine.destroy()


def test_trained_bytes_are_the_rank_tables(world):
    arena, numbers = live(world), np.random.default_rng(4)
    for event in range(3):
        arena.apply(random_plan(arena.table, numbers), step=event)
        wanted = sum(r * (s.in_features + s.out_features + 1) for s, r in zip(SITES, arena.table.ranks, strict=True))
        assert arena.layout.num_trained == wanted
        gaps = arena.layout.size - wanted
        assert 0 <= gaps <= 31 * max(1, len(arena.layout.blocks)) + 32
        assert arena.engine.weights.numel() == arena.layout.size
        assert arena.layout.size == ArenaLayout(arena.table, arena.method.entries).size
    arena.engine.destroy()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_learning_rate_follows_the_schedule_across_events(world, kind):
    """methods.md 2.9.8; the published code goes on at the peak rate after its first event."""
    trainer = tiny_trainer(
        elalora(init_warmup=0, mask_interval=2, total_steps=14, final_warmup=2, newborn_immunity=False),
        target_modules=["q_proj"],
        total_steps=14,
        warmup_steps=3,
        lr_scheduler_type=kind,
    )
    events = 0
    for step in range(14):
        result = trainer.train_step()
        wanted = learning_rate(step, peak=5e-3, total_steps=14, warmup_steps=3, kind=kind)
        assert result.lr == wanted
        if result.record is None:  # the rate the optimizer had, not only the one reported
            assert {g["lr"] for g in trainer.arena.engine._engine.optimizer.param_groups} == {wanted}
        events += result.record is not None
    assert events >= 4
    trainer.arena.engine.destroy()
