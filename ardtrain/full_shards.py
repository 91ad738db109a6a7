"""The checkpoint of a full engine, read parameter by parameter: for any number of processes and any ZeRO stage.

Each process that saved left flat float32 arrays: its partition of the masters and of both moments. Stages 1 and 2 lay
all parameters in a row and cut the row; stage 3 cuts every parameter by itself. Here both become pieces of parameters.
Files are mapped into memory, so a process reads from the disk only what it asks for. They are pickles.

Letters: P processes that saved, n numbers asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ardtrain.reasons import first_line

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")  # DeepSpeed's names of what fp16 carries on
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of the engine


class _Piece(NamedTuple):
    """Numbers `begin` to `begin + numel` of a flattened parameter; in the arrays they begin at `start`."""

    begin: int
    numel: int
    start: int
    arrays: Mapping[str, Tensor]


@dataclass(frozen=True)
class Shards:
    """Masters and, after the first applied step, moments of every trained parameter.

    steps: the optimizer's count, 0 where there are no moments yet. scaler, counters: by DeepSpeed's names. weights: the
    model's state dict as the first process saved it; its buffers are whole, under stage 3 its parameters are not.
    """

    steps: int
    scaler: Mapping[str, Any]
    counters: Mapping[str, int]
    weights: Mapping[str, Tensor]
    pieces: Mapping[str, list[_Piece]]

    def numel(self, name: str) -> int:
        """Numbers of this parameter in the files; 0 if it is not in them."""
        return sum(piece.numel for piece in self.pieces.get(name, ()))

    def read(self, name: str, what: str, *, begin: int = 0, numel: int | None = None) -> Tensor:
        """[n] float32 of a flattened parameter, zeros beyond its end. what: MASTER or one of MOMENTS."""
        out = torch.zeros(self.numel(name) if numel is None else numel)
        for piece in self.pieces[name]:
            first, last = max(begin, piece.begin), min(begin + len(out), piece.begin + piece.numel)
            if first < last:
                start = piece.start + first - piece.begin
                out[first - begin : last - begin] = piece.arrays[what][start : start + last - first]
        return out


def read_shards(folder: Path, *, processes: int, stage: int) -> Shards:
    """What `processes` processes saved at this stage. It unpickles, and reads little more than names and places.

    Raises:
        ValueError: files are missing or are none of DeepSpeed's ZeRO checkpoints.
    """
    try:
        saved = [
            _load(folder, f"*zero_pp_rank_{number}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
            for number in range(processes)
        ]
        first = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        states = _load(folder, first)
        pieces: dict[str, list[_Piece]] = {}
        for name, piece in _rows_cut(saved) if stage < 3 else _parameters_cut(saved, states["param_shapes"]):
            pieces.setdefault(name, []).append(piece)
        return Shards(
            _steps(saved[0]),
            {name: saved[0][name] for name in SCALER if name in saved[0]},
            {name: int(states[name]) for name in COUNTERS},
            states["module"],
            pieces,
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not laid out as a ZeRO checkpoint of stage {stage} ({error!r})") from error


def _load(folder: Path, pattern: str) -> Any:
    paths = sorted(folder.glob(pattern))
    if len(paths) != 1:
        raise ValueError(f"{folder} is no complete DeepSpeed checkpoint ({len(paths)} files are named {pattern})")
    try:
        return torch.load(paths[0], map_location="cpu", weights_only=False, mmap=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{paths[0]} is damaged ({first_line(error)})") from error


def _base(part: Mapping[str, Any]) -> Mapping[int, Mapping[str, Any]]:
    """The state of torch's optimizer by the number of its flat array; empty before the first applied step."""
    key = "base_optimizer_state" if "base_optimizer_state" in part else "optimizer_state_dict"
    state: Mapping[int, Mapping[str, Any]] = part[key]["state"]
    return state


def _steps(part: Mapping[str, Any]) -> int:
    return max((int(entry["step"]) for entry in _base(part).values()), default=0)


def _arrays(part: Mapping[str, Any], masters: list[Tensor]) -> list[Mapping[str, Tensor]]:
    """For each flat array of a process: {MASTER and MOMENTS: [numbers]}."""
    base = _base(part)
    moments = [{name: base[i][name] for name in MOMENTS} if base else {} for i in range(len(masters))]
    return [{MASTER: master.detach(), **own} for master, own in zip(masters, moments, strict=True)]


def _rows_cut(saved: list[Any]) -> Iterator[tuple[str, _Piece]]:
    """Stages 1 and 2: which parameters a partition touches is written beside it; a parameter goes on in the next."""
    begins: dict[str, int] = {}
    for part in saved:
        arrays = _arrays(part, part["single_partition_of_fp32_groups"])
        for places, own in zip(part["param_slice_mappings"], arrays, strict=True):
            for name, place in places.items():
                begin = begins.get(name, 0)
                yield name, _Piece(begin, place.numel, place.start, own)
                begins[name] = begin + place.numel


def _parameters_cut(saved: list[Any], groups: list[Mapping[str, Any]]) -> Iterator[tuple[str, _Piece]]:
    """Stage 3: of every parameter each process has ceil(numel / P) numbers, the last ones fewer or none."""
    for number, part in enumerate(saved):
        arrays = _arrays(part, part["fp32_flat_groups"])
        for shapes, own in zip(groups, arrays, strict=True):
            start = 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                size = -(-numel // len(saved))
                count = max(0, min(size, numel - number * size))
                yield name, _Piece(number * size, count, start, own)
                start += size
