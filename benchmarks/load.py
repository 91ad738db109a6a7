"""Loading a sharded base: our own reader against transformers' ZeRO-3 loading, bytes, seconds and peak memory.

python -m benchmarks.load [--processes 1 2 4] [--repeats 3] [--layers 10] [--folder DIR] [--out FILE]

A random bf16 Llama (hidden 2048) is saved in shards into a temporary folder; both ways then load it under ZeRO-3 in
turns, each in fresh processes, until DeepSpeed's engine stands: transformers as its users do it (from_pretrained under
an HfDeepSpeedConfig), ours as a run does it. The files are in the page cache for both.

bytes: ours are counted where they are read; `rchar` is what the kernel counts of read calls of the processes during the
load, which does not see memory maps, and transformers' process 0 maps the files. memory: the largest process's peak
above what it had before its first load; `peak` is the kernel's own (VmHWM, pages of mapped files included), `anonymous`
without those, sampled every 2 ms. seconds: from a barrier until the last process is done. `goal`: slice + largest
module + 1 GiB. `max_logit_difference`: between the two ways.
"""

import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ardtrain.backbones import ModelSource
from ardtrain.engines import BackboneEngine
from ardtrain.opening import open_model
from benchmarks.common import described, join_world, machine, parser, summary, write

GIB = 2**30


def make_checkpoint(folder, layers):
    """The synthetic base; its bytes and its largest module's."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="250MB")
    largest = max(p.nbytes for p in model.parameters())
    return sum(p.nbytes for p in model.parameters()), largest


def zero3(world):
    """The backbone's DeepSpeed config."""
    return {
        "train_batch_size": world.world_size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


class Ours:
    """As a run loads its base."""

    def __init__(self, folder, world):
        self.opened = open_model(ModelSource(folder), compute_dtype="bf16")
        config = zero3(world)
        self.engine = BackboneEngine(
            self.opened.model, stage=3, config=config, device=world.device, weights=self.opened.weights
        )
        self.model, self.counted = self.opened.model, self.opened.shards.bytes_read

    def destroy(self):
        self.engine.destroy()


class Transformers:
    """As transformers' users load a model under ZeRO-3."""

    counted = None

    def __init__(self, folder, world):
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        from ardtrain.engines import quiet

        config = zero3(world)
        self.kept = HfDeepSpeedConfig(config)  # from_pretrained looks for it while it lives
        with quiet():
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
            self.engine, *_ = deepspeed.initialize(model=self.model, config=config)

    def destroy(self):
        self.engine.destroy()


def status(*fields):
    """Bytes of fields of /proc/self/status, added up."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(lines[field].split()[0]) * 1024 for field in fields)


def rchar():
    """Bytes this process asked the kernel to read so far."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


class Peaks:
    """Peak memory of this process while it is open, above what it had."""

    def __enter__(self):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.before = status("VmRSS"), status("RssAnon", "RssShmem")
        self.anonymous, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while not self.stop.wait(0.002):
            self.anonymous = max(self.anonymous, status("RssAnon", "RssShmem") - self.before[1])

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.peak = status("VmHWM") - self.before[0]


def child(way, folder, repeats, out):
    """Loads `repeats` times and writes what it cost; the first load is the one whose memory counts."""
    world = join_world()
    results = []
    for number in range(repeats):
        world.barrier("before loading")
        read = rchar()
        with Peaks() as peaks:
            start = time.perf_counter()
            base = way(folder, world)
            world.barrier("loaded")
            seconds = time.perf_counter() - start
        results.append({"seconds": seconds, "rchar": rchar() - read, "bytes": base.counted,
                        "peak": peaks.peak, "anonymous": peaks.anonymous})  # fmt: skip
        if number + 1 == repeats:
            with torch.no_grad():
                logits = base.model.eval()(input_ids=torch.arange(1, 33)[None], use_cache=False).logits
            if world.is_main:
                torch.save(logits, Path(out).with_suffix(".logits"))
        base.destroy()
        del base
        gc.collect()
    Path(out).write_text(json.dumps(results))
    world.leave()


def measured(way, count, folder, repeats):
    """One way on `count` fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outs = [Path(folder).parent / f"{way}-{count}-{i}.json" for i in range(count)]
    running = []
    for i, out in enumerate(outs):
        own = {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        command = [sys.executable, "-m", "benchmarks.load", "--child", way, str(folder), str(repeats), str(out)]
        environment = os.environ | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(subprocess.Popen(command, env=environment))
    assert [process.wait() for process in running] == [0] * count
    by_process = [json.loads(out.read_text()) for out in outs]
    firsts = [results[0] for results in by_process]
    seconds = [max(results[n]["seconds"] for results in by_process) for n in range(repeats)]
    read = None if firsts[0]["bytes"] is None else sum(first["bytes"] for first in firsts)
    return {
        "seconds": summary(seconds),
        "bytes_read": read,
        "rchar": sum(first["rchar"] for first in firsts),
        "peak_gib": round(max(first["peak"] for first in firsts) / GIB, 3),
        "anonymous_gib": round(max(first["anonymous"] for first in firsts) / GIB, 3),
    }, torch.load(outs[0].with_suffix(".logits"))


def main():
    """Measures and prints."""
    if sys.argv[1:2] == ["--child"]:
        way, folder, repeats, out = sys.argv[2:]
        child({"ours": Ours, "transformers": Transformers}[way], folder, int(repeats), out)
        return
    options = parser(__doc__)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--layers", type=int, default=10)
    options.add_argument("--folder", help="where the checkpoint goes (default: a temporary folder)")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as parent:
        folder = Path(parent) / "base"
        stored, largest = make_checkpoint(folder, arguments.layers)
        runs = {}
        for count in arguments.processes:
            start = time.perf_counter()
            ours, our_logits = measured("ours", count, folder, arguments.repeats)
            theirs, their_logits = measured("transformers", count, folder, arguments.repeats)
            goal = stored / count + largest + GIB
            runs[str(count)] = {
                "ours": ours,
                "transformers": theirs,
                "bytes_read_to_stored": round(ours["bytes_read"] / stored, 5),
                "goal_gib": round(goal / GIB, 3),
                "within_goal": ours["peak_gib"] * GIB <= goal,
                "max_logit_difference": float((our_logits.float() - their_logits.float()).abs().max()),
            }
            print(f"{count} processes: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    write(
        {"benchmark": "load", "machine": machine(), "settings": described(arguments), "stored_bytes": stored,
         "largest_module_bytes": largest, "processes": runs}, arguments.out
    )  # fmt: skip


if __name__ == "__main__":
    main()
