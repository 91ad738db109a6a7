import numpy as np
import pytest
import torch

from ardtrain.arena import (
    ALIGNMENT,
    ArenaLayout,
    Shard,
    fill_newborn,
    fill_newborn_second_moment,
    repack,
    repack_components,
    sources,
)
from ardtrain.engines import FullState
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.lora import Lora
from ardtrain.methods.sensitivity import component_scores
from ardtrain.ranks import RankPlan, RankTable, Site, SiteChange, identity_plan
from ardtrain.resize import Snapshot, repack_snapshot, start_snapshot
from tests.tiny import ELALORA, elalora, equal_bits, random_plan, sites_of

SITES = sites_of((9, 7), (16, 16), (5, 33), (6, 6), (16, 16))
DIAGONAL = ElaLora(ELALORA)


def random_flat(layout, seed=0):
    """[N] random numbers in every trained place, zero in the gaps."""
    out = torch.zeros(layout.size)
    generator = torch.Generator().manual_seed(seed)
    for block in layout.blocks:
        block.of(out).normal_(generator=generator)
    return out


def snapshot_of(table, layout, seed=0):
    full = FullState(random_flat(layout, seed), random_flat(layout, seed + 1), random_flat(layout, seed + 2).abs(), 17)
    age = torch.randint(0, 99, (table.total,), generator=torch.Generator().manual_seed(seed))
    entries = {"mean": random_flat(layout, seed + 3), "spread": random_flat(layout, seed + 4)}
    components = {"gate": torch.rand(table.total, 2, dtype=torch.float64), "one": torch.rand(table.total)}
    sites = {"alpha": torch.rand(len(table.sites), dtype=torch.float64)}
    return Snapshot(table, full, age, entries, components, sites)


def rows_by_identity(flat, layout):
    """(site, birth number, part) -> that row of a flat tensor."""
    out = {}
    for index, births in enumerate(layout.table.births):
        for part, rows in layout.site_rows(flat, index).items():
            out |= {(index, birth, part): rows[i] for i, birth in enumerate(births)}
    return out


# ---- layout ----


def test_layout_by_hand():
    table = RankTable.start(sites_of((3, 5), (4, 4), (8, 8)), [2, 0, 1])
    layout = ArenaLayout(table, DIAGONAL.entries)
    assert [(b.module, b.part, b.offset, b.rows, b.columns, b.first) for b in layout.blocks] == [
        ("s0", "lora_A", 0, 2, 3, 0),
        ("s0", "lora_B", 32, 2, 5, 0),
        ("s0", "diagonal", 64, 2, 1, 0),
        ("s2", "lora_A", 96, 1, 8, 2),
        ("s2", "lora_B", 128, 1, 8, 2),
        ("s2", "diagonal", 160, 1, 1, 2),
    ]
    assert layout.size == 192
    assert layout.num_trained == 2 * (3 + 5 + 1) + (8 + 8 + 1)


def test_heads_of_a_matrix_share_its_blocks():
    heads = [Site(f"q:head.{h}", "q", 6, 4, kind="head", head=h, start=4 * h) for h in range(3)]
    table = RankTable.start([*heads, Site("o", "o", 4, 4)], [1, 0, 2, 1])
    layout = ArenaLayout(table, Lora().entries)
    assert [(b.module, b.part, b.rows) for b in layout.blocks[:2]] == [("q", "lora_A", 3), ("q", "lora_B", 3)]
    flat = random_flat(layout)
    block = layout.blocks[0].of(flat)
    assert torch.equal(layout.site_rows(flat, 0)["lora_A"], block[:1])
    assert layout.site_rows(flat, 1)["lora_A"].shape == (0, 6)
    assert torch.equal(layout.site_rows(flat, 2)["lora_A"], block[1:])


@pytest.mark.parametrize("parts", [DIAGONAL.entries, Lora().entries], ids=["diagonal", "plain"])
def test_blocks_are_aligned_and_apart(parts):
    table, numbers = RankTable.start(SITES, [4, 4, 4, 4, 4]), np.random.default_rng(0)
    for _ in range(30):
        table = random_plan(table, numbers).apply(table)
        layout = ArenaLayout(table, parts)
        assert all(4 * b.offset % 128 == 0 for b in layout.blocks)
        assert all(a.stop <= b.offset for a, b in zip(layout.blocks, layout.blocks[1:], strict=False))
        assert layout.size % ALIGNMENT == 0
        # A component owns one row in each block of its matrix.
        owned = torch.zeros(table.total, dtype=torch.int64)
        for block in layout.blocks:
            owned[block.first : block.first + block.rows] += 1
        assert set(owned.tolist()) <= {len(parts(SITES[0]))}


