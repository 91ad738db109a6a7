"""One training step of each method beside plain LoRA's and, where PEFT has the method, beside PEFT's.

python -m benchmarks.methods [--shape 256x8] [--bf16] [--length 128] [--blocks 7] [--out FILE]

One process, the base whole (no ZeRO-3), float32, rank 8 on all linear layers (ARD-LoRA by head: the rank that gives as
many numbers), 2 x 128 tokens. With --bf16 base and products are in bfloat16, PEFT's adapters too (ours have float32
masters). Adaptive methods stand where they have nothing to decide: ALoRA between two rounds,
ElaLoRA and AdaLoRA in their averaging phase and in the final one, ARD-LoRA after its freeze, probe growth between two
events. `probe_riding` has probes in every step and an event every 12: at an interval of D steps 12 of D are like it.
All variants take turns in blocks of steps within one start, so that the machine's moods fall on all alike.
"""

import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F

from ardtrain.methods.adalora import AdaLora, AdaLoraSettings
from ardtrain.methods.alora import Alora, AloraSettings
from ardtrain.methods.dora import Dora
from ardtrain.methods.lora import Lora
from benchmarks.common import SHAPES, described, join_world, machine, parser, random_llama, summary, timed, write
from tests.tiny import TokenBatches, ard_lora, elalora, probe_lora, tiny_trainer

LONG = 10**6
ADALORA = AdaLoraSettings(LONG, 8, LONG // 2, 10, 1, 0.85, 0.85, 0.0, "mean_norm", "end")


def alora():
    """ALoRA whose first round is far away."""
    return Alora(AloraSettings(LONG, k1=LONG // 2, k2=10, rounds=1, n_a=7, prune_only_harmful=False, revive=False))


def ela(final_warmup):
    """ElaLoRA without events: averaging (0) or in the final phase (nearly the whole run)."""
    return elalora(
        total_steps=LONG, init_warmup=LONG - 1 - final_warmup, final_warmup=final_warmup, mask_interval=1,
        reg_orth_coef=0.0,
    )  # fmt: skip


def growing(**changes):
    """Probe growth with its defaults and the shortest interval that they allow."""
    given = {"total_steps": LONG, "final_warmup": 1, "mask_interval": 12, "probe_components": 4, "probe_steps": 6}
    return probe_lora(**given | changes)


OURS = {
    "lora": (Lora, {}),
    "lora_again": (Lora, {}),
    "alora_idle": (alora, {}),
    "elalora_averaging": (lambda: ela(0), {}),
    "elalora_final": (lambda: ela(LONG - 1), {}),
    "probe_between": (partial(growing, init_warmup=LONG // 2), {}),
    "probe_riding": (partial(growing, init_warmup=0), {}),
    "adalora_averaging": (lambda: AdaLora(ADALORA), {}),
    "dora": (Dora, {"form": "dora"}),
    "ard_frozen": (lambda: ard_lora(total_steps=LONG, init_warmup=0, final_warmup=LONG - 1), {"form": "own_a"}),
}


def dtype_of(arguments):
    """Of base and products."""
    return torch.bfloat16 if arguments.bf16 else torch.float32


def batches(arguments):
    """The data: one grain a step."""
    return TokenBatches(num_grains=1, rows=2, length=arguments.length, vocab=SHAPES[arguments.shape][5])


def ours(arguments, world, make, form, r):
    """A trainer of one method over its own copy of the model."""
    dtype = dtype_of(arguments)
    model = random_llama(arguments.shape, dtype=dtype, device=world.device)
    return tiny_trainer(
        make(), world=world, model=model, data=batches(arguments), r=r, total_steps=LONG, warmup_steps=0,
        compute_dtype=dtype, **form,
    )  # fmt: skip


def head_rank(arguments, world, wanted):
    """The rank of ARD-LoRA's heads whose numbers come nearest to `wanted`."""
    numbers = {}
    for r in range(1, 9):
        trainer = ours(arguments, world, *OURS["ard_frozen"], r)
        numbers[r] = abs(trainer.arena.layout.num_trained - wanted)
        trainer.arena.engine.destroy()
    return min(numbers, key=numbers.get)


def peft_step(arguments, device, **settings):
    """A function that does one step of PEFT's method with AdamW and clipping."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    common = {"lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if settings.pop("adalora", False):
        config = AdaLoraConfig(init_r=8, target_r=4, total_step=LONG, tinit=LONG // 2, tfinal=10, **common)
    else:
        config = LoraConfig(r=8, **common, **settings)
    base = random_llama(arguments.shape, dtype=dtype_of(arguments), device=device)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    data = batches(arguments)
    model.train()
    step = 0

    def one():
        nonlocal step
        batch = data.collate((step, 0))
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device).long(),
            position_ids=batch.position_ids.to(device), use_cache=False,
        ).logits  # fmt: skip
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten().to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        step += 1

    return one


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="256x8")
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--length", type=int, default=128, help="tokens of the longest rows")
    options.add_argument("--blocks", type=int, default=7)
    options.add_argument("--steps", type=int, default=3, help="steps a block")
    options.add_argument("--cpu-seconds", action="store_true", help="of this process: for a machine that others share")
    arguments = options.parse_args()
    world = join_world()
    steps, numbers = {}, {}
    for name, (make, form) in OURS.items():
        r = head_rank(arguments, world, numbers["lora"]) if name == "ard_frozen" else 8
        trainer = ours(arguments, world, make, form, r)
        steps[name], numbers[name] = trainer.train_step, trainer.arena.layout.num_trained
    steps["peft_lora"] = peft_step(arguments, world.device)
    steps["peft_dora"] = peft_step(arguments, world.device, use_dora=True)
    steps["peft_adalora"] = peft_step(arguments, world.device, adalora=True)
    seconds = {name: [] for name in steps}
    order = list(steps)
    for block in range(arguments.blocks + 1):
        for i in range(len(order)):
            name = order[(i + block) % len(order)]
            one = steps[name]
            busy = time.process_time()
            spent = timed(lambda one=one: [one() for _ in range(arguments.steps)], world.device)
            spent = (time.process_time() - busy if arguments.cpu_seconds else spent) / arguments.steps
            if block:  # the first is a warm-up
                seconds[name].append(spent)

    def ratio(a, b):
        return summary([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])

    result = {
        "benchmark": "methods", "machine": machine(), "arguments": described(arguments), "trained_numbers": numbers,
        "seconds_a_step": {name: statistics.median(values) for name, values in seconds.items()},
        "over_lora": {name: ratio(name, "lora") for name in OURS if name != "lora"},
        "over_peft": {name: ratio(name, f"peft_{kind}") for name, kind in
                      (("lora", "lora"), ("dora", "dora"), ("adalora_averaging", "adalora"))},
    }  # fmt: skip
    write(result, arguments.out)
    world.leave()


if __name__ == "__main__":
    main()
