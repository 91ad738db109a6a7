"""PaliGemma's mask and rows: drawn by hand, as transformers' model of the real classes gets them, and as its processor
writes them. The pitfalls are those of peers.md 2F, named by their threads."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PaliGemmaProcessor

from ardtrain.collectives import World
from ardtrain.data import Cursor, TrainData, build_batch
from ardtrain.evaluation import held_out_loss, loss_sum, token_loss_sum
from ardtrain.logits import LogitHead, find_logit_head
from ardtrain.prefix_mask import check_first_masks, prefix_mask, token_types
from tests.rows import picture_settings
from tests.tiny import CPU, equal_bits
from tests.tiny_paligemma import (
    IMAGE_ID,
    NUM_IMAGE_TOKENS,
    WINDOW,
    image_processor,
    letter_tokenizer,
    tiny_paligemma,
    write_rows,
)


def drawn(text):
    """[T, T] bool of rows of x and dots."""
    return torch.tensor([[c == "x" for c in line] for line in text.split()])


def train_data(path, cache, *, grain=3, **changes):
    data, tokenizer, reader = picture_settings(path, **changes)
    return TrainData(data, tokenizer, cache, global_batch_size=6, grain_size=grain, max_steps=4, images=reader)


@pytest.fixture
def batch(tmp_path):
    data = train_data(write_rows(tmp_path), tmp_path / "cache")
    return data.collate(data.grains(0)[0])


def received(model, arguments):
    """The masks that the language model gets, by kind."""
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs["attention_mask"])

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**arguments)
    handle.remove()
    return seen


def arguments(batch):
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask.long(),
        "position_ids": batch.position_ids,
        "token_type_ids": batch.token_type_ids,
        "pixel_values": batch.pixel_values,
    }


def test_mask_drawn_by_hand():
    types = token_types([3, 2], 6)
    assert types.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    is_token = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    mask = prefix_mask(types, is_token)
    assert mask.shape == (2, 1, 6, 6)
    assert torch.equal(mask[0, 0], drawn("xxx... xxx... xxx... xxxx.. xxxxx. xxxxxx"))
    assert torch.equal(mask[1, 0], drawn("xx.... xx.... xxx... xxxx.. xxxx.. xxxx.."))  # padding is seen by none
    narrow = prefix_mask(types, is_token, window=2)
    # The prefix stays open beyond the window; the answer sees two tokens, itself one of them.
    assert torch.equal(narrow[0, 0], drawn("xxx... xxx... xxx... ..xx.. ...xx. ....xx"))
    assert torch.equal(narrow[1, 0], drawn("xx.... xx.... .xx... ..xx.. ...x.. ......"))


def test_language_model_gets_these_masks(batch):
    """Full and sliding layers; the rows are longer than the window and of unlike lengths."""
    model = tiny_paligemma()
    assert batch.input_ids.shape[1] > NUM_IMAGE_TOKENS + WINDOW
    assert not batch.attention_mask.all()
    masks = received(model, arguments(batch))
    assert sorted(masks) == ["full_attention", "sliding_attention"]
    for kind, window in (("full_attention", None), ("sliding_attention", WINDOW)):
        expected = prefix_mask(batch.token_type_ids, batch.attention_mask, window=window)
        assert torch.equal(masks[kind] == 0, expected)
    assert not torch.equal(masks["full_attention"], masks["sliding_attention"])


def test_logits_are_those_of_the_drawn_masks(batch):
    """Our rule as a 4-D mask, handed straight to the language model, gives transformers' own logits to the bit."""
    model = tiny_paligemma()
    with torch.no_grad():
        theirs = model(**arguments(batch)).logits
        lowest = torch.finfo(torch.float32).min
        drawn_masks = {
            kind: torch.zeros(()).masked_fill(
                ~prefix_mask(batch.token_type_ids, batch.attention_mask, window=w), lowest
            )
            for kind, w in (("full_attention", None), ("sliding_attention", WINDOW))
        }
        whole = model.model
        embeds = whole.get_input_embeddings()(batch.input_ids)
        features = whole.get_image_features(batch.pixel_values).pooler_output
        embeds = embeds.masked_scatter((batch.input_ids == IMAGE_ID)[..., None], features)
        hidden = whole.language_model(
            inputs_embeds=embeds, attention_mask=drawn_masks, position_ids=batch.position_ids
        ).last_hidden_state
        cap = model.config.text_config.final_logit_softcapping
        ours = torch.tanh(model.lm_head(hidden) / cap) * cap
    assert equal_bits(ours, theirs)


