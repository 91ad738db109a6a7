"""Starts whole runs one after another, forked from one process that has imported everything: two seconds a start.

python -m tests.launch.starts STARTS.json RESULTS.json

A start: world_size; config and overrides of `train`, or the arguments of another verb; and where it is asked to stop:
stop_after (steps of this start, by the STOP file) or stop_in (the name of a function of the trainer, whose n-th call on
process 0 sends that process a signal).
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path


def main(starts_path, results_path):
    """Runs all starts in order; each result: exit codes, seconds, the ends of the logs."""
    import ardtrain.run  # noqa: F401 - once, before the forks

    folder = Path(tempfile.mkdtemp())
    results = []
    for start in json.loads(Path(starts_path).read_text()):
        begin = time.monotonic()
        codes = run(start, folder)
        logs = "\n".join((folder / f"log-{r}.txt").read_text(errors="replace")[-2500:] for r in range(len(codes)))
        results.append({"codes": codes, "seconds": time.monotonic() - begin, "logs": logs})
        print(
            start.get("arguments", start.get("overrides")),
            start["world_size"],
            codes,
            f"{results[-1]['seconds']:.1f} s",
            flush=True,
        )
    Path(results_path).write_text(json.dumps(results))


def run(start, folder):
    """Exit codes of one start's processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = start["world_size"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)})
            become(start, rank, folder / f"log-{rank}.txt")
        pids.append(pid)
    codes = {}
    end = time.monotonic() + 200
    while len(codes) < size:
        for pid in pids:
            if pid not in codes:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                got, status = os.waitpid(pid, os.WNOHANG)
                if got:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def become(start, rank, log):
    """The forked process: one process of the run. Never returns."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if rank == 0:
            ask_for_a_stop(start)
        from ardtrain.cli import main as ardtrain

        code = ardtrain(start.get("arguments") or ["train", start["config"], *start.get("overrides", [])])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ask_for_a_stop(start):
    """Lets process 0 ask itself."""
    from ardtrain import ablation, evaluation, full, trainer

    calls = 0

    def counting(owner, name, wanted, act):
        honest = getattr(owner, name)

        def counted(*positional, **named):
            nonlocal calls
            calls += 1
            if calls == wanted:
                act()
            return honest(*positional, **named)

        setattr(owner, name, counted)

    if "stop_after" in start:
        stop = Path(json.loads(Path(start["config"]).read_text())["output_dir"]) / "STOP"
        for owner in (trainer.Trainer, full.FullTrainer):
            counting(owner, "train_step", start["stop_after"], stop.touch)
    if "stop_in" in start:
        name, wanted = start["stop_in"]
        owner = {"grain": (trainer.Trainer, "_grain"), "evaluation": (evaluation, "_record_logits"),
                 "ablation": (ablation.AblationScorer, "_losses")}[name]  # fmt: skip
        counting(*owner, wanted, lambda: os.kill(os.getpid(), signal.SIGUSR1))


if __name__ == "__main__":
    main(*sys.argv[1:])
