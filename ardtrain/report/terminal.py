"""`ardtrain ranks RUN`: the heat map of the ranks as text of 80 columns, with colours where a terminal has them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from ardtrain.config import ConfigError
from ardtrain.report.history import SiteHistory, grid, head_of, matrix_of, place_of
from ardtrain.report.reading import RunData, read_run

WIDTH = 80
MOST_ROWS = 40  # layers; beyond, neighbours share a line
_CELL, _LABEL = 10, 8  # columns of a number with its change, and of a line's name
# Viridis in the 6 x 6 x 6 cube of 256-colour terminals, dark to light, and the text that is readable on it.
_RAMP = ((53, 15), (54, 15), (60, 15), (24, 15), (30, 15), (36, 15), (35, 15), (71, 16), (113, 16), (149, 16),
         (190, 16), (226, 16))  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Numbers of a heat map. values, changes: [rows, columns], nan where there is no adapter."""

    rows: list[str]
    columns: list[str]
    values: np.ndarray
    changes: np.ndarray


def ranks(arguments: Sequence[str]) -> int:
    """`ardtrain ranks RUN [OUT.png] [--heads KIND]`: the picture where a file is named, else the text. Returns 0.

    Raises:
        ConfigError: no run, a broken file, no ranks, no such kind of matrix, an unknown option.
    """
    heads, rest = None, list(arguments)
    if "--heads" in rest:
        at = rest.index("--heads")
        if at + 1 == len(rest):
            raise ConfigError(["--heads needs a kind of matrix, such as --heads q_proj"])
        heads = rest.pop(at + 1)
        rest.pop(at)
    unknown = [argument for argument in rest[2:] or rest if argument.startswith("--") or argument in rest[2:]]
    if unknown:
        raise ConfigError([f"{unknown[0]}: ranks takes a run folder, a picture's path or none, and --heads KIND"])
    if not rest:
        raise ConfigError(["which run folder? for example: ardtrain ranks runs/e2e_nlg"])
    try:
        if len(rest) == 2:
            from ardtrain.report.pictures import draw_ranks  # matplotlib

            if not Path(rest[1]).suffix:
                raise ConfigError([f"{rest[1]}: the picture's name has no ending that says its kind; add .png or .svg"])

            print(draw_ranks(Path(rest[0]) / "ranks.jsonl", rest[1]))
            return 0
        text = ranks_text(read_run(rest[0], rest[0]), heads=heads, colours=has_colours(sys.stdout, os.environ))
    except OSError as error:
        raise ConfigError([f"{error.filename or rest[-1]}: {error.strerror or error}"]) from error
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError([str(error)]) from error
    print(text)
    return 0


