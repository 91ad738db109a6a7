"""docs/support_matrix.md says what the tests' runs say: no tick without a run, a column for every method."""

import importlib.util
import json
from pathlib import Path

import pytest

from ardtrain.config.methods import METHODS
from tests.conftest import SIMPLE_RUN
from tests.distributed.test_matrix import cases_of, described

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "support.json"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("generate_support", REPOSITORY / "docs" / "generate_support.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(method, processes, **settings):
    return SIMPLE_RUN | {"method": method, "processes": processes, "test": "made up"} | settings


def cell(lines, row, title):
    """Of a table in Markdown."""
    head = [text.strip() for text in lines[0].split("|")]
    (found,) = [line for line in lines if line.startswith(f"| {row} |")]
    return found.split("|")[head.index(title)].strip()


def test_page_is_made_of_the_results(page):
    assert page.render() == page.PAGE.read_text(), "run: python docs/generate_support.py"


def test_every_method_has_a_column(page):
    assert {method for method, _ in page.columns()} == set(METHODS)
    assert len(page.titles()) == len(METHODS) + 1  # ARD-LoRA's two layouts
    for line in page.settings_table([])[2:] + page.families_table({"Llama": {"methods": {}}})[2:]:
        assert line.count(page.NOT_RUN) == len(page.titles())


def test_a_cell_says_on_how_many_processes_such_a_run_was_equal(page):
    runs = [
        run("lora", 3, base_zero=3, base_offload="cpu"),
        run("lora", 2, base_zero=3, dtype="bfloat16"),
        run("ard_lora", 1, form="own_a", features=["packing"]),
        run("full", 2, base_zero=2, equal="1e-6", adapter_zero=None),
        run("full", 1, base_zero=1, adapter_zero=None),
        run("full", 1, base_zero=2, adapter_zero=None),
    ]
    lines = page.settings_table(runs)
    assert cell(lines, "ZeRO 3", "`lora`") == "2 3" and cell(lines, "ZeRO 0", "`lora`") == "not run"
    assert cell(lines, "`offload_param: cpu`", "`lora`") == "3" and cell(lines, "bfloat16", "`lora`") == "2"
    assert cell(lines, "`packing`", "`ard_lora`, own_a") == "1"
    assert cell(lines, "`packing`", "`ard_lora`, shared_a") == "not run"
    assert cell(lines, "ZeRO 2", "`full`") == "1 ~2"


def test_runs_of_one_combination_share_a_row_and_say_what_they_went_on_with(page):
    runs = [run("dora", 3, resumed_from=2), run("dora", 2, resizes=4), run("dora", 2), run("dora", 2, base_zero=3)]
    rows = page.runs_table(runs)[2:]
    assert rows == [
        "| `dora` | 0 | - | 1 | - | float32 | - | 2, 3 after 2 | 4 |",
        "| `dora` | 3 | - | 1 | - | float32 | - | 2 | 0 |",
    ]


def test_a_family_shows_what_was_found_of_it(page):
    found = {"start": 0.0, "export": 1e-7, "largest_logit": 2.0}
    methods = {"lora": found, "ard_lora, own_a": found | {"resizes": 3, "equal_bits_on": [1, 2, 3]}}
    lines = page.families_table({"BERT": {"methods": methods}})
    assert cell(lines, "BERT", "`lora`") == "start, export"
    assert cell(lines, "BERT", "`ard_lora`, own_a") == "start, export, bits on 1 2 3"
    assert cell(lines, "BERT", "`full`") == "not run"


def test_the_results_are_those_of_the_present_matrix(tmp_path):
    """Case by case, but for what only a run knows."""
    runs = json.loads(RESULTS.read_text())["runs"]
    matrix = [run for run in runs if run["test"] == "tests/distributed/test_matrix.py"]
    assert {run["method"] for run in matrix} == set(METHODS) - {"full"}
    unknown = {"method": "Lora"}, {"events": 0}
    wanted = [
        SIMPLE_RUN | described(case, *unknown) | {"processes": size, "test": "tests/distributed/test_matrix.py"}
        for size in range(1, 6)
        for case in cases_of(size, tmp_path, True).values()
    ]

    def settings(run):
        return json.dumps({k: v for k, v in run.items() if k not in ("method", "resizes")}, sort_keys=True)

    assert sorted(map(settings, matrix)) == sorted(map(settings, wanted))
