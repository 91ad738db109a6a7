#!/usr/bin/env python3
"""Checks of cluster.py itself, against real sshd and Slurm.  Run as root; takes about a minute.

selftest.py [--no-slurm]    prints one line a check and 'N passed, N failed' at the end.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from cluster import Cluster, ClusterError, same_process, start_time, wait_for

CHECKS = []


def check(f):
    CHECKS.append(f)
    return f


def mounts():
    with open("/proc/mounts") as f:
        return sorted(f.read().splitlines())


def links():
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout


# ------------------------------------------------------------------ hosts and network
@check
def hosts_have_names_addresses_and_nothing_else(c):
    for n in c.names:
        assert c.run(n, ["hostname"]).stdout.strip() == n
        assert c.run(n, ["hostname", "-I"]).stdout.split() == [c.address(n)]
        routes = c.run(n, ["ip", "route"]).stdout.strip().splitlines()
        assert len(routes) == 1 and routes[0].startswith(c.options["subnet"] + ".0/24"), routes
        assert c.run(n, ["ls", "/sys/class/net"]).stdout.split() == ["eth0", "lo"]
    assert os.uname().nodename not in c.names


@check
def ssh_runs_commands_and_returns_their_exit_code(c):
    a, b = c.names[:2]
    assert c.run(a, ["ssh", b, "hostname"]).stdout.strip() == b
    assert c.run(a, ["ssh", c.address(b), "exit 7"]).returncode == 7
    assert c.run(b, ["ssh", a, "echo $HOME"]).stdout.strip() == os.path.join(c.path, "home")


@check
def pdsh_reaches_every_host(c):
    if not shutil.which("pdsh"):
        return "pdsh is not installed"
    out = c.run(c.names[0], ["pdsh", "-S", "-w", ",".join(c.names), "hostname"], env={"PDSH_RCMD_TYPE": "ssh"}).stdout
    assert sorted(out.split()) == sorted(x for n in c.names for x in (n + ":", n)), out
    return None


@check
def files_are_shared_and_mnt_shm_and_run_are_not(c):
    a, b = c.names[:2]
    c.run(a, ["touch", os.path.join(c.path, "home", "shared"), "/mnt/own", "/dev/shm/own", "/run/own"], check=True)
    out = c.run(b, ["ls", os.path.join(c.path, "home", "shared"), "/mnt", "/dev/shm", "/run"]).stdout
    assert "shared" in out and "own" not in out, out
    assert not any(os.path.exists(p) for p in ("/mnt/own", "/dev/shm/own", "/run/own"))


@check
def processes_of_a_host_are_out_of_reach_of_the_others(c):
    a, b = c.names[:2]
    pa, pb = (c.popen(n, ["sleep", "987"]) for n in (a, b))
    outside = subprocess.Popen(["sleep", "987"])
    try:
        assert pa.pid and pb.pid
        assert c.run(a, ["pkill", "-f", "sleep 987"]).returncode == 0
        pa.wait(5)
        assert pb.poll() is None and outside.poll() is None
        with open(os.path.join(c.path, "logs", "pkill.log")) as f:
            assert a in f.read()
    finally:
        pa.kill(), pb.kill(), outside.kill(), outside.wait()


PING = r"""
import socket, sys, time
s = socket.create_connection((sys.argv[1], 4321), 5); s.settimeout(float(sys.argv[2]))
try:
    while True:
        s.sendall(b"x"); s.recv(1); print("pong", flush=True); time.sleep(0.1)
except Exception as e:
    print(type(e).__name__, e, flush=True)
"""
ECHO = r"""
import socket
l = socket.create_server(("", 4321)); print("ready", flush=True)
while True:
    s, _ = l.accept()
    try:
        while True:
            d = s.recv(1)
            if not d: break
            s.sendall(d)
    except OSError: pass
