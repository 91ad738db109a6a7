import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ardtrain.ranks import RankPlan, RankTable, SiteChange, identity_plan, named_seed, prune_and_grow
from tests.tiny import random_plan, sites_of

SITES = sites_of((4, 3), (2, 8), (5, 5))


def table(*ranks):
    return RankTable.start(SITES, ranks)


def test_start_numbers_components_from_zero():
    t = table(2, 0, 3)
    assert t.births == ((0, 1), (), (0, 1, 2))
    assert t.next_birth == (2, 0, 3)
    assert (t.ranks, t.offsets, t.total) == ((2, 0, 3), (0, 2, 2, 5), 5)
    assert t.by_name() == {"s0": 2, "s1": 0, "s2": 3}
    assert [s.max_rank for s in SITES] == [3, 2, 5]


def test_newborn_get_numbers_that_were_never_used():
    t = table(2, 1, 3)
    t = RankPlan(t.digest, {2: SiteChange(keep=(2, 0), born=2)}).apply(t)
    assert t.births == ((0, 1), (0,), (2, 0, 3, 4))
    t = RankPlan(t.digest, {2: SiteChange(keep=(0, 1), born=1)}).apply(t)  # 3 and 4 leave, their numbers stay used
    assert t.births[2] == (2, 0, 5)
    assert t.next_birth == (2, 1, 6)


@pytest.mark.parametrize(
    ("births", "following", "text"),
    [
        (((0, 0), (), ()), (1, 0, 0), "s0: a birth number twice"),
        (((0, 2), (), ()), (2, 0, 0), "s0: a birth number beyond next_birth"),
        (((0, 1, 2, 3), (), ()), (4, 0, 0), "s0: rank 4 > 3"),
    ],
)
def test_table_keeps_its_invariants(births, following, text):
    with pytest.raises(AssertionError, match=text):
        RankTable.of(SITES, births, following)


def test_plan_is_valid_against_exactly_one_table():
    t, other = table(2, 1, 3), table(2, 2, 3)
    plan = prune_and_grow(t, [(0, 1)], [2], reason="test")
    assert plan.apply(t).ranks == (1, 1, 4)
    with pytest.raises(ValueError, match="plan made for table .* plan again"):
        plan.apply(other)
    with pytest.raises(ValueError, match="plan made for table .* plan again"):
        plan.apply(plan.apply(t))  # nor twice


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (SiteChange((0, 0)), r"s0: keep=\(0, 0\) must be distinct positions below its rank 2"),
        (SiteChange((0, 2)), r"s0: keep=\(0, 2\) must be distinct positions below its rank 2"),
        (SiteChange((0, -1)), r"s0: keep=\(0, -1\) must be distinct"),
        (SiteChange((0, 1), zero=(2,)), r"s0: zero=\(2,\) must be distinct positions below its rank 2"),
        (SiteChange((0, 1), born=2), r"s0: rank 4 after the plan; allowed 0 .. 3 \(min\(in, out\)\)"),
        (SiteChange((0, 1), born=-1), r"s0: rank 1 after the plan"),
    ],
)
def test_bad_change_is_refused(change, text):
    t = table(2, 1, 3)
    with pytest.raises(ValueError, match=text):
        RankPlan(t.digest, {0: change}).apply(t)


def test_identity_plan_changes_nothing():
    t = table(2, 1, 3)
    plan = identity_plan(t)
    assert plan.apply(t) == t
    assert not plan.reshapes(t)


def test_only_shape_or_order_changes_reshape():
    t = table(2, 1, 3)
    assert not RankPlan(t.digest, {0: SiteChange((0, 1), zero=(1,))}).reshapes(t)
    assert not RankPlan(t.digest, {0: SiteChange((0, 1))}).reshapes(t)
    assert RankPlan(t.digest, {0: SiteChange((1, 0))}).reshapes(t)
    assert RankPlan(t.digest, {0: SiteChange((0,))}).reshapes(t)
    assert RankPlan(t.digest, {0: SiteChange((0, 1), born=1)}).reshapes(t)


