"""What a GPU is for: equal bits, steps of an 8B-shaped Llama beside the plan and PEFT, quantised bases, fp16.

python -m benchmarks.gpu bits FOLDER                      every family, ZeRO 0, 3 and 3 with offload, a process each
python -m benchmarks.gpu step FOLDER --variant zero3 [--shape 8b] [--layers 32] [--length 4096] [--grains 2]
python -m benchmarks.gpu fp16 FOLDER [--shape 60m]
python -m benchmarks.gpu join FOLDER --out FILE           all of a folder in one file

Each part writes FOLDER/NAME.json; one start of Python for each variant, so that none holds another's memory. `step`:
LoRA of rank 16 on all linears over random weights, bf16, activation checkpointing, loss in chunks, rows of full length,
a grain of one row; the settings and the engines are a run's, the plan is of the same config. `peft` is PEFT's LoRA in
one ZeRO-3 engine on the same rows. Seconds are of whole optimizer steps, the device's work included: first with
deterministic kernels, as `reproducible: true` has it, then without.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from ardtrain.backbones import enable_checkpointing, quantize_base
from ardtrain.config import RunConfig, with_batch
from ardtrain.deepspeed_config import split_deepspeed, with_deepspeed
from ardtrain.gather_sizes import RULES
from ardtrain.methods.lora import Lora
from ardtrain.planning.hardware import Machine, find_gpu
from ardtrain.planning.plan import make_plan
from ardtrain.planning.seconds import grain_flops
from ardtrain.planning.shapes import read_shapes
from ardtrain.schedule import LOSS_SCALE_START
from benchmarks import plan_check
from benchmarks.common import SHAPES, described, join_world, llama_config, machine, parser, random_llama, summary, timed
from benchmarks.plan_check import FullRows
from tests.distributed import matrix
from tests.tiny import TokenBatches, tiny_trainer

PEAK_FLOPS = 989e12  # datasheet, H100 and H200 SXM, bf16 dense
WARM_UP = 2
FAMILIES = ("fp32", "bf16", "dora", "own_a", "alora", "int8")
WAYS = {"zero0": {}, "zero3": {"stage": 3}, "zero3_offload": {"stage": 3, "offload_param": "cpu"}}
AUTO = {name: "auto" for name in RULES if name.startswith("stage3_")}
ZERO3 = {"stage": 3, **AUTO}
OFFLOAD = {"offload_param": {"device": "cpu", "pin_memory": True}}
VARIANTS = {
    # name: changes of the config
    "zero0": {"deepspeed": {"zero_optimization": {"stage": 0}}},
    "zero0_kept": {"deepspeed": {"zero_optimization": {"stage": 0}}, "gradient_checkpointing": False},
    "zero3": {"deepspeed": {"zero_optimization": ZERO3}},
    "zero3_offload": {"deepspeed": {"zero_optimization": {**ZERO3, **OFFLOAD}}},
    "int8": {"deepspeed": {"zero_optimization": {"stage": 0}}, "quantization": "int8"},
    "nf4": {"deepspeed": {"zero_optimization": {"stage": 0}}, "quantization": "nf4"},
}


def keep(arguments, name, result):
    """Prints a part's result and writes it to the folder."""
    result = {"machine": machine(), "arguments": described(arguments), **result}
    result["arguments"].pop("folder")
    path = Path(arguments.folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"part": name, **result}), flush=True)


