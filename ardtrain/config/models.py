"""Models of the config: every setting, its default, its bounds, and the rules between fields."""

from __future__ import annotations

import math
import re
import string
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Method = Literal["ard_lora", "elalora", "alora", "lora", "dora", "adalora", "full"]
METHODS: tuple[str, ...] = get_args(Method)
WORKING_METHODS = frozenset({"lora", "elalora"})  # the others are refused by name
SIGNALS = Literal["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGHUP"]


def _tuple_of(value: object) -> object:
    """One string stands for a list of one."""
    return (value,) if isinstance(value, str) else value


class Block(BaseModel):
    """What all blocks share: unknown keys are refused, values cannot be changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        errors = self.cross_field_errors()
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def cross_field_errors(self) -> list[str]:
        """Lines of the rules between fields that are broken; each begins with the setting's name in this block."""
        return []


class TargetBlock(Block):
    """Adapter settings of one tower; what is left out follows the top level."""

    r: int | None = Field(default=None, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)


class DataBlock(Block):
    """Where the rows come from and which of their fields are what."""

    train_file: Annotated[tuple[str, ...], BeforeValidator(_tuple_of)] = Field(min_length=1)
    """JSONL, one path or a list."""
    eval_file: str | None = None
    format: Literal["auto", "completion", "chat", "text"] = "auto"
    """auto: by the fields of the first row."""
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    text_field: str = "text"
    prompt_template: str | None = None
    """str.format over the row's fields instead of prompt_field, such as "{instruction}\\n{input}\\n"."""
    completion_template: str | None = None
    """str.format over the row's fields instead of completion_field."""
    on_bad_row: Literal["error", "skip"] = "error"
    """skip: left out and counted."""

    def cross_field_errors(self) -> list[str]:
        errors = []
        for name in ("prompt_template", "completion_template"):
            try:
                fields = [field for _, field, _, _ in string.Formatter().parse(getattr(self, name) or "")]
            except ValueError as error:
                errors.append(f"{name} is no str.format template ({error}); write {{{{ and }}}} for braces in the text")
                continue
            if any(field is not None and not field.isidentifier() for field in fields):
                errors.append(f"{name} may hold plain field names only, such as {{instruction}}; rename the others")
        return errors


class OptimizerBlock(Block):
    """AdamW of the trained numbers."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class ElaLoraBlock(Block):
    """ElaLoRA (arXiv 2504.00254); warm-ups and interval in optimizer steps. Source: methods.md 2.3, 2.5, 2.8."""

    init_warmup: int = Field(ge=0)
    """Steps before the first interval starts."""
    final_warmup: int = Field(ge=0)
    """Last steps of the run, in which ranks stay."""
    mask_interval: int = Field(ge=1)
    """Steps between two reallocations."""
    b: int = Field(default=4, ge=1)
    """Most components moved in one reallocation, over all sites."""
    k: int = Field(default=2, ge=1)
    """Most components a site loses or gains in one reallocation."""
    enable_scheduler: bool = True
    """Let b fall to 0 over the run (cubic)."""
    beta1: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the sensitivity's average."""
    beta2: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the average of its spread."""
    reg_orth_coef: float = Field(default=0.1, ge=0)
    reg_orth_form: Literal["mean_norm", "squared"] = "mean_norm"
    """mean_norm: the published code; squared: the paper."""
    allow_swap: bool = True
    """A site may lose and gain in one reallocation (published); false: it does not."""
    newborn_immunity: bool = True
    """A newborn component cannot be pruned for one interval (ours)."""
    newborn_norm: Literal["mean", "unit"] = "mean"
    """Length of newborn vectors: the mean of the site's rows (ours) or 1 (published)."""


