"""lm-eval's model class (HFLM) with its batches dealt over the processes: figures do not hang on their number.

Every process is asked all of a task's requests and cuts them into the same batches, as HFLM does: the longest first,
requests with the same context together. Each batch is HFLM's own work on one process; all processes have as many, so
that under ZeRO-3 every forward gathers weights from all. The results go to all processes, and the harness, which knows
of one process alone, makes its figures of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ardtrain.collectives import World, deal
from ardtrain.ranks import named_seed

T = TypeVar("T")


class DealtLM(HFLM):
    """See above. All processes must call each of its requests' methods."""

    def __init__(
        self, module: Any, tokenizer: PreTrainedTokenizerBase, *, world: World, batch_size: int, sharded: bool
    ) -> None:
        """sharded: the module's weights are (ZeRO-3)."""
        super().__init__(pretrained=module, tokenizer=tokenizer, batch_size=batch_size)
        self._device = world.device  # offloaded weights lie elsewhere than inputs belong
        self._world, self._synced = world, sharded and world.world_size > 1

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log probability, is it what greedy decoding gives) of each (texts, context, continuation)."""

        def compute(own: list[int], batch: int) -> list[Any]:
            return list(super(DealtLM, self)._loglikelihood_tokens([requests[i] for i in own], disable_tqdm=True))

        batches = token_batches([(r[1], r[2]) for r in requests], self.batch_size)
        return [(value, greedy) for value, greedy in self._dealt(batches, compute, silent=disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each whole text, cut into windows of the model's length; those of all texts together."""
        windows: list[Any] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            cut = [(None, *make_disjoint_window(window)) for window in found]
            windows, owners = windows + cut, owners + [owner] * len(cut)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request. Sampled tokens are drawn by the batch's number."""
        device = self._world.device

        def compute(own: list[int], batch: int) -> list[Any]:
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
                torch.manual_seed(named_seed("lm-eval", batch))
                answers = super(DealtLM, self).generate_until([requests[i] for i in own], disable_tqdm=True)
            return list(answers)

        prompts = [(len(self.tok_encode(r.args[0])), r.args[0], r.args[1]) for r in requests]
        return self._dealt(prompt_batches(prompts, self.batch_size), compute, silent=disable_tqdm)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **how: Any) -> Any:
        """HFLM's; where weights are sharded all processes go on until the last of them has its answers."""
        return super()._model_generate(context, max_length, stop, synced_gpus=self._synced, **how)

    def _dealt(
        self, batches: Sequence[list[int]], compute: Callable[[list[int], int], list[Any]], *, silent: bool
    ) -> list[Any]:
        """The result of each request, on every process. compute: those of a batch; idle rounds repeat one."""
        world = self._world
        own: dict[int, Any] = {}
        rounds = deal(len(batches), world.world_size, world.global_rank)
        for batch, counted in tqdm(rounds, disable=silent or not world.is_main, desc="batches"):
            results = compute(batches[batch], batch)
            if counted:
                own |= zip(batches[batch], results, strict=True)
        found: dict[int, Any] = {}
        for text in world.gather_texts(json.dumps(list(own.items()))):  # a float's own digits come back
            found |= dict(json.loads(text))
        return [found[i] for i in range(len(found))]


def token_batches(requests: Sequence[tuple[Sequence[int], Sequence[int]]], size: int) -> list[list[int]]:
    """Numbers of the requests (context, continuation) of each forward, of `size` rows: HFLM's own batches.

    Requests that differ in their last token alone are one row, as one forward answers them all.
    """
    rows = _grouped(enumerate(requests), lambda request: (*request[0], *request[1][:-1]))

    def key(row: list[int]) -> tuple[int, tuple[int, ...]]:
        context, continuation = requests[max(row, key=lambda i: len(requests[i][1]))]
        tokens = (*context, *continuation)
        return -len(tokens), tokens

    return [[i for row in some for i in row] for some in _cut(sorted(rows, key=key), size)]


def prompt_batches(prompts: Sequence[tuple[int, str, Any]], size: int) -> list[list[int]]:
    """Numbers of the prompts (tokens, text, how to decode) that are answered together: the longest first."""
    groups = _grouped(enumerate(prompts), lambda prompt: json.dumps(prompt[2], sort_keys=True, default=str))
    ordered = [sorted(group, key=lambda i: (-prompts[i][0], prompts[i][1])) for group in groups]
    return [some for group in ordered for some in _cut(group, size)]


def _grouped(items: Iterable[tuple[int, T]], key: Callable[[T], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for number, item in items:
        groups.setdefault(key(item), []).append(number)
    return list(groups.values())


def _cut(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
