"""`ardtrain suggest CONFIG`: schedule, batch and rates to start from, by the plan, the data's size and the papers.

It changes what a newcomer cannot know and leaves what the config decides: model, data, method, length, targets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ardtrain import preflight, run_data
from ardtrain.config import BLOCKS, AloraBlock, ConfigError, RunConfig, check_schedule, parse_config, updated
from ardtrain.config.commented import Line, commented_yaml
from ardtrain.config.schema import FILE_NAME, schema_text
from ardtrain.config.text import merged, parse_overrides, read_yaml
from ardtrain.data_mix import Mixture, open_samples
from ardtrain.data_order import mixed_order
from ardtrain.deepspeed_config import take_over
from ardtrain.faults import replace_file
from ardtrain.planning.advice import suggestions
from ardtrain.planning.hardware import Machine, machine_of
from ardtrain.planning.plan import Plan, changed, make_plan

GRAIN_TOKENS = 16_384  # of a grain; more makes a GPU's products no faster
FEWEST_STEPS = 200  # of a run whose ranks shall move
_PROVISIONAL = {  # so that a config without its method's block can be read
    "elalora": {"init_warmup": 0, "final_warmup": 0, "mask_interval": 1},
    "adalora": {"target_r": 1, "tinit": 0, "tfinal": 0},
    "probe_lora": {"init_warmup": 0, "final_warmup": 0, "mask_interval": 4, "probe_steps": 2},
}
_METHOD_NAMES = ("method", "finetuning_type", "adapter", "tuner_type")
Change = tuple[Any, str]  # value, why


@dataclass(frozen=True)
class Facts:
    """What the suggestions rest on.

    num_rows: of an epoch; too_long: rows that max_length drops or cuts; total_rank: of the adapters at the start.
    """

    method: str
    task: str
    num_rows: int
    too_long: int
    total_rank: int
    r: int
    val_batch: int = 32  # rows that ALoRA may judge on, at most


def suggest(arguments: Sequence[str]) -> int:
    """`ardtrain suggest CONFIG [a.b=c ...] [--gpus N] [--nodes M] [--gpu h100] [--out FILE]`; returns 0.

    Raises:
        ConfigError: mistakes in config or data, or FILE is there already.
    """
    parser = _Parser(prog="ardtrain suggest", add_help=False)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--out", type=Path)
    given = parser.parse_intermixed_args(arguments)
    if given.out is not None and given.out.exists():
        raise ConfigError([f"--out {given.out}: is there already; remove it or name another"])
    machine = machine_of(given.gpu, gpus=given.gpus, nodes=given.nodes)
    text = suggestion_text(read_incomplete(given.config, given.overrides), machine, source=given.config)
    if given.out is None:
        print(text, end="")
        return 0
    try:
        replace_file(given.out, text)
        replace_file(given.out.with_name(FILE_NAME), schema_text())
    except OSError as error:
        raise ConfigError([f"{given.out}: cannot be written ({error.strerror})"]) from error
    print(f"{given.out}; next: ardtrain validate {given.out}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError([f"{message}; see ardtrain suggest --help"])


def read_incomplete(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config, whose method's block may be missing or half written. Raises ConfigError."""
    raw = merged(read_yaml(Path(path)), parse_overrides(overrides))
    method = next((str(raw[name]) for name in _METHOD_NAMES if name in raw), "")
    block = {method: _PROVISIONAL[method]} if method in _PROVISIONAL else {}
    if raw.get(method) is None:
        raw.pop(method, None)
    return parse_config(merged(block, raw))


def suggestion_text(config: RunConfig, machine: Machine, *, source: str = "the config") -> str:
    """The whole config with a comment on each line. Raises ConfigError."""
    resolved, _ = take_over(config)
    facts = facts_of(resolved)
    changes = batch_changes(facts, resolved, machine.world_size)
    plan = plan_of(resolved, changes, machine)
    changes |= grain_changes(plan, machine)
    epochs = config.num_train_epochs or 3.0
    batch: int = changes["global_batch_size"][0]
    steps = config.max_steps or max(1, math.ceil(epochs * facts.num_rows / batch))
    changes |= rate_changes(facts)
    changes |= schedule_changes(facts, steps, facts.num_rows / batch, config)
    values = with_changes(config, changes)
    final = parse_config(values)
    check_schedule(final, steps)
    head = [
        f"Suggested by `ardtrain suggest` from {Path(source).name}: {facts.num_rows:,} rows an epoch, {steps:,} steps",
        f"of {batch} rows, on {machine.world_size} x {machine.gpu.name}. A start, not an optimum: try a third and",
        "three times of the rate.",
        *plan_lines(plan),
    ]
    if facts.too_long:
        head.append(f"{facts.too_long:,} rows are longer than max_length={config.max_length} and are dropped or cut.")
    return commented_yaml(list(lines_of(values, config, changes)), head=head)


