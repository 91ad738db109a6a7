"""AdapterLinear and its forms: a frozen linear and a low-rank product beside it; put into a model, bound to the arena.

An `AdapterLinear` adopts the linear's own `weight` and `bias`, so the base's parameter names stay. The trained numbers
are never its parameters: the loop hands it views of the arena as plain tensors, so ZeRO-3 sees only frozen weights.

Letters: B batch, T tokens, N = B T, I in, O out, R components, H heads, c largest rank of a head, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardtrain.arena import ArenaLayout
from ardtrain.dense import DenseModule
from ardtrain.heads import Heads, HeadSide
from ardtrain.products import AdapterProduct, FrozenLinear, Group, Probed, Scaled, down, find_groups
from ardtrain.quantized import Packing, QuantizedLinear
from ardtrain.ranks import RankTable, Site

FrozenModule = nn.Linear | QuantizedLinear  # what an adapter may sit on


def frozen_weight(layer: AdapterLinear | FrozenModule) -> Tensor:
    """The frozen weight [O, I] in the compute dtype: itself, or dequantised."""
    packing: Packing | None = getattr(layer, "packing", None)
    return layer.weight.detach() if packing is None else packing.dequantize(layer.weight)


@dataclass(frozen=True)
class Probe:
    """A matrix's probe components: the zero part, whose gradient is wanted, and the other, as a form's rows lie."""

    leaf: Tensor
    fixed: Tensor
    up: bool  # the leaf is B


class AdapterLinear(nn.Module):
    """`W x + bias + B^T (m * (A dropout(x)))` with m = scaling, times the diagonal and the gates where there are any.

    A and B are cast to the compute dtype where they are used; diagonal and gates are float32 and are not.
    """

    weight: Tensor
    bias: Tensor | None
    gates_per_component = 1

    def __init__(self, linear: FrozenModule, *, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight  # [O, I], or as the packing says
        self.packing: Packing | None = getattr(linear, "packing", None)  # of a quantised weight
        self.bias = linear.bias  # [O] or None
        self.scaling = scaling
        self.dropout = dropout
        self.views: Mapping[str, Tensor] | None = None
        self.gates: Tensor | None = None  # [R], or [B, 1, R] for one vector an example
        self.probe: Probe | None = None
        self.group: Group[AdapterLinear] | None = None  # of adapters that see the same input (group_adapters)

    def bind(self, views: Mapping[str, Tensor] | None, ranks: tuple[int, ...], gates: Tensor | None = None) -> None:
        """Takes this step's numbers.

        Args:
            views: part -> view of the leaf; None: no components. ranks: rank of each of the matrix's sites.
            gates: [R] float32, or None.
        """
        self.views, self.gates, self.probe = views, gates, None
        if self.group is not None:
            self.group.forget()

    def forward(self, x_BTI: Tensor) -> Tensor:
        """[B, T, I] -> [B, T, O]; any leading dimensions."""
        if self.views is None:  # rank 0 costs nothing
            out: Tensor = FrozenLinear.apply(x_BTI, self.weight, self.bias, self.packing)
        else:
            out = self._fused(x_BTI, self.weight, self.bias)
        if self.probe is None:
            return out
        own = self.probe
        probed: Tensor = Probed.apply(out, x_BTI, own.leaf, own.fixed, self.scaling, own.up)
        return probed

    def probe_rows(self, part: str, flat: Tensor, count: int) -> Tensor:
        """A piece of a flat tensor, `count` rows a site, in the shape of this form's A or B."""
        return flat.view(count, -1)

    def product(self, x_BTI: Tensor) -> Tensor:
        """The adapter's own contribution [B, T, O]."""
        return self._fused(x_BTI, None, None)

    def _fused(self, x_BTI: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        b, scale = self.up_rows()
        if self._input_is_its_own:
            hidden: Tensor | None = self._own_hidden(x_BTI)
        else:
            hidden = None if self.group is None else self.group.take(self, x_BTI)
        if hidden is not None:
            out, *_ = AdapterProduct.apply(x_BTI, weight, bias, self.packing, b, scale, hidden, 0)
            return out
        members: Sequence[AdapterLinear] = [self] if self.group is None else self.group.members
        rows = {m: a for m in members if (a := m.shared_rows()) is not None}
        if self not in rows:
            rows = {self: self.down_rows()}
        own = list(rows).index(self)
        out, *others = AdapterProduct.apply(x_BTI, weight, bias, self.packing, b, scale, None, own, *rows.values())
        if others:
            assert self.group is not None
            self.group.give(x_BTI, zip((m for m in rows if m is not self), others, strict=True))
        return out

    @property
    def _input_is_its_own(self) -> bool:
        """Does the adapter see other numbers than its linear's input, or gate each example its own way?"""
        return (self.training and self.dropout > 0.0) or self._gates_by_example

    @property
    def _gates_by_example(self) -> bool:
        return self.gates is not None and self.gates.dim() > 1

    def _own_hidden(self, x_BTI: Tensor) -> Tensor:
        """[N, R]: u of the dropped input, and times the gates of each example."""
        x_BTI = F.dropout(x_BTI, self.dropout, self.training)
        hidden = down(x_BTI.flatten(0, -2), self.down_rows().to(x_BTI.dtype))
        if not self._gates_by_example:
            return hidden
        assert self.gates is not None
        gated = hidden.view(*x_BTI.shape[:-1], hidden.shape[-1]) * self._padded(self.gates, -1)
        return gated.to(hidden.dtype).view(hidden.shape)

    def _padded(self, values: Tensor, dim: int = 0) -> Tensor:
        return values

    def shared_rows(self) -> Tensor | None:
        """[R, I] its A for a product with those of its group; None while it takes no part."""
        return None if self.views is None or self._input_is_its_own else self.down_rows()

    def down_rows(self) -> Tensor:
        """[R, I] float32: A."""
        assert self.views is not None
        return self.views["lora_A"]

    def up_rows(self) -> tuple[Tensor, float]:
        """([R, O] float32: B times diagonal and gates where there are any, what is left to multiply it by)."""
        assert self.views is not None
        b, diagonal = self.views["lora_B"], self.views.get("diagonal")
        gates = None if self._gates_by_example else self.gates
        if diagonal is None and gates is None:
            return b, self.scaling
        middle = self.scaling if diagonal is None else diagonal * self.scaling  # [R, 1]
        return b * (middle if gates is None else middle * gates.view(-1, 1)), 1.0

    def extra_repr(self) -> str:
        rank = 0 if self.views is None else len(self.views["lora_A"])
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}"


