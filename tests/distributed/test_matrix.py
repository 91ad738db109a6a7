"""1 to 5 processes, every backbone and arena setting, cut and resumed elsewhere: equal to the bit.

One start of the processes a world size runs all its cases. Coverage is pairwise, not every product: each value of each
setting meets each family and each world size class. The reference is the simplest run: one process, ZeRO-0, unbroken.
"""

import json
import time

import pytest

from ardtrain.config.methods import METHODS
from tests.distributed.matrix import FAMILIES, METHOD_FAMILIES
from tests.distributed.processes import run_processes

pytestmark = pytest.mark.distributed

Z3 = {"stage": 3}
ELALORA = ("fp32", "packed", "bf16")
REFERENCE = {family: {"family": family} for family in (*ELALORA, *METHOD_FAMILIES)}


def cases_of(world_size, folder, nvme):
    """The cases of one start. Checkpoints go down and up in world size: 4 -> 3, 2 -> 3, 2 -> 1 -> 5."""

    def resumed(name, processes):
        return {"resume": str(folder / name / "checkpoint-30"), "resumed_from": processes}

    def save(name):
        (folder / name).mkdir(exist_ok=True)
        return str(folder / name)

    off_nvme = {"offload_param": "nvme", "nvme_path": str(folder / "nvme")} if nvme else {"offload_param": "cpu"}
    ckpt, off_opt = {"gradient_checkpointing": True}, {"offload_optimizer": True}
    cpu, arena2 = {"offload_param": "cpu"}, {"arena_stage": 2}
    table = {
        4: {
            "fp32/z3 arena2 ckpt": {"family": "fp32", **Z3, **arena2, **ckpt, "save": save("four")},
            "packed/z3 nvme opt": {"family": "packed", **Z3, **off_nvme, **off_opt},
            "bf16/z0 opt ckpt": {"family": "bf16", **off_opt, **ckpt},
        },
        3: {
            "fp32/z0 arena2 opt": {"family": "fp32", **arena2, **off_opt},
            "fp32/z3 cpu resumed from 4": {"family": "fp32", **Z3, **cpu, **resumed("four", 4)},
            "packed/z3 cpu arena2 ckpt resumed from 2": {
                "family": "packed",
                **Z3,
                **cpu,
                **arena2,
                **ckpt,
                **resumed("packed", 2),
            },
            "bf16/z3 opt ckpt": {"family": "bf16", **Z3, **off_opt, "gradient_checkpointing": "offloaded"},
        },
        2: {
            "fp32/z3 cpu opt ckpt auto": {"family": "fp32", **Z3, **cpu, **off_opt, **ckpt, "auto": True},
            "packed/z0 arena2": {"family": "packed", **arena2, "save": save("packed")},
            "bf16/z3 nvme arena2": {"family": "bf16", **Z3, **off_nvme, **arena2, "save": save("two")},
        },
        1: {
            **REFERENCE,
            "fp32/z3 nvme arena2 ckpt": {"family": "fp32", **Z3, **off_nvme, **arena2, **ckpt, "save": save("one")},
            "bf16/z0 resumed from 2": {"family": "bf16", **resumed("two", 2)},
        },
        5: {"fp32/z3 cpu opt resumed from 1": {"family": "fp32", **Z3, **cpu, **off_opt, **resumed("one", 1)}},
    }
    for family in METHOD_FAMILIES:  # each method on 1, 2 and 3 processes, ZeRO 0 and 3, cut on 2 and resumed on both
        table[2][f"{family}/z3 cpu"] = {"family": family, **Z3, **cpu, "save": save(family)}
        table[3][f"{family}/z0 arena2 resumed from 2"] = {"family": family, **arena2, **resumed(family, 2)}
        table[1][f"{family}/z3 resumed from 2"] = {"family": family, **Z3, **ckpt, **resumed(family, 2)}
    return table[world_size]


