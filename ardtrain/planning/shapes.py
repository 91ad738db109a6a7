"""The run's shapes: what is frozen, how ZeRO-3 gathers it, what is trained, and what a grain holds (traced)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ardtrain import preflight, run_data
from ardtrain.adapters import AdapterLinear, DoraLinear, attach, bind_arena
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import DTYPES, gathered_whole, meta_model, quantize_base
from ardtrain.config import ConfigError, RunConfig, adapter_settings
from ardtrain.data import Batch
from ardtrain.dense import DenseModule, attach_dense
from ardtrain.evaluation import loss_sum
from ardtrain.logits import Form as LogitForm
from ardtrain.logits import LogitHead
from ardtrain.methods.base import Method
from ardtrain.planning.tracing import META, Bytes, Kinds, layer_stacks, trace
from ardtrain.ranks import RankTable
from ardtrain.token_rows import TokenRows, embedding_path
from ardtrain.utilisation import matmul_numbers


@dataclass(frozen=True)
class Unit:
    """Parameters that ZeRO-3 gathers and releases together: (identity, numbers, bytes) of each.

    layer: of the repeated layer it lies in, from 0; -1: outside, or all of one. runs_back: does a backward need them?
    """

    parameters: tuple[tuple[int, int, int], ...]
    layer: int = -1
    runs_back: bool = True

    @property
    def numbers(self) -> int:
        return sum(n for _, n, _ in self.parameters)


@dataclass(frozen=True)
class Hooks:
    """ZeRO-3's work on the host. calls: a module's weights are fetched and released; weights: that these walk."""

    calls: int
    weights: int


@dataclass(frozen=True)
class Attention:
    """One stack of layers: count, numbers of a token between them, width of all query heads, are queries blind to
    later keys."""

    layers: int
    hidden: int
    width: int
    causal: bool


@dataclass
class Shapes:
    """Everything that follows from config.json and the method's settings; nothing of hardware or processes."""

    config: RunConfig
    model: PreTrainedModel
    shape: preflight.Shape
    method: Method | None  # None: method full
    layout: ArenaLayout | None
    adapters: dict[str, AdapterLinear | DenseModule] = field(default_factory=dict)

    @property
    def itemsize(self) -> int:
        """Bytes of a frozen number that is not quantised, and of activations."""
        return DTYPES[compute_dtype(self.config)].itemsize

    @cached_property
    def weights(self) -> tuple[tuple[str, int, int], ...]:
        """(name, numbers, bytes) of each frozen parameter; method full: of each parameter. Tied ones once."""
        return tuple((n, p.numel(), parameter_bytes(p, self.itemsize)) for n, p in self.model.named_parameters())

    @cached_property
    def num_trained(self) -> int:
        return self.shape.num_trained

    @cached_property
    def arena_size(self) -> int:
        """Numbers of the arena with its gaps; 0 for method full."""
        return 0 if self.layout is None else self.layout.size

    @cached_property
    def entry_states(self) -> int:
        """How many arena-long averages the method keeps."""
        return 0 if self.method is None else sum(k == "per_entry" for k in self.method.state_tensors().values())

    @property
    def moves_ranks(self) -> bool:
        return self.method is not None and self.method.needs.ranks

    @cached_property
    def matmul_numbers(self) -> int:
        """See utilisation.matmul_numbers."""
        return matmul_numbers(self.model)

    @cached_property
    def quantized_numbers(self) -> int:
        """Frozen weights that each product makes anew from their codes."""
        packed = [getattr(m, "packing", None) for m in self.model.modules()]
        return sum(p.num_weights for p in packed if p is not None)

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """By stack of layers."""
        found = []
        for name, stack in layer_stacks(self.model):
            vision = "vision" in name
            text = self.model.config.get_text_config()
            config: Any = getattr(self.model.config, "vision_config", text) if vision else text
            heads = int(config.num_attention_heads)
            head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
            found.append(Attention(len(stack), int(config.hidden_size), heads * head_dim, causal=not vision))
        return tuple(found)

    def offloaded_bytes(self, *, rows: int, length: int) -> int:
        """Of the layers' inputs that wait for backward in host memory (activation_offload)."""
        if not self.config.activation_offload:
            return 0
        return sum(a.layers * a.hidden for a in self.attentions) * rows * length * self.itemsize

    @cached_property
    def vocabulary(self) -> int:
        """Width of the logits: tokens, or classes."""
        return len(self.shape.labels) or int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def is_multimodal(self) -> bool:
        return hasattr(self.model.config, "vision_config")

    def forward_units(self) -> tuple[Unit, ...]:
        """In the order of the forward."""
        units: list[Unit] = []
        for module, layer, is_whole in self._hooked():
            own = list(module.parameters(recurse=is_whole))
            if own:
                sizes = tuple((id(p), p.numel(), parameter_bytes(p, self.itemsize)) for p in own)
                units.append(Unit(sizes, -1 if is_whole else layer, id(module) not in self._forward_only))
        output = self.model.get_output_embeddings()
        if output is not None and _is_tied(self.model):  # it is walked with the input embedding, and used last
            weight = output.weight
            sizes = ((id(weight), weight.numel(), parameter_bytes(weight, self.itemsize)),)
            units.append(Unit(sizes, runs_back=not self.probes_logits))
        return tuple(units)

    def hooks(self, *, by_module: bool = False) -> Hooks:
        """Of one grain's forward and backward. by_module: where no layer is gathered whole."""
        calls = weights = 0
        seen: set[int] = set()
        for module, layer, is_whole in self._hooked(by_module=by_module):
            if isinstance(module, nn.ModuleList | nn.ModuleDict):  # holds modules, and is never called
                continue
            # A layer's own hooks stand around its second run, those inside it run again.
            again = self.config.gradient_checkpointing and not is_whole and layer in seen
            times = 1 if id(module) in self._forward_only else 3 if again else 2
            calls += times
            weights += times * len(list(module.parameters(recurse=is_whole)))
            if layer >= 0:
                seen.add(layer)
        return Hooks(calls, weights)

    @property
    def probes_logits(self) -> bool:
        """Does the run begin with a forward that finds what stands behind the output embedding?"""
        return self.layout is not None and self.config.loss_chunk_tokens is not None

    @cached_property
    def _forward_only(self) -> frozenset[int]:
        """ids of the modules that are not run back: no gradient comes to what runs before anything trained.

        An input embedding; a vision tower without adapters, and what stands between it and the language model. The
        output embedding where the loss in chunks takes its gradient in the forward (logits.py).
        """
        if self.layout is None:
            return frozenset()
        output = self.model.get_output_embeddings()
        found = {id(output)} if self.probes_logits and output is not None else set()
        trained = {site.module for site in self.shape.table.sites} | {dense.module for dense in self.shape.dense}
        for name, module in self.model.named_modules():
            if name in trained:
                break
            if name and not any(other.startswith(f"{name}.") for other in trained):
                found.add(id(module))
        return frozenset(found)

    def _hooked(self, *, by_module: bool = False) -> Iterator[tuple[nn.Module, int, bool]]:
        """(module, its repeated layer or -1, is it gathered whole) of each module that ZeRO-3 hooks, in order.

        Method full's engine hooks every module, that of a frozen base a decoder layer as one.
        """
        layers = {id(layer): i for i, layer in enumerate(x for _, s in layer_stacks(self.model) for x in s)}
        by_module = by_module or self.layout is None
        whole = set() if by_module else {id(module) for module in gathered_whole(self.model)}
        inside, layer, taken = "", -1, ""
        for name, module in self.model.named_modules():
            if taken and name.startswith(taken):
                continue
            if id(module) in layers:
                inside, layer = f"{name}.", layers[id(module)]
            elif not (inside and name.startswith(inside)):
                inside, layer = "", -1
            taken = f"{name}." if id(module) in whole else ""
            yield module, layer, bool(taken)

    def grain_bytes(self, *, rows: int, length: int) -> dict[str, Bytes]:
        """Phase -> bytes by kind of one grain's forward and backward, as tracing.trace.

        Linear in the rows from two on (one row needs no padding, so no mask): larger grains follow the line.
        """
        if rows <= 3:
            return self.traced(rows=rows, length=length)
        two, three = self.traced(rows=2, length=length), self.traced(rows=3, length=length)
        return {
            phase: Counter({k: two[phase][k] + (rows - 2) * (three[phase][k] - two[phase][k]) for k in three[phase]})
            for phase in two
        }

    def traced(self, *, rows: int, length: int) -> dict[str, Bytes]:
        """`grain_bytes` of a trace with just these rows."""
        key = (rows, length)
        if key not in self._traces:
            self._traces[key] = _trace(self, rows, length)
        return self._traces[key]

    _traces: dict[tuple[int, int], dict[str, Bytes]] = field(default_factory=dict)


