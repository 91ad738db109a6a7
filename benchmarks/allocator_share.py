"""The allocator's and the resizes' share of an ElaLoRA run's time at the published cadence (an event every 50 steps).

python -m benchmarks.allocator_share --data DIR [--steps 220] [--out FILE]

RTE's settings (b 4, k 2, D 50; methods.md 2.6) on e2e_nlg with stories260k_llama, one process. The shares are the
run's own, from metrics.jsonl: everything from the scores' averages to the rebuilt engine counts as allocator.
"""

import tempfile
from pathlib import Path

from benchmarks.common import machine, parser, summary, write
from benchmarks.compare import config, held_out_files, one

REPEATS = 5


def main():
    """Runs and prints."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--steps", type=int, default=220)
    arguments = options.parse_args()
    folder = Path(tempfile.mkdtemp())
    held_out_files(arguments.data, folder)
    path, _ = config(arguments.data, folder, arguments.steps, 4)
    block = {"init_warmup": 10, "final_warmup": 10, "mask_interval": 50, "b": 4, "k": 2}
    runs = [one(path, folder, block, "elalora", "1e-2", seed, "tune") for seed in range(REPEATS)]
    result = {
        "benchmark": "allocator_share", "machine": machine(), "steps": arguments.steps, "elalora": block,
        "allocator_fraction": summary([run["allocator_fraction"] for run in runs]),
        "seconds": summary([run["seconds"] for run in runs]),
    }  # fmt: skip
    write(result, arguments.out)


if __name__ == "__main__":
    main()