@pytest.fixture(scope="module")
def results(tmp_path_factory, has_async_io):
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "nvme").mkdir()
    out = {}
    for world_size in (4, 2, 3, 1, 5):
        cases = folder / f"cases-{world_size}.json"
        cases.write_text(json.dumps(cases_of(world_size, folder, has_async_io)))
        answer = folder / f"results-{world_size}.json"
        arguments = ["-m", "tests.distributed.matrix", str(cases), str(answer)]
        start = time.monotonic()
        ended = run_processes(world_size, arguments, folder=folder, timeout=900)
        assert ended.codes == [0] * world_size, ended.text()
        print(f"{world_size} processes: {time.monotonic() - start:.0f} s")
        out[world_size] = json.loads(answer.read_text())
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_bits_do_not_depend_on_processes_stages_or_offload(results, tmp_path, has_async_io, world_size, record_run):
    for name, result in results[world_size].items():
        reference = reference_of(results, name)
        for what in ("losses", "tables", "held_out"):  # of the steps this case ran itself
            expected = {step: reference[what][step] for step in result[what]}
            assert result[what] == expected, f"{world_size} processes, {name}: {what} differ"
        assert result["final"] == reference["final"], f"{world_size} processes, {name}: weights or moments differ"
    for name, case in cases_of(world_size, tmp_path, has_async_io).items():
        record_run(processes=world_size, **described(case, results[world_size][name], reference_of(results, name)))


def reference_of(results, name):
    return results[1][name.split("/")[0]]


def described(case, result, reference):
    """What a case was, as record_run wants it."""
    family, checkpointing = FAMILIES[case["family"]], case.get("gradient_checkpointing")
    used = {
        "lora_dropout": family["dropout"] > 0,
        "packing": family["packed"],
        "optimizer.lora_plus_ratio": "lora_plus_ratio" in family,
        f"quantization: {family.get('quantization')}": "quantization" in family,
        "auto": case.get("auto"),
        "gradient_checkpointing": checkpointing,
        "activation_offload": checkpointing == "offloaded",
    }
    return {
        "method": next(name for name in METHODS if name.replace("_", "") == result["method"].lower()),
        "form": family.get("form", "plain"),
        "base_zero": case.get("stage", 0),
        "base_offload": case.get("offload_param"),
        "adapter_zero": case.get("arena_stage", 1),
        "optimizer_offload": case.get("offload_optimizer", False),
        "dtype": family["dtype"],
        "features": [name for name, is_used in used.items() if is_used],
        "resumed_from": case.get("resumed_from"),
        "resizes": reference["events"],
    }


def test_the_runs_are_long_enough_to_mean_something(results):
    for name in REFERENCE:
        assert len(set(results[1][name]["losses"].values())) == 60
    for name in ELALORA:
        assert results[1][name]["events"] >= 10
        assert len(set(results[1][name]["tables"].values())) >= 10
    tables = {name: len(set(results[1][name]["tables"].values())) for name in METHOD_FAMILIES}
    assert tables["lora"] == tables["dora"] == tables["nf4"] == 1 and tables["int8"] >= 10
    assert tables["adalora"] == 2  # masks change no table; the last step removes what is masked
    assert tables["alora"] == 5 and min(tables["own_a"], tables["shared_a"], tables["probe"]) >= 4, tables
    assert len({results[1][name]["final"] for name in REFERENCE}) == len(REFERENCE)


def test_no_parameter_stays_gathered(results):
    assert all(r["gathered"] == 0 for by_name in results.values() for r in by_name.values())


def test_nvme_was_in_the_matrix(has_async_io):
    if not has_async_io:
        pytest.skip("no libaio headers: the matrix ran its NVMe cases with CPU offload instead")
    assert any(c.get("offload_param") == "nvme" for c in _all_cases().values())


def _all_cases():
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return {k: v for w in (4, 2, 3, 1, 5) for k, v in cases_of(w, Path(folder), True).items()}
