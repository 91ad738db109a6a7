"""Verbs -> functions; nothing else. torch is imported only by verbs that need it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

USAGE = """usage: ardtrain [train] CONFIG [a.b=c ...]   train, or resume (resume_from_checkpoint=auto)
       ardtrain validate CONFIG [a.b=c ...]  check config, model shapes and data; loads no weights
       ardtrain ranks RUN_DIR [OUT.png]      draw the ranks of a run
       ardtrain compare SUITE [a.b=c ...]    methods x learning rates x seeds, and a table; goes on where it stopped

On several processes: deepspeed [--num_nodes N] ardtrain/main.py [train] CONFIG [a.b=c ...]"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code. 2: the user's mistake, printed as one line each."""
    rest = _without_launcher_flags(list(sys.argv[1:] if arguments is None else arguments))
    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    verbs: dict[str, Callable[[str, list[str]], int]] = {
        "train": _train,
        "validate": _validate,
        "ranks": _ranks,
        "compare": _compare,
    }
    verb = rest.pop(0) if rest[0] in verbs else "train"
    if not rest:
        print(f"ardtrain {verb}: which config? for example: ardtrain {verb} run.yaml\n\n{USAGE}", file=sys.stderr)
        return 2
    from ardtrain.config import ConfigError

    try:
        return verbs[verb](rest[0], rest[1:])
    except ConfigError as error:  # every process finds the same mistakes; one of them says so
        if os.environ.get("RANK", "0") == "0":
            text = f"ardtrain {verb}: {len(error.errors)} mistake(s)\n{error}"
            print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)  # a value may hold no valid text
        return 2


def _without_launcher_flags(arguments: list[str]) -> list[str]:
    """Drops what DeepSpeed's launchers and habits add: --local_rank=N, --deepspeed, --deepspeed_config X."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank", "--deepspeed_config"):
            skip = True
        elif argument != "--deepspeed" and not argument.startswith(
            ("--local_rank=", "--local-rank=", "--deepspeed_config=")
        ):
            kept.append(argument)
    return kept


def _name_the_accelerator() -> None:
    """Without a GPU DeepSpeed, at its import, warns and guesses: tell it first."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _train(config: str, overrides: list[str]) -> int:
    _name_the_accelerator()
    from ardtrain.run import train

    return train(config, overrides)


def _validate(config: str, overrides: list[str]) -> int:
    _name_the_accelerator()
    from ardtrain.run import validate

    print(validate(config, overrides))
    return 0


def _compare(suite: str, overrides: list[str]) -> int:
    _name_the_accelerator()
    from ardtrain.compare import compare

    return compare(suite, overrides)


def _ranks(run_dir: str, rest: list[str]) -> int:
    from pathlib import Path

    from ardtrain.report import draw_ranks

    out = Path(rest[0]) if rest else Path(run_dir) / "ranks.png"
    draw_ranks(Path(run_dir) / "ranks.jsonl", out)
    print(out)
    return 0
