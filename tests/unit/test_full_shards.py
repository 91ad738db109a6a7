"""Reading a full engine's checkpoint of several processes, from files laid out by hand as DeepSpeed lays them out."""

import math
from types import SimpleNamespace

import pytest
import torch

from ardtrain.full_shards import MASTER, MOMENTS, read_shards

SHAPES = {"a": (3, 5), "b": (2,), "c": (7,), "d": (1,)}  # 15, 2, 7 and 1 numbers
KINDS = (MASTER, *MOMENTS)
STATES = {"global_steps": 4, "global_samples": 16, "skipped_steps": 1, "module": {"counts": torch.arange(3)}}


def values(what):
    """{name: [numel]}, no number twice."""
    generator = torch.Generator().manual_seed(KINDS.index(what))
    return {name: torch.randn(math.prod(shape), generator=generator) for name, shape in SHAPES.items()}


def cut_rows(processes):
    """Stages 1 and 2, one group: all parameters in a row, padded at the end, in equal partitions."""
    numel = sum(math.prod(shape) for shape in SHAPES.values())
    size = -(-numel // processes)
    for number in range(processes):
        begin, end = number * size, (number + 1) * size
        places, at = {}, 0
        for name, shape in SHAPES.items():
            first, last = max(at, begin), min(at + math.prod(shape), end)
            if first < last:
                places[name] = SimpleNamespace(start=first - begin, numel=last - first)
            at += math.prod(shape)
        flats = {}
        for what in KINDS:
            row = torch.cat([*values(what).values(), torch.full((processes * size - numel,), math.nan)])
            flats[what] = row[begin:end].clone()
        state = {0: {"step": torch.tensor(4.0)} | {m: flats[m] for m in MOMENTS}}
        yield {
            "base_optimizer_state": {"state": state},
            "single_partition_of_fp32_groups": [flats[MASTER][: numel - begin]],  # without the padding
            "param_slice_mappings": [places],
            "loss_scaler": "the scaler",
        }


def cut_parameters(processes, groups):
    """Stage 3: each parameter in equal parts, padded; a flat array for each group of parameters."""
    for number in range(processes):
        flats, state = [], {}
        for index, names in enumerate(groups):
            flat = {}
            for what in KINDS:
                parts = []
                for name in names:
                    size = -(-math.prod(SHAPES[name]) // processes)
                    padded = torch.full((processes * size,), math.nan)
                    padded[: math.prod(SHAPES[name])] = values(what)[name]
                    parts.append(padded[number * size : (number + 1) * size])
                flat[what] = torch.cat(parts)
            flats.append(torch.nn.Parameter(flat[MASTER]))
            state[index] = {"step": 4} | {m: flat[m] for m in MOMENTS}
        yield {"optimizer_state_dict": {"state": state}, "fp32_flat_groups": flats}


def write_files(folder, parts, *, stage, groups=(), prefix=""):
    for number, part in enumerate(parts):
        torch.save({"optimizer_state_dict": part}, folder / f"{prefix}zero_pp_rank_{number}_mp_rank_00_optim_states.pt")
    first = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    shapes = [{name: torch.Size(SHAPES[name]) for name in names} for names in groups]
    torch.save(STATES | {"param_shapes": shapes}, folder / first)


def assert_reads(shards):
    for what in KINDS:
        for name, wanted in values(what).items():
            assert shards.numel(name) == len(wanted)
            assert torch.equal(shards.read(name, what), wanted)
            for begin in range(len(wanted) + 1):  # every slice, and beyond the end
                for numel in range(len(wanted) + 2):
                    padded = torch.cat([wanted, torch.zeros(2 * len(wanted) + 2)])
                    assert torch.equal(shards.read(name, what, begin=begin, numel=numel), padded[begin : begin + numel])


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 9])
def test_rows_cut_anywhere_are_read_whole_and_in_slices(tmp_path, processes):
    write_files(tmp_path, cut_rows(processes), stage=2, prefix="bf16_")
    shards = read_shards(tmp_path, processes=processes, stage=2)
    assert_reads(shards)
    assert (shards.steps, shards.scaler) == (4, {"loss_scaler": "the scaler"})
    assert shards.counters == {"global_steps": 4, "global_samples": 16, "skipped_steps": 1}
    assert torch.equal(shards.weights["counts"], torch.arange(3))
    assert shards.numel("nobody") == 0


@pytest.mark.parametrize("groups", [[["a", "b", "c", "d"]], [["a"], ["b", "c"], ["d"]]])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 9])
def test_parameters_cut_each_are_read_whole_and_in_slices(tmp_path, processes, groups):
    """On 9 processes most have nothing of the smaller parameters but padding."""
    write_files(tmp_path, cut_parameters(processes, groups), stage=3, groups=groups)
    shards = read_shards(tmp_path, processes=processes, stage=3)
    assert_reads(shards)
    assert shards.steps == 4


def test_before_the_first_step_there_are_masters_alone(tmp_path):
    parts = list(cut_rows(2))
    for part in parts:
        part["base_optimizer_state"]["state"] = {}
    write_files(tmp_path, parts, stage=1)
    shards = read_shards(tmp_path, processes=2, stage=1)
    assert shards.steps == 0
    assert torch.equal(shards.read("c", MASTER), values(MASTER)["c"])


def test_what_is_missing_damaged_or_laid_out_otherwise_is_refused(tmp_path):
    write_files(tmp_path, cut_rows(2), stage=2)
    with pytest.raises(ValueError, match=r"is no complete .* \(0 files are named \*zero_pp_rank_2_mp"):
        read_shards(tmp_path, processes=3, stage=2)
    (tmp_path / "mp_rank_00_model_states.pt").rename(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="is not laid out as a ZeRO checkpoint of stage 3 .*KeyError"):
        read_shards(tmp_path, processes=2, stage=3)
    path = tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged"):
        read_shards(tmp_path, processes=2, stage=2)