def test_prune_and_grow_counts_each_mention():
    t = table(3, 1, 3)
    plan = prune_and_grow(t, [(0, 2), (0, 0), (2, 1)], [2, 1, 2], reason="why", scores={"cut": 0.5})
    assert plan.changes == {0: SiteChange((1,)), 1: SiteChange((0,), 1), 2: SiteChange((0, 2), 2)}
    assert (plan.reason, plan.scores) == ("why", {"cut": 0.5})
    assert plan.apply(t).births == ((1,), (0, 1), (0, 2, 3, 4))


def test_table_digest_tells_every_difference():
    t = table(2, 1, 3)
    others = [
        table(2, 1, 2),
        RankTable.of(t.sites, ((1, 0), (0,), (0, 1, 2)), t.next_birth),
        RankTable.of(t.sites, t.births, (3, 1, 3)),
        *(
            RankTable.of((replace(SITES[0], **change), *SITES[1:]), t.births, t.next_birth)
            for change in ({"name": "x"}, {"in_features": 5}, {"out_features": 4}, {"scaling": 2.0000000000000004})
        ),
    ]
    assert len({t.digest, *(o.digest for o in others)}) == 1 + len(others)
    assert table(2, 1, 3).digest == t.digest


def test_plan_digest_tells_every_difference():
    t = table(2, 1, 3)
    change = SiteChange((0,), 1)
    plans = [
        RankPlan(t.digest, {0: change}, "r", {"a": 1.0}),
        RankPlan(table(1, 1, 3).digest, {0: change}, "r", {"a": 1.0}),
        RankPlan(t.digest, {1: change}, "r", {"a": 1.0}),
        RankPlan(t.digest, {0: SiteChange((1,), 1)}, "r", {"a": 1.0}),
        RankPlan(t.digest, {0: SiteChange((0,), 2)}, "r", {"a": 1.0}),
        RankPlan(t.digest, {0: SiteChange((0,), 1, zero=(0,))}, "r", {"a": 1.0}),
        RankPlan(t.digest, {0: change}, "r", {"a": np.nextafter(1.0, 2.0)}),  # one bit of one score
        RankPlan(t.digest, {0: change}, "r", {"b": 1.0}),
    ]
    assert len({p.digest for p in plans}) == len(plans)
    one, two = SiteChange((0,)), SiteChange((), 1)
    assert RankPlan(t.digest, {0: one, 1: two}).digest == RankPlan(t.digest, {1: two, 0: one}).digest


def test_json_round_trip_through_text():
    t, numbers = table(2, 1, 3), np.random.default_rng(0)
    for _ in range(20):
        t = random_plan(t, numbers).apply(t)
        again = RankTable.from_json(json.loads(json.dumps(t.to_json())), SITES)
        assert again == t
        assert again.digest == t.digest


def test_json_of_other_sites_is_refused():
    stored = table(2, 1, 3).to_json()
    with pytest.raises(ValueError, match=r"differ from this run's \(s1 against s2; 3 against 3\): target_modules"):
        RankTable.from_json(stored, [SITES[0], SITES[2], SITES[1]])
    with pytest.raises(ValueError, match=r"\(their number; 3 against 2\)"):
        RankTable.from_json(stored, SITES[:2])


def test_named_seed_is_the_same_on_every_process():
    expected = [named_seed(7, 3, "model.q_proj"), named_seed(7, -1, "x")]
    assert len({*expected, named_seed(7, 4, "model.q_proj"), named_seed("7", 3, "model.q_proj")}) == 4
    assert all(0 <= s < 2**63 for s in expected)
    code = "from ardtrain.ranks import named_seed as s; print(s(7, 3, 'model.q_proj'), s(7, -1, 'x'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(s) for s in expected]
