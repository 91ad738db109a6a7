"""A comparison: its file, which runs come next, statistics by hand-worked numbers, resume with a fake runner."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from matplotlib import image
from safetensors.torch import save_file

from ardtrain.compare import child, drawing, results, tables
from ardtrain.compare.plan import Failure, RunResult, choose_rate, counting_keys, least_runs, next_rate, next_runs
from ardtrain.compare.record import without_machine_paths
from ardtrain.compare.rows import dealt, refuse_common_rows, write_dealt
from ardtrain.compare.runner import Start, compare
from ardtrain.compare.suite import RunKey, SplitBlock, Suite, read_suite, run_config, run_mapping
from ardtrain.config import ConfigError, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
ELALORA = {"init_warmup": 1, "final_warmup": 2, "mask_interval": 2}


def mapping(folder, **changes):
    """A suite of lora and elalora, two rates, tuning on one seed, two seeds that count."""
    values = {
        "name": "small",
        "output_dir": str(folder / "out"),
        "base": {
            "model_name_or_path": "base",
            "r": 4,
            "data": {"train_file": "train.jsonl", "eval_file": str(folder / "test.jsonl")},
            "max_steps": 10,
        },
        "methods": {"lora": {"method": "lora"}, "elalora": {"method": "elalora", "settings": {"elalora": ELALORA}}},
        "learning_rates": [1e-3, 1e-2, 1e-1],
        "seeds": [1, 2],
        "tuning": {"eval_file": str(folder / "tune.jsonl")},
    }
    return values | changes


def suite_of(folder, **changes):
    return Suite.model_validate(mapping(folder, **changes))


def write_suite(folder, **changes):
    """Suite file and its held-out rows; returns the path."""
    (folder / "tune.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "test.jsonl").write_text('{"prompt": "c", "completion": "d"}\n')
    path = folder / "suite.yaml"
    path.write_text(json.dumps(mapping(folder, **changes)))
    return path


def result(key, value, *, parameters=1000, **fields):
    return RunResult(
        key.method, key.part, key.learning_rate, key.seed, str(key.folder), "d", {"eval_loss": value},
        parameters_final=parameters, parameters_peak=parameters, **fields,
    )  # fmt: skip


def tuned(suite, losses, method="lora"):
    """Outcomes of the method's tuning runs: rate -> loss of seed 0; None: diverged."""
    keys = {rate: RunKey(method, "tune", rate, 0) for rate in losses}
    return {keys[rate]: result(keys[rate], loss) for rate, loss in losses.items()}


# ---- the file ----


def test_a_run_is_base_then_method_then_the_suites_own(tmp_path):
    suite = suite_of(tmp_path)
    key = RunKey("elalora", "tune", 0.01, 7)
    written = run_mapping(suite, key)
    assert written["elalora"] == ELALORA and written["r"] == 4
    assert (written["method"], written["learning_rate"], written["seed"]) == ("elalora", 0.01, 7)
    assert written["output_dir"] == str(tmp_path / "out/elalora/lr-0.01/seed-7/tune")
    assert written["resume_from_checkpoint"] == "auto"
    assert written["data"] == {"train_file": "train.jsonl", "eval_file": str(tmp_path / "tune.jsonl")}
    assert run_mapping(suite, RunKey("lora", "test", 0.01, 1))["data"]["eval_file"] == str(tmp_path / "test.jsonl")
    assert suite.base["data"]["eval_file"] == str(tmp_path / "test.jsonl")  # the suite itself is as it was


