"""AdapterLinear: a frozen linear and a low-rank product beside it, and how sites are found in a model.

An `AdapterLinear` adopts the linear's own `weight` and `bias`, so the base's parameter names stay. The trained numbers
are never its parameters: the loop hands it views of the arena as plain tensors, so ZeRO-3 sees only frozen weights.

Letters: B batch, T tokens, I in, O out, R components.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardtrain.ranks import Site


class FrozenLinear(torch.autograd.Function):
    """`x W^T + bias` that keeps only a reference to the frozen weight for backward.

    Why not F.linear: under ZeRO-3 torch's own saves a view of the gathered weight, which keeps it in memory, and
    DeepSpeed's replacement (patched in by zero.Init) saves the input as well, which a frozen weight never needs. One
    function for every stage also gives the same bits with and without ZeRO-3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        out = torch.matmul(x, weight.t())
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors  # whole again: ZeRO-3 gathers it before this module's backward
        return torch.matmul(grad, weight), None, None


class AdapterLinear(nn.Module):
    """`W x + bias + B^T (m * (A dropout(x)))` with m = scaling, times the diagonal and the gates where there are any.

    A and B are cast to the compute dtype where they are used; diagonal and gates are float32 and are not.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, *, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight  # [O, I]
        self.bias = linear.bias  # [O] or None
        self.scaling = scaling
        self.dropout = dropout
        self.views: Mapping[str, Tensor] | None = None
        self.gates: Tensor | None = None  # [R], or [B, 1, R] for one vector an example

    def forward(self, x_BTI: Tensor) -> Tensor:
        """[B, T, I] -> [B, T, O]; any leading dimensions."""
        out: Tensor = FrozenLinear.apply(x_BTI, self.weight, self.bias)
        if self.views is None:  # rank 0 costs nothing
            return out
        return out + self.product(x_BTI)

    def product(self, x_BTI: Tensor) -> Tensor:
        """The adapter's own contribution [B, T, O]."""
        assert self.views is not None
        dtype = x_BTI.dtype
        x_BTI = F.dropout(x_BTI, self.dropout, self.training)
        hidden = x_BTI @ self.views["lora_A"].to(dtype).t()  # [B, T, R]
        diagonal = self.views.get("diagonal")
        if diagonal is None and self.gates is None:
            hidden = hidden * self.scaling
        else:
            middle = self.scaling if diagonal is None else diagonal.view(-1) * self.scaling
            hidden = (hidden * (middle if self.gates is None else middle * self.gates)).to(dtype)
        return hidden @ self.views["lora_B"].to(dtype)

    def extra_repr(self) -> str:
        rank = 0 if self.views is None else len(self.views["lora_A"])
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}"


def attach(model: nn.Module, sites: Sequence[Site], *, dropout: Mapping[str, float]) -> dict[str, AdapterLinear]:
    """Puts an AdapterLinear in the place of each site's linear; module path -> adapter, in base order.

    dropout: by tower, of the adapter's input; towers that are not in it have none.
    """
    out: dict[str, AdapterLinear] = {}
    for site in sites:
        if site.module in out:
            continue
        parent_name, _, child = site.module.rpartition(".")
        parent = model.get_submodule(parent_name)
        adapter = AdapterLinear(getattr(parent, child), scaling=site.scaling, dropout=dropout.get(site.tower, 0.0))
        adapter.train(parent.training)
        setattr(parent, child, adapter)
        out[site.module] = adapter
    return out


def bind_views(adapters: Mapping[str, AdapterLinear], views: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Hands each adapter its views of the leaf; adapters without components get None."""
    for module, adapter in adapters.items():
        adapter.views = views.get(module)


def drop_views(adapters: Mapping[str, AdapterLinear]) -> None:
    """Forgets all views, so that the arena behind them can be freed."""
    bind_views(adapters, {})


def linear_modules(model: nn.Module, *, skip: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Path -> linear for every linear layer an adapter may sit on, in `named_modules()` order.

    skip: module paths to leave out (the output embedding; modules that never run).
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == s or name.startswith(s + ".") for s in skip)
    }


def select_modules(
    linears: Mapping[str, nn.Linear], *, target_modules: str | Sequence[str], exclude_modules: Any = None
) -> list[str]:
    """The targeted paths, in base order, by PEFT's rules.

    target_modules: "all-linear"; another string is a regular expression for the whole path; a list holds suffixes.

    Raises:
        ValueError: an entry matches nothing; the message names the nearest module.
    """
    names = list(linears)
    if isinstance(target_modules, str):
        if target_modules == "all-linear":
            chosen = names
        else:
            chosen = [n for n in names if re.fullmatch(target_modules, n)]
            _refuse_empty(target_modules, chosen, names)
    else:
        wanted = list(target_modules)
        for entry in wanted:
            _refuse_empty(entry, [n for n in names if _ends_with(n, entry)], names)
        chosen = [n for n in names if any(_ends_with(n, e) for e in wanted)]
    excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or [])
    kept = [n for n in chosen if not any(_ends_with(n, e) or re.fullmatch(e, n) for e in excluded)]
    if not kept:
        raise ValueError(
            f"exclude_modules={exclude_modules!r} removes every module that target_modules={target_modules!r} names; "
            "exclude fewer"
        )
    return kept


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _refuse_empty(entry: str, matches: Sequence[str], names: Sequence[str]) -> None:
    if matches:
        return
    leaves = sorted({n.rpartition(".")[2] for n in names})
    near = difflib.get_close_matches(entry.rpartition(".")[2], leaves, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"target_modules={entry!r} matches no linear layer of the model; {hint}the model has {', '.join(leaves)}; "
        "or use all-linear"
    )


def make_sites(
    linears: Mapping[str, nn.Linear],
    modules: Sequence[str],
    *,
    r: int,
    lora_alpha: float,
    tower_of: Mapping[str, str],
    tower_settings: Mapping[str, tuple[int, float]],
) -> tuple[list[Site], list[int]]:
    """One matrix site per module and its first rank.

    tower_settings: tower -> (r, lora_alpha) where they differ from the run's.

    Raises:
        ValueError: r exceeds min(in, out) of a module.
    """
    sites, ranks = [], []
    for name in modules:
        linear, tower = linears[name], tower_of[name]
        site_r, alpha = tower_settings.get(tower, (r, lora_alpha))
        largest = min(linear.in_features, linear.out_features)
        if site_r > largest:
            raise ValueError(
                f"r={site_r} exceeds {name} ({linear.in_features} inputs, {linear.out_features} outputs; rank at most "
                f"{largest}); lower r or drop {name.rpartition('.')[2]} from target_modules"
            )
        sites.append(Site(name, name, linear.in_features, linear.out_features, scaling=alpha / site_r, tower=tower))
        ranks.append(site_r)
    return sites, ranks
