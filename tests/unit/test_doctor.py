"""The doctor's checks on made-up facts, its parts, and meetings of processes on this machine."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ardtrain import ops
from ardtrain.config import ConfigError
from ardtrain.doctor import checks, compare, disk, facts, hosts, meeting, network
from ardtrain.doctor.board import bounded
from ardtrain.doctor.finding import Finding, render
from ardtrain.doctor.folder import SharedFolder
from ardtrain.doctor.needs import checkpoint_bytes, read_needs
from ardtrain.doctor.reduce import first_words, remedy_of, with_names
from ardtrain.hostfile import Host

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = {
    "torch": "2.13.0+cpu", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": "0.21.2", "torchvision": None,
    "ardtrain": "0.1.0",
}  # fmt: skip


def some_facts(process=0, host="node1", versions=None, **changes):
    address = f"10.0.0.{process + 1}"
    values = {
        "process": process, "local_rank": 0, "host": host, "addresses": {"lo": ["127.0.0.1"], "eth0": [address]},
        "name_addresses": [address], "variables": {}, "python": "3.11.7", "versions": GOOD | (versions or {}),
        "package_digest": "a" * 64, "accelerator": "cpu", "ops": ["deepspeed_shm_comm"], "ops_folder": "ops",
        "shm_bytes": 8 << 30, "run_dir": "run", "free_bytes": 100 << 30,
    }  # fmt: skip
    return facts.Facts(**values | changes)


def on_gpu(**changes):
    return {
        "accelerator": "cuda",
        "cuda": "12.8",
        "driver": "570.86",
        "gpus": ["H100"],
        "rdma": {"mlx5_0": "ACTIVE"},
    } | changes


def bad(findings):
    return [(f.level, f.where, f.what) for f in findings if f.level != "ok"]


def only(findings):
    found = [f for f in findings if f.level != "ok"]
    assert len(found) == 1, found
    assert found[0].remedy
    return found[0]


# ---- one host's facts ----


def test_a_healthy_host_has_nothing_but_ok():
    healthy = some_facts()
    found = checks.check_host(healthy, method="elalora", num_local=2, num_hosts=2)
    found += checks.check_interfaces(healthy, num_hosts=2)
    assert not bad(found)
    assert {f.level for f in found} == {"ok"}
    gpu = some_facts(**on_gpu())
    assert not bad(checks.check_host(gpu, method=None, num_local=1, num_hosts=2))
    assert not bad(compare.check_network([gpu, dataclasses.replace(gpu, process=1)]))


@pytest.mark.parametrize(
    ("versions", "method", "level", "text"),
    [
        ({"torch": "2.10.0"}, None, "fail", "torch 2.10.0 is older than 2.11"),
        ({"torch": "2.9.1+cu128"}, None, "fail", "torch 2.9.1"),
        ({"deepspeed": "0.19.2"}, "lora", "fail", "DeepSpeed#8130"),
        ({"deepspeed": "0.19.7"}, "full", "fail", "a gradient that is not finite"),
        ({"deepspeed": "0.19.7"}, None, "warn", "method=full needs 0.19.8"),
        ({"transformers": "4.57.1"}, None, "fail", "transformers 4.57.1 is older"),
        ({"peft": "0.18"}, None, "fail", "peft 0.18 is older"),
        ({"deepspeed": None}, None, "fail", "deepspeed not installed"),
        ({"torchvision": "0.27.0"}, None, "fail", "torchvision 0.27.0 does not belong to torch 2.13.0"),
        ({"torchvision": "0.28.0+cu128"}, None, "fail", "does not belong"),
    ],
)
def test_known_bad_versions_and_pairs(versions, method, level, text):
    found = checks.check_versions(some_facts(versions=versions), method)
    worst = [f for f in found if f.level == level]
    assert len(worst) == 1
    assert text in worst[0].what and worst[0].remedy


@pytest.mark.parametrize(
    ("versions", "method"),
    [
        ({}, "full"),
        ({"deepspeed": "0.19.3"}, "lora"),
        ({"torch": "2.11.0", "torchvision": "0.26.0"}, None),
        ({"torchvision": "0.28.0+cpu"}, None),
        ({"deepspeed": "0.20.0.dev1"}, "full"),
    ],
)
def test_good_versions_are_not_refused(versions, method):
    assert not [f for f in checks.check_versions(some_facts(versions=versions), method) if f.level == "fail"]


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        (on_gpu(driver="520.61"), "fail", "needs a driver from 525.60; here is 520.61"),
        (on_gpu(cuda="13.0", driver="570.86"), "fail", "needs a driver from 580"),
        (on_gpu(nvcc="11.8"), "fail", "nvcc is of CUDA 11.8 and torch of CUDA 12.8"),
        (on_gpu(gpus=[], accelerator="cpu"), "warn", "torch sees no GPU"),
        ({"driver": "570.86"}, "warn", "built without CUDA"),
    ],
)
def test_torchs_cuda_with_driver_and_compiler(changes, level, text):
    found = only(checks.check_versions(some_facts(**changes), None))
    assert found.level == level and text in found.what


def test_ops_and_their_locks():
    assert "killed" in only(checks.check_ops(some_facts(locks={"ops/a/lock": 9e3}))).what
    young = only(checks.check_ops(some_facts(locks={"ops/a/lock": 60.0})))
    assert "is being compiled" in young.what and young.level == "warn"
    assert "not compiled" in only(checks.check_ops(some_facts(ops=[]))).what
    cannot = only(checks.check_ops(some_facts(ops=[], can_compile=False)))
    assert cannot.level == "fail" and "deepspeed_shm_comm" in cannot.what
    assert "async_io" in only(checks.check_ops(some_facts(nvme={"nvme": None}))).what


def test_shared_memory_and_locked_memory():
    def found(num_local=2, num_hosts=2, **changes):
        return checks.check_memory(some_facts(**changes), num_local=num_local, num_hosts=num_hosts)

    assert "0.06 GiB" in only(found(shm_bytes=64 << 20)).what
    assert not bad(found(shm_bytes=64 << 20, num_local=1))
    small = {"memlock_bytes": 64 << 10}
    assert not bad(found(**small)), "without RDMA and NVMe nothing is locked"
    rdma = only(found(**on_gpu(**small)))
    assert rdma.level == "fail" and "64 KiB" in rdma.what
    assert only(found(nvme={"nvme": None}, **small)).level == "warn"
    assert not bad(found(**on_gpu(memlock_bytes=None)))


def test_a_process_needs_its_own_gpu():
    assert not bad(checks.check_gpu(some_facts(**on_gpu())))
    assert "it sees 1 GPU" in only(checks.check_gpu(some_facts(**on_gpu(local_rank=1)))).what


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"variables": {"GLOO_SOCKET_IFNAME": "nosuch0"}},
            "has no interface nosuch0; it has lo 127.0.0.1, eth0 10.0.0.1",
        ),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth"}}, "no interface eth;"),
        (on_gpu(variables={"NCCL_SOCKET_IFNAME": "ib"}), "no interface ib;"),
        (on_gpu(variables={"NCCL_SOCKET_IFNAME": "=eth"}), "no interface eth;"),
        (on_gpu(variables={"NCCL_IB_HCA": "mlx4"}), "has no such device"),
        ({"addresses": {"docker0": ["172.17.0.1"]}, "name_addresses": ["172.17.0.1"]}, "172.17.0.1 of docker0"),
        (on_gpu(rdma={"mlx5_0": "DOWN"}), "no active InfiniBand or RoCE (mlx5_0 DOWN)"),
    ],
)
def test_interfaces(changes, text):
    assert text in only(checks.check_interfaces(some_facts(**changes), num_hosts=2)).what


@pytest.mark.parametrize(
    ("chosen", "prefixes", "missing"),
    [
        ("eth0", False, []),
        ("eth0,ib0", False, ["ib0"]),
        ("eth", True, []),
        ("^docker0,lo", True, []),
        ("=eth0", True, []),
        ("ib,eth", True, []),
        ("ib,bond", True, ["ib", "bond"]),
    ],
)
def test_interface_names_by_gloos_and_nccls_rule(chosen, prefixes, missing):
    assert network.missing_interfaces(chosen, {"lo": [], "eth0": []}, prefixes=prefixes) == missing


def test_disk_rights_room_and_speed():
    assert (
        "cannot be written: Permission denied"
        in only(checks.check_disk(some_facts(write_error="Permission denied"))).what
    )
    slow = some_facts(nvme={"nvme": None}, speeds={"nvme": [1e8, 3e8]})
    assert "slow for an offload" in only(checks.check_disk(slow)).what
    assert "nvme_path=nvme cannot" in only(checks.check_disk(some_facts(nvme={"nvme": "No such file"}))).what
    room = some_facts(free_bytes=10 << 30, speeds={"run": [1e6, 1e9]})
    assert checks.check_room(room, 6 << 30).level == "fail"
    assert checks.check_room(room, 1 << 20).level == "ok"
    assert "18 min" in checks.check_room(room, 1 << 30).what


def test_files_that_are_not_there():
    assert "not there: rows.jsonl" in only(checks.check_files(some_facts(files={"rows.jsonl": None, "b": 3}))).what


# ---- several hosts' facts ----


def test_equal_hosts_have_nothing_but_ok():
    both = [some_facts(), some_facts(1, "node2")]
    assert not bad(compare.check_all(both, method=None))
    assert not bad(compare.check_network(both))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"versions": {"torch": "2.12.0"}}, "torch: 2.12.0 here, 2.13.0+cpu on node1"),
        ({"versions": {"mpi4py": None, "ardtrain": "0.2"}}, "ardtrain: 0.2 here"),
        ({"python": "3.12.1"}, "Python: 3.12.1 here"),
        ({"package_digest": "b" * 64}, "code of ardtrain (digest): bbbbbbbbbbbb here, aaaaaaaaaaaa"),
        ({"config_digest": "c" * 64}, "config file"),
        ({"files": {"rows": 7}}, "bytes of rows: 7 here, 5 on node1"),
        ({"cuda": "12.8"}, "torch's CUDA: 12.8 here, none"),
    ],
)
def test_what_differs_is_told_with_its_host(changes, text):
    first = some_facts(files={"rows": 5})
    second = some_facts(1, "node2", **{"files": {"rows": 5}} | changes)
    found = only(compare.check_equal([first, second]))
    assert found.level == "fail" and found.where == "node2"
    assert text in found.what


def test_an_address_on_two_hosts():
    twin = some_facts(1, "node2", name_addresses=["10.0.0.1"])
    assert "10.0.0.1, which is also node1's" in only(compare.check_network([some_facts(), twin])).what
    loopback = [some_facts(name_addresses=["127.0.1.1"]), some_facts(1, "node2", name_addresses=["127.0.1.1"])]
    assert not bad(compare.check_network(loopback))


def test_clocks():
    assert not bad(compare.check_clocks({"node2": 0.4, "node3": -1.9}, "node1"))
    assert "3.0 s behind node1's" in only(compare.check_clocks({"node2": -3.0, "node3": 0.1}, "node1")).what


def test_report_merges_hosts_and_ends_with_the_verdict():
    well = [Finding("ok", f"node{i}", "disk") for i in range(9)]
    text = render([Finding("fail", "node7", "down", "boot it"), *well], title="T")
    assert text.splitlines()[0] == "T"
    assert "node0 and 8 more disk" in text
    assert text.index("disk") < text.index("FAIL node7")
    assert "-> boot it" in text and text.endswith("NOT FIT to train: 1 ok, 0 warning(s), 1 failure(s)")


# ---- parts that touch this machine ----


def test_measuring_a_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "MOST", disk.CHUNK)
    speed = disk.measure(tmp_path / "not/yet/made", seconds=0.2)
    assert speed.write > 0 and speed.read > 0
    monkeypatch.setattr(os, "fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        disk.measure(tmp_path, seconds=0.2)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    assert disk.write_error(tmp_path) is None
    assert disk.write_error(Path("/proc/ardtrain")) is not None
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert disk.write_error(tmp_path / "file" / "run") == f"{tmp_path}/file is no folder"


def test_own_facts_survive_json(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/lock").touch()
    os.utime(tmp_path / "cpu_adam/lock", (time.time() - 5000,) * 2)
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    from ardtrain.environment import discover

    found = facts.collect(discover({}), read_needs(None, run_dir=str(tmp_path)), quick=True)
    told = json.loads(json.dumps(found.as_json()))
    assert facts.Facts.from_json(told) == facts.Facts.from_json(told | {"of_a_later_version": 1}) == found
    assert found.host == socket.gethostname() and "127.0.0.1" in found.addresses["lo"]
    assert found.versions["torch"] and "cpu_adam" in found.ops
    (age,) = found.locks.values()
    assert age > ops.STALE_LOCK_SECONDS
    assert found.free_bytes > 0 and found.write_error is None and not found.speeds


def test_package_digest_sees_content_and_names(tmp_path):
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    first = facts.package_digest(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    assert facts.package_digest(tmp_path) == first
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    renamed = facts.package_digest(tmp_path)
    (tmp_path / "c.py").write_text("3")
    assert len({first, renamed, facts.package_digest(tmp_path)}) == 3


def test_driver_version():
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 9\n"
    assert facts.driver_version(text) == "570.86.15"
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    assert facts.driver_version(text) == "580.65.06"
    assert facts.driver_version("") is None


def test_a_port_that_answers_and_one_that_does_not():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert network.wait_for_port("127.0.0.1", port, deadline=time.monotonic()) == "connection refused"
        listener.listen()
        assert network.wait_for_port("127.0.0.1", port, deadline=time.monotonic() + 5) is None
    assert network.resolve("no.such.host.invalid")[1] and network.resolve("a..b")[1]
    assert network.interface_of("127.0.1.1", {"lo": ["127.0.0.1"]}) == "lo"


def test_shared_folder(tmp_path):
    first = SharedFolder(tmp_path / "runs/one")
    second = SharedFolder(tmp_path / "runs/one", token=first.token, levels=first.levels)
    elsewhere = SharedFolder(tmp_path / "mnt/runs/one", token=first.token, levels=first.levels)
    assert first.path == second.path == tmp_path, "the run folder is not made yet"
    assert first.write(0) is None and second.write(1) is None
    assert second.sees(0) and first.sees(1)
    assert not elsewhere.sees(0, seconds=0)
    assert "No such file" in (elsewhere.write(2) or "")
    for folder in (first, second, elsewhere):
        folder.clean()
    assert not list(tmp_path.iterdir())


def test_bounded_ends_with_a_hang_and_passes_errors_on():
    assert bounded(lambda: 3, seconds=5) == 3
    with pytest.raises(TimeoutError):
        bounded(lambda: time.sleep(60), seconds=0.05)
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0, seconds=5)


@pytest.mark.parametrize(
    "hang", ["time.sleep(60)", "re.match('(a*)*b', 'a' * 99)"], ids=["sleep", "no turn for Python"]
)
def test_a_process_that_hangs_ends_itself(hang):
    code = "import re, time; from ardtrain.doctor import meeting; meeting.SPARE_SECONDS = 0.3\n"
    code += f"meeting._end_at_last(0.1, ['meeting']); {hang}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1 and ended.stderr


def test_hosts_of_processes_that_did_not_come():
    assert meeting.expected_hosts({"ARDTRAIN_HOSTS": "a,b"}, 4) == {0: "a", 1: "a", 2: "b", 3: "b"}
    slurm = {"SLURM_STEP_NODELIST": "n[1-2],m", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert meeting.expected_hosts(slurm, 5) == {0: "n1", 1: "n1", 2: "n2", 3: "n2", 4: "m"}
    assert meeting.expected_hosts(slurm, 4) == meeting.expected_hosts({}, 2) == {}


def test_errors_name_the_peer():
    text = "Connection closed by peer [10.0.0.2]:4321"
    assert with_names(text, {"10.0.0.2": "node2"}) == "Connection closed by peer [10.0.0.2 (node2)]:4321"
    raw = "[/__w/gloo/pair.cc:537] Read error [10.0.0.2]:61: reset. This is typically caused by a remote worker. GLHF!"
    assert first_words(raw) == "Read error [10.0.0.2]:61: reset."
    assert "one GPU" in remedy_of("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000")


# ---- what the config says ----

CONFIG = """model_name_or_path: {model}
method: {method}
data: {{train_file: {data}}}
output_dir: {out}
max_steps: 3
deepspeed: {{zero_optimization: {{stage: 3, offload_param: {{device: nvme, nvme_path: {out}}}}}}}
"""


@pytest.fixture
def config(tmp_path):
    from tests.tiny import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "run.yaml"
    path.write_text(
        CONFIG.format(model=tmp_path / "model", method="lora", data=tmp_path / "rows.jsonl", out=tmp_path / "run")
    )
    return path


def test_needs_of_a_config(config, tmp_path):
    needs = read_needs(str(config), ["r=4"])
    assert needs.run_dir == tmp_path / "run" == needs.nvme[0]
    assert {path.name for path in needs.files} >= {"rows.jsonl", "model.safetensors", "config.json"}
    assert read_needs(str(config), run_dir=str(tmp_path / "other")).run_dir == tmp_path / "other"
    with pytest.raises(ConfigError, match="nosuch"):
        read_needs(str(config), ["nosuch=1"])


def test_size_of_a_checkpoint(config):
    small = checkpoint_bytes(read_needs(str(config), ["r=4", 'zero_checkpoint="off"']))
    assert checkpoint_bytes(read_needs(str(config), ["r=8", "lora_alpha=16", 'zero_checkpoint="off"'])) == 2 * small
    assert checkpoint_bytes(read_needs(str(config), ["r=4"])) == small // 16 * 28


# ---- hosts by ssh: what is pure of it ----


@pytest.mark.parametrize(
    ("errors", "what"),
    [
        ("Host key verification failed.", "host key is not known"),
        ("root@n: Permission denied (publickey).", "no key that it accepts"),
        ("ssh: connect to host n port 22: Connection refused", "no sshd"),
        ("ssh: connect to host n port 22: Connection timed out", "does not answer"),
        ("ssh: connect to host n port 22: No route to host", "does not answer"),
        ("something new", "ssh ended with 255 (something new)"),
    ],
)
def test_sshs_words_are_told_apart(errors, what):
    told, remedy = hosts.explain_ssh(hosts.Answer(255, "", errors))
    assert what in told and remedy


def test_hosts_of_the_command_line(tmp_path):
    (tmp_path / "hostfile").write_text("a slots=2\n")
    assert hosts.read_hosts(str(tmp_path / "hostfile")) == (Host("a", 2),)
    assert hosts.read_hosts("a,b") == (Host("a", 1), Host("b", 1))
    assert hosts.read_hosts("a") == (Host("a", 1),)
    with pytest.raises(ConfigError, match="cannot be read"):
        hosts.read_hosts("./absent")


def test_commands_for_hosts_are_quoted_and_hold_no_secret():
    environ = {"HF_HOME": "a b;c", "HF_TOKEN": "s3cret", "NCCL_DEBUG": "WARN", "MASTER_PORT": "4242", "LESS": "-R"}
    first, second = hosts.meeting_commands((Host("n1", 1), Host("n2", 1)), ["run it.yaml"], environ)
    for part in ("'HF_HOME=a b;c'", "NCCL_DEBUG=WARN", "MASTER_ADDR=n1", "MASTER_PORT=4242", "'run it.yaml'", "RANK=0"):
        assert part in first
    assert "s3cret" not in first and "LESS" not in first
    assert second == first.replace(" RANK=0 ", " RANK=1 ")


@pytest.mark.parametrize(
    ("answer", "heard", "text"),
    [
        (hosts.Answer(None, "", "hm"), True, "no answer within the time limit (hm)"),
        (hosts.Answer(255, "", "client_loop: send disconnect"), True, "ssh ended with 255 (client_loop"),
        (hosts.Answer(127, "", "bash: python: No such file or directory"), False, "cannot start there"),
        (hosts.Answer(1, "", "Killed"), False, "ended with 1 (Killed)"),
    ],
)
def test_hosts_that_do_not_answer(answer, heard, text):
    (found,) = hosts.judge("n2", answer, of_all=None, was_heard=heard)
    assert (found.level, found.where) == ("fail", "n2") and text in found.what


def test_answers_that_are_told_elsewhere_add_nothing():
    assert not hosts.judge("n2", hosts.Answer(0, "", ""), of_all=None, was_heard=True)
    assert not hosts.judge("n2", hosts.Answer(1, "", ""), of_all=None, was_heard=True), "process 0 told why"
    own = hosts.Answer(1, '{"findings": [{"level": "fail", "where": "n2", "what": "w", "remedy": "r"}]}', "")
    assert hosts.judge("n2", own, of_all=None, was_heard=False) == [Finding("fail", "n2", "w", "r")]


# ---- meetings of processes ----


def start(count, arguments, *, world_size=None, folders=None, seconds=30, before="pass"):
    """(exit codes, reports) of `count` processes; `arguments`: of process i; `before`: code that each runs first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = world_size or count
    shared = os.environ | {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ARDTRAIN_HOSTS": ",".join(f"host{i}" for i in range(size)),
    }  # fmt: skip
    shared.pop("PYTHONPATH", None)
    code = f"{before}\nfrom ardtrain.cli import main\nmain()"
    command = [sys.executable, "-c", code, "doctor", "--meet", "--quick", "--json", f"--seconds={seconds}"]
    running = [
        subprocess.Popen(
            [*command, *arguments(i)],
            env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)},
            cwd=REPOSITORY if folders is None else folders[i],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    lines = [[line for line in output.splitlines() if line.startswith("{")] for output in outputs]
    return [process.returncode for process in running], [json.loads(own[-1]) if own else {} for own in lines]