def test_rank_zero_site_holds_no_number():
    full = ArenaLayout(RankTable.start(SITES[:2], [3, 4]), DIAGONAL.entries)
    empty = ArenaLayout(RankTable.start(SITES[:2], [3, 0]), DIAGONAL.entries)
    assert {b.module for b in empty.blocks} == {"s0"}
    assert empty.num_trained == full.num_trained - 4 * (16 + 16 + 1)
    assert {p: tuple(r.shape) for p, r in empty.site_rows(torch.zeros(empty.size), 1).items()} == {
        "lora_A": (0, 16),
        "lora_B": (0, 16),
        "diagonal": (0, 1),
    }


def test_all_zero_table_keeps_an_untrained_gap():
    layout = ArenaLayout(RankTable.start(SITES, [0] * 5), DIAGONAL.entries)
    assert (layout.blocks, layout.size, layout.num_trained) == ((), ALIGNMENT, 0)
    assert layout.views(torch.zeros(layout.size, requires_grad=True)) == {}
    assert Shard(layout, 0, 1).size == 0
    shard = Shard(layout, 1, 3)
    assert shard.take(torch.zeros(layout.size)).numel() == 0


def test_views_carry_the_gradient_into_one_flat_tensor():
    layout = ArenaLayout(RankTable.start(SITES, [3, 0, 2, 1, 4]), DIAGONAL.entries)
    leaf = random_flat(layout).requires_grad_()
    views = layout.views(leaf)
    assert set(views) == {"s0", "s2", "s3", "s4"}
    factors = random_flat(layout, seed=9)
    wanted = {b: b.of(factors) for b in layout.blocks}
    sum((views[b.module][b.part] * w).sum() for b, w in wanted.items()).backward()
    assert equal_bits(leaf.grad, factors)  # gaps get none
    for block in layout.blocks:
        view = views[block.module][block.part]
        assert equal_bits(view.detach(), block.of(leaf.detach()))
        assert view.data_ptr() == leaf.data_ptr() + 4 * block.offset  # no copy


# ---- repacking ----


