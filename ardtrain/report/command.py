"""`ardtrain report`: arguments, the file, and writing it anew while runs go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ardtrain.config import ConfigError
from ardtrain.faults import replace_file
from ardtrain.report.page import html_page
from ardtrain.report.reading import RunData, read_runs

WATCH_SECONDS = 10.0
FILE_NAME = "report.html"


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    folders: tuple[str, ...]
    out: Path
    watch_seconds: float | None = None
    figures: Path | None = None


def report(arguments: Sequence[str], *, sleep: Callable[[float], None] = time.sleep) -> int:
    """`ardtrain report RUN [RUN ...] [--out FILE.html] [--watch [S]] [--figures DIR]`; returns 0.

    With --watch the file is written every S seconds until no run goes on, and the browser that shows it follows.
    Raises:
        ConfigError: a wrong argument, no run, a broken file, or one that cannot be written.
    """
    order = read_order(arguments)
    runs = write(order)
    print(f"{order.out} ({order.out.stat().st_size / 1e6:.1f} MB)")
    if order.figures is not None:
        print(f"{order.figures}: {len(list(order.figures.iterdir()))} files")
    while order.watch_seconds is not None and any(run.goes_on for run in runs):
        sleep(order.watch_seconds)
        runs = write(order)
    return 0


def write(order: Order) -> list[RunData]:
    """Writes what is ordered once. Returns the runs it shows."""
    runs = read_runs(order.folders)
    going_on = any(run.goes_on for run in runs)
    written = order.out
    try:
        order.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(order.out, html_page(runs, refresh_seconds=order.watch_seconds if going_on else None))
        if order.figures is not None:
            from ardtrain.report.figures import write_figures  # matplotlib

            written = order.figures
            write_figures(runs, order.figures)
    except OSError as error:
        raise ConfigError([f"{written}: cannot be written ({error.strerror or error})"]) from error
    return runs


def read_order(arguments: Sequence[str]) -> Order:
    """Raises ConfigError: an unknown option, a value that is missing or wrong, no folder."""
    folders: list[str] = []
    values: dict[str, str] = {}
    watch: float | None = None
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, equals, given = argument.partition("=")
        if option in ("--out", "--figures"):
            if not equals and not rest:
                raise ConfigError([f"{option} needs a path, such as {option} {'x.html' if option == '--out' else 'x'}"])
            values[option] = given if equals else rest.pop(0)
        elif option == "--watch":
            text = given if equals else rest.pop(0) if rest and _is_number(rest[0]) else str(WATCH_SECONDS)
            if not _is_number(text) or not float(text) > 0:
                raise ConfigError([f"--watch {text}: must be a number of seconds above 0"])
            watch = float(text)
        elif argument.startswith("--"):
            raise ConfigError([f"{argument}: is no option here; there are --out FILE, --watch [S], --figures FOLDER"])
        else:
            folders.append(argument)
    if not folders:
        raise ConfigError(["which run folder? for example: ardtrain report runs/e2e_nlg"])
    out = Path(values["--out"]) if "--out" in values else _default_out(folders)
    if out.is_dir():
        raise ConfigError([f"--out {out}: is a folder; name a file in it, such as {out / FILE_NAME}"])
    figures = Path(values["--figures"]) if "--figures" in values else None
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ConfigError([f"--figures {figures}: is a file; name a folder"])
    return Order(tuple(folders), out, watch, figures)


def _default_out(folders: Sequence[str]) -> Path:
    """In the run's own folder; of several runs here."""
    return Path(folders[0]) / FILE_NAME if len(folders) == 1 else Path(FILE_NAME)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