def facts_of(config: RunConfig) -> Facts:
    """Reads the model's config.json and the data (tokenised, or from the cache). Raises ConfigError."""
    shape = preflight.check_model(updated(config, {"global_batch_size": None, "gradient_accumulation_steps": None}))
    tokenizer = run_data.tokenizer_of(config)
    images = run_data.image_reader(config, tokenizer)
    try:
        settings = run_data.data_settings(config, shape.labels, images.settings if images else None)
        sources = run_data.training_sources(config, shape.labels, settings.images)
        samples = open_samples(settings, sources, tokenizer, run_data.cache_dir())
    except (OSError, ValueError) as error:
        raise ConfigError(str(error).splitlines()) from error
    if isinstance(samples, Mixture) and samples.parts:
        epoch = samples.drawn([mixed_order(samples.parts, seed=config.seed, epoch=0)]).values()
        tokens, kept = sum(drawn.tokens for drawn in epoch), sum(drawn.samples for drawn in epoch)
    else:
        tokens, kept = int(np.sum(samples.lengths, dtype=np.int64)), len(samples.lengths)
    return Facts(
        method=config.method,
        task=config.task,
        num_rows=math.ceil(tokens / config.max_length) if config.packing else kept,
        too_long=samples.counts.get("too_long", 0) + samples.counts.get("truncated", 0),
        total_rank=shape.table.total,
        r=config.r,
        val_batch=_val_batch(config, tokenizer, shape.labels) if config.method == "alora" else 32,
    )


def _val_batch(config: RunConfig, tokenizer: Any, labels: tuple[str, ...]) -> int:
    """The paper's 32, or as many as the held-out rows are enough for."""
    count = 32
    while True:
        block = (config.alora or AloraBlock()).model_copy(update={"val_batch": count})
        try:
            run_data.open_allocation_data(updated(config, {"alora": block}), tokenizer, labels)
            return count
        except ConfigError:
            if count == 1:
                raise
            count //= 2


# ---- what is suggested, and why: pure ----


