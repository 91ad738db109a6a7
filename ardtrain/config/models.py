"""Models of the config but for the methods' blocks: every setting, its default, its bounds, rules between fields."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ardtrain.config.block import Block, tuple_of
from ardtrain.config.data import DataBlock
from ardtrain.config.evaluation import GENERATED, LOGGED, EvaluationBlock, best_metric
from ardtrain.config.launcher import LauncherBlock
from ardtrain.config.methods import (
    METHODS,
    NEEDS_BLOCK,
    AdaLoraBlock,
    AloraBlock,
    ArdLoraBlock,
    ElaLoraBlock,
    Method,
    ProbeLoraBlock,
    method_schedule_errors,
)

SIGNALS = Literal["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGHUP"]


def _without_none(value: object) -> object:
    """Hugging Face's report_to: none."""
    return () if value in ("none", None) else tuple_of(value)


def _off(value: object) -> object:
    """YAML 1.1 reads a bare off as false."""
    return "off" if value is False else value


def module_errors(block: Any) -> list[str]:
    """Lines of what is wrong with a block's target_modules and exclude_modules."""
    errors = []
    for name in ("target_modules", "exclude_modules"):
        value = getattr(block, name)
        if isinstance(value, tuple) and not all(value) or value in ("", ()):
            errors.append(f"{name} is empty; name at least one module, or remove the setting")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                errors.append(f"{name}={value} is no regular expression ({error}); correct it or give a list")
    return errors


class TargetBlock(Block):
    """Adapter settings of one tower; what is left out follows the top level."""

    frozen: bool = False
    """No adapter in this tower."""
    full: bool = False
    """Train the tower itself in full, beside the others' adapters; vision or projector."""
    r: int | None = Field(default=None, ge=1)
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    target_modules: str | tuple[str, ...] | None = None
    """As the top level's, among this tower's modules."""
    exclude_modules: str | tuple[str, ...] | None = None
    """As the top level's, among this tower's modules."""

    def cross_field_errors(self) -> list[str]:
        without = [name for name in ("frozen", "full") if getattr(self, name)]
        own = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules")
        given = [name for name in own if getattr(self, name) is not None]
        if len(without) == 2 or (without and given):
            other = given[0] if given else "full"
            return [f"{other} stands beside {without[0]}=true, which leaves no adapter; remove one"]
        return module_errors(self)


class OptimizerBlock(Block):
    """AdamW of the trained numbers."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """Learning rate of B beside A's (LoRA+, arXiv 2402.12354); 1: the same."""


