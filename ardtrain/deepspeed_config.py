"""The user's one DeepSpeed JSON, mapped to two engines: the frozen backbone and the adapter engine (architecture.md 7).

For method `full` there is one engine, which takes the whole file.

What the JSON says about the run (optimizer, scheduler, clipping, batch sizes, dtype) is taken over into the config, so
that the config alone is the truth; what is left goes to the engines.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ardtrain.config import (
    ConfigError,
    OptimizerBlock,
    RunConfig,
    accumulation_steps,
    read_deepspeed_json,
    updated,
    with_batch,
)
from ardtrain.gather_sizes import WeightSizes, without_auto

ComputeDtype = Literal["fp32", "bf16", "fp16"]
NVME_PLACEHOLDER = "SET_ME"  # ds_configs/zero3_nvme.json: every cluster has its own path
ADAPTER_BYTES_PER_NUMBER = 12  # fp32 master and two Adam moments
_ADAM_AS_OURS = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}  # other values are another optimizer
_ADAM_KERNELS = ("torch_adam", "foreach", "fused")  # which kernel: offload_optimizer_kernel says it here
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")  # deepspeed/monitor/config.py
_BATCH = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
MAX_BUCKET_NUMBERS = 500_000_000  # DeepSpeed's own reduce_bucket_size, which it allocates whole
_REFUSED_FOR_FULL = {  # dotted key -> (the values it may have, why not others)
    "zero_optimization.compute_grad_norm": ((True,), "a step that is not finite could not be told; remove it"),
    "bf16.check_grad_overflow": ((True,), "a step that is not finite would be applied; remove it"),
    "managed_gradient_accumulation": ((True,), "the loop sets the boundaries of a step; remove it"),
    "sequence_parallel_size": ((1,), "all processes are data-parallel; remove it"),
    "tensor_parallel.autotp_size": ((0, 1), "all processes are data-parallel; remove it"),
    "torch_autocast.enabled": ((False,), "held-out loss would be computed otherwise; write bf16 or fp16"),
    "gradient_predivide_factor": ((1,), "sums would hang on the stage; remove it"),
}
_REFUSED_WHERE_QUANTIZED = {  # of zero_optimization -> why not beside a quantised base
    "stage3_use_all_reduce_for_fetch_params": "it sums tensors of one dtype, and the base has two; remove it",
    "zero_quantized_weights": "DeepSpeed would quantise codes once more; remove one of the two",
    "zero_quantized_nontrainable_weights": "DeepSpeed would quantise codes once more; remove one of the two",
}
_ZERO_KEYS = {  # of zero_optimization: understood, so not worth a note
    *("stage", "offload_param", "offload_optimizer", "overlap_comm", "contiguous_gradients", "sub_group_size"),
    *("reduce_scatter", "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size"),
}


@dataclass(frozen=True)
class DeepSpeedPlan:
    """What the two engines are started with, or the one of method `full`.

    backbone, adapter: ready for `deepspeed.initialize`. The backbone has no optimizer; the adapter engine is fp32.
    full: the same for method `full`, then the other two are empty; else None. backbone_stage: the model's ZeRO stage, 0
    or 3 if it is frozen. notes: what to print at the start.
    """

    backbone_stage: Literal[0, 1, 2, 3]
    backbone: dict[str, Any]
    adapter: dict[str, Any]
    compute_dtype: ComputeDtype
    optimizer_offload: bool
    notes: list[str] = field(default_factory=list)
    full: dict[str, Any] | None = None

    @property
    def base_on_nvme(self) -> bool:
        """Is the frozen base offloaded to NVMe?"""
        offload: dict[str, Any] = self.backbone.get("zero_optimization", {}).get("offload_param", {})
        return offload.get("device") == "nvme"


def with_deepspeed(config: RunConfig) -> RunConfig:
    """Config with what its DeepSpeed JSON says about the run taken over; `deepspeed` holds the rest, inline.

    Applied again it changes nothing.
    Raises:
        ConfigError: the JSON and the config disagree, or the JSON asks for what we do not do.
    """
    return take_over(config)[0]


def take_over(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`with_deepspeed`, and a note for each value taken over."""
    if config.deepspeed is None:
        return config, []
    given = config.deepspeed
    source = copy.deepcopy(given) if isinstance(given, dict) else read_deepspeed_json(given)
    taker = _Taker(config)
    if "elasticity" in source:
        taker.errors.append(
            "deepspeed.elasticity is gone from DeepSpeed; remove it, let the scheduler requeue the job, and resume on "
            "any number of processes (the global batch stays)"
        )
    for key, name in _BATCH.items():
        taker.take(name, source.pop(key, None), key)
    taker.take("max_grad_norm", source.pop("gradient_clipping", None), "gradient_clipping")
    _take_optimizer(taker, _block(source, "optimizer", taker.errors))
    _take_scheduler(taker, _block(source, "scheduler", taker.errors))
    _take_dtype(taker, source)
    zero = source.get("zero_optimization", {})
    unset = "adapter_zero_stage" not in config.model_fields_set and config.method != "full"
    if unset and isinstance(zero, dict) and zero.get("stage") in (1, 2):
        taker.take("adapter_zero_stage", zero["stage"], "zero_optimization.stage")
    if taker.errors:
        raise ConfigError(taker.errors)
    return updated(config, {**taker.changes(), "deepspeed": source}), taker.notes


