"""What a grain's forward and backward hold, traced: the model's own code on the meta device, its bytes counted.

The model is cut to a few layers, run with adapters as in training, and the bytes of each kind are continued to its true
depth; nothing is computed and nothing is allocated. So a family, a form of adapter or a change of the code needs no
formula here. Only the attention kernel, which has no meta version, is stood in for (`_flash`).

Letters: B rows of the grain, T tokens of a row, H heads, D numbers of a head.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel

META = torch.device("meta")
STAND_IN = "ardtrain_plan"  # name of the attention that stands in for a kernel
DEPTH = 2  # layers of each stack in the shortest trace
FORWARD, BACKWARD, END, LAYERS = "forward", "backward", "end", "layers"
"""Up to the loss's gradient, the last layer's backward, and all the rest; LAYERS: up to the last but one layer."""

Bytes = Counter[str]


@dataclass(frozen=True)
class Kinds:
    """By which shapes a tensor is told: vocabulary (or classes) in the last dimension; sizes of adapter tensors."""

    vocabulary: int
    adapter_numbers: frozenset[int]

    def of(self, tensor: Tensor) -> str:
        if tensor.dim() and tensor.shape[-1] == self.vocabulary:
            return "logits and loss"
        if tensor.numel() in self.adapter_numbers:
            return "adapter activations"
        return "activations"


class Tally(TorchDispatchMode):
    """Bytes of live storages by kind, and what they were at each phase's peak."""

    def __init__(self, kinds: Kinds) -> None:
        super().__init__()
        self.kinds, self.phase = kinds, FORWARD
        self.peaks: dict[str, Bytes] = {}
        self._live: Bytes = Counter()
        self._seen: dict[int, object] = {}
        self._known: set[int] = set()

    def know(self, tensors: Iterator[Tensor]) -> None:
        """These are counted elsewhere (weights, the arena)."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _grouped if func is torch.ops.aten._grouped_mm.default else func
        out = run(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or key in self._known:
            return
        kind, size = self.kinds.of(tensor), storage.nbytes()
        self._live[kind] += size
        self._seen[key] = weakref.finalize(storage, self._forget, key, kind, size)
        phases = [self.phase]
        if self.phase == FORWARD and not self._live["logits and loss"]:
            phases.append(LAYERS)
        for phase in phases:
            if self._live.total() > self.peaks.get(phase, Counter()).total():
                self.peaks[phase] = Counter(self._live)

    def _forget(self, key: int, kind: str, size: int) -> None:
        del self._seen[key]
        self._live[kind] -= size


def _grouped(x: Tensor, y: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """torch's grouped product of experts, whose own version for meta takes bfloat16 alone.

    Tokens [N, I] by stacked weights [E, I, O]: [N, O]. Their gradient, [I, N] by [N, O] and E ends: [E, I, O].
    """
    return x.new_empty(x.shape[0], y.shape[-1]) if y.dim() == 3 else x.new_empty(len(offs), x.shape[0], y.shape[-1])


class _Flash(torch.autograd.Function):
    """An attention kernel that keeps q, k, v, its output and one float32 a row; [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attend(*, masked: bool, eager: bool) -> Callable[..., tuple[Tensor, None]]:
    """transformers' sdpa: without a mask it shares k and v among heads; with one it repeats them and makes the mask
    anew in each layer, in the dtype of the queries. Or its eager attention, which keeps every score."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        mask = None
        if masked or eager:
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            mask = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2])
        if eager:
            out = _eager(query, key, value, mask, more.get("softcap"))
        else:
            out = _Flash.apply(query, key, value, mask)
        return out.transpose(1, 2).contiguous(), None

    return attend


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """The operations of transformers' eager_attention_forward, Gemma's soft cap among them."""
    scores = torch.matmul(query, key.transpose(2, 3)) * 1.0
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def layer_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The repeated layers of a model, outermost lists only: name and list, each of one class and longer than DEPTH."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= DEPTH:
            continue
        if len({type(layer) for layer in module}) == 1 and not any(name.startswith(f"{n}.") for n, _ in found):
            found.append((name, module))
    return found


@contextmanager
def _cut(model: nn.Module, stacks: Sequence[tuple[str, nn.ModuleList]], depths: Sequence[int]) -> Iterator[None]:
    """The model with so many layers of each stack."""
    for (name, stack), depth in zip(stacks, depths, strict=True):
        model.set_submodule(name, stack[:depth])
    try:
        yield
    finally:
        for name, stack in stacks:
            model.set_submodule(name, stack)


def trace(
    model: PreTrainedModel,
    run: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    kinds: Kinds,
    *,
    masked: bool,
    eager: bool = False,
) -> dict[str, Bytes]:
    """Bytes by kind at the peak of FORWARD, BACKWARD and LAYERS, for the model's full depth.

    Args:
        run: one grain's forward, returns the loss. leaves: what the gradient is taken by; each is freed at once where
            it is a parameter (a sharded engine reduces it).
        masked: rows are padded or packed, so attention gets a mask; eager: the model's attention is no kernel.
    """
    stacks = layer_stacks(model)
    depths = [min(DEPTH, len(stack)) for _, stack in stacks]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}.values()
    before = [c._attn_implementation for c in configs]
    AttentionInterface.register(STAND_IN, _attend(masked=masked, eager=eager))
    for config in configs:
        config._attn_implementation = STAND_IN
    try:
        base = _once(model, stacks, depths, run, leaves, kinds)
        total = {phase: Counter(peak) for phase, peak in base.items()}
        for i, (_, stack) in enumerate(stacks):
            deeper = [d + (i == j) for j, d in enumerate(depths)]
            one_more = _once(model, stacks, deeper, run, leaves, kinds)
            for phase in total:
                for kind in {*base[phase], *one_more[phase]}:
                    slope = one_more[phase][kind] - base[phase][kind]
                    total[phase][kind] += slope * (len(stack) - depths[i] - (phase == LAYERS and i == len(stacks) - 1))
        return total
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _once(
    model: PreTrainedModel,
    stacks: Sequence[tuple[str, nn.ModuleList]],
    depths: Sequence[int],
    run: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    kinds: Kinds,
) -> dict[str, Bytes]:
    """One forward and backward of the cut model."""
    tally = Tally(kinds)
    tally.know(t for t in (*model.parameters(), *model.buffers(), *leaves))
    with _cut(model, stacks, depths):
        handles = []
        if stacks:
            last = stacks[-1][1]
            depth = depths[-1]
            handles.append(_mark(last[depth - 1], tally, BACKWARD))
            handles.append(_mark(last[depth - 2], tally, END))
        own = [p for p in leaves if isinstance(p, nn.Parameter)]
        handles += [p.register_post_accumulate_grad_hook(_drop) for p in own]
        try:
            with tally:
                loss = run()
                if not loss.requires_grad:
                    pass  # nothing is trained in this part of the model
                elif own:
                    loss.backward()  # type: ignore[no-untyped-call]
                else:
                    torch.autograd.grad(loss, list(leaves), allow_unused=True)
                del loss
        finally:
            for handle in handles:
                handle.remove()
    return {phase: tally.peaks.get(phase, Counter()) for phase in (FORWARD, BACKWARD, LAYERS)}


def _mark(layer: nn.Module, tally: Tally, phase: str) -> Any:
    """From the moment on when the gradient reaches this layer's output, bytes count for `phase`."""

    def enter(_: Tensor) -> None:
        tally.phase = phase

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(enter)

    return layer.register_forward_hook(hook)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
