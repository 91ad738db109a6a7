"""Every constant of hardware and every fitted number of the plan, each with its source. Nothing else holds any.

"Datasheet" is the maker's; bytes are decimal there (80 GB = 80e9), and cards hold a little more. `deepspeed.md` and
`peers.md` are the project's notes on DeepSpeed and on other trainers; `benchmarks/results/` are measurements.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from ardtrain.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator and the node it usually stands in.

    memory_bytes: None: not limited (cpu). flops: dense bf16 a second; None: no times. hbm, peer, host: bytes
    a second of its memory, to the node's other GPUs in one direction, and from the host's memory in one direction.
    network: bytes a second in one direction between nodes, all of a node's adapters together. per_node: GPUs of a node.
    node_host_bytes: memory of the host. source: of all of them.
    """

    name: str
    memory_bytes: int | None
    flops: float | None
    hbm: float
    peer: float
    host: float
    network: float
    per_node: int
    node_host_bytes: int
    source: str


_GPUS = (
    Gpu("h100", 80 * 10**9, 989e12, 3.35e12, 450e9, 64e9, 400e9, 8, 2 * 10**12,
        "NVIDIA H100 SXM datasheet (80 GB, 989 TFLOPS bf16 dense, 3.35 TB/s, NVLink 900 GB/s in two directions, PCIe "
        "5.0 x16); DGX H100 datasheet (8 GPUs, 2 TB, 8 adapters of 400 Gb/s)"),
    Gpu("h100-pcie", 80 * 10**9, 756e12, 2.0e12, 64e9, 64e9, 50e9, 8, 10**12,
        "NVIDIA H100 PCIe datasheet (80 GB, 756 TFLOPS bf16 dense, 2 TB/s, PCIe 5.0 x16); host and network assumed"),
    Gpu("h200", 141 * 10**9, 989e12, 4.8e12, 450e9, 64e9, 400e9, 8, 2 * 10**12,
        "NVIDIA H200 SXM datasheet (141 GB, 989 TFLOPS bf16 dense, 4.8 TB/s, NVLink 900 GB/s); DGX H200 datasheet"),
    Gpu("a100-80", 80 * 10**9, 312e12, 2.039e12, 300e9, 32e9, 200e9, 8, 2 * 10**12,
        "NVIDIA A100 80GB SXM datasheet (312 TFLOPS bf16 dense, 2,039 GB/s, NVLink 600 GB/s, PCIe 4.0 x16); DGX A100 "
        "640GB datasheet (8 GPUs, 2 TB, 8 adapters of 200 Gb/s)"),
    Gpu("a100-40", 40 * 10**9, 312e12, 1.555e12, 300e9, 32e9, 200e9, 8, 10**12,
        "NVIDIA A100 40GB SXM datasheet (1,555 GB/s, else as the 80 GB card); DGX A100 320GB datasheet (1 TB)"),
    Gpu("l40s", 48 * 10**9, 362e12, 0.864e12, 32e9, 32e9, 50e9, 8, 10**12,
        "NVIDIA L40S datasheet (48 GB, 362 TFLOPS bf16 dense, 864 GB/s, PCIe 4.0 x16, no NVLink); host and network "
        "assumed"),
    Gpu("b200", 180 * 10**9, 2250e12, 8.0e12, 900e9, 64e9, 400e9, 8, 2 * 10**12,
        "NVIDIA DGX B200 datasheet (1,440 GB over 8 GPUs, 2.25 PFLOPS bf16 dense each, 8 TB/s, NVLink 1.8 TB/s in two "
        "directions, 8 adapters of 400 Gb/s); host memory 2 TB"),
    Gpu("cpu", None, None, 50e9, 10e9, 10e9, 1e9, 1, 64 * 10**9,
        "no accelerator: memory is planned, times are not"),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _GPUS}


@dataclass(frozen=True)
class Constant:
    """A number and where it is from. assumed: nobody measured it for us."""

    value: float
    unit: str
    source: str
    assumed: bool = False


