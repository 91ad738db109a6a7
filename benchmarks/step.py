"""One training step of ours beside PEFT's LoRA in one ZeRO-3 engine, and exact sums beside float sums.

torchrun --nproc-per-node 2 -m benchmarks.step [--shape 256x8] [--blocks 7] [--out FILE] [--trace FOLDER]

Same model, ranks (r 8 on all linear layers), batch (2 x 128 tokens a process), ZeRO-3 with CPU parameter and optimizer
offload, torch's AdamW on the host in both. The three variants take turns in blocks of steps within one start, so that
the machine's moods fall on all alike; figures are medians over blocks of a block's seconds a step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ardtrain.trainer as trainer_module
from ardtrain.adapters import attach
from ardtrain.collectives import ExactSum
from ardtrain.engines import AdamSettings, BackboneEngine
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable
from ardtrain.resize import LiveArena
from ardtrain.targets import find_sites
from ardtrain.trainer import Trainer
from benchmarks.common import SHAPES, described, join_world, machine, parser, random_llama, summary, timed, write
from benchmarks.resize import settings
from benchmarks.trace import name_zero_hooks, table, trace
from tests.tiny import TokenBatches

R = 8


class FloatSum(ExactSum):
    """The same interface with ordinary float sums: one float32 all-reduce of the gradient, one of the numbers."""

    def __init__(self, numbers, num_grains, *, exponent, device):
        super().__init__(0, num_grains, exponent=exponent, device=device)
        self._sum = torch.zeros(numbers, device=device)

    def add(self, grain, *, gradient, **numbers):
        (whole,) = gradient if isinstance(gradient, list) else [gradient]
        super().add(grain, gradient=whole[:0], **numbers)
        self._sum += whole

    def reduce(self, world, **numbers):
        if world.world_size > 1:
            dist.all_reduce(self._sum)
        head = super().reduce(world, **numbers)
        return type(head)(**{**vars(head), "valid": True})

    def _to_float(self):
        return self._sum


def zero3(world):
    """ZeRO-3 with CPU offload, every weight sharded (with DeepSpeed's default threshold small ones stay whole)."""
    return {
        "train_batch_size": 2 * world.world_size,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": False},
            "stage3_param_persistence_threshold": 0,
        },
    }


def ours(arguments, world):
    """The two engines, plain LoRA."""
    model = random_llama(arguments.shape, dtype=torch.float32)
    sites, ranks = find_sites(
        model, target_modules="all-linear", exclude_modules=None, r=R, lora_alpha=16.0, tower_settings={}
    )
    adapters = attach(model, sites, dropout={})
    backbone = BackboneEngine(model, stage=3, config=zero3(world), device=world.device)
    adapter = {
        "train_batch_size": world.world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    }
    method = Lora()
    arena = LiveArena(method, world=world, engine_config=adapter, adam=AdamSettings(), seed=0)
    arena.start(RankTable.start(sites, ranks))
    model.train()
    data = TokenBatches(num_grains=world.world_size, rows=2, length=128, vocab=SHAPES[arguments.shape][5])
    return Trainer(settings(10**6, torch.float32), world, backbone, adapters, arena, method, data)


def peft_step(arguments, world):
    """A function that does one step of PEFT's LoRA inside one ZeRO-3 engine on this process's share of the batch."""
    import deepspeed
    from peft import LoraConfig, get_peft_model

    model = random_llama(arguments.shape, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=R, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    config = zero3(world)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config |= {"gradient_clipping": 1.0, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=config)
    data = TokenBatches(num_grains=world.world_size, rows=2, length=128, vocab=SHAPES[arguments.shape][5])
    engine.train()
    step = 0

    def one():
        nonlocal step
        batch = data.collate((step, world.global_rank))
        logits = engine(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), position_ids=batch.position_ids,
            use_cache=False,
        ).logits  # fmt: skip
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        step += 1
        return float(loss)

    return one, sum(p.ds_numel for p in trained)


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="256x8")
    options.add_argument("--blocks", type=int, default=7)
    options.add_argument("--steps", type=int, default=5, help="steps a block")
    options.add_argument("--trace", metavar="FOLDER", help="profile our step alone: chrome trace there, shares printed")
    arguments = options.parse_args()
    world = join_world()
    if arguments.trace:
        name_zero_hooks()
    trainer = ours(arguments, world)
    if arguments.trace:
        for _ in range(3):
            trainer.train_step()
        shares = trace(trainer.train_step, arguments.trace, steps=arguments.steps, dp_rank=world.global_rank)
        arguments.trace = None
        if world.is_main:
            print(table(shares))
            write({"benchmark": "step_trace", "machine": machine(), "arguments": described(arguments),
                   "processes": world.world_size, **shares}, arguments.out)  # fmt: skip
        world.leave()
        return
    peft, peft_numbers = peft_step(arguments, world)

    def block(kind):
        trainer_module.ExactSum = FloatSum if kind == "float_sums" else ExactSum
        one = peft if kind == "peft" else trainer.train_step
        dist.barrier()
        return timed(lambda: [one() for _ in range(arguments.steps)], world.device) / arguments.steps

    kinds = ("ours", "float_sums", "peft")
    for kind in kinds:
        block(kind)  # warm-up: traces of ZeRO-3, optimizer states
    seconds = {kind: [] for kind in kinds}
    for i in range(arguments.blocks):
        for j in range(len(kinds)):
            kind = kinds[(i + j) % len(kinds)]
            seconds[kind].append(block(kind))
    ratio = [a / b for a, b in zip(seconds["ours"], seconds["peft"], strict=True)]
    exact = [a / b for a, b in zip(seconds["ours"], seconds["float_sums"], strict=True)]
    sums = sum_seconds(trainer, world)
    result = {
        "benchmark": "step", "machine": machine(), "arguments": described(arguments), "processes": world.world_size,
        "trained_numbers": {"ours": trainer.arena.layout.num_trained, "peft": peft_numbers},
        "seconds_a_step": {kind: summary(values) for kind, values in seconds.items()},
        "ours_over_peft": summary(ratio), "exact_over_float_step": summary(exact),
        "sums_alone": sums,
        "exact_sum_share_of_step": (sums["exact"]["median"] - sums["float"]["median"])
        / summary(seconds["ours"])["median"],
    }  # fmt: skip
    if world.is_main:
        write(result, arguments.out)
    world.leave()


def sum_seconds(trainer, world):
    """One add and reduce of the arena's gradient by itself, exact and float: what the exact sum adds to a step."""
    gradient = torch.randn(trainer.arena.layout.size)
    loss = torch.zeros(())
    out = {"exact": [], "float": []}
    for _ in range(15):
        for name, kind in (("exact", ExactSum), ("float", FloatSum)):
            total = kind(len(gradient), world.world_size, exponent=44, device=world.device)
            dist.barrier()

            def one(total=total):
                total.add(world.global_rank, loss=loss, gradient=gradient, tokens=1)
                total.reduce(world)

            out[name].append(timed(one, world.device))
    return {name: summary(values[5:]) for name, values in out.items()}


if __name__ == "__main__":
    main()