def has_colours(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """A terminal that is not dumb, unless NO_COLOR says otherwise (https://no-color.org)."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "") not in ("", "dumb")


def ranks_text(run: RunData, *, heads: str | None = None, colours: bool = False) -> str:
    """The heat maps of all towers, or of the heads of one kind of matrix.

    Raises:
        ValueError: the run has no ranks, or no matrix of that kind has heads.
    """
    history = run.history
    if history is None:
        raise ValueError(f"{run.name}: has no ranks (method {run.method}, state {run.view.state})")
    first, last = (int(history.ranks[row].sum()) for row in (0, -1))
    of = "" if run.view.num_steps is None else f" of {run.view.num_steps}"
    num_events = len(history.steps) - 1
    lines = [
        f"{run.name}: {run.method}, {run.view.state}, step {run.view.step}{of}",
        f"total rank {last}" + (f" ({first} at the start)" if first != last else "")
        + f", {num_events} event{'' if num_events == 1 else 's'}"
        + (f", the last after step {history.steps[-1]}" if num_events else ""),
    ]  # fmt: skip
    tables = matrix_tables(history) if heads is None else {heads: heads_table(history, heads)}
    for title, table in tables.items():
        largest = float(np.nanmax(table.values, initial=1.0))
        lines += ["", *([title] if len(tables) > 1 or heads else [])]
        lines += _table_lines(table, largest, colours=colours, wide=heads is None)
    if heads is None:
        lines += ["", "A number is the rank now, with its change since the start; layers downwards."]
        if any("-" in name[1:] for table in tables.values() for name in table.rows):
            lines.append("Of several layers in a line it is their mean.")
        if any(head_of(site) is not None for site in history.sites):
            lines.append("Heads are summed; --heads KIND shows those of one kind of matrix.")
    return "\n".join(lines)


def matrix_tables(history: SiteHistory) -> dict[str, Table]:
    """Tower (the path before the layer number) -> layers x kinds; what lies outside the layers has a table too."""
    matrices = history.by_matrix
    towers: dict[str, list[int]] = {}
    for at, name in enumerate(matrices.matrices):
        stack, layer, _ = place_of(name)
        towers.setdefault(stack if layer is not None else "outside the layers", []).append(at)
    tables = {}
    for tower, members in towers.items():
        kinds, layers, cells = grid([matrices.matrices[at] for at in members])
        shape = (len(layers), len(kinds))
        now, change = np.full(shape, np.nan), np.full(shape, np.nan)
        for (kind, layer), at in zip(cells, members, strict=True):
            now[layer, kind] = matrices.ranks[-1, at]
            change[layer, kind] = matrices.ranks[-1, at] - matrices.ranks[0, at]
        names = [kind.rpartition(".")[2] for kind in kinds]
        tables[tower] = _grouped(Table([f"{label}" for label in layers], names, now, change))
    return tables


def heads_table(history: SiteHistory, kind: str) -> Table:
    """Layers x heads of the matrices whose name ends in `kind`. Raises ValueError: none has heads."""
    found = {
        (place_of(matrix_of(site))[:2], head): at
        for at, site in enumerate(history.sites)
        if (head := head_of(site)) is not None and f".{matrix_of(site)}".endswith(f".{kind}")
    }
    if not found:
        kinds = {matrix_of(site).rpartition(".")[2] for site in history.sites if head_of(site) is not None}
        known = f"; known: {', '.join(sorted(kinds))}" if kinds else ", and no matrix of this run has"
        raise ValueError(f"--heads {kind}: no matrix of this kind has ranks by head{known}")
    layers = list(dict.fromkeys(place for place, _ in found))
    shape = (len(layers), 1 + max(head for _, head in found))
    now, change = np.full(shape, np.nan), np.full(shape, np.nan)
    for (place, head), at in found.items():
        row = layers.index(place)
        now[row, head] = history.ranks[-1, at]
        change[row, head] = history.ranks[-1, at] - history.ranks[0, at]
    rows = ["-" if layer is None else str(layer) for _, layer in layers]
    return _grouped(Table(rows, [str(head) for head in range(shape[1])], now, change))


def _grouped(table: Table) -> Table:
    """Neighbouring rows as their mean, where there are too many."""
    size = -(-len(table.rows) // MOST_ROWS)
    if size <= 1:
        return table
    starts = range(0, len(table.rows), size)
    names = [f"{table.rows[at]}-{table.rows[min(at + size, len(table.rows)) - 1]}" for at in starts]

    def means(values: np.ndarray) -> np.ndarray:
        return np.stack([np.nanmean(values[at : at + size], axis=0) for at in starts])

    return Table(names, table.columns, means(table.values), means(table.changes))


def _table_lines(table: Table, largest: float, *, colours: bool, wide: bool) -> list[str]:
    """wide: with the changes; columns that do not fit go into further blocks."""
    cell = _CELL if wide else 4
    across = max(1, (WIDTH - _LABEL) // cell)
    lines: list[str] = []
    for at in range(0, len(table.columns), across):
        part = slice(at, at + across)
        head = "".join(f"{name[: cell - 1]:>{cell}}" for name in table.columns[part])
        lines += [*([""] if at else []), f"{'layer':<{_LABEL}}{head}".rstrip()]
        for name, values, changes in zip(table.rows, table.values[:, part], table.changes[:, part], strict=True):
            cells = [_cell(v, c, largest, cell, colours, wide) for v, c in zip(values, changes, strict=True)]
            lines.append(f"{name:<{_LABEL}}{''.join(cells)}".rstrip())
        if wide:
            sums = zip(np.nansum(table.values, axis=0)[part], np.nansum(table.changes, axis=0)[part], strict=True)
            if not any("-" in name[1:] for name in table.rows):  # a sum of means would say little
                lines.append((f"{'sum':<{_LABEL}}" + "".join(_plain(v, c, cell) for v, c in sums)).rstrip())
    return lines


def _cell(value: float, change: float, largest: float, width: int, colours: bool, wide: bool) -> str:
    if np.isnan(value):
        return " " * width
    text = _plain(value, change if wide else 0.0, width)
    if not colours:
        return text
    background, foreground = _RAMP[min(len(_RAMP) - 1, int(value / max(largest, 1.0) * len(_RAMP)))]
    return f"\x1b[48;5;{background};38;5;{foreground}m{text}\x1b[0m"


def _plain(value: float, change: float, width: int) -> str:
    """`12 +4`, right of `width` columns; a change of nothing is left out, its place is not."""
    moved = f"{change:+.0f}" if round(change) else ""
    return f"{value:.0f}".rjust(width) if width < 6 else f"{value:{width - 5}.0f}{moved:>5}"
