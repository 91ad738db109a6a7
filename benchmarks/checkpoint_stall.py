"""How long a save holds the training loop up, and what the loop feels of the writer in the background.

python -m benchmarks.checkpoint_stall [--shape 60m] [--r 507] [--saves 5] [--folder DIR] [--out FILE]

ElaLoRA on all linear layers of a random Llama, frozen in fp32; no event falls into the measurement. r is far beyond
use, so that about 60 million numbers train over a base whose step is short: with a base to which so many belong, a step
takes longer, and the same save holds it up by a smaller part. `stall`: one call of the run's own `save`. `capture`: the
copy to the host alone. `digests`: what several processes compare besides; one process does not. `gap`: the longest
step while the writer works. `standing`: from a save's begin until its checkpoint stands.
"""

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from ardtrain import checkpoint
from ardtrain.adapter_run import AdapterRun
from ardtrain.checkpoint import Identity
from ardtrain.trainer import tensor_digest
from benchmarks.common import SHAPES, described, join_world, machine, parser, random_llama, summary, timed, write
from tests.tiny import TokenBatches, elalora, tiny_trainer


class Saves(AdapterRun):
    """What `AdapterRun.save` needs of a run, around a trainer that has none; no DeepSpeed checkpoint beside it."""

    def __init__(self, trainer, run_dir):
        world = trainer.world
        self.trainer, self.arena, self.method, self.world = trainer, trainer.arena, trainer.method, world
        self.config = SimpleNamespace(
            zero_checkpoint="none", model_name_or_path="random", revision=None, lora_dropout=0.0
        )
        self.prepared = SimpleNamespace(shape=SimpleNamespace(labels=(), heads={}))
        self.watchdog, self.best_step = SimpleNamespace(touch=lambda: None), -1
        self.identity = Identity("0" * 64, "0" * 64, {}, weights={}, method="elalora", settings={}, changeable={})
        self.writer = checkpoint.Writer(run_dir, global_rank=world.global_rank, world_size=world.world_size, limit=1)


def bytes_of(folder):
    """Bytes of all files in a folder, by its entries."""
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file():
            entry = path.relative_to(folder).parts[0]
            sizes[entry] = sizes.get(entry, 0) + path.stat().st_size
    return sizes


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="60m")
    options.add_argument("--r", type=int, default=507)
    options.add_argument("--rows", type=int, default=2)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--saves", type=int, default=5)
    options.add_argument("--folder", help="where checkpoints go (default: a temporary folder)")
    arguments = options.parse_args()
    world = join_world()
    model = random_llama(arguments.shape, dtype=torch.float32, device=world.device)
    data = TokenBatches(
        num_grains=max(2, world.world_size), rows=arguments.rows, length=arguments.length,
        vocab=model.config.vocab_size,
    )  # fmt: skip
    method = elalora(total_steps=10_000, init_warmup=9_000)
    trainer = tiny_trainer(
        method, world=world, model=model, data=data, r=arguments.r, lora_alpha=2.0 * arguments.r, total_steps=10_000
    )

    def step():
        return timed(trainer.train_step, world.device)

    for _ in range(2):
        step()
    steps = [step() for _ in range(max(5, arguments.saves))]
    stalls, gaps, during, ready = [], [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run = Saves(trainer, Path(folder))
        for _ in range(arguments.saves):
            start = time.perf_counter()
            stalls.append(timed(lambda: run.save("step"), world.device))
            own = [step()]
            while run.writer.busy:
                own.append(step())
            problems = run.writer.wait()
            assert problems is None, problems
            ready.append(time.perf_counter() - start)
            gaps.append(max(own))
            during += own
            steps.append(step())
        sizes = bytes_of(run.writer.saved) if world.is_main else {}
    captures = [timed(trainer.arena.capture, world.device) for _ in range(arguments.saves)]
    snapshot = trainer.arena.capture()
    flats = (snapshot.full.master, snapshot.full.exp_avg, snapshot.full.exp_avg_sq)
    digests = [timed(lambda: [tensor_digest(t) for t in flats], world.device) for _ in range(arguments.saves)]
    trained, arguments.folder = trainer.arena.layout.num_trained, None
    one, stall, gap = summary(steps), summary(stalls), summary(gaps)
    result = {
        "benchmark": "checkpoint_stall", "machine": machine(), "arguments": described(arguments),
        "processes": world.world_size, "frozen_numbers": sum(p.numel() for p in model.parameters()),
        "trained_numbers": trained, "step_seconds": one, "stall_seconds": stall,
        "capture_seconds": summary(captures), "digests_seconds": summary(digests),
        "stall_over_step": stall["median"] / one["median"],
        "step_while_writing_seconds": summary(during),
        "gap_seconds": gap, "gap_over_step": gap["median"] / one["median"],
        "standing_seconds": summary(ready),
        "bytes": sum(sizes.values()), "bytes_by_entry": sizes,
        "bytes_per_trained_number": sum(sizes.values()) / trained,
    }  # fmt: skip
    if world.is_main:
        write(result, arguments.out)
    world.leave()


if __name__ == "__main__":
    main()
