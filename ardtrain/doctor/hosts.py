"""`ardtrain doctor --hosts`: from one shell, names, addresses and ssh of all hosts, then a meeting on all of them."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardtrain.doctor import network
from ardtrain.doctor.finding import Finding, failed
from ardtrain.doctor.meeting import SPARE_SECONDS
from ardtrain.hostfile import Host, parse_hosts, read_hostfile, unequal_slots
from ardtrain.launching.job import exported_variables

SSH = (
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=5",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)
START_SECONDS = 60.0  # ssh, Python, imports and the model's shapes, which a meeting's own limit does not hold

# What ssh says -> what it means, and the remedy.
SSH_ERRORS = (
    (
        "Host key verification failed|REMOTE HOST IDENTIFICATION", "its host key is not known here (or has changed)",
        "ssh-keyscan HOST >> ~/.ssh/known_hosts, after comparing the key; for a changed one first ssh-keygen -R HOST",
    ),
    (
        "Permission denied", "ssh is refused (no key that it accepts)",
        "ssh-copy-id HOST, or load the key (ssh-add); a password cannot be asked for",
    ),
    (
        "Connection refused", "ssh is refused: no sshd on its port",
        "start sshd on it, or name its port in ~/.ssh/config; where ssh is closed use Slurm or PBS (ardtrain submit)",
    ),
    (
        "timed out|No route to host|Network is unreachable", "does not answer",
        "is the host up, and its address right (getent hosts HOST)? a firewall or a wrong interface looks the same",
    ),
    (
        "Could not resolve hostname", "ssh does not know the name",
        "correct the name in the hostfile, or add it to DNS, /etc/hosts or ~/.ssh/config",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """How a command on a host ended; code None: not in time."""

    code: int | None
    output: str
    errors: str


def read_hosts(text: str) -> tuple[Host, ...]:
    """The hosts that `--hosts` names: a file in DeepSpeed's format, or a list a,b,c. Raises ConfigError."""
    if "," not in text and ("/" in text or Path(text).is_file()):
        return read_hostfile(text)
    return parse_hosts(text, f"--hosts={text}")


def visit(hosts: Sequence[Host], arguments: Sequence[str], *, seconds: float) -> tuple[list[Finding], list[Any]]:
    """Findings and facts of all hosts: names and ssh first, and a meeting if all of them can be reached.

    Args:
        arguments: of `ardtrain doctor` on each host, beside `--meet --json`.
    """
    findings = [Finding("warn", "hostfile", problem)] if (problem := unequal_slots(tuple(hosts))) else []
    with concurrent.futures.ThreadPoolExecutor(max_workers=64) as pool:
        reached = list(pool.map(lambda host: reach(host.name), hosts))
        findings += [finding for own in reached for finding in own]
        unreached = [host.name for host, own in zip(hosts, reached, strict=True) if failed(own)]
        if unreached:
            what = "no meeting of the hosts was tried"
            remedy = f"mend {', '.join(unreached)}, or leave them out of the hostfile"
            return [*findings, Finding("warn", "all", what, remedy)], []
        commands = meeting_commands(hosts, arguments, os.environ)
        limit = START_SECONDS + seconds + SPARE_SECONDS
        running = [pool.submit(over_ssh, h.name, c, limit) for h, c in zip(hosts, commands, strict=True)]
        answers = [future.result() for future in running]
    first = told(answers[0])
    facts = first.get("facts", [])
    heard = {fact["process"] for fact in facts}
    for number, (host, answer) in enumerate(zip(hosts, answers, strict=True)):
        findings += judge(host.name, answer, of_all=None if number else first, was_heard=number in heard)
    return findings, facts


def reach(host: str) -> list[Finding]:
    """Name -> address and ssh of one host."""
    addresses, unknown = network.resolve(host)
    answer = over_ssh(host, "true", 20.0)
    if answer.code == 0:
        where = ", ".join(addresses) if addresses else "its address is only in ssh's config"
        return [Finding("ok", host, f"{where}, ssh works")]
    if unknown is not None:
        remedy = "correct the name in the hostfile, or add it to DNS or /etc/hosts"
        return [Finding("fail", host, f"the name has no address here ({unknown})", remedy)]
    what, remedy = explain_ssh(answer)
    return [Finding("fail", host, f"{', '.join(addresses)}: {what}", remedy.replace("HOST", host))]


def explain_ssh(answer: Answer) -> tuple[str, str]:
    """What went wrong with ssh, and the remedy (in which HOST stands for the host). Pure."""
    if answer.code is None:
        return "ssh did not end", "is the host overloaded, or its home folder on a disk that hangs?"
    for pattern, what, remedy in SSH_ERRORS:
        if re.search(pattern, answer.errors):
            return what, remedy
    last = (answer.errors.strip().splitlines() or [""])[-1]
    return f"ssh ended with {answer.code} ({last})", "try: ssh -o BatchMode=yes HOST true"


def meeting_commands(hosts: Sequence[Host], arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """One shell command for each host: this Python, folder and environment, one process of the meeting. Pure but for
    the port, which is drawn unless MASTER_PORT names one."""
    shared = exported_variables(environ) | {
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": environ.get("MASTER_ADDR") or hosts[0].name,
        "MASTER_PORT": environ.get("MASTER_PORT") or str(random.randrange(20000, 40000)),
        "ARDTRAIN_HOSTS": ",".join(host.name for host in hosts),
    }
    program = [sys.executable, "-m", "ardtrain", "doctor", "--meet", "--json", *arguments]
    commands = []
    for number in range(len(hosts)):
        values = [f"{name}={value}" for name, value in (shared | {"RANK": str(number)}).items()]
        commands.append(f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*values, *program])}")
    return commands


def over_ssh(host: str, command: str, seconds: float) -> Answer:
    """Runs a shell command on a host."""
    with subprocess.Popen(
        [*SSH, host, command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=seconds)
            return Answer(process.returncode, output, errors)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            return Answer(None, output, errors)


def told(answer: Answer) -> dict[str, Any]:
    """The report in what a process of the meeting printed; {}: none. Pure."""
    for line in reversed(answer.output.splitlines()):
        if line.startswith("{"):
            try:
                report: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return report
    return {}


def judge(host: str, answer: Answer, *, of_all: Mapping[str, Any] | None, was_heard: bool) -> list[Finding]:
    """Findings that one host's answer brings. Pure.

    Args:
        of_all: on the first host, the report of the whole meeting ({}: it brought none); None on the others, whose
            reports hold what they alone know. was_heard: the first host's report knows this host's facts.
    """
    report = told(answer) if of_all is None else of_all
    findings = [Finding(**finding) for finding in report.get("findings", [])]
    if report and answer.code is not None:
        return findings
    lines = [line for line in (answer.errors + answer.output).splitlines() if line.strip()]
    last = f" ({lines[-1].strip()[:200]})" if lines else ""
    if answer.code is None:
        remedy = "is the host overloaded, or a disk on it hanging? see df and dmesg there"
        return [*findings, Finding("fail", host, f"no answer within the time limit{last}", remedy)]
    if answer.code == 255:
        remedy = "the host went down or its link was cut while the hosts met"
        return [*findings, Finding("fail", host, f"ssh ended with 255{last}", remedy)]
    if re.search("No such file|not found|No module named|cd:", last):
        remedy = f"put {sys.executable} and {os.getcwd()} on a disk that every host sees, under the same paths"
        return [*findings, Finding("fail", host, f"the doctor cannot start there{last}", remedy)]
    if answer.code and not was_heard:
        return [*findings, Finding("fail", host, f"the doctor ended with {answer.code}{last}", "see the text")]
    return findings