def compute_dtype(config: RunConfig) -> str:
    """fp32, bf16 or fp16."""
    return "bf16" if config.bf16 else "fp16" if config.fp16 else "fp32"


def parameter_bytes(parameter: Tensor, itemsize: int) -> int:
    """Bytes of a parameter as the base keeps it: floats in the compute dtype, quantised codes as they are."""
    return parameter.numel() * (itemsize if parameter.is_floating_point() else parameter.element_size())


def read_shapes(config: RunConfig, *, base_on_nvme: bool = False) -> Shapes:
    """From config.json alone. Raises ConfigError: as preflight.check_model."""
    labels = run_data.read_labels(config)
    try:
        model = meta_model(run_data.model_source(config), num_labels=len(labels) or None)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    shape = preflight.shape_of(config, model, labels)
    model.requires_grad_(config.method == "full")
    model.to(DTYPES[compute_dtype(config)])
    if config.quantization is not None:
        quantize_base(model, config.quantization, carried=base_on_nvme)
    model.config.use_cache = False
    model.config.get_text_config().pad_token_id = 0  # a classifier looks for padding
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    if config.method == "full":
        return Shapes(config, model, shape, None, None)
    steps = config.max_steps or preflight.UNKNOWN_STEPS
    method = preflight.make_method(config, shape, total_steps=steps)
    layout = ArenaLayout(_largest(config, shape.table), method.entries, shape.dense)
    dropout = {s.tower: adapter_settings(config, s.tower).lora_dropout for s in shape.table.sites}
    adapters: dict[str, AdapterLinear | DenseModule] = {
        **attach(model, shape.table.sites, dropout=dropout, form=preflight.adapter_form(config), heads=shape.heads)
    }
    for adapter in adapters.values():
        if isinstance(adapter, DoraLinear):
            adapter.measure()
    adapters |= attach_dense(model, list(preflight.in_full(config, model)))
    if shape.tokens:
        adapters[embedding_path(model)] = TokenRows(model, shape.tokens)
    return Shapes(config, model, shape, method, layout, adapters)


