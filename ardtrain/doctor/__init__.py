"""`ardtrain doctor`: finds what would stop a run before anything trains, and names host and remedy.

Alone it looks at this machine. Started by a launcher on several processes (`srun ... ardtrain doctor --meet`) they
meet: facts are compared, the run folder, clocks and one all-reduce are tried. With --hosts one shell starts that
meeting by ssh.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from ardtrain.config import ConfigError
from ardtrain.doctor.checks import check_room
from ardtrain.doctor.facts import Facts
from ardtrain.doctor.finding import Finding, Trouble, failed, render
from ardtrain.doctor.hosts import read_hosts, visit
from ardtrain.doctor.meeting import meet
from ardtrain.doctor.needs import Needs, checkpoint_bytes, read_needs
from ardtrain.environment import discover


def doctor(arguments: list[str]) -> int:
    """`ardtrain doctor ...`; returns the exit code: 0 good, 1 a check failed, 2 a mistake on the command line.

    Raises:
        ConfigError: mistakes in config or hostfile.
    """
    try:
        options = _parser().parse_intermixed_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    config = options.config
    if config is None and options.settings and "=" not in options.settings[0]:
        config = options.settings.pop(0)
    if options.settings and config is None:
        raise ConfigError([f"{options.settings[0]} goes over no config; name the run's file before it"])
    if options.hosts is not None:
        return _hosts(options, config)
    return _meet(options, config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ardtrain doctor", description="Checks this machine, or several hosts together.", allow_abbrev=False
    )
    about = "the run's file (its folder, data, model and disks are checked too), and settings a.b=c that go over it"
    parser.add_argument("settings", nargs="*", metavar="CONFIG a.b=c", help=about)
    parser.add_argument("--hosts", metavar="FILE|a,b,c", help="meet on these hosts, by ssh")
    parser.add_argument("--meet", action="store_true", help="one process of several that a launcher started")
    parser.add_argument("--config", metavar="FILE", help="the same as CONFIG")
    # --run alone is what torchrun calls ambiguous (its --run-path), even behind our name.
    parser.add_argument("--run-dir", "--run", metavar="DIR", help="run folder, in place of the config's output_dir")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="limit of a meeting (60)")
    parser.add_argument("--quick", action="store_true", help="no speed of disks, no size of checkpoints")
    parser.add_argument("--json", action="store_true", help="the report as one line of JSON")
    return parser


def _hosts(options: argparse.Namespace, config: str | None) -> int:
    """From one shell: ssh to all hosts."""
    start = time.monotonic()
    hosts = read_hosts(options.hosts)
    read_needs(config, options.settings, options.run_dir)  # a mistake is told here, once
    passed_on = [*([config] if config else []), *options.settings, f"--seconds={options.seconds:g}"]
    passed_on += [f"--run-dir={options.run_dir}"] if options.run_dir else []
    passed_on += ["--quick"] if options.quick else []
    findings, facts = visit(hosts, passed_on, seconds=options.seconds)
    names = ", ".join(host.name for host in hosts)
    _tell(findings, facts, title=f"ardtrain doctor: {names}, {time.monotonic() - start:.0f} s", as_json=options.json)
    return int(failed(findings))


def _meet(options: argparse.Namespace, config: str | None) -> int:
    """This process's part: alone, or of a meeting."""
    start = time.monotonic()
    try:
        identity = discover(os.environ)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    needs = read_needs(config, options.settings, options.run_dir)
    first, alone = identity.global_rank == 0, identity.world_size == 1
    try:
        met = meet(identity, needs, seconds=options.seconds, quick=options.quick)
        findings, facts, passed = met.findings, [f.as_json() for f in met.facts], met.passed
        if first and needs.config is not None and not options.quick:
            findings = [*findings, _room(met.facts[0], needs)]
    except Trouble as trouble:
        findings, facts, passed = [trouble.finding], [], False
    if first or findings:
        hosts = list(dict.fromkeys(fact["host"] for fact in facts)) or [socket.gethostname()]
        met_all = first and not alone
        what = f"{len(facts)} of {identity.world_size} processes on {len(hosts)} host(s): " if met_all else ""
        title = f"ardtrain doctor: {what}{', '.join(hosts)}, {time.monotonic() - start:.0f} s"
        _tell(findings, facts, title=title, as_json=options.json)
    code = int(failed(findings) or not passed)
    if not alone:
        # A collective may hang in a thread, and the end of Python would wait for it.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code


def _room(facts: Facts, needs: Needs) -> Finding:
    """Is there room for the run's checkpoints? Builds the model's shapes."""
    try:
        return check_room(facts, checkpoint_bytes(needs))
    except ConfigError as error:
        return Finding("fail", facts.host, "; ".join(error.errors), "see `ardtrain validate`")


def _tell(findings: Sequence[Finding], facts: Sequence[Any], *, title: str, as_json: bool) -> None:
    if not as_json:
        print(render(findings, title=title).encode(errors="backslashreplace").decode())  # a path may hold no text
        return
    report = {"passed": not failed(findings), "findings": [dataclasses.asdict(f) for f in findings], "facts": facts}
    print(json.dumps(report))
