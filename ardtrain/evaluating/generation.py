"""Answers to prompts: batched, dealt over the processes, by transformers' own `generate` with its KV cache.

A grain's rows are generated together, padded on the left, so an answer hangs on its grain and never on the number of
processes. Under ZeRO-3 every forward gathers weights from all processes: each process generates equally many grains
(collectives.deal) and goes on, inside a grain, until all have finished theirs (`synced_gpus`).

Letters: B rows of a grain, T tokens of the longest prompt, V vocabulary, M max_new_tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ardtrain.backbones import ModelSource
from ardtrain.collectives import World, deal
from ardtrain.config import EvaluationBlock
from ardtrain.data import IGNORE_INDEX, Batch, EvalData
from ardtrain.evaluation import gather_rows
from ardtrain.prefix_mask import PREFIX
from ardtrain.ranks import named_seed

_NOTHING = -1  # in the table of generated tokens, behind a row's last


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded; the `evaluation` block's settings, and the tokens that end and pad an answer."""

    block: EvaluationBlock
    seed: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    def config(self) -> GenerationConfig:
        """transformers' settings. Sampling is not there: SampleByRow does it within a greedy search."""
        return GenerationConfig(
            max_new_tokens=self.block.max_new_tokens,
            num_beams=self.block.num_beams,
            length_penalty=self.block.length_penalty,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(self.eos_token_ids),
            pad_token_id=self.pad_token_id,
        )


class SampleByRow(LogitsProcessor):
    """Leaves one token of each row possible, drawn by (seed, row, place): the next argmax is a sample.

    Computed on the host in float64: a device's cumulative sum need not be the same twice. One transfer of [B, V] a
    token.
    """

    def __init__(self, block: EvaluationBlock, seed: int, rows: Sequence[int], prompt_length: int) -> None:
        """rows: each one's number in the file. prompt_length: T."""
        self._seed, self._rows, self._prompt_length = seed, rows, prompt_length
        self._warpers = LogitsProcessorList()
        if block.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(block.temperature))
        if block.top_k:
            self._warpers.append(TopKLogitsWarper(block.top_k))
        if block.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(block.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """[B, V] scores, 0 at the drawn token and -inf elsewhere."""
        warped = self._warpers(input_ids.cpu(), scores.cpu().double())
        place = input_ids.shape[1] - self._prompt_length
        numbers = [named_seed("sample", self._seed, row, place) % (1 << 53) / (1 << 53) for row in self._rows]
        drawn = draw(torch.softmax(warped, dim=-1), torch.tensor(numbers, dtype=torch.float64))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None].to(scores.device), 0.0)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """[B] the token whose share of [0, 1) holds each number [B]; a token of probability 0 is never drawn.

    probabilities: [B, V] float64.
    """
    ends = probabilities.cumsum(-1)
    wanted = (numbers[:, None] * ends[:, -1:]).clamp(max=torch.nextafter(ends[:, -1:], ends.new_zeros(())))
    return torch.searchsorted(ends, wanted, right=True).squeeze(1)


def prompts_of(batch: Batch) -> list[Tensor]:
    """Token ids of each row before its last run of targets: a completion's prompt, a chat up to the last answer."""
    assert batch.attention_mask is not None, "rows to answer are not packed"
    is_target = batch.labels != IGNORE_INDEX
    first = is_target.clone()
    first[:, 1:] &= ~is_target[:, :-1]  # starts of runs
    places = torch.arange(batch.labels.shape[1])
    starts = torch.where(first, places, -1).max(dim=1).values
    return [ids[: int(start)] for ids, start in zip(batch.input_ids, starts, strict=True)]


def left_padded(prompts: Sequence[Tensor], *, pad_token_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T] int64 of prompts that end together."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def end_tokens(module: nn.Module, eos_token_id: int | None, source: ModelSource | None = None) -> tuple[int, ...]:
    """The tokenizer's eos, and what the model's config and generation_config.json end with (a chat's end of turn).

    source: where the base's files are; without that file its config alone says.
    """
    configs = [getattr(module, "generation_config", None)]
    if source is not None:
        with contextlib.suppress(OSError):
            configs.append(GenerationConfig.from_pretrained(source.name_or_path, revision=source.revision or "main"))
    found = [eos_token_id]
    for config in configs:
        known = getattr(config, "eos_token_id", None)
        found += known if isinstance(known, list | tuple) else [known]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


@contextlib.contextmanager
def _own_settings(module: Any) -> Iterator[None]:
    """The model's generation config (temperatures, penalties) has no say inside: `generate` would fill gaps from it."""
    before = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = before


def generate(
    module: Any, batch: Batch, decoding: Decoding, *, rows: Sequence[int], device: torch.device, synced: bool
) -> Tensor:
    """[B, M] int64, the new tokens of each row, _NOTHING from its end token on.

    Args:
        rows: each one's number in the file, which seeds its samples. synced: all processes call this and go on
            until all have finished (ZeRO-3).
    """
    inputs = left_padded(prompts_of(batch), pad_token_id=decoding.pad_token_id)
    if batch.pixel_values is not None:
        # Padding too: as part of the prefix it sees something, and is seen by none.
        inputs |= {"token_type_ids": torch.full_like(inputs["input_ids"], PREFIX), "pixel_values": batch.pixel_values}
    length = inputs["input_ids"].shape[1]
    processors = LogitsProcessorList()
    if decoding.block.do_sample:
        processors.append(SampleByRow(decoding.block, decoding.seed, rows, length))
    with torch.no_grad(), _own_settings(module):
        out = module.generate(
            **{name: values.to(device) for name, values in inputs.items()},
            generation_config=decoding.config(),
            logits_processor=processors,
            synced_gpus=synced,
        )
    new = out[:, length:]
    ends = torch.isin(new, torch.tensor(decoding.eos_token_ids, device=device))
    after = ends.cumsum(1) > 0  # the end token as well
    table = torch.full((len(new), decoding.block.max_new_tokens), _NOTHING, device=device)
    table[:, : new.shape[1]] = new.masked_fill(after, _NOTHING)
    return table


def generate_rows(
    module: nn.Module,
    data: EvalData,
    decoding: Decoding,
    *,
    world: World,
    sharded: bool,
    between: Callable[[], None],
) -> list[list[int]]:
    """New tokens of every row, in the file's order, alike on every process. All processes must call this.

    Args:
        sharded: the module's weights are (ZeRO-3). between: called after each round of grains.
    """
    grains = data.grains()
    own: dict[int, Tensor] = {}
    was_training = module.training
    module.eval()
    for index, counted in deal(len(grains), world.world_size, world.global_rank):
        rows = [row.row for row in grains[index].rows]
        synced = sharded and world.world_size > 1
        batch = data.collate(grains[index])
        table = generate(module, batch, decoding, rows=rows, device=world.device, synced=synced)
        if counted:
            own[index] = table
        between()
    module.train(was_training)
    sizes = [len(grain.rows) for grain in grains]
    tokens = gather_rows(own, sizes, world, columns=decoding.block.max_new_tokens)
    return [[int(token) for token in row if token != _NOTHING] for row in tokens]
