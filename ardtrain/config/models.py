"""Models of the config: every setting, its default, its bounds, and the rules between fields."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from ardtrain.config.block import Block, tuple_of
from ardtrain.config.data import DataBlock
from ardtrain.config.evaluation import GENERATED, LOGGED, EvaluationBlock, best_metric
from ardtrain.config.launcher import LauncherBlock

Method = Literal["ard_lora", "elalora", "alora", "lora", "dora", "adalora", "probe_lora", "full"]
METHODS: tuple[str, ...] = get_args(Method)
NEEDS_BLOCK = {  # method -> settings of its block that have no default
    "elalora": "init_warmup, final_warmup and mask_interval",
    "adalora": "target_r, tinit and tfinal",
    "probe_lora": "init_warmup, final_warmup and mask_interval",
}
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
    newborn_second_moment: Literal["survivors", "zero"] = "survivors"
    """What Adam starts a newborn with: its site's mean, or zero, to learn faster."""
    compat: Literal["reference"] | None = None
    """reference: the published choices, whatever allow_swap, newborn_immunity and newborn_norm say; not its defects."""


class ProbeLoraBlock(Block):
    """Probe growth (ours); the schedule is ElaLoRA's, in optimizer steps. Source: methods.md 8."""

    init_warmup: int = Field(ge=0)
    """Steps before the first interval starts."""
    final_warmup: int = Field(ge=0)
    """Last steps of the run, in which ranks stay."""
    mask_interval: int = Field(ge=1)
    """Steps between two reallocations."""
    b: int = Field(default=4, ge=0)
    """Most components moved in one reallocation, over all sites; 0, with target_r: ranks only grow, or only fall."""
    enable_scheduler: bool = True
    """Let b fall to 0 over the run (cubic)."""
    target_r: float | None = Field(default=None, gt=0)
    """Average rank of a site after the last reallocation, to which the budget goes from r, fast at first; None: r."""
    probes: Literal["ride", "separate"] = "ride"
    """ride: with the last 2 probe_steps steps before a reallocation; separate: that many passes of their own."""
    probe_components: int = Field(default=4, ge=1)
    """Probes of a site; it gains at most so many components in one reallocation."""
    probe_steps: int = Field(default=6, ge=2)
    """Steps that search a site's gradient, and as many that follow what was found and set it against its noise."""
    prune_by: Literal["gate", "sensitivity"] = "gate"
    """gate: average squared gradient of a factor on the component; sensitivity: ElaLoRA's score."""
    budget_in: Literal["components", "parameters"] = "components"
    """What the total that stays is counted in."""
    newborn_immunity: bool = True
    """A newborn component cannot be pruned for one interval."""
    newborn_second_moment: Literal["zero", "survivors"] = "zero"
    """What Adam starts a newborn with: zero, to learn fast; survivors: their site's mean, as other methods."""
    beta: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the averages that decide who leaves."""
    level: Literal["matrix", "head"] = "matrix"
    """head: each attention head of q, k, v and o is a site of its own."""

    def cross_field_errors(self) -> list[str]:
        if self.probes == "ride" and 2 * self.probe_steps > self.mask_interval:
            return [
                f"probe_steps={self.probe_steps} needs {2 * self.probe_steps} steps before a reallocation and "
                f"mask_interval={self.mask_interval} has fewer; lower probe_steps, raise mask_interval, or set "
                "probes=separate"
            ]
        if self.b == 0 and self.target_r is None:
            return ["b=0 moves no component; raise it, or set target_r to the average rank that the run shall end with"]
        return []


class AdaLoraBlock(Block):
    """AdaLoRA (arXiv 2303.10512), PEFT's names; `r` is its init_r, total_step is the run's. Source: methods.md 4.3."""

    target_r: int = Field(ge=1)
    """Average rank of a site at the end; the published runs start at 1.5 times it."""
    tinit: int = Field(ge=0)
    """Steps before the first reduction."""
    tfinal: int = Field(ge=0)
    """Last steps of the run, in which the mask stays."""
    deltaT: int = Field(default=1, ge=1)
    """Steps between two reductions."""
    beta1: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the sensitivity's average."""
    beta2: float = Field(default=0.85, ge=0, lt=1)
    """Decay of the average of its spread."""
    orth_reg_weight: float = Field(default=0.5, ge=0)
    reg_orth_form: Literal["mean_norm", "squared"] = "mean_norm"
    """mean_norm: the published code and PEFT; squared: the paper."""
    compact: Literal["end", "freeze"] = "end"
    """When masked components are removed: with the last step (published), or when the mask is fixed."""