def _largest(config: RunConfig, table: RankTable) -> RankTable:
    """The table that a run is planned for: its start, or what probe_lora grows it to, spread evenly."""
    target = config.probe_lora.target_r if config.probe_lora is not None else None
    total = math.ceil((target or 0.0) * len(table.sites))
    if total <= table.total:
        return table
    ranks = [min(s.max_rank, math.ceil(r * total / table.total)) for s, r in zip(table.sites, table.ranks, strict=True)]
    return RankTable.start(table.sites, ranks)


def _is_tied(model: PreTrainedModel) -> bool:
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    return output is not None and output.weight is inputs.weight


def _trace(shapes: Shapes, rows: int, length: int) -> dict[str, Bytes]:
    model, config = shapes.model, shapes.config
    numbers: set[int] = set()
    leaves: list[Tensor] = []
    if shapes.layout is None:
        leaves = list(model.parameters())
    else:
        leaf = torch.empty(shapes.layout.size, device=META, requires_grad=True)
        leaves, gates = [leaf], None
        if config.method == "ard_lora":  # the one with gates
            owners = [(m, a) for m, a in shapes.adapters.items() if isinstance(a, AdapterLinear)]
            count = sum(shapes.layout.positions(m)[1] * a.gates_per_component for m, a in owners)
            gates = torch.empty(count, device=META, requires_grad=True)
            leaves.append(gates)
        bind_arena(shapes.adapters, shapes.layout, leaf, gates)
        for block in shapes.layout.all_blocks:
            numbers |= {rows * length * block.rows, block.rows * block.columns}
    kinds = Kinds(shapes.vocabulary, frozenset(numbers))
    flash = "flash" in (config.attn_implementation or "")  # its kernels take rows of unlike length without a mask
    masked = (config.packing or rows > 1) and not flash
    eager = model.config.get_text_config()._attn_implementation == "eager"
    if shapes.is_multimodal:
        return _trace_towers(shapes, rows, length, leaves, kinds, eager=eager)

    def run() -> Tensor:
        batch = _batch(shapes, rows, length)
        return loss_sum(model, batch, device=META, logit_head=_logit_head(shapes))

    return trace(model, run, leaves, kinds, masked=masked, eager=eager)