CONSTANTS = {
    "compute_fraction": Constant(
        0.41, "of the datasheet's FLOP/s",
        "peers.md 3C: Automodel, Llama-3-8B LoRA, sequence 4096, one H100: 402 of 989 TFLOP/s, counted as 4 N"),
    "peer_fraction": Constant(
        0.70, "of the link's bytes/s",
        "deepspeed.md 9: an all-reduce of 1.8 GB in 10 ms on one node of eight H100, 315 of 450 GB/s"),
    "network_fraction": Constant(
        0.84, "of the adapters' bytes/s",
        "deepspeed.md 9: the same over two nodes with one adapter of 400 Gb/s in 80 ms, 42 of 50 GB/s"),
    "host_link_fraction": Constant(
        0.78, "of PCIe's bytes/s", "peers.md 3D: 50 GB/s from the host's memory, of PCIe 5.0's 64"),
    "nvme_read": Constant(
        6.0e9, "bytes/s of a node", "one PCIe 4.0 x4 disk; datasheets of the time say 6.8 to 7.4 GB/s", assumed=True),
    "dequantise_bytes": Constant(
        15.0, "bytes of memory traffic a weight", "counted from the operations of quantized.dequantize_int8 in bf16"),
    "host_memory": Constant(
        20.0e9, "bytes/s a process", "the host's share of memory for one process's AdamW", assumed=True),
    "hook_call": Constant(
        214.99e-6, "seconds a call", "benchmarks/results/zero_hooks.json, hooks.seconds_a_call (one process, a CPU's)"),
    "hook_weight": Constant(
        76.34e-6, "seconds a weight", "benchmarks/results/zero_hooks.json, hooks.seconds_a_weight (the same)"),
    "hook_factor": Constant(
        2.017, "of the CPU's seconds",
        "fitted to benchmarks/results/gpu_h200.json: step_zero3 less step_zero0, 1.33 s a step of two grains, when "
        "hooks stood around every module; one process, so nothing is gathered over a wire"),
    "attention_backward": Constant(
        2.5, "forward's operations", "FlashAttention-2 (arXiv 2307.08691), section 4.1: 5 products against 2"),
    "context_bytes": Constant(
        1.5 * GIB, "bytes a GPU", "CUDA context, cuBLAS workspaces and NCCL's buffers", assumed=True),
    "slack_fraction": Constant(
        0.05, "of what a grain allocates", "fragments of the caching allocator", assumed=True),
    "reading_bytes": Constant(
        1.0 * GIB, "bytes a process", "issue 7: slice + largest module + 1 GiB is the goal of loading", assumed=True),
    "process_host_bytes": Constant(
        3.0 * GIB, "bytes a process", "Python, torch and CUDA libraries on the host", assumed=True),
    "resize_seconds": Constant(
        1.9511, "seconds", "benchmarks/results/resize_70b.json, resize_seconds.median (a CPU's), of so many numbers:"),
    "resize_numbers": Constant(
        226788936, "trained numbers", "benchmarks/results/resize_70b.json, trained_numbers"),
    "save_seconds": Constant(
        2.7826, "seconds", "benchmarks/results/checkpoint_stall.json, stall_seconds.median, of so many numbers:"),
    "save_numbers": Constant(
        60006492, "trained numbers", "benchmarks/results/checkpoint_stall.json, trained_numbers"),
}  # fmt: skip


def constant(name: str) -> float:
    """A number of the table."""
    return CONSTANTS[name].value


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: `nodes` hosts of `gpus_per_node` GPUs, a process a GPU."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def larger(self) -> Machine:
        """Twice as many GPUs: in the node up to what it holds, then more nodes."""
        if self.gpus_per_node * 2 <= self.gpu.per_node and self.nodes == 1:
            return replace(self, gpus_per_node=self.gpus_per_node * 2)
        return replace(self, nodes=self.nodes * 2)


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError: unknown, with the nearest name."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError([f"--gpu {name} is unknown; {hint}write one of {', '.join(GPUS)}"])


# Words of a device's name by CUDA -> the card; the first that all stand in the name.
_DEVICES = (
    (("H100", "PCIe"), "h100-pcie"),
    (("H100", "NVL"), None),  # another card
    (("H100",), "h100"),
    (("H200",), "h200"),
    (("A100", "80GB"), "a100-80"),
    (("A100", "40GB"), "a100-40"),
    (("L40S",), "l40s"),
    (("B200",), "b200"),
)


def gpu_of_device(name: str) -> Gpu | None:
    """The card that CUDA calls so (`NVIDIA H100 80GB HBM3`); None for one that is not in the table."""
    found = next((card for words, card in _DEVICES if all(word in name for word in words)), None)
    return None if found is None or "GB200" in name else GPUS[found]


def machine_of(gpu: str, *, gpus: int | None, nodes: int | None, host_gib: float | None = None) -> Machine:
    """A machine by the command line's numbers; gpus: of all nodes together, default one node's.

    Raises:
        ConfigError: GPUs that do not divide over the nodes, or that a node cannot hold.
    """
    card = find_gpu(gpu)
    if host_gib is not None:
        card = replace(card, node_host_bytes=int(host_gib * GIB))
    for name, count in (("gpus", gpus), ("nodes", nodes)):
        if count is not None and count < 1:
            raise ConfigError([f"--{name} {count} must be 1 or more; correct it"])
    if nodes is None:
        nodes = 1 if gpus is None or card.name == "cpu" else -(-gpus // card.per_node)
    if gpus is None:
        gpus = nodes * card.per_node
    if gpus % nodes:
        raise ConfigError(
            [f"--gpus {gpus} is the number of all GPUs and does not divide over --nodes {nodes}; correct one of them"]
        )
    return Machine(card, nodes, gpus // nodes)
