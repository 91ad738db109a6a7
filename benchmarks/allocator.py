"""What one decision costs at 70B with a rank for each head: plan, check, digests, layout and record, for each method.

python -m benchmarks.allocator [--shape 70b] [--r 7.823] [--repeats 7] [--out FILE]

Sites come from the model's shapes (a site a head, and one for each matrix of the feed-forward part), scores are random;
nothing is trained. `plan_seconds` is all that is done between the scores and the new rank table: the method's plan,
its digest, its check, the table after it and that table's digest. `cpu_seconds` is the same in processor time, which
says more on a busy machine. A rank of 7.823 is 7 and 8 in turns.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch

from ardtrain.arena import ArenaLayout, Repacking, Shard
from ardtrain.heads import find_heads, split_heads
from ardtrain.methods.adalora import AdaLora, AdaLoraSettings
from ardtrain.methods.alora import Alora, AloraSettings
from ardtrain.methods.ard_lora import ArdLora, ArdLoraSettings
from ardtrain.methods.base import Binding
from ardtrain.methods.elalora import ElaLora, ElaLoraSettings
from ardtrain.observe import RunLog
from ardtrain.ranks import RankTable
from ardtrain.records import Records
from ardtrain.resize import ResizeRecord, no_collection
from ardtrain.trainer import Event
from benchmarks.common import SHAPES, described, linear_sites, llama_config, machine, parser, summary, write

STEP = 20


def per_head_table(shape, r):
    """A table of all heads and feed-forward matrices, of average rank r."""
    sites, ranks = linear_sites(shape, r=math.ceil(r))
    heads = find_heads(sites, {"language": llama_config(shape)})
    sites, _ = split_heads(sites, ranks, heads)
    ranks = [math.floor(r * (n + 1)) - math.floor(r * n) for n in range(len(sites))]
    return RankTable.start(sites, ranks)


def methods(table):
    """Name -> (method whose plan at STEP moves ranks, the event's name)."""
    sensitivity = {"beta1": 0.85, "beta2": 0.85, "reg_orth_form": "mean_norm"}
    moved = len(table.sites) // 20
    elalora = ElaLoraSettings(
        total_steps=100, b=moved, k=2, init_warmup=1, final_warmup=1, mask_interval=1, enable_scheduler=False,
        reg_orth_coef=0.1, allow_swap=True, newborn_immunity=False, newborn_norm="mean", **sensitivity,
    )  # fmt: skip
    adalora = AdaLoraSettings(
        total_steps=100, target_r=4, tinit=1, tfinal=10, deltaT=1, orth_reg_weight=0.1, compact="end", **sensitivity
    )
    ard = ArdLoraSettings(
        total_steps=100, init_warmup=STEP, final_warmup=10, tie="none", mask="ramp", ramp_width=1.0,
        sigmoid_tau=(1.0, 0.1), lr_alpha=0.01, alpha_scale="rms", alpha_interval=1, resize_interval=1, meta_interval=0,
        l1=0.0, l1_max=10.0, tv_form="temporal", beta=0.1, target_r=4.0, controller_rate=0.1, budget_in="components",
        r_max=None, capacities=None,
    )  # fmt: skip
    alora = AloraSettings(total_steps=100, k1=1, k2=1, rounds=50, n_a=moved)
    return {
        "elalora": ElaLora(elalora),
        "adalora": AdaLora(adalora),
        "alora": Alora(alora),
        "ard_lora": ArdLora(ard, table),
        "ard_lora_freeze": ArdLora(replace(ard, total_steps=STEP + 11), table),
    }


def bound(method, table, generator):
    """The method over this table, with alphas between 0.5 and 1.5 where it has them."""
    layout = ArenaLayout(table, method.entries)
    kinds = method.state_tensors()
    sizes = {
        name: kind if isinstance(kind, int) else table.total for name, kind in kinds.items() if kind != "per_entry"
    }
    state = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    if "alpha" in state:
        state["alpha"].uniform_(0.5, 1.5, generator=generator)
    method.bind(Binding(table, Shard(layout, 0, 1), torch.zeros(table.total, dtype=torch.int64), state))
    return layout


def one(name, table, repeats):
    """Seconds of one decision's parts."""
    generator = torch.Generator().manual_seed(0)
    parts = {"plan": [], "cpu": [], "layout": [], "record": []}
    for _ in range(repeats):
        fresh = RankTable.of(table.sites, table.births, table.next_birth)
        assert fresh.digest  # the run has it from the event before
        method = methods(fresh)[name]
        layout = bound(method, fresh, generator)
        scores = torch.rand(fresh.total, dtype=torch.float64, generator=generator)
        start, start_cpu = time.perf_counter(), time.process_time()
        with no_collection():  # as the trainer
            plan = method.plan(STEP, scores)
            assert plan.digest
            reshapes = plan.reshapes(fresh)
            after = plan.apply(fresh)
            assert after.digest
        parts["plan"].append(time.perf_counter() - start)
        parts["cpu"].append(time.process_time() - start_cpu)
        if reshapes:
            start = time.process_time()
            new = ArenaLayout(after, method.entries)
            Repacking(layout, new)
            Shard(new, 0, 8)
            parts["layout"].append(time.process_time() - start)
        parts["record"].append(record_seconds(ResizeRecord(fresh, after, plan, {}), scores))
    return {
        "plan_seconds": summary(parts["plan"]), "cpu_seconds": summary(parts["cpu"]),
        "layout_cpu_seconds": summary(parts["layout"]) if parts["layout"] else None,
        "record_cpu_seconds": summary(parts["record"]),
        "changed_sites": len(plan.changes), "components_after": after.total,
    }  # fmt: skip


def record_seconds(record, scores):
    """Processor seconds of the line in ranks.jsonl and of the file of scores, as a run writes them."""
    trainer = SimpleNamespace(state=SimpleNamespace(events=1), world=SimpleNamespace(is_main=True))
    with TemporaryDirectory() as folder:
        log = RunLog(folder, is_main=True, num_steps=100, show_bar=False)
        records = Records(Path(folder), log, trainer, SimpleNamespace(log_scores=True))
        start = time.process_time()
        records.event(Event(STEP, record, scores, {}))
        return time.process_time() - start


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--shape", choices=sorted(SHAPES), default="70b")
    options.add_argument("--r", type=float, default=7.823)
    options.add_argument("--repeats", type=int, default=7)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    table = per_head_table(arguments.shape, arguments.r)
    names = list(methods(RankTable.start(table.sites[:2], table.ranks[:2])))
    result = {
        "benchmark": "allocator", "machine": machine(), "arguments": described(arguments),
        "sites": len(table.sites), "components": table.total,
        "methods": {name: one(name, table, arguments.repeats) for name in names},
    }  # fmt: skip
    write(result, arguments.out)


if __name__ == "__main__":
    main()
