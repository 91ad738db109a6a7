"""Pictures of a suite: each method's seeds with median and interval, and methods over the sizes compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ardtrain.compare.suite import Suite
from ardtrain.compare.tables import Row


def draw(suite: Suite, rows: Sequence[Row], png_path: str | Path) -> Path:
    """A point a seed, a bar at the median with its interval; the dashed line is the reference's median."""
    metric, mode = suite.table_metric
    figure = Figure(figsize=(max(5.0, 1.6 + 1.1 * len(rows)), 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = list(row.values.values())
        spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        colour = "0.35" if row.method == suite.reference_of(row.method) else "C0"
        axes.plot(place + spread, values, "o", color=colour, alpha=0.75, markersize=5)
        axes.hlines(row.median, place - 0.28, place + 0.28, color=colour, linewidth=2.4)
        if len(values) > 1:
            axes.vlines(place + 0.28, *row.interval, color=colour, linewidth=1.4)
        reference = [other.median for other in rows if other.method == suite.reference_of(row.method)]
        if len(reference) == 1:
            axes.hlines(reference[0], place - 0.5, place + 0.5, color="0.6", linestyle="--", linewidth=0.9, zorder=0)
    axes.set_xticks(range(len(rows)), [f"{row.method}\n{row.learning_rate:g}" for row in rows])
    axes.set_ylabel(f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)")
    axes.set_title(f"{suite.name}: each seed, the median, its 95 % interval", fontsize=10, loc="left")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png_path)
    return Path(png_path)


def draw_budgets(suite: Suite, rows: Sequence[Row], png_path: str | Path) -> Path:
    """A line for each method over the sizes: median and its interval against the final trainable parameters."""
    metric, mode = suite.table_metric
    figure = Figure(figsize=(7.0, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines: dict[str, list[Row]] = {}
    for row in rows:
        budget = suite.methods[row.method].budget
        name = row.method.removesuffix(f"-{budget}") if budget else row.method
        lines.setdefault(name if suite.tuning else f"{name} at {row.learning_rate:g}", []).append(row)
    for at, (method, points) in enumerate(lines.items()):
        sized = sorted(((row.parameters[1], row) for row in points if row.parameters), key=lambda pair: pair[0])
        x, medians = [size for size, _ in sized], [row.median for _, row in sized]
        shift = 1.0 + 0.012 * (at - (len(lines) - 1) / 2)  # intervals at one size stay apart
        low = [row.median - row.interval[0] for _, row in sized]
        high = [row.interval[1] - row.median for _, row in sized]
        axes.errorbar([size * shift for size in x], medians, (low, high), marker="o", capsize=2.5, label=method)
    axes.set_xscale("log")
    axes.set_xlabel("final trainable parameters")
    axes.set_ylabel(f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)")
    axes.set_title(f"{suite.name}: medians over the seeds with 95 % intervals", fontsize=10, loc="left")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(png_path)
    return Path(png_path)