class RunConfig(Block):
    """One run. PEFT's and Hugging Face's names; a method's own settings stand in a block of its name."""

    schema_version: Literal[1] = 1
    model_name_or_path: str = Field(min_length=1)
    """Folder or hub name of the frozen base."""
    revision: str | None = None
    trust_remote_code: bool = False
    verify_weights: bool = False
    """Compare the base's files to their checksums before the start, and refuse numbers that are not finite."""
    attn_implementation: str | None = None
    """None: transformers chooses."""
    tokenizer_name_or_path: str | None = None
    """None: the base's own."""

    task: Literal["causal_lm", "sequence_classification", "image_text_to_text"] = "causal_lm"
    """sequence_classification: the head is trained in full and saved as well; image_text_to_text: PaliGemma."""
    method: Method
    r: int = Field(default=8, ge=1)
    """Rank of each site at the start."""
    lora_alpha: float = Field(default_factory=lambda data: 2.0 * data["r"], gt=0)
    """Scale is lora_alpha / r of the start, for the whole run; default 2 r."""
    use_rslora: bool = False
    """Scale lora_alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Module (its path, an ending of it, or a regular expression) -> its own first rank (PEFT)."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Likewise its own lora_alpha; the scale is lora_alpha / r of its own r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    """all-linear, a list of name endings, or one regular expression for the full name (PEFT)."""
    exclude_modules: str | tuple[str, ...] | None = None
    """As target_modules: what to leave out."""
    trainable_tokens: Annotated[tuple[int | str, ...] | None, BeforeValidator(tuple_of)] = None
    """Tokens (names or ids) whose rows of the input embedding are trained beside the adapters."""
    modules_to_save: Annotated[tuple[str, ...] | None, BeforeValidator(tuple_of)] = None
    """PEFT's; refused, an embedding with its bytes: use trainable_tokens. A classification head is trained anyway."""
    targets: dict[str, TargetBlock] = {}
    """Settings by tower: vision, projector, language, such as {vision: {r: 4}, projector: {full: true}}."""
    budget: Literal["shared", "per_tower"] = "shared"
    """shared: ranks move across towers; per_tower: each keeps its share of the total and is allocated by itself."""
    elalora: ElaLoraBlock | None = None
    probe_lora: ProbeLoraBlock | None = None
    adalora: AdaLoraBlock | None = None
    alora: AloraBlock | None = None
    ard_lora: ArdLoraBlock | None = None

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
    quantization: Literal["int8", "nf4"] | None = None
    """Keep the linears of the frozen base in 8 bit (a scale a row) or 4 bit (NormalFloat, a scale for 64 weights)."""
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    """What gradient_checkpointing keeps, the decoder layers' inputs, waits for backward in host memory."""
    loss_chunk_tokens: int | None = Field(default=512, ge=1)
    """Target tokens whose logits exist at a time; null: the logits of all tokens at once. Bits depend on it."""
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
    launcher: LauncherBlock = LauncherBlock()

    eval_on_start: bool = False
    """Held-out loss before the first step: the base's own, since adapters start at zero."""
    eval_steps: int | None = Field(default=None, ge=1)
    max_eval_samples: int | None = Field(default=None, ge=1)
    eval_metrics: Annotated[tuple[str, ...], BeforeValidator(tuple_of)] = ()
    """Metrics of generated answers at each evaluation, such as exact_match, rougeL, bleu; they cost a generation."""
    metric_for_best_model: str = "loss"
    """By which the file `best` names a checkpoint: a held-out metric as the run logs it, with or without eval_; one of
    generated answers is made at each evaluation."""
    greater_is_better: bool | None = None
    """None: true, but for losses and perplexity."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """End after so many evaluations in a row that are no better; null: never."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """By how much an evaluation must be better than the best to count as better, in the metric's units."""
    evaluation: EvaluationBlock = EvaluationBlock()
    logging_steps: int = Field(default=10, ge=1)
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_without_none)] = ()
    """Trackers that get the numbers of metrics.jsonl as well; each needs its package."""
    run_name: str | None = None
    """The run's name in W&B; none: W&B makes one."""
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int | None = Field(default=None, ge=1)
    resume_from_checkpoint: str | None = None
    """auto, or a checkpoint's path."""
    ranks_from: str | None = None
    """Folder of a PEFT adapter, such as a finished RUN/adapter: its ranks alone, for the start; scales as with r."""
    init_from: str | None = None
    """Folder of a PEFT adapter (LoRA or AdaLoRA) to start from: its weights and ranks, no moments."""
    zero_checkpoint: Annotated[Literal["last", "all", "off"], BeforeValidator(_off)] = "last"
    """When DeepSpeed's own checkpoint of the trained numbers is written beside ours: with the last and at stops."""
    allow_pickle: bool = False
    """Resume from DeepSpeed's own files where ours are missing; they are pickles and can run code."""
    preemption_signal: Annotated[tuple[SIGNALS, ...], BeforeValidator(tuple_of)] = ("SIGUSR1", "SIGTERM")
    """Signals that save and stop at the end of the step."""
    stop_poll_seconds: float = Field(default=30.0, gt=0)
    """A stop request waits at most about so long for a step, an evaluation or an ablation round to end."""
    max_hours: float | None = Field(default=None, gt=0)
    """Save and stop after so long, as on a signal; counted from the start of the process."""
    watchdog_seconds: float | None = Field(default=1800.0, gt=0)
    """A process without progress for so long prints the stacks of its threads and ends with exit code 86."""
    collective_timeout_seconds: float = Field(default=1800.0, gt=0)
    """Time limit of a collective operation; the first waits for the slowest process's loading."""
    check_every: int | None = Field(default=100, ge=1)
    """Steps between two comparisons of ranks, weights and counters over all processes; null: none."""
    log_scores: bool | None = None
    """Mean scores of each site at each event; None: below 2,000 sites."""
    score_at: Literal["after_step", "before_step"] = "after_step"
    """Weights and gradient of the scores: after clipping and step (published), or before both."""

    def cross_field_errors(self) -> list[str]:
        return [*self._method_errors(), *module_errors(self), *self._run_errors(), *self._schedule_errors()]

    @property
    def num_grains(self) -> int:
        """G, the grains of one step; only after `with_batch`."""
        assert self.global_batch_size is not None, "with_batch has not run"
        return self.global_batch_size // self.per_device_train_batch_size

    @property
    def generated_metrics(self) -> tuple[str, ...]:
        """Metrics that an evaluation in training generates answers for."""
        wanted = (*map(best_metric, self.eval_metrics), best_metric(self.metric_for_best_model))
        return tuple(dict.fromkeys(n for n in wanted if n in GENERATED and n not in LOGGED[self.task]))

    def _method_errors(self) -> list[str]:
        errors = []
        for name in METHODS:
            if name == self.method and name in NEEDS_BLOCK and getattr(self, name) is None:
                errors.append(f"method={name} needs a block `{name}:` with {NEEDS_BLOCK[name]}")
            if name != self.method and getattr(self, name, None) is not None:
                errors.append(
                    f"{name} is the block of another method than method={self.method}; remove it ({name}=null)"
                )
        ranks = [tower.r for tower in self.targets.values() if tower.r is not None]
        if self.method == "elalora" and max(self.r, *ranks, *self.rank_pattern.values(), 1) == 1:
            errors.append(
                "r=1 leaves ElaLoRA nothing to prune (one component stays in each site); raise r to 2 or more"
            )
        if self.adalora is not None and self.adalora.target_r > max(self.r, *self.rank_pattern.values(), 1):
            errors.append(
                f"adalora.target_r={self.adalora.target_r} exceeds the first rank, r={self.r}; AdaLoRA only masks: "
                "raise r (the published runs start at 1.5 times the target) or lower target_r"
            )
        if self.ard_lora is not None:
            errors += self._ard_lora_errors(self.ard_lora)
        if self.budget == "per_tower":
            errors += self._per_tower_errors()
        if self.method == "full":
            scale = ("r", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout")
            for name in (*scale, "target_modules", "exclude_modules", "trainable_tokens", "loss_chunk_tokens"):
                field = type(self).model_fields[name]
                unset = name not in self.model_fields_set or getattr(self, name) == field.get_default()
                if not unset:  # a resolved config names every setting
                    errors.append(f"{name} has no meaning for method=full, which trains every weight; remove it")
            if self.quantization is not None:
                errors.append(
                    f"quantization={self.quantization} keeps a frozen base in few bits, and method=full trains every "
                    "weight; remove it or choose an adapter"
                )
        if self.method == "alora" and not self.data.allocation_files:
            errors.append("method=alora judges components on held-out rows; set data.allocation_file or data.eval_file")
        if self.task == "sequence_classification" and self.packing:
            errors.append("packing=true has no meaning for task=sequence_classification, one label a row; remove it")
        if self.task == "image_text_to_text":
            errors += self._image_errors()
        in_full = [tower for tower, own in self.targets.items() if own.full]
        if in_full and self.quantization is not None:
            errors.append(
                f"targets.{in_full[0]}.full=true stands beside quantization={self.quantization}, whose weights are not "
                "trained; remove one"
            )
        return errors

    def _per_tower_errors(self) -> list[str]:
        if self.ard_lora is not None and not self.ard_lora.budget:
            return ["ard_lora.budget=false stands beside budget=per_tower, which divides a budget; remove one"]
        if self.alora is not None and self.alora.shortlist is not None:
            return [
                f"alora.shortlist={self.alora.shortlist:g} picks what is scored exactly over all towers and stands "
                "beside budget=per_tower; remove one"
            ]
        return []

    def _image_errors(self) -> list[str]:
        errors = []
        if self.method == "full":
            errors.append("method=full is not built for task=image_text_to_text; use an adapter")
        if self.packing:
            errors.append("packing=true is not built for task=image_text_to_text, a picture a row; remove it")
        formats = {"data.format": self.data.format}
        formats |= {f"data.sources.{name}.format": own.format for name, own in self.data.sources.items() if own.format}
        for setting, value in formats.items():
            if value not in ("auto", "completion"):
                errors.append(
                    f"{setting}={value} does not go with task=image_text_to_text, whose rows are picture, prompt and "
                    "completion; remove it"
                )
        if "flash" in (self.attn_implementation or ""):
            errors.append(
                f"attn_implementation={self.attn_implementation} cannot draw a mask in which picture and prompt see "
                "each other both ways; remove it"
            )
        return errors

    def _ard_lora_errors(self, block: ArdLoraBlock) -> list[str]:
        errors = []
        if block.target_r is not None and block.target_r < 1:
            errors.append(
                f"ard_lora.target_r={block.target_r:g} is a budget below one component a site, which each keeps; "
                "raise it to 1 or more"
            )
        if block.target_r is not None and not block.budget:
            errors.append("ard_lora.budget=false stands beside ard_lora.target_r; remove one")
        if block.r_max is not None and block.r_max < self.r:
            errors.append(f"ard_lora.r_max={block.r_max} lies below the first rank, r={self.r}; raise it")
        ties = {"depth": ("matrix", "layer"), "heads": ("none", "head")}.get(block.tv_form, (block.tie,))
        if block.tie not in ties:
            errors.append(
                f"ard_lora.tv_form={block.tv_form} stands beside ard_lora.tie={block.tie}, which has no such "
                f"neighbours; set ard_lora.tie={' or '.join(ties)}, or another tv_form"
            )
        if block.tie == "head" and block.mlp_heads > 1:
            errors.append(
                f"ard_lora.tie=head stands beside ard_lora.mlp_heads={block.mlp_heads}, whose pseudo-heads are "
                "no attention heads; choose another tie, or mlp_heads=1"
            )
        if block.meta_interval and not self.data.allocation_files:
            errors.append(
                f"ard_lora.meta_interval={block.meta_interval} needs held-out rows; set data.allocation_file or "
                "data.eval_file"
            )
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
        if self.activation_offload and not self.gradient_checkpointing:
            errors.append(
                "activation_offload=true moves what gradient_checkpointing keeps; set gradient_checkpointing=true"
            )
        if self.max_steps is None and self.num_train_epochs is None:
            errors.append("max_steps=null and num_train_epochs=null say no length; set one of them")
        if self.warmup_steps and self.warmup_ratio:
            errors.append(
                f"warmup_ratio={self.warmup_ratio} stands beside warmup_steps={self.warmup_steps}; remove one"
            )
        errors += self._start_errors()
        for name in ("eval_steps", "eval_on_start", "eval_metrics"):
            if getattr(self, name) and not self.data.held_out_files:
                errors.append(f"{name}={getattr(self, name)} has no rows; set data.eval_file")
        return [*errors, *self._best_errors()]

    def _start_errors(self) -> list[str]:
        """Of what says with which ranks, scales and weights a run starts."""
        errors = []
        whole = ("lora", "elalora", "adalora", "alora", "probe_lora")
        for name, methods in (("init_from", whole), ("ranks_from", (*whole, "dora"))):
            folder = getattr(self, name)
            if folder is None:
                continue
            if self.method not in methods:
                errors.append(
                    f"{name}={folder} starts whole matrices and does not fit method={self.method}; use "
                    f"{', '.join(methods[:-1])} or {methods[-1]}"
                )
            if self.probe_lora is not None and self.probe_lora.level == "head":
                errors.append(
                    f"{name}={folder} starts whole matrices and does not fit probe_lora.level=head; set it to matrix"
                )
            others = ("rank_pattern", "alpha_pattern") if name == "init_from" else ("rank_pattern", "init_from")
            errors += [f"{other} stands beside {name}={folder}; remove one" for other in others if getattr(self, other)]
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                try:
                    re.compile(key)
                except re.error as error:
                    errors.append(f"{name} names {key}, which is no regular expression ({error}); correct it")
        return errors

    def _best_errors(self) -> list[str]:
        errors = []
        known, name = LOGGED[self.task], best_metric(self.metric_for_best_model)
        known += tuple(f"{source}_loss" for source in self.data.held_out_sources)
        generated = () if self.task == "sequence_classification" else GENERATED
        for asked in self.eval_metrics:
            if best_metric(asked) not in generated:
                errors.append(
                    f"eval_metrics={asked} is no metric of generated answers to task={self.task}; "
                    + (f"choose among {', '.join(generated)}" if generated else "remove it: classes need none")
                )
        known += generated
        if name not in known:
            errors.append(
                f"metric_for_best_model={self.metric_for_best_model} is not logged by task={self.task}; choose among "
                f"{', '.join(known)}"
            )
        patience = self.early_stopping_patience
        if patience is not None and self.eval_steps is None:
            errors.append(f"early_stopping_patience={patience} waits for evaluations; set eval_steps")
        if self.early_stopping_threshold and patience is None:
            errors.append(
                f"early_stopping_threshold={self.early_stopping_threshold} has no effect; set early_stopping_patience"
            )
        return errors

    def _schedule_errors(self) -> list[str]:
        return schedule_errors(self, self.max_steps) if self.max_steps is not None else []


def is_greater_better(config: RunConfig) -> bool:
    """Is a greater metric_for_best_model the better one?"""
    metric = best_metric(config.metric_for_best_model)
    smaller = metric in ("loss", "perplexity") or metric.endswith("_loss")
    return not smaller if config.greater_is_better is None else config.greater_is_better


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
    """Lines of what does not fit into a run of T = `total_steps` optimizer steps."""
    errors = []
    if config.warmup_steps > total_steps:
        errors.append(f"warmup_steps={config.warmup_steps} exceeds the run's {total_steps} steps; lower it")
    block = getattr(config, config.method, None)
    if config.method == "ard_lora":
        block = config.ard_lora or ArdLoraBlock()
    return errors + method_schedule_errors(config.method, block, total_steps)
