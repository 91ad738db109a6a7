"""Facts of several hosts -> findings: what must be equal on all of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ardtrain.doctor.checks import check_gpu, check_host, check_interfaces, gloo_address
from ardtrain.doctor.facts import Facts
from ardtrain.doctor.finding import Finding, Level

CLOCK_SECONDS = 2.0


def by_host(everyone: Sequence[Facts]) -> dict[str, Facts]:
    """The first process's facts of each host, in the order of the processes."""
    found: dict[str, Facts] = {}
    for facts in sorted(everyone, key=lambda f: f.process):
        found.setdefault(facts.host, facts)
    return found


def check_all(everyone: Sequence[Facts], *, method: str | None) -> list[Finding]:
    """What follows from facts, but for the network."""
    hosts = by_host(everyone)
    findings: list[Finding] = []
    for facts in hosts.values():
        num_local = sum(f.host == facts.host for f in everyone)
        findings += check_host(facts, method=method, num_local=num_local, num_hosts=len(hosts))
    return findings + check_equal(everyone)


def check_network(everyone: Sequence[Facts]) -> list[Finding]:
    """What would keep the processes from an all-reduce, and what would make it slow."""
    hosts = by_host(everyone)
    findings = [f for facts in hosts.values() for f in check_interfaces(facts, num_hosts=len(hosts))]
    findings += [f for facts in everyone for f in check_gpu(facts)]
    return findings + list(_shared_addresses(list(hosts.values())))


def check_equal(everyone: Sequence[Facts]) -> list[Finding]:
    """Versions, code, config and files against process 0's."""
    if len(everyone) < 2:
        return []
    first = everyone[0]
    same = "give all hosts the same environment: a shared disk, one image, or the same pip install -c constraints.txt"
    findings: list[Finding] = []

    def compare(level: Level, what: str, value: Callable[[Facts], object], remedy: str) -> None:
        for facts in everyone[1:]:
            if value(facts) != value(first):
                where = f"{facts.host} (process {facts.process})" if facts.host == first.host else facts.host
                text = f"{what}: {value(facts)} here, {value(first)} on {first.host} (process {first.process})"
                findings.append(Finding(level, where, text, remedy))

    compare("fail", "Python", lambda f: f.python, same)
    for name in first.versions:
        compare("fail", name, lambda f, n=name: f.versions.get(n) or "missing", same)  # type: ignore[misc]
    compare("fail", "the code of ardtrain (digest)", lambda f: f.package_digest[:12], same)
    compare("fail", "torch's CUDA", lambda f: f.cuda or "none", same)
    compare(
        "fail",
        "a run would be on",
        lambda f: f.accelerator,
        "take hosts of one kind, or set DS_ACCELERATOR=cpu on all of them (the launcher must pass it on)",
    )
    compare("warn", "driver", lambda f: f.driver or "none", "have the drivers made equal")
    compare("warn", "GPUs", lambda f: sorted(set(f.gpus)), "the slowest sets the pace; take hosts of one kind")
    compare(
        "fail",
        "the config file (digest)",
        lambda f: (f.config_digest or "none")[:12],
        "start all processes with the same file, on a disk that all hosts see",
    )
    for path in first.files:
        if all(f.files.get(path) is not None for f in everyone):  # one that is not there is told by itself
            remedy = "copy it anew to that host, or put it on a disk that all hosts see"
            compare("fail", f"bytes of {path}", lambda f, p=path: f.files[p], remedy)  # type: ignore[misc]
    if not findings:
        names = ", ".join(by_host(everyone))
        findings.append(Finding("ok", names, f"equal versions, code and files in {len(everyone)} processes"))
    return findings


def _shared_addresses(hosts: Sequence[Facts]) -> Iterator[Finding]:
    """Gloo on two hosts with one address would connect each to itself."""
    first_with: dict[str, str] = {}
    for facts in hosts:
        address = gloo_address(facts)
        if address is None or address.startswith("127.") or address == "::1":  # torch falls back to a real one
            continue
        other = first_with.setdefault(address, facts.host)
        if other != facts.host:
            yield Finding(
                "fail",
                facts.host,
                f"gloo would announce {address}, which is also {other}'s address",
                "set GLOO_SOCKET_IFNAME to the interface of the hosts' common network, or correct /etc/hosts",
            )


def check_clocks(offsets: Mapping[str, float], reference: str) -> list[Finding]:
    """Clocks against process 0's. `offsets`: host -> seconds ahead."""
    if not offsets:
        return []
    late = [
        Finding(
            "warn",
            host,
            f"its clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} {reference}'s",
            "start chrony or ntpd on it: file times decide which lock is stale and which log came first",
        )
        for host, seconds in offsets.items()
        if abs(seconds) > CLOCK_SECONDS
    ]
    return late or [Finding("ok", ", ".join([reference, *offsets]), f"clocks within {CLOCK_SECONDS:.0f} s")]