class _Taker:
    """Collects values of the JSON for settings that are unset, and disagreements with those that are set."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.errors: list[str] = []
        self.notes: list[str] = []
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}

    def take(self, name: str, value: object, key: str) -> None:
        """`name` is ours, dotted below `optimizer`; None and "auto" leave it to us."""
        if value is None or value == "auto":
            return
        block, _, leaf = name.rpartition(".")
        owner = self.config.optimizer if block else self.config
        ours = getattr(owner, leaf)
        explicit = leaf in owner.model_fields_set and ours is not None
        if name in self._values:
            ours, explicit, other = self._values[name], True, f"deepspeed.{self._sources[name]}"
        else:
            other = name
        if explicit and not _same(ours, value):
            self.errors.append(
                f'deepspeed.{key}={value} disagrees with {other}={ours}; remove one, or write "auto" in the JSON'
            )
        elif not explicit:
            self._values[name], self._sources[name] = value, key
            if not _same(ours, value):
                self.notes.append(f"{name}={value} comes from deepspeed.{key}")

    def changes(self) -> dict[str, Any]:
        """What `updated` needs."""
        changes = {name: value for name, value in self._values.items() if "." not in name}
        ours = self.config.optimizer
        block = {name: getattr(ours, name) for name in ours.model_fields_set}
        block |= {name.rpartition(".")[2]: value for name, value in self._values.items() if "." in name}
        return changes | ({"optimizer": block} if block else {})


def _same(ours: object, value: object) -> bool:
    if isinstance(ours, tuple) and isinstance(value, list):
        return ours == tuple(value)
    return ours == value


def _block(source: dict[str, Any], key: str, errors: list[str]) -> dict[str, Any]:
    """`source[key]`, taken out; {} where it is missing."""
    value = source.pop(key, None)
    if value is None:
        return {}
    if not isinstance(value, dict):
        errors.append(f"deepspeed.{key}={value} is no block; write it in braces, as DeepSpeed's documentation does")
        return {}
    return value


def _take_optimizer(taker: _Taker, block: Mapping[str, Any]) -> None:
    if not block:
        return
    kind = str(block.get("type", ""))
    if kind.lower() not in ("adam", "adamw"):
        taker.errors.append(f"deepspeed.optimizer.type={kind} is not built; the trained numbers use AdamW: write AdamW")
        return
    params = dict(block.get("params", {}))
    taker.take("learning_rate", params.pop("lr", None), "optimizer.params.lr")
    for name in OptimizerBlock.model_fields:
        taker.take(f"optimizer.{name}", params.pop(name, None), f"optimizer.params.{name}")
    for key, value in params.items():
        if key in _ADAM_KERNELS:
            taker.notes.append(
                f"deepspeed.optimizer.params.{key} has no effect; offload_optimizer_kernel says the kernel"
            )
        elif key not in _ADAM_AS_OURS or value not in (_ADAM_AS_OURS[key], "auto"):
            taker.errors.append(f"deepspeed.optimizer.params.{key}={value} is not built; remove it (AdamW as in torch)")


def _take_scheduler(taker: _Taker, block: Mapping[str, Any]) -> None:
    """Warm-up is linear and from 0 and the end is 0, as in transformers; DeepSpeed's defaults differ a little."""
    if not block:
        return
    kind = str(block.get("type", ""))
    if kind not in _SCHEDULES:
        taker.errors.append(f"deepspeed.scheduler.type={kind} is not built; write one of {', '.join(_SCHEDULES)}")
        return
    params = dict(block.get("params", {}))
    prefix = "scheduler.params."
    taker.take("lr_scheduler_type", _SCHEDULES[kind], "scheduler.type")
    taker.take("learning_rate", params.pop("warmup_max_lr", None), f"{prefix}warmup_max_lr")
    if not taker.config.warmup_ratio:
        taker.take("warmup_steps", params.pop("warmup_num_steps", None), f"{prefix}warmup_num_steps")
    elif params.pop("warmup_num_steps", "auto") != "auto":
        taker.errors.append(f"deepspeed.{prefix}warmup_num_steps stands beside warmup_ratio; remove one of them")
    num_steps = params.pop("total_num_steps", "auto")
    if num_steps != "auto" and taker.config.max_steps is None and "num_train_epochs" in taker.config.model_fields_set:
        taker.errors.append(f"deepspeed.{prefix}total_num_steps={num_steps} stands beside num_train_epochs; remove one")
    else:
        taker.take("max_steps", num_steps, f"{prefix}total_num_steps")
    expected = {"warmup_min_lr": 0, "warmup_min_ratio": 0, "cos_min_ratio": 0, "warmup_type": "linear"}
    for key, value in params.items():
        if key not in expected or value not in (expected[key], "auto"):
            rule = f"must be {expected[key]}" if key in expected else "is not built"
            taker.errors.append(f"deepspeed.{prefix}{key}={value} {rule} here; remove it")
    if "warmup_type" not in params:
        taker.notes.append("warm-up is linear; DeepSpeed's own default for this scheduler is logarithmic")
    if kind == "WarmupCosineLR" and "cos_min_ratio" not in params:
        taker.notes.append("the cosine schedule ends at 0; DeepSpeed's own default ends at 0.0001 of the peak")