def process(folder, name, *, device, world_size=1, global_rank=0, port=0, gloo=False):
    """Starts the matrix of equal bits on FOLDER/NAME.cases.json; every process takes the first GPU."""
    place = {"RANK": global_rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | {k: str(v) for k, v in {**place, "MASTER_PORT": port}.items()}
    files = [str(folder / f"{name}.cases.json"), str(folder / f"{name}.bits.json"), device]
    start = f"from benchmarks.gpu import matrix_on; matrix_on({files!r}, gloo={gloo})"
    log = (folder / f"{name}.{global_rank}.log").open("w")
    return subprocess.Popen([sys.executable, "-c", start], env=environment, stdout=log, stderr=log)


def matrix_on(files, *, gloo):
    """The matrix in this process. gloo: for tensors of the GPU too, which NCCL refuses to two processes on one GPU."""
    honest = torch.distributed.init_process_group

    def init(backend, **named):
        return honest("cpu:gloo,cuda:gloo" if gloo else backend, **named)

    with mock.patch("torch.distributed.init_process_group", init):
        matrix.main(*files)


def bits(arguments):
    """Families in processes of their own, all at once; then pairs of processes on the one GPU, with NCCL and gloo."""
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    port = 29500
    started = {}
    for family in arguments.family:
        cases = {way: {"family": family, **changes} for way, changes in WAYS.items()}
        (folder / f"{family}.cases.json").write_text(json.dumps(cases))
        started[family] = [process(folder, family, device=device, port=(port := port + 1))]
    if arguments.pairs:
        pair = {way: {"family": "fp32", **WAYS[way]} for way in ("zero0", "zero3")}
        for name, gloo in (("pair_gloo", True), ("pair_nccl", False)):
            (folder / f"{name}.cases.json").write_text(json.dumps(pair))
            port += 1
            started[name] = [
                process(folder, name, device=device, world_size=2, global_rank=rank, port=port, gloo=gloo)
                for rank in (0, 1)
            ]
    end = time.monotonic() + arguments.seconds
    found = {}
    for name, processes in started.items():
        codes = []
        for one in processes:
            try:
                codes.append(one.wait(max(1.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                one.kill()
                codes.append("timeout")
        path = folder / f"{name}.bits.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
        else:
            logs = [(folder / f"{name}.{rank}.log").read_text().splitlines() for rank in range(len(processes))]
            telling = ("Error", "error:", "Duplicate", " s ")  # not the stack with its paths
            ends = ["\n".join(x for x in lines if any(t in x for t in telling))[-2000:] for lines in logs]
            found[name] = {"exit_codes": codes, "ends_of_logs": ends}
    keep(arguments, "bits", {"benchmark": "gpu_bits", "families": compared(found)})


def compared(found):
    """For each family: is everything that must be equal equal? Of a pair: to one process's fp32 run."""
    out = {}
    for name, cases in found.items():
        if "exit_codes" in cases:
            out[name] = cases
            continue
        base = found.get("fp32", {}).get("zero0") if name.startswith("pair") else cases["zero0"]
        out[name] = {
            way: {
                **{k: None if base is None else case[k] == base[k] for k in ("losses", "tables", "held_out", "final")},
                "steps": len(case["losses"]), "resizes": case["events"], "seconds": round(case["seconds"], 1),
                "final_digest": case["final"][:16], "last_loss": float.fromhex(list(case["losses"].values())[-1]),
            }
            for way, case in cases.items()
        }  # fmt: skip
    return out


def config_of(arguments, folder, **changes):
    """The run's RunConfig; its model is a folder with config.json alone."""
    config = llama_config(arguments.shape)
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    config.max_position_embeddings = max(arguments.length, config.max_position_embeddings)
    config.save_pretrained(folder)
    values = {
        "model_name_or_path": str(folder), "method": "lora", "r": 16, "data": {"train_file": "none.jsonl"},
        "output_dir": "runs/none", "max_steps": 1000, "max_length": arguments.length, "bf16": True,
        "gradient_checkpointing": True, "per_device_train_batch_size": 1, "global_batch_size": arguments.grains,
        **changes,
    }  # fmt: skip
    return with_batch(with_deepspeed(RunConfig.model_validate(values)), 1)


def random_base(config, device):
    """The frozen model of a config, random, in bf16, made on the device."""
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(AutoConfig.from_pretrained(config.model_name_or_path))
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    return model.requires_grad_(False)


def measure(step, arguments, device):
    """Seconds, and the peak of one step; deterministic kernels, then others."""
    cuda = device.type == "cuda"
    losses, out = [], {}
    for kind in arguments.kernels:
        torch.use_deterministic_algorithms(kind == "deterministic")
        for _ in range(WARM_UP if kind == "deterministic" else 1):
            losses.append(step())
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = [timed(lambda: losses.append(step()), device) for _ in range(arguments.steps)]
        out[kind] = {"step_seconds": summary(seconds)}
        if cuda:
            free, total = torch.cuda.mem_get_info()
            out[kind] |= {
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
                "device_in_use_at_end": total - free,
            }  # the last: of all of the card, with CUDA's context
    torch.use_deterministic_algorithms(False)
    return {**out, "losses": losses}


def rates(arguments, seconds, weights, attention):
    """Tokens a second and the share of the datasheet's operations: by 4 N, and with attention's 3.5 forward passes."""
    tokens = arguments.grains * arguments.length
    return {
        "tokens_per_second": tokens / seconds,
        "mfu_4n": 4.0 * weights * tokens / seconds / PEAK_FLOPS,
        "mfu_4n_and_attention": (4.0 * weights * tokens + arguments.grains * attention) / seconds / PEAK_FLOPS,
    }


def step(arguments):
    """One variant's seconds and memory, beside the plan of the same config."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    world = join_world()
    peft = arguments.variant.startswith("peft")
    with tempfile.TemporaryDirectory() as folder:
        changes = VARIANTS["zero3" if peft else arguments.variant]
        config = config_of(arguments, folder, **changes)
        shapes = read_shapes(config)
        engines = split_deepspeed(config, world_size=1, trainable_numbers=shapes.num_trained, sizes=shapes.shape.sizes)
        start = time.perf_counter()
        model = random_base(config, world.device)
        weights, flops = shapes.matmul_numbers, grain_flops(shapes, rows=1, length=arguments.length)
        if peft:
            one, trained = peft_step(arguments, world, config, engines, model)
            result = {}
        else:
            if config.quantization is not None:
                quantize_base(model, config.quantization)
            trainer = plan_check.build(config, shapes, engines, world, model)
            trained = trainer.arena.layout.num_trained
            planned = make_plan(config, Machine(find_gpu(arguments.card), 1, 1))
            result = {"planned": plan_of(planned)}

            def one():
                return trainer.train_step().loss

    built = time.perf_counter() - start
    measured = measure(one, arguments, world.device)
    for kind in arguments.kernels:
        measured[kind] |= rates(arguments, measured[kind]["step_seconds"]["median"], weights, flops["attention"])
    keep(arguments, f"step_{arguments.variant}", {
        "benchmark": "gpu_step", "trained_numbers": trained, "weights_in_products": weights,
        "attention_flops_a_row": flops["attention"], "build_seconds": built, **measured, **result,
    })  # fmt: skip
    world.leave()


def plan_of(plan):
    """The plan's numbers for the same config: bytes by cause, seconds by cause, tokens a second."""
    s = plan.seconds
    worst = max(plan.memory.device, key=lambda phase: sum(plan.memory.device[phase].values()))
    return {
        "device_bytes": plan.memory.device_bytes, "phase": worst, "device_by_cause": plan.memory.device[worst],
        "step_seconds": s.step_seconds, "overlapped_step_seconds": s.overlapped_step, "seconds_by_cause": dict(s.step),
        "tokens_per_second": [s.tokens_per_second(s.step_seconds), s.tokens_per_second(s.overlapped_step)],
    }  # fmt: skip


def peft_step(arguments, world, config, engines, model):
    """PEFT's LoRA in one ZeRO-3 engine: adapters in bf16, float32 masters in the engine, logits whole."""
    import deepspeed
    from peft import LoraConfig, get_peft_model

    if config.gradient_checkpointing:
        enable_checkpointing(model, offload=False, device=world.device)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    settings = dict(engines.backbone)
    settings |= {
        "train_batch_size": arguments.grains, "gradient_accumulation_steps": arguments.grains,
        "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=world.device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=settings)
    data = FullRows(num_grains=arguments.grains, rows=1, length=arguments.length, vocab=SHAPES[arguments.shape][5])
    engine.train()
    device, count = world.device, 0

    def one():
        nonlocal count
        total = 0.0
        for grain in data.grains(count):
            batch = data.collate(grain)
            logits = engine(
                input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device).long(),
                position_ids=batch.position_ids.to(device), use_cache=False,
            ).logits  # fmt: skip
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten().to(device))
            del logits
            engine.backward(loss)
            engine.step()
            total = total + loss.detach()
        count += 1
        return float(total) / arguments.grains

    return one, sum(getattr(p, "ds_numel", p.numel()) for p in trained)


def fp16(arguments):
    """Losses of fp32, bf16 and fp16 over the same rows; fp16 from the usual loss scale and from one far too high."""
    world = join_world()
    result = {}
    for name, dtype, scale in (
        ("fp32", torch.float32, 1.0), ("bf16", torch.bfloat16, 1.0), ("fp16", torch.float16, LOSS_SCALE_START),
        ("fp16_scale_too_high", torch.float16, 2.0**40),
    ):  # fmt: skip
        data = TokenBatches(num_grains=2, rows=2, length=256, vocab=SHAPES[arguments.shape][5])
        model = random_llama(arguments.shape, dtype=dtype, device=world.device)
        trainer = tiny_trainer(
            Lora(), world=world, model=model, data=data, r=8, total_steps=10**4, warmup_steps=0, learning_rate=1e-3,
            compute_dtype=dtype,
        )  # fmt: skip
        trainer.state.loss_scale = scale
        results = [trainer.train_step() for _ in range(arguments.fp16_steps)]
        result[name] = {
            "losses": [r.loss for r in results], "grad_norms": [r.grad_norm for r in results],
            "void_steps": sum(r.void for r in results), "loss_scale": [scale, trainer.state.loss_scale],
        }  # fmt: skip
        trainer.arena.engine.destroy()
        del trainer, model
        gc.collect()
    keep(arguments, "fp16", {"benchmark": "gpu_fp16", **result})
    world.leave()


def join(arguments):
    """All parts of a folder in one file."""
    parts = {p.stem: json.loads(p.read_text()) for p in sorted(Path(arguments.folder).glob("*.json"))
             if not p.name.endswith((".cases.json", ".bits.json"))}  # fmt: skip
    Path(arguments.out).write_text(json.dumps({"benchmark": "gpu", "parts": parts}, indent=1) + "\n")


def main():
    """Runs one part."""
    options = parser(__doc__)
    options.add_argument("part", choices=("bits", "step", "fp16", "join"))
    options.add_argument("folder", help="where results go")
    options.add_argument("--variant", choices=(*VARIANTS, "peft"), default="zero0")
    options.add_argument("--card", default="h100", help="of the plan")
    options.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    options.add_argument("--layers", type=int, help="instead of the shape's")
    options.add_argument("--length", type=int, default=4096)
    options.add_argument("--grains", type=int, default=2)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--kernels", nargs="*", choices=("deterministic", "free"), default=["deterministic", "free"])
    options.add_argument("--fp16-steps", type=int, default=30)
    options.add_argument("--family", nargs="*", default=list(FAMILIES))
    options.add_argument("--pairs", action="store_true", help="bits: two processes on one GPU as well")
    options.add_argument("--seconds", type=float, default=600.0, help="bits: limit")
    arguments = options.parse_args()
    if torch.cuda.is_available():  # as a run has it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    {"bits": bits, "step": step, "fp16": fp16, "join": join}[arguments.part](arguments)


if __name__ == "__main__":
    main()
