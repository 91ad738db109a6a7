"""Rows of the input embedding that are trained (`trainable_tokens`): dense entries of the arena beside a frozen table.

A forward hook behind the embedding puts the trained rows in the place of the frozen ones for the tokens that occur; the
forward of an output embedding that shares its table does so for the tokens' logits. The table stays the base's, sharded
and under its own name; ZeRO-3 sees no further parameter.

Letters: B batch, T tokens, D numbers of a row, V rows of the table, n trained rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ardtrain.dense import DenseModule
from ardtrain.logits import COMPUTES_WITH
from ardtrain.ranks import Dense

PART = "token_rows"
BYTES_A_NUMBER = 16  # trained: float32 master, two moments, gradient


class TokenRows(DenseModule):
    """The trained rows [n, D], bound to a model's embeddings; no part of the model itself.

    Make it behind the backbone's engine: ZeRO-3's hooks then see the frozen lookup alone, which needs no gradient, and
    do not gather the table again in backward.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], first: Tensor | None = None) -> None:
        """ids: ascending. first: [n, D] float32, first values; None where a checkpoint brings them."""
        super().__init__()
        assert list(ids) == sorted(set(ids))
        self.ids = torch.tensor(ids)
        if first is not None:
            self.first = {PART: first}
        model.get_input_embeddings().register_forward_hook(self._embed, with_kwargs=True)
        output = tied_output(model)
        if output is not None:  # its forward, not a hook: logits.py calls that for chunks of positions
            output.forward = partial(self._project, output.forward)
            vars(output)[COMPUTES_WITH] = self

    def _rows(self, device: torch.device) -> Tensor | None:
        if self.ids.device != device:
            self.ids = self.ids.to(device)
        return self.views.get(PART)

    def _embed(self, embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        """[B, T, D] with the trained rows in their places; looked up in float32, so gradients add up in float32."""
        rows = self._rows(out.device)
        if rows is None:
            return None
        tokens = args[0] if args else kwargs["input"]
        places = torch.searchsorted(self.ids, tokens).clamp_max(len(self.ids) - 1)
        values = F.embedding(places, rows).to(out.dtype)
        scale = getattr(embedding, "embed_scale", None)  # Gemma's: the table is scaled behind the lookup
        if scale is not None:
            values = values * (scale.to(out.dtype) if torch.is_tensor(scale) else scale)
        return torch.where((self.ids[places] == tokens).unsqueeze(-1), values, out)

    def _project(self, frozen: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """[..., V] logits of [..., D], the trained tokens' by their trained rows."""
        out, rows = frozen(x), self._rows(x.device)
        if rows is None:
            return out
        own = torch.matmul(x, rows.to(x.dtype).t())
        return out.index_copy(-1, self.ids, own.to(out.dtype))


def tied_output(model: PreTrainedModel) -> nn.Module | None:
    """The output embedding, where it shares the input embedding's table."""
    output = model.get_output_embeddings()
    shared = output is not None and output.weight is model.get_input_embeddings().weight
    return output if shared else None


def embedding_path(model: PreTrainedModel) -> str:
    """Module path of the input embedding."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def token_entry(model: PreTrainedModel, ids: Sequence[int]) -> tuple[Dense, ...]:
    """The arena's entry for the trained rows, none without ids; works on the meta device.

    Raises:
        ValueError: the model's embeddings have a form whose rows cannot be replaced.
    """
    if not ids:
        return ()
    embedding = model.get_input_embeddings()
    output = tied_output(model)
    if not isinstance(embedding, nn.Embedding) or getattr(output, "bias", None) is not None:
        form = f"a {type(embedding).__name__}" if output is None else "tied to an output embedding with a bias"
        raise ValueError(
            f"trainable_tokens: the model's input embedding is {form}; rows can be trained of a plain embedding, tied "
            "to an output without bias or untied. Leave trainable_tokens out"
        )
    return (Dense(embedding_path(model), PART, len(ids), embedding.embedding_dim),)


def find_tokens(
    wanted: Sequence[int | str], tokenizer: PreTrainedTokenizerBase | None, *, num_rows: int
) -> tuple[int, ...]:
    """Ids of the tokens, ascending.

    Args:
        wanted: ids, or names as the vocabulary spells them. tokenizer: for the names. num_rows: V.
    Raises:
        ValueError: a name is no token, an id lies beyond the table, or one token is named twice.
    """
    ids: dict[int, int | str] = {}
    for token in wanted:
        number = token if isinstance(token, int) else _id_of(token, tokenizer)
        if not 0 <= number < num_rows:
            raise ValueError(
                f"trainable_tokens={token!r} is token {number}, and the base's embedding has {num_rows} rows; use a "
                "reserved token of the base, or enlarge the base first (transformers' resize_token_embeddings, then "
                "save_pretrained) and name its new folder in model_name_or_path"
            )
        if number in ids:
            raise ValueError(f"trainable_tokens names token {number} twice ({ids[number]!r}, {token!r}); remove one")
        ids[number] = token
    return tuple(sorted(ids))


def _id_of(name: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    assert tokenizer is not None, "names need the tokenizer"
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary:
        return int(vocabulary[name])
    pieces = tokenizer.tokenize(name)
    near = difflib.get_close_matches(name, vocabulary, n=1, cutoff=0.7)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"trainable_tokens={name!r} is no token of the tokenizer, which reads it as {pieces[:8]}; {meant}write a token "
        "as the vocabulary spells it, or its id"
    )


def refuse_whole_embeddings(
    model: PreTrainedModel, *, modules_to_save: Sequence[str] | None, target_modules: str | Sequence[str]
) -> None:
    """Refuses settings that would train a whole embedding, with what it would cost; works on the meta device.

    Raises:
        ValueError: such a setting, or modules_to_save at all.
    """
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()
    tables |= {n: m for n, m in model.named_modules() if m is output and output is not None}
    targets = [] if isinstance(target_modules, str) else list(target_modules)
    for setting, names in (("modules_to_save", modules_to_save or ()), ("target_modules", targets)):
        for name in names:
            path = next((p for p in tables if p == name or p.endswith("." + name)), None)
            if path is not None:
                rows, columns = tables[path].weight.shape
                size = rows * columns * BYTES_A_NUMBER / 2**30
                raise ValueError(
                    f"{setting}={name} would train the whole embedding {path}: {rows:,} x {columns:,} = "
                    f"{rows * columns:,} numbers, {size:.2f} GiB of masters, moments and gradient on top of the frozen "
                    "base; name the tokens that matter in trainable_tokens instead"
                )
    if modules_to_save:
        raise ValueError(
            f"modules_to_save={list(modules_to_save)}: beside adapters only a classification head is trained in full, "
            "and it is so by itself; remove the setting"
        )