def _take_dtype(taker: _Taker, source: dict[str, Any]) -> None:
    if "bfloat16" in source and "bf16" not in source:
        source["bf16"] = source.pop("bfloat16")  # DeepSpeed's old name
    for name in ("bf16", "fp16"):
        block = _block(source, name, taker.errors)
        taker.take(name, block.pop("enabled", None), f"{name}.enabled")
        if block and taker.config.method == "full":
            source[name] = block  # the engine of `full` has DeepSpeed's own masters and loss scaler
        elif name == "fp16" and block:
            taker.notes.append(f"deepspeed.fp16.{', '.join(block)}: no effect; the loss scaler is ours (powers of two)")


def _leave_out_monitors(source: dict[str, Any], errors: list[str], notes: list[str]) -> None:
    """DeepSpeed's monitor writes when its engine steps, which a frozen base's never does; W&B's would open a run."""
    for name in _MONITORS:
        if _block(source, name, errors).get("enabled"):
            notes.append(
                f"deepspeed.{name}: no effect, the base's engine takes no step; use report_to (tensorboard, wandb), "
                "or `ardtrain report RUN --figures FOLDER` for CSV"
            )


def split_deepspeed(
    config: RunConfig, *, world_size: int, trainable_numbers: int | None = None, sizes: WeightSizes | None = None
) -> DeepSpeedPlan:
    """The two engines' DeepSpeed configs, or that of method `full`.

    Args:
        config: as loaded (then `notes` also says what is taken over) or after `with_deepspeed`.
        world_size: processes, all data-parallel.
        trainable_numbers: size of the arena (`full`: of the model), if known: sizes the reduce bucket and the figures
            in errors.
        sizes: of the base's weights, if known: choose the `auto` values of ZeRO-3.
    Raises:
        ConfigError: as `with_deepspeed`; or an offload that the stage does not allow.
    """
    config, notes = take_over(config)
    if config.method == "full":
        return _full_plan(config, notes, world_size=world_size, trainable_numbers=trainable_numbers, sizes=sizes)
    source = copy.deepcopy(config.deepspeed) if isinstance(config.deepspeed, dict) else {}
    errors: list[str] = []
    _leave_out_monitors(source, errors, notes)
    zero = _block(source, "zero_optimization", errors)
    stage = zero.pop("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        errors.append(f"deepspeed.zero_optimization.stage={stage} is no ZeRO stage; write 0 or 3 (1 and 2 mean 0)")
    if stage in (1, 2):
        notes.append(
            f"zero_optimization.stage {stage} means 0 for a frozen backbone (it has no optimizer state or gradients to "
            f"shard); the trained numbers use adapter_zero_stage {config.adapter_zero_stage}"
        )
    offload = _offload_optimizer(zero, errors, notes, world_size=world_size, trainable_numbers=trainable_numbers)
    _check_offload_param(zero, errors, stage=stage)
    _check_node_copies(zero, errors, stage=stage, world_size=world_size)
    if config.quantization is not None:
        errors += [
            f"deepspeed.zero_optimization.{key}={zero[key]} stands beside quantization={config.quantization}: {reason}"
            for key, reason in _REFUSED_WHERE_QUANTIZED.items()
            if zero.get(key) not in (None, False, "auto")
        ]
    if errors:
        raise ConfigError(errors)
    backbone_stage: Literal[0, 3] = 3 if stage == 3 else 0
    dtype = _compute_dtype(config)
    plain = _without_auto(source, notes)
    if sizes is not None:
        zero = without_auto(zero, sizes, world_size, notes)
    zero = _without_auto(zero, notes, "zero_optimization.")
    others = [
        *(key for key in plain if key != "aio"),
        *(f"zero_optimization.{key}" for key in zero if not _is_expected(key)),
    ]
    if others:
        notes.append(f"passed on to the backbone's engine: {', '.join(others)}")
    if offload is not None and config.offload_optimizer_kernel == "cpu_adam" and config.reproducible:
        notes.append("offload_optimizer_kernel cpu_adam gives equal bits for the same number of processes only")
    backbone: dict[str, Any] = {
        **plain,
        **_batch(config.per_device_train_batch_size, world_size),
        "zero_optimization": {**zero, "stage": backbone_stage},
        **({} if dtype == "fp32" else {dtype: {"enabled": True}}),
    }
    adapter = _adapter_config(config, offload, world_size=world_size, trainable_numbers=trainable_numbers)
    return DeepSpeedPlan(backbone_stage, backbone, adapter, dtype, offload is not None, notes)


def _compute_dtype(config: RunConfig) -> ComputeDtype:
    return "bf16" if config.bf16 else "fp16" if config.fp16 else "fp32"


def _full_plan(
    config: RunConfig,
    notes: list[str],
    *,
    world_size: int,
    trainable_numbers: int | None,
    sizes: WeightSizes | None,
) -> DeepSpeedPlan:
    """The user's JSON whole, with what is ours filled in: batch triple, clipping, dtype, a reduce bucket that fits.

    gradient_accumulation_steps is ceil(G / processes), the most that a step has; a short last one has fewer.
    """
    source = copy.deepcopy(config.deepspeed) if isinstance(config.deepspeed, dict) else {}
    errors: list[str] = []
    dtype = _compute_dtype(config)
    zero = _block(source, "zero_optimization", errors)
    stage: Any = zero.pop("stage", None)
    if stage not in (None, 0, 1, 2, 3) or isinstance(stage, bool):
        errors.append(f"deepspeed.zero_optimization.stage={stage} is no ZeRO stage; write 1, 2 or 3 (0 means 1)")
    if stage == 0:
        notes.append(
            "zero_optimization.stage 0 means 1 for method=full: stage 0 would apply a gradient that is not finite"
        )
    zero_stage: Literal[1, 2, 3] = stage or 1
    _refuse_old_names(zero, errors)
    _check_offload_param(zero, errors, stage=zero_stage)
    offload = _check_full_offload_optimizer(config, zero, errors, notes, stage=zero_stage)
    own = {name: _block(source, name, errors) for name in ("bf16", "fp16")}
    for key, (allowed, reason) in _REFUSED_FOR_FULL.items():
        value = _at({**source, "zero_optimization": zero, **own}, key)
        if value is not None and value != "auto" and value not in allowed:
            errors.append(f"deepspeed.{key}={value}: {reason}")
    if errors:
        raise ConfigError(errors)
    plain = _without_auto(source, notes)
    if sizes is not None:
        zero = without_auto(zero, sizes, world_size, notes)
    zero = _without_auto(zero, notes, "zero_optimization.")
    num_micro_steps = accumulation_steps(with_batch(config, world_size), world_size)
    grain = config.per_device_train_batch_size
    if trainable_numbers is not None:
        zero.setdefault("reduce_bucket_size", min(trainable_numbers, MAX_BUCKET_NUMBERS))
    if dtype == "bf16" and num_micro_steps > 1:
        types = dict(plain.get("data_types", {}))
        if types.setdefault("grad_accum_dtype", "fp32") == "fp32":
            notes.append("gradients of a step's grains are added in float32 (data_types.grad_accum_dtype)")
        plain["data_types"] = types
    engine: dict[str, Any] = {
        **plain,
        "train_batch_size": grain * num_micro_steps * world_size,
        "train_micro_batch_size_per_gpu": grain,
        "gradient_accumulation_steps": num_micro_steps,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {**zero, "stage": zero_stage},
    }
    if dtype != "fp32":
        engine[dtype] = {**_without_auto(own[dtype], notes, f"{dtype}."), "enabled": True}
    if offload is not None and config.offload_optimizer_kernel == "torch":
        engine["zero_force_ds_cpu_optimizer"] = False
    return DeepSpeedPlan(zero_stage, {}, {}, dtype, offload is not None, notes, engine)


def _at(source: Mapping[str, Any], key: str) -> object:
    """The value at a dotted key; None where it or a block on the way is missing."""
    value: object = source
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _refuse_old_names(zero: Mapping[str, Any], errors: list[str]) -> None:
    for old in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"):
        if old in zero:
            errors.append(f"deepspeed.zero_optimization.{old} is an old name; write offload_optimizer or offload_param")


def _check_full_offload_optimizer(
    config: RunConfig, zero: dict[str, Any], errors: list[str], notes: list[str], *, stage: object
) -> str | None:
    """The device of the optimizer's offload, None for none; drops a block whose device is none."""
    name = "deepspeed.zero_optimization.offload_optimizer"
    block = _block(zero, "offload_optimizer", errors)
    device = block.get("device", "none")
    if device == "none":
        return None
    zero["offload_optimizer"] = block
    if device not in ("cpu", "nvme"):
        errors.append(f"{name}.device={device} is unknown; write cpu, nvme or none")
    if device == "nvme":
        if stage != 3:
            errors.append(f"{name}.device=nvme needs zero_optimization.stage 3 (it is {stage}); set it, or write cpu")
        _check_nvme_path(block, name, errors)
        notes.append(
            "offload_optimizer to NVMe: DeepSpeed's checkpoints do not bring such an optimizer back, so this run "
            "cannot be resumed; cpu can"
        )
    if block.get("ratio", 1.0) not in (1, "auto") and config.offload_optimizer_kernel == "torch":
        errors.append(f"{name}.ratio={block['ratio']} needs offload_optimizer_kernel=cpu_adam; set it, or remove ratio")
    return str(device)


def _check_nvme_path(block: Mapping[str, Any], name: str, errors: list[str]) -> None:
    path = block.get("nvme_path")
    if path in (None, "", "auto", NVME_PLACEHOLDER):
        errors.append(
            f"{name}.nvme_path={path} names no folder; give one on a local NVMe disk: {name}.nvme_path=/local/nvme"
        )


def _batch(grain: int, world_size: int) -> dict[str, int]:
    """DeepSpeed's triple, which neither engine counts with: grains are dealt by us."""
    return {
        "train_batch_size": grain * world_size,
        "train_micro_batch_size_per_gpu": grain,
        "gradient_accumulation_steps": 1,
    }


def _adapter_config(
    config: RunConfig, offload: dict[str, Any] | None, *, world_size: int, trainable_numbers: int | None
) -> dict[str, Any]:
    """Always fp32 and without clipping: gradients come summed and clipped (deepspeed.md 1)."""
    zero: dict[str, Any] = {"stage": config.adapter_zero_stage}
    if trainable_numbers is not None:
        zero["reduce_bucket_size"] = min(trainable_numbers, MAX_BUCKET_NUMBERS)
    if offload is not None:
        zero["offload_optimizer"] = offload
    adapter: dict[str, Any] = {**_batch(1, world_size), "gradient_clipping": 0.0, "zero_optimization": zero}
    if offload is not None and config.offload_optimizer_kernel == "torch":
        adapter["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW: equal bits for every partition (deepspeed.md 9)
    return adapter


def _offload_optimizer(
    zero: dict[str, Any], errors: list[str], notes: list[str], *, world_size: int, trainable_numbers: int | None
) -> dict[str, Any] | None:
    """The adapter engine's offload block, taken out of `zero`; None: no offload."""
    _refuse_old_names(zero, errors)
    block = _block(zero, "offload_optimizer", errors)
    name = "deepspeed.zero_optimization.offload_optimizer"
    device = block.pop("device", "none")
    if device == "none":
        return None
    if device == "nvme":
        saved = ""
        if trainable_numbers is not None:
            num_bytes = -(-trainable_numbers * ADAPTER_BYTES_PER_NUMBER // world_size)
            saved = f" and would save {num_bytes / 2**20:.1f} MiB on each process"
        errors.append(
            f"{name}.device=nvme needs ZeRO-3, which adapters do not use{saved}; write cpu, or remove the block"
        )
    elif device != "cpu":
        errors.append(f"{name}.device={device} is unknown; write cpu or none")
    if block.pop("ratio", 1.0) not in (1, "auto"):
        errors.append(f"{name}.ratio needs ZeRO-3, which adapters do not use; remove it")
    kept = {key: block.pop(key) for key in ("pin_memory",) if key in block and block[key] != "auto"}
    block.pop("pin_memory", None)
    if block:
        notes.append(f"zero_optimization.offload_optimizer.{', '.join(block)}: no effect on adapters")
    return {"device": "cpu", **kept}


def _check_offload_param(zero: dict[str, Any], errors: list[str], *, stage: object) -> None:
    """Refuses parameter offload without ZeRO-3 or without a path; drops a block whose device is none."""
    name = "deepspeed.zero_optimization.offload_param"
    block = zero.get("offload_param")
    if block is None:
        return
    if not isinstance(block, dict):
        errors.append(f'{name}={block} is no block; write {{"device": "cpu"}}')
        return
    device = block.get("device", "none")
    if device == "none":
        del zero["offload_param"]
        return
    if device not in ("cpu", "nvme"):
        errors.append(f"{name}.device={device} is unknown; write cpu, nvme or none")
    if stage != 3:
        errors.append(
            f"{name}.device={device} needs zero_optimization.stage 3 (it is {stage}); set it, or remove the block"
        )
    if device == "nvme":
        _check_nvme_path(block, name, errors)


def _check_node_copies(zero: Mapping[str, Any], errors: list[str], *, stage: int, world_size: int) -> None:
    """Refuses ZeRO++'s second copy in each node (hpZ) where DeepSpeed would only assert, or ignore it."""
    size = zero.get("zero_hpz_partition_size", 1)
    if size in (1, "auto"):
        return
    name = f"deepspeed.zero_optimization.zero_hpz_partition_size={size}"
    if not isinstance(size, int) or size < 1:
        errors.append(f"{name} is no count of processes; write the number of processes of a node")
    elif stage != 3:
        errors.append(f"{name} needs stage 3 (it is {stage}); set it, or remove the key")
    elif world_size % min(size, world_size):
        errors.append(f"{name} does not divide the {world_size} processes; write the number of processes of a node")


def _is_expected(key: str) -> bool:
    return key in _ZERO_KEYS or key.startswith(("stage3_", "zero_hpz_"))


def _without_auto(block: Mapping[str, Any], notes: list[str], path: str = "") -> dict[str, Any]:
    """`block` less its `auto` values, so that DeepSpeed's own defaults fill them."""
    result = {}
    for key, value in block.items():
        if value == "auto":
            notes.append(f"deepspeed.{path}{key}: auto leaves it to DeepSpeed's default")
            continue
        result[key] = _without_auto(value, notes, f"{path}{key}.") if isinstance(value, dict) else value
    return result