class AloraBlock(Block):
    """ALoRA (arXiv 2403.16187), the paper's values. Source: methods.md 3."""

    n_a: int | None = Field(default=None, ge=1)
    """Components moved in a round; None: as many as a decoder layer has matrices."""
    k1: float = Field(default=1.0, gt=0)
    """Epochs before the first round."""
    k2: float = Field(default=0.25, gt=0)
    """Epochs between two rounds."""
    k1_steps: int | None = Field(default=None, ge=1)
    """k1 in optimizer steps; wins over it."""
    k2_steps: int | None = Field(default=None, ge=1)
    """k2 in optimizer steps; wins over it."""
    rounds: int = Field(default=8, ge=1)
    """Rounds at most."""
    val_batch: int = Field(default=32, ge=1)
    """Rows of the fixed batch that components are judged on, drawn once from data.allocation_file."""
    prune_only_harmful: bool = False
    """Prune only components that score below an empty one."""
    revive: bool = False
    """A matrix that has lost all components may gain again."""
    ablations_per_forward: int = Field(default=8, ge=1)
    """Components judged in one forward pass; bits depend on it, memory grows with it."""
    shortlist: float | None = Field(default=None, gt=0, le=1)
    """Score only this share exactly, the lowest by a first-order estimate (not the paper's method); None: all."""
    prefix_cache: bool = True
    """Start each ablation at its own decoder layer; false for models that run a layer twice or out of order."""


