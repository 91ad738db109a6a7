"""What one resize costs, split by cause, beside one optimizer step and beside what its bytes cost.

python -m benchmarks.resize [--shape 60m | --model DIR] [--bf16] [--stage 3] [--events 10] [--out FILE]
python -m benchmarks.resize --adapters-only --shape 70b --r 17.5 [--moved 64] [--events 10] [--out FILE]

The second form has no backbone and no step: the sites come from the model's shapes, their numbers are random. A rank
of 17.5 is 17 and 18 in turns, layer by layer. On a CPU its seconds are those of the processor (one thread, the kernel's
work included): on a busy machine they say what a quiet one would take. On a GPU they are a wall clock's, read when the
device has done all its work.
`bytes_seconds`: the least time the same data needs, measured: master, both moments and ElaLoRA's two averages copied
once to the host and once back (on a CPU: two copies). `beside_bytes_seconds` is the resize less that.
"""

import math
import re
import time
from types import SimpleNamespace
from unittest import mock

import torch

from ardtrain.adapters import attach
from ardtrain.backbones import ModelSource, load_model
from ardtrain.engines import MOMENTS, AdamSettings, BackboneEngine
from ardtrain.methods.elalora import ElaLora, ElaLoraSettings
from ardtrain.ranks import RankTable
from ardtrain.resize import LiveArena
from ardtrain.targets import find_sites
from ardtrain.trainer import LoopSettings, Trainer
from benchmarks.common import (
    SHAPES,
    described,
    join_world,
    linear_sites,
    machine,
    parser,
    peak_bytes,
    random_llama,
    summary,
    timed,
    write,
)
from tests.tiny import TokenBatches

CAUSES = ("agree", "layout", "gather", "repack", "method", "destroy", "rebuild", "restore")


def settings(total_steps, dtype):
    """The loop's settings; only dtype and length matter here."""
    return LoopSettings(
        seed=0, total_steps=total_steps, learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=0,
        max_grad_norm=1.0, max_skipped_steps=0, score_at="after_step", compute_dtype=dtype, lora_plus_ratio=1.0,
        eval_on_start=False,
        eval_steps=None, save_steps=None,
    )  # fmt: skip


def make_method(*, total_steps, moved):
    """ElaLoRA that moves so many components at every step after the first."""
    return ElaLora(
        ElaLoraSettings(
            total_steps=total_steps, b=moved, k=2, init_warmup=1, final_warmup=1, mask_interval=1,
            enable_scheduler=False, beta1=0.85, beta2=0.85, reg_orth_coef=0.1, reg_orth_form="mean_norm",
            allow_swap=True, newborn_immunity=False, newborn_norm="mean",
        )
    )  # fmt: skip


def make_arena(world, *, total_steps, moved):
    """An arena of it, not yet started."""
    method = make_method(total_steps=total_steps, moved=moved)
    batch = {"train_batch_size": world.world_size, "train_micro_batch_size_per_gpu": 1}
    adapter = {**batch, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}
    return LiveArena(method, world=world, engine_config=adapter, adam=AdamSettings(), seed=0)


def adapters_only(arguments, world):
    """Events of an arena without a model: random weights, moments and averages, plans by random scores."""
    sites, _ = linear_sites(arguments.shape, r=math.ceil(arguments.r))
    layers = [int(re.search(r"layers\.(\d+)\.", site.module).group(1)) for site in sites]
    ranks = [math.floor(arguments.r * (n + 1)) - math.floor(arguments.r * n) for n in layers]
    arena = make_arena(world, total_steps=arguments.events + 4, moved=arguments.moved)
    arena.start(RankTable.start(sites, ranks))
    generator = torch.Generator(world.device).manual_seed(0)
    for name in MOMENTS:
        arena.engine.moment(name).uniform_(0.0, 1e-3, generator=generator)
    for values in arena.state.values():
        values.uniform_(0.0, 1e-3, generator=generator)
    clock = clock_of(world.device)
    resizes, scores, decisions, wall = [], [], [], []
    for step in range(2, arguments.events + 3):
        times = [clock()]
        own = arena.scores(step)
        times.append(clock())
        plan = arena.method.plan(step, own)
        times.append(clock())
        start = time.perf_counter()
        with mock.patch("ardtrain.resize.time", SimpleNamespace(perf_counter=clock)):
            resizes.append(arena.apply(plan, step=step).seconds)
        wall.append(time.perf_counter() - start)
        scores.append(times[1] - times[0])
        decisions.append(times[2] - times[1])
    return arena, resizes[1:], {
        "clock": "processor" if world.device.type == "cpu" else "wall", "moved": arguments.moved,
        "scores_seconds": summary(scores[1:]),
        "plan_seconds": summary(decisions[1:]), "wall_seconds": summary(wall[1:]),
    }  # fmt: skip


