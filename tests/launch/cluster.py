#!/usr/bin/env python3
"""A small cluster on one Linux machine, for tests of multi-node launchers.

Every host is a set of namespaces (network, hostname, mounts, processes, IPC) with its
own address, its own sshd and, on request, its own munged and slurmd.  The hosts are
wired to a switch that is itself a network namespace, so nothing is added to the
machine's own network, no file of the machine is changed, and no host reaches anything
but the other hosts.  A host ends when its recorded init process is ended; with it go
all processes, mounts and links of that host.

Needs root, Python 3.8 or newer and the Debian packages iproute2, util-linux,
openssh-server and openssh-client; for Slurm also munge, slurmctld, slurmd and
slurm-client.  Only the standard library is used.

As a command:  cluster.py up DIR --hosts 2 --slurm; cluster.py exec DIR node1 -- hostname
               cluster.py down DIR
From Python:   with Cluster(path, hosts=2) as c: c.run("node1", ["hostname"])
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

MARKER = ".cluster-bench"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ClusterError(RuntimeError):
    pass


# --------------------------------------------------------------------------- processes
def start_time(pid):
    """Clock ticks at which a process started, None once it has ended (a zombie has ended).
    With the pid it names one process for good."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return [int(p) for p in f.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def same_process(record):
    return record is not None and start_time(record["pid"]) == record["start"] is not None


def end_process(record, sig=signal.SIGKILL, wait=10.0):
    """Signal exactly the recorded process and wait for its end."""
    if same_process(record):
        with contextlib.suppress(ProcessLookupError):
            os.kill(record["pid"], sig)
        wait_for(f"end of process {record['pid']}", lambda: not same_process(record), wait, 0.02)


def wait_for(what, test, timeout=20.0, step=0.05):
    deadline = time.monotonic() + timeout
    while True:
        value = test()
        if value:
            return value
        if time.monotonic() > deadline:
            raise ClusterError(f"timed out after {timeout:.0f} s: {what}")
        time.sleep(step)