"""


@check
def a_cut_link_is_silent_and_comes_back(c):
    a, b = c.names[:2]
    server = c.popen(b, [sys.executable, "-u", "-c", ECHO], stdout=subprocess.PIPE)
    try:
        server.popen.stdout.readline()
        for what, error in (("cut", "TimeoutError"), ("down", "TimeoutError")):
            ping = c.popen(a, [sys.executable, "-u", "-c", PING, b, "1"], stdout=subprocess.PIPE, text=True)
            assert ping.popen.stdout.readline() == "pong\n"
            c.link(b, what)
            rest = ping.popen.stdout.read()
            assert error in rest, (what, rest)
            assert c.run(a, ["ssh", "-o", "ConnectTimeout=1", b, "true"]).returncode == 255
            c.link(b, "up")
            wait_for("ssh again", lambda: c.run(a, ["ssh", b, "true"]).returncode == 0)
    finally:
        server.kill()


@check
def signals_reach_the_command_itself(c):
    p = c.popen(
        c.names[0],
        ["bash", "-c", "trap 'echo got; exit 3' USR1; echo on; while :; do sleep 0.1; done"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert p.popen.stdout.readline() == "on\n"
    p.send_signal(signal.SIGUSR1)
    assert p.popen.stdout.read() == "got\n" and p.wait(5) == 3


# --------------------------------------------------------------------------- Slurm
def job(c, number):
    out = c.run(c.names[0], ["scontrol", "-o", "show", "job", number]).stdout
    return dict(x.split("=", 1) for x in out.split() if "=" in x)


def submit(c, *args):
    return c.run(c.names[0], ["sbatch", "--parsable", *args], check=True).stdout.split()[-1]


def state(c, number, *want, timeout=40):
    wait_for(f"job {number} {want}", lambda: job(c, number)["JobState"] in want, timeout, 0.2)


SCRIPT = r"""#!/bin/bash
#SBATCH --requeue --open-mode=append -o %x-%j.out
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] && { srun sleep 300; sleep 60; }
echo end
"""


def script(c):
    path = os.path.join(c.path, "home", "job.sh")
    with open(path, "w") as f:
        f.write(SCRIPT)
    return path


def started(c, number):
    def text():
        path = os.path.join(c.path, "home", f"job.sh-{number}.out")
        return os.path.exists(path) and "start 0" in open(path).read()

    wait_for("start", text, 30)


@check
def slurm_srun_spans_the_hosts(c):
    n = len(c.names)
    out = c.run(c.names[0], ["srun", f"-N{n}", f"-n{n}", "hostname"], check=True).stdout
    assert sorted(out.split()) == c.names


@check
def slurm_requeue_restarts_a_job(c):
    j = submit(c, "-N2", script(c))
    started(c, j)
    c.run(c.names[0], ["scontrol", "requeue", j], check=True)
    state(c, j, "COMPLETED")
    assert job(c, j)["Restarts"] == "1"


@check
def slurm_priority_preempts_and_requeues(c):
    j = submit(c, "-N2", script(c))
    started(c, j)
    k = submit(c, f"-N{len(c.names)}", "-p", "urgent", "-o", "/dev/null", "--wrap", "sleep 1")
    state(c, k, "COMPLETED")
    state(c, j, "COMPLETED")
    assert job(c, j)["Restarts"] == "1"


@check
def slurm_scancel_ends_a_job(c):
    j = submit(c, "-N2", script(c))
    started(c, j)
    c.run(c.names[0], ["scancel", j], check=True)
    state(c, j, "CANCELLED")


@check
def slurm_requeues_when_a_host_loses_power(c):
    n = len(c.names)
    j = submit(c, f"-N{n}", script(c))
    started(c, j)
    c.poweroff(c.names[-1])
    state(c, j, "PENDING", timeout=60)
    c.boot(c.names[-1])
    state(c, j, "COMPLETED", timeout=60)
    assert job(c, j)["Restarts"] == "1"


# ------------------------------------------------------------------- coming and going
OWNER = r"""
import sys, time; sys.path.insert(0, sys.argv[1])
from cluster import Cluster
c = Cluster(sys.argv[2], hosts=2, sshd=False).up()
print(*[r[k]["pid"] for r in [*c.state["hosts"].values(), c.state["switch"]] for k in ("init", "outer")], flush=True)
time.sleep(60)
"""


def a_tied_cluster_ends_with_its_owner(tmp):
    path = os.path.join(tmp, "owned")
    p = subprocess.Popen(
        [sys.executable, "-c", OWNER, os.path.dirname(os.path.abspath(__file__)), path],
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(x) for x in p.stdout.readline().split()]
    assert len(pids) == 6 and all(start_time(x) for x in pids)
    p.kill(), p.wait()
    wait_for("end", lambda: not any(start_time(x) for x in pids), 10)
    Cluster(path).down()
    assert not os.path.exists(path)


def the_command_line_does_the_same(tmp):
    me, path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cluster.py"), os.path.join(tmp, "cli")
    run = lambda *a: subprocess.run([sys.executable, me, *a], capture_output=True, text=True)  # noqa: E731
    for _ in range(2):  # a second `up` replaces the first cluster
        assert run("up", path, "--hosts", "2", "--no-sshd").returncode == 0
    assert run("exec", path, "node2", "--", "bash", "-c", "hostname; exit 4").returncode == 4
    assert "node1 10.213.7.11 up" in run("status", path).stdout
    state = Cluster.attach(path).state
    pids = [r[k] for r in [*state["hosts"].values(), state["switch"]] for k in ("init", "outer")]
    for _ in range(2):  # and a second `down` has nothing to do
        assert run("down", path).returncode == 0
    assert not any(map(same_process, pids)) and not os.path.exists(path)
    assert run("up", path, "--hosts", "1", "--no-sshd").returncode == 0
    state = Cluster.attach(path).state
    shutil.rmtree(path)  # without its directory a cluster ends by itself
    wait_for("end", lambda: not any(same_process(r["init"]) for r in [*state["hosts"].values(), state["switch"]]), 10)


def it_never_takes_over_a_directory_that_is_not_its_own(tmp):
    path = os.path.join(tmp, "precious")
    os.makedirs(path)
    open(os.path.join(path, "file"), "w").close()
    try:
        Cluster(path).up()
        raise AssertionError("took it over")
    except ClusterError:
        assert os.listdir(path) == ["file"]
    Cluster(path).down()
    assert os.listdir(path) == ["file"]


def main():
    slurm = "--no-slurm" not in sys.argv[1:]
    tmp = tempfile.mkdtemp(prefix="cluster-selftest-")
    passed = failed = skipped = 0
    before = mounts(), links()

    def one(name, f):
        nonlocal passed, failed, skipped
        t = time.monotonic()
        try:
            why = f()
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAIL {name}", flush=True)
        else:
            skipped, passed = (skipped + 1, passed) if why else (skipped, passed + 1)
            print(
                f"{'skip' if why else 'ok  '} {name} ({time.monotonic() - t:.1f} s){' ' + why if why else ''}",
                flush=True,
            )

    try:
        t = time.monotonic()
        with Cluster(os.path.join(tmp, "c"), hosts=3, slurm=slurm) as c:
            print(f"up with 3 hosts in {time.monotonic() - t:.1f} s", flush=True)
            for f in CHECKS:
                if slurm or not f.__name__.startswith("slurm"):
                    one(f.__name__, lambda f=f: f(c))
            pids = [r[k] for r in [*c.state["hosts"].values(), c.state["switch"]] for k in ("init", "outer")]
        for f in (
            a_tied_cluster_ends_with_its_owner,
            the_command_line_does_the_same,
            it_never_takes_over_a_directory_that_is_not_its_own,
        ):
            one(f.__name__, lambda f=f: f(tmp))

        def nothing_is_left():
            assert not any(map(same_process, pids))
            assert (mounts(), links()) == before
            assert os.listdir(tmp) == ["precious"]

        one("nothing_is_left", nothing_is_left)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
