"""Chunked cross-entropy: the same loss and gradient as whole logits, for every form of them, in less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from ardtrain.adapters import attach, bind_arena
from ardtrain.arena import ArenaLayout
from ardtrain.engines import BackboneEngine
from ardtrain.evaluation import held_out_loss, token_loss_sum
from ardtrain.logits import Form, LogitHead, cross_entropy_, find_logit_head
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable
from ardtrain.token_rows import PART, TokenRows
from benchmarks.common import LiveBytes
from tests.tiny import (
    CPU,
    HeldOutBatches,
    TokenBatches,
    backbone_config,
    equal_bits,
    single_world,
    sites_of_model,
    tiny_llama,
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 128, "num_key_value_heads": 2, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
OPT = OPTConfig(vocab_size=128, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32)  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig(**SMALL), Form()),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0), Form(cap=5.0)),
    "granite": (GraniteConfig(**SMALL, logits_scaling=4.0), Form(factor=0.25)),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.3), Form(factor=0.3)),
    "gpt2": (GPT2, Form()),
    "opt": (OPT, Form()),
}


def family(name, dtype=torch.float32):
    """A random model of the family whose logits are of the size of a trained one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[name][0])
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).requires_grad_(False).eval()


def found(model, chunk_tokens=7):
    head = find_logit_head(model, chunk_tokens=chunk_tokens, device=CPU)
    assert isinstance(head, LogitHead), head
    return head


def with_adapters(model):
    """(model, leaf): adapters on all linears, with numbers that matter."""
    sites, ranks = sites_of_model(model)
    adapters, layout = attach(model, sites, dropout={}), ArenaLayout(RankTable.start(sites, ranks), Lora().entries)
    leaf = torch.empty(layout.size).normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bind_arena(adapters, layout, leaf)
    return leaf


def loss_and_gradient(model, leaf, batch, head, *, dtype=torch.float32, weight=1.0):
    loss = token_loss_sum(model, batch, device=CPU, logit_head=head)
    (gradient,) = torch.autograd.grad(loss * weight, leaf)
    return loss.detach(), gradient


