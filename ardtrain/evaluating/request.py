"""What the user asks `ardtrain evaluate` for: which checkpoint, rows and metrics, and where the figures go."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ardtrain.config import ConfigError
from ardtrain.evaluating.tasks import TaskRequest
from ardtrain.evaluating.text_metrics import GENERATED, ROUGE, check_packages
from ardtrain.trained import find_checkpoint

OUT_FOLDER = "evaluation"  # in the run's folder
FULL_MODEL = "model"  # the folder of a finished run that trained all weights

# Metrics of one forward over the held-out rows, by task; the first ones are what is made where none is named.
OF_TOKENS = ("loss", "perplexity")
OF_PICTURES = (*OF_TOKENS, "token_match")
OF_CLASSES = ("loss", "accuracy", "f1", "matthews_correlation")
ALIASES = {
    "mcc": ("matthews_correlation",),
    "ppl": ("perplexity",),
    "eval_loss": ("loss",),
    "rouge": ROUGE,
    "em": ("exact_match",),
    "vqa": ("vqa_accuracy",),
}
HELD_OUT = {"causal_lm": OF_TOKENS, "image_text_to_text": OF_PICTURES, "sequence_classification": OF_CLASSES}


@dataclass(frozen=True)
class Request:
    """The command line, taken apart; nothing was looked up yet.

    metrics: () for those of the run's task, or for none where lm-eval's tasks are asked for.
    """

    target: str
    overrides: tuple[str, ...] = ()
    data: str | None = None
    metrics: tuple[str, ...] = ()
    out: str | None = None
    tasks: TaskRequest | None = None


@dataclass(frozen=True)
class Target:
    """A checkpoint and the run it belongs to. path: None for the finished model of a run that trained all weights.

    is_named: the user named the checkpoint, not the run. step: of the checkpoint, or of the newest beside the model.
    """

    run_dir: Path
    path: Path | None
    is_named: bool = True
    step: int = 0

    @property
    def name(self) -> str:
        return FULL_MODEL if self.path is None else self.path.name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError([f"{message}; see ardtrain evaluate --help"])


def read_request(arguments: Sequence[str]) -> Request:
    """The command line's parts. Raises ConfigError."""
    parser = _Parser(
        prog="ardtrain evaluate",
        description="Held-out loss and metrics of a run's checkpoint, with intervals; the same figures for any number "
        "of processes.",
        epilog="Several processes: deepspeed --num_gpus N ardtrain/main.py evaluate RUN ..., torchrun or srun alike.",
    )
    parser.add_argument("target", help="a run's folder (its last checkpoint), RUN/best, or a checkpoint's folder")
    parser.add_argument("overrides", nargs="*", help="a.b=c over the run's settings, such as evaluation.confidence=0.9")
    parser.add_argument("--data", metavar="FILE", help="held-out rows (default: the run's data.eval_file)")
    parser.add_argument("--metrics", metavar="A,B", help="which, with commas between; default: those of the task")
    parser.add_argument("--out", metavar="DIR", help="default: RUN/evaluation/CHECKPOINT")
    parser.add_argument("--tasks", metavar="A,B", help="lm-eval's tasks, such as arc_easy")
    parser.add_argument("--include_path", metavar="DIR", help="of --tasks: a folder with task files of your own")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="of --tasks: examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="of --tasks: only so many rows of each")
    given = parser.parse_intermixed_args(arguments)
    names, tasks = _listed(given.tasks), None
    if names:
        tasks = TaskRequest(names, given.include_path, given.num_fewshot, given.limit)
    for flag in ("include_path", "num_fewshot", "limit"):
        if tasks is None and getattr(given, flag) is not None:
            raise ConfigError([f"--{flag} goes with --tasks; name some, or remove it"])
    return Request(given.target, tuple(given.overrides), given.data, _listed(given.metrics), given.out, tasks)


def _listed(text: str | None) -> tuple[str, ...]:
    """The names in a text with commas between them."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def find_target(text: str) -> Target:
    """The checkpoint that a path means, as trained.find_checkpoint. Raises ConfigError."""
    found = find_checkpoint(text)
    return Target(found.run_dir, found.path, found.is_named, _step_of(found.path))


def _step_of(path: Path) -> int:
    """The number in checkpoint-N; 0 for a folder that somebody has renamed."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def chosen_metrics(asked: Sequence[str], *, task: str) -> tuple[str, ...]:
    """The metrics by their own names; those of the task where none is asked for.

    Raises:
        ConfigError: one is unknown, does not fit the task, or needs a package.
    """
    fitting = (*HELD_OUT[task], *(() if task == "sequence_classification" else GENERATED))
    known = sorted({name for names in HELD_OUT.values() for name in names} | set(GENERATED))
    errors: list[str] = []
    chosen: list[str] = []
    for given in asked:
        names = ALIASES.get(given, (given,))
        if names[0] not in known:
            near = difflib.get_close_matches(given, known, n=1)
            guess = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            errors.append(f"--metrics: {given} is no metric; {guess}")
        elif names[0] not in fitting:
            errors.append(f"--metrics: {given} does not fit task={task}; choose among {', '.join(fitting)}")
        chosen += names
    if errors:
        raise ConfigError(errors)
    check_packages(chosen)
    return tuple(dict.fromkeys(chosen or HELD_OUT[task]))
