"""Verbs -> functions; nothing else. torch is imported only by verbs that need it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence

USAGE = """usage: ardtrain [train] CONFIG [a.b=c ...]   train, or resume (resume_from_checkpoint=auto)
       ardtrain train CONFIG --rehearse [a.b=c ...]
                                             two random layers of its widths, three steps, each act once, in minutes
       ardtrain validate CONFIG [a.b=c ...]  check config, model shapes and data; loads no weights; with --verify it
                                             reads them once: checksums, missing tensors, numbers not finite; with
                                             --schema-only it looks at the config alone, in a moment
       ardtrain plan CONFIG [--gpus N] [--nodes M] [--gpu h100] [--json] [a.b=c ...]
                                             memory, seconds and sizes on N GPUs in all, from config.json alone
       ardtrain fetch CONFIG [a.b=c ...]     base, tokenizer, data sets into caches, rows tokenised, for offline nodes
       ardtrain submit CONFIG --to slurm|pbs|hosts|mpi [--dry-run] [a.b=c ...]
                                             write the job script into the run folder and submit it
       ardtrain doctor [--hosts H] [CONFIG]  check this machine, or several hosts together
       ardtrain status RUN_DIR ... [--json]  what a run is doing, from its files; of several a line each
       ardtrain stop RUN_DIR [--wait [S]]    save and stop at the end of the step; --wait until it has (at most S s)
       ardtrain report RUN_DIR ... [--out FILE.html] [--watch [S]] [--figures FOLDER]
                                             one HTML file with all that a run shows; of several side by side
       ardtrain ranks RUN_DIR [OUT.png] [--heads KIND]
                                             the ranks by layer and matrix as text, or as a picture
       ardtrain export RUN|CHECKPOINT --to peft [--out DIR] [--uniform-rank] [--without-base]
                                             [--push-to-hub REPO [--private]] [a.b=c ...]
                                             the adapter as a PEFT folder, read back with PEFT and compared
       ardtrain evaluate RUN|CHECKPOINT [--data FILE] [--metrics A,B] [--out DIR] [a.b=c ...]
                                             held-out loss and metrics with intervals, on any number of processes
       ardtrain merge RUN|CHECKPOINT --out DIR [--check] [--push-to-hub REPO [--private]] [a.b=c ...]
                                             the base with the adapter in its weights, file by file
       ardtrain compare SUITE [a.b=c ...]    methods x budgets x rates x seeds, and a table; goes on where it stopped
       ardtrain compare --table RESULTS.json [--out FILE.md] [--picture FILE.png]
                                             the table of a finished suite again, from its record
       ardtrain new --task sft|classification|vqa --model M [--method M] [--data F] [--eval F] [--out F]
                                             a commented config to start from
       ardtrain suggest CONFIG [--gpus N] [--nodes M] [--gpu h100] [--out FILE] [a.b=c ...]
                                             schedule, batch and rates to start from, by plan, data and papers
       ardtrain schema [FILE]                the JSON schema of a config, for editors

On several processes: deepspeed [--num_nodes N] ardtrain/main.py [train] CONFIG [a.b=c ...]
Without CONFIG: the file that ARDTRAIN_CONFIG names, else ./ardtrain.yaml
ardtrain VERB --help: one verb, with an example; ardtrain --version"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code. 2: the user's mistake, printed as one line each."""
    rest = _without_launcher_flags(list(sys.argv[1:] if arguments is None else arguments))
    if rest and rest[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if rest and rest[0] in ("-V", "--version"):
        from ardtrain import __version__

        print(f"ardtrain {__version__}")
        return 0
    verbs = _verbs()
    is_named = bool(rest) and rest[0] in verbs
    verb = rest.pop(0) if is_named else "train"
    if {"-h", "--help"} & set(rest):
        return _help(verb, verbs[verb])
    from ardtrain.config import ConfigError

    try:
        if not is_named and rest:
            _refuse_misspelt_verb(rest[0], verbs)
        return verbs[verb](rest)
    except ConfigError as error:
        _tell_mistakes(verb, error.errors)
        return 2
    except PermissionError as error:  # even the question whether a path is there can end so, in any verb
        if error.filename is None:
            raise
        _tell_mistakes(verb, [f"{error.filename}: {error.strerror}; give another path, or ask its owner for access"])
        return 2


def _verbs() -> dict[str, Callable[[list[str]], int]]:
    return {
        "train": _train,
        "validate": _validate,
        "plan": _plan,
        "fetch": _fetch,
        "submit": _submit,
        "doctor": _doctor,
        "status": _status,
        "stop": _stop,
        "ranks": _ranks,
        "report": _report,
        "export": _export,
        "merge": _merge,
        "compare": _compare,
        "evaluate": _evaluate,
        "new": _new,
        "suggest": _suggest,
        "schema": _schema,
    }


def _refuse_misspelt_verb(word: str, verbs: Iterable[str]) -> None:
    """A word that is no file and looks like no path, where a config may stand. Raises ConfigError."""
    if word.isalpha() and not os.path.exists(word):
        import difflib

        from ardtrain.config import ConfigError

        near = difflib.get_close_matches(word, list(verbs), n=1)
        guess = f"did you mean `ardtrain {near[0]}`?" if near else "`ardtrain --help` lists the verbs"
        raise ConfigError([f"{word} is neither a verb nor a config that exists; {guess}"])


def _help(verb: str, run: Callable[[list[str]], int]) -> int:
    from ardtrain.verbs import PRINT_THEIR_OWN, example_text, help_text

    if verb not in PRINT_THEIR_OWN:
        print(help_text(verb, USAGE))
        return 0
    with contextlib.suppress(SystemExit):  # argparse's way
        run(["--help"])
    print(f"\n{example_text(verb)}")
    return 0


def _tell_mistakes(verb: str, mistakes: Sequence[str]) -> None:
    """Process 0 tells all; on each other host one process tells its own, which may be that host's alone."""
    from ardtrain.environment import speaks_for
    from ardtrain.faults import host_name

    speaks = speaks_for(os.environ)
    lines = [f"ardtrain {verb}: {len(mistakes)} mistake(s)", *mistakes]
    if speaks == "host":
        lines = [f"{host_name()}: {mistake.splitlines()[0]}" for mistake in mistakes]
    if speaks != "nobody":
        text = "\n".join(lines)
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)  # a value may hold no valid text


