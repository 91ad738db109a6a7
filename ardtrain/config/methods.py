"""The methods and their blocks of settings: each setting's default and bounds, and the rules within a block."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from ardtrain.config.block import Block

Method = Literal["ard_lora", "elalora", "alora", "lora", "dora", "adalora", "probe_lora", "full"]
METHODS: tuple[str, ...] = get_args(Method)
NEEDS_BLOCK = {  # method -> settings of its block that have no default
    "elalora": "init_warmup, final_warmup and mask_interval",
    "adalora": "target_r, tinit and tfinal",
    "probe_lora": "init_warmup, final_warmup and mask_interval",
}


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


def method_schedule_errors(method: str, block: Block | None, total_steps: int) -> list[str]:
    """Lines of what of the method's block does not fit into a run of T = `total_steps` optimizer steps."""
    if isinstance(block, ElaLoraBlock | ProbeLoraBlock):
        return _reallocation_errors(method, block, total_steps)
    if isinstance(block, AdaLoraBlock):
        return _adalora_errors(block, total_steps)
    return _ard_lora_errors(block, total_steps) if isinstance(block, ArdLoraBlock) else []


def _reallocation_errors(name: str, block: ElaLoraBlock | ProbeLoraBlock, total_steps: int) -> list[str]:
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


def _adalora_errors(block: AdaLoraBlock, total_steps: int) -> list[str]:
    errors = _no_span("adalora", "tinit", block.tinit, "tfinal", block.tfinal, total_steps)
    span = total_steps - block.tinit - block.tfinal
    last_step = total_steps - block.tfinal - 1
    if not errors and last_step // block.deltaT == block.tinit // block.deltaT:  # reductions fall on its multiples
        errors.append(
            f"adalora.deltaT={block.deltaT} gives no reduction in the {span} steps between tinit and tfinal; "
            "lower it below that or train longer"
        )
    return errors


def _ard_lora_errors(block: ArdLoraBlock, total_steps: int) -> list[str]:
    first, last = ard_lora_warmups(block, total_steps)
    errors = _no_span("ard_lora", "init_warmup", first, "final_warmup", last, total_steps)
    span = total_steps - first - last
    if not errors and block.alpha_interval > span:
        errors.append(
            f"ard_lora.alpha_interval={block.alpha_interval} gives alpha no step in the {span} steps between the "
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
