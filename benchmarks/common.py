"""What benchmarks share: random Llamas of a given shape, a world, the machine's description, JSON results."""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import socket
import statistics
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM

from ardtrain.collectives import World
from ardtrain.engines import start_deepspeed
from ardtrain.targets import find_sites

SHAPES = {
    # hidden, layers, heads, kv heads, mlp, vocabulary
    "64x32": (64, 32, 4, 2, 176, 512),  # many small layers
    "256x8": (256, 8, 8, 4, 688, 2048),
    "768x4": (768, 4, 12, 4, 2304, 16000),
    "60m": (512, 12, 8, 8, 1408, 32000),
    "320x6": (320, 6, 5, 5, 1000, 6000),
    "448x10": (448, 10, 7, 7, 1216, 1500),
    "640x3": (640, 3, 10, 2, 1700, 32000),
    "4096x2": (4096, 2, 32, 8, 14336, 2048),  # two layers of an 8B model's width, few words
    "4096x4": (4096, 4, 32, 8, 14336, 2048),  # four layers of an 8B model's width, few words
    "8b-layer": (4096, 1, 32, 8, 14336, 128256),  # an 8B model's width, one layer deep
    "8b": (4096, 32, 32, 8, 14336, 128256),
    "70b": (8192, 80, 64, 8, 28672, 128256),
}


def llama_config(shape):
    """The config of a Llama of a named shape, tied embeddings below 1B."""
    hidden, layers, heads, kv_heads, mlp, vocab = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=hidden < 4096, use_cache=False,
    )  # fmt: skip


def random_llama(shape, *, dtype, device="cpu"):
    """A frozen random Llama of a named shape; on the meta device it has no numbers."""
    config = llama_config(shape)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def linear_sites(shape, *, r):
    """All linear sites of a Llama of a named shape and r for each, without its weights."""
    model = random_llama(shape, dtype=torch.bfloat16, device="meta")
    return find_sites(
        model, target_modules="all-linear", exclude_modules=None, r=r, lora_alpha=2.0 * r, tower_settings={}
    )


def peak_bytes():
    """Most resident memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def join_world():
    """The World of this process by torch's variables, or alone; DeepSpeed started."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World.join(global_rank=rank, world_size=size, device=device, timeout_seconds=600)
    start_deepspeed(device)
    return world


def timed(function, device):
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summary(values):
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def machine():
    """Where and with what the figures came about."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("torch", "deepspeed", "transformers", "peft")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
    }


def described(arguments):
    """The command line's settings without this machine's paths."""
    values = vars(arguments) | {"out": None}
    return {k: Path(v).name if k in ("model", "data") and v else v for k, v in values.items() if v is not None}


def write(result, out):
    """Prints the result as JSON and keeps it in `out` if one is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text + "\n")


def parser(description):
    """An argument parser with --out."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", help="JSON file to keep the result in (benchmarks/results/...)")
    return made


class LiveBytes(TorchDispatchMode):
    """While open, counts the bytes of the storages that operations make: `live` now, `peak` at most.

    On any device, and by the storages' own lifetime. What was made before it was opened is not counted, nor is what a
    kernel takes and gives back inside.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        own = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta or id(tensor.untyped_storage()) in own:
                continue
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, size):
        self.live -= size
