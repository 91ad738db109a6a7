"""Pictures from a run folder's files; starts no engine, needs no display."""

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ardtrain.report.history import RankHistory, grid, place_of, read_ranks

_NUM_LINES = 8  # sites drawn over the events; more cannot be told apart
_MAX_LABELLED_CELLS = 500  # beyond, numbers in cells are too small to read


def draw_ranks(ranks_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> Path:
    """Draw where the rank went: final ranks by layer and module, and the matrices that moved most over the steps.

    Args:
        ranks_path: a run's `ranks.jsonl`.
        png_path: file to write; its folder must exist.
    Returns:
        `png_path`.
    """
    ranks_figure(read_ranks(ranks_path)).savefig(png_path)
    return Path(png_path)


def ranks_figure(history: RankHistory) -> Figure:
    """Final ranks by layer and module, and the matrices that moved most over the steps."""
    rows, columns, cell = grid(history.matrices)
    labelled = len(rows) * len(columns) <= _MAX_LABELLED_CELLS
    width = min(max(9.0, 3.0 + (0.4 if labelled else 0.18) * len(columns)), 26.0)
    heights = (min(max(1.6, 0.38 * len(rows)), 12.0), 3.2)
    figure = Figure(figsize=(width, sum(heights) + 2.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    totals, num_events = history.ranks.sum(axis=1), len(history.steps) - 1
    total = f"total rank {totals[-1]}" if totals[0] == totals[-1] else f"total rank {totals[0]} to {totals[-1]}"
    figure.suptitle(
        f"Adapter ranks after {num_events} resize event{'' if num_events == 1 else 's'}, {total}",
        fontsize=12,
        fontweight="bold",
    )
    map_axes, line_axes = figure.subplots(2, 1, height_ratios=heights)
    _draw_map(map_axes, history, rows, columns, cell, labelled=labelled)
    _draw_lines(line_axes, history)
    return figure


def _draw_map(
    axes: Axes,
    history: RankHistory,
    rows: list[str],
    columns: list[str],
    cell: list[tuple[int, int]],
    *,
    labelled: bool,
) -> None:
    """Heat map: the number is the final rank, the colour what it gained or lost since the start."""
    change = np.full((len(rows), len(columns)), np.nan)
    for (row, column), before, after in zip(cell, history.ranks[0], history.ranks[-1], strict=True):
        change[row, column] = after - before
    largest = max(1.0, float(np.nanmax(np.abs(change))))
    axes.set_facecolor("0.93")  # no adapter there
    image = axes.imshow(
        change, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -largest, largest), aspect="auto", interpolation="nearest"
    )
    if labelled:
        for (row, column), rank in zip(cell, history.ranks[-1], strict=True):
            dark = abs(change[row, column]) > 0.6 * largest
            axes.text(column, row, str(rank), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    every = max(1, len(columns) // 40)
    axes.set_xticks(range(0, len(columns), every), columns[::every])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    what = (
        "Final rank (number) and its change since the start (colour)" if labelled else "Change of rank since the start"
    )
    axes.set_title(what, fontsize=10, loc="left")
    axes.figure.colorbar(image, ax=axes, label="rank gained or lost", pad=0.01, ticks=MaxNLocator(5, integer=True))


def _draw_lines(axes: Axes, history: RankHistory) -> None:
    """Steps of the matrices with the most rank moved in all; ties in the order of the model."""
    moved = np.abs(np.diff(history.ranks, axis=0)).sum(axis=0)
    order = [int(i) for i in np.argsort(-moved, kind="stable")[:_NUM_LINES] if moved[i] > 0]
    end = history.steps[-1] + max(1, (history.steps[-1] - history.steps[0]) // 40)  # shows the last event's change
    steps, ranks = [*history.steps, end], np.vstack([history.ranks, history.ranks[-1:]])
    for place, i in enumerate(order):
        offset = (place - (len(order) - 1) / 2) * 0.035  # equal ranks stay visible side by side
        axes.step(
            steps, ranks[:, i] + offset, where="post", linewidth=1.8, alpha=0.9,
            color=f"C{place}", label=_label(history.matrices[i]),
        )  # fmt: skip
    if order:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, fontsize=8, frameon=False)
    else:
        axes.text(0.5, 0.5, "no rank changed", transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set_title("Matrices that moved most", fontsize=10, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("rank")
    axes.set_xlim(steps[0], end)
    axes.set_ylim(-0.2, max(1.0, float(ranks[:, order].max(initial=0))) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(matrix: str) -> str:
    stack, layer, kind = place_of(matrix)
    if layer is None:
        return matrix
    tower = stack.split(".")[0] if "vision" in stack else ""
    return f"{tower} layer {layer} {kind.split('.')[-1]}".strip()
