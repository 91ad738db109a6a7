"""Every family on 1, 2 and 3 processes, cut on two and resumed on three: equal to the bit. One start a world size."""

import json
from pathlib import Path

import pytest

from tests.distributed.processes import run_processes
from tests.families import FAMILIES, METHODS, STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.full]
MOVING = ("elalora", "ard_lora, own_a")
RUNS = [(family, method) for family in FAMILIES.values() for method in MOVING]
RUNS.append((FAMILIES["Llama"], "probe_lora"))
# A trained head beside each kind of number that a method keeps; DeBERTa's linears that run on positions too.
RUNS += [(FAMILIES[f], m) for f in ("BERT", "DeBERTa") for m in METHODS if m not in ("lora", *MOVING)]


def cases_of(world_size, folder, runs):
    """The cases of one start by (family, method): cut on two processes under ZeRO-3, resumed on three under ZeRO-0."""
    out = {}
    for family, method in runs:
        case = {"model": family.name, "method": method}
        path = folder / f"{family.name} {method}".replace(" ", "-")
        if world_size == 2:
            path.mkdir()
            case |= {"stage": 3, "save": str(path)}
        elif world_size == 3:
            case |= {"resume": str(path / "checkpoint-6"), "gradient_checkpointing": True}
        out[f"{family.name}/{method}"] = case
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """Of the runs whose tests were chosen."""
    folder = tmp_path_factory.mktemp("families")
    chosen = [i.callspec.params for i in request.session.items if i.path == Path(__file__)]
    runs = [(params["family"], params["method"]) for params in chosen]
    out = {}
    for world_size in (2, 3, 1):
        cases, answer = folder / f"cases-{world_size}.json", folder / f"results-{world_size}.json"
        cases.write_text(json.dumps(cases_of(world_size, folder, runs)))
        arguments = ["-m", "tests.distributed.families", str(cases), str(answer)]
        ended = run_processes(world_size, arguments, folder=folder, timeout=1200)
        assert ended.codes == [0] * world_size, ended.text()
        out[world_size] = json.loads(answer.read_text())
    return out


@pytest.mark.parametrize(("family", "method"), RUNS, ids=[f"{f.name}/{m}" for f, m in RUNS])
def test_bits_do_not_depend_on_processes_or_the_cut(results, family, method, record):
    unbroken, sharded, resumed = (results[n][f"{family.name}/{method}"] for n in (1, 2, 3))
    assert len(set(unbroken["losses"].values())) == STEPS
    assert unbroken["events"] >= {"dora": 0, "adalora": 1, "alora": 2}.get(method, 3)
    assert len(resumed["losses"]) == STEPS - 6
    for other in (sharded, resumed):
        for what in ("losses", "tables", "held_out"):  # of the steps that this run made itself
            assert other[what] == {step: unbroken[what][step] for step in other[what]}, what
        assert other["final"] == unbroken["final"]
        assert other["gathered"] == 0
    name = f"{family.name}/{method}"
    equal = [n for n in (1, 2, 3) if results[n][name]["final"] == unbroken["final"]]
    checkpointing = [n for n in (1, 2, 3) if results[n][name]["checkpointing"]]
    record(family, method, resizes=unbroken["events"], equal_bits_on=equal, checkpointing_on=checkpointing)
