"""The products of a linear and its adapter, fused: no pass over the output beside the frozen product's own.

`x W^T + bias + u B` with `u = x A^T`: u B is added inside the GEMM that makes it, in forward (to the output) and in
backward (to the gradient of x). Adapters that get the very same tensor (q, k and v; gate and up) form a group: the rows
of all their A's are one GEMM, in forward and in backward. Kept for backward: u, and x once a group, which dL/dA needs.

Letters: N rows, I in, O out, R components, H heads, c largest rank of a head, d numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ardtrain.tracing import part


class Packed(Protocol):
    """How a quantised weight lies in its parameter (quantized.Packing)."""

    def dequantize(self, parameter: Tensor) -> Tensor: ...


def frozen_product(x_NI: Tensor, weight: Tensor, bias: Tensor | None, packing: Packed | None) -> Tensor:
    """[N, O] = x W^T + bias, of a weight [O, I] or of what its packing makes of it."""
    with part("frozen"):
        weight = weight if packing is None else packing.dequantize(weight)
        return torch.mm(x_NI, weight.t()) if bias is None else torch.addmm(bias, x_NI, weight.t())


def frozen_gradient(grad_NO: Tensor, weight: Tensor, packing: Packed | None) -> Tensor:
    """[N, I]: gradient of x by the frozen product."""
    with part("frozen"):
        weight = weight if packing is None else packing.dequantize(weight)
        return torch.mm(grad_NO, weight)


class FrozenLinear(torch.autograd.Function):
    """`x W^T + bias` that keeps only a reference to the frozen weight for backward.

    Why not F.linear: under ZeRO-3 torch's own saves a view of the gathered weight, which keeps it in memory, and
    DeepSpeed's replacement (patched in by zero.Init) saves the input as well, which a frozen weight never needs. One
    function for every stage also gives the same bits with and without ZeRO-3. A quantised weight is dequantised in
    forward and again in backward: torch's own product would keep it, in full precision, for every linear of the model.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packed | None = None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.packing = packing
        return _unflattened(frozen_product(x.reshape(-1, x.shape[-1]), weight, bias, packing), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors  # whole again: ZeRO-3 gathers it before this module's backward
        of_x = frozen_gradient(grad.reshape(-1, grad.shape[-1]), weight, ctx.packing)
        return _unflattened(of_x, grad), None, None, None


def _unflattened(out_NO: Tensor, x: Tensor) -> Tensor:
    """[..., O] for x [..., I], of which there may be none, and no view: what a Function gives back as a view may not be
    changed in place, which DeBERTa does."""
    out: Tensor = torch.ops.aten._unsafe_view(out_NO, [*x.shape[:-1], out_NO.shape[-1]])
    return out


def down(x_NI: Tensor, a: Tensor) -> Tensor:
    """[N, R] = x A^T for a [R, I]; for a [H, c, d] each head's own columns of x by its own rows: [N, H c]."""
    if a.dim() == 2:
        return torch.mm(x_NI, a.t())
    heads, largest, width = a.shape
    x_HNd = x_NI.view(-1, heads, width).transpose(0, 1)
    return torch.bmm(x_HNd, a.transpose(1, 2)).transpose(0, 1).reshape(-1, heads * largest)


def _down_gradient(x_NI: Tensor, grad_NR: Tensor, a: Tensor) -> Tensor:
    """Gradient of a, in its shape."""
    if a.dim() == 2:
        return torch.mm(grad_NR.t(), x_NI)
    heads, largest, width = a.shape
    grad_HcN = grad_NR.view(-1, heads, largest).permute(1, 2, 0)
    return torch.bmm(grad_HcN, x_NI.view(-1, heads, width).transpose(0, 1))


def _add_down_input(out_NI: Tensor, grad_NR: Tensor, a: Tensor) -> None:
    """Adds the gradient of x, in place."""
    if a.dim() == 2:
        out_NI.addmm_(grad_NR, a)
        return
    heads, largest, width = a.shape
    grad_HNc = grad_NR.view(-1, heads, largest).transpose(0, 1)
    out_NI.view(-1, heads, width).transpose(0, 1).baddbmm_(grad_HNc, a)


def _add_up(out_NO: Tensor, hidden_NR: Tensor, b: Tensor) -> None:
    """Adds u B for b [R, O], in place; for b [H, c, d] each head's own columns of the output."""
    if b.dim() == 2:
        out_NO.addmm_(hidden_NR, b)
        return
    heads, largest, width = b.shape
    hidden_HNc = hidden_NR.view(-1, heads, largest).transpose(0, 1)
    out_NO.view(-1, heads, width).transpose(0, 1).baddbmm_(hidden_HNc, b)


def _up_transposed(grad_NO: Tensor, b: Tensor) -> Tensor:
    """[N, R]: gradient of u."""
    return down(grad_NO, b)  # the same product: of each head's own columns, or of all


def _up_gradient(hidden_NR: Tensor, grad_NO: Tensor, b: Tensor) -> Tensor:
    """Gradient of b, in its shape."""
    if b.dim() == 2:
        return torch.mm(hidden_NR.t(), grad_NO)
    heads, largest, width = b.shape
    grad_HNd = grad_NO.view(-1, heads, width).transpose(0, 1)
    return torch.bmm(hidden_NR.view(-1, heads, largest).permute(1, 2, 0), grad_HNd)


def _joined(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[sum R, I]: the rows of several A's, cast; of one A, itself."""
    return rows[0].to(dtype) if len(rows) == 1 else torch.cat([a.to(dtype) for a in rows])


class AdapterProduct(torch.autograd.Function):
    """`x W^T + bias + scale u B`, and the u of the others in its group from the adapter that comes first.

    A's and B are cast to the compute dtype inside, in backward again, so that no cast copy is kept.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        packing: Packed | None,
        b: Tensor,
        scale: float,
        hidden: Tensor | None,
        own: int,
        *rows: Tensor,
    ) -> tuple[Tensor, ...]:
        """[..., I] -> [..., O], and the others' u [N, R] in the group's order.

        Args:
            weight, packing: frozen, [O, I] or packed; None: the adapter's own contribution alone.
            b: [R, O] or [H, c, d].
            hidden: [N, R], u where it is known; None: computed here, from `rows`, the A's of the whole group in its
                order, of which `own` is this adapter's.
        """
        x_NI = x.reshape(-1, x.shape[-1])
        out = None if weight is None else frozen_product(x_NI, weight, bias, packing)
        others: list[Tensor] = []
        with part("adapter"):
            if hidden is None:
                whole = down(x_NI, _joined(rows, x.dtype))
                others = list(whole.split([len(a) for a in rows], dim=1)) if len(rows) > 1 else [whole]
                hidden = others.pop(own)
            if out is None:
                out = x.new_zeros(len(x_NI), b.shape[-1] if b.dim() == 2 else len(b) * b.shape[-1])
            _add_up(out, hidden, (b * scale).to(x.dtype))
        ctx.scale, ctx.own, ctx.leads, ctx.packing = scale, own, bool(rows), packing
        ctx.save_for_backward(x if rows else None, weight, b, hidden, *rows)
        return _unflattened(out, x), *others

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_others: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, b, hidden, *rows = ctx.saved_tensors  # W is whole again: ZeRO-3 gathers it before this backward
        needs_x, needs_b, needs_rows = ctx.needs_input_grad[0], ctx.needs_input_grad[4], ctx.needs_input_grad[8:]
        grad_NO, of_b, of_x = grad.reshape(-1, grad.shape[-1]), None, None
        with part("adapter"):
            of_hidden = _up_transposed(grad_NO, (b * ctx.scale).to(grad.dtype))
            if needs_b:
                of_b = _up_gradient(hidden, grad_NO, b).to(b.dtype).mul_(ctx.scale)
        if needs_x and weight is not None:
            of_x = frozen_gradient(grad_NO, weight, ctx.packing)
        of_rows: Sequence[Tensor | None] = [None] * len(rows)
        if ctx.leads:
            with part("adapter"):
                if of_others:
                    of_hidden = torch.cat([*of_others[: ctx.own], of_hidden, *of_others[ctx.own :]], dim=1)
                if any(needs_rows):
                    of_a = _down_gradient(x.reshape(-1, x.shape[-1]), of_hidden, rows[0]).to(rows[0].dtype)
                    of_rows = of_a.split([len(a) for a in rows])
                if needs_x:
                    of_x = torch.zeros_like(x).view(-1, x.shape[-1]) if of_x is None else of_x
                    _add_down_input(of_x, of_hidden, _joined(rows, grad.dtype))
        of_x = None if of_x is None else _unflattened(of_x, grad)
        return of_x, None, None, None, of_b, None, None if ctx.leads else of_hidden, None, *of_rows


class Probed(torch.autograd.Function):
    """The output as it is; backward also gives the gradient of probe components (methods.probing), and nothing else.

    Probes add `scale u B`, u = x A^T, of which one of A and B is zero: the output and the gradient of x are what they
    are without them, to the bit, because the products that would say so are left out.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, out: Tensor, x: Tensor, leaf: Tensor, fixed: Tensor, scale: float, up: bool
    ) -> Tensor:
        """[..., O] as given.

        Args:
            leaf: the zero part, B if `up`, else A; fixed: the other. In the shapes that AdapterProduct takes.
        """
        with part("probes"):
            kept = down(x.reshape(-1, x.shape[-1]), fixed.to(x.dtype)) if up else x
        ctx.scale, ctx.up = scale, up
        ctx.save_for_backward(kept, leaf, fixed)
        return _unflattened(out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        kept, leaf, fixed = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        with part("probes"):
            if ctx.up:
                of_leaf = _up_gradient(kept, grad_NO, leaf).to(leaf.dtype).mul_(ctx.scale)
            else:
                of_hidden = _up_transposed(grad_NO, (fixed * ctx.scale).to(grad.dtype))
                of_leaf = _down_gradient(kept.reshape(-1, kept.shape[-1]), of_hidden, leaf).to(leaf.dtype)
        return grad, None, of_leaf, None, None, None


class Scaled(torch.autograd.Function):
    """`magnitude / norm * whole + bias` for magnitude and norm [O] float32: one pass over the output, in float32.

    The norm has no gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, whole: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(whole, magnitude, norm)
        with part("adapter"):
            factor = magnitude / norm
            if bias is not None and bias.dtype == factor.dtype:
                return torch.addcmul(bias, whole, factor)
            out = torch.mul(whole, factor, out=torch.empty_like(whole))
            return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        whole, magnitude, norm = ctx.saved_tensors
        of_whole = of_magnitude = None
        with part("adapter"):
            products = torch.mul(grad.to(norm.dtype), whole)
            if ctx.needs_input_grad[1]:
                of_magnitude = products.flatten(0, -2).sum(dim=0).div_(norm)
            if ctx.needs_input_grad[0]:
                # Memory that is new costs more than the product: the sum's is used again where it fits.
                room = products if products.dtype == grad.dtype else torch.empty_like(whole)
                of_whole = torch.mul(grad, magnitude / norm, out=room)
        return of_whole, of_magnitude, None, None


Adapter = TypeVar("Adapter", bound=nn.Module)


@dataclass(eq=False)
class Group(Generic[Adapter]):
    """Adapters whose inputs were one tensor when the model was looked at (`find_groups`).

    What decides is each call's input: u is taken only for the very same numbers, else the adapter makes its own. A
    call computes u for all members, whoever is first, so that bits do not hang on who is.
    """

    members: Sequence[Adapter]
    _key: tuple[Any, ...] = ()
    _input: Tensor | None = None  # held, so that its memory cannot become another tensor's
    _hidden: dict[int, Tensor] = field(default_factory=dict)  # of members that have not come yet

    def take(self, member: Adapter, x: Tensor) -> Tensor | None:
        """[N, R] the member's u, if an earlier member of this forward made it from this x."""
        if self._input is None or self._key != same_numbers(x):
            return None
        hidden = self._hidden.pop(id(member), None)
        if not self._hidden:
            self.forget()
        return hidden

    def give(self, x: Tensor, others: Iterable[tuple[Adapter, Tensor]]) -> None:
        """Keeps what the others will ask for."""
        self._key, self._input, self._hidden = same_numbers(x), x, {id(m): u for m, u in others}

    def forget(self) -> None:
        """Drops what nobody asked for."""
        self._key, self._input, self._hidden = (), None, {}


def same_numbers(x: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are alive at the same time: they are the same numbers and want the same gradient.

    Not `is`: ZeRO-3's hooks, or ours in their place, give every module a view of its own. The version tells a change
    in place.
    """
    return x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled()


def find_groups(adapters: Sequence[tuple[str, Adapter]], run: Callable[[], object]) -> list[list[Adapter]]:
    """Adapters of one parent module that got the very same input one after the other while `run` ran the model once.

    Only one input is held at a time, so it needs no memory worth speaking of.

    Args:
        adapters: (path, module); they have run with the adapters' own forward. run: one forward.
    """
    groups: list[list[Adapter]] = []
    last: tuple[Any, ...] = ()
    held: list[Tensor] = []
    seen: set[int] = set()

    def look(parent: str, module: Adapter, x: Tensor) -> None:
        nonlocal last
        key = (parent, *same_numbers(x))
        if id(module) in seen:
            last = ()
            return
        seen.add(id(module))
        if key == last:
            groups[-1].append(module)
        else:
            groups.append([module])
        last, held[:] = key, [x]

    def looking(parent: str) -> Callable[[Adapter, tuple[Any, ...]], None]:
        return lambda module, args: look(parent, module, args[0])

    handles = [m.register_forward_pre_hook(looking(name.rpartition(".")[0])) for name, m in adapters]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [group for group in groups if len(group) > 1]