def test_cross_entropy_by_hand_and_beside_torch():
    logits = torch.tensor([[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]])
    losses = cross_entropy_(logits, torch.tensor([0, 1]), gradient=True)
    assert losses.tolist() == pytest.approx([0.6931472, 1.3862944])  # log 2, log 4
    assert logits.tolist() == [pytest.approx([-0.5, 0.5]), pytest.approx([0.75, -0.75])]
    random = torch.empty(9, 50).normal_(0.0, 20.0, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(9) * 5
    wanted = F.cross_entropy(random, targets, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), random)
    values = random.detach().clone()
    assert torch.allclose(cross_entropy_(values, targets, gradient=True), wanted, rtol=1e-6, atol=1e-6)
    assert torch.allclose(values, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_probe_finds_what_a_family_does_to_its_logits(name):
    model = family(name).train()
    head = found(model)
    assert head.form.cap == FAMILIES[name][1].cap
    assert head.form.factor == pytest.approx(FAMILIES[name][1].factor)
    assert model.training and "forward" not in vars(head.head), "the model is left as it was"


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "opt"])
def test_loss_and_gradient_equal_those_of_whole_logits(name, chunk_tokens):
    """float32: loss and gradient to 1e-6."""
    model = family(name)
    head = found(model, chunk_tokens)
    leaf = with_adapters(model)
    for packed in (False, True):
        batch = TokenBatches(rows=3, packed=packed).collate((0, 0))
        wanted, slope = loss_and_gradient(model, leaf, batch, None)
        loss, gradient = loss_and_gradient(model, leaf, batch, head)
        assert loss.dtype == torch.float32 and float(slope.abs().max()) > 1.0
        assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
        assert float((gradient - slope).norm()) <= 1e-6 * float(slope.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_as_near_to_float32_as_whole_logits_are(dtype, tolerance):
    """The rest of the model rounds in both; float16 at a loss scale of 1, where whole logits lose small gradients."""
    batch = TokenBatches(rows=3).collate((0, 0))
    exact = family("gemma2", dtype).float()
    leaf = with_adapters(exact)
    _, wanted = loss_and_gradient(exact, leaf, batch, None)
    model = family("gemma2", dtype)
    head, leaf = found(model), with_adapters(model)
    errors = []
    for chosen in (None, head):
        _, gradient = loss_and_gradient(model, leaf, batch, chosen, dtype=dtype)
        errors.append(float((gradient - wanted).norm() / wanted.norm()))
    assert errors[1] < tolerance and errors[1] < 1.5 * errors[0]


def test_a_loss_scale_scales_the_gradient_exactly():
    model = family("llama")
    head, leaf, batch = found(model), with_adapters(model), TokenBatches().collate((0, 0))
    _, gradient = loss_and_gradient(model, leaf, batch, head)
    _, scaled = loss_and_gradient(model, leaf, batch, head, weight=1024.0)
    assert equal_bits(scaled, gradient * 1024.0)


def test_a_grain_without_targets_has_loss_and_gradient_zero():
    model = family("llama")
    head, leaf, batch = found(model), with_adapters(model), TokenBatches().collate((0, 0))
    batch.labels.fill_(-100)
    loss, gradient = loss_and_gradient(model, leaf, batch, head)
    assert float(loss) == 0.0 and not gradient.any()
    with torch.no_grad():
        assert float(token_loss_sum(model, batch, device=CPU, logit_head=head)) == 0.0


def test_without_gradient_the_loss_has_the_same_bits():
    model = family("gemma2")
    head, leaf, batch = found(model), with_adapters(model), TokenBatches().collate((0, 0))
    with_gradient, _ = loss_and_gradient(model, leaf, batch, head)
    with torch.no_grad():
        without = token_loss_sum(model, batch, device=CPU, logit_head=head)
    assert equal_bits(without, with_gradient)


def test_held_out_loss_equals_that_of_whole_logits():
    model, data = family("gemma2"), HeldOutBatches()
    head = found(model)

    def chunked(*args, **settings):
        return token_loss_sum(*args, **settings, logit_head=head)

    whole = held_out_loss(model, data, world=single_world())
    ours = held_out_loss(model, data, world=single_world(), loss_sum=chunked)
    assert ours.loss == pytest.approx(whole.loss, rel=1e-6) and ours.num_tokens == whole.num_tokens


@pytest.mark.parametrize("stage", [0, 3])
def test_trained_rows_of_a_tied_output_embedding_get_their_gradient(world, stage):
    model = tiny_llama(tied=True)
    leaf = with_adapters(model)
    ids = [5, 17, 90]
    rows = model.get_input_embeddings().weight[ids].clone().requires_grad_()
    engine = BackboneEngine(model, stage=stage, config=backbone_config(stage=stage), device=CPU)
    trained = TokenRows(model, ids, rows.detach())
    trained.views = {PART: rows}
    head, batch, slopes = found(model), TokenBatches(rows=3).collate((0, 0)), []
    for chosen in (None, head):
        loss = token_loss_sum(model, batch, device=CPU, logit_head=chosen)
        slopes.append(torch.autograd.grad(3.0 * loss, [leaf, rows]))
        engine.release()
    for wanted, gradient in zip(*slopes, strict=True):
        assert float(wanted.abs().max()) > 0.1
        assert float((gradient - wanted).norm()) <= 1e-6 * float(wanted.norm())
    engine.destroy()


class Shifted(LlamaForCausalLM):
    def forward(self, *args, **settings):
        out = super().forward(*args, **settings)
        out.logits = out.logits + 1e-3 * torch.arange(out.logits.shape[-1])
        return out


class Twice(LlamaForCausalLM):
    def forward(self, *args, **settings):
        super().forward(*args, **settings)
        return super().forward(*args, **settings)


@pytest.mark.parametrize(("kind", "reason"), [(Shifted, "none of the known forms"), (Twice, "once")])
def test_an_unknown_form_keeps_whole_logits_and_says_why(kind, reason):
    model = kind(FAMILIES["llama"][0])
    assert reason in find_logit_head(model, chunk_tokens=7, device=CPU)
    assert "forward" not in vars(model.lm_head)
    assert "no output embedding" in find_logit_head(nn.Linear(2, 2), chunk_tokens=7, device=CPU)


def test_a_config_that_names_a_cap_the_model_does_not_use_is_not_believed():
    config = copy.deepcopy(FAMILIES["llama"][0])
    config.final_logit_softcapping = config.logits_scaling = 3.0
    assert found(LlamaForCausalLM(config)).form == Form()


def test_peak_memory_is_an_eighth_of_whole_logits():
    model = tiny_llama(layers=1, vocab=8192)
    head, leaf = found(model, 32), with_adapters(model)
    batch = TokenBatches(rows=2, length=512, vocab=8192).collate((0, 0))
    peaks = []
    for chosen in (None, head):
        with LiveBytes() as memory:
            loss_and_gradient(model, leaf, batch, chosen)
        peaks.append(memory.peak)
        assert memory.live < 2**20, "nothing stays but the gradient"
    assert batch.num_target_tokens > 400 and peaks[1] <= peaks[0] / 8


def test_zero_3_gathers_the_output_embedding_once_and_has_the_bits_of_zero_0(world, monkeypatch):
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    fetched = []
    fetch = Coordinator.fetch_sub_module

    def counted(self, module, forward):
        fetched.append((type(module).__name__, forward))
        return fetch(self, module, forward)

    batch, results = TokenBatches(rows=3).collate((0, 0)), []
    for stage in (0, 3):
        model = tiny_llama()
        leaf = with_adapters(model)
        engine = BackboneEngine(model, stage=stage, config=backbone_config(stage=stage), device=CPU)
        head = found(model, 5)
        monkeypatch.setattr(Coordinator, "fetch_sub_module", counted)
        for _ in range(2):  # the second follows the order that the first recorded
            fetched.clear()
            results.append(loss_and_gradient(model, leaf, batch, head))
            engine.release()
            assert engine.gathered_parameters() == 0
        if stage == 3:
            assert [forward for name, forward in fetched if name == "BaseLinear"] == [True], "forward only, one gather"
        engine.destroy()
    for loss, gradient in results[1:]:
        assert equal_bits(loss, results[0][0]) and equal_bits(gradient, results[0][1])
