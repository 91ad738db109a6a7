"""Which hosts, and how many processes on each: DeepSpeed's hostfile and PBS' node file. Pure but for one read."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ardtrain.config import ConfigError

# No user@ (a name is also MASTER_ADDR; ssh_config names users), no colon (DeepSpeed's `host:slot`), and no dash in
# front: ssh would read an option.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_LINE = re.compile(rf"({_NAME})\s+slots=(\d+)\s*(?:#.*)?")
_FORM = "a line is `HOST slots=N`, N processes on it"


@dataclass(frozen=True)
class Host:
    """A host and its number of processes."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> tuple[Host, ...]:
    """The hosts of a file in DeepSpeed's format, in its order.

    Raises:
        ConfigError: the file cannot be read, or as `parse_hostfile`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ConfigError([f"hostfile={path} cannot be read ({reason}); name a file in which {_FORM}"]) from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, source: str) -> tuple[Host, ...]:
    """The hosts of a hostfile's text: `HOST slots=N`, comments after #, blank lines. Pure.

    Stricter than DeepSpeed, which ignores what follows the number. `source` stands in front of errors.

    Raises:
        ConfigError: all bad lines: another form, no slots, a host twice; or no host at all.
    """
    errors: list[str] = []
    first_at: dict[str, int] = {}
    hosts: list[Host] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{source}:{number}: {line!r}"
        match = _LINE.fullmatch(line)
        if match is None:
            errors.append(f"{where} is no host; {_FORM}, for example `{_example(line)}`")
        elif int(match[2]) < 1:
            errors.append(f"{where} has no process; give slots=1 or more, or remove the line")
        elif match[1] in first_at:
            errors.append(f"{where} names {match[1]} a second time (first in line {first_at[match[1]]}); keep one line")
        else:
            first_at[match[1]] = number
            hosts.append(Host(match[1], int(match[2])))
    if not hosts and not errors:
        errors.append(f"{source} names no host; {_FORM}")
    if errors:
        raise ConfigError(errors)
    return tuple(hosts)


def parse_hosts(text: str, source: str) -> tuple[Host, ...]:
    """The hosts of a list `a,b,c` as the command line gives it, one process on each. Pure. Raises ConfigError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return parse_hostfile("\n".join(f"{name} slots=1" for name in names), source)


def from_nodefile(text: str, source: str = "PBS_NODEFILE") -> tuple[Host, ...]:
    """The hosts of a node file, a line a process (PBS; `uniq -c` in shells), in the order of first mention. Pure.

    Raises:
        ConfigError: a line that is no name, or no line.
    """
    names = [line.strip() for line in text.splitlines() if line.strip()]
    bad = [name for name in names if not re.fullmatch(_NAME, name)]
    if bad or not names:
        what = f"{bad[0]!r} is no host" if bad else "no host stands in it"
        raise ConfigError([f"{source}: {what}; a node file has one host name a line, one line a process"])
    return tuple(Host(name, slots) for name, slots in Counter(names).items())


def expand_nodelist(text: str) -> tuple[str, ...]:
    """The names in Slurm's compressed list: `gpu[08-10,12],login1` gives gpu08, gpu09, gpu10, gpu12, login1. Pure."""
    names: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text.strip()):
        expanded = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", entry):
            pieces = [plain] if plain else [number for part in ranges.split(",") for number in _numbers(part)]
            expanded = [before + piece for before in expanded for piece in pieces]
        names += expanded
    return tuple(names)


def _numbers(part: str) -> list[str]:
    """`08-10` -> 08, 09, 10; `7` -> 7."""
    first, _, last = part.partition("-")
    if not last:
        return [first]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def unequal_slots(hosts: tuple[Host, ...]) -> str | None:
    """Why these hosts cannot start one run together, or None: DeepSpeed wants as many processes on each. Pure."""
    if len({host.slots for host in hosts}) <= 1:
        return None
    fewest = min(host.slots for host in hosts)
    listed = ", ".join(f"{host.name} slots={host.slots}" for host in hosts)
    return f"{listed}: every host must have the same number of processes; give all slots={fewest}, or leave hosts out"


def _example(line: str) -> str:
    """What the writer of a bad line may have meant."""
    name = re.match(rf"(?:[^@\s]*@)?({_NAME})", line)
    number = re.search(r"[=:\s](\d+)", line)
    return f"{name[1] if name else 'node1'} slots={number[1] if number else 1}"
