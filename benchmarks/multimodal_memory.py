"""How much memory does adaptation take at equal held-out loss? ARD-LoRA beside LoRA, DoRA and AdaLoRA.

    python -m benchmarks.multimodal_memory --data FOLDER --work FOLDER [--seeds 3] [--out FILE]

FOLDER of --data holds digits_vqa. The frozen base is the tiny PaliGemma-2 of benchmarks.digits_vqa (pre-trained in full
on some kinds of questions; kept in --work), adapted to all kinds on one process, the base whole, float32. Adaptation
memory of a run is what its adapters add at the largest moment of the run:

- state: 16 bytes a trained number (weight, gradient, two moments; float32), and AdaLoRA's two averages, 8 more;
- activations: distinct storages that the forward of a grain of 32 rows keeps for backward, beyond those of the same
  frozen model whose embeddings require a gradient. Weights and the arena are in neither.

ARD-LoRA runs once a layout: own_a (a head's own A and B) and shared_a (the heads of a matrix share A). "Equal held-out
loss": the others run with r = 1, 2, 3, ... (AdaLoRA's target) until the mean held-out loss over the seeds is not above
ARD-LoRA's mean by more than one standard error of the difference of the means; that r's memory is compared. Learning
rates are tuned for each method on a seed of their own and the same held-out rows. Every finished run is kept in FILE
and done once.
"""

import json
import math
import statistics
import time
from pathlib import Path

import torch

from ardtrain.adapters import attach, first_dense
from ardtrain.backbones import load_model
from ardtrain.engines import AdamSettings, BackboneEngine
from ardtrain.evaluation import loss_sum
from ardtrain.preflight import make_method, prepare
from ardtrain.resize import LiveArena
from ardtrain.run_data import model_source, open_data, tokenizer_of
from ardtrain.trainer import Hooks, LoopSettings, Trainer
from benchmarks import common
from benchmarks.digits_vqa import make_base, write_rows

TUNING_SEED, DEV_ROWS = 1000, 300
PHASES = {"init_warmup": 0.1, "final_warmup": 0.25}  # of the run
ARD = {
    "own_a": {"method": "ard_lora", "r": 2, "ard_lora": {"layout": "own_a"}},
    "shared_a": {"method": "ard_lora", "r": 4, "ard_lora": {"layout": "shared_a"}},
}
LORA_RATES, SVD_RATES = (4e-3, 1e-2), (2e-2, 5e-2)
RATES = {"own_a": LORA_RATES, "shared_a": LORA_RATES, "lora": LORA_RATES, "dora": LORA_RATES, "adalora": SVD_RATES}
AVERAGES = {"adalora": 8}  # bytes a trained number beside 16