def test_sources_follow_births():
    old = RankTable.start(sites_of((4, 4), (4, 4)), [3, 2])
    new = RankPlan(old.digest, {0: SiteChange((2, 0), 1), 1: SiteChange((1,), 0)}).apply(old)
    assert sources(old, new).tolist() == [2, 0, -1, 4]
    assert repack_components(torch.arange(5.0), sources(old, new)).tolist() == [2.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize("method", [DIAGONAL, Lora()], ids=["diagonal", "plain"])
def test_survivors_keep_every_bit_over_random_plans(method):
    table, numbers = RankTable.start(SITES, [4, 5, 3, 6, 2]), np.random.default_rng(1)
    layout = ArenaLayout(table, method.entries)
    snapshot = snapshot_of(table, layout)
    for step in range(25):
        plan = random_plan(table, numbers)
        after, new = repack_snapshot(snapshot, layout, plan, method.init, seed=3, step=step)
        assert after.table == plan.apply(table)
        assert after.full.steps == 17
        flats = [(snapshot.full.master, after.full.master), (snapshot.full.exp_avg, after.full.exp_avg)]
        flats += [(snapshot.full.exp_avg_sq, after.full.exp_avg_sq)]
        flats += [(snapshot.entries[n], after.entries[n]) for n in snapshot.entries]
        for number, (a, b) in enumerate(flats):
            before, behind = rows_by_identity(a, layout), rows_by_identity(b, new)
            for key, row in behind.items():
                if key in before:
                    assert equal_bits(row, before[key]), key
                elif number not in (0, 2):  # first moment and statistics of the newborn
                    assert not row.any()
            assert not b[gaps(new)].any()
        where = sources(table, after.table)
        alive = where >= 0
        assert torch.equal(after.age[alive], snapshot.age[where[alive]])
        assert not after.age[~alive].any()
        for name, values in snapshot.components.items():
            assert equal_bits(after.components[name][alive], values[where[alive]])
            assert not after.components[name][~alive].any()
        assert equal_bits(after.sites["alpha"], snapshot.sites["alpha"])
        table, layout, snapshot = after.table, new, after


def gaps(layout):
    """[N] bool, the places that no block holds."""
    out = torch.ones(layout.size, dtype=torch.bool)
    for block in layout.blocks:
        out[block.offset : block.stop] = False
    return out


def test_identity_plan_keeps_the_whole_snapshot():
    table = RankTable.start(SITES, [4, 0, 3, 6, 2])
    layout = ArenaLayout(table, DIAGONAL.entries)
    snapshot = snapshot_of(table, layout)
    after, new = repack_snapshot(snapshot, layout, identity_plan(table), DIAGONAL.init, seed=3, step=5)
    assert new.blocks == layout.blocks
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert equal_bits(getattr(after.full, name), getattr(snapshot.full, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_repack_takes_any_dtype(dtype):
    old = RankTable.start(SITES[:2], [2, 1])
    layout = ArenaLayout(old, DIAGONAL.entries)
    flat = (random_flat(layout) * 8).to(dtype)
    new = ArenaLayout(RankPlan(old.digest, {0: SiteChange((1,))}).apply(old), DIAGONAL.entries)
    out = repack(flat, layout, new)
    assert out.dtype == dtype
    assert torch.equal(new.site_rows(out, 0)["lora_A"][0], layout.site_rows(flat, 0)["lora_A"][1])


def test_masked_diagonal_becomes_zero_and_keeps_its_moments():
    table = RankTable.start(SITES, [4, 2, 3, 6, 2])
    layout = ArenaLayout(table, DIAGONAL.entries)
    snapshot = snapshot_of(table, layout)
    plan = RankPlan(table.digest, {0: SiteChange((3, 1, 0), 0, zero=(0, 3)), 3: SiteChange(tuple(range(6)), zero=(2,))})
    after, new = repack_snapshot(snapshot, layout, plan, DIAGONAL.init, seed=0, step=0)
    before = rows_by_identity(snapshot.full.master, layout)
    for key, row in rows_by_identity(after.full.master, new).items():
        masked = key in {(0, 0, "diagonal"), (0, 3, "diagonal"), (3, 2, "diagonal")}
        assert row.tolist() == [0.0] if masked else equal_bits(row, before[key])
    moments = rows_by_identity(snapshot.full.exp_avg, layout)
    for key, row in rows_by_identity(after.full.exp_avg, new).items():
        assert equal_bits(row, moments[key])


# ---- the newborn ----


def grown(changes, *, seed=3, step=11, method=DIAGONAL, ranks=(4, 5, 3, 3, 2)):
    table = RankTable.start(SITES, ranks)
    layout = ArenaLayout(table, method.entries)
    snapshot = snapshot_of(table, layout)
    plan = RankPlan(table.digest, changes)
    return snapshot, layout, *repack_snapshot(snapshot, layout, plan, method.init, seed=seed, step=step)


def test_newborn_contribution_is_exactly_zero():
    for method, part in ((DIAGONAL, "diagonal"), (Lora(), "lora_B")):
        _, _, after, new = grown({1: SiteChange((0, 1), 4), 2: SiteChange((), 2)}, method=method)
        assert not new.site_rows(after.full.master, 1)[part][2:].any()
        assert not new.site_rows(after.full.master, 2)[part].any()
        assert new.site_rows(after.full.master, 1)["lora_A"][2:].abs().min() > 0


def test_newborn_are_orthogonal_and_as_long_as_the_survivors_on_average():
    snapshot, layout, after, new = grown({i: SiteChange((0, 2), 2) for i in range(5) if i != 4})
    for index in range(4):
        rows, survivors = new.site_rows(after.full.master, index), layout.site_rows(snapshot.full.master, index)
        for part in ("lora_A", "lora_B"):
            old, born = rows[part][:2].double(), rows[part][2:].double()
            cosines = torch.nn.functional.normalize(born) @ torch.nn.functional.normalize(old).T
            assert cosines.abs().max() < 1e-6
            between = torch.nn.functional.normalize(born[:1]) @ torch.nn.functional.normalize(born[1:]).T
            assert between.abs().max() < 1e-6
            wanted = survivors[part][[0, 2]].double().norm(dim=1).mean()
            assert born.norm(dim=1).tolist() == pytest.approx([wanted.item()] * 2, rel=1e-6)


def test_newborn_of_unit_norm_on_request():
    _, _, after, new = grown({0: SiteChange((0, 1), 1)}, method=elalora(newborn_norm="unit"))
    rows = new.site_rows(after.full.master, 0)
    assert rows["lora_A"][2].norm().item() == pytest.approx(1.0, rel=1e-6)
    assert rows["lora_B"][2].norm().item() == pytest.approx(1.0, rel=1e-6)


def test_growth_to_the_largest_rank_is_still_orthogonal():
    _, _, after, new = grown({3: SiteChange((0, 1, 2), 3)})
    rows = torch.nn.functional.normalize(new.site_rows(after.full.master, 3)["lora_A"].double())
    assert (rows[3:] @ rows.T - torch.eye(6, dtype=torch.float64)[3:]).abs().max() < 1e-6


def test_newborn_second_moment_is_the_mean_of_the_sites_survivors():
    snapshot, layout, after, new = grown({0: SiteChange((0, 2, 3), 2)})
    old, rows = layout.site_rows(snapshot.full.exp_avg_sq, 0), new.site_rows(after.full.exp_avg_sq, 0)
    for part in ("lora_A", "lora_B", "diagonal"):
        wanted = old[part][[0, 2, 3]].double().mean(dim=0).float()  # the one that left does not count
        assert equal_bits(rows[part][3], wanted)
        assert equal_bits(rows[part][4], wanted)


def test_without_survivors_the_second_moment_is_that_of_sites_of_the_same_width():
    snapshot, layout, after, new = grown({1: SiteChange((), 2), 4: SiteChange((1,), 1)})
    rows, other = new.site_rows(after.full.exp_avg_sq, 1), layout.site_rows(snapshot.full.exp_avg_sq, 4)
    # Only site 4 has rows of 16 numbers that survive; its own newborn does not count.
    assert equal_bits(rows["lora_A"][0], other["lora_A"][1])
    assert equal_bits(rows["lora_B"][1], other["lora_B"][1])
    every = torch.cat([new.site_rows(after.full.exp_avg_sq, i)["diagonal"] for i in (0, 2, 3)]).double()
    wanted = (every.sum() + other["diagonal"][1].double()) / (len(every) + 1)
    assert rows["diagonal"][0].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_second_moment_without_any_survivor_is_zero():
    layout = ArenaLayout(RankTable.start(SITES[:1], [3]), DIAGONAL.entries)
    flat = torch.zeros(layout.size)
    fill_newborn_second_moment(flat, layout, torch.ones(3, dtype=torch.bool))
    assert not flat.any()


def test_newborn_are_a_function_of_seed_step_and_site():
    change = {1: SiteChange((0, 1), 2)}
    first = rows_by_identity(*grown_master(change))
    again = rows_by_identity(*grown_master(change))
    assert all(equal_bits(first[key], again[key]) for key in first)
    born = (1, 5, "lora_A")
    for other in ({"seed": 4}, {"step": 12}):
        assert not torch.equal(rows_by_identity(*grown_master(change, **other))[born], first[born])


def grown_master(changes, **names):
    _, _, after, new = grown(changes, **names)
    return after.full.master, new


def test_newborn_do_not_depend_on_other_sites():
    alone = rows_by_identity(*grown_master({1: SiteChange((0, 1), 2)}))
    together = rows_by_identity(*grown_master({0: SiteChange((), 3), 1: SiteChange((0, 1), 2), 4: SiteChange((0,), 1)}))
    for part in ("lora_A", "lora_B", "diagonal"):
        for birth in (5, 6):
            assert equal_bits(alone[1, birth, part], together[1, birth, part])
    # Equal shapes, other names: other vectors.
    both = rows_by_identity(*grown_master({1: SiteChange((), 1), 4: SiteChange((), 1)}))
    assert not torch.equal(both[1, 5, "lora_A"], both[4, 2, "lora_A"])


def test_global_random_numbers_are_neither_used_nor_moved():
    state = torch.random.get_rng_state()
    grown({1: SiteChange((0, 1), 2)})
    torch.rand(1)
    torch.random.set_rng_state(state)
    before = torch.random.get_rng_state()
    layout = ArenaLayout(RankTable.start(SITES, [1] * 5), DIAGONAL.entries)
    fill_newborn(torch.zeros(layout.size), layout, torch.ones(5, dtype=torch.bool), DIAGONAL.init, seed=0, step=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_start_snapshot_is_newborn_at_step_minus_one():
    table = RankTable.start(SITES, [4, 0, 3, 6, 2])
    layout = ArenaLayout(table, DIAGONAL.entries)
    snapshot = start_snapshot(table, layout, DIAGONAL.init, seed=5)
    wanted = torch.zeros(layout.size)
    fill_newborn(wanted, layout, torch.ones(15, dtype=torch.bool), DIAGONAL.init, seed=5, step=-1)
    assert equal_bits(snapshot.full.master, wanted)
    assert not snapshot.full.exp_avg.any() and not snapshot.full.exp_avg_sq.any() and not snapshot.age.any()
    assert snapshot.full.exp_avg.data_ptr() != snapshot.full.exp_avg_sq.data_ptr()


# ---- shards ----

LAYOUTS = {
    "mixed": ArenaLayout(RankTable.start(SITES, [4, 5, 3, 6, 2]), DIAGONAL.entries),
    "empty sites": ArenaLayout(RankTable.start(SITES, [0, 7, 0, 0, 1]), DIAGONAL.entries),
    "plain": ArenaLayout(RankTable.start(SITES, [4, 5, 3, 6, 2]), Lora().entries),
    # Rows of one number: a shard's cut inside one block must not join the next one.
    "tiny": ArenaLayout(RankTable.start(sites_of((1, 1), (2, 2), (1, 1)), [1, 2, 1]), DIAGONAL.entries),
    # Blocks that end on a boundary of 128 bytes, so that the next follows without a gap.
    "no gaps": ArenaLayout(RankTable.start(sites_of((32, 32), (64, 32)), [32, 32]), DIAGONAL.entries),
    "one component": ArenaLayout(RankTable.start(sites_of((5, 5)), [1]), DIAGONAL.entries),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("count", range(1, 8))
def test_shards_partition_the_components(layout, count):
    shards = [Shard(layout, i, count) for i in range(count)]
    covered = [c for s in shards for c in range(s.start, s.stop)]
    assert covered == list(range(layout.table.total))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("count", range(1, 8))
def test_take_and_put_through_zeros_give_the_arena_back(layout, count):
    flat = random_flat(layout)
    total = torch.zeros(layout.size)
    for index in range(count):
        shard = Shard(layout, index, count)
        local = shard.take(flat)
        assert local.numel() == shard.size
        own = torch.zeros(layout.size)
        shard.put(local.clone(), own)
        assert not (own.ne(0) & total.ne(0)).any()  # each number on one process
        total += own
    assert equal_bits(total, flat)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("count", range(1, 8))
def test_scores_of_shards_add_up_to_the_single_shards_bits(layout, count):
    mean, spread = random_flat(layout, 1).abs(), random_flat(layout, 2).abs()
    whole = Shard(layout, 0, 1)
    wanted = component_scores(whole, whole.take(mean), whole.take(spread), layout.table.total)
    total = torch.zeros_like(wanted)
    for index in range(count):
        shard = Shard(layout, index, count)
        own = component_scores(shard, shard.take(mean).clone(), shard.take(spread).clone(), layout.table.total)
        assert not own[: shard.start].any() and not own[shard.stop :].any()
        total += own
    assert equal_bits(total, wanted)


def test_shards_are_of_about_equal_size():
    layout = ArenaLayout(RankTable.start(sites_of(*[(64, 64), (64, 200)] * 6), [8] * 12), DIAGONAL.entries)
    sizes = [Shard(layout, i, 4).size for i in range(4)]
    assert max(sizes) - min(sizes) <= 2 * (64 + 200 + 1) + 20 * ALIGNMENT


def test_a_table_without_sites_has_an_empty_layout():
    """Full fine-tuning's."""
    table = RankTable.start((), ())
    assert table.sites.modules == ()
    assert ArenaLayout(table, lambda site: {}).num_trained == 0