def batch_changes(facts: Facts, config: RunConfig, world_size: int) -> dict[str, Change]:
    """Rows of a step, a multiple of the processes, such that the run has steps enough to move ranks."""
    small = facts.num_rows < 10_000
    batch, why = {
        "elalora": (64, "the published GLUE scripts' (ElaLoRA, arXiv 2504.00254)"),
        "adalora": (32, "the paper's on GLUE (AdaLoRA, arXiv 2303.10512, appendix)"),
    }.get(
        facts.method,
        (16 if small else 128, f"ALoRA's rule (arXiv 2403.16187, 4.3): 16 below 10,000 rows, else 128; here "
         f"{facts.num_rows:,}"),
    )  # fmt: skip
    epochs = config.num_train_epochs
    if config.max_steps is None and epochs is not None:
        halved = batch
        while halved > 8 and epochs * facts.num_rows / halved < FEWEST_STEPS:
            halved //= 2
        if halved < batch:
            batch, why = halved, f"{batch} were {why}; fewer, so that the run has {FEWEST_STEPS} steps"
    if batch % world_size:
        batch = -(-batch // world_size) * world_size
        why += f", made a multiple of {world_size} processes"
    return {"global_batch_size": (batch, why), "gradient_accumulation_steps": (None, "")}


def plan_of(config: RunConfig, changes: Mapping[str, Change], machine: Machine) -> Plan:
    """The plan with one row a grain, with gradient checkpointing if it does not fit without."""
    values = {name: value for name, (value, _) in changes.items()} | {"per_device_train_batch_size": 1}
    base = changed(config, machine, values)
    plan = make_plan(base, machine)
    if not plan.fits_device and not base.gradient_checkpointing:
        plan = make_plan(changed(base, machine, {"gradient_checkpointing": True}), machine)
    return plan


def grain_changes(plan: Plan, machine: Machine) -> dict[str, Change]:
    """Rows computed at a time: the most that fit, keep all processes busy and are worth it."""
    batch = plan.config.global_batch_size
    assert batch is not None
    share = batch // machine.world_size
    fits = share if plan.largest_rows is None else max(1, min(plan.largest_rows, share))
    worth = max(1, GRAIN_TOKENS // plan.length)
    rows = max(n for n in range(1, share + 1) if share % n == 0 and n <= min(fits, worth))
    limit = "as many as fit" if plan.largest_rows is not None and rows >= fits and fits < share else (
        "all of a process's rows" if rows == share else f"about {GRAIN_TOKENS:,} tokens keep a GPU busy"
    )  # fmt: skip
    out: dict[str, Change] = {"per_device_train_batch_size": (rows, f"rows of a grain: {limit} (ardtrain plan)")}
    if plan.config.gradient_checkpointing:
        out["gradient_checkpointing"] = (True, "needed: without it one row does not fit, or the config has it")
    return out


def rate_changes(facts: Facts) -> dict[str, Change]:
    """Learning rate by method; where a paper gives a range, its middle."""
    classes = facts.task == "sequence_classification"
    rates: dict[str, Change] = {
        "full": (1e-5, "PEFT's method comparison on Llama-3.2-3B"),
        "lora": (1e-4, "PEFT's method comparison on Llama-3.2-3B; ALoRA's paper for LoRA on LLaMA-2 7B"),
        "dora": (1e-4, "as LoRA"),
        "alora": (1e-4, "the paper's on LLaMA-2 7B (arXiv 2403.16187, 4.3)"),
        "ard_lora": (1e-4, "as LoRA; the paper (arXiv 2506.18267) gives none that we know"),
        "probe_lora": (1e-4, "as LoRA; the method is ours (docs/probe_lora.md)"),
        "elalora": (1e-3, "the published GLUE scripts' 5e-4 to 1.2e-3 on DeBERTaV3 (arXiv 2504.00254)")
        if classes
        else (5e-4, "the published XSum script's on BART (arXiv 2504.00254)"),
        "adalora": (1e-3, "the paper's 5e-4 to 2.2e-3 on GLUE (arXiv 2303.10512, appendix)")
        if classes
        else (5e-4, "the paper's 5e-4 on its largest tasks (arXiv 2303.10512, appendix)"),
    }
    return {
        "learning_rate": rates[facts.method],
        "warmup_steps": (None, ""),
        "warmup_ratio": (0.06, "6 % of the steps (arXiv 2403.16187, 4.3)"),
    }


def schedule_changes(facts: Facts, steps: int, steps_per_epoch: float, config: RunConfig) -> dict[str, Change]:
    """The method's own block for a run of `steps` steps."""
    if facts.method == "elalora":
        first, last = max(1, round(0.15 * steps)), max(1, round(0.25 * steps))
        span = steps - first - last
        moved = max(4, round(4 * facts.total_rank / 720))
        return {
            "elalora.init_warmup": (first, f"15 % of {steps:,} steps, as the published RTE and XSum scripts"),
            "elalora.final_warmup": (last, "25 %, as the published RTE script"),
            "elalora.mask_interval": (max(1, span // 24), "about 24 reallocations, as the published RTE script"),
            "elalora.b": (moved, f"4 of 720 components in the published scripts; here {facts.total_rank:,} components"),
            "elalora.k": (2, "the published scripts'"),
        }
    if facts.method == "probe_lora":
        first, last = max(1, round(0.15 * steps)), max(1, round(0.25 * steps))
        interval = max(4, (steps - first - last) // 24)
        return {
            "probe_lora.init_warmup": (first, f"15 % of {steps:,} steps, as for elalora"),
            "probe_lora.final_warmup": (last, "25 %, as for elalora"),
            "probe_lora.mask_interval": (interval, "about 24 reallocations, as for elalora"),
            "probe_lora.probe_steps": (min(6, interval // 2), "twice these must fit between two reallocations"),
            "probe_lora.b": (
                max(4, round(4 * facts.total_rank / 720)),
                f"as for elalora, {facts.total_rank:,} components",
            ),
        }
    if facts.method == "adalora":
        first, last = max(1, round(0.12 * steps)), max(1, round(0.45 * steps))
        given = config.adalora.target_r if config.adalora and config.adalora.target_r > 1 else None
        target = given or facts.r
        start = max(target, round(1.5 * target))
        every = max(1, (steps - first - last) // 400)
        number = (steps - first - last) // every
        return {
            "r": (start, "1.5 x target_r, the paper's start (arXiv 2303.10512, 3.3)"),
            "lora_alpha": (config.lora_alpha / config.r * start, "the scale lora_alpha / r stays as it was"),
            "adalora.target_r": (target, "the budget, average rank at the end" + ("" if given else ": the r that was")),
            "adalora.tinit": (first, f"12 % of {steps:,} steps, as the paper's SST-2 run"),
            "adalora.tfinal": (last, "45 %, as the paper's RTE and SST-2 runs"),
            "adalora.deltaT": (every, f"about {number} reductions; the paper's longer runs have some 400"),
        }
    if facts.method == "alora":
        rounds = config.alora.rounds if config.alora else 8
        k1, k2 = round(steps_per_epoch), round(0.25 * steps_per_epoch)
        why = "1 epoch, and a quarter of one between rounds (arXiv 2403.16187, 4.3)"
        if k1 + rounds * k2 > 0.75 * steps:
            k1, k2 = round(0.25 * steps), round(0.5 * steps / rounds)
            why = "a quarter of the run, rounds over its next half: the paper's 3 epochs of them do not fit in"
        return {
            "alora.k1_steps": (max(1, k1), why),
            "alora.k2_steps": (max(1, k2), "steps between two rounds, see k1_steps"),
            "alora.rounds": (rounds, "the paper's" if rounds == 8 else "as it was"),
            "alora.val_batch": (
                facts.val_batch,
                "the paper's" if facts.val_batch == 32 else "the paper's 32 are more than there are held-out rows",
            ),
        }
    if facts.method == "ard_lora":
        first, last = max(1, steps // 10), max(1, steps // 4)
        span = max(1, steps - first - last)
        return {
            "ard_lora.init_warmup": (
                first,
                f"a tenth of {steps:,} steps (ours: the paper, arXiv 2506.18267, gives none)",
            ),
            "ard_lora.final_warmup": (last, "a quarter (ours)"),
            "ard_lora.alpha_interval": (max(1, min(8, span // 8)), "8 steps' gradients for one of alpha (ours)"),
            "ard_lora.resize_interval": (
                max(1, min(100, span // 10)),
                "about 10 resizes, at most 100 steps apart (ours)",
            ),
        }
    return {}


def plan_lines(plan: Plan) -> list[str]:
    """Whether it fits, and what to change if not."""
    if plan.fits:
        return []
    advice = suggestions(plan)
    return [
        "It does NOT fit there with one row a grain; ardtrain plan says why. What helps, in this order:",
        *(f"  {one.change}" for one in advice),
        *([] if advice else ["  more or larger GPUs"]),
    ]


# ---- writing ----


def with_changes(config: RunConfig, changes: Mapping[str, Change]) -> dict[str, Any]:
    """What the config sets, with the changes over it; a change to None takes a setting out."""
    values = config.model_dump(mode="json", exclude_unset=True)
    for name, (value, _) in changes.items():
        *blocks, last = name.split(".")
        inside = values
        for block in blocks:
            if not isinstance(inside.get(block), dict):
                inside[block] = {}
            inside = inside[block]
        inside[last] = value
    # a block or setting that is none is left out; max_steps and num_train_epochs follow each other's absence
    return {name: value for name, value in values.items() if value is not None}


def lines_of(values: Mapping[str, Any], config: RunConfig, changes: Mapping[str, Change]) -> Iterable[Line]:
    """A line a setting, in the models' order; a changed one says why and what it was."""
    order = list(RunConfig.model_fields)
    for name in sorted(values, key=order.index):
        model = BLOCKS.get(name) if name else None
        if isinstance(values[name], dict) and model is not None:
            fields = list(model.model_fields)
            for inner in sorted(values[name], key=fields.index):
                path = f"{name}.{inner}"
                comment = _comment(path, values[name][inner], config, changes, model.model_fields[inner].description)
                yield Line(path, values[name][inner], comment)
        elif isinstance(values[name], dict) and name == "targets":
            for tower, own in values[name].items():
                for inner, value in own.items():
                    yield Line(f"targets.{tower}.{inner}", value, "of this tower alone")
        else:
            text = RunConfig.model_fields[name].description
            yield Line(name, values[name], _comment(name, values[name], config, changes, text))


def _comment(path: str, value: Any, config: RunConfig, changes: Mapping[str, Change], text: str | None) -> str:
    words = " ".join((text or "").split()).removesuffix(".")
    if path not in changes:
        return words or "as it was"
    before: Any = config
    for part in path.split("."):
        before = getattr(before, part, None)
    *blocks, last = path.split(".")
    model = BLOCKS.get(".".join(blocks), RunConfig)
    silent = (
        None,
        value,
        model.model_fields[last].default,
        _PROVISIONAL.get(blocks[0] if blocks else "", {}).get(last),
    )
    return changes[path][1] + ("" if before in silent else f"; was {before}")
