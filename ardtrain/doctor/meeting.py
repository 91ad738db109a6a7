"""All processes of a start meet before it: facts, clocks, the run folder, one all-reduce. Under any launcher.

Process 0 hosts a store, collects, judges and tells; the others do what it asks. Every wait has an end, and a process
that still hangs `SPARE_SECONDS` after the limit ends itself.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ardtrain.doctor import network
from ardtrain.doctor.board import Board, bounded
from ardtrain.doctor.compare import by_host, check_all, check_clocks, check_network
from ardtrain.doctor.facts import Facts, collect
from ardtrain.doctor.finding import Finding, Trouble, failed
from ardtrain.doctor.folder import SharedFolder
from ardtrain.doctor.needs import Needs
from ardtrain.doctor.reduce import reduce_once, remedy_of, with_names
from ardtrain.environment import ProcessIdentity
from ardtrain.hostfile import expand_nodelist
from ardtrain.reasons import first_line

SPARE_SECONDS = 3.0
ARRIVAL_FRACTION = 0.6  # of the limit is for all to come, the rest for the tests
FOLDER_SECONDS = 15.0
SLOW_BYTES_PER_SECOND = 1e8  # below a gigabit a second


@dataclass
class Visit:
    """What this process found out; process 0's holds everyone's. `passed` is known to all."""

    findings: list[Finding] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    passed: bool = True


def meet(identity: ProcessIdentity, needs: Needs, *, seconds: float, quick: bool) -> Visit:
    """Runs this process's part of a meeting; takes about `seconds` at most.

    Raises:
        Trouble: this process cannot go on; its finding says why. The others find out by their own limits.
    """
    if identity.world_size == 1:
        facts = [collect(identity, needs, quick=quick)]
        return Visit([*check_all(facts, method=needs.method), *check_network(facts)], facts)
    import ardtrain.collectives  # noqa: F401  torch takes seconds, from a cold disk many: before the clock starts

    stage = ["meeting the others"]
    take_back = _end_at_last(seconds, stage)
    host = socket.gethostname()
    start = time.monotonic()
    arrival, deadline = start + seconds * ARRIVAL_FRACTION, start + seconds
    try:
        board = _enter(identity, host, deadline=arrival, seconds=seconds)
        board.post("here", identity.global_rank, {"host": host})
        stage.append("collecting facts; a disk or a driver may hang")
        facts_here = collect(identity, needs, quick=quick)
        stage.append("comparing and trying; the run folder's disk may hang")
        if identity.global_rank == 0:
            return _Chair(identity, needs, board, facts_here, arrival, deadline).hold()
        board.post("facts", identity.global_rank, facts_here.as_json())
        return _attend(identity, needs, board, facts_here, deadline)
    finally:
        take_back()


def _end_at_last(seconds: float, stage: Sequence[str]) -> Callable[[], None]:
    """Ends this process if it hangs, also where no Python runs any more; call what it gives to take that back.

    stage: what this process does; the last one is told.
    """

    def end() -> None:
        host = socket.gethostname()
        os.write(2, f"ardtrain doctor: {host} still hangs {SPARE_SECONDS:g} s after the limit ({stage[-1]})\n".encode())
        os._exit(1)

    timer = threading.Timer(seconds + SPARE_SECONDS, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 2 * SPARE_SECONDS, exit=True)  # needs no turn of Python

    def take_back() -> None:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    return take_back


def _enter(identity: ProcessIdentity, host: str, *, deadline: float, seconds: float) -> Board:
    """This process's connection to the store. Raises Trouble."""
    from ardtrain.collectives import open_store

    name, port = identity.master_addr, identity.master_port
    assert port is not None, "several processes have a port"
    first = identity.global_rank == 0
    where = f"MASTER_ADDR={name}, MASTER_PORT={port}"
    if not first:
        _wait_for_store(identity, host, where, deadline)
    limit = seconds if first else max(5.0, deadline - time.monotonic())
    try:
        store = bounded(
            lambda: open_store(name, port, hosts_store=first, name="doctor", timeout_seconds=limit), seconds=limit
        )
    except (RuntimeError, TimeoutError) as error:
        text = first_line(error)[:160]
        if first:
            remedy = f"another program (an earlier run?) holds port {port} here: end it, or set another MASTER_PORT"
            raise Trouble(Finding("fail", host, f"{where}: no store can be opened ({text})", remedy)) from error
        remedy = "another program answers on that port: set another MASTER_PORT for all processes"
        raise Trouble(Finding("fail", host, f"{where}: what answers there is no store ({text})", remedy)) from error
    if first and (reason := network.wait_for_port(name, port, deadline=min(deadline, time.monotonic() + 3.0))):
        own = ", ".join(f"{n} {a[0]}" for n, a in network.interfaces().items() if a)
        what = f"{where}: process 0 runs on this host and does not reach itself by that name ({reason}); it has {own}"
        raise Trouble(Finding("fail", host, what, "set MASTER_ADDR to a name or address of process 0's host"))
    return Board(store, host=host)


