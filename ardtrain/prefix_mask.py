"""PaliGemma's attention: picture and prompt see each other both ways, the answer is causal, padding is closed.

The rule is written down here as a mask (`prefix_mask`). transformers draws the mask for its attention kernels from the
padding and from our token types (`token_types`), and it has drawn it wrongly before (transformers#30967, #35855,
#40917): `check_first_masks` compares, in a run's first forward, what the language model receives with the rule.

Letters: B batch, T tokens, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PREFIX, SUFFIX = 0, 1  # token types, as PaliGemma's own processor writes them


def token_types(prefix_lengths: Sequence[int], width: int) -> Tensor:
    """[B, T] int64: PREFIX on picture and prompt, SUFFIX on the answer and on padding, which else joins the prefix.

    prefix_lengths: tokens of each row before its answer. width: T.
    """
    places = torch.arange(width)
    return torch.where(places < torch.tensor(prefix_lengths)[:, None], PREFIX, SUFFIX)


def prefix_mask(types: Tensor, is_token: Tensor, *, window: int | None = None) -> Tensor:
    """[B, 1, T, T] bool, True where query (third dim) may see key (fourth).

    A key that is padding is seen by none. Within the prefix every token sees every token, also beyond the window. All
    else is causal, and with a window (Gemma-2's sliding layers) a query sees its `window` nearest keys, itself counted.

    Args:
        types: [B, T] of `token_types`. is_token: [B, T] bool, False on padding.
    """
    places = torch.arange(types.shape[1], device=types.device)
    query, key = places[:, None], places[None, :]
    causal = key <= query
    if window is not None:
        causal = causal & (key > query - window)
    in_prefix = types == PREFIX
    both_ways = in_prefix[:, :, None] & in_prefix[:, None, :]
    seen: Tensor = (causal | both_ways) & is_token.bool()[:, None, :]
    return seen[:, None]


def check_first_masks(model: Any) -> None:
    """Has the model's next forward with token types compare its masks with `prefix_mask`, once.

    model: PaliGemmaForConditionalGeneration. The comparison is one host synchronisation in the first forward.

    Raises (in that forward):
        RuntimeError: they differ; the installed transformers cannot train this model.
    """
    whole, language = model.model, model.model.language_model
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        types, mask = kwargs.get("token_type_ids"), kwargs.get("attention_mask")
        if types is not None and mask is not None:
            seen.update(types=types, is_token=mask)

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            return
        for handle in handles:
            handle.remove()
        masks = kwargs["attention_mask"]
        by_kind = masks if isinstance(masks, Mapping) else {"full_attention": masks}
        for kind, mask in by_kind.items():
            expected = prefix_mask(**seen, window=window if kind == "sliding_attention" else None)
            problem = _difference(mask, expected)
            if problem:
                import transformers

                raise RuntimeError(
                    f"transformers {transformers.__version__} gives the language model another {kind} mask than "
                    f"picture and prompt both ways, answer causal, padding closed: {problem}; install 5.23.0, and "
                    "leave attn_implementation unset or eager"
                )

    handles = [
        whole.register_forward_pre_hook(remember, with_kwargs=True),
        language.register_forward_pre_hook(compare, with_kwargs=True),
    ]


def _difference(mask: Any, expected: Tensor) -> str:
    """How a mask as kernels take it (bool, or added to scores) differs from the rule; "" where it does not."""
    if not torch.is_tensor(mask) or mask.shape != expected.shape:
        shape = list(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        return f"it is {shape}, not {list(expected.shape)}"
    open_ = mask if mask.dtype == torch.bool else mask == 0
    wrong = (open_ != expected).nonzero()
    if not len(wrong):
        return ""
    row, _, query, key = wrong[0].tolist()
    return f"row {row}, token {query} {'sees' if bool(open_[row, 0, query, key]) else 'does not see'} token {key}"
