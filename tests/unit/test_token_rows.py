import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from ardtrain.adapters import attach, bind_arena, drop_views, first_dense
from ardtrain.arena import ArenaLayout
from ardtrain.config import ConfigError, load_config
from ardtrain.engines import BackboneEngine
from ardtrain.export import compare_with_peft, peft_config, write_peft
from ardtrain.methods.lora import Lora
from ardtrain.preflight import check_model
from ardtrain.ranks import RankTable
from ardtrain.token_rows import PART, TokenRows, embedding_path, find_tokens, tied_output, token_entry
from tests.runs import write_run
from tests.tiny import CPU, backbone_config, equal_bits, save_tiny_llama, sites_of_model, tiny_llama

TOKENS = (7, 20, 99)
IDS = torch.tensor([[1, 7, 20, 7, 50, 3], [99, 4, 5, 6, 127, 20]])  # beyond, between and at the trained ones


def tiny_gemma(seed=0):
    """Scales its embeddings behind the lookup, ties them, and caps the logits."""
    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(config).eval().requires_grad_(False)


MODELS = {"untied": tiny_llama, "tied": lambda: tiny_llama(tied=True), "scaled": tiny_gemma}


def bound(model, tokens=TOKENS, *, seed=3):
    """LoRA on q_proj and the trained rows, all with random numbers: adapters, layout, leaf [N]."""
    sites, ranks = sites_of_model(model, ["q_proj"], r=2, lora_alpha=4.0)
    layout = ArenaLayout(RankTable.start(sites, ranks), Lora().entries, token_entry(model, tokens))
    adapters = {**attach(model, sites, dropout={}), embedding_path(model): TokenRows(model, tokens)}
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.zeros(layout.size)
    for block in layout.all_blocks:
        block.of(leaf).normal_(0.0, 0.3, generator=generator)
    leaf.requires_grad_()
    return adapters, layout, leaf, bind_arena(adapters, layout, leaf)