class RunConfig(Block):
    """One run. PEFT's and Hugging Face's names; a method's own settings stand in a block of its name."""

    schema_version: Literal[1] = 1
    model_name_or_path: str = Field(min_length=1)
    """Folder or hub name of the frozen base."""
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    """None: transformers chooses."""
    tokenizer_name_or_path: str | None = None
    """None: the base's own."""

    method: Method
    r: int = Field(default=8, ge=1)
    """Rank of each site at the start."""
    lora_alpha: float = Field(default_factory=lambda data: 2.0 * data["r"], gt=0)
    """Scale is lora_alpha / r of the start, for the whole run; default 2 r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    """all-linear, a list of name endings, or one regular expression for the full name (PEFT)."""
    exclude_modules: str | tuple[str, ...] | None = None
    """As target_modules: what to leave out."""
    targets: dict[str, TargetBlock] = {}
    """Adapter settings by tower, such as {vision: {r: 4}}."""
    elalora: ElaLoraBlock | None = None

    data: DataBlock
    max_length: int = Field(default=512, ge=2)
    """Tokens of a row."""
    truncation: Literal["error", "drop", "right"] = "drop"
    """What becomes of longer rows."""
    packing: bool = False
    """Fill rows with several documents, kept apart."""
    chat_template: str | None = None
    """Path or text of a Jinja2 template; None: the tokenizer's."""

    output_dir: str = Field(min_length=1)
    seed: int = Field(default=42, ge=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; wins over num_train_epochs."""
    num_train_epochs: float | None = Field(
        default_factory=lambda data: 3.0 if data["max_steps"] is None else None, gt=0
    )
    """Default 3 when max_steps is not given."""
    per_device_train_batch_size: int = Field(default=1, ge=1)
    """Samples of one grain, the unit of work."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Samples of one optimizer step, whatever the number of processes: a whole number of grains."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    """Instead of global_batch_size, which it fixes at the first start."""
    per_device_eval_batch_size: int = Field(default_factory=lambda data: data["per_device_train_batch_size"], ge=1)
    """Default: the grain of training."""
    learning_rate: float = Field(default=1e-4, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Warm-up as a share of all steps, instead of warmup_steps."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """0: no clipping."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """Steps in a row that may be void for a non-finite loss or gradient."""
    optimizer: OptimizerBlock = OptimizerBlock()

    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    num_threads: int = Field(default=1, ge=1)
    """Threads of each process on the CPU; sums depend on it."""
    reproducible: bool = True
    """Deterministic kernels; false may choose faster ones."""
    adapter_zero_stage: Literal[1, 2] = 1
    """ZeRO stage of the trained numbers."""
    offload_optimizer_kernel: Literal["torch", "cpu_adam"] = "torch"
    """With offload_optimizer. cpu_adam: faster, equal bits for the same number of processes only."""
    deepspeed: str | dict[str, Any] | None = None
    """DeepSpeed's JSON: a name in ds_configs/, a path, or the mapping itself."""

    eval_on_start: bool = False
    """Held-out loss before the first step: the base's own, since adapters start at zero."""
    eval_steps: int | None = Field(default=None, ge=1)
    max_eval_samples: int | None = Field(default=None, ge=1)
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int | None = Field(default=None, ge=1)
    resume_from_checkpoint: str | None = None
    """auto, or a checkpoint's path."""
    preemption_signal: Annotated[tuple[SIGNALS, ...], BeforeValidator(_tuple_of)] = ("SIGUSR1", "SIGTERM")
    """Signals that save and stop at the end of the step."""
    log_scores: bool | None = None
    """Mean scores of each site at each event; None: below 2,000 sites."""
    score_at: Literal["after_step", "before_step"] = "after_step"
    """Weights and gradient of the scores: after clipping and step (published), or before both."""

    def cross_field_errors(self) -> list[str]:
        return [*self._method_errors(), *self._adapter_errors(), *self._run_errors(), *self._schedule_errors()]

    @property
    def num_grains(self) -> int:
        """G, the grains of one step; only after `with_batch`."""
        assert self.global_batch_size is not None, "with_batch has not run"
        return self.global_batch_size // self.per_device_train_batch_size

    def _method_errors(self) -> list[str]:
        errors = []
        if self.method not in WORKING_METHODS:
            works = ", ".join(sorted(WORKING_METHODS))
            errors.append(f"method={self.method} is not built yet; these work: {works}")
        if self.method == "elalora" and self.elalora is None:
            errors.append("method=elalora needs a block `elalora:` with init_warmup, final_warmup and mask_interval")
        if self.method == "elalora" and max(self.r, *(tower.r or 1 for tower in self.targets.values()), 1) == 1:
            errors.append(
                "r=1 leaves ElaLoRA nothing to prune (one component stays in each site); raise r to 2 or more"
            )
        if self.method != "elalora" and self.elalora is not None:
            errors.append(f"elalora is the block of another method than method={self.method}; remove it (elalora=null)")
        return errors

    def _adapter_errors(self) -> list[str]:
        errors = []
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, tuple) and not all(value) or value in ("", ()):
                errors.append(f"{name} is empty; name at least one module, or remove the setting")
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    errors.append(f"{name}={value} is no regular expression ({error}); correct it or give a list")
        return errors

    def _run_errors(self) -> list[str]:
        errors = []
        grain = self.per_device_train_batch_size
        if self.global_batch_size is not None and self.global_batch_size % grain:
            errors.append(
                f"global_batch_size={self.global_batch_size} is no multiple of per_device_train_batch_size={grain}; "
                "change one of them"
            )
        if self.bf16 and self.fp16:
            errors.append("bf16=true and fp16=true; keep one of them")
        if self.max_steps is None and self.num_train_epochs is None:
            errors.append("max_steps=null and num_train_epochs=null say no length; set one of them")
        if self.warmup_steps and self.warmup_ratio:
            errors.append(
                f"warmup_ratio={self.warmup_ratio} stands beside warmup_steps={self.warmup_steps}; remove one"
            )
        for name in ("eval_steps", "eval_on_start"):
            if getattr(self, name) and self.data.eval_file is None:
                errors.append(f"{name}={getattr(self, name)} has no rows; set data.eval_file")
        return errors

    def _schedule_errors(self) -> list[str]:
        return schedule_errors(self, self.max_steps) if self.max_steps is not None else []


class AdapterSettings(Block):
    """What a site of one tower starts with."""

    r: int
    lora_alpha: float
    lora_dropout: float


def adapter_settings(config: RunConfig, tower: str) -> AdapterSettings:
    """Settings of `tower`; one that sets its own r and no lora_alpha keeps the run's scale, lora_alpha / r."""
    own = config.targets.get(tower, TargetBlock())
    r = own.r if own.r is not None else config.r
    alpha = own.lora_alpha if own.lora_alpha is not None else config.lora_alpha / config.r * r
    dropout = own.lora_dropout if own.lora_dropout is not None else config.lora_dropout
    return AdapterSettings(r=r, lora_alpha=alpha, lora_dropout=dropout)


def num_warmup_steps(config: RunConfig, total_steps: int) -> int:
    """Optimizer steps of warm-up: warmup_steps, or ceil(warmup_ratio x T) as in transformers."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)


def schedule_errors(config: RunConfig, total_steps: int) -> list[str]:
    """Lines of what does not fit into a run of T = `total_steps` optimizer steps.

    ElaLoRA's first and largest reallocation falls on t = init_warmup + mask_interval (methods.md 2.3).
    """
    errors = []
    if config.warmup_steps > total_steps:
        errors.append(f"warmup_steps={config.warmup_steps} exceeds the run's {total_steps} steps; lower it")
    block = config.elalora
    if config.method != "elalora" or block is None:
        return errors
    span = total_steps - block.init_warmup - block.final_warmup
    if span <= 0:
        errors.append(
            f"elalora.init_warmup={block.init_warmup} + elalora.final_warmup={block.final_warmup} leave none of the "
            f"run's {total_steps} steps for reallocation; lower them or train longer"
        )
    elif block.mask_interval >= span:
        errors.append(
            f"elalora.mask_interval={block.mask_interval} gives no reallocation in the {span} steps between the "
            "warm-ups; lower it below that or train longer"
        )
    elif block.enable_scheduler and round(block.b * (1.0 - (block.mask_interval / span) ** 3)) < 1:
        errors.append(
            f"elalora.b={block.b} has fallen to 0 by the first reallocation (step "
            f"{block.init_warmup + block.mask_interval}); lower elalora.mask_interval={block.mask_interval} or raise b"
        )
    return errors
