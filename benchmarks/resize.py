"""What one resize costs, split by cause, beside one optimizer step and beside what its bytes cost.

python -m benchmarks.resize [--shape 60m | --model DIR] [--bf16] [--stage 3] [--events 10] [--out FILE]

`bytes_seconds`: the least time the same data needs, measured: master, both moments and ElaLoRA's two averages copied
once to the host and once back (on a CPU: two copies). `beside_bytes_seconds` is the resize less that.
"""

import torch

from ardtrain.adapters import attach
from ardtrain.backbones import ModelSource, find_sites, load_model
from ardtrain.engines import AdamSettings, BackboneEngine
from ardtrain.methods.elalora import ElaLora, ElaLoraSettings
from ardtrain.ranks import RankTable
from ardtrain.resize import LiveArena
from ardtrain.trainer import LoopSettings, Trainer
from benchmarks.common import SHAPES, described, join_world, machine, parser, random_llama, summary, timed, write
from tests.tiny import TokenBatches

CAUSES = ("agree", "capture", "repack", "destroy", "rebuild")


def settings(total_steps, dtype):
    """The loop's settings; only dtype and length matter here."""
    return LoopSettings(
        seed=0, total_steps=total_steps, learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=0,
        max_grad_norm=1.0, max_skipped_steps=0, score_at="after_step", compute_dtype=dtype, lora_plus_ratio=1.0,
        eval_on_start=False,
        eval_steps=None, save_steps=None,
    )  # fmt: skip


def build(arguments, world):
    """A trainer of ElaLoRA on all linear layers with an event every step after the first two."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    if arguments.model:
        model = load_model(ModelSource(arguments.model), compute_dtype="bf16" if arguments.bf16 else "fp32")
    else:
        model = random_llama(arguments.shape, dtype=dtype, device=world.device)
    vocab = model.config.vocab_size
    sites, ranks = find_sites(
        model, target_modules="all-linear", exclude_modules=None, r=arguments.r, lora_alpha=2.0 * arguments.r,
        tower_settings={},
    )  # fmt: skip
    adapters = attach(model, sites, dropout={})
    batch = {"train_batch_size": world.world_size, "train_micro_batch_size_per_gpu": 1}
    backbone = {**batch, "zero_optimization": {"stage": arguments.stage}}
    if arguments.bf16:
        backbone["bf16"] = {"enabled": True}
    engine = BackboneEngine(model, stage=arguments.stage, config=backbone, device=world.device)
    total_steps = arguments.events + 4
    method = ElaLora(
        ElaLoraSettings(
            total_steps=total_steps, b=8, k=2, init_warmup=1, final_warmup=1, mask_interval=1, enable_scheduler=False,
            beta1=0.85, beta2=0.85, reg_orth_coef=0.1, reg_orth_form="mean_norm", allow_swap=True,
            newborn_immunity=False, newborn_norm="mean",
        )
    )  # fmt: skip
    adapter = {**batch, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}
    arena = LiveArena(method, world=world, engine_config=adapter, adam=AdamSettings(), seed=0)
    arena.start(RankTable.start(sites, ranks))
    model.train()
    grains = max(2, world.world_size)
    data = TokenBatches(num_grains=grains, rows=arguments.rows, length=arguments.length, vocab=vocab)
    return Trainer(settings(total_steps, dtype), world, engine, adapters, arena, method, data)


def bytes_seconds(numbers, device):
    """Copying five arrays of the arena's length to the host and back, at least of 5 tries each."""
    arrays = [torch.zeros(numbers, device=device) for _ in range(5)]
    hosts = [torch.zeros(numbers) for _ in range(5)]

    def there_and_back():
        for host, array in zip(hosts, arrays, strict=True):
            host.copy_(array)
            array.copy_(host)

    return min(timed(there_and_back, device) for _ in range(5))


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="60m")
    options.add_argument("--model", help="a model folder instead of a random one")
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--stage", type=int, default=3, choices=(0, 3))
    options.add_argument("--r", type=int, default=8)
    options.add_argument("--rows", type=int, default=2)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--events", type=int, default=10)
    arguments = options.parse_args()
    world = join_world()
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
    totals = [sum(r.values()) for r in resizes]
    floor = bytes_seconds(trainer.arena.layout.size, world.device)
    step, total = summary(steps[2:]), summary(totals)
    result = {
        "benchmark": "resize", "machine": machine(), "arguments": described(arguments), "processes": world.world_size,
        "trained_numbers": trainer.arena.layout.num_trained, "events": len(resizes),
        "step_seconds": step, "resize_seconds": total,
        "by_cause": {c: summary([r[c] for r in resizes]) for c in CAUSES},
        "bytes_seconds": floor, "beside_bytes_seconds": total["median"] - floor,
        "resize_over_step": total["median"] / step["median"],
    }  # fmt: skip
    if world.is_main:
        write(result, arguments.out)
    world.leave()


if __name__ == "__main__":
    main()