def test_soft_caps_are_kept(batch):
    model = tiny_paligemma()
    text = model.config.text_config
    assert (text.final_logit_softcapping, text.attn_logit_softcapping) == (30.0, 50.0)
    assert text._attn_implementation == "eager"  # sdpa knows no soft cap
    assert text.layer_types == ["sliding_attention", "full_attention"] * 2
    with torch.no_grad():
        model.lm_head.weight.mul_(1000.0)
        assert model(**arguments(batch)).logits.abs().max() <= 30.0


def test_prompt_is_not_causal(batch):
    """LLaMA-Factory#9135, transformers#30967: a change of the prompt's last token reaches the picture's tokens."""
    model = tiny_paligemma()
    changed = batch.input_ids.clone()
    place = int(batch.token_type_ids[0].argmax()) - 2  # before the newline
    changed[0, place] = 70 if changed[0, place] != 70 else 71
    with torch.no_grad():
        before, after = (
            model(**(arguments(batch) | {"input_ids": ids})).logits[0] for ids in (batch.input_ids, changed)
        )
    assert (before[0] - after[0]).abs().max() > 1e-6


def test_answer_is_causal(batch):
    """transformers#30918: a later token of the answer reaches no earlier one."""
    model = tiny_paligemma()
    start = int(batch.token_type_ids[0].argmax())
    changed = batch.input_ids.clone()
    changed[0, start + 1] = 70 if changed[0, start + 1] != 70 else 71
    with torch.no_grad():
        before, after = (
            model(**(arguments(batch) | {"input_ids": ids})).logits[0] for ids in (batch.input_ids, changed)
        )
    assert torch.equal(before[: start + 1], after[: start + 1])
    assert not torch.equal(before[start + 1], after[start + 1])


def test_padding_changes_nothing(batch):
    """transformers#35855: a row's loss is the same alone and beside longer ones, whatever stands on the padding."""
    model = tiny_paligemma()
    other = batch.input_ids.clone()
    other[~batch.attention_mask] = 50
    with torch.no_grad():
        one, two = (model(**(arguments(batch) | {"input_ids": ids})).logits for ids in (batch.input_ids, other))
    assert torch.equal(one[batch.attention_mask], two[batch.attention_mask])


def test_rows_are_those_of_paligemmas_processor(tmp_path, batch):
    """Ids, token types and labels; exactly one bos (transformers#30993), eos behind the answer, loss there alone."""
    data = train_data(tmp_path / "train.jsonl", tmp_path / "cache", grain=1)
    (grain, *_) = data.grains(0)
    ours = data.collate(grain)
    place = data.sample_ids(grain)[0]
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[int(place.rpartition(":")[2]) - 1])
    processor = PaliGemmaProcessor(image_processor(), letter_tokenizer())
    theirs = processor(
        images=Image.open(tmp_path / row["image"]), text="<image>" + row["prompt"], suffix=row["completion"],
        return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.token_type_ids, theirs["token_type_ids"])
    assert torch.equal(ours.labels, theirs["labels"])
    assert equal_bits(ours.pixel_values, theirs["pixel_values"])
    ids = ours.input_ids[0].tolist()
    assert ids.count(2) == 1
    assert ids[NUM_IMAGE_TOKENS] == 2
    assert ids[-1] == 1
    assert ids.count(IMAGE_ID) == NUM_IMAGE_TOKENS
    assert ours.num_target_tokens == len(row["completion"]) + 1