def build(arguments, world):
    """A trainer of ElaLoRA on all linear layers with an event every step after the first two."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    if arguments.model:
        model = load_model(ModelSource(arguments.model), compute_dtype="bf16" if arguments.bf16 else "fp32")
    else:
        model = random_llama(arguments.shape, dtype=dtype, device=world.device)
    vocab = model.config.vocab_size
    sites, ranks = find_sites(
        model, target_modules="all-linear", exclude_modules=None, r=int(arguments.r), lora_alpha=2.0 * int(arguments.r),
        tower_settings={},
    )  # fmt: skip
    adapters = attach(model, sites, dropout={})
    batch = {"train_batch_size": world.world_size, "train_micro_batch_size_per_gpu": 1}
    backbone = {**batch, "zero_optimization": {"stage": arguments.stage}}
    if arguments.bf16:
        backbone["bf16"] = {"enabled": True}
    engine = BackboneEngine(model, stage=arguments.stage, config=backbone, device=world.device)
    total_steps = arguments.events + 4
    arena = make_arena(world, total_steps=total_steps, moved=8)
    method = arena.method
    arena.start(RankTable.start(sites, ranks))
    model.train()
    grains = max(2, world.world_size)
    data = TokenBatches(num_grains=grains, rows=arguments.rows, length=arguments.length, vocab=vocab)
    return Trainer(settings(total_steps, dtype), world, engine, adapters, arena, method, data)


def bytes_seconds(numbers, device, clock=timed):
    """Copying an array of the arena's length to the host and back five times, at least of 5 tries."""
    array, host = torch.zeros(numbers, device=device), torch.zeros(numbers)

    def there_and_back():
        for _ in range(5):
            host.copy_(array)
            array.copy_(host)

    return min(clock(there_and_back, device) for _ in range(5))


def clock_of(device):
    """Processor seconds on a CPU; on a GPU seconds of the wall, its work done."""
    if device.type == "cpu":
        return time.process_time

    def synchronised():
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def clock_timed(function, device):
    """Seconds of one call by that clock."""
    clock = clock_of(device)
    start = clock()
    function()
    return clock() - start


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="60m")
    options.add_argument("--model", help="a model folder instead of a random one")
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--stage", type=int, default=3, choices=(0, 3))
    options.add_argument("--adapters-only", action="store_true", help="no backbone: see above")
    options.add_argument("--moved", type=int, default=64, help="components moved in an event, with --adapters-only")
    options.add_argument("--r", type=float, default=8)
    options.add_argument("--rows", type=int, default=2)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--events", type=int, default=10)
    arguments = options.parse_args()
    world = join_world()
    if arguments.adapters_only:
        arena, resizes, measured = adapters_only(arguments, world)
    else:
        arena, resizes, measured = in_training(arguments, world)
    total = summary([sum(r.values()) for r in resizes])
    size, table, trained = arena.layout.size, arena.table, arena.layout.num_trained
    arena.engine.destroy()
    floor = bytes_seconds(size, world.device, clock_timed if arguments.adapters_only else timed)
    result = {
        "benchmark": "resize", "machine": machine(), "arguments": described(arguments), "processes": world.world_size,
        "trained_numbers": trained, "sites": len(table.sites), "components": table.total,
        "events": len(resizes), "resize_seconds": total,
        "by_cause": {c: summary([r[c] for r in resizes]) for c in CAUSES},
        "bytes_seconds": floor, "beside_bytes_seconds": total["median"] - floor, "peak_memory_bytes": peak_bytes(),
        **measured,
    }  # fmt: skip
    if "step_seconds" in result:
        result["resize_over_step"] = total["median"] / result["step_seconds"]["median"]
    if world.is_main:
        write(result, arguments.out)
    world.leave()


def in_training(arguments, world):
    """Events of a trainer, and what its steps take beside them."""
    trainer = build(arguments, world)
    steps, records, allocator = [], [], []
    for _ in range(arguments.events + 3):
        before = trainer.clock.seconds("allocator")
        results = []
        seconds = timed(lambda into=results: into.append(trainer.train_step()), world.device)
        records += [r.record for r in results if r.record is not None]
        allocator.append(trainer.clock.seconds("allocator") - before)
        steps.append(seconds - allocator[-1])
    resizes = [r.seconds for r in records][1:]  # the first pays for what is made once
    return trainer.arena, resizes, {"step_seconds": summary(steps[2:])}


if __name__ == "__main__":
    main()
