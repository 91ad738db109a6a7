"""A base in int8 and NF4 beside the same one in bf16: logits, held-out loss, bytes, gathered bytes, step time.

python -m benchmarks.quantized --data DIR [--out FILE]

DIR holds `stories260k_llama` and `e2e_nlg`. Bases: that Llama, and a random one of hidden size 256 and 8 layers, which
reads the same tokens. One process, ZeRO-3 with every weight sharded, compute dtype bf16, adapters of rank 8 on all
linear layers. Logits are compared on held-out rows without adapters, over the positions that are no padding; for each
adapter method the base is loaded anew and trained for some steps on the same rows in the same order. Gathered bytes are
numel times itemsize of each parameter that ZeRO-3 asks to be gathered in one training step of one row. Step times are
of the variants in turns within one start; DeepSpeed's hooks are in all of them.
"""

import tempfile
from pathlib import Path

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from ardtrain.backbones import ModelSource, load_model, load_tokenizer, quantize_base
from ardtrain.data import DataSettings, EvalData, TrainData
from ardtrain.methods.lora import Lora
from benchmarks.common import described, join_world, machine, parser, random_llama, summary, timed, write
from tests.tiny import TokenBatches, backbone_config, elalora, tiny_trainer

FORMATS = (None, "int8", "nf4")  # None: bf16
BASES = ("stories260k_llama", "256x8")
METHODS = {"lora": Lora, "elalora": elalora}
GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


def base(arguments, name, *, dtype, format=None):
    """One of the two bases, frozen."""
    if name == "256x8":
        model = random_llama(name, dtype=torch.float32).to(dtype)
    else:
        source = ModelSource(str(Path(arguments.data) / name))
        model = load_model(source, compute_dtype="fp32" if dtype == torch.float32 else "bf16")
    if format is not None:
        quantize_base(model, format)
    return model


def rows(arguments, cache):
    """Training rows and held-out rows of e2e_nlg."""
    folder = Path(arguments.data)
    task = folder / "e2e_nlg"
    settings = DataSettings(
        train_files=(str(task / "train.jsonl"),), format="completion", prompt_field="", completion_field="ref",
        messages_field="", text_field="", prompt_template="{mr}\n", completion_template=None, chat_template=None,
        max_length=256, packing=False, truncation="drop", on_bad_row="error", seed=0,
    )  # fmt: skip
    held_out = Path(cache) / "held_out.jsonl"
    lines = (task / "train.jsonl").read_text().splitlines()
    held_out.write_text("\n".join(lines[-arguments.held_out :]) + "\n")
    training = Path(cache) / "train.jsonl"
    # Rows of one meaning stand together: a gap, so that none is on both sides.
    training.write_text("\n".join(lines[: -2 * arguments.held_out]) + "\n")
    settings = DataSettings(**{**vars(settings), "train_files": (str(training),)})
    tokenizer = load_tokenizer(ModelSource(str(folder / "stories260k_llama")))
    train = TrainData(
        settings, tokenizer, Path(cache), global_batch_size=8, grain_size=8, num_train_epochs=None,
        max_steps=arguments.steps,
    )  # fmt: skip
    return train, EvalData(settings, [str(held_out)], tokenizer, Path(cache), grain_size=8)


@torch.no_grad()
def logits(model, data):
    """[positions, vocabulary] float32 of all held-out positions that are no padding."""
    out = []
    for batch in map(data.collate, data.grains()):
        mask = batch.attention_mask.long()
        found = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
        out.append(found[mask.bool()].float())
    return torch.cat(out)


def distances(arguments, name, data):
    """Logit distances of each format to fp32 and to bf16; the spread of fp32's logits as a measure."""
    full = logits(base(arguments, name, dtype=torch.float32), data)
    half = logits(base(arguments, name, dtype=torch.bfloat16), data)

    def between(a, b):
        difference = (a - b).abs()
        return {"largest": float(difference.max()), "mean": float(difference.mean())}

    out = {"standard_deviation_of_fp32": float(full.std()), "bf16": {"to_fp32": between(half, full)}}
    for format in FORMATS[1:]:
        ours = logits(base(arguments, name, dtype=torch.bfloat16, format=format), data)
        out[format] = {"to_fp32": between(ours, full), "to_bf16": between(ours, half)}
    return out