def _one(arguments: list[str], verb: str, what: str) -> list[str]:
    """The arguments, of which the first must be there. Raises ConfigError."""
    from ardtrain.config import ConfigError

    if not arguments:
        raise ConfigError([f"which {what}? for example: ardtrain {verb} {what.replace(' ', '_')}"])
    return arguments


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


def _train(arguments: list[str]) -> int:
    from ardtrain.faults import held_signals

    with held_signals():  # ahead of all that takes time
        from ardtrain.config.text import with_config

        rehearsal = "--rehearse" in arguments
        config, *overrides = with_config([a for a in arguments if a != "--rehearse"], os.environ)
        _name_the_accelerator()
        from ardtrain.run import train

        return train(config, overrides, rehearsal=rehearsal)


def _validate(arguments: list[str]) -> int:
    from ardtrain.config.text import with_config

    verify, schema_only = "--verify" in arguments, "--schema-only" in arguments
    config, *overrides = with_config([a for a in arguments if a not in ("--verify", "--schema-only")], os.environ)
    if schema_only:
        from ardtrain.config import load_config

        load_config(config, overrides)
        print(f"{config}: settings and the rules between them hold; model and data were not looked at")
        return 0
    _name_the_accelerator()
    from ardtrain.run import validate

    print(validate(config, overrides, verify=verify))
    return 0


def _plan(arguments: list[str]) -> int:
    from ardtrain.config.text import with_config

    if not {"-h", "--help", "--constants"} & set(arguments):
        arguments = with_config(arguments, os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here touches a device
    from ardtrain.planning import plan_command

    return plan_command(arguments)


def _fetch(arguments: list[str]) -> int:
    from ardtrain.config.text import with_config

    config, *overrides = with_config(arguments, os.environ)
    from ardtrain.fetching import fetch

    return fetch(config, overrides)


def _submit(arguments: list[str]) -> int:
    from ardtrain.launching.submit import submit

    return submit(arguments)


def _doctor(arguments: list[str]) -> int:  # names no accelerator: a login node's must not go to the hosts
    from ardtrain.doctor import doctor

    return doctor(arguments)


def _status(arguments: list[str]) -> int:
    from ardtrain.watch import status

    return status(_one(arguments, "status", "run folder"))


def _stop(arguments: list[str]) -> int:
    from ardtrain.watch import stop

    return stop(_one(arguments, "stop", "run folder"))


def _export(arguments: list[str]) -> int:
    _name_the_accelerator()
    from ardtrain.exporting import export_command

    return export_command(arguments)


def _merge(arguments: list[str]) -> int:
    _name_the_accelerator()
    from ardtrain.merging import merge_command

    return merge_command(arguments)


def _compare(arguments: list[str]) -> int:
    if "--table" in arguments:
        from ardtrain.compare.again import table_again

        return table_again([a for a in arguments if a != "--table"])
    suite, *overrides = _one(arguments, "compare", "suite.yaml")
    _name_the_accelerator()
    from ardtrain.compare import compare

    return compare(suite, overrides)


def _report(arguments: list[str]) -> int:
    from ardtrain.report.command import report

    return report(arguments)


def _evaluate(arguments: list[str]) -> int:
    _one(arguments, "evaluate", "run folder")
    _name_the_accelerator()
    from ardtrain.evaluating.command import evaluate

    return evaluate(arguments)


def _ranks(arguments: list[str]) -> int:
    from ardtrain.report.terminal import ranks

    return ranks(_one(arguments, "ranks", "run folder"))


def _new(arguments: list[str]) -> int:
    from ardtrain.starter import new

    return new(arguments)


def _schema(arguments: list[str]) -> int:
    from ardtrain.config.schema import schema

    return schema(arguments)


def _suggest(arguments: list[str]) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here touches a device
    from ardtrain.planning.suggest import suggest

    return suggest(arguments)
