"""Answers to the held-out rows' prompts and their metrics: of `ardtrain evaluate`, and at the evaluations of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from ardtrain import run_data
from ardtrain.collectives import World
from ardtrain.config import ConfigError, RunConfig
from ardtrain.data import EvalData
from ardtrain.data_rows import detect_format
from ardtrain.evaluating.generation import Decoding, end_tokens, generate_rows
from ardtrain.evaluating.references import Known, read_known
from ardtrain.evaluating.text_metrics import Answered, check_packages, metric_value


def check_answers(config: RunConfig) -> None:
    """ConfigError where a run's generated metrics lack a package, or its held-out rows have no prompts."""
    if config.generated_metrics and config.data.held_out_files:
        setting = f"eval_metrics={','.join(config.generated_metrics)}"
        check_packages(config.generated_metrics, setting="eval_metrics")
        refuse_unanswerable(config, setting=setting)


def refuse_unanswerable(config: RunConfig, *, setting: str) -> None:
    """ConfigError where held-out rows have no prompts."""
    for settings in run_data.held_out_settings(config) if config.task == "causal_lm" else ():
        try:
            format_ = detect_format(settings) if settings.format == "auto" else settings.format
        except ValueError as error:
            raise ConfigError(str(error).splitlines()) from error
        if format_ == "text":
            raise ConfigError(
                [
                    f"{setting}: generated text needs rows with prompts, and those of {settings.train_files[0]} are "
                    "plain text; give completions or chats, or choose loss, perplexity"
                ]
            )


def open_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: EvalData) -> EvalData:
    """The held-out rows to answer: prompts are answered one by one, so rows that are packed are opened anew."""
    return run_data.open_held_out(config, tokenizer, packing=False) if config.packing else data


def names_of(data: EvalData) -> list[str]:
    """`file:line` of each row, in the order of the answers."""
    return [name for grain in data.grains() for name in data.sample_ids(grain)]


def known_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, ids: Sequence[str], *, world: World
) -> Known | None:
    """References and groups of the rows, on process 0; None on the others. All processes must call this.

    Raises:
        ConfigError: on all, where a row holds none.
    """
    known: Known | None = None

    def read() -> None:
        nonlocal known
        images = run_data.image_reader(config, tokenizer)
        settings = run_data.held_out_settings(config, images=None if images is None else images.settings)
        known = read_known(settings, ids, config.evaluation)

    try:
        world.ask_main(read)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return known


def answer_rows(
    module: nn.Module,
    data: EvalData,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    world: World,
    sharded: bool,
    between: Callable[[], None],
) -> list[list[int]]:
    """New tokens of every row, as generation.generate_rows. All processes must call this."""
    ends = end_tokens(module, tokenizer.eos_token_id, run_data.model_source(config))
    decoding = Decoding(config.evaluation, config.seed, ends, data.pad_token_id)
    return generate_rows(module, data, decoding, world=world, sharded=sharded, between=between)


class Answers:
    """The generated metrics of a run's held-out rows, at each of its evaluations."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        data: EvalData,
        module: nn.Module,
        *,
        world: World,
        sharded: bool,
        between: Callable[[], None],
    ) -> None:
        """All processes must call this.

        Args:
            data: the run's held-out rows. sharded: the module's weights are (ZeRO-3). between: called after each round
                of grains, equally often on every process; it may raise.
        Raises:
            ConfigError: a row holds no answers.
        """
        self._config, self._tokenizer, self._module = config, tokenizer, module
        self._world, self._sharded, self._between = world, sharded, between
        self._data = open_prompts(config, tokenizer, data)
        self._known = known_of(config, tokenizer, names_of(self._data), world=world)

    def __call__(self) -> dict[str, float]:
        """Metric -> value, alike on every process: process 0 computes them. All processes must call this.

        Raises:
            RuntimeError: on all, where one cannot be computed.
        """
        tokens = answer_rows(
            self._module,
            self._data,
            self._config,
            self._tokenizer,
            world=self._world,
            sharded=self._sharded,
            between=self._between,
        )

        def values() -> str:
            assert self._known is not None
            answered = answered_by(tokens, self._known, self._tokenizer)
            return json.dumps({name: _value(name, answered) for name in self._config.generated_metrics})

        found: dict[str, float] = json.loads(self._world.ask_main(values))  # a float's own digits come back
        return found


def _value(name: str, answered: Answered) -> float:
    try:
        return metric_value(name, answered)
    except Exception as error:  # of a library; without the metric's name nobody knows which
        raise RuntimeError(f"eval_metrics: {name} failed ({type(error).__name__}: {error})") from error


def answered_by(tokens: Sequence[Sequence[int]], known: Known, tokenizer: PreTrainedTokenizerBase) -> Answered:
    """The answers as texts, beside their references."""
    texts = [str(text) for text in tokenizer.batch_decode(list(tokens), skip_special_tokens=True)]
    return Answered(texts, known.references, known.groups)
