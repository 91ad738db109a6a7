"""Kills a two-process run at random moments, restarts it each time, and compares the end with an unbroken run.

python -m benchmarks.kill_test [--kills 200] [--processes 2] [--method elalora] [--out FILE]

Each start goes on with resume_from_checkpoint=auto. A kill waits for a phase chosen at random (start, load, step,
resize, save, write, evaluate), then for a random moment in it, and ends one random process or all with SIGKILL; every
fourth start uses another number of processes. The joined loss curve, the rank tables, held-out losses and the final
weights must be equal to the bit to those of a run that nobody touched. `write` is the background thread's part of a
save. Processes are forked from one that has imported everything, so a start costs two seconds instead of ten.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine, parser, write

LAUNCHER_SECONDS = 15  # after a kill what is left is ended, as every launcher does
PHASES = ("start", "load", "step", "resize", "save", "write", "evaluate")
METHODS = {
    "elalora": {"elalora": {"init_warmup": 2, "final_warmup": 4, "mask_interval": 2, "b": 6, "k": 2}},
    "adalora": {"r": 6, "adalora": {"target_r": 4, "tinit": 2, "tfinal": 6, "deltaT": 2}},
    "alora": {"alora": {"k1_steps": 4, "k2_steps": 4, "rounds": 6, "n_a": 4, "val_batch": 8}},
    "ard_lora": {"r": 2, "ard_lora": {"alpha_interval": 2, "resize_interval": 3, "lr_alpha": 0.3}},
    "lora": {},
    "dora": {},
}


def main():
    """Runs the unbroken run, then kills; prints and returns 1 if anything differs."""
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--method", choices=sorted(METHODS), default="elalora")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    result = run(arguments.kills, arguments.processes, arguments.method, arguments.steps, arguments.seed)
    write({"benchmark": "kill_test", "machine": machine()} | result, arguments.out)
    return 0 if result["equal"] else 1


def run(kills, processes, method, steps, seed):
    """Numbers of one test: kills by phase and by who was killed, starts, and whether the end is equal to the bit."""
    folder = Path(tempfile.mkdtemp())
    config = write_files(folder, method, steps)
    start_time = time.monotonic()
    ended = Start(folder, 1, config, "unbroken").wait(600)
    assert ended == [0], f"the unbroken run failed: {ended}\n{log_tail(folder)}"
    wanted, unbroken = fingerprint(folder / "unbroken"), time.monotonic() - start_time
    numbers = random.Random(seed)
    by_phase, victims = dict.fromkeys(PHASES, 0), {"one": 0, "all": 0}
    done = starts = finished = 0
    equal, problems = True, []
    while done < kills:
        finished += 1
        name = f"killed-{finished}"
        while True:
            world_size = processes if starts % 4 else processes + 1
            child = Start(folder, world_size, config, name)
            starts += 1
            phase = kill_at_random(child, numbers, unbroken) if done < kills else None
            codes = child.wait(300 if phase is None else LAUNCHER_SECONDS)
            if phase is None:
                if codes == [0] * world_size:
                    break
                problems.append(f"start {starts} of {name}: exit codes {codes}: {log_tail(folder)[-600:]}")
                equal = False
                break
            done += 1
            by_phase[phase[0]] += 1
            victims[phase[1]] += 1
            print(f"{done} kills: {phase[1]} in {phase[0]}", flush=True)
        if not equal:
            break
        got = fingerprint(folder / name)
        for what in wanted:
            if got[what] != wanted[what]:
                equal = False
                problems.append(f"{name}: {what} differ from the unbroken run's")
    return {
        "method": method, "processes": processes, "steps": steps, "kills": done, "kills_by_phase": by_phase,
        "victims": victims, "starts": starts, "finished_runs": finished, "equal": equal, "problems": problems,
        "seconds": time.monotonic() - start_time,
    }  # fmt: skip


def write_files(folder, method, steps):
    """A tiny model, rows and the config that all starts share."""
    from tests.runs import write_run  # the tests' tiny model and rows

    base = {"elalora": None, "method": method, "max_steps": steps, "save_steps": 3, "save_total_limit": 3}
    settings = base | {"eval_steps": 5, "resume_from_checkpoint": "auto", "check_every": 7} | METHODS[method]
    return write_run(folder, "run", **settings)


class Start:
    """One start of the run: forked processes and the files in which they say what they are doing."""

    def __init__(self, folder, world_size, config, name):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.pids = folder, []
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        for rank in range(world_size):
            phase = folder / f"phase-{rank}"
            phase.write_text("start")
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
            pid = os.fork()
            if pid == 0:
                child(shared | own, folder / f"log-{rank}.txt", phase, config, folder / name)
            self.pids.append(pid)
        self.codes = {}

    def phase(self):
        """What process 0 is doing."""
        return (self.folder / "phase-0").read_text()

    def alive(self):
        """Collects ended processes; the pids of the others."""
        for pid in self.pids:
            if pid not in self.codes:
                got, status = os.waitpid(pid, os.WNOHANG)
                if got:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, seconds):
        """Exit codes; what still runs after `seconds` is killed."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(0.01)
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return [self.codes[pid] for pid in self.pids]