def test_all_methods_see_the_same_rows_in_the_same_order(tmp_path):
    suite = suite_of(tmp_path)
    ours = [run_config(suite, RunKey(m, "test", rate, 1)) for m in suite.methods for rate in suite.rates(m)]
    order = [(c.seed, repr(c.data), c.max_length, c.packing, c.max_steps, c.global_batch_size) for c in ours]
    assert len(ours) == 6 and len(set(order)) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"methds": {}}, "methds is no setting; did you mean methods?"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type is no setting of a suite; write it in base"),
        ({"tuning": {"sedes": [0]}}, "tuning.sedes is no setting; did you mean tuning.seeds?"),
        (
            {"methods": {"lora": {"method": "lora", "r": 4}}},
            "methods.lora.r is no setting of a suite; write it in methods.lora.settings",
        ),
        ({"methods": {"lora": {"method": "lara"}}}, "methods.lora.method=lara must be"),
        ({"reference": "dora"}, "reference=dora is none of the methods; name one: lora, elalora"),
        ({"learning_rates": []}, "methods.lora has no learning rates"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"tuning": {"seeds": [2], "eval_file": "x"}}, r"tuning.seeds and seeds share \[2\]"),
        ({"tuning": {}}, "tuning needs rows: set split_eval, or tuning.eval_file and base.data.eval_file"),
        ({"split_eval": "all.jsonl"}, "split_eval stands beside"),
        ({"tuning": None, "split_eval": "all.jsonl"}, "split_eval deals rows for tuning"),
        ({"jobs": 0}, "jobs=0 must be greater than or equal to 1"),
        ({"name": "a/b"}, "name=a/b must match pattern"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        read_suite(write_suite(tmp_path, **changes))


@pytest.mark.parametrize(
    ("block", "settings", "text"),
    [
        ("base", {"seed": 3}, r"base.seed is set by the suite \(seeds\); remove it"),
        ("base", {"lr": 3}, r"base.learning_rate is set by the suite \(learning_rates\)"),
        ("base", {"max_stesp": 3}, "base: max_stesp is no setting; did you mean max_steps"),
        ("lora", {"max_length": 64}, "methods.lora.settings.max_length would give this method other rows"),
        ("lora", {"elalora": ELALORA}, "methods.lora: elalora is the block of another method"),
        ("elalora", {"elalora": ELALORA | {"c": 1}}, "methods.elalora: elalora.c is no setting"),
    ],
)
def test_mistakes_inside_runs_name_base_or_method(tmp_path, block, settings, text):
    values = mapping(tmp_path)
    target = values["base"] if block == "base" else values["methods"][block].setdefault("settings", {})
    target.update(settings)
    with pytest.raises(ConfigError, match=text) as found:
        read_suite(write_suite(tmp_path, **values))
    assert len(found.value.errors) == 1


def test_test_rows_are_not_for_tuning_or_allocation(tmp_path):
    values = mapping(tmp_path)
    test = values["base"]["data"]["eval_file"]
    with pytest.raises(ConfigError, match="tune on other rows than those that count"):
        read_suite(write_suite(tmp_path, tuning={"eval_file": test}))
    alora = {"lora": {"method": "lora"}, "alora": {"method": "alora"}}
    with pytest.raises(ConfigError, match="alora would allocate on rows that count"):
        read_suite(write_suite(tmp_path, methods=alora, tuning=None))
    values["base"]["data"]["allocation_file"] = test
    with pytest.raises(ConfigError, match="allocate on rows that do not count"):
        read_suite(write_suite(tmp_path, base=values["base"]))


def test_allocators_that_look_at_held_out_rows_look_at_those_for_tuning(tmp_path):
    suite = suite_of(tmp_path, methods={"lora": {"method": "lora"}, "alora": {"method": "alora"}})
    for part in ("tune", "test"):
        rows = run_mapping(suite, RunKey("alora", part, 0.01, 1))["data"]
        assert rows["allocation_file"] == str(tmp_path / "tune.jsonl")
    assert "allocation_file" not in run_mapping(suite, RunKey("lora", "test", 0.01, 1))["data"]


def test_full_takes_no_settings_of_adapters_from_base(tmp_path):
    values = mapping(tmp_path)
    values["base"] |= {"lora_rank": 4, "target_modules": "all-linear", "lora_dropout": 0.1, "max_length": 99}
    values["base"].pop("r")
    suite = Suite.model_validate(values | {"methods": {"lora": {"method": "lora"}, "all": {"method": "full"}}})
    assert (
        set(run_mapping(suite, RunKey("all", "test", 0.01, 1))) & {"lora_rank", "target_modules", "lora_dropout"}
        == set()
    )
    assert run_config(suite, RunKey("all", "test", 0.01, 1)).max_length == 99
    assert run_config(suite, RunKey("lora", "test", 0.01, 1)).r == 4


def test_overrides_and_variables(tmp_path):
    values = mapping(tmp_path)
    values["base"] |= {"model_name_or_path": "${MODELS}/small"}
    values["base"]["data"]["prompt_template"] = "{prompt} costs ${MODELS}\n".replace("${MODELS}", "${{MODELS}}")
    path = write_suite(tmp_path, **values)
    suite, written = read_suite(path, ["base.r=2", "seeds=[5]"], {"MODELS": "m"})
    assert suite.base["model_name_or_path"] == "m/small" and suite.base["r"] == 2 and suite.seeds == (5,)
    assert suite.base["data"]["prompt_template"] == "{prompt} costs ${{MODELS}}\n"  # text, not a path
    assert written["base"]["model_name_or_path"] == "${MODELS}/small"
    with pytest.raises(ConfigError, match=r"base.model_name_or_path=.*the environment has no MODELS; export it"):
        read_suite(path, [], {})
    suite, _ = read_suite(path, ["base.model_name_or_path=elsewhere"], {})
    assert suite.base["model_name_or_path"] == "elsewhere"


def test_metrics_have_a_direction(tmp_path):
    assert suite_of(tmp_path).table_metric == ("eval_loss", "min")
    suite = suite_of(tmp_path, metric="eval_mcc")
    assert suite.table_metric == suite.tuning_metric == ("eval_mcc", "max")
    tuning = mapping(tmp_path)["tuning"] | {"metric": "eval_loss"}
    suite = suite_of(tmp_path, metric="eval_error", mode="min", tuning=tuning)
    assert (suite.table_metric, suite.tuning_metric) == (("eval_error", "min"), ("eval_loss", "min"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks" / "suites").glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_suites_read(path):
    """Every method's config is checked; all take part that shall, and test rows are for testing alone."""
    suite, _ = read_suite(path, [], {"ARDTRAIN_TEST_DATA": "data"})
    all_seven = {"lora", "dora", "adalora", "elalora", "alora", "ard_lora", "full"}
    few = {"probe": {"lora", "elalora", "probe_lora"}, "ways": {"lora", "probe_lora"}}
    few |= dict.fromkeys(("ranks", "again", "hindsight"), {"lora"})
    assert {e.method for e in suite.methods.values()} == few.get(path.stem.partition("_")[0], all_seven)
    assert suite.name == path.stem and len(suite.seeds) >= 5 and suite.tuning is not None
    assert suite.eval_file("tune") != suite.eval_file("test")
    scales = {c.lora_alpha / c.r for m in suite.methods for c in [run_config(suite, RunKey(m, "test", 0.01, 1))]}
    assert scales == {2.0}


# ---- rows ----


def test_rows_are_dealt_without_a_common_one():
    rows = [{"n": n} for n in range(5)]
    assert dealt(rows, SplitBlock(file="f")) == {"tune": [rows[0], rows[2], rows[4]], "test": [rows[1], rows[3]]}
    assert dealt(rows, SplitBlock(file="f", how="halves")) == {"tune": rows[:2], "test": rows[2:]}
    twice = [{"n": 1}, {"n": 1}, {"n": 2}, {"n": 3}]
    assert dealt(twice, SplitBlock(file="f")) == {"tune": [{"n": 1}, {"n": 2}], "test": [{"n": 3}]}


def test_a_list_becomes_one_row_an_item():
    rows = [{"mr": "a", "refs": ["x", "y", "z"]}, {"mr": "b", "refs": ["u"]}]
    split = SplitBlock(file="f", how="halves", list_field="refs", item_field="ref", max_items=2)
    assert dealt(rows, split) == {
        "tune": [{"mr": "a", "ref": "x"}, {"mr": "a", "ref": "y"}],
        "test": [{"mr": "b", "ref": "u"}],
    }


def test_files_that_share_rows_are_refused(tmp_path):
    for name, lines in (("a", "1\n2\n3\n"), ("b", "4\n2\n"), ("c", "4\n\n")):
        (tmp_path / name).write_text(lines)
    refuse_common_rows(str(tmp_path / "a"), str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="share 1 rows"):
        refuse_common_rows(str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_held_out_file_that_is_not_there_is_named_by_its_setting(tmp_path):
    (tmp_path / "a").write_text("1\n")
    for tune, test, setting in (("gone", "a", "tuning"), ("a", "gone", "base.data")):
        with pytest.raises(ConfigError, match=rf"{setting}.eval_file=\S*gone cannot be read .*; correct the path"):
            refuse_common_rows(str(tmp_path / tune), str(tmp_path / test))
    path = write_suite(tmp_path)
    overrides = [f"base.data.allocation_file={tmp_path / 'gone'}"]
    with pytest.raises(ConfigError, match=r"base.data.allocation_file=\S*gone cannot be read"):
        run(path, FakeRuns(), *overrides)


def test_a_file_too_short_to_deal_is_refused(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="leaves no rows to test on"):
        write_dealt(SplitBlock(file=str(tmp_path / "one.jsonl")), tmp_path / "data")


# ---- which runs come next ----


def test_grid_goes_on_by_its_own_ratio():
    assert next_rate((1e-3, 1e-2, 1e-1), upper=True) == 1.0
    assert next_rate((1e-3, 3e-3, 1e-2, 3e-2), upper=True) == 0.093  # 0.03 x 30 ** (1 / 3)
    assert next_rate((1e-3, 3e-3, 1e-2, 3e-2), upper=False) == 0.00032


def test_best_rate_inside_the_grid_runs_with_all_seeds(tmp_path):
    suite = suite_of(tmp_path)
    assert least_runs(suite) == 2 * (3 + 2)
    assert [str(k) for k in next_runs(suite, {})][:3] == [
        "lora lr 0.001 seed 0 tune", "lora lr 0.01 seed 0 tune", "lora lr 0.1 seed 0 tune",
    ]  # fmt: skip
    outcomes = tuned(suite, {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0})
    choice = choose_rate(suite, "lora", outcomes)
    assert (choice.rate, choice.edge, choice.added) == (1e-2, "", ())
    wanted = [RunKey("lora", "test", 1e-2, seed) for seed in (1, 2)]
    assert [k for k in next_runs(suite, outcomes) if k.method == "lora"] == wanted
    outcomes[wanted[0]] = result(wanted[0], 1.0)
    assert [k for k in next_runs(suite, outcomes) if k.method == "lora"] == wanted[1:]


def test_best_rate_at_the_edge_extends_the_grid_twice(tmp_path):
    suite = suite_of(tmp_path)
    losses = {1e-3: 3.0, 1e-2: 2.0, 1e-1: 1.0}
    assert choose_rate(suite, "lora", tuned(suite, losses)).missing == (RunKey("lora", "tune", 1.0, 0),)
    inside = choose_rate(suite, "lora", tuned(suite, losses | {1.0: 1.5}))
    assert (inside.rate, inside.edge, inside.added) == (0.1, "", (1.0,))
    assert choose_rate(suite, "lora", tuned(suite, losses | {1.0: 0.5})).missing == (RunKey("lora", "tune", 10.0, 0),)
    still = choose_rate(suite, "lora", tuned(suite, losses | {1.0: 0.5, 10.0: 0.4}))
    assert (still.rate, still.edge, still.added) == (10.0, "upper", (1.0, 10.0))
    below = choose_rate(suite, "lora", tuned(suite, {1e-3: 1.0, 1e-2: 2.0, 1e-1: 3.0}))
    assert below.missing == (RunKey("lora", "tune", 1e-4, 0),)


def test_a_rate_that_diverged_is_the_worst(tmp_path):
    suite = suite_of(tmp_path)
    choice = choose_rate(suite, "lora", tuned(suite, {1e-3: 2.0, 1e-2: 1.0, 1e-1: None}))
    assert choice.rate == 1e-2 and choice.scores[1e-1] is None
    nothing = choose_rate(suite, "lora", tuned(suite, {1e-3: None, 1e-2: None, 1e-1: None}))
    assert nothing.rate is None and not nothing.missing


def test_best_is_largest_where_larger_is_better_and_the_smaller_of_equals(tmp_path):
    suite = suite_of(tmp_path, mode="max")
    assert choose_rate(suite, "lora", tuned(suite, {1e-3: 1.0, 1e-2: 3.0, 1e-1: 2.0})).rate == 1e-2
    assert choose_rate(suite, "lora", tuned(suite, {1e-3: 1.0, 1e-2: 3.0, 1e-1: 3.0})).rate == 1e-2


def test_rates_are_judged_by_the_mean_of_the_tuning_seeds(tmp_path):
    suite = suite_of(tmp_path, tuning={"eval_file": str(tmp_path / "tune.jsonl"), "seeds": [8, 9]})
    losses = {1e-3: (2.0, 2.0), 1e-2: (0.5, 2.5), 1e-1: (1.0, 3.0)}
    outcomes = {}
    for rate, pair in losses.items():
        for seed, loss in zip((8, 9), pair, strict=True):
            key = RunKey("lora", "tune", rate, seed)
            outcomes[key] = result(key, loss)
    choice = choose_rate(suite, "lora", outcomes)
    assert choice.scores == {1e-3: 2.0, 1e-2: 1.5, 1e-1: 2.0} and choice.rate == 1e-2


def test_a_failed_tuning_run_chooses_no_rate(tmp_path):
    suite = suite_of(tmp_path)
    outcomes = tuned(suite, {1e-3: 2.0, 1e-2: 1.0}) | {RunKey("lora", "tune", 1e-1, 0): Failure("broken")}
    assert choose_rate(suite, "lora", outcomes).failed and not counting_keys(suite, "lora", outcomes)


def test_without_tuning_every_rate_runs_with_every_seed(tmp_path):
    suite = suite_of(tmp_path, tuning=None)
    assert len(next_runs(suite, {})) == 2 * 3 * 2 == least_runs(suite)


# ---- statistics and tables ----


def test_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, standard error 0.57735, t(2) = 4.302653: half width 2.484138."""
    found = tables.paired_difference({1: 11.0, 2: 22.0, 3: 33.0, 9: 5.0}, {1: 10.0, 2: 20.0, 3: 30.0})
    assert (found.mean, found.num_pairs) == (2.0, 3)
    assert found.interval == pytest.approx((2.0 - 2.484138, 2.0 + 2.484138), abs=1e-5)
    assert tables.paired_difference({1: 1.0}, {1: 3.0}) == tables.Difference(-2.0, None, 1)
    assert tables.paired_difference({1: 1.0}, {2: 3.0}) is None


def exact_bootstrap_quantile(n, order, q):
    """Is the q quantile of the bootstrapped median of n different sorted values (n odd) the one at `order`?

    P(median <= x_k) = P(at least (n + 1) / 2 of n draws are among the first k), k / n each.
    """

    def below(k):
        p = k / n
        return sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range((n + 1) // 2, n + 1))

    return below(order) < q <= below(order + 1)


def test_bootstrap_interval_of_the_median():
    values = [float(v) for v in range(1, 16)]
    low, high = tables.bootstrap_median(values[::-1])
    assert exact_bootstrap_quantile(15, values.index(low), 0.025)
    assert exact_bootstrap_quantile(15, values.index(high), 0.975)
    assert tables.bootstrap_median([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0)
    assert tables.bootstrap_median([2.5]) == (2.5, 2.5)
    assert tables.bootstrap_median(values) == tables.bootstrap_median(values)


def finished(folder, ours, *, parameters=1000, **changes):
    """A tuned suite with five seeds all run: reference losses 1.0 .. 1.4, elalora's `ours`."""
    suite = suite_of(folder, seeds=[1, 2, 3, 4, 5], **changes)
    outcomes = {}
    for method, losses, count in (("lora", (1.0, 1.1, 1.2, 1.3, 1.4), 1000), ("elalora", ours, parameters)):
        outcomes |= tuned(suite, {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}, method)
        for seed, loss in zip(suite.seeds, losses, strict=True):
            key = RunKey(method, "test", 1e-2, seed)
            outcomes[key] = result(key, loss, parameters=count, seconds=float(seed))
    return suite, outcomes


def test_row_by_hand(tmp_path):
    suite, outcomes = finished(tmp_path, (0.8, 1.0, 1.0, 1.2, 1.2), parameters=1010)
    reference, ours = tables.table_rows(suite, outcomes)
    assert (reference.median, reference.mean, reference.difference) == (1.2, pytest.approx(1.2), None)
    assert reference.deviation == pytest.approx(math.sqrt(0.025))  # 0.04 + 0.01 + 0 + 0.01 + 0.04, by 4
    assert ours.median == 1.0 and ours.interval == (0.8, 1.2) and ours.seconds == 3.0
    assert ours.difference.mean == pytest.approx(-0.16)  # -0.2, -0.1, -0.2, -0.1, -0.2
    # deviation sqrt(0.012 / 4) = 0.0547723, t(4) = 2.776445, half width 0.068008
    assert ours.difference.interval == pytest.approx((-0.228008, -0.091992), abs=1e-5)
    assert ours.parameters == (1010, 1010) and ours.peak == 1010


@pytest.mark.parametrize(
    ("ours", "mode", "said"),
    [
        ((0.8, 1.0, 1.0, 1.2, 1.2), "min", "elalora: better than lora (mean difference -0.16 eval_loss"),
        ((0.8, 1.0, 1.0, 1.2, 1.2), "max", "elalora: worse than lora"),
        ((1.1, 1.2, 1.3, 1.4, 1.5), "min", "elalora: worse than lora"),
        ((1.1, 1.0, 1.3, 1.2, 1.4), "min", "elalora: no difference to lora beyond noise at 5 seeds"),
        ((1.0, 1.1, 1.2, 1.3, 1.4), "min", "elalora: no difference to lora beyond noise at 5 seeds"),
    ],
)
def test_verdict(tmp_path, ours, mode, said):
    suite, outcomes = finished(tmp_path, ours, mode=mode)
    rates = {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}
    if mode == "max":  # so that the same rate is chosen
        outcomes |= {k: r for m in suite.methods for k, r in tuned(suite, {a: -b for a, b in rates.items()}, m).items()}
    (sentence,) = tables.verdicts(suite, tables.table_rows(suite, outcomes))
    assert sentence.startswith(said)


def test_one_seed_says_nothing(tmp_path):
    suite, outcomes = finished(tmp_path, (0.1, 0.1, 0.1, 0.1, 0.1))
    alone = Suite.model_validate(suite.model_dump() | {"seeds": [3]})
    (sentence,) = tables.verdicts(alone, tables.table_rows(alone, outcomes))
    assert "one seed, which says nothing about noise" in sentence


def test_unequal_parameters_are_said_loudly(tmp_path):
    suite, outcomes = finished(tmp_path, (1.0, 1.0, 1.0, 1.0, 1.0), parameters=1020)
    assert tables.unequal_parameters(suite, outcomes) == []  # 2 % is within 2 %
    suite, outcomes = finished(tmp_path, (1.0, 1.0, 1.0, 1.0, 1.0), parameters=1021)
    (line,) = tables.unequal_parameters(suite, outcomes)
    assert line.startswith("NOT EQUAL: elalora ends with 1,021 trainable parameters, +2.1% against lora's 1,000")
    assert f"- {line}" in tables.markdown_text(suite, outcomes).splitlines()
    off = Suite.model_validate(suite.model_dump() | {"equal_parameters": None})
    assert tables.unequal_parameters(off, outcomes) == []


def test_full_is_not_held_to_equal_parameters(tmp_path):
    methods = {"lora": {"method": "lora"}, "elalora": {"method": "full"}}
    suite, outcomes = finished(tmp_path, (1.0, 1.0, 1.0, 1.0, 1.0), parameters=99_000, methods=methods)
    assert tables.unequal_parameters(suite, outcomes) == []


def test_notes_name_edges_failures_and_versions(tmp_path):
    suite, outcomes = finished(tmp_path, (1.0, 1.0, 1.0, 1.0, 1.0))
    outcomes |= tuned(suite, {1e-3: 3.0, 1e-2: 2.0, 1e-1: 1.9, 1.0: 1.8, 10.0: 1.7})
    key = RunKey("elalora", "test", 1e-2, 5)
    outcomes[key] = Failure("out of memory (log: x)")
    other = RunKey("elalora", "test", 1e-2, 4)
    outcomes[other] = RunResult("elalora", "test", 1e-2, 4, "f", "d", diverged=True, versions={"torch": "1"})
    said = tables.notes(suite, outcomes)
    assert "lora: its best rate, 10, is the upper edge of the rates tried; a better one may lie beyond." in said
    assert "lora: 5 of 5 runs are still to do." in said
    assert "elalora lr 0.01 seed 5 test: failed: out of memory (log: x)" in said
    assert "elalora lr 0.01 seed 4 test: diverged; the figures are of the other seeds, so they flatter it." in said
    assert "The runs were made with different versions of torch." in said


def test_csv_and_markdown_hold_the_same_numbers(tmp_path):
    suite, outcomes = finished(tmp_path, (0.8, 1.0, 1.0, 1.2, 1.2))
    lines = list(csv.DictReader(tables.csv_text(tables.table_rows(suite, outcomes)).splitlines()))
    assert [line["method"] for line in lines] == ["lora", "elalora"]
    assert float(lines[1]["median"]) == 1.0 and float(lines[1]["difference"]) == pytest.approx(-0.16)
    assert lines[0]["difference"] == "" and lines[1]["seeds"] == "5" and lines[1]["parameters_max"] == "1000"
    (row,) = [line for line in tables.markdown_text(suite, outcomes).splitlines() if line.startswith("| elalora")]
    assert row == (
        "| elalora | 0.01 | 5 | 1.0000 [0.8000, 1.2000] | 1.0400 (0.1673) | -0.16 [-0.2280, -0.0920] "
        "| 1,000 | 1,000 | 3 |"
    )


def test_without_tuning_a_row_is_compared_at_its_own_rate(tmp_path):
    suite = suite_of(tmp_path, tuning=None)
    outcomes = {key: result(key, 1.0 + key.learning_rate * (key.method == "lora")) for key in next_runs(suite, {})}
    rows = {(row.method, row.learning_rate): row for row in tables.table_rows(suite, outcomes)}
    assert rows["elalora", 0.1].difference.mean == pytest.approx(-0.1)
    assert rows["elalora", 0.01].difference.mean == pytest.approx(-0.01)
    assert tables.verdicts(suite, list(rows.values()))[1].startswith("elalora at 0.01: ")


def test_picture_is_drawn(tmp_path):
    suite, outcomes = finished(tmp_path, (0.8, 1.0, 1.0, 1.2, 1.2))
    pixels = image.imread(drawing.draw(suite, tables.table_rows(suite, outcomes), tmp_path / "table.png"))
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.01


# ---- a run's folder ----


def adapter(folder, tensors):
    (folder / "adapter").mkdir(parents=True)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def pair(module, rank, inputs, outputs, *, zero=()):
    """lora_A [r, I] and lora_B [O, r]; the components in `zero` add nothing."""
    b = torch.ones(outputs, rank)
    b[:, list(zero)] = 0.0
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.ones(rank, inputs), f"{name}.lora_B.weight": b}


def test_exported_parameters_by_hand(tmp_path):
    """3 components of 5 + 7; 4 of 5 + 2, one masked; a magnitude of 7: 36 + 21 + 7."""
    magnitude = {"base_model.model.a.lora_magnitude_vector.weight": torch.ones(7)}
    adapter(tmp_path, pair("a", 3, 5, 7) | pair("b", 4, 5, 2, zero=[1]) | magnitude)
    assert results.exported_parameters(tmp_path / "adapter", {"a": 3, "b": 4}, {"a": 12, "b": 7}) == 64
    assert results.exported_parameters(tmp_path / "none", {}, {}) is None
    tables_over_time = [{"a": 3, "b": 4}, {"a": 4, "b": 5}, {"a": 3, "b": 4}]
    assert results.peak_parameters(tmp_path / "adapter", tables_over_time, {"a": 12, "b": 7}) == 48 + 35 + 7


def test_heads_count_by_their_own_size(tmp_path):
    """Two heads of q with ranks 1 and 2 and 5 + 3 numbers a component; the export pads them to a whole matrix."""
    adapter(tmp_path, pair("q", 3, 5, 6))
    table = {"q:head.0": 1, "q:head.1": 2}
    assert results.exported_parameters(tmp_path / "adapter", table, {"q:head.0": 8, "q:head.1": 8}) == 24


def test_a_finished_run_is_read(tmp_path):
    adapter(tmp_path, pair("a", 3, 5, 7))
    records = [
        {"step": 5, "eval_loss": 9.0}, {"step": 10, "loss": 1.0, "elapsed_seconds": 4.5, "allocator_fraction": 0.25},
        {"step": 10, "eval_loss": 2.0, "eval_accuracy": None},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 10, "eva')
    events = [{"step": 0, "table": {"a": 2}}, {"step": 6, "changes": [{"site": "a", "before": 2, "after": 3}]}]
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in events))
    (tmp_path / "status").write_text("finished 10\n")
    (tmp_path / "console.log").write_text("method: x, 1 sites, total rank 2, 1,024 trained numbers (1%)\n")
    assert results.collected(tmp_path, {"a": 12}) == {
        "metrics": {"eval_loss": 2.0, "eval_accuracy": None}, "step": 10, "parameters_start": 1024,
        "parameters_final": 36, "parameters_peak": 36, "total_rank_start": 2, "total_rank_final": 3, "seconds": 4.5,
        "resumed": False, "allocator_fraction": 0.25,
    }  # fmt: skip
    (tmp_path / "status").write_text("finished 11\n")
    with pytest.raises(ValueError, match="no evaluation at the last step, 11"):
        results.collected(tmp_path, {"a": 12})


def test_results_name_no_machine_path():
    text = "its files (log: /data/me/runs/lora/console.log), a/b, 1/2"
    assert without_machine_paths({"a": [text, 3]}) == {"a": ["its files (log: .../lora/console.log), a/b, 1/2", 3]}


# ---- the runner, with runs that only write files ----


class FakeRuns:
    """Stands for training: writes what a run leaves behind, and remembers which it did."""

    def __init__(self, loss=lambda key: 1.0 + abs(math.log10(key.learning_rate) + 2) + 0.01 * key.seed):
        self.loss, self.done, self.fails, self.parameters = loss, [], {}, {}
        self.stop_after = None
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def __call__(self, job, stop):
        with self.lock:
            self.done.append(job.key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        assert load_config(job.config).learning_rate == job.key.learning_rate
        try:
            if error := self.fails.get(job.key):
                (job.folder / "console.log").write_text(f"Traceback\n{error}\n")
                (job.folder / "status").write_text("failed 3\n")
                return 1
            if self.stop_after is not None and len(self.done) > self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
                stop.requested.wait(10)
                (job.folder / "status").write_text("requeue 4\n")
                return 0
            count = self.parameters.get(job.key.method, 1000)
            (job.folder / "console.log").write_text(f"{count:,} trained numbers\n")
            (job.folder / "metrics.jsonl").write_text(json.dumps({"step": 10, "eval_loss": self.loss(job.key)}) + "\n")
            (job.folder / "status").write_text("finished 10\n")
            return 0
        finally:
            with self.lock:
                self.at_once -= 1


def run(path, fake, *overrides):
    return compare(path, overrides, execute=fake, describe=lambda config: Start(60, 1000, {}))


def test_a_suite_runs_tunes_and_reports(tmp_path, capsys):
    fake = FakeRuns()
    assert run(write_suite(tmp_path), fake) == 0
    assert len(fake.done) == len(set(fake.done)) == 2 * (3 + 2)
    out = tmp_path / "out"
    record = json.loads((out / "results.json").read_text())
    assert record["tuning"]["lora"]["rate"] == 0.01 and len(record["runs"]) == 10
    assert record["verdicts"][0].startswith("elalora: no difference to lora beyond noise at 2 seeds")
    one = json.loads((out / "lora/lr-0.01/seed-1/test/result.json").read_text())
    assert one["metrics"] == {"eval_loss": 1.01} and one["parameters_final"] == 1000 and one["versions"]["torch"]
    assert (out / "table.csv").read_text().count("\n") == 3 and (out / "table.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "lora     starts with total rank 60, 1,000 trained numbers" in printed
    assert "[10 of 10] " in printed and str(tmp_path) not in (out / "results.json").read_text()


def test_nothing_runs_twice_and_only_what_changed_runs_again(tmp_path, capsys):
    path = write_suite(tmp_path)
    run(path, FakeRuns())
    table = (tmp_path / "out" / "table.md").read_text()
    again = FakeRuns()
    assert run(path, again) == 0 and again.done == []
    assert (tmp_path / "out" / "table.md").read_text() == table
    more = FakeRuns()
    assert run(path, more, "seeds=[1,2,3]") == 0
    assert more.done == [RunKey(m, "test", 0.01, 3) for m in ("lora", "elalora")]
    changed = FakeRuns()
    assert run(path, changed, "methods.elalora.settings.elalora.b=3") == 0
    assert {key.method for key in changed.done} == {"elalora"} and len(changed.done) == 5
    aside = tmp_path / "out/elalora/lr-0.01/seed-1/test.earlier-1"
    assert (aside / "result.json").is_file()  # put aside, not mixed and not lost
    assert "the settings have changed; the earlier run is now" in capsys.readouterr().out
    (tmp_path / "test.jsonl").write_text('{"prompt": "e", "completion": "f"}\n')
    rows = FakeRuns()
    assert run(path, rows, "methods.elalora.settings.elalora.b=3") == 0
    assert {key.part for key in rows.done} == {"test"} and len(rows.done) == 4


def test_a_torn_result_is_read_again_from_its_run(tmp_path):
    path = write_suite(tmp_path)
    run(path, FakeRuns())
    torn = tmp_path / "out/lora/lr-0.01/seed-1/test/result.json"
    whole = torn.read_text()
    torn.write_text(whole[:40])
    again = FakeRuns()
    assert run(path, again) == 0 and again.done == []
    assert torn.read_text() == whole


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, capsys):
    fake = FakeRuns()
    broken = RunKey("elalora", "test", 0.01, 2)
    fake.fails[broken] = "MemoryError: no more"
    path = write_suite(tmp_path)
    assert run(path, fake) == 1
    assert len(fake.done) == 10
    log = tmp_path / "out" / broken.folder / "console.log"
    assert f"{broken}: FAILED: MemoryError: no more (log: {log})" in capsys.readouterr().out
    again = FakeRuns()
    assert run(path, again) == 0 and again.done == [broken]


def test_divergence_in_tuning_is_a_finding_and_not_tried_again(tmp_path):
    text = "RuntimeError: step 3: loss or gradient is not finite in grains [0]"
    fake = FakeRuns()
    for method in ("lora", "elalora"):
        fake.fails[RunKey(method, "tune", 0.1, 0)] = text
    path = write_suite(tmp_path)
    assert run(path, fake) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["tuning"]["lora"]["scores"] == {"0.001": 2.0, "0.01": 1.0, "0.1": None}
    assert "lora: diverged in tuning at 0.1." in record["notes"]
    again = FakeRuns()
    assert run(path, again) == 0 and again.done == []


def test_divergence_of_a_run_that_counts_is_no_success(tmp_path):
    fake = FakeRuns()
    fake.fails[RunKey("elalora", "test", 0.01, 2)] = "step 3: loss or gradient is not finite"
    assert run(write_suite(tmp_path), fake) == 1
    assert "flatter" in (tmp_path / "out" / "table.md").read_text()


def test_unequal_final_parameters_end_with_one(tmp_path):
    fake = FakeRuns()
    fake.parameters["elalora"] = 1100
    assert run(write_suite(tmp_path), fake) == 1
    assert "NOT EQUAL: elalora" in (tmp_path / "out" / "table.md").read_text()
    assert run(tmp_path / "suite.yaml", fake, "equal_parameters.tolerance=0.2") == 0


def test_jobs_run_side_by_side(tmp_path):
    gate = threading.Barrier(2, timeout=20)
    fake = FakeRuns(loss=lambda key: gate.wait() * 0.0 + abs(math.log10(key.learning_rate) + 2))
    assert run(write_suite(tmp_path), fake, "jobs=2") == 0
    assert fake.most_at_once == 2


def test_a_signal_stops_and_the_same_command_goes_on(tmp_path, capsys):
    path = write_suite(tmp_path)
    fake = FakeRuns()
    fake.stop_after = 3
    before = signal.getsignal(signal.SIGTERM)
    assert run(path, fake) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    printed = capsys.readouterr().out
    assert len(fake.done) == 4 and f"{fake.done[-1]}: stopped at step 4" in printed
    assert "the same command goes on where the runs stopped" in printed
    rest = FakeRuns()
    assert run(path, rest) == 0
    assert rest.done[0] == fake.done[-1] and len(rest.done) == 7


def test_a_metric_that_no_run_writes_ends_the_suite_after_one_run(tmp_path):
    fake = FakeRuns()
    with pytest.raises(ConfigError, match="metric=eval_acuracy is written by no run; .* has eval_loss"):
        run(write_suite(tmp_path), fake, "metric=eval_acuracy", "mode=max")
    assert len(fake.done) == 1


def test_a_suites_folder_that_cannot_be_made_is_a_mistake(tmp_path):
    path = write_suite(tmp_path)
    with pytest.raises(ConfigError, match=r"output_dir=\S*suite.yaml/x cannot be made \(Not a directory\); choose ano"):
        run(path, FakeRuns(), f"output_dir={path}/x")


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    path = write_suite(tmp_path)

    def second(job, stop):
        with pytest.raises(ConfigError, match="another `ardtrain compare` works there"):
            run(path, FakeRuns())
        return FakeRuns()(job, stop)

    assert run(path, second) == 0


def test_split_rows_are_written_and_used(tmp_path):
    (tmp_path / "all.jsonl").write_text(
        "".join(json.dumps({"prompt": str(n), "completion": "x"}) + "\n" for n in range(6))
    )
    values = mapping(tmp_path)
    values["base"]["data"].pop("eval_file")
    values |= {"split_eval": str(tmp_path / "all.jsonl"), "tuning": {"seeds": [0]}}
    path = write_suite(tmp_path, **values)
    assert run(path, FakeRuns()) == 0
    tune, test = (results._records(tmp_path / "out" / "data" / f"{part}.jsonl") for part in ("tune", "test"))
    assert [row["prompt"] for row in tune] == ["0", "2", "4"] and [row["prompt"] for row in test] == ["1", "3", "5"]
    assert str(tmp_path / "out/data/tune.jsonl") in (tmp_path / "out/lora/lr-0.01/seed-0/tune/run.yaml").read_text()


# ---- the processes of a run ----


def job(folder, processes=1):
    folder.mkdir(exist_ok=True)
    return child.Job(RunKey("lora", "test", 0.01, 1), folder, folder / "run.yaml", processes)


def test_commands(tmp_path):
    one = child.command(job(tmp_path), port=1234)
    assert one == [sys.executable, "-m", "ardtrain", "train", str(tmp_path / "run.yaml")]
    two = child.command(job(tmp_path, 2), port=1234)
    assert two[1:3] == ["--num_gpus", "2"] and two[two.index("--master_port") + 1] == "1234"
    assert two[-3:] == [str(REPOSITORY / "ardtrain" / "main.py"), "train", str(tmp_path / "run.yaml")]


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_stopped_child_may_save_first(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "command", lambda job, port: [sys.executable, "-c", SLEEPER])
    stop = child.Stop()
    console = tmp_path / "console.log"

    def ask():
        while not (console.is_file() and "ready" in console.read_text()):
            stop.at_once.wait(0.02)
        stop.requested.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert child.run_process(job(tmp_path), stop) == 0
    asking.join()
    assert console.read_text() == "ready\nsaved\n"


def test_a_second_request_kills_and_leaves_nothing_behind(tmp_path, monkeypatch):
    deaf = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" \
           "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n" \
           "print(p.pid, flush=True)\ntime.sleep(60)\n"  # fmt: skip
    monkeypatch.setattr(child, "command", lambda job, port: [sys.executable, "-c", deaf])
    stop = child.Stop()
    console = tmp_path / "console.log"

    def ask():
        while not (console.is_file() and console.read_text().endswith("\n")):
            stop.at_once.wait(0.02)
        stop.requested.set()
        stop.at_once.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert child.run_process(job(tmp_path), stop) == -signal.SIGKILL
    asking.join()
    state = subprocess.run(["ps", "-o", "stat=", "-p", console.read_text().strip()], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")  # its grandchild is gone, or dead and not yet reaped
