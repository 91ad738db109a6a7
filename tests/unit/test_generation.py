"""Generated answers against plain recomputation: padding, cache, pictures, beams, samples, ends."""

import itertools
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch

from ardtrain.config import EvaluationBlock
from ardtrain.data import build_batch
from ardtrain.evaluating.generation import (
    Decoding,
    SampleByRow,
    draw,
    end_tokens,
    generate,
    generate_rows,
    left_padded,
    prompts_of,
)
from ardtrain.evaluation import model_inputs
from ardtrain.prefix_mask import token_types
from tests.tiny import CPU, single_world, tiny_llama
from tests.tiny_paligemma import tiny_paligemma

Grain, Row = namedtuple("Grain", "index rows"), namedtuple("Row", "row")
NEVER = 10_000  # an end token that no model here knows


def decoding(*, eos=(NEVER,), seed=0, **block):
    return Decoding(EvaluationBlock(**block), seed, tuple(eos), 0)


def batch_of(*prompts, answer=3):
    """Rows of a prompt and an answer of some tokens."""
    rows = []
    for prompt in prompts:
        ids = np.array([*prompt, *range(20, 20 + answer)], dtype=np.int32)
        rows.append([(ids, np.arange(len(ids)) >= len(prompt))])
    return build_batch(rows, packed=False, pad_token_id=0)