def _wait_for_store(identity: ProcessIdentity, host: str, where: str, deadline: float) -> None:
    name, port = identity.master_addr, identity.master_port
    assert port is not None
    addresses, unknown = network.resolve(name)
    if unknown is not None:
        remedy = "set MASTER_ADDR to an address, or add the name to DNS or /etc/hosts on every host"
        raise Trouble(Finding("fail", host, f"{where}: the name has no address here ({unknown})", remedy))
    reason = network.wait_for_port(name, port, deadline=deadline)
    if reason is None:
        return
    told = f"{where} ({', '.join(addresses)}): {reason}"
    own = network.interface_of(addresses[0], network.interfaces())
    if own is not None and identity.local_world_size != identity.world_size:
        told += f"; that is an address of this host's own {own}"
        remedy = "unless process 0 is on this host: set MASTER_ADDR to its host's address on the hosts' common network"
    elif reason == "connection refused":
        remedy = "process 0 did not start or has ended (look at its output), or MASTER_ADDR is another host's"
    else:
        remedy = "open the port in the firewall between the hosts, or set MASTER_ADDR to an address on another network"
    raise Trouble(Finding("fail", host, told, remedy))


def _attend(identity: ProcessIdentity, needs: Needs, board: Board, facts: Facts, deadline: float) -> Visit:
    """A meeting as all but process 0 see it: do what it asks, tell the results."""
    number = identity.global_rank
    plan = board.read("plan", 0, deadline=deadline)
    ahead = time.time() - plan["time"]
    if plan["cancelled"]:
        board.post("bye", number, {})
        return Visit(passed=False)
    folder = SharedFolder(needs.run_dir, token=plan["token"], levels=plan["levels"])
    try:
        seen, error = folder.sees(0), folder.write(number)
        board.post("folder", number, {"seen": seen, "error": error, "path": str(folder.path), "ahead": ahead})
        go = board.read("go", 0, deadline=deadline)
    finally:
        folder.clean()
    if go["reduce"]:
        board.post("reduced", number, reduce_once(identity, facts, deadline=deadline))
    end = board.read("end", 0, deadline=deadline)
    board.post("bye", number, {})
    return Visit(passed=end["passed"])


