from dataclasses import replace

import numpy as np
import pytest
import torch

from ardtrain.arena import ArenaLayout, Shard
from ardtrain.methods.adalora import AdaLora, AdaLoraSettings, by_site, lowest, mask_plan
from ardtrain.methods.base import Binding, Statistics
from ardtrain.ranks import RankTable
from ardtrain.schedule import falling_budget
from tests.tiny import HeldOutBatches, equal_bits, sites_of, tiny_trainer

ADALORA = AdaLoraSettings(
    total_steps=20,
    target_r=2,
    tinit=3,
    tfinal=5,
    deltaT=2,
    beta1=0.85,
    beta2=0.85,
    orth_reg_weight=0.5,
    reg_orth_form="mean_norm",
    compact="end",
)
EVENTS = [4, 6, 8, 10, 12, 14]  # of ADALORA: 3 < t < 20 - 5, even; the mask is fixed at step 15


def adalora(**changes):
    return AdaLora(replace(ADALORA, **changes))


def bound(method, ranks=(4, 4, 4)):
    """The method bound to one process's shard of a fresh arena; returns the layout."""
    table = RankTable.start(sites_of((6, 5), (4, 8), (7, 7)), ranks)
    layout = ArenaLayout(table, method.entries)
    bind(method, table, layout, torch.zeros(table.total, dtype=torch.float64))
    return layout


def bind(method, table, layout, masked):
    shard = Shard(layout, 0, 1)
    state = {"mean": torch.zeros(shard.size), "spread": torch.zeros(shard.size), "masked": masked}
    method.bind(Binding(table, shard, torch.zeros(table.total, dtype=torch.int64), state))


def masked_by(plan, table):
    """Components whose diagonals the plan sets to 0; it must do nothing else."""
    assert not plan.reshapes(table) and plan.apply(table) == table
    return {table.offsets[i] + p for i, change in plan.changes.items() for p in change.zero}


def scores_of(seed, count=12, levels=1_000_000):
    return torch.tensor(np.random.default_rng(seed).integers(0, levels, size=count), dtype=torch.float64)


# ---- the cut ----


@pytest.mark.parametrize("levels", [1, 3, 1000], ids=["all tied", "many ties", "few ties"])
def test_exactly_the_lowest_by_score_site_and_position(levels):
    numbers = np.random.default_rng(levels)
    for _ in range(50):
        values = numbers.integers(0, levels, size=int(numbers.integers(2, 40))).astype(float)
        count = int(numbers.integers(1, len(values)))
        wanted = sorted(range(len(values)), key=lambda i: (values[i], i))
        found, cut = lowest(torch.tensor(values), count)
        assert found == sorted(wanted[:count])
        assert cut == {"highest_masked": values[wanted[count - 1]], "lowest_kept": values[wanted[count]]}


def test_threshold_that_ties_masks_no_more_than_the_budget_says():
    """The published `score <= kthvalue` would mask all twelve (methods.md 4.3, edge)."""
    method = adalora()
    table = bound(method).table
    masked = masked_by(method.plan(4, torch.ones(12, dtype=torch.float64)), table)
    assert masked == {0, 1}  # b(4) = floor(6 + 6 * (11 / 12)^3) = floor(10.62)


def test_components_find_their_sites_past_ranks_of_zero():
    table = RankTable.start(sites_of((3, 3), (3, 3), (3, 3), (3, 3)), [0, 3, 0, 2])
    assert by_site(table, [0, 2, 3, 4]) == {1: [0, 2], 3: [0, 1]}


def test_mask_plan_touches_only_sites_with_a_masked_component():
    table = RankTable.start(sites_of((3, 3), (3, 3), (3, 3)), [3, 3, 3])
    plan = mask_plan(table, [0, 7, 8], scores={"lowest_kept": 2.0})
    assert set(plan.changes) == {0, 2}
    assert plan.changes[2].zero == (1, 2) and plan.changes[2].keep == (0, 1, 2) and plan.changes[2].born == 0
    assert (plan.reason, plan.scores, plan.again) == ("adalora: masked 3, budget 6", {"lowest_kept": 2.0}, False)


# ---- which steps, how many ----


def test_events_lie_between_the_phases_and_then_at_every_step():
    method = adalora()
    bound(method)
    assert [t for t in range(20) if method.due(t)] == [*EVENTS, 15, 16, 17, 18, 19]


