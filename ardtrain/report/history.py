"""`ranks.jsonl` as arrays: the rank of every site after every event, and what each event says of itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RankHistory:
    """Rank of every matrix after every event; the heads of a matrix are summed."""

    matrices: list[str]  # module paths in the order of line 0
    steps: list[int]  # [E] optimizer step of each event, the start first
    ranks: Integers  # [E, M]


@dataclass(frozen=True)
class SiteHistory:
    """Rank of every site after every event; the start is the first."""

    sites: list[str]  # in the order of line 0: module paths, `:head.5` behind it where a head owns the rank
    steps: list[int]  # [E] optimizer steps
    ranks: Integers  # [E, S]
    events: list[dict[str, Any]]  # [E] the lines of the file without tables and changes
    moved: list[dict[str, int]]  # [E] components pruned, born and masked in each event

    @property
    def by_matrix(self) -> RankHistory:
        """The heads of each matrix summed."""
        owners = [matrix_of(site) for site in self.sites]
        matrices = list(dict.fromkeys(owners))
        number = {name: at for at, name in enumerate(matrices)}
        sums = np.zeros((len(self.steps), len(matrices)), np.int64)
        np.add.at(sums.T, [number[name] for name in owners], self.ranks.T)
        return RankHistory(matrices, self.steps, sums)


def read_ranks(path: str | os.PathLike[str]) -> RankHistory:
    """The history of a `ranks.jsonl` by matrices. Raises ValueError as `read_sites`."""
    return read_sites(path).by_matrix


def read_sites(path: str | os.PathLike[str]) -> SiteHistory:
    """The history in a `ranks.jsonl`; a last line that is being written, or was torn by a crash, is left out.

    Raises:
        ValueError: the file is not there or empty, line 1 holds no table, a line is no JSON object, or a change names
            a site that the table lacks or a rank before it that is not the one reached.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the output_dir of a run with adapters holds one")
    records = list(json_lines(path))
    if not records or not isinstance(records[0].get("table"), dict):
        raise ValueError(f"{path}: line 1 must hold the rank table of the start; this is no ranks.jsonl of a run")
    sites = list(records[0]["table"])
    number = {site: at for at, site in enumerate(sites)}
    now = [int(rank) for rank in records[0]["table"].values()]
    ranks = np.empty((len(records), len(sites)), np.int64)
    moved = []
    for at, record in enumerate(records):
        counts: Counter[str] = Counter()
        for change in record.get("changes", ()):
            place = number.get(change["site"], -1)
            reached = None if place < 0 else now[place]
            if reached != change["before"]:
                raise ValueError(
                    f"{path}:{at + 1}: {change['site']} has rank {change['before']} before the event, but the lines "
                    f"above leave it at {reached}; a line is missing"
                )
            now[place] = change["after"]
            counts.update({name: change.get(name, 0) for name in ("pruned", "born", "masked")})
        ranks[at] = now
        moved.append(dict(counts))
    events = [{key: value for key, value in r.items() if key not in ("table", "changes", "digest")} for r in records]
    return SiteHistory(sites, [int(r["step"]) for r in records], ranks, events, moved)


def json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file whose last line may be in writing; none where there is no file.

    Raises:
        ValueError: a whole line is no object with a step; names file and line.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: no record with a step ({type(error).__name__}); the file was edited or is not a "
                "run's: remove the line"
            ) from error
        yield record


def matrix_of(site: str) -> str:
    """`layers.0.q_proj:head.5` belongs to the matrix `layers.0.q_proj`."""
    return site.partition(":")[0]


def head_of(site: str) -> int | None:
    """5 of `layers.0.q_proj:head.5`; None where the whole matrix owns the rank."""
    number = site.partition(":head.")[2]
    return int(number) if number.isdigit() else None


def place_of(matrix: str) -> tuple[str, int | None, str]:
    """(path before the layer number, layer number, path after it); a matrix outside the layers has no number."""
    parts = matrix.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return "", None, matrix
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def grid(matrices: list[str]) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Row labels (module kinds), column labels (layers), and each matrix's (row, column)."""
    places = [place_of(matrix) for matrix in matrices]
    stacks = {stack for stack, layer, _ in places if layer is not None}
    layers = sorted({layer for _, layer, _ in places if layer is not None})
    columns = [str(layer) for layer in layers]
    if any(layer is None for _, layer, _ in places):
        columns.append("none")
    # With several towers the path before the layer number tells their rows apart.
    labels = [f"{stack}: {kind}" if stack and len(stacks) > 1 else kind for stack, _, kind in places]
    rows = list(dict.fromkeys(labels))
    cell = [
        (rows.index(label), columns.index("none" if layer is None else str(layer)))
        for label, (_, layer, _) in zip(labels, places, strict=True)
    ]
    return rows, columns, cell


def budget(method: str, settings: Mapping[str, Any], start: Integers) -> NDArray[np.float64] | None:
    """[S] the rank that the method's budget gives each site on average; None where it has none.

    settings: of the resolved config; start: [S] first ranks.
    """
    own = settings.get(method) or {}
    if method == "adalora":
        return np.full(len(start), float(own["target_r"]))
    if method == "ard_lora" and not own.get("budget", True):
        return None
    if method in ("ard_lora", "probe_lora") and own.get("target_r") is not None:
        return np.full(len(start), float(own["target_r"]))
    return start.astype(np.float64) if len(start) else None