@pytest.mark.distributed
def test_processes_meet(tmp_path):
    codes, (report, *others) = start(3, lambda i: [f"--run-dir={tmp_path}/run"])
    assert codes == [0, 0, 0], report
    assert report["passed"] and not any(others)
    told = "\n".join(f["what"] for f in report["findings"])
    for part in ("equal versions", f"all see and write {tmp_path}", "all-reduce of 3 processes"):
        assert part in told
    assert [f["process"] for f in report["facts"]] == [0, 1, 2]
    assert not list(tmp_path.iterdir())


@pytest.mark.distributed
def test_a_process_that_never_comes_is_named(tmp_path):
    codes, (report, other) = start(2, lambda i: [f"--run-dir={tmp_path}"], world_size=3, seconds=10)
    assert codes == [1, 1]
    (found,) = [f for f in report["findings"] if f["level"] == "fail"]
    assert found["where"] == "host2" and "process 2 of 3 did not come" in found["what"] and found["remedy"]
    assert not other


@pytest.mark.distributed
def test_a_process_that_hangs_in_the_all_reduce(tmp_path):
    hang = """import os, time
from ardtrain.collectives import World
if os.environ["RANK"] == "1":
    World.all_reduce_bandwidth = lambda self, num_bytes: time.sleep(600)"""
    codes, (report, _) = start(2, lambda i: [f"--run-dir={tmp_path}"], seconds=15, before=hang)
    assert codes == [1, 1]
    told = [f["what"] for f in report["findings"] if f["level"] == "fail"]
    assert len(told) == 2 and all("all-reduce: " in what for what in told)
    assert any("the sum" in what and "no end within" in what for what in told), told