def test_one_bos_also_from_a_tokenizer_that_adds_its_own(tmp_path):
    """transformers#30993: Gemma's tokenizer puts a bos in front of every text that it is given."""
    path = write_rows(tmp_path, count=6)
    data, tokenizer, reader = picture_settings(path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    assert tokenizer("ab")["input_ids"][0] == 2
    common = {"global_batch_size": 6, "grain_size": 6, "max_steps": 1, "images": reader}
    adds, plain = (TrainData(data, t, tmp_path / "cache", **common) for t in (tokenizer, letter_tokenizer()))
    ids = [made.collate(made.grains(0)[0]).input_ids for made in (adds, plain)]
    assert torch.equal(*ids)
    assert ((ids[0] == 2).sum(dim=1) == 1).all()


def test_loss_is_transformers_own(tmp_path, batch):
    """transformers#30987: their loss of the same labels, times their number; positions count from 1."""
    data = train_data(tmp_path / "train.jsonl", tmp_path / "cache", grain=1)
    one = data.collate(data.grains(0)[0])
    model = tiny_paligemma()
    with torch.no_grad():
        theirs = model(
            input_ids=one.input_ids, pixel_values=one.pixel_values, token_type_ids=one.token_type_ids,
            attention_mask=one.attention_mask.long(), labels=one.labels,
        ).loss  # fmt: skip
        ours = token_loss_sum(model, one, device=CPU)
    assert torch.allclose(ours, theirs * one.num_target_tokens, rtol=1e-6)
    assert one.position_ids[0].tolist() == list(range(1, one.input_ids.shape[1] + 1))


def test_first_forward_checks_the_masks(batch, monkeypatch):
    """It passes with the installed transformers, once; and refuses masks drawn otherwise (transformers#40917)."""
    model = tiny_paligemma()
    check_first_masks(model)
    with torch.no_grad():
        model(input_ids=batch.input_ids)  # no token types: nothing to compare yet
        model(**arguments(batch))
    assert not model.model._forward_pre_hooks
    assert not model.model.language_model._forward_pre_hooks
    import transformers.models.paligemma.modeling_paligemma as code

    own = code.create_causal_mask
    monkeypatch.setattr(code, "create_causal_mask", lambda **k: own(**(k | {"block_sequence_ids": None})))
    check_first_masks(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="row 0, token 0 does not see token 1; install"):
        model(**arguments(batch))


def test_grain_depends_on_itself_alone(tmp_path, batch):
    data = train_data(tmp_path / "train.jsonl", tmp_path / "cache")
    late = data.collate(data.grains(3)[1])
    again = train_data(tmp_path / "train.jsonl", tmp_path / "other")
    for _ in range(2):
        again.collate(again.grains(0)[0])
    other = again.collate(again.grains(3)[1])
    for name in ("input_ids", "labels", "position_ids", "token_type_ids", "pixel_values"):
        assert equal_bits(getattr(late, name), getattr(other, name))
    assert data.fingerprint == again.fingerprint
    assert isinstance(data.cursor(1), Cursor)


class OneBatch:
    def __init__(self, *batches):
        self.batches = batches

    def grains(self):
        return list(range(len(self.batches)))

    def collate(self, grain):
        return self.batches[grain]


def with_answer(model, batch, row, length=4):
    """The batch's row with the answer that greedy decoding writes: token by token, by whole forwards of one row."""
    start = int(batch.token_type_ids[row].argmax())
    ids = batch.input_ids[row : row + 1, :start]
    pixels = batch.pixel_values[row : row + 1]
    for _ in range(length):
        types = (torch.arange(ids.shape[1]) >= start).long()[None]
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    mask = np.arange(ids.shape[1]) >= start
    return ids[0].numpy(), mask, pixels


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_exact_match_is_that_of_greedy_decoding(batch, chunk_tokens):
    """Three rows with the answer that the model writes, one of them with its last token changed."""
    model = tiny_paligemma()
    rows = [with_answer(model, batch, row) for row in range(3)]
    rows[1][0][-1] = (rows[1][0][-1] + 1) % 90 + 5
    made = build_batch([[(ids, mask)] for ids, mask, _ in rows], packed=False, pad_token_id=0)
    types = token_types([int(mask.argmax()) for _, mask, _ in rows], made.input_ids.shape[1])
    whole = replace(
        made, position_ids=made.position_ids + 1, token_type_ids=types, pixel_values=torch.cat([p for *_, p in rows])
    )
    head = None if chunk_tokens is None else find_logit_head(model, chunk_tokens=chunk_tokens, device=CPU)
    assert head is None or isinstance(head, LogitHead)
    loss = partial(loss_sum, logit_head=head)
    world = World(0, 1, CPU)
    result = held_out_loss(model, OneBatch(whole, whole), world=world, loss_sum=loss)
    assert result.metrics == {"exact_match": 4 / 6}
    assert result.numbers().keys() == {"loss", "exact_match"}
    plain = held_out_loss(model, OneBatch(replace(whole, pixel_values=None)), world=world)
    assert plain.metrics == {}
