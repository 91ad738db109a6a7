"""Which part of a matrix belongs to which attention head, and sites that are heads.

q, k and v: a head owns rows of the weight, so numbers of the output; with grouped-query attention k and v have fewer
heads. Where q, k and v are one matrix, its heads are all of theirs (Phi-3), or a head's three together where they lie
side by side (DeBERTa). The output projection: a head owns columns, so numbers of the input. Matrices of the
feed-forward part have no heads; they may be cut into pseudo-heads of equal width (methods.md 1.3, H1, H12, H13).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ardtrain.ranks import Site

HeadSide = Literal["out", "in"]
_QUERY = ("q_proj", "query", "query_proj", "q_lin", "wq", "attention.self.in_proj")
_KEY_VALUE = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin", "wk", "wv")
_FUSED = ("qkv_proj",)
_OUTPUT = ("o_proj", "out_proj", "attention.output.dense", "out_lin", "wo")
_UP = ("gate_proj", "up_proj", "fc1", "intermediate.dense", "w1", "w3", "lin1")
_FUSED_UP = ("gate_up_proj",)
_DOWN = ("down_proj", "fc2", "output.dense", "w2", "lin2")


@dataclass(frozen=True)
class Heads:
    """How a matrix is cut: `count` heads of equal width on its output or input side."""

    count: int
    side: HeadSide


def find_heads(
    sites: Sequence[Site], configs: Mapping[str, Any], *, mlp_heads: int = 1, chosen: Iterable[str] | None = None
) -> dict[str, Heads]:
    """Module -> how it is cut, for the matrix sites that have heads; others are not in it.

    Args:
        configs: tower -> transformers' config of that tower (num_attention_heads, num_key_value_heads).
        mlp_heads: pseudo-heads of feed-forward matrices; 1: one site for the whole matrix.
        chosen: endings of module names that must have heads; None: all that have.

    Raises:
        ValueError: a head count does not divide the matrix; a chosen module has no heads.
    """
    out: dict[str, Heads] = {}
    for site in sites:
        config = configs[site.tower]
        query = int(getattr(config, "num_attention_heads", 0) or 0)
        kv = int(getattr(config, "num_key_value_heads", None) or query)
        wanted = chosen is None or _ends(site.module, tuple(chosen))
        if not wanted:
            continue
        what = "the model's head count"
        if query and _ends(site.module, _QUERY):
            heads = Heads(query, "out")
        elif query and _ends(site.module, _KEY_VALUE):
            heads = Heads(kv, "out")
        elif query and _ends(site.module, _FUSED):
            heads = Heads(query + 2 * kv, "out")
        elif query and _ends(site.module, _OUTPUT):
            heads = Heads(query, "in")
        elif mlp_heads > 1 and _ends(site.module, _UP):
            heads, what = Heads(mlp_heads, "out"), "ard_lora.mlp_heads"
        elif mlp_heads > 1 and _ends(site.module, _FUSED_UP):
            heads, what = Heads(2 * mlp_heads, "out"), "2 x ard_lora.mlp_heads"
        elif mlp_heads > 1 and _ends(site.module, _DOWN):
            heads, what = Heads(mlp_heads, "in"), "ard_lora.mlp_heads"
        elif chosen is not None:
            raise ValueError(f"ard_lora.head_modules names {site.module}, a matrix without heads; leave it out")
        else:
            continue
        width = site.out_features if heads.side == "out" else site.in_features
        if width % heads.count:
            raise ValueError(
                f"{what}={heads.count} does not divide {site.module}'s {width} {heads.side}puts; choose a divisor, or "
                "leave the module out of ard_lora.head_modules"
            )
        out[site.module] = heads
    return out


def refuse_fused(heads: Iterable[str]) -> None:
    """For ties between a head's q, k, v and o: they must be matrices of their own.

    Raises:
        ValueError: a matrix holds the heads of all three one after the other.
    """
    fused = [module for module in heads if _ends(module, _FUSED)]
    if fused:
        raise ValueError(
            f"ard_lora.tie=head cannot tell which heads of {fused[0]} belong together: it holds q, k and v in one "
            "matrix; set ard_lora.tie=none, matrix or layer"
        )


def split_heads(
    sites: Sequence[Site], ranks: Sequence[int], heads: Mapping[str, Heads]
) -> tuple[list[Site], list[int]]:
    """Sites and first ranks with each matrix in `heads` cut into one site a head (layout own_a).

    Raises:
        ValueError: a first rank exceeds what a head can use.
    """
    out_sites: list[Site] = []
    out_ranks: list[int] = []
    for site, rank in zip(sites, ranks, strict=True):
        cut = heads.get(site.module)
        if cut is None:
            out_sites.append(site)
            out_ranks.append(rank)
            continue
        side = "out_features" if cut.side == "out" else "in_features"
        width = getattr(site, side) // cut.count
        for h in range(cut.count):
            numbers: dict[str, Any] = {side: width}
            own = replace(site, name=f"{site.module}:head.{h}", kind="head", head=h, start=h * width, **numbers)
            if rank > own.max_rank:
                raise ValueError(
                    f"r={rank} exceeds a head of {site.module} ({own.in_features} inputs, {own.out_features} outputs; "
                    f"rank at most {own.max_rank}); lower r, or set ard_lora.layout=shared_a"
                )
            out_sites.append(own)
            out_ranks.append(rank)
    return out_sites, out_ranks


def _ends(module: str, endings: Sequence[str]) -> bool:
    return any(module == e or module.endswith("." + e) for e in endings)