class DoraLinear(AdapterLinear):
    """DoRA (arXiv 2402.09353): `m * (W x + s B A x) / ||W + s B A|| + bias`, norm over the inputs of each output.

    The norm is not differentiated (section 4.3 of the paper). It needs no [O, I] product: with w = ||W||^2 known,
    `||W + s B A||^2 = w + 2 s (W A^T) . B + s^2 (B A A^T) . B` costs R columns. It depends on the step's weights only,
    so the grains of a step share it; W is read in the forward, where ZeRO-3 has gathered it.
    """

    def __init__(self, linear: FrozenModule, *, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(linear, scaling=scaling, dropout=dropout)
        self._squares = torch.empty(0)  # [O] float32: ||W||^2 of each output
        self._norm: Tensor | None = None
        if not linear.weight.is_meta:
            self.measure()

    def measure(self) -> None:
        """Takes the norms of W, which must be whole and must not change afterwards."""
        self._squares = frozen_weight(self).double().square().sum(dim=1).float()

    @property
    def first_magnitude(self) -> Tensor:
        """[O] float32: the norm of W, so that the layer starts as the base's."""
        return self._squares.sqrt().cpu()

    def bind(self, views: Mapping[str, Tensor] | None, ranks: tuple[int, ...], gates: Tensor | None = None) -> None:
        super().bind(views, ranks, gates)
        self._norm = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        if self.views is None:
            return super().forward(x_BTI)
        if self._norm is None:
            self._norm = self.column_norm()
        whole = self._fused(x_BTI, self.weight, None)
        out: Tensor = Scaled.apply(whole, self.views["magnitude"].view(-1), self._norm, self.bias)
        return out

    @torch.no_grad()
    def column_norm(self) -> Tensor:
        """[O] float32: ||W + s B A|| of each output; products with W in its dtype, sums in float32."""
        assert self.views is not None
        if self._squares.device != self.weight.device:
            self._squares = self._squares.to(self.weight.device)
        a, b = self.views["lora_A"].detach().float(), self.views["lora_B"].detach().float()  # [R, I], [R, O]
        weight = frozen_weight(self)
        crossed = torch.mm(a.to(weight.dtype), weight.t()).float()  # [R, O]
        s = self.scaling
        inner = torch.addmm(crossed, a @ a.t(), b, beta=2.0 * s, alpha=s * s).mul_(b)
        return (self._squares + inner.sum(dim=0)).clamp_min(1e-20).sqrt()


class HeadLinear(AdapterLinear):
    """Each head owns its A and its B (ARD-LoRA, methods.md 1.3 H1, layout own_a).

    Output side (q, k, v): one GEMM with all rows of A, one batched GEMM with each head's B [r, d]. Input side (o): one
    batched GEMM with each head's A [r, d], one GEMM with all rows of B. Heads of unlike rank are padded to the largest
    with zero rows; no block-diagonal matrix is ever made.
    """

    def __init__(
        self, linear: FrozenModule, *, scaling: float, dropout: float = 0.0, num_heads: int, side: HeadSide
    ) -> None:
        super().__init__(linear, scaling=scaling, dropout=dropout)
        self.num_heads, self.side = num_heads, side
        self._rows: Tensor | None = None  # [R] int64: each component's place among heads x largest rank; None: its own
        self._largest = 0

    def bind(self, views: Mapping[str, Tensor] | None, ranks: tuple[int, ...], gates: Tensor | None = None) -> None:
        super().bind(views, ranks, gates)
        self._largest, self._rows = max(ranks), None
        if views is not None and any(r != self._largest for r in ranks):
            places = [h * self._largest + i for h, r in enumerate(ranks) for i in range(r)]
            self._rows = torch.tensor(places, device=views["lora_A"].device)

    def probe_rows(self, part: str, flat: Tensor, count: int) -> Tensor:
        by_head = flat.view(self.num_heads, count, -1)
        return by_head if (part == "lora_B") == (self.side == "out") else by_head.flatten(0, 1)

    def shared_rows(self) -> Tensor | None:
        return None if self.side == "in" else super().shared_rows()

    def down_rows(self) -> Tensor:
        a = self._padded(super().down_rows())
        return a if self.side == "out" else a.view(self.num_heads, self._largest, -1)

    def up_rows(self) -> tuple[Tensor, float]:
        rows, scale = super().up_rows()
        b = self._padded(rows)
        return (b if self.side == "in" else b.view(self.num_heads, self._largest, -1)), scale

    def _padded(self, values: Tensor, dim: int = 0) -> Tensor:
        """Zeros between the heads' rows, up to the largest rank. Backward selects: no sums, so bits are repeatable."""
        if self._rows is None:
            return values
        shape = list(values.shape)
        shape[dim] = self.num_heads * self._largest
        return values.new_zeros(shape).index_copy(dim, self._rows, values)


class SharedHeadLinear(AdapterLinear):
    """Heads share A (q, k, v) or B (o) and mask the other side (methods.md 1.3 H1, layout shared_a).

    A component belongs to the matrix; its gates are one a head, [R, H]. With all gates 1 this is plain LoRA.
    """

    def __init__(
        self, linear: FrozenModule, *, scaling: float, dropout: float = 0.0, num_heads: int, side: HeadSide
    ) -> None:
        super().__init__(linear, scaling=scaling, dropout=dropout)
        self.gates_per_component, self.side = num_heads, side

    def down_rows(self) -> Tensor:
        return self._masked("lora_A")

    def up_rows(self) -> tuple[Tensor, float]:
        return self._masked("lora_B"), self.scaling

    _gates_by_example = False  # its gates [R, H] mask A or B

    def _masked(self, part: str) -> Tensor:
        """[R, H d]: the rows that are each head's own, times its gates; anew in each grain, whose backward frees it."""
        assert self.views is not None
        rows = self.views[part]
        if self.gates is None or part != ("lora_B" if self.side == "out" else "lora_A"):
            return rows
        by_head = rows.view(len(rows), self.gates_per_component, -1) * self.gates.view(len(rows), -1, 1)
        return by_head.view(rows.shape)


Form = Literal["plain", "dora", "own_a", "shared_a"]


def attach(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    dropout: Mapping[str, float],
    form: Form = "plain",
    heads: Mapping[str, Heads] | None = None,
) -> dict[str, AdapterLinear]:
    """Puts an AdapterLinear in the place of each site's linear; module path -> adapter, in base order.

    The model's other linears become BaseLinears.

    Args:
        dropout: by tower, of the adapter's input; towers that are not in it have none.
        form: of the product; own_a and shared_a for the matrices in `heads`, plain for the others.
    """
    out: dict[str, AdapterLinear] = {}
    for site in sites:
        if site.module in out:
            continue
        parent_name, _, child = site.module.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear, geometry = getattr(parent, child), (heads or {}).get(site.module)
        common: dict[str, Any] = {"scaling": site.scaling, "dropout": dropout.get(site.tower, 0.0)}
        if form == "dora":
            adapter: AdapterLinear = DoraLinear(linear, **common)
        elif form == "own_a" and geometry is not None:
            adapter = HeadLinear(linear, **common, num_heads=geometry.count, side=geometry.side)
        elif form == "shared_a" and geometry is not None:
            adapter = SharedHeadLinear(linear, **common, num_heads=geometry.count, side=geometry.side)
        else:
            adapter = AdapterLinear(linear, **common)
        adapter.train(parent.training)
        setattr(parent, child, adapter)
        out[site.module] = adapter
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = BaseLinear
    return out


class BaseLinear(nn.Linear):
    """A frozen linear without an adapter: the same product as the others', in every stage.

    zero.Init replaces F.linear in the whole process by one that keeps its input for backward, and that adds a bias in a
    step of its own: in bfloat16 ZeRO 0 and 3 would differ.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        out: Tensor = FrozenLinear.apply(x, self.weight, self.bias, None)
        return out


def group_adapters(adapters: Mapping[str, nn.Module], run: Callable[[], object]) -> None:
    """Finds by one forward of the model (`run`) which adapters see the same input, and lets those share products."""
    own = [(name, adapter) for name, adapter in adapters.items() if isinstance(adapter, AdapterLinear)]
    for members in find_groups(own, run):
        group = Group(members)
        for adapter in members:
            adapter.group = group


def first_dense(adapters: Mapping[str, AdapterLinear | DenseModule]) -> dict[tuple[str, str], Tensor]:
    """First values of the dense entries by (module, part): magnitudes and what is trained in full."""
    out: dict[tuple[str, str], Tensor] = {}
    for name, adapter in adapters.items():
        if isinstance(adapter, DoraLinear):
            out[name, "magnitude"] = adapter.first_magnitude
        elif isinstance(adapter, DenseModule):
            out |= {(name, part): values for part, values in adapter.first.items()}
    return out


def bind_arena(
    adapters: Mapping[str, AdapterLinear | DenseModule], layout: ArenaLayout, leaf: Tensor, gates: Tensor | None = None
) -> dict[str, dict[str, Tensor]]:
    """Hands each adapter its views of the leaf [N] and its part of the gates; returns the views by module and part.

    gates: as a method orders them (base.Method.gates), or None. Adapters without components get None.
    """
    views = layout.views(leaf)
    pieces: dict[str, Tensor] = {}
    if gates is not None:
        owners = [(m, a) for m, a in adapters.items() if isinstance(a, AdapterLinear)]
        sizes = [layout.positions(m)[1] * a.gates_per_component for m, a in owners]
        pieces = dict(zip((m for m, _ in owners), torch.split(gates, sizes), strict=True))
    for module, adapter in adapters.items():
        own = views.get(module)
        if isinstance(adapter, DenseModule):
            adapter.views = own or {}
        else:
            alive = own if own is not None and "lora_A" in own else None
            adapter.bind(alive, layout.site_ranks[module], pieces.get(module))
    return views


def bind_probes(
    adapters: Mapping[str, AdapterLinear | DenseModule],
    table: RankTable,
    *,
    count: int,
    part: str,
    leaf: Tensor,
    fixed: Tensor,
) -> None:
    """Gives each adapter its probe components for one forward, until the next `bind_arena`.

    Args:
        count: k, of each site. part: which one the leaf is, lora_A or lora_B.
        leaf, fixed: flat, site by site in table order, k rows each.
    """
    other = "lora_A" if part == "lora_B" else "lora_B"
    columns = {"lora_A": [s.in_features for s in table.sites], "lora_B": [s.out_features for s in table.sites]}
    modules = table.sites.modules
    pieces = {
        name: torch.split(flat, [count * sum(columns[name][a:b]) for _, a, b in modules])
        for name, flat in ((part, leaf), (other, fixed))
    }
    for (module, _, _), own, rest in zip(modules, pieces[part], pieces[other], strict=True):
        adapter = adapters[module]
        assert isinstance(adapter, AdapterLinear)
        rows = {part: adapter.probe_rows(part, own, count), other: adapter.probe_rows(other, rest, count)}
        adapter.probe = Probe(rows[part], rows[other], up=part == "lora_B")


def drop_views(adapters: Mapping[str, AdapterLinear | DenseModule]) -> None:
    """Forgets all views, so that the arena behind them can be freed."""
    for adapter in adapters.values():
        if isinstance(adapter, DenseModule):
            adapter.views = {}
        else:
            adapter.bind(None, (0,))