def _batch(shapes: Shapes, rows: int, length: int) -> Batch:
    """A grain of full rows without numbers; all tokens are targets."""
    ids = torch.zeros(rows, length, dtype=torch.int64, device=META)
    labels = torch.zeros(rows, length, dtype=torch.int64)  # read on the host
    classes = torch.zeros(rows, dtype=torch.int64, device=META) if shapes.shape.labels else None
    mask = torch.ones(rows, length, dtype=torch.bool) if shapes.shape.labels else None
    return Batch(ids, labels, ids, mask, rows * length, rows * length, class_labels=classes)


def _logit_head(shapes: Shapes) -> LogitHead | None:
    """As adapter_run finds it by a probe, which has no values here; a soft cap is the form that takes memory."""
    head, chunk_tokens = shapes.model.get_output_embeddings(), shapes.config.loss_chunk_tokens
    if head is None or chunk_tokens is None or shapes.layout is None:
        return None
    cap = getattr(shapes.model.config.get_text_config(), "final_logit_softcapping", None)
    return LogitHead(head, LogitForm(cap=cap), chunk_tokens=chunk_tokens)


class _Language(nn.Module):
    """The language tower and its output embedding, from embedded tokens."""

    def __init__(self, language_model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.language_model, self.head = language_model, head

    def forward(self, embedded: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]."""
        hidden = self.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        out: Tensor = self.head(hidden)
        return out


def _trace_towers(
    shapes: Shapes, rows: int, length: int, leaves: list[Tensor], kinds: Kinds, *, eager: bool
) -> dict[str, Bytes]:
    """A vision tower and a language model one after the other: what both hold, and the language's peak.

    The rows' tokens are text and image tokens together.
    """
    model: Any = shapes.model
    inner, config = model.model, model.config
    vision, text = config.vision_config, config.get_text_config()
    dtype = DTYPES[compute_dtype(shapes.config)]

    def see() -> Tensor:
        pixels = torch.empty(rows, 3, vision.image_size, vision.image_size, dtype=dtype, device=META)
        hidden = inner.vision_tower(pixels).last_hidden_state
        return inner.multi_modal_projector(hidden).sum()

    logit_head, language = _logit_head(shapes), _Language(inner.language_model, model.lm_head)

    def read() -> Tensor:
        embedded = torch.empty(rows, length, text.hidden_size, dtype=dtype, device=META)
        places = torch.arange(rows * length, device=META)
        targets = torch.zeros(rows * length, dtype=torch.int64, device=META)
        if logit_head is not None:
            return logit_head.loss_sum(language, {"embedded": embedded}, places, targets)
        whole: Tensor = language(embedded).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(whole, targets, reduction="sum")

    # Each by itself on the parts that run, so that the other's layers are not counted.
    seen = trace(inner.vision_tower, see, leaves, kinds, masked=False, eager=False)
    read_bytes = trace(inner.language_model, read, leaves, kinds, masked=rows > 1, eager=eager)
    kept: Bytes = Counter({kind: size for kind, size in seen["forward"].items() if kind != "logits and loss"})
    return {phase: read_bytes[phase] + kept for phase in read_bytes}