class ArdLoraBlock(Block):
    """ARD-LoRA (arXiv 2506.18267); what the paper leaves open is ours. Source: methods.md 1.3, 1.4."""

    layout: Literal["own_a", "shared_a"] = "own_a"
    """own_a: each head its own A and B; shared_a: the heads of a matrix share one side."""
    head_modules: tuple[str, ...] | None = None
    """Endings of the matrices that are cut by head; None: all attention matrices."""
    mlp_heads: int = Field(default=1, ge=1)
    """Pseudo-heads of each feed-forward matrix."""
    tie: Literal["none", "head", "matrix", "layer"] = "none"
    """What shares one alpha: nothing, a head's q, k, v and o, the heads of a matrix, or a layer."""
    init_warmup: int | None = Field(default=None, ge=0)
    """Steps with fixed ranks at the start; None: a tenth of the run."""
    final_warmup: int | None = Field(default=None, ge=1)
    """Last steps, with frozen ranks; None: a quarter of the run."""
    mask: Literal["ramp", "sigmoid", "straight_through"] = "ramp"
    ramp_width: float = Field(default=1.0, gt=0)
    """Components that the ramp's slope covers."""
    sigmoid_tau: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 0.1)
    """Temperature at the start and at the end of the adapt phase."""
    lr_alpha: float = Field(default=0.05, gt=0)
    alpha_scale: Literal["rms", "none"] = "rms"
    """rms: alpha's gradient in units of its root mean square over all alphas; none: as it is."""
    alpha_interval: int = Field(default=8, ge=1)
    """Steps whose gradients are averaged for one step of alpha."""
    resize_interval: int = Field(default=100, ge=1)
    """Steps between two looks at the capacities."""
    meta_interval: int = Field(default=0, ge=0)
    """0: alpha learns from the training rows; n: from a held-out minibatch every n steps."""
    l1: float = Field(default=0.0, ge=0)
    """First price of a component, in alpha_scale's units; the controller moves it."""
    l1_max: float = Field(default=10.0, gt=0)
    tv_form: Literal["temporal", "temporal_l2", "depth", "heads"] = "temporal"
    """Of what the variation is taken: over time, over layers (with tie matrix or layer), over a matrix's heads."""
    beta: float = Field(default=0.25, ge=0, lt=1)
    """Weight of the total variation beside the l1 price; below 1, or no rank would ever fall."""
    target_r: float | None = Field(default=None, gt=0)
    """Average rank that the controller and the freeze hold; None: that of the start."""
    budget: bool = True
    """false: no controller and no projection; ranks follow l1 alone."""
    controller_rate: float = Field(default=0.5, ge=0)
    budget_in: Literal["components", "parameters"] = "components"
    r_max: int | None = Field(default=None, ge=1)
    """Largest rank; None: twice the start's."""
    capacities: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Sizes that tensors may have; None: 1 to 8, then 10, 12, 14, 16, 20, 24, ..."""


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
        if self.init_from is not None and self.method not in ("lora", "elalora", "adalora", "alora", "probe_lora"):
            errors.append(
                f"init_from={self.init_from} starts whole matrices and does not fit method={self.method}; use lora, "
                "elalora, adalora, alora or probe_lora"
            )
        if self.init_from is not None and self.probe_lora is not None and self.probe_lora.level == "head":
            errors.append(
                f"init_from={self.init_from} starts whole matrices and does not fit probe_lora.level=head; set it to "
                "matrix"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if self.init_from is not None and getattr(self, name):
                errors.append(
                    f"{name} stands beside init_from={self.init_from}, which brings ranks and scales; remove one"
                )
            for key in getattr(self, name):
                try:
                    re.compile(key)
                except re.error as error:
                    errors.append(f"{name} names {key}, which is no regular expression ({error}); correct it")
        for name in ("eval_steps", "eval_on_start", "eval_metrics"):
            if getattr(self, name) and not self.data.held_out_files:
                errors.append(f"{name}={getattr(self, name)} has no rows; set data.eval_file")
        return [*errors, *self._best_errors()]

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
    if config.elalora is not None and config.method == "elalora":
        errors += _elalora_schedule("elalora", config.elalora, total_steps)
    if config.probe_lora is not None and config.method == "probe_lora":
        errors += _elalora_schedule("probe_lora", config.probe_lora, total_steps)
    if config.adalora is not None and config.method == "adalora":
        block = config.adalora
        errors += _no_span("adalora", "tinit", block.tinit, "tfinal", block.tfinal, total_steps)
        span = total_steps - block.tinit - block.tfinal
        last_step = total_steps - block.tfinal - 1
        if not errors and last_step // block.deltaT == block.tinit // block.deltaT:  # reductions fall on its multiples
            errors.append(
                f"adalora.deltaT={block.deltaT} gives no reduction in the {span} steps between tinit and tfinal; "
                "lower it below that or train longer"
            )
    if config.method == "ard_lora":
        ard = config.ard_lora or ArdLoraBlock()
        first, last = ard_lora_warmups(ard, total_steps)
        errors += _no_span("ard_lora", "init_warmup", first, "final_warmup", last, total_steps)
        span = total_steps - first - last
        if not errors and ard.alpha_interval > span:
            errors.append(
                f"ard_lora.alpha_interval={ard.alpha_interval} gives alpha no step in the {span} steps between the "
                "warm-ups; lower it or train longer"
            )
    return errors


def _no_span(block: str, first: str, start: int, last: str, end: int, total_steps: int) -> list[str]:
    if total_steps - start - end > 0:
        return []
    return [
        f"{block}.{first}={start} + {block}.{last}={end} leave none of the run's {total_steps} steps to adapt; lower "
        "them or train longer"
    ]


def ard_lora_warmups(block: ArdLoraBlock, total_steps: int) -> tuple[int, int]:
    """init_warmup and final_warmup in steps, where they are left open: a tenth and a quarter of the run."""
    first = block.init_warmup if block.init_warmup is not None else total_steps // 10
    last = block.final_warmup if block.final_warmup is not None else max(1, total_steps // 4)
    return first, last


def alora_steps(block: AloraBlock, steps_per_epoch: float) -> tuple[int, int]:
    """k1 and k2 in optimizer steps, at least one."""
    k1 = block.k1_steps if block.k1_steps is not None else max(1, round(block.k1 * steps_per_epoch))
    k2 = block.k2_steps if block.k2_steps is not None else max(1, round(block.k2 * steps_per_epoch))
    return k1, k2


def _elalora_schedule(name: str, block: ElaLoraBlock | ProbeLoraBlock, total_steps: int) -> list[str]:
    """ElaLoRA's first and largest reallocation falls on t = init_warmup + mask_interval (methods.md 2.3)."""
    errors = []
    span = total_steps - block.init_warmup - block.final_warmup
    if span <= 0:
        errors.append(
            f"{name}.init_warmup={block.init_warmup} + {name}.final_warmup={block.final_warmup} leave none of the "
            f"run's {total_steps} steps for reallocation; lower them or train longer"
        )
    elif block.mask_interval >= span:
        errors.append(
            f"{name}.mask_interval={block.mask_interval} gives no reallocation in the {span} steps between the "
            "warm-ups; lower it below that or train longer"
        )
    elif block.b and block.enable_scheduler and round(block.b * (1.0 - (block.mask_interval / span) ** 3)) < 1:
        errors.append(
            f"{name}.b={block.b} has fallen to 0 by the first reallocation (step "
            f"{block.init_warmup + block.mask_interval}); lower {name}.mask_interval={block.mask_interval} or raise b"
        )
    return errors