def settings_of(name, r, steps):
    """The config's part of one method."""
    first, last = (round(share * steps) for share in PHASES.values())
    if name in ARD:
        out = dict(ARD[name])
        out["ard_lora"] = out["ard_lora"] | {
            "init_warmup": first, "final_warmup": last, "alpha_interval": 2, "resize_interval": max(2, steps // 30),
        }  # fmt: skip
        return out
    if name == "adalora":
        block = {"target_r": r, "tinit": first, "tfinal": last, "deltaT": max(1, steps // 60), "compact": "freeze"}
        return {"method": "adalora", "r": -(-3 * r // 2), "adalora": block}
    return {"method": name, "r": r}


def saved_bytes(model, batch, weights):
    """Bytes of the distinct storages that a forward keeps for backward; weights: storages that do not count."""
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_sum(model, batch, device=torch.device("cpu"))
    assert loss.grad_fn is not None
    return sum(found.values())


def with_gradient(model):
    """Lets what both towers begin with require a gradient, as if it came from something trained; returns a remover."""
    inner = model.model if hasattr(model, "model") else model
    vision = inner.vision_tower
    patches = next(m for name, m in vision.named_modules() if name.endswith("patch_embedding"))
    hooks = [
        module.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
        for module in (patches, model.get_input_embeddings())
    ]
    return lambda: [hook.remove() for hook in hooks]


class Problem:
    """Base, rows, and the frozen model's own activations."""

    def __init__(self, given, world):
        self.given, self.world = given, world
        self.config_path = given.work / "config.yaml"
        config = self.prepared("lora", 1, TUNING_SEED).config
        train, _ = open_data(config, tokenizer_of(config))
        model = self.model(config)
        self.batch = train.collate(train.grains(0)[0])
        remove = with_gradient(model)
        self.own_bytes = saved_bytes(model, self.batch, [*model.parameters(), *model.buffers()])
        remove()

    def model(self, config):
        return load_model(model_source(config), compute_dtype="fp32").train()

    def prepared(self, name, r, seed):
        given = self.given
        config = {
            "model_name_or_path": str(given.work / "base"), "output_dir": str(given.work / "run"),
            "task": "image_text_to_text", "seed": seed, "max_length": 64, "max_steps": given.steps,
            "global_batch_size": 32, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100,
            "max_eval_samples": DEV_ROWS,
            "data": {"train_file": str(given.work / "train.jsonl"), "eval_file": str(given.work / "dev.jsonl")},
            **settings_of(name, r, given.steps),
        }  # fmt: skip
        self.config_path.write_text(json.dumps(config))
        return prepare(self.config_path, [], world_size=1)

    def run(self, name, r, rate, seed):
        """Figures of one run."""
        start, prepared = time.process_time(), self.prepared(name, r, seed)
        config, shape = prepared.config, prepared.shape
        train, held_out_rows = open_data(config, tokenizer_of(config))
        model, method = self.model(config), make_method(config, shape, total_steps=self.given.steps)
        form = "dora" if name == "dora" else name if name in ARD else "plain"
        adapters = attach(model, shape.table.sites, dropout={}, form=form, heads=shape.heads)
        batch = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
        engine = BackboneEngine(
            model, stage=0, config={**batch, "zero_optimization": {"stage": 0}}, device=self.world.device
        )
        adapter = {**batch, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}
        arena = LiveArena(
            method, world=self.world, engine_config=adapter, adam=AdamSettings(), seed=seed, dense=shape.dense
        )
        arena.start(shape.table, first_dense(adapters))
        loop = LoopSettings(
            seed=seed, total_steps=self.given.steps, learning_rate=rate, lr_scheduler_type="cosine",
            warmup_steps=self.given.steps // 20, max_grad_norm=1.0, max_skipped_steps=0, score_at="after_step",
            compute_dtype=torch.float32, lora_plus_ratio=1.0, eval_on_start=False, eval_steps=None, save_steps=None,
        )  # fmt: skip
        trainer = Trainer(
            loop, self.world, engine, adapters, arena, method, train, eval_data=held_out_rows, loss_sum=loss_sum
        )
        sizes = []

        def measure(*_):
            sizes.append(self.measured(trainer, AVERAGES.get(config.method, 0)))

        measure()
        trainer.hooks = Hooks(on_event=measure)
        trainer.fit()
        measure()
        held_out = trainer.evaluate()
        out = {
            "loss": held_out.loss,
            "exact_match": held_out.metrics["exact_match"],
            "most": max(sizes, key=lambda size: size["bytes"]),
            "last": sizes[-1],
            "events": trainer.state.events,
            "cpu_seconds": round(time.process_time() - start, 1),
        }
        arena.engine.destroy()
        engine.destroy()
        return out

    def measured(self, trainer, averages):
        """State and activations of the adapters as they are now."""
        numbers, model = trainer.arena.layout.num_trained, trainer.backbone.module
        trainer._bind(trainer.state.step)
        remove = with_gradient(model)
        weights = [*model.parameters(), *model.buffers(), trainer.arena.engine.weights]
        activations = saved_bytes(model, self.batch, weights) - self.own_bytes
        remove()
        state = (16 + averages) * numbers
        return {"numbers": numbers, "state": state, "activations": activations, "bytes": state + activations}


# ---- all runs ----


class Runs:
    """Runs by method, r, rate and seed, each done once and kept in the result file at once."""

    def __init__(self, given, world):
        self.given, self.done, self.rest = given, {}, {}
        self.settings = {k: v for k, v in common.described(given).items() if k not in ("work", "pretrain_steps")}
        if given.out and Path(given.out).exists():
            kept = json.loads(Path(given.out).read_text())
            if kept["settings"] != self.settings:
                raise ValueError(f"{given.out} holds runs of other settings; remove it or name another file")
            self.done = kept["runs"]
        self.problem = Problem(given, world)

    def get(self, name, r, rate, seed):
        key = f"{name} r={r} rate={rate:g} seed={seed}"
        if key not in self.done:
            self.done[key] = self.problem.run(name, r, rate, seed)
            print(key, json.dumps(self.done[key]), flush=True)
            self.keep()
        return self.done[key]

    def rate(self, name):
        """The rate of least held-out loss on the tuning seed, with r = 2 (ARD-LoRA: its own)."""
        r = ARD[name]["r"] if name in ARD else 2
        return min(RATES[name], key=lambda rate: self.get(name, r, rate, TUNING_SEED)["loss"])

    def seeds(self, name, r):
        """Means over the seeds of one method at one r."""
        rate = self.rate(name)
        runs = [self.get(name, r, rate, seed) for seed in range(self.given.seeds)]
        losses = [run["loss"] for run in runs]
        return {
            "r": r,
            "rate": rate,
            "loss": statistics.mean(losses),
            "loss_standard_error": statistics.stdev(losses) / math.sqrt(len(losses)),
            "exact_match": statistics.mean(run["exact_match"] for run in runs),
            **{k: round(statistics.mean(run["most"][k] for run in runs)) for k in runs[0]["most"]},
            "numbers_at_the_end": round(statistics.mean(run["last"]["numbers"] for run in runs)),
            "bytes_at_the_end": round(statistics.mean(run["last"]["bytes"] for run in runs)),
        }

    def keep(self):
        if self.given.out:
            result = {"machine": common.machine(), "settings": self.settings, **self.rest, "runs": self.done}
            Path(self.given.out).write_text(json.dumps(result, indent=1) + "\n")


def equal(other, ard):
    """Is the other's mean loss not above ARD-LoRA's by more than one standard error of their difference?"""
    error = math.hypot(other["loss_standard_error"], ard["loss_standard_error"])
    return other["loss"] <= ard["loss"] + error


def main():
    """The base, tuning, ARD-LoRA in both layouts, the others until they are as good."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="the folder of digits_vqa")
    arguments.add_argument("--work", type=Path, required=True, help="for pictures and the base, which is kept")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--rows", type=int, default=4000, help="training rows")
    arguments.add_argument("--largest-r", type=int, default=4)
    arguments.add_argument("--pretrain-steps", type=int, default=1500)
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    train, dev = (write_rows(given.data, given.work, name, n) for name, n in (("train", given.rows), ("dev", None)))
    if not (given.work / "base").exists():
        texts = [row[name] for row in train + dev for name in ("prompt", "completion")]
        make_base(given.work / "base", given.data, texts, given.pretrain_steps)
    runs = Runs(given, common.join_world())
    ards = {layout: runs.seeds(layout, ARD[layout]["r"]) for layout in ARD}
    table = {layout: {"ard_lora": ard} for layout, ard in ards.items()}
    for name in ("lora", "dora", "adalora"):
        tried = {}
        for layout, ard in ards.items():
            r = 1
            while r <= given.largest_r:
                tried[r] = tried.get(r) or runs.seeds(name, r)
                if equal(tried[r], ard):
                    break
                r += 1
            found = tried.get(r)
            ratio = {k: round(ard[k] / found[k], 3) for k in ("bytes", "state", "activations")} if found else None
            table[layout][name] = {"equal_at": found, "ard_lora_beside_it": ratio}
        table[f"{name}_by_r"] = tried
        runs.rest = {"frozen_activations": runs.problem.own_bytes, "table": table}
        runs.keep()
    print(json.dumps(runs.rest, indent=1))


if __name__ == "__main__":
    main()