@pytest.mark.parametrize("kind", MODELS)
def test_trained_rows_act_like_rows_of_the_table(kind):
    """Logits and gradients against a model whose table holds them and is trained whole."""
    model = MODELS[kind]()
    path = embedding_path(model)
    adapters, layout, leaf, views = bound(model)
    logits = model(input_ids=IDS).logits
    other = MODELS[kind]()
    other_adapters, *_ = bound(other, tokens=(0,))
    drop_views({path: other_adapters[path]})
    for name, adapter in other_adapters.items():
        if name != path:
            adapter.views = {part: view.detach() for part, view in views[name].items()}
    table = other.get_input_embeddings().weight
    assert (tied_output(model) is not None) == (kind != "untied")
    table.data[list(TOKENS)] = views[path][PART].detach()
    table.requires_grad_()
    output = other.get_output_embeddings()
    output.forward = partial(torch.nn.Linear.forward, output)  # torch's, which has a gradient for the weight
    theirs = other(input_ids=IDS).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
    (whole,) = torch.autograd.grad((theirs * weights).sum(), table)
    own = next(b for b in layout.all_blocks if b.part == PART).of(gradient)
    torch.testing.assert_close(own, whole[list(TOKENS)], rtol=1e-4, atol=1e-4)
    assert all(bool(row.any()) for row in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_rows_change_no_bit(world, dtype):
    """In bf16 too: the float32 rows round to what they came from."""
    expected = tiny_llama(tied=True, dtype=dtype)(input_ids=IDS).logits
    for stage in (0, 3):
        model = tiny_llama(tied=True, dtype=dtype)
        engine = BackboneEngine(model, stage=stage, config=backbone_config(stage=stage, dtype=dtype), device=CPU)
        path = embedding_path(model)
        rows = engine.read_rows(path, TOKENS)
        assert rows.dtype == torch.float32 and rows.shape == (3, 32)
        assert equal_bits(rows, tiny_llama(tied=True, dtype=dtype).get_input_embeddings().weight[list(TOKENS)].float())
        module = TokenRows(model, TOKENS, rows)
        module.views = {PART: first_dense({path: module})[path, PART]}
        assert equal_bits(model(input_ids=IDS).logits, expected)
        module.views = {PART: rows + 1}
        assert not torch.equal(model(input_ids=IDS).logits, expected)
        engine.destroy()


def test_gradients_of_a_frequent_token_add_up_in_float32():
    """In bf16, 300 additions of the same small number would stop at 256 of them."""
    model = tiny_llama(dtype=torch.bfloat16)
    rows = torch.zeros(1, 32, requires_grad=True)
    TokenRows(model, [5]).views = {PART: rows}  # the hooks keep it
    out = model.get_input_embeddings()(torch.full((1, 300), 5))
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert torch.equal(gradient, torch.full((1, 32), 300.0))


def test_only_the_arena_holds_trained_rows():
    model = tiny_llama(tied=True)
    before = list(model.state_dict())
    adapters, layout, _, _ = bound(model)
    assert list(model.state_dict()) == before and not list(adapters[embedding_path(model)].parameters())
    assert layout.num_trained == 2 * 2 * (32 + 32) + 3 * 32


@pytest.mark.parametrize("kind", MODELS)
def test_peft_reads_the_same_function(tmp_path, kind):
    model = MODELS[kind]()
    _, layout, leaf, views = bound(model)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    config = peft_config(layout, base_model="tiny", revision=None, lora_dropout=0.0, token_ids=TOKENS)
    assert config["trainable_token_indices"] == [7, 20, 99] and config["modules_to_save"] is None
    write_peft(tmp_path, leaf.detach(), layout, config)
    difference = compare_with_peft(tmp_path, MODELS[kind](), {"input_ids": IDS}, logits)
    assert difference <= 2e-5 * max(1.0, float(logits.abs().max()))
    path = embedding_path(model)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = f"base_model.model.{path}.token_adapter.trainable_tokens_delta"
    assert equal_bits(stored[name], views[path][PART].detach())


def test_tokens_by_name_and_id(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path))
    assert find_tokens([99, "a", "<pad>"], tokenizer, num_rows=128) == (3, 70, 99)
    assert find_tokens([5], None, num_rows=6) == (5,)
    for wanted, text in (
        (["ab"], "'ab' is no token of the tokenizer, which reads it as ['a', 'b']; write a token as"),
        (["<pat>"], "did you mean '<pad>'?"),
        ([128], "is token 128, and the base's embedding has 128 rows; use a reserved token of the base, or enlarge"),
        ([-1], "is token -1"),
        (["a", 70], "names token 70 twice ('a', 70); remove one"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            find_tokens(wanted, tokenizer, num_rows=128)


def shape_of(folder, **settings):
    return check_model(load_config(write_run(folder, **settings)))


def test_settings_reach_the_arena_or_are_refused(tmp_path):
    shape = shape_of(tmp_path, trainable_tokens=["+", 5])
    assert shape.tokens == (5, 16) and [(d.part, d.rows, d.columns) for d in shape.dense] == [(PART, 2, 32)]
    assert shape.num_trained == shape_of(tmp_path).num_trained + 64
    bytes_of_it = "would train the whole embedding model.embed_tokens: 128 x 32 = 4,096 numbers, 0.00 GiB of masters"
    for settings, text in (
        ({"modules_to_save": "embed_tokens"}, "modules_to_save=embed_tokens " + bytes_of_it),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=lm_head would train the whole embedding lm_head: 128 x 32"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules=embed_tokens " + bytes_of_it),
        ({"modules_to_save": ["norm"]}, "modules_to_save=['norm']: beside adapters only a classification head is"),
        ({"trainable_tokens": [500]}, "trainable_tokens=500 is token 500, and the base's embedding has 128 rows"),
        ({"method": "full", "elalora": None, "r": 8, "lora_dropout": 0, "trainable_tokens": [5]},
         "trainable_tokens has no meaning for method=full"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(text)):
            shape_of(tmp_path, **settings)


def test_a_70b_embedding_is_refused_with_its_gib():
    from transformers import LlamaConfig, LlamaForCausalLM

    from ardtrain.token_rows import refuse_whole_embeddings

    config = LlamaConfig(vocab_size=128256, hidden_size=8192, num_hidden_layers=1, num_attention_heads=64)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"128,256 x 8,192 = 1,050,673,152 numbers, 15\.66 GiB"):
        refuse_whole_embeddings(model, modules_to_save=["embed_tokens"], target_modules="all-linear")