def trainer_of(arguments, world, name, format, make, data, steps):
    """A trainer on the base in this format under ZeRO-3."""
    return tiny_trainer(
        make(), world=world, model=base(arguments, name, dtype=torch.bfloat16), quantization=format, data=data, r=8,
        lora_alpha=16.0, backbone=backbone_config(stage=3, dtype=torch.bfloat16), compute_dtype=torch.bfloat16,
        total_steps=steps, learning_rate=5e-3, warmup_steps=max(1, steps // 20),
    )  # fmt: skip


def held_out_losses(arguments, world, name, train, held_out):
    """Format -> method -> held-out loss before and after."""
    out = {}
    steps = arguments.steps
    for format in FORMATS:
        for method in METHODS:

            def make(method=method):
                if method == "lora":
                    return Lora()
                return elalora(total_steps=steps, init_warmup=steps // 10, final_warmup=steps // 4, mask_interval=3)

            trainer = trainer_of(arguments, world, name, format, make, train, steps)
            trainer.eval_data = held_out
            before = trainer.evaluate().loss
            for _ in range(steps):
                trainer.train_step()
            entry = out.setdefault(format or "bf16", {"before": before})
            assert entry["before"] == before, "adapters start at zero"
            entry[method] = trainer.evaluate().loss
            trainer.arena.engine.destroy()
            trainer.backbone.destroy()
    return out


def gathered_bytes(step):
    """Bytes of the parameters that ZeRO-3 gathers while `step()` runs."""
    honest, total = getattr(PartitionedParameterCoordinator, GATHER), 0

    def counting(self, params, *rest, **named):
        nonlocal total
        total += sum(p.ds_numel * p.ds_tensor.element_size() for p in params)
        return honest(self, params, *rest, **named)

    setattr(PartitionedParameterCoordinator, GATHER, counting)
    try:
        step()
    finally:
        setattr(PartitionedParameterCoordinator, GATHER, honest)
    return total


def steps_of(arguments, world, name):
    """Bytes of the frozen shard, gathered bytes and seconds of a step, for each format."""
    data = TokenBatches(num_grains=1, rows=2, length=128, vocab=512)
    trainers = {f or "bf16": trainer_of(arguments, world, name, f, Lora, data, 10**6) for f in FORMATS}
    out = {}
    for format, trainer in trainers.items():
        parameters = list(trainer.backbone.module.parameters())
        linears = [p for n, p in trainer.backbone.module.named_parameters() if "_proj" in n]
        trainer.train_step()  # ZeRO-3 traces the order of its modules
        out[format] = {
            "frozen_shard_bytes": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters),
            "of_it_linears": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in linears),
            "gathered_bytes_a_step": gathered_bytes(trainer.train_step),
        }
    seconds = {format: [] for format in trainers}
    order = list(trainers)
    for block in range(arguments.blocks):
        for i in range(len(order)):
            one = trainers[order[(i + block) % len(order)]].train_step
            spent = timed(lambda one=one: [one() for _ in range(3)], world.device) / 3
            seconds[order[(i + block) % len(order)]].append(spent)
    for format, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["bf16"], strict=True)]
        out[format] |= {"seconds_a_step": summary(values), "seconds_over_bf16": summary(ratios)}
        trainers[format].arena.engine.destroy()
        trainers[format].backbone.destroy()
    return out


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--data", required=True)
    options.add_argument("--steps", type=int, default=60, help="training steps of 8 rows")
    options.add_argument("--held-out", type=int, default=200, help="held-out rows")
    options.add_argument("--blocks", type=int, default=7)
    arguments = options.parse_args()
    world = join_world()
    result = {"benchmark": "quantized", "machine": machine(), "arguments": described(arguments)}
    with tempfile.TemporaryDirectory() as cache:
        train, held_out = rows(arguments, cache)
        for name in BASES:
            result[name] = {
                "logit_distance": distances(arguments, name, held_out),
                "held_out_loss": held_out_losses(arguments, world, name, train, held_out),
                "step": steps_of(arguments, world, name),
            }
    write(result, arguments.out)
    world.leave()


if __name__ == "__main__":
    main()
