"""`ardtrain doctor` on two hosts: faults of hosts, names, networks and folders are found, named, and have a remedy."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.conftest import ENVIRONMENT, skip_without_cluster

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
DOCTOR = [sys.executable, "-m", "ardtrain", "doctor"]


@pytest.fixture(scope="module")
def decoy(tmp_path_factory):
    """node1 and node2, on both a docker0 with one address; the tests may break them."""
    skip_without_cluster()
    folder = tmp_path_factory.mktemp("decoy") / "c"
    with Cluster(folder, hosts=2, decoy=True, subnet="10.213.8", env=ENVIRONMENT) as both:
        yield both


def visit(cluster, *arguments, env=None, run_dir="/mnt"):
    """Exit code and report of `doctor --hosts node1,node2 --quick`, by default in a folder of each host's own."""
    command = [
        *DOCTOR,
        "--hosts",
        cluster.hostfile(slots=1),
        "--quick",
        "--json",
        "--run-dir",
        str(run_dir),
        *arguments,
    ]
    ended = cluster.run("node1", command, cwd=ROOT, env=env, timeout=120)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    assert lines, ended.stdout
    return ended.returncode, json.loads(lines[-1])["findings"]


def failures(findings):
    """(host, text) of the failures; every one has a remedy."""
    found = [(f["where"], f["what"], f["remedy"]) for f in findings if f["level"] == "fail"]
    assert all(remedy for _, _, remedy in found)
    return [(where, what) for where, what, _ in found]


def test_all_well(decoy, tmp_path):
    """Though `hostname -I` lists docker0 first."""
    code, findings = visit(decoy, run_dir=tmp_path / "run")
    assert code == 0, findings
    assert not failures(findings)
    told = {f["what"]: f["where"] for f in findings}
    assert told["10.213.8.12, ssh works"] == "node2"
    for part in ("equal versions, code", f"all see and write {tmp_path}", "clocks within", "all-reduce of 2 processes"):
        assert [where for what, where in told.items() if part in what] == ["node1, node2"], part
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_the_other_host_does_not_see(decoy):
    code, findings = visit(decoy, run_dir="/mnt/run")
    assert code == 1
    ((where, what),) = failures(findings)
    assert where == "node2" and "does not see what node1 writes in /mnt: the run folder is not shared" in what
    for name in decoy.names:
        assert not os.listdir(Path(decoy.path, "hosts", name, "local"))


def test_an_interface_that_is_not_there(decoy, tmp_path):
    code, findings = visit(decoy, env={"GLOO_SOCKET_IFNAME": "nosuch0"}, run_dir=tmp_path)
    assert code == 1
    assert [where for where, _ in failures(findings)] == ["node1", "node2"]
    assert all(
        "no interface nosuch0; it has lo 127.0.0.1, docker0 172.17.0.1, eth0" in w for _, w in failures(findings)
    )


def test_master_addr_on_the_wrong_interface(decoy, tmp_path):
    """docker0's address is the same on all hosts: node2 would ask itself."""
    code, findings = visit(decoy, "--seconds=10", env={"MASTER_ADDR": "172.17.0.1"}, run_dir=tmp_path)
    assert code == 1
    absent, own = failures(findings)
    assert absent[0] == own[0] == "node2"
    assert re.search(r"process 1 of 2 did not come to 172.17.0.1:\d+ \(an address of docker0, inside node1", absent[1])
    assert "connection refused; that is an address of this host's own docker0" in own[1]


def test_a_port_that_another_program_holds(decoy, tmp_path):
    """sshd's: node1 cannot listen there, and what answers node2 is no store."""
    code, findings = visit(decoy, "--seconds=8", env={"MASTER_PORT": "22"}, run_dir=tmp_path)
    assert code == 1
    told = dict(failures(findings))
    assert "MASTER_PORT=22: no store can be opened" in told["node1"] and "no store" in told["node2"]


def test_an_unknown_host_and_one_without_sshd(decoy):
    sshd = [pid for pid, line in decoy.processes("node2") if re.search("sshd.*(-f|listener)", line)]
    assert sshd
    os.kill(min(sshd), signal.SIGTERM)
    try:
        ended = decoy.run("node1", [*DOCTOR, "--hosts", "node1,node2,nosuch", "--quick"], cwd=ROOT)
        assert ended.returncode == 1
        told = " ".join(ended.stdout.split())
        assert re.search("FAIL node2 10.213.8.12: ssh is refused: no sshd .*-> start sshd on it", told), told
        assert re.search("FAIL nosuch the name has no address here .*-> correct the name in the hostfile", told), told
        assert "WARN all no meeting of the hosts was tried -> mend node2, nosuch" in told
        assert "ok node1 10.213.8.11, ssh works" in told
    finally:
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
        config = str(Path(decoy.path, "etc", "sshd_config"))
        decoy.run("node2", [shutil.which("sshd", path=path), "-f", config], check=True)


def test_an_unknown_host_key(decoy):
    known = Path(decoy.path, "etc", "known_hosts")
    before = known.read_text()
    known.write_text("".join(line for line in before.splitlines(True) if not line.startswith("node2")))
    try:
        code, findings = visit(decoy)
    finally:
        known.write_text(before)
    assert code == 1
    ((where, what),) = failures(findings)
    assert where == "node2" and "host key is not known" in what
    assert any("ssh-keyscan node2 >> ~/.ssh/known_hosts" in f["remedy"] for f in findings)


def test_a_host_whose_link_is_cut(decoy):
    decoy.link("node2", "cut")
    try:
        code, findings = visit(decoy)
    finally:
        decoy.link("node2", "up")
    assert code == 1
    ((where, what),) = failures(findings)
    assert where == "node2" and "does not answer" in what


def test_a_link_that_is_cut_while_the_hosts_meet(decoy, tmp_path):
    """Nothing hangs, and node2 is named."""
    command = [*DOCTOR, "--hosts", "node1,node2", "--json", "--seconds=12", "--run-dir", str(tmp_path)]
    output = tmp_path / "output"
    with output.open("w") as file:
        running = decoy.popen("node1", command, cwd=ROOT, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 60
            while not any("--meet" in line and "ssh" not in line for _, line in decoy.processes("node2")):
                assert time.monotonic() < deadline and running.poll() is None, output.read_text()
                time.sleep(0.02)
            decoy.link("node2", "cut")
            assert running.wait(120) == 1
        finally:
            running.kill()
            decoy.link("node2", "up")
    report = json.loads([line for line in output.read_text().splitlines() if line.startswith("{")][-1])
    assert "node2" in [where for where, _ in failures(report["findings"])], report["findings"]


def test_under_srun(cluster, tmp_path):
    """As a job's script calls it: one process on each node, no ssh."""
    step = ["srun", "-N2", "--ntasks-per-node=1", *DOCTOR, "--meet", "--quick", "--run", str(tmp_path / "run")]
    ended = cluster.run("node1", step, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout
    assert "2 of 2 processes on 2 host(s): node1, node2" in ended.stdout
    assert "all-reduce of 2 processes" in ended.stdout and "fit to train" in ended.stdout
    ended = cluster.run("node1", [*step[:-1], "/mnt/run"], cwd=ROOT)
    assert ended.returncode != 0
    assert re.search("FAIL node2 +does not see what node1 writes", ended.stdout), ended.stdout