def test_steps_and_budgets_are_those_of_peft():
    """Its schedule is asked whether to mask and for how many; the final phase begins one step later in it, by force."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    for tinit, tfinal, interval, total in ((3, 5, 2, 20), (0, 4, 3, 30), (10, 20, 7, 110)):
        method = adalora(tinit=tinit, tfinal=tfinal, deltaT=interval, total_steps=total)
        bound(method)
        theirs = object.__new__(RankAllocator)
        theirs.peft_config = AdaLoraConfig(tinit=tinit, tfinal=tfinal, deltaT=interval, total_step=total)
        theirs.init_bgt, theirs.target_bgt = 12, 6
        for step in range(total):
            budget, masks = theirs.budget_schedule(step)
            masks = (masks or step == total - tfinal) and budget < 12
            assert method.due(step) == masks, (tinit, step)
            assert not masks or method.num_masked(step) == 12 - budget


def test_every_mask_masks_as_many_as_the_budget_leaves_over():
    method = adalora(deltaT=1)
    table = bound(method).table
    counts = []
    for step in range(4, 15):
        masked = masked_by(method.plan(step, scores_of(step)), table)
        budget = falling_budget(step, first=12, last=6, total_steps=20, tinit=3, tfinal=5)
        assert len(masked) == 12 - budget
        counts.append(len(masked))
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == 6


def test_target_of_the_first_rank_masks_nothing():
    """Both published codes fail here, in kthvalue(k=0)."""
    method = adalora(target_r=4)
    bound(method)
    assert not any(method.due(t) for t in range(20))


def test_target_beyond_the_first_ranks_is_refused():
    text = (
        r"adalora.target_r=5 asks for 15 components over 3 sites, but the run starts with 12; lower adalora.target_r "
        r"or raise r"
    )
    with pytest.raises(ValueError, match=text):
        bound(adalora(target_r=5))


def test_phases_that_meet_are_refused_at_once():
    with pytest.raises(ValueError, match=r"adalora.tinit=15 \+ adalora.tfinal=5 leave no step of 20"):
        adalora(tinit=15)


# ---- scores ----


def test_averages_by_hand():
    """methods.md 2.9.1: I = 0.1, then 0.2."""
    method = adalora()
    layout = bound(method)
    ones, state = torch.ones(layout.size), method.binding.state
    for gradient, mean, spread in ((0.1, 0.015, 0.01275), (0.2, 0.04275, 0.034425)):
        method.observe(0, Statistics(ones * gradient, ones))
        assert state["mean"].tolist() == pytest.approx([mean] * len(state["mean"]), rel=1e-6)
        assert state["spread"].tolist() == pytest.approx([spread] * len(state["mean"]), rel=1e-6)
    # Every entry alike: E's own score, B's mean and A's mean are one number each.
    assert method.local_scores(0).tolist() == pytest.approx([3 * 0.00147166875] * 12, rel=1e-5)


def test_averages_move_before_tinit_and_stop_in_the_final_phase():
    method = adalora()
    layout = bound(method)
    ones = Statistics(torch.ones(layout.size), torch.ones(layout.size))
    seen = []
    for step in (0, 14, 15, 19):
        method.observe(step, ones)
        seen.append(method.binding.state["mean"].clone())
    assert seen[0].any()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[1], seen[3])


# ---- the fixed mask and the end ----


def test_fixed_mask_stays_whatever_the_scores_say():
    method = adalora()
    table = bound(method).table
    fixing = method.plan(15, scores_of(1))
    masked = masked_by(fixing, table)
    assert len(masked) == 6 and not fixing.again
    assert torch.nonzero(method.binding.state["masked"]).flatten().tolist() == sorted(masked)
    for step in (16, 17, 18):
        assert method.local_scores(step) is None
        plan = method.plan(step, scores_of(step) if step == 17 else None)
        assert masked_by(plan, table) == masked and plan.again


def test_fixed_mask_is_found_again_in_the_state():
    method, resumed = adalora(), adalora()
    layout = bound(method)
    masked = masked_by(method.plan(15, scores_of(1)), layout.table)
    bind(resumed, layout.table, layout, method.binding.state["masked"].clone())
    assert resumed.local_scores(16) is None
    assert resumed.plan(16, None) == method.plan(16, None)
    assert masked_by(resumed.plan(17, None), layout.table) == masked


def kept_by(plan, table):
    gone = {i: set(range(table.ranks[i])) - set(change.keep) for i, change in plan.changes.items()}
    assert not any(change.zero or change.born for change in plan.changes.values())
    return set(range(table.total)) - {table.offsets[i] + p for i, positions in gone.items() for p in positions}


def test_last_step_removes_what_the_mask_masks():
    method = adalora()
    layout = bound(method)
    table = layout.table
    masked = masked_by(method.plan(15, scores_of(1)), table)
    plan = method.plan(19, None)
    assert kept_by(plan, table) == set(range(12)) - masked
    after = plan.apply(table)
    assert after.total == 6 and plan.reason == "adalora: removed 6 masked"
    bind(method, after, ArenaLayout(after, method.entries), torch.zeros(6, dtype=torch.float64))
    assert not any(method.due(t) for t in range(15, 20))


def test_freeze_removes_at_once_and_masks_no_more():
    method = adalora(compact="freeze")
    table = bound(method).table
    lowest_six, _ = lowest(scores_of(1), 6)
    plan = method.plan(15, scores_of(1))
    assert kept_by(plan, table) == set(range(12)) - set(lowest_six)
    after = plan.apply(table)
    bind(method, after, ArenaLayout(after, method.entries), torch.zeros(6, dtype=torch.float64))
    assert not any(method.due(t) for t in range(16, 20))


@pytest.mark.parametrize("compact", ["end", "freeze"])
def test_run_without_final_phase_is_fixed_and_compacted_by_its_last_step(compact):
    method = adalora(tfinal=0, compact=compact)
    table = bound(method).table
    assert [t for t in range(20) if method.due(t)] == [*EVENTS, 16, 18, 19]
    assert method.num_masked(19) == 6
    assert method.plan(19, scores_of(1)).apply(table).total == 6


def test_void_fixing_step_leaves_the_fixing_to_the_next():
    """A void step asks for no plan."""
    method = adalora()
    table = bound(method).table
    assert method.local_scores(16) is not None
    plan = method.plan(16, scores_of(1))
    assert len(masked_by(plan, table)) == 6 and not plan.again
    assert method.local_scores(17) is None


# ---- first weights and the penalty ----


def test_first_weights():
    site = sites_of((400, 300))[0]
    nothing = {"lora_A": torch.zeros(0, 400), "lora_B": torch.zeros(0, 300), "diagonal": torch.zeros(0, 1)}
    rows = adalora().init(site, nothing, 8, torch.Generator().manual_seed(0))
    assert {part: tuple(r.shape) for part, r in rows.items()} == {
        "lora_A": (8, 400),
        "lora_B": (8, 300),
        "diagonal": (8, 1),
    }
    assert not rows["diagonal"].any()
    for part in ("lora_A", "lora_B"):
        assert rows[part].std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(rows[part].mean().item()) < 0.002


@pytest.mark.parametrize("form", ["mean_norm", "squared"])
def test_extra_loss_is_the_penalty_on_a_and_b_only(form):
    method = adalora(orth_reg_weight=0.3, reg_orth_form=form)
    layout = bound(method)
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    views = layout.views(flat)
    loss = method.extra_loss(views)
    matrices = [views[m][p] for m in ("s0", "s1", "s2") for p in ("lora_A", "lora_B")]
    residuals = [np.linalg.norm((m @ m.T).detach().numpy() - np.eye(len(m))) for m in matrices]
    wanted = np.mean(residuals) if form == "mean_norm" else np.sum(np.square(residuals))
    assert loss.item() == pytest.approx(0.3 * wanted, rel=1e-5)
    loss.backward()
    for index in range(3):
        assert not layout.site_rows(flat.grad, index)["diagonal"].any()
        assert layout.site_rows(flat.grad, index)["lora_B"].any()


def test_no_weight_no_extra_loss():
    method = adalora(orth_reg_weight=0.0)
    layout = bound(method)
    assert method.extra_loss(layout.views(torch.zeros(layout.size, requires_grad=True))) is None


# ---- in the loop ----


@pytest.fixture
def trainers(world):
    """Makes trainers with AdaLoRA and ends their engines after the test."""
    made = []

    def make(start=True, **changes):
        settings = {name: changes.pop(name) for name in list(changes) if hasattr(ADALORA, name)}
        method = adalora(**settings)
        steps = method.settings.total_steps
        made.append(tiny_trainer(method, world=world, start=start, total_steps=steps, warmup_steps=0, **changes))
        return made[-1]

    yield make
    for trainer in made:
        trainer.arena.engine.destroy()


def diagonals(arena):
    """[R] all diagonals as the master has them."""
    master = arena.capture().full.master
    rows = [arena.layout.site_rows(master, i)["diagonal"].view(-1) for i in range(len(arena.table.sites))]
    return torch.cat(rows)


def test_masked_components_return_until_the_mask_is_fixed(trainers):
    """methods.md 4.3: as many zeros as the budget leaves over after an event, none after the step that follows."""
    trainer = trainers()
    sites, revived, before = len(trainer.arena.table.sites), set(), set()
    for step in range(19):
        result = trainer.train_step()
        zeros = set(torch.nonzero(diagonals(trainer.arena) == 0).flatten().tolist())
        if step in EVENTS:
            budget = falling_budget(step, first=4 * sites, last=2 * sites, total_steps=20, tinit=3, tfinal=5)
            assert zeros == masked_by(result.record.plan, trainer.arena.table)
            assert len(zeros) == 4 * sites - budget
            revived |= before - zeros
            before = zeros
        elif step >= 15:
            assert len(zeros) == 2 * sites
            assert (result.record is None) == (step > 15)  # re-masking is no event
            before = before if step > 15 else zeros
            assert zeros == before
        else:
            assert not zeros
            assert result.record is None
    assert revived  # some were masked at one event and not at the next
    assert trainer.arena.table.total == 4 * sites


def test_mask_keeps_everything_but_the_diagonals(trainers, monkeypatch):
    trainer = trainers()
    for _ in range(4):
        trainer.train_step()
    taken, apply = [], trainer.arena.apply

    def spy(plan, *, step):
        taken.append(trainer.arena.capture())
        return apply(plan, step=step)

    monkeypatch.setattr(trainer.arena, "apply", spy)
    record = trainer.train_step().record
    before, after = taken[0], trainer.arena.capture()
    assert equal_bits(before.full.exp_avg, after.full.exp_avg)
    assert equal_bits(before.full.exp_avg_sq, after.full.exp_avg_sq)
    assert equal_bits(before.age, after.age)
    assert all(equal_bits(before.entries[n], after.entries[n]) for n in ("mean", "spread"))
    for index in range(len(trainer.arena.table.sites)):
        old = trainer.arena.layout.site_rows(before.full.master, index)
        new = trainer.arena.layout.site_rows(after.full.master, index)
        assert equal_bits(old["lora_A"], new["lora_A"]) and equal_bits(old["lora_B"], new["lora_B"])
        zero = record.plan.changes[index].zero if index in record.plan.changes else ()
        for p in range(4):
            assert equal_bits(new["diagonal"][p], torch.zeros(1) if p in zero else old["diagonal"][p])
            assert old["diagonal"][p]


@pytest.mark.parametrize("compact", ["end", "freeze"])
def test_run_ends_with_the_target_number_of_components(trainers, compact):
    trainer = trainers(compact=compact)
    sites, records = len(trainer.arena.table.sites), []
    for _ in range(20):
        result = trainer.train_step()
        if result.record is not None:
            records.append((result.step, result.record.after.total))
    whole = [(t, 4 * sites) for t in EVENTS]
    last = [(15, 4 * sites), (19, 2 * sites)] if compact == "end" else [(15, 2 * sites)]
    assert records == whole + last
    assert trainer.arena.table.total == 2 * sites
    assert diagonals(trainer.arena).all()
    assert len(set(trainer.arena.table.ranks)) > 1


def test_removal_of_masked_components_leaves_the_function(trainers):
    """The step that compacts gives the held-out loss of one that only masks."""
    losses = []
    for compact in ("end", "freeze"):
        trainer = trainers(compact=compact)
        for _ in range(16):
            trainer.train_step()
        trainer.eval_data = HeldOutBatches(num_grains=2)
        losses.append(trainer.evaluate().loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("stop", [7, 15, 17], ids=["between events", "before the fixing", "in the final phase"])
def test_resumed_run_equals_the_unbroken_one(trainers, stop):
    unbroken, resumed = trainers(), trainers(start=False)
    for _ in range(stop):
        unbroken.train_step()
    resumed.arena.build(unbroken.arena.capture(), unbroken.arena.layout)
    resumed.state = replace(unbroken.state)
    for _ in range(20 - stop):
        a, b = unbroken.train_step(), resumed.train_step()
        assert a.loss == b.loss and (a.record is None) == (b.record is None)
    a, b = unbroken.arena.capture(), resumed.arena.capture()
    assert a.table == b.table
    assert equal_bits(a.full.master, b.full.master)
    assert all(equal_bits(a.entries[n], b.entries[n]) for n in a.entries)