class _Chair:
    """A meeting as process 0 leads it."""

    def __init__(
        self, identity: ProcessIdentity, needs: Needs, board: Board, facts: Facts, arrival: float, deadline: float
    ) -> None:
        self.identity, self.needs, self.board, self.facts = identity, needs, board, facts
        self.arrival, self.deadline = arrival, deadline
        self.others = range(1, identity.world_size)
        self.findings: list[Finding] = []
        self.hosts: dict[int, str] = {}

    def hold(self) -> Visit:
        """The whole meeting."""
        notes = self.board.gather("facts", self.others, deadline=self.arrival)
        everyone = [self.facts, *(Facts.from_json(notes[process]) for process in sorted(notes))]
        self.hosts = {facts.process: facts.host for facts in everyone}
        self.findings += check_all(everyone, method=self.needs.method)
        network_findings = check_network(everyone)
        self.findings += network_findings
        absent = [process for process in self.others if process not in notes]
        if absent:
            self.findings += self._absent(absent)
            self.board.post("plan", 0, {"cancelled": True, "time": time.time()})
        else:
            self._test_folder()
            self._test_reduce(everyone, tried=not failed(network_findings))
        passed = not failed(self.findings)
        self.board.post("end", 0, {"passed": passed})
        # The store ends with this process: let the others read first.
        self.board.gather("bye", notes, deadline=time.monotonic() + 2.0)
        return Visit(self.findings, everyone, passed)

    def _absent(self, absent: Sequence[int]) -> list[Finding]:
        """Findings that name processes which did not come, by host where that is known."""
        here = self.board.gather("here", absent, deadline=0.0)
        expected = expected_hosts(os.environ, self.identity.world_size)
        places: dict[tuple[str, bool], list[int]] = {}
        for process in absent:
            name = here[process]["host"] if process in here else expected.get(process, "")
            places.setdefault((name, process in here), []).append(process)
        found = []
        for (name, came), processes in places.items():
            numbers = ", ".join(map(str, processes))
            if came:
                what = f"process {numbers} came, and did not tell its facts in time: a disk there may hang"
                remedy = "look at df and dmesg there, or allow more --seconds"
            else:
                what = f"process {numbers} of {self.identity.world_size} did not come to {self._address()}"
                remedy = (
                    "look at that process's own output; no output: it was not started, or its host cannot reach that "
                    "address (firewall, wrong interface)"
                )
            found.append(Finding("fail", name or f"process {numbers}", what, remedy))
        return found

    def _address(self) -> str:
        name, port = self.identity.master_addr, self.identity.master_port
        addresses, _ = network.resolve(name)
        own = network.interface_of(addresses[0], network.interfaces()) if addresses else None
        text = f"{name}:{port}"
        several = self.identity.local_world_size != self.identity.world_size
        if several and own is not None and (own == "lo" or own.startswith(network.BRIDGES)):
            text += f" (an address of {own}, inside {socket.gethostname()}: no other host reaches it)"
        return text

    def _test_folder(self) -> None:
        """Files of all processes in the run folder, and their clocks."""
        own = self.hosts[0]
        folder = SharedFolder(self.needs.run_dir)
        try:
            error = folder.write(0)
            plan = {"cancelled": False, "token": folder.token, "levels": folder.levels, "time": time.time()}
            self.board.post("plan", 0, plan)
            limit = min(self.deadline, time.monotonic() + FOLDER_SECONDS)
            notes = self.board.gather("folder", self.others, deadline=limit)
            unseen = [p for p, note in notes.items() if note["seen"] and not folder.sees(p)]
        finally:
            folder.clean()
        found: dict[str, Finding] = {}
        remedy = "choose an output_dir on a disk that all hosts mount under one path (NFS, Lustre, GPFS)"
        for process in self.others:
            host, note = self.hosts[process], notes.get(process)
            if error is not None or host in found:
                continue  # process 0's own error is told by its facts
            if note is None:
                what = f"no answer about the run folder {folder.path} in time: the disk may hang there"
                found[host] = Finding("fail", host, what, "look at `df` and dmesg on that host")
            elif not note["seen"]:
                other = "" if note["path"] == str(folder.path) else f" (it looks in {note['path']})"
                what = f"does not see what {own} writes in {folder.path}{other}: the run folder is not shared"
                found[host] = Finding("fail", host, what, remedy)
            elif note["error"] is not None:
                what = f"sees the run folder {folder.path} and cannot write there: {note['error']}"
                found[host] = Finding("fail", host, what, "have the rights given on that host (mount options, user id)")
            elif process in unseen:
                what = f"what it writes in {folder.path} is not seen on {own}"
                found[host] = Finding("fail", host, what, remedy)
        names = ", ".join(dict.fromkeys(self.hosts.values()))
        if not found and error is None:
            found[own] = Finding("ok", names, f"all see and write {folder.path}")
        self.findings += found.values()
        ahead = {self.hosts[p]: notes[p]["ahead"] for p in notes if self.hosts[p] != own}
        self.findings += check_clocks(ahead, own)

    def _test_reduce(self, everyone: Sequence[Facts], *, tried: bool) -> None:
        """One all-reduce of all processes."""
        self.board.post("go", 0, {"reduce": tried})
        own = self.hosts[0]
        if not tried:
            self.findings.append(
                Finding("warn", own, "no all-reduce was tried", "first mend what fails in the network")
            )
            return
        notes = {0: reduce_once(self.identity, everyone[0], deadline=self.deadline)}
        notes |= self.board.gather("reduced", self.others, deadline=min(self.deadline, time.monotonic() + 3.0))
        owners = {address: f.host for f in everyone for own in f.addresses.values() for address in own}
        errors: dict[tuple[str, str], None] = {}
        for process in range(self.identity.world_size):
            note = notes.get(process, {"error": "no word of its end"})
            if note["error"] is not None:
                errors[self.hosts[process], with_names(note["error"], owners)] = None
        for host, text in errors:
            self.findings.append(Finding("fail", host, f"all-reduce: {text}", remedy_of(text)))
        if errors:
            return
        slowest = min(note["bandwidth"] for note in notes.values())
        names = ", ".join(by_host(everyone))
        what = f"all-reduce of {self.identity.world_size} processes: {slowest / 1e9:.2f} GB/s"
        if slowest < SLOW_BYTES_PER_SECOND:
            remedy = "look which network is used: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO"
            self.findings.append(Finding("warn", names, what + ", slow", remedy))
        else:
            self.findings.append(Finding("ok", names, what))


def expected_hosts(environ: Mapping[str, str], world_size: int) -> dict[int, str]:
    """Process -> its host, as ARDTRAIN_HOSTS or Slurm's step names them, in blocks; {} if neither does. Pure."""
    hosts = tuple(name for name in environ.get("ARDTRAIN_HOSTS", "").split(",") if name)
    if hosts and world_size % len(hosts) == 0:
        return {process: hosts[process * len(hosts) // world_size] for process in range(world_size)}
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    names = expand_nodelist(environ.get("SLURM_STEP_NODELIST", ""))
    if sum(counts) != world_size or len(names) != len(counts):
        return {}
    return dict(enumerate(name for name, count in zip(names, counts, strict=True) for _ in range(count)))
