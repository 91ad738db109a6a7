"""Run folders made up for reports: the files of a run of any size, without a run."""

import json
import time

import numpy as np
from safetensors.numpy import save_file

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")  # fmt: skip
HEADS = (64, 8, 8, 64, 0, 0, 0)  # of a 70B Llama


def site_names(num_layers, *, heads=None, stack="model.layers"):
    """Names of all sites in order; heads: how many each kind is cut into, 0 a whole matrix."""
    heads = heads or (0,) * len(KINDS)
    return [
        f"{stack}.{layer}.{kind}" + (f":head.{head}" if count else "")
        for layer in range(num_layers)
        for kind, count in zip(KINDS, heads, strict=True)
        for head in range(max(1, count))
    ]


def write_folder(folder, *, sites, method="elalora", num_events=5, moved=8, steps_between=10, seed=0, scores=True,
                 state="finished", extra_steps=20, rank=8, settings=None, metrics_every=1):  # fmt: skip
    """A run's files. moved: components that go, and come, in each event. Returns the [E, S] ranks."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    num_steps = steps_between * num_events + extra_steps
    ranks = np.full(len(sites), rank)
    rows = [ranks.copy()]
    table = dict(zip(sites, ranks.tolist(), strict=True))
    lines = [{"step": 0, "event": 0, "total_rank": int(ranks.sum()), "table": table}]
    weight = np.exp(-((np.linspace(0, 1, len(sites)) - 0.6) ** 2) / 0.05) + 0.1
    if scores:
        (folder / "scores").mkdir(exist_ok=True)
    for event in range(1, num_events + 1):
        change = np.zeros(len(sites), int)
        lose = np.flatnonzero(ranks > 1)
        gone = generator.choice(
            lose, size=min(moved, len(lose)), replace=False, p=(1 / weight)[lose] / (1 / weight)[lose].sum()
        )
        np.add.at(change, gone, -1)
        np.add.at(change, generator.choice(len(sites), size=len(gone), p=weight / weight.sum()), 1)
        before, ranks = ranks, ranks + change
        rows.append(ranks.copy())
        places = np.flatnonzero(change).tolist()
        changes = [
            {"site": sites[i], "before": int(before[i]), "after": int(ranks[i]), "pruned": int(max(0, -change[i])),
             "born": int(max(0, change[i])), "masked": 0}
            for i in places
        ]  # fmt: skip
        lines.append(
            {"step": event * steps_between, "event": event, "total_rank": int(ranks.sum()), "digest": "0" * 64,
             "reason": f"{method}: pruned {len(gone)}, grew {len(gone)}", "changes": changes,
             "scores": {"highest_pruned": 1e-8 / event, "lowest_kept": 1.2e-8 / event}, "seconds": {"repack": 0.01}}
        )  # fmt: skip
        if scores:
            means = weight * generator.lognormal(0.0, 0.5, len(sites)) * 1e-7
            save_file(
                {"mean_score": means, "rank": before.astype(np.int64)}, folder / "scores" / f"event-{event}.safetensors"
            )
    (folder / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_metrics(folder / "metrics.jsonl", num_steps, every=metrics_every)
    own = {"method": method, "r": rank, "learning_rate": 0.001, "max_steps": num_steps} | (settings or {})
    (folder / "config.yaml").write_text(json.dumps(own))
    modules = {site.partition(":")[0]: [64, 128, "language"] for site in sites}
    info = {"num_trained": 1000, "num_base": 100_000, "modules": modules,
            "starts": [{"time": "2026-01-01T00:00:00+0000", "step": 0, "world_size": 2, "device": "test",
                        "python": "3.11", "versions": {"ardtrain": "0.1.0"}}]}  # fmt: skip
    (folder / "run_info.json").write_text(json.dumps(info))
    write_state(folder, state, num_steps)
    return np.stack(rows)


def write_state(folder, state, step, **details):
    """`status` and `status.json`, as of another host's process."""
    record = {"state": state, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "num_steps": step,
              "world_size": 2, "host": "elsewhere", "pid": 1, "best_loss": 1.5} | details  # fmt: skip
    (folder / "status.json").write_text(json.dumps(record))
    (folder / "status").write_text(f"{state} {step}\n")


def write_metrics(path, num_steps, *, every=1, starts=(0,)):
    """Losses of every `every`-th step, held-out losses of every tenth; the clock begins anew at each of `starts`."""
    out = []
    for step in range(every, num_steps + 1, every):
        begun = max(start for start in starts if start < step)
        elapsed = 0.5 * (step - begun)
        out.append(
            {"step": step, "loss": 1.0 + 3.0 / step, "grad_norm": 0.5, "learning_rate": 1e-3 * (2 - step / num_steps),
             "void": step == 7, "tokens_per_second": 1000.0, "elapsed_seconds": elapsed,
             "evaluate_seconds": elapsed / 10, "allocator_seconds": elapsed / 20, "resize_seconds": elapsed / 40,
             "host_memory_peak_bytes": 1 << 30, "device_memory_peak_bytes": 5 << 30}
        )  # fmt: skip
        if step % (10 * every) == 0:
            out.append({"step": step, "eval_loss": 1.2 + 3.0 / step})
    path.write_text("".join(json.dumps(line) + "\n" for line in out))
