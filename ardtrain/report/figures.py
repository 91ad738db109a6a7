"""`ardtrain report --figures FOLDER`: the same numbers as PNG and SVG for papers, and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ardtrain.faults import replace_file
from ardtrain.report.history import RankHistory, grid, head_of, matrix_of, place_of
from ardtrain.report.pictures import ranks_figure
from ardtrain.report.reading import RunData

FORMATS = ("png", "svg")


def write_figures(runs: Sequence[RunData], folder: Path) -> None:
    """Writes the pictures and tables of all runs. Raises OSError: the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "summary.csv", summary_csv(runs))
    _save(loss_figure(runs), folder / "losses")
    for run in runs:
        name = re.sub(r"[^\w.-]+", "-", run.name)
        replace_file(folder / f"{name}-metrics.csv", metrics_csv(run))
        if run.history is None:
            continue
        matrices = run.history.by_matrix
        replace_file(folder / f"{name}-ranks.csv", ranks_csv(run))
        replace_file(folder / f"{name}-events.csv", events_csv(run))
        _save(ranks_figure(matrices), folder / f"{name}-ranks")
        _save(time_figure(matrices, end=run.view.step), folder / f"{name}-time")


def _save(figure: Figure, stem: Path) -> None:
    for kind in FORMATS:
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(stem.with_name(f"{stem.name}.{kind}"), metadata=metadata)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def loss_figure(runs: Sequence[RunData]) -> Figure:
    """Training loss (thin) and held-out loss (thick) of all runs; total rank below, where one has ranks."""
    with_ranks = [run for run in runs if run.history is not None]
    figure = _figure(7.0, 5.6 if with_ranks else 3.4)
    axes = figure.subplots(1 + bool(with_ranks), 1, squeeze=False, height_ratios=(2, 1)[: 1 + bool(with_ranks)])[:, 0]
    for at, run in enumerate(runs):
        steps, values = run.curves.get("loss", ([], []))
        held_steps, held = run.curves.get("eval_loss", ([], []))
        axes[0].plot(steps, values, color=f"C{at}", linewidth=0.8, alpha=0.45, label=None if held else run.name)
        axes[0].plot(held_steps, held, "o-", color=f"C{at}", markersize=3, label=run.name if held else None)
    axes[0].set_ylabel("loss (thin: training, thick: held-out)")
    for at, run in enumerate(runs):
        if run.history is not None:
            steps = [*run.history.steps, max(run.view.step, run.history.steps[-1])]
            totals = run.history.ranks.sum(axis=1).tolist()
            axes[1].step(steps, [*totals, totals[-1]], where="post", color=f"C{at}", label=run.name)
            if run.budget_ranks is not None:
                axes[1].axhline(float(run.budget_ranks.sum()), color=f"C{at}", linestyle="--", linewidth=0.8)
    if with_ranks:
        axes[1].set_ylabel("total rank (dashed: budget)")
        axes[1].set_ylim(bottom=0)
    for one in axes:
        one.set_xlabel("optimizer step")
        one.grid(color="0.9")
        one.spines[["top", "right"]].set_visible(False)
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize=8, frameon=False)
    return figure


def time_figure(history: RankHistory, *, end: int) -> Figure:
    """Rank of each matrix over the steps: a row a matrix, sorted by kind and then by layer."""
    rows, _, cells = grid(history.matrices)
    order = sorted(range(len(cells)), key=lambda i: cells[i])
    edges = [*history.steps, max(end, history.steps[-1] + 1)]
    figure = _figure(8.0, min(12.0, max(3.0, 0.09 * len(order) + 1.0)))
    axes = figure.subplots()
    values = history.ranks.T[order]
    image = axes.pcolormesh(edges, np.arange(len(order) + 1), values, cmap="viridis", vmin=0, rasterized=True)
    axes.invert_yaxis()
    starts = [next(at for at, i in enumerate(order) if cells[i][0] == row) for row in range(len(rows))]
    middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]
    axes.set_yticks(middles, rows)
    axes.hlines(starts[1:], edges[0], edges[-1], color="white", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("optimizer step")
    axes.set_title("Rank of each matrix; within a kind by layer, downwards", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(integer=True))
    return figure


def summary_csv(runs: Sequence[RunData]) -> str:
    """A line a run."""
    head = ("run", "method", "state", "step", "loss", "eval_loss", "best_eval_loss", "total_rank_start",
            "total_rank_end", "events", "numbers_in_components", "elapsed_seconds")  # fmt: skip
    rows = []
    for run in runs:
        totals = [] if run.history is None else run.history.ranks.sum(axis=1).tolist()
        parameters = run.parameters()[1]
        rows.append(
            (run.name, run.method, run.view.state, run.view.step, run.last("loss"), run.last("eval_loss"),
             run.best("eval_loss"), *((totals[0], totals[-1], len(totals) - 1) if totals else (None, None, None)),
             parameters[-1] if parameters else None, run.elapsed_seconds)
        )  # fmt: skip
    return _csv(head, rows)


def metrics_csv(run: RunData) -> str:
    """A line a step that has a number, a column a number of `metrics.jsonl`; all digits."""
    names = list(run.curves)
    table: dict[float, dict[str, float]] = {}
    for name, (steps, values) in run.curves.items():
        for step, value in zip(steps, values, strict=True):
            table.setdefault(step, {})[name] = value
    return _csv(("step", *names), ((step, *(table[step].get(n) for n in names)) for step in sorted(table)))


def ranks_csv(run: RunData) -> str:
    """A line a site: where it lies, numbers of one component, and its rank at the start and after each event."""
    history = run.history
    assert history is not None
    head = ("site", "path", "layer", "matrix", "head", "numbers", *(f"step {step}" for step in history.steps))
    costs = [None] * len(history.sites) if run.costs is None else run.costs.astype(int).tolist()
    return _csv(
        head,
        (
            (site, *place_of(matrix_of(site)), head_of(site), costs[at], *history.ranks[:, at].tolist())
            for at, site in enumerate(history.sites)
        ),
    )


def events_csv(run: RunData) -> str:
    """A line an event, with the scores that decided."""
    history = run.history
    assert history is not None
    names = list(dict.fromkeys(name for event in history.events for name in event.get("scores") or {}))
    rows = (
        (event.get("event", row), history.steps[row], int(history.ranks[row].sum()),
         *(history.moved[row].get(name, 0) for name in ("pruned", "born", "masked")), event.get("reason", ""),
         *((event.get("scores") or {}).get(name) for name in names))
        for row, event in enumerate(history.events)
        if row
    )  # fmt: skip
    return _csv(("event", "step", "total_rank", "pruned", "born", "masked", "reason", *names), rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return out.getvalue()
