"""Packed rows: each document's logits are those it gives alone, whatever stands beside it; no mask leaves the host."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    modeling_flash_attention_utils,
)

from ardtrain.data import build_batch
from ardtrain.evaluation import token_loss_sum
from ardtrain.packing import check_packing, packed_arguments
from tests.tiny import CPU, equal_bits

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 128, "num_key_value_heads": 2, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = 5  # below the documents' lengths
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=None),
    "gpt2": GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}
WAYS = [
    (name, attention)
    for name in CONFIGS
    for attention in ("sdpa", "eager", "flash_attention_2")
    if (name, attention) != ("gpt2", "flash_attention_2")  # transformers cannot run that in float32
]
every_way = pytest.mark.parametrize(("name", "attention"), WAYS)
LENGTHS = ((9, 1, 8), (14,), (3, 12))  # tokens of the documents of three rows; two rows are padded


def model_of(name, attention):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.config._attn_implementation = attention  # flash attention is not installed here: see varlen
    return model.requires_grad_(False).eval()


def documents(seed=0):
    numbers = np.random.default_rng(seed)
    return [[numbers.integers(4, 128, size=length) for length in row] for row in LENGTHS]


def packed(rows):
    return build_batch([[(ids, np.arange(len(ids)) >= 1) for ids in row] for row in rows], packed=True, pad_token_id=0)


def logits_of(model, batch):
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **packed_arguments(model, batch.position_ids),
        ).logits


@contextmanager
def varlen():
    """flash attention's functions in plain torch, in the place that transformers imports them from.

    Yields the documents' ends of each call.
    """
    calls = []

    def attend(q, k, v, mask, softmax_scale):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)

    def masked(length, window_size):
        distance = torch.arange(length)[:, None] - torch.arange(length)
        return (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        ends = cu_seqlens_q.tolist()
        calls.append(ends)
        parts = [
            attend(q[a:b], k[a:b], v[a:b], masked(b - a, window_size), softmax_scale)
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        return torch.cat(parts)

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        assert causal
        rows = [attend(*row, masked(q.shape[1], window_size), softmax_scale) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    functions = (flash_attn_func, flash_attn_varlen_func, None, None, None)
    process = modeling_flash_attention_utils._lazy_define_process_function(flash_attn_varlen_func)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (process, None))
        )
        yield calls


def test_documents_ends_by_hand():
    batch = packed([[np.array([5, 6, 7]), np.array([8])], [np.array([9, 10])]])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]] and batch.attention_mask is None
    assert packed_arguments(model_of("llama", "sdpa"), batch.position_ids) == {}
    found = packed_arguments(model_of("llama", "flash_attention_2"), batch.position_ids)
    assert found.pop("cu_seq_lens_q").tolist() == found.pop("cu_seq_lens_k").tolist() == [0, 3, 4, 6, 8]
    assert found == {"max_length_q": 3, "max_length_k": 3}


@every_way
def test_a_document_has_the_logits_it_has_alone(name, attention):
    """float32, 1e-5; windows are shorter than the documents."""
    rows = documents()
    with varlen() as calls:
        together = logits_of(model_of(name, attention), packed(rows))
        assert bool(calls) == (attention == "flash_attention_2")
    alone = model_of(name, "eager")
    for b, row in enumerate(rows):
        end = 0
        for ids in row:
            start, end = end, end + len(ids)
            wanted = alone(input_ids=torch.from_numpy(ids)[None]).logits[0]
            torch.testing.assert_close(together[b, start:end], wanted, rtol=1e-5, atol=1e-5)


@every_way
def test_changing_one_document_changes_no_bit_of_another(name, attention):
    before, model = documents(), model_of(name, attention)
    after = [[ids.copy() for ids in row] for row in before]
    after[0][0] = documents(1)[0][0]
    with varlen():
        old, new = (logits_of(model, packed(rows)) for rows in (before, after))
    length = len(before[0][0])
    assert not torch.allclose(old[0, :length], new[0, :length])
    assert equal_bits(old[0, length:], new[0, length:]) and equal_bits(old[1:], new[1:])


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_the_loss_is_the_sum_of_the_documents_losses(attention):
    rows, model = documents(), model_of("gemma2", attention)
    with varlen(), torch.no_grad():
        loss = token_loss_sum(model, packed(rows), device=CPU)
        alone = [
            token_loss_sum(model, build_batch([[(ids, np.arange(len(ids)) >= 1)]], packed=False, pad_token_id=0),
                           device=CPU)
            for row in rows for ids in row
        ]  # fmt: skip
    assert float(loss) == pytest.approx(float(sum(alone)), rel=1e-6)


class Leaky(LlamaForCausalLM):
    """Attention that sees the tokens of all documents, as that of models which draw their masks themselves."""

    def forward(self, input_ids, position_ids, **settings):
        return super().forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **settings)


@every_way
def test_models_that_keep_documents_apart_pass_the_check(name, attention):
    model = model_of(name, attention).train()
    with varlen():
        check_packing(model, device=CPU)
    assert model.training


def test_a_model_that_mixes_documents_is_refused():
    with pytest.raises(ValueError, match="packing=true: the documents of a row see each other"):
        check_packing(Leaky(CONFIGS["llama"]), device=CPU)
