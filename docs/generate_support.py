"""Writes docs/support_matrix.md from what tests found: python docs/generate_support.py.

The runs are benchmarks/results/support.json (benchmarks/support.py), the families benchmarks/results/families.json.
What no run covered says "not run"; nothing here is assumed.
"""

import json
from pathlib import Path
from typing import Any

from ardtrain.config.methods import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "support_matrix.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
FORMS = {"ard_lora": ("own_a", "shared_a")}  # methods whose adapters have several forms, each with a column
NOT_RUN = "not run"
Run = dict[str, Any]
OFFLOAD = {None: "-", "cpu": "host", "nvme": "NVMe"}


def columns() -> list[tuple[str, str | None]]:
    """Every method that the config knows, with each form of its adapters."""
    return [(method, form) for method in METHODS for form in FORMS.get(method, (None,))]


def titles() -> list[str]:
    """Their names on the page."""
    return [f"`{method}`" + (f", {form}" if form else "") for method, form in columns()]


def of_column(runs: list[Run], method: str, form: str | None) -> list[Run]:
    """Its runs; form None: of any form."""
    return [run for run in runs if run["method"] == method and form in (None, run["form"])]


def processes(runs: list[Run]) -> str:
    """Their numbers of processes; `~` where losses were compared within a tolerance and not by their bits."""
    found = sorted({run["processes"] for run in runs})
    exact = {run["processes"] for run in runs if run["equal"] == "bits"}
    return " ".join(f"{n}" if n in exact else f"~{n}" for n in found) or NOT_RUN


def settings_table(runs: list[Run]) -> list[str]:
    """A row for each value of each setting, a column for each method; cells: on how many processes."""
    rows = {
        "ZeRO 0": lambda r: r["base_zero"] == 0,
        "ZeRO 1": lambda r: r["base_zero"] == 1,
        "ZeRO 2": lambda r: r["base_zero"] == 2,
        "ZeRO 3": lambda r: r["base_zero"] == 3,
        "`offload_param: cpu`": lambda r: r["base_offload"] == "cpu",
        "`offload_param: nvme`": lambda r: r["base_offload"] == "nvme",
        "`adapter_zero_stage: 1`": lambda r: r["adapter_zero"] == 1,
        "`adapter_zero_stage: 2`": lambda r: r["adapter_zero"] == 2,
        "`offload_optimizer: cpu`": lambda r: r["optimizer_offload"],
        "float32": lambda r: r["dtype"] == "float32",
        "bfloat16": lambda r: r["dtype"] == "bfloat16",
        "float16": lambda r: r["dtype"] == "float16",
        "cut, and resumed on another number": lambda r: r["resumed_from"] not in (None, r["processes"]),
        "cut, and resumed on the same number": lambda r: r["resumed_from"] == r["processes"],
    }
    rows |= {f"`{name}`": _uses(name) for name in sorted({name for run in runs for name in run["features"]})}
    rows |= {f"on {name}": _family(name) for name in sorted({run["family"] for run in runs} - {"Llama"})}
    lines = [f"| | {' | '.join(titles())} |", f"| --- |{' --- |' * len(columns())}"]
    for name, holds in rows.items():
        cells = [processes([run for run in of_column(runs, *column) if holds(run)]) for column in columns()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _uses(feature: str) -> Any:
    return lambda run: feature in run["features"]


def _family(name: str) -> Any:
    return lambda run: run["family"] == name


def runs_table(runs: list[Run]) -> list[str]:
    """A row for each combination that ran as one run."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        method = f"`{run['method']}`" + ("" if run["form"] in ("plain", run["method"]) else f", {run['form']}")
        features = [f"`{name}`" for name in sorted(run["features"])]
        features += [f"on {run['family']}"] * (run["family"] != "Llama")
        adapter = "-" if run["adapter_zero"] is None else str(run["adapter_zero"])
        optimizer = "host" if run["optimizer_offload"] else "-"
        key = (
            method, str(run["base_zero"]), OFFLOAD[run["base_offload"]], adapter, optimizer, run["dtype"],
            ", ".join(features) or "-",
        )  # fmt: skip
        found.setdefault(key, []).append(run)
    lines = [
        "| Method | ZeRO | Base offloaded to | Adapter's ZeRO | Optimizer offloaded to | Dtype | Also | Processes | "
        "Resizes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in sorted(found):
        cells = [*key, ", ".join(_whole_or_resumed(found[key])), str(max(run["resizes"] for run in found[key]))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _whole_or_resumed(runs: list[Run]) -> list[str]:
    """Such as `1, 3 after 2`: unbroken on one process; on three, with the checkpoint of two."""
    runs = sorted(runs, key=lambda run: (run["processes"], run["resumed_from"] or 0))
    texts = [
        ("" if run["equal"] == "bits" else "~")
        + (f"{run['processes']}" if run["resumed_from"] is None else f"{run['processes']} after {run['resumed_from']}")
        for run in runs
    ]
    return list(dict.fromkeys(texts))


def families_table(families: dict[str, Any]) -> list[str]:
    """A row for each family, a column for each method: start and export, and on how many processes bits were equal."""
    lines = [f"| Family | {' | '.join(titles())} |", f"| --- |{' --- |' * len(columns())}"]
    for name, own in families.items():
        cells = []
        for method, form in columns():
            found = own["methods"].get(f"{method}, {form}" if form else method, {})
            parts = ["start"] * (found.get("start") == 0.0) + ["export"] * ("export" in found)
            if "equal_bits_on" in found:
                parts.append("bits on " + " ".join(map(str, found["equal_bits_on"])))
            cells.append(", ".join(parts) or NOT_RUN)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def render() -> str:
    """The page."""
    results = json.loads((RESULTS / "support.json").read_text())
    families = json.loads((RESULTS / "families.json").read_text())
    runs, versions = results["runs"], results["machine"]["versions"]
    tests = ", ".join(f"`{test}`" for test in sorted({run["test"] for run in runs}))
    loose = sorted({run["equal"] for run in runs} - {"bits"})
    parts = [
        "# Support matrix",
        "Generated by `python docs/generate_support.py` from what the tests found: `python -m benchmarks.support --out "
        f"benchmarks/results/support.json` runs {tests} and writes nothing unless all of them pass; the families are "
        "[families.md](families.md)'s. A test compares this page with the files. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {results['machine']['date']}; CPU, gloo. {results['note']}[Support](support.md) says why something is "
        "refused.",
        "A number says on how many processes such a run was found equal to the simplest one (one process, ZeRO 0, "
        "unbroken): losses, held-out losses, rank tables, final weights and moments, to the bit; "
        "runs with `zero_hpz_partition_size` to those without it, `full` to the unbroken run on as many processes"
        + (f"; `~`: losses within {', '.join(loose)} of the run on one process" if loose else "")
        + f'. "{NOT_RUN}" says that none of these tests ran it, not that it fails. Every model is tiny and random.',
        "## Settings, by method\n\nEach row meets others in the runs of the next table, not in every product.",
        "\n".join(settings_table(runs)),
        "## The runs\n\n`1 after 2`: on one process, with the checkpoint of two.",
        "\n".join(runs_table(runs)),
        "## Families, by method\n\nstart: the first logits are the bare model's to the bit. export: PEFT (for `full` "
        "transformers) reads the trained logits. bits: equal on so many processes, cut and resumed.",
        "\n".join(families_table(families["families"])),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE.relative_to(REPOSITORY))
