"""Start of a run on two hosts, split by cause: hosts made of namespaces on this machine, one process each, by srun.

python -m benchmarks.startup [--repeats 5] [--out FILE]     (root, Linux; packages as for tests/launch)

`launch`: from the command to the birth of process 0. The rest is what the run says of itself (`startup_seconds` in
metrics.jsonl): imports of Python, torch, transformers and DeepSpeed; meeting; rows; base; adapters; the first step, in
which kernels and libraries start. Two hosts share this machine's cores, so imports of both wait for each other.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine, parser, summary, write
from tests.launch.cluster import Cluster
from tests.launch.conftest import ENVIRONMENT
from tests.runs import lines, write_run


def started(cluster, folder, name):
    """Seconds by cause of one start of two processes under ZeRO-3 with offload."""
    config = write_run(folder, name, max_steps=14, eval_steps=None, deepspeed="zero3_offload_param")
    begin = time.time()
    command = ["srun", "-N2", "--ntasks-per-node=1", sys.executable, "-m", "ardtrain", "train", str(config)]
    done = cluster.run("node1", command, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    seconds = next(
        line["startup_seconds"] for line in lines(folder / name / "metrics.jsonl") if "startup_seconds" in line
    )
    at_first_step = first_step_at(folder / name)
    return {"launch": max(0.0, at_first_step - begin - sum(seconds.values()))} | seconds


def first_step_at(run):
    """When process 0 logged its start, as seconds since the epoch."""
    line = next(
        x for x in (run / "logs" / "process-0000.log").read_text().splitlines() if " INFO ardtrain: start " in x
    )
    stamp, milliseconds = line[:23].split(",")
    return time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) + int(milliseconds) / 1000


def main():
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    folder = Path(tempfile.mkdtemp())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with Cluster(folder / "c", hosts=2, slurm=True, env=ENVIRONMENT) as cluster:
        runs = [started(cluster, folder, f"run-{i}") for i in range(arguments.repeats + 1)][
            1:
        ]  # the first fills caches
    causes = {name: summary([run[name] for run in runs]) for name in runs[0]}
    result = {"benchmark": "startup", "machine": machine(), "processes": 2, "hosts": 2, "seconds": causes,
              "total_seconds": summary([sum(run.values()) for run in runs])}  # fmt: skip
    write(json.loads(json.dumps(result)), arguments.out)


if __name__ == "__main__":
    main()