def kill_at_random(start, numbers, unbroken):
    """(phase, one or all) of the kill, or None if the run ended before its phase came.

    It waits for its phase a random part of two unbroken runs, whatever the machine's load makes of their seconds.
    """
    wanted, patience = numbers.choice(PHASES), time.monotonic() + numbers.uniform(0.1, 2.0) * unbroken
    while start.alive():
        if start.phase() == wanted or time.monotonic() > patience:
            time.sleep(numbers.choice((0.0, 0.0005, 0.002, 0.01, 0.05)) * numbers.random())
            phase, alive = start.phase(), start.alive()
            if not alive:
                return None
            everyone = numbers.random() < 0.5
            for pid in alive if everyone else [numbers.choice(alive)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return phase, "all" if everyone else "one"
        time.sleep(0.0005)
    return None


def child(environment, log, phase, config, run_dir):
    """The forked process: becomes one process of the run and never returns."""
    code = 1
    try:
        os.environ.update(environment)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        tell_phases(phase)
        from ardtrain.cli import main as ardtrain

        code = ardtrain(["train", str(config), f"output_dir={run_dir}"])
    finally:
        sys.stdout.flush()
        os._exit(code)


def tell_phases(path):
    """Lets the run's own functions say in a file what they are doing."""
    from ardtrain import checkpoint
    from ardtrain.adapter_run import AdapterRun
    from ardtrain.resize import LiveArena
    from ardtrain.trainer import Trainer

    descriptor = os.open(path, os.O_WRONLY)

    def say(name):
        os.pwrite(descriptor, name.encode(), 0)
        os.ftruncate(descriptor, len(name))

    def tells(owner, function, name, after=None):
        honest = getattr(owner, function)

        def telling(*positional, **named):
            say(name)
            try:
                return honest(*positional, **named)
            finally:
                say(after or "step")

        setattr(owner, function, telling)

    tells(AdapterRun, "_find_checkpoint", "load", "start")
    tells(Trainer, "_sum_of_grains", "step")
    tells(LiveArena, "apply", "resize")
    tells(Trainer, "evaluate", "evaluate")
    tells(AdapterRun, "save", "save")
    tells(checkpoint.Writer, "_save", "write")


def fingerprint(run_dir):
    """Losses, held-out losses, rank tables, best loss and the adapter's bytes."""
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run_dir / "ranks.jsonl").read_text().splitlines()]
    adapter = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "losses": [(m["step"], m["loss"]) for m in metrics if "loss" in m],
        "held-out losses": [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m],
        "rank tables": [(e["step"], e["digest"]) for e in events],
        "weights": hashlib.sha256(adapter).hexdigest(),
    }


def log_tail(folder):
    """The ends of the processes' logs."""
    return "\n".join(f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in sorted(folder.glob("log-*.txt")))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    torch.set_num_threads(1)
    import ardtrain.run  # noqa: F401 - once, before the forks

    sys.exit(main())
