"""Suites with several budgets, and tables written again from their records."""

import json
from pathlib import Path

import pytest
from matplotlib import image

from ardtrain.cli import main
from ardtrain.compare import drawing, tables
from ardtrain.compare.again import read_record
from ardtrain.compare.suite import RunKey, Suite, read_suite, run_config, with_budgets
from ardtrain.config import ConfigError
from tests.unit.test_compare import FakeRuns, mapping, result, run, tuned, write_suite

REPOSITORY = Path(__file__).resolve().parents[2]
BUDGETS = {
    "r2": {"settings": {"r": 2}},
    "r4": {"settings": {"r": 4}, "methods": {"elalora": {"elalora": {"b": 8}}}},
}


def finished(folder, losses):
    """Two sizes, five seeds; the references' losses are 1.0 .. 1.4 at both. losses: of elalora by size."""
    suite = Suite.model_validate(with_budgets(mapping(folder, budgets=BUDGETS, seeds=[1, 2, 3, 4, 5])))
    outcomes = {}
    for budget, parameters in (("r2", 500), ("r4", 1000)):
        ours = {f"lora-{budget}": (1.0, 1.1, 1.2, 1.3, 1.4), f"elalora-{budget}": losses[budget]}
        for method, values in ours.items():
            outcomes |= tuned(suite, {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}, method)
            for seed, value in zip(suite.seeds, values, strict=True):
                key = RunKey(method, "test", 1e-2, seed)
                outcomes[key] = result(key, value, parameters=parameters)
    return suite, outcomes


def test_a_budget_lies_over_the_methods_settings(tmp_path):
    suite, written = read_suite(write_suite(tmp_path, budgets=BUDGETS))
    assert list(suite.methods) == ["lora-r2", "elalora-r2", "lora-r4", "elalora-r4"]
    assert suite.budgets == ("r2", "r4") and suite.reference == "lora-r4" and "budgets" in written
    assert suite.reference_of("elalora-r2") == "lora-r2" and suite.reference_of("elalora-r4") == "lora-r4"
    configs = {method: run_config(suite, RunKey(method, "test", 1e-2, 1)) for method in suite.methods}
    assert [config.r for config in configs.values()] == [2, 2, 4, 4]
    assert (configs["elalora-r2"].elalora.b, configs["elalora-r4"].elalora.b) == (4, 8)
    assert configs["elalora-r4"].elalora.mask_interval == 2  # the method's own
    assert with_budgets(with_budgets(written)) == with_budgets(written)


def test_methods_without_a_size_run_once(tmp_path):
    methods = mapping(tmp_path)["methods"] | {
        "full": {"method": "full"},
        "fixed": {"method": "lora", "in_budgets": False},
    }
    suite, _ = read_suite(write_suite(tmp_path, budgets=BUDGETS, methods=methods))
    assert [m for m in suite.methods if "-" not in m] == ["full", "fixed"]
    assert suite.reference_of("full") == "lora-r4"
    suite, _ = read_suite(write_suite(tmp_path, budgets=BUDGETS, methods=methods, reference="fixed"))
    assert {suite.reference_of(method) for method in suite.methods} == {"fixed"}


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ({}, "budgets"),
        ({"r2": {"setings": {"r": 2}}}, "budgets.r2.setings is no setting; did you mean budgets.r2.settings?"),
        ({"r2": {"methods": {"dora": {"r": 2}}}}, "budgets.r2.methods.dora is none of the methods"),
        ({"a b": {}}, "budgets"),
        ({"r2": {"settings": {"max_length": 8}}}, "would give this method other rows or another base"),
        ({"r2": {"settings": {"rr": 8}}}, "rr is no setting"),
        (["r2"], "budgets"),
    ],
)
def test_mistakes_are_named(tmp_path, budgets, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        read_suite(write_suite(tmp_path, budgets=budgets))


def test_verdicts_by_size_and_over_sizes(tmp_path):
    suite, outcomes = finished(tmp_path, {"r2": (0.8, 1.0, 1.0, 1.2, 1.2), "r4": (1.1, 1.0, 1.3, 1.2, 1.4)})
    rows = tables.table_rows(suite, outcomes)
    small, large = tables.verdicts(suite, rows)
    assert small.startswith("elalora-r2: better than lora-r2 (mean difference -0.16 eval_loss")
    assert large.startswith("elalora-r4: no difference to lora-r4 beyond noise at 5 seeds")
    assert tables.verdicts_over_budgets(suite, rows) == ["elalora: better at r2; no difference beyond noise at r4."]
    text = tables.markdown_text(suite, outcomes)
    assert "Difference to lora of that size" in text and "- elalora: better at r2;" in text


def test_parameters_are_held_equal_within_a_size(tmp_path):
    suite, outcomes = finished(tmp_path, {"r2": (1.0,) * 5, "r4": (1.0,) * 5})
    assert tables.unequal_parameters(suite, outcomes) == []
    key = RunKey("elalora-r2", "test", 1e-2, 3)
    outcomes[key] = result(key, 1.0, parameters=1000)  # equal to the other size's
    (line,) = tables.unequal_parameters(suite, outcomes)
    assert line.startswith("NOT EQUAL: elalora-r2 ends with 1,000 trainable parameters, +100.0% against lora-r2's 500")


def test_the_picture_over_sizes_is_drawn(tmp_path):
    suite, outcomes = finished(tmp_path, {"r2": (0.8, 1.0, 1.0, 1.2, 1.2), "r4": (1.0,) * 5})
    pixels = image.imread(drawing.draw_budgets(suite, tables.table_rows(suite, outcomes), tmp_path / "b.png"))
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.01


def test_a_suite_of_sizes_runs_and_its_table_comes_again_from_its_record(tmp_path, capsys):
    fake = FakeRuns()
    assert run(write_suite(tmp_path, budgets=BUDGETS), fake) == 0
    assert len(fake.done) == len(set(fake.done)) == 4 * (3 + 2)
    out = tmp_path / "out"
    assert (out / "budgets.png").stat().st_size > 5000
    record = json.loads((out / "results.json").read_text())
    assert record["verdicts"][0] == "elalora: no difference beyond noise at r2, r4."
    again = tmp_path / "again.md"
    command = [
        "compare",
        "--table",
        str(out / "results.json"),
        "--out",
        str(again),
        "--picture",
        str(tmp_path / "p.png"),
    ]
    assert main(command) == 0
    assert again.read_text() == (out / "table.md").read_text() and (tmp_path / "p.png").is_file()


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "benchmarks" / "results" / "suites").glob("*.json")), ids=lambda path: path.stem
)
def test_committed_tables_are_those_of_their_records(path):
    assert tables.markdown_text(*read_record(path)) == path.with_suffix(".md").read_text()


def test_failed_runs_come_back_from_a_record(tmp_path):
    fake = FakeRuns()
    fake.fails = {RunKey("elalora", "test", 1e-2, 2): "RuntimeError: out of memory"}
    assert run(write_suite(tmp_path), fake) == 1
    suite, outcomes = read_record(tmp_path / "out" / "results.json")
    assert any("RuntimeError: out of memory" in line for line in tables.notes(suite, outcomes))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "which results.json"),
        (["none.json"], "in the suite's output_dir"),
        (["a.json", "b.json"], "b.json: --table takes"),
        (["empty.json"], "empty.json: no results.json of a suite .KeyError: 'settings'"),
    ],
)
def test_mistakes_of_table_are_told(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    assert main(["compare", "--table", *arguments]) == 2
    assert words.replace(".KeyError", "(KeyError") in capsys.readouterr().err