@pytest.mark.distributed
def test_process_0_that_never_comes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    command = [sys.executable, "-m", "ardtrain", "doctor", "--meet", "--seconds=4", f"--run-dir={tmp_path}"]
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    told = " ".join(ended.stdout.split())
    assert f"MASTER_PORT={port} (127.0.0.1): connection refused -> process 0 did not start" in told


@pytest.mark.distributed
def test_other_code_and_another_run_folder(tmp_path):
    """Process 1 runs a changed copy of the package, and its run folder is not process 0's."""
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "ardtrain", copy / "ardtrain", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "ardtrain/ranks.py").open("a").write("# changed\n")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    codes, (report, _) = start(2, lambda i: [f"--run-dir={tmp_path / 'ab'[i]}"], folders=[REPOSITORY, copy])
    assert codes == [1, 1]
    failures = [f for f in report["findings"] if f["level"] == "fail"]
    assert any("the code of ardtrain" in f["what"] and "(process 1)" in f["where"] for f in failures)
    (unseen,) = [f for f in failures if "the run folder is not shared" in f["what"]]
    assert f"it looks in {tmp_path}/b" in unseen["what"]
    assert len(failures) == 2
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


def test_alone_on_the_command_line(config, capsys):
    from ardtrain.cli import main

    assert main(["doctor", str(config), "--json", "r=4"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert any("a checkpoint takes about" in f["what"] for f in report["findings"])
    assert main(["doctor", "--nosuch"]) == 2
    assert main(["doctor", "--help"]) == 0
    assert "--hosts" in capsys.readouterr().out
