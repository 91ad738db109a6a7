"""The allocator's cost per event on up to 1,024 processes: real code for each process's part, a model for the network.

python -m benchmarks.control_plane [--shape 70b] [--r 17.5] [--processes 1 8 64 512 1024] [--out FILE]

What a process computes is run and timed here, in processor seconds of one thread: the scores of its own components
(`Shard` deals ElaLoRA's averages), plan, digest and table, the new layout, the repack of each array into the memory of
the one before (as resize.LiveArena does), and with several processes the zeros with its own part in them that each of
the four gathers sums up. The adapter engine's end and new start are left out. What a process sends is counted and
priced by the alpha-beta model: an all-reduce of n bytes over P processes takes
`2 log2(P) alpha + 2 (P - 1) / P n / beta`, a tree's latency and a ring's bytes.

Sources: beta = 50e9 bytes/s a GPU, one 400 Gb/s port (NVIDIA ConnectX-7 data sheet; DGX H100 has one a GPU); alpha =
5e-6 s a hop, assumed for a kernel launch and a switched InfiniBand hop (ports and switches themselves are below 2 us).
The host's numbers are this machine's: a GPU repacks at the speed of its memory.
"""

import math
import time
from functools import partial

import torch

from ardtrain.arena import ArenaLayout, Shard, Spares
from ardtrain.methods.elalora import reallocate
from ardtrain.methods.sensitivity import component_scores
from ardtrain.ranks import RankTable
from ardtrain.resize import Turn
from benchmarks.common import SHAPES, described, linear_sites, machine, parser, write
from benchmarks.resize import make_method

ALPHA_SECONDS = 5e-6
BETA_BYTES = 50e9
PARTS = 8  # one process's averages are scored in so many pieces, to bound this benchmark's memory


def all_reduce_seconds(num_bytes, processes):
    """The model's time of one all-reduce."""
    if processes == 1:
        return 0.0
    hops = 2 * math.ceil(math.log2(processes)) * ALPHA_SECONDS
    return hops + 2 * (processes - 1) / processes * num_bytes / BETA_BYTES


def seconds(function):
    """(result, processor seconds)."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def score_seconds(layout, processes):
    """Seconds of the slowest of a few processes: the first, the middle and the last."""
    pieces = PARTS if processes == 1 else 1
    chosen = range(pieces) if processes == 1 else sorted({0, processes // 2, processes - 1})
    times = []
    for index in chosen:
        shard = Shard(layout, index, processes * pieces)
        mean, spread = torch.rand(shard.size), torch.rand(shard.size)
        times.append(seconds(lambda s=shard, m=mean, d=spread: component_scores(s, m, d, layout.table.total))[1])
    return sum(times) if processes == 1 else max(times)


def repack_seconds(turn, size):
    """Seconds of repacking the weights, the first moment, the second and one average, each over the one before."""
    names = ("master", "exp_avg", "exp_avg_sq", "average")
    repacks = (turn.master, *(partial(turn.moment, name) for name in names[1:3]), turn.entries)
    found = {}
    for name, repack in zip(names, repacks, strict=True):
        array = Spares().take(size, like=torch.empty(0)).fill_(0.5)  # with room, as a run has it
        _, found[name] = seconds(lambda f=repack, a=array: f(a))
        turn.spares.add(array)
    return found


def filling_seconds(layout, spares, processes):
    """Seconds of what a gather takes of a process before anything is sent: zeros, and its own part put into them."""
    if processes == 1:
        return 0.0
    shard = Shard(layout, processes // 2, processes)
    own = torch.full((shard.size,), 0.5)
    full, took = seconds(lambda: spares.take(layout.size, like=own).zero_())
    _, put = seconds(lambda: shard.put(own, full))
    spares.add(full)
    return took + put


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="70b")
    options.add_argument("--r", type=float, default=17.5)
    options.add_argument("--moved", type=int, default=64)
    options.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64, 512, 1024])
    arguments = options.parse_args()
    torch.set_num_threads(1)
    sites, _ = linear_sites(arguments.shape, r=math.ceil(arguments.r))
    table = RankTable.start(
        sites, [math.floor(arguments.r * (n + 1)) - math.floor(arguments.r * n) for n in range(len(sites))]
    )
    method = make_method(total_steps=100, moved=arguments.moved)
    layout = ArenaLayout(table, method.entries)
    scores = torch.rand(table.total, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    digest = table.digest
    plan, plan_seconds = seconds(lambda: reallocate(table, scores, b=arguments.moved, k=2))
    _, digest_seconds = seconds(lambda: plan.digest)
    turn, turn_seconds = seconds(lambda: Turn(table, layout, plan, method.init, seed=0, step=2))
    repacks = repack_seconds(turn, layout.size)
    num_bytes = 4 * layout.size
    rows = []
    for processes in arguments.processes:
        _, shard_seconds = seconds(lambda n=processes: Shard(turn.layout, n // 2, n))
        computed = {
            "scores": score_seconds(layout, processes), "plan": plan_seconds, "digest": digest_seconds,
            "layout": turn_seconds + shard_seconds, "repack_master": repacks["master"],
            "repack_moments": repacks["exp_avg"] + repacks["exp_avg_sq"], "repack_averages": 2 * repacks["average"],
            "fill_gathers": 4 * filling_seconds(layout, turn.spares, processes),
        }  # fmt: skip
        sent = {
            "scores": all_reduce_seconds(8 * table.total, processes),
            "agree": all_reduce_seconds(8 * 16, processes),
            "gather_moments": 2 * all_reduce_seconds(num_bytes, processes),
            "gather_averages": 2 * all_reduce_seconds(num_bytes, processes),
        }
        total = sum(computed.values()) + sum(sent.values())
        rows.append({"processes": processes, "computed": computed, "sent": sent, "seconds": total})
    first = rows[0]["seconds"]
    result = {
        "benchmark": "control_plane", "machine": machine(), "arguments": described(arguments), "clock": "processor",
        "alpha_seconds": ALPHA_SECONDS, "beta_bytes_per_second": BETA_BYTES, "table": digest[:12],
        "trained_numbers": layout.num_trained, "sites": len(sites), "components": table.total, "events": rows,
        "over_first": {str(r["processes"]): r["seconds"] / first for r in rows},
    }  # fmt: skip
    write(result, arguments.out)


if __name__ == "__main__":
    main()
