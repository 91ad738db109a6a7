"""`ardtrain plan`: memory, seconds and sizes of a run, computed from its config and config.json alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ardtrain.config import ConfigError
from ardtrain.planning.hardware import GPUS, machine_of

DEFAULT_GPU = "h100"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError([f"{message}; see ardtrain plan --help"])


def plan_command(arguments: Sequence[str]) -> int:
    """`ardtrain plan CONFIG ...`; 0: it fits, 1: it does not. Raises ConfigError."""
    parser = _Parser(
        prog="ardtrain plan",
        description="Memory, time and sizes of a run, by cause; from the config and config.json alone.",
        epilog="Exit code 0: it fits, 1: it does not, 2: a mistake in the config.",
    )
    parser.add_argument("config", nargs="?", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", help="a.b=c over the file's settings")
    parser.add_argument(
        "--gpus", type=int, metavar="N",
        help="GPUs of ALL nodes together (default: the config's launcher block, else one full node)",
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, metavar="M", help="hosts (default: as few as hold the GPUs)")
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"which: {', '.join(GPUS)}; default %(default)s")
    parser.add_argument("--host-gib", type=float, metavar="GIB", help="memory of a host (default: a datasheet's)")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--constants", action="store_true", help="print what plans rest on, with sources")
    given = parser.parse_intermixed_args(arguments)
    from ardtrain.planning.advice import suggestions  # not before --help: these bring torch and transformers
    from ardtrain.planning.plan import make_plan, to_json
    from ardtrain.planning.text import constants, render
    from ardtrain.preflight import read_run_config

    if given.constants:
        print(constants())
        return 0
    if given.config is None:
        parser.error("which config?")
    config, _ = read_run_config(given.config, given.overrides, world_size=1)
    gpus, nodes = given.gpus, given.nodes
    if gpus is None and nodes is None and config.launcher.gpus_per_node:
        nodes = config.launcher.nodes
        gpus = nodes * config.launcher.gpus_per_node
    machine = machine_of(given.gpu, gpus=gpus, nodes=nodes, host_gib=given.host_gib)
    config, _ = read_run_config(given.config, given.overrides, world_size=machine.world_size)
    made = make_plan(config, machine)
    advice = suggestions(made)
    if given.json:
        print(json.dumps(to_json(made, [s.to_json() for s in advice]), indent=1))
    else:
        print(render(made, advice))
    return 0 if made.fits else 1