def greedy(model, prompt, count):
    """The likeliest tokens, each by a forward over all before it: no cache, no padding."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


PROMPTS = ([1, 9, 4, 7, 30], [1, 5], [1, 8, 8, 40, 41, 42, 9, 12])


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(3).eval()


def test_greedy_answers_of_a_padded_batch_are_those_of_each_prompt_alone(llama):
    out = generate(llama, batch_of(*PROMPTS), decoding(max_new_tokens=6), rows=[0, 1, 2], device=CPU, synced=False)
    assert out.tolist() == [greedy(llama, prompt, 6) for prompt in PROMPTS]


def test_an_answer_ends_before_its_end_token(llama):
    whole = greedy(llama, PROMPTS[0], 6)
    end = whole[3]
    assert end not in whole[:3]
    out = generate(
        llama,
        batch_of(*PROMPTS),
        decoding(max_new_tokens=6, eos=(NEVER, end)),
        rows=[0, 1, 2],
        device=CPU,
        synced=False,
    )
    assert out[0].tolist() == [*whole[:3], -1, -1, -1]


def test_the_models_own_settings_have_no_say_but_for_their_end_tokens(llama):
    before = llama.generation_config
    llama.generation_config = type(before)(do_sample=True, repetition_penalty=9.0, eos_token_id=[7, 9], max_length=3)
    try:
        settings = decoding(max_new_tokens=6)
        out = generate(llama, batch_of(*PROMPTS), settings, rows=[0, 1, 2], device=CPU, synced=False)
        assert end_tokens(llama, 2) == (2, 7, 9) and llama.generation_config.repetition_penalty == 9.0
    finally:
        llama.generation_config = before
    assert out.tolist() == [greedy(llama, prompt, 6) for prompt in PROMPTS]


def test_beams_that_hold_every_pair_of_tokens_find_the_likeliest_pair():
    model = tiny_llama(1, vocab=24).eval()
    settings = decoding(max_new_tokens=2, num_beams=24)
    unlike_greedy = 0
    for last in range(4, 24):
        prompt = [1, 5, last]
        out = generate(model, batch_of(prompt), settings, rows=[0], device=CPU, synced=False)
        with torch.no_grad():
            first = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            second = model(input_ids=torch.tensor([[*prompt, t] for t in range(24)])).logits[:, -1].log_softmax(-1)
        pairs = {(a, b): float(first[a] + second[a, b]) for a, b in itertools.product(range(24), repeat=2)}
        best = max(pairs, key=pairs.get)
        assert tuple(out[0].tolist()) == best
        unlike_greedy += list(best) != greedy(model, prompt, 2)
    assert unlike_greedy, "else beams would not be seen"


def test_drawn_tokens_have_their_probabilities_and_impossible_ones_never_come():
    shares = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]], dtype=torch.float64)
    numbers = torch.arange(0, 1, 1 / 64, dtype=torch.float64)
    found = draw(shares.expand(64, -1), numbers)
    assert found.bincount(minlength=6).tolist() == [0, 32, 0, 16, 16, 0]
    assert draw(shares, torch.tensor([1.0 - 2**-53], dtype=torch.float64)).tolist() == [4]


def test_a_rows_samples_hang_on_its_number_and_the_seed_alone():
    scores, ids = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 7, dtype=torch.int64)
    block = EvaluationBlock(do_sample=True, temperature=2.0)

    def drawn(rows, seed, order=(0, 1)):
        return SampleByRow(block, seed, rows, 4)(ids, scores[list(order)]).argmax(-1).tolist()

    one, other = drawn([5, 6], 1)
    assert drawn([6, 5], 1, (1, 0)) == [other, one]
    samples = {tuple(drawn([row, row + 1], seed)) for row in range(4) for seed in range(4)}
    assert len(samples) > 8
    assert torch.isinf(SampleByRow(block, 1, [5, 6], 4)(ids, scores)).sum() == 2 * 49


def test_a_sample_of_the_likeliest_token_alone_is_greedy_and_a_free_one_is_not(llama):
    batch, rows = batch_of(*PROMPTS), [0, 1, 2]
    settings = {"max_new_tokens": 6, "do_sample": True}
    one = generate(llama, batch, decoding(top_k=1, **settings), rows=rows, device=CPU, synced=False)
    assert one.tolist() == [greedy(llama, prompt, 6) for prompt in PROMPTS]
    free = generate(llama, batch, decoding(**settings), rows=rows, device=CPU, synced=False)
    again = generate(llama, batch, decoding(**settings), rows=rows, device=CPU, synced=False)
    assert free.tolist() == again.tolist() != one.tolist()


def with_pictures(batch, prefixes, seed=4):
    """The batch as data.py makes it of rows with pictures."""
    pixels = torch.randn(len(batch.input_ids), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    types = token_types(prefixes, batch.input_ids.shape[1])
    return replace(batch, position_ids=batch.position_ids + 1, token_type_ids=types, pixel_values=pixels)


def test_answers_about_pictures_are_those_of_the_masks_that_training_draws():
    """Each row alone and without cache, by the batch that training would make of prompt and answer so far."""
    model = tiny_paligemma(2).eval()
    prompts = [[4] * 16 + [2, 30, 31, 9], [4] * 16 + [2, 50, 40, 41, 42, 43, 44, 45, 9]]
    batch = with_pictures(batch_of(*prompts), [len(p) for p in prompts])
    count = 12  # beyond the window of the sliding layers
    out = generate(model, batch, decoding(max_new_tokens=count), rows=[0, 1], device=CPU, synced=False)
    for row, prompt in enumerate(prompts):
        said = []
        for _ in range(count):
            alone = with_pictures(batch_of([*prompt, *said], answer=1), [len(prompt)])
            inputs = model_inputs(alone, device=CPU) | {"pixel_values": batch.pixel_values[row : row + 1]}
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits
            said.append(int(logits[0, -2].argmax()))
        assert out[row].tolist() == said
    assert out[0].tolist() != out[1].tolist()


def test_prompt_of_a_chat_reaches_to_its_last_answer():
    ids = np.arange(10, 20, dtype=np.int32)
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1], dtype=bool)
    short = (ids[:4], np.array([0, 0, 1, 1], dtype=bool))
    batch = build_batch([[(ids, mask)], [short]], packed=False, pad_token_id=0)
    prompts = prompts_of(batch)
    assert [p.tolist() for p in prompts] == [list(range(10, 17)), [10, 11]]
    padded = left_padded(prompts, pad_token_id=3)
    assert padded["input_ids"][1].tolist() == [3] * 5 + [10, 11]
    assert padded["attention_mask"].tolist() == [[1] * 7, [0] * 5 + [1, 1]]


def test_rows_come_in_the_files_order(llama):
    class Data:
        def grains(self):
            return [Grain(0, (Row(0), Row(1))), Grain(1, (Row(2),))]

        def collate(self, grain):
            return batch_of(*(PROMPTS[row.row] for row in grain.rows))

    calls = []
    found = generate_rows(
        llama,
        Data(),
        decoding(max_new_tokens=4),
        world=single_world(),
        sharded=False,
        between=lambda: calls.append(1),
    )
    assert found == [greedy(llama, prompt, 4) for prompt in PROMPTS] and len(calls) == 2