def sh(args, **kw):
    done = subprocess.run(
        args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL, **kw
    )
    if done.returncode:
        raise ClusterError(f"{shlex.join(args)} -> {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def need(*tools):
    path = os.environ.get("PATH", "") + ":" + DEFAULT_PATH
    missing = [t for t in tools if not shutil.which(t, path=path)]
    if missing:
        raise ClusterError("not installed: " + ", ".join(missing))


def write(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, mode)
    return path


# --------------------------------------------------------------------------- in a host
# Process 1 of a host, and the process that keeps the switch's namespace.  It ends, and the
# host with it, when its cluster's directory goes, or, if tied, when the cluster's owner does.
INIT = r"""
import ctypes, json, os, subprocess, sys, threading, time
spec = json.load(open(sys.argv[1]))
libc = ctypes.CDLL(None, use_errno=True)
MS_BIND, MS_REC, MS_MOVE = 4096, 16384, 8192
def mount(src, dst, kind=None, flags=0, data=None):
    enc = lambda s: None if s is None else s.encode()
    if libc.mount(enc(src), enc(dst), enc(kind), ctypes.c_ulong(flags), enc(data)):
        e = ctypes.get_errno(); raise OSError(e, os.strerror(e), f"{src} on {dst}")
if spec["kind"] == "host":
    name = spec["name"]
    if libc.sethostname(name.encode(), len(name)):
        raise OSError("sethostname")
    # sysfs shows the interfaces of the namespace it is mounted from; keep the cgroup mounts
    if os.path.ismount("/sys/fs/cgroup"):
        os.makedirs(spec["keep"], exist_ok=True)
        mount("/sys/fs/cgroup", spec["keep"], None, MS_BIND | MS_REC)
        mount("sysfs", "/sys", "sysfs")
        mount(spec["keep"], "/sys/fs/cgroup", None, MS_MOVE)
    else:
        mount("sysfs", "/sys", "sysfs")
    mount("tmpfs", "/run", "tmpfs", 0, "mode=755,size=64m")
    mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777,size=2g")
    for d in ("/run/sshd", "/run/munge", "/run/lock", "/run/slurmd"):
        os.makedirs(d, mode=0o755, exist_ok=True)
    for src, dst in spec["binds"]:
        mount(src, dst, None, MS_BIND)
subprocess.check_call(["ip", "link", "set", "lo", "up"])
print("ready", flush=True)
os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
def owner():
    while os.read(0, 1): pass
    os._exit(0)
def directory():
    while os.path.exists(spec["marker"]): time.sleep(2)
    os._exit(0)
threading.Thread(target=directory, daemon=True).start()
if spec["tied"]:
    threading.Thread(target=owner, daemon=True).start()
while True:   # reap what is handed to process 1
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.2)
"""

# DeepSpeed's pdsh launcher cleans up with `pkill -f PATTERN` on every host.  In a host this
# stands in for pkill: it notes the call, and ends, pid by pid, what matches among the host's
# own processes (a host has its own process namespace, so it can see no others).
PKILL = r"""#!%(python)s -I
import os, re, signal, sys
args, full, sig = [], False, signal.SIGTERM
for a in sys.argv[1:]:
    if a == "-f": full = True
    elif a.startswith("-") and a[1:].isdigit(): sig = int(a[1:])
    elif a.startswith("-"): sys.exit("pkill stand-in: unknown option " + a)
    else: args.append(a)
hits = []
for p in filter(str.isdigit, os.listdir("/proc")):
    if int(p) in (1, os.getpid()): continue
    try:
        line = open("/proc/%%s/cmdline" %% p, "rb").read().replace(b"\0", b" ").decode(errors="replace").strip()
        name = open("/proc/%%s/comm" %% p).read().strip()
    except OSError: continue
    if line and re.search(args[0], line if full else name): hits.append((int(p), line))
with open("%(log)s", "a") as f:
    print(os.uname().nodename, sys.argv[1:], hits, file=f)
for p, line in hits:
    try: os.kill(p, sig)
    except ProcessLookupError: pass
sys.exit(0 if hits else 1)
"""


class Running:
    """A command running in a host; `pid` is the real process, seen from outside."""

    def __init__(self, popen, host):
        self.popen, self.host = popen, host
        self._record = None

    @property
    def pid(self):
        if self._record is None:

            def child():
                if self.popen.poll() is not None:
                    raise ClusterError(f"command on {self.host} ended with {self.popen.returncode}")
                return children(self.popen.pid)

            pid = wait_for(f"command on {self.host}", child, 10)[0]
            self._record = {"pid": pid, "start": start_time(pid)}
        return self._record["pid"]

    def send_signal(self, sig):
        assert self.pid
        if same_process(self._record):
            os.kill(self._record["pid"], sig)

    def tree(self):
        """[(pid, command line)] of the command and all below it, as the machine sees them."""
        out, todo = [], [self.pid]
        while todo:
            pid = todo.pop(0)
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as f:
                out.append((pid, f.read().replace(b"\0", b" ").decode(errors="replace").strip()))
            todo += children(pid)
        return out

    def wait(self, timeout=None):
        return self.popen.wait(timeout)

    def poll(self):
        return self.popen.poll()

    def kill(self):
        with contextlib.suppress(ClusterError):
            assert self.pid
            end_process(self._record)
        self.popen.wait(10)


# ----------------------------------------------------------------------------- cluster
class Cluster:
    def __init__(
        self,
        path,
        hosts=2,
        prefix="node",
        subnet="10.213.7",
        slurm=False,
        sshd=True,
        decoy=False,
        cpus=4,
        gpus=0,
        slurm_conf="",
        tied=True,
        env=None,
    ):
        self.path = os.path.abspath(path)
        self.state_file = os.path.join(self.path, "state.json")
        self.options = {
            "hosts": hosts,
            "prefix": prefix,
            "subnet": subnet,
            "slurm": slurm,
            "sshd": sshd,
            "decoy": decoy,
            "cpus": cpus,
            "gpus": gpus,
            "slurm_conf": slurm_conf,
        }
        self.tied = tied
        self.extra_env = dict(env or {})
        self.state = {"hosts": {}, "switch": None, "options": self.options}
        self._pipes = []

    # -- life
    @classmethod
    def attach(cls, path):
        c = cls(path)
        try:
            with open(c.state_file) as f:
                c.state = json.load(f)
        except FileNotFoundError:
            raise ClusterError(f"no cluster at {path}") from None
        c.options = c.state["options"]
        return c

    def __enter__(self):
        return self.up()

    def __exit__(self, *exc):
        self.down()

    @property
    def names(self):
        return [f"{self.options['prefix']}{i + 1}" for i in range(self.options["hosts"])]

    def address(self, name):
        return f"{self.options['subnet']}.{11 + self.names.index(name)}"

    def hostfile(self, slots=1, hosts=None):
        """A DeepSpeed / OpenMPI hostfile; returns its path."""
        hosts = hosts or self.names
        return write(
            os.path.join(self.path, "etc", f"hostfile-{len(hosts)}x{slots}"),
            "".join(f"{h} slots={slots}\n" for h in hosts),
        )

    def up(self):
        if os.geteuid():
            raise ClusterError("must be root")
        need("ip", "unshare", "nsenter")
        if self.options["sshd"]:
            need("sshd", "ssh", "ssh-keygen")
        if self.options["slurm"]:
            need("munged", "slurmctld", "slurmd", "srun", "sbatch")
        if os.path.exists(self.path):
            if not os.path.exists(os.path.join(self.path, MARKER)) and os.listdir(self.path):
                raise ClusterError(f"{self.path} exists and is not a cluster's directory")
            Cluster(self.path).down()
        os.makedirs(self.path, mode=0o755)
        write(os.path.join(self.path, MARKER), "made by cluster.py\n")
        try:
            self._write_files()
            self._save()
            self._start_switch()
            for name in self.names:
                self.boot(name)
            if self.options["slurm"]:
                self._wait_slurm()
        except BaseException:
            with contextlib.suppress(Exception):
                keep = os.path.join(self.path, "logs")
                for log in sorted(os.listdir(keep)):
                    with open(os.path.join(keep, log), errors="replace") as f:
                        tail = f.read().splitlines()[-5:]
                    print(f"--- {log}", *tail, sep="\n", file=sys.stderr)
            self.down()
            raise
        return self

    def down(self):
        """End every recorded process and remove the directory.  Does nothing the second time."""
        if os.path.exists(self.state_file):
            with open(self.state_file) as f:
                self.state = json.load(f)
        for record in list(self.state["hosts"].values()) + [self.state["switch"]]:
            if record:
                end_process(record["init"])
                end_process(record["outer"])
        for p in self._pipes:
            with contextlib.suppress(OSError):
                p.stdin.close()
            p.wait()
        self._pipes = []
        self.state["hosts"], self.state["switch"] = {}, None
        if os.path.exists(os.path.join(self.path, MARKER)):
            shutil.rmtree(self.path)

    def _save(self):
        tmp = self.state_file + ".new"
        with open(tmp, "w") as f:
            json.dump(self.state, f, indent=1)
        os.replace(tmp, self.state_file)

    # -- files
    def _p(self, *parts):
        return os.path.join(self.path, *parts)

    def _write_files(self):
        o = self.options
        for d in ("etc", "logs", "home", "hosts"):
            os.makedirs(self._p(d), mode=0o755, exist_ok=True)
        os.makedirs(self._p("home", ".ssh"), mode=0o700, exist_ok=True)
        # root's home becomes the cluster's own, shared by all hosts, as on a real cluster
        with open("/etc/passwd") as f:
            lines = f.read().splitlines()
        lines = [f"root:x:0:0:root:{self._p('home')}:/bin/bash" if x.startswith("root:") else x for x in lines]
        write(self._p("etc", "passwd"), "\n".join(lines) + "\n")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{self.address(n)} {n}\n" for n in self.names)
        for n in self.names:
            write(self._p("hosts", n, "etc-hosts"), hosts)
            write(self._p("hosts", n, "hostname"), n + "\n")
            os.makedirs(self._p("hosts", n, "local"), exist_ok=True)
        write(self._p("etc", "init.py"), INIT)
        write(self._p("etc", "pkill"), PKILL % {"python": sys.executable, "log": self._p("logs", "pkill.log")}, 0o755)
        write(self._p("etc", "hostfile"), "".join(f"{n} slots=1\n" for n in self.names))
        if o["sshd"]:
            for key in ("host_key", "user_key"):
                sh(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cluster-bench", "-f", self._p("etc", key)])
            with open(self._p("etc", "user_key.pub")) as f:
                write(self._p("etc", "authorized_keys"), f.read(), 0o600)
            with open(self._p("etc", "host_key.pub")) as f:
                pub = f.read()
            write(self._p("etc", "known_hosts"), "".join(f"{n},{self.address(n)} {pub}" for n in self.names))
            write(
                self._p("etc", "ssh_config"),
                "\n".join(
                    [
                        "Host *",
                        "  BatchMode yes",
                        "  StrictHostKeyChecking yes",
                        "  LogLevel ERROR",
                        f"  UserKnownHostsFile {self._p('etc', 'known_hosts')}",
                        f"  IdentityFile {self._p('etc', 'user_key')}",
                        "  IdentitiesOnly yes",
                        "  ConnectTimeout 5",
                        "  ServerAliveInterval 5",
                        "  ServerAliveCountMax 3",
                        "",
                    ]
                ),
            )
            sftp = "/usr/lib/openssh/sftp-server"
            write(
                self._p("etc", "sshd_config"),
                "\n".join(
                    [
                        "Port 22",
                        "ListenAddress 0.0.0.0",
                        f"HostKey {self._p('etc', 'host_key')}",
                        f"AuthorizedKeysFile {self._p('etc', 'authorized_keys')}",
                        "StrictModes no",
                        "PermitRootLogin prohibit-password",
                        "PasswordAuthentication no",
                        "KbdInteractiveAuthentication no",
                        "UsePAM no",
                        "UseDNS no",
                        "PrintMotd no",
                        "MaxStartups 100:30:200",
                        "MaxSessions 100",
                        "PidFile /run/sshd.pid",
                        f"Subsystem sftp {sftp}",
                        "",
                    ]
                ),
            )
        if o["slurm"]:
            self._write_slurm()

    def _write_slurm(self):
        o = self.options
        os.makedirs(self._p("slurm", "state"), mode=0o755, exist_ok=True)
        key = write(self._p("slurm", "munge.key"), "", 0o600)
        with open(key, "wb") as f:
            f.write(os.urandom(128))
        head = self.names[0]
        gres = f" Gres=gpu:{o['gpus']}" if o["gpus"] else ""
        nodes = "\n".join(
            f"NodeName={n} NodeAddr={self.address(n)} CPUs={o['cpus']} RealMemory=4096{gres} State=UNKNOWN"
            for n in self.names
        )
        write(
            self._p("slurm", "etc", "slurm.conf"),
            f"""\
# short timers everywhere: this is for tests
ClusterName=bench
SlurmctldHost={head}({self.address(head)})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits this long before it may start again (the default is 120 s)
AuthInfo=cred_expire=5
StateSaveLocation={self._p("slurm", "state")}
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={self._p("logs", "slurmctld.log")}
SlurmdLogFile={self._p("logs", "slurmd-%n.log")}
TmpFS=/mnt
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={self._p("logs", "jobcomp.txt")}
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
InactiveLimit=0
KillWait=5
MinJobAge=3600
OverTimeLimit=0
JobRequeue=1
JobSubmitPlugins=pbs
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
RebootProgram=/bin/true
{"GresTypes=gpu" if o["gpus"] else ""}
{nodes}
PartitionName=DEFAULT Nodes={",".join(self.names)} MaxTime=60 DefaultTime=10 OverSubscribe=EXCLUSIVE State=UP
PartitionName=batch Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=urgent Default=NO PriorityTier=100 PreemptMode=OFF GraceTime=0
{o["slurm_conf"]}
""",
        )
        write(self._p("slurm", "etc", "cgroup.conf"), "CgroupPlugin=autodetect\n")
        # PBS_* variables and PBS options in jobs, for scripts written for PBS (and `qsub`)
        write(self._p("slurm", "etc", "plugstack.conf"), "optional spank_pbs.so\n")
        if o["gpus"]:
            # stand-ins: any character device does, as nothing constrains access to them
            write(
                self._p("slurm", "etc", "gres.conf"),
                "".join(
                    f"Name=gpu File=/dev/{dev}\n"
                    for dev in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "fuse")[: o["gpus"]]
                ),
            )

    # -- switch and hosts
    def _spawn(self, name, namespaces, spec):
        """Start an init in new namespaces; returns its record once it is ready."""
        spec = dict(spec, tied=self.tied, marker=os.path.join(self.path, MARKER))
        spec_file = write(self._p("hosts", name, "init.json"), json.dumps(spec))
        with open(self._p("logs", f"init-{name}.log"), "a") as log:
            p = subprocess.Popen(
                ["unshare"]
                + namespaces
                + ["--fork", "--kill-child", sys.executable, "-I", self._p("etc", "init.py"), spec_file],
                stdin=subprocess.PIPE if self.tied else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                cwd="/",
                env={"PATH": DEFAULT_PATH},
            )
        ready = p.stdout.readline().strip() == b"ready"
        p.stdout.close()
        if not ready:
            p.wait()
            with open(self._p("logs", f"init-{name}.log")) as f:
                raise ClusterError(f"{name} did not start: {f.read()[-2000:]}")
        if self.tied:
            self._pipes.append(p)
        init = children(p.pid)[0]
        return {"outer": {"pid": p.pid, "start": start_time(p.pid)}, "init": {"pid": init, "start": start_time(init)}}

    def _start_switch(self):
        self.state["switch"] = self._spawn("switch", ["--net"], {"kind": "switch"})
        self._save()
        for cmd in ("ip link add sw0 type bridge forward_delay 0", "ip link set sw0 up"):
            self._in_switch(cmd.split())

    def _in_switch(self, cmd):
        return sh(["nsenter", "-t", str(self.state["switch"]["init"]["pid"]), "-n"] + cmd)

    def boot(self, name):
        """Start a host (or start it again after `poweroff`)."""
        if same_process(self.state["hosts"].get(name, {}).get("init")):
            raise ClusterError(f"{name} is up")
        o = self.options
        binds = [
            [self._p("hosts", name, "etc-hosts"), "/etc/hosts"],
            [self._p("hosts", name, "hostname"), "/etc/hostname"],
            [self._p("etc", "passwd"), "/etc/passwd"],
            [self._p("hosts", name, "local"), "/mnt"],
        ]
        if o["sshd"]:
            binds.append([self._p("etc", "ssh_config"), "/etc/ssh/ssh_config"])
        if os.path.exists("/usr/bin/pkill"):
            binds.append([self._p("etc", "pkill"), "/usr/bin/pkill"])
        if o["slurm"]:
            binds.append([self._p("slurm", "etc"), "/etc/slurm"])
        self.state["hosts"][name] = self._spawn(
            name,
            ["--net", "--uts", "--mount", "--pid", "--ipc", "--mount-proc"],
            {"kind": "host", "name": name, "binds": binds, "keep": self._p("hosts", name, "cg")},
        )
        self._save()
        pid = str(self.state["hosts"][name]["init"]["pid"])
        port = "p-" + name
        if o["decoy"]:  # an address that is the same on every host, listed first, as docker0 often is
            self.run(name, ["ip", "link", "add", "docker0", "type", "bridge"], check=True)
            self.run(name, ["ip", "addr", "add", "172.17.0.1/16", "dev", "docker0"], check=True)
            self.run(name, ["ip", "link", "set", "docker0", "up"], check=True)
        if port in self._in_switch(["ip", "-br", "link"]):  # of a host that has gone
            self._in_switch(["ip", "link", "del", port])
        self._in_switch(["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pid])
        self._in_switch(["ip", "link", "set", port, "master", "sw0", "up"])
        self.run(name, ["ip", "addr", "add", self.address(name) + "/24", "dev", "eth0"], check=True)
        self.run(name, ["ip", "link", "set", "eth0", "up"], check=True)
        if o["sshd"]:
            sshd = shutil.which("sshd", path=DEFAULT_PATH)
            self.run(
                name, [sshd, "-f", self._p("etc", "sshd_config"), "-E", self._p("logs", f"sshd-{name}.log")], check=True
            )
            wait_for(f"sshd on {name}", lambda: self.run(name, ["test", "-s", "/run/sshd.pid"]).returncode == 0)
        if o["slurm"]:
            self._start_slurm(name)

    def _start_slurm(self, name):
        os.makedirs(self._p("hosts", name, "munge"), mode=0o700, exist_ok=True)
        m = self._p("hosts", name, "munge")
        self.run(
            name,
            [
                "munged",
                "--force",
                f"--key-file={self._p('slurm', 'munge.key')}",
                f"--log-file={m}/munged.log",
                f"--pid-file={m}/munged.pid",
                f"--seed-file={m}/munged.seed",
                "--num-threads=2",
            ],
            check=True,
        )
        if name == self.names[0]:
            self.run(name, ["slurmctld"], check=True)
            wait_for("slurmctld", lambda: self.run(name, ["scontrol", "ping"]).returncode == 0)
        os.makedirs(self._p("logs"), exist_ok=True)
        self.run(name, ["slurmd", "-N", name], check=True)

    def _wait_slurm(self):
        def idle():
            out = self.run(self.names[0], ["sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t"]).stdout
            states = dict(line.split() for line in out.splitlines() if len(line.split()) == 2)
            return all(states.get(n) == "idle" for n in self.names)

        wait_for("all Slurm nodes idle", idle, 30, 0.2)

    def poweroff(self, name):
        """The host vanishes: first its cable, then everything on it; no connection is closed."""
        self.link(name, "cut")
        record = self.state["hosts"][name]
        end_process(record["init"])
        end_process(record["outer"])

    def link(self, name, what):
        """down: the host's own interface goes down (it sees that at once);
        cut: the switch drops the host's traffic silently, the interface stays up;
        up: undo both."""
        port = "p-" + name
        if what == "down":
            self.run(name, ["ip", "link", "set", "eth0", "down"], check=True)
        elif what == "cut":
            self._in_switch(["ip", "link", "set", port, "nomaster"])
        elif what == "up":
            self._in_switch(["ip", "link", "set", port, "master", "sw0", "up"])
            self.run(name, ["ip", "link", "set", "eth0", "up"], check=True)
        else:
            raise ClusterError(f"link {what}?")

    # -- commands in a host
    def _enter(self, name, cmd, cwd, env):
        record = self.state["hosts"].get(name)
        if not record or not same_process(record["init"]):
            raise ClusterError(f"{name} is not up")
        full = {
            "PATH": DEFAULT_PATH,
            "HOME": self._p("home"),
            "USER": "root",
            "LOGNAME": "root",
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
        }
        full.update(self.extra_env)
        full.update(env or {})
        pid = record["init"]["pid"]
        ns = [
            f"--{n}=/proc/{pid}/ns/{k}"
            for n, k in (("net", "net"), ("uts", "uts"), ("mount", "mnt"), ("pid", "pid"), ("ipc", "ipc"))
        ]
        return (
            ["nsenter"]
            + ns
            + [f"--wdns={os.path.abspath(cwd) if cwd else self._p('home')}", "--", "env", "-i"]
            + [f"{k}={v}" for k, v in full.items()]
            + list(cmd)
        )

    def popen(self, name, cmd, cwd=None, env=None, **kw):
        kw.setdefault("stdin", subprocess.DEVNULL)
        return Running(subprocess.Popen(self._enter(name, cmd, cwd, env), start_new_session=True, **kw), name)

    def run(self, name, cmd, cwd=None, env=None, check=False, timeout=120, **kw):
        """Like subprocess.run in a host; stdout and stderr together, as text."""
        kw.setdefault("stdin", subprocess.DEVNULL)
        kw.setdefault("stdout", subprocess.PIPE)
        kw.setdefault("stderr", subprocess.STDOUT)
        running = Running(
            subprocess.Popen(self._enter(name, cmd, cwd, env), text=True, start_new_session=True, **kw), name
        )
        try:
            out, _ = running.popen.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            running.kill()
            out, _ = running.popen.communicate()
            raise ClusterError(f"{shlex.join(cmd)} on {name}: over {timeout} s: {out}") from None
        done = subprocess.CompletedProcess(list(cmd), running.popen.returncode, out)
        if check and done.returncode:
            raise ClusterError(f"{shlex.join(cmd)} on {name} -> {done.returncode}: {(out or '').strip()}")
        return done

    def processes(self, name):
        """[(pid, command line)] of a host, without its init; pids as the machine sees them."""
        init = self.state["hosts"][name]["init"]["pid"]
        want = os.readlink(f"/proc/{init}/ns/pid")
        out = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != init:
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{entry}/ns/pid") == want:
                        with open(f"/proc/{entry}/cmdline", "rb") as f:
                            line = f.read().replace(b"\0", b" ").decode(errors="replace").strip()
                        if line:
                            out.append((int(entry), line))
        return sorted(out)


# --------------------------------------------------------------------------------- cli
def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    sub = ap.add_subparsers(dest="cmd", required=True)
    p = sub.add_parser("up", help="start a cluster")
    p.add_argument("dir")
    p.add_argument("--hosts", type=int, default=2)
    p.add_argument("--slurm", action="store_true", help="munge, slurmctld and slurmd")
    p.add_argument("--no-sshd", action="store_true")
    p.add_argument("--decoy", action="store_true", help="a docker0 with one address on all hosts")
    p.add_argument("--cpus", type=int, default=4, help="CPUs that Slurm believes a host has")
    p.add_argument("--gpus", type=int, default=0, help="stand-in GPUs that Slurm believes a host has")
    p.add_argument("--slurm-conf", action="append", default=[], metavar="LINE", help="add to slurm.conf")
    p.add_argument("--subnet", default="10.213.7")
    p = sub.add_parser("down", help="end it and remove its directory")
    p.add_argument("dir")
    p = sub.add_parser("status")
    p.add_argument("dir")
    p = sub.add_parser("exec", help="run a command in a host")
    p.add_argument("dir")
    p.add_argument("host")
    p.add_argument("--cwd")
    p.add_argument("--env", action="append", default=[], metavar="K=V")
    p.add_argument("argv", nargs=argparse.REMAINDER)
    p = sub.add_parser("link")
    p.add_argument("dir")
    p.add_argument("host")
    p.add_argument("what", choices=["down", "cut", "up"])
    for name in ("poweroff", "boot"):
        p = sub.add_parser(name)
        p.add_argument("dir")
        p.add_argument("host")
    a = ap.parse_args(argv)
    try:
        if a.cmd == "up":
            c = Cluster(
                a.dir,
                a.hosts,
                subnet=a.subnet,
                slurm=a.slurm,
                sshd=not a.no_sshd,
                decoy=a.decoy,
                cpus=a.cpus,
                gpus=a.gpus,
                slurm_conf="\n".join(a.slurm_conf),
                tied=False,
            ).up()
            for n in c.names:
                print(n, c.address(n))
        elif a.cmd == "down":
            Cluster(a.dir).down()
        elif a.cmd == "status":
            c = Cluster.attach(a.dir)
            for n in c.names:
                up = same_process(c.state["hosts"].get(n, {}).get("init"))
                print(n, c.address(n), "up" if up else "down")
                for pid, line in c.processes(n) if up else []:
                    print("   ", pid, line[:110])
        elif a.cmd == "exec":
            c = Cluster.attach(a.dir)
            argv = a.argv[1:] if a.argv[:1] == ["--"] else a.argv
            r = c.popen(a.host, argv or ["/bin/bash"], a.cwd, dict(e.split("=", 1) for e in a.env), stdin=None)
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(s, lambda num, frame: r.send_signal(num))
            code = r.wait()
            return code if code >= 0 else 128 - code
        elif a.cmd == "link":
            Cluster.attach(a.dir).link(a.host, a.what)
        else:
            c = Cluster.attach(a.dir)
            c.tied = False
            getattr(c, a.cmd)(a.host)
    except ClusterError as e:
        print(f"cluster: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
