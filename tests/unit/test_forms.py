"""The forms of AdapterLinear beside the plain one: each head its own A and B, heads that share, DoRA, trained in full.

Letters: B batch, T tokens, I in, O out, R components, H heads.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ardtrain.adapters import (
    AdapterLinear,
    DoraLinear,
    HeadLinear,
    SharedHeadLinear,
    attach,
    bind_arena,
    drop_views,
    first_dense,
    group_adapters,
)
from ardtrain.arena import ArenaLayout
from ardtrain.dense import DenseLayer, DenseLinear, attach_dense, dense_entries
from ardtrain.engines import BackboneEngine
from ardtrain.evaluation import token_loss_sum
from ardtrain.heads import find_heads, split_heads
from ardtrain.methods.dora import Dora
from ardtrain.methods.lora import Lora
from ardtrain.products import FrozenLinear
from ardtrain.ranks import Dense, RankTable
from tests.tiny import (
    CPU,
    TokenBatches,
    ard_lora,
    backbone_config,
    equal_bits,
    sites_of_model,
    tiny_llama,
    tiny_trainer,
)

I, O, H, SCALING = 12, 8, 4, 1.5  # noqa: E741


def random(*shape, seed=0, dtype=torch.float32, size=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def frozen(inputs=I, outputs=O, *, dtype=torch.float32, bias=True):
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data = random(outputs, inputs, seed=1)
    if bias:
        linear.bias.data = random(outputs, seed=2)
    return linear.to(dtype).requires_grad_(False)


# ---- each head its own A and B ----

RANKS = {
    "even": (2, 2, 2, 2),
    "uneven": (1, 3, 2, 1),
    "a head of rank 0": (2, 0, 1, 0),
    "one head alone": (0, 0, 3, 0),
}
each_ranks = pytest.mark.parametrize("ranks", RANKS.values(), ids=list(RANKS))
each_side = pytest.mark.parametrize("side", ["out", "in"])


def head_layer(ranks, side, *, dtype=torch.float32, gates=None, **settings):
    """(layer, views): the columns of the own side are a head's alone."""
    layer = HeadLinear(frozen(dtype=dtype), scaling=SCALING, num_heads=H, side=side, **settings).train()
    a = random(sum(ranks), I if side == "out" else I // H, seed=3)
    b = random(sum(ranks), O // H if side == "out" else O, seed=4)
    views = {"lora_A": a.requires_grad_(), "lora_B": b.requires_grad_()}
    layer.bind(views, ranks, gates)
    return layer, views


def head_delta(views, ranks, side, gates=None):
    """[O, I] float64, one component at a time: s m_i B_i A_i in its head's rows (q, k, v) or columns (o)."""
    delta, i = torch.zeros(O, I, dtype=torch.float64), 0
    a, b = views["lora_A"].double(), views["lora_B"].double()
    for h, rank in enumerate(ranks):
        for _ in range(rank):
            own = SCALING * (1.0 if gates is None else gates[i].double()) * torch.outer(b[i], a[i])
            if side == "out":
                delta[h * O // H : (h + 1) * O // H] += own
            else:
                delta[:, h * I // H : (h + 1) * I // H] += own
            i += 1
    return delta


@each_ranks
@each_side
@pytest.mark.parametrize("gated", [False, True])
def test_heads_by_the_naive_loop(ranks, side, gated):
    gates = torch.rand(sum(ranks), generator=torch.Generator().manual_seed(7)) if gated else None
    layer, views = head_layer(ranks, side, gates=gates)
    delta = head_delta(views, ranks, side, gates)
    for lead in ((5,), (2, 3), (2, 2, 3)):
        x = random(*lead, I, seed=8)
        wanted = x.double() @ (layer.weight.double() + delta).T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


@each_ranks
@each_side
def test_gradients_of_heads_by_the_naive_loop(ranks, side):
    gates = torch.rand(sum(ranks), generator=torch.Generator().manual_seed(7)).requires_grad_()
    layer, views = head_layer(ranks, side, gates=gates)
    x, factor = random(2, 3, I, seed=8).requires_grad_(), random(2, 3, O, seed=9)
    leaves = [x, views["lora_A"], views["lora_B"], gates]
    ours = torch.autograd.grad((layer(x) * factor).sum(), leaves)
    wanted = (x.double() @ (layer.weight.double() + head_delta(views, ranks, side, gates)).T * factor).sum()
    for a, b in zip(ours, torch.autograd.grad(wanted, leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_side
def test_heads_see_nothing_of_each_other(side):
    """A change of one head's numbers changes its rows (its columns' share) and no other bit."""
    ranks = (1, 3, 2, 1)
    layer, views = head_layer(ranks, side)
    x = random(2, 3, I, seed=8)
    before = layer(x)
    changed = {part: rows.detach().clone() for part, rows in views.items()}
    for rows in changed.values():
        rows[1:4] *= 2.0  # head 1
    layer.bind(changed, ranks)
    after = layer(x)
    if side == "out":
        same = torch.eq(before, after).all(dim=0).all(dim=0).tolist()
        assert same == [True, True, False, False, True, True, True, True]
    else:
        blind = x.clone()
        blind[..., 3:6] = 0.0  # what head 1 reads
        out = layer(blind)
        layer.bind({p: r.detach() for p, r in views.items()}, ranks)
        torch.testing.assert_close(out, layer(blind), rtol=0, atol=0)
        assert not torch.equal(before, after)


@each_side
def test_gates_of_one_an_example(side):
    """[B, 1, R]: what ablation hands in; each example under its own gates."""
    ranks = (1, 3, 2, 1)
    x = random(3, 4, I, seed=8)
    gates = torch.rand(3, 1, 7, generator=torch.Generator().manual_seed(1))
    layer, views = head_layer(ranks, side, gates=gates)
    both = layer(x)
    for e in range(3):
        layer.bind(views, ranks, gates[e, 0])
        torch.testing.assert_close(both[e : e + 1], layer(x[e : e + 1]), rtol=1e-6, atol=1e-6)


@each_side
def test_heads_in_bfloat16_stay_in_bfloat16(side):
    ranks = (1, 3, 2, 1)
    layer, views = head_layer(ranks, side, dtype=torch.bfloat16, gates=torch.full((7,), 0.5))
    x = random(2, 3, I, seed=8, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    wanted = x.double() @ (layer.weight.double() + head_delta(views, ranks, side, torch.full((7,), 0.5))).T
    torch.testing.assert_close(out.double(), wanted + layer.bias.double(), rtol=0.05, atol=0.1)
    out.float().sum().backward()
    assert {rows.grad.dtype for rows in views.values()} == {torch.float32}


@each_side
def test_dropout_falls_on_the_input_of_all_heads_alike(side):
    ranks = (1, 3, 2, 1)
    layer, views = head_layer(ranks, side, dropout=0.5)
    x = random(2, 3, I, seed=8)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    ours = layer(x).double() - FrozenLinear.apply(x, layer.weight, layer.bias).double()
    torch.testing.assert_close(ours, dropped.double() @ head_delta(views, ranks, side).T, rtol=1e-4, atol=1e-5)
    layer.eval()
    clean, _ = head_layer(ranks, side)
    assert equal_bits(layer(x), clean(x))


@each_side
def test_no_components_is_the_frozen_linear(side):
    layer, _ = head_layer((1, 3, 2, 1), side)
    layer.bind(None, (0,) * H)
    x = random(2, 3, I, seed=8)
    assert equal_bits(layer(x), FrozenLinear.apply(x, layer.weight, layer.bias))
    layer.bind(None, (0,))  # as drop_views does
    assert equal_bits(layer(x), FrozenLinear.apply(x, layer.weight, layer.bias))


@each_side
def test_newborn_components_change_no_bit(side):
    """B = 0 in the new rows; padding for the larger head must not round others."""
    layer, views = head_layer((1, 2, 2, 1), side)
    x = random(2, 3, I, seed=8)
    before = layer(x)
    a, b = views["lora_A"].detach(), views["lora_B"].detach()
    grown = {
        "lora_A": torch.cat([a[:3], random(2, a.shape[1], seed=5), a[3:]]),
        "lora_B": torch.cat([b[:3], torch.zeros(2, b.shape[1]), b[3:]]),
    }
    layer.bind(grown, (1, 4, 2, 1))
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


# ---- heads that share components ----


def shared_layer(side, gates=None, **settings):
    layer = SharedHeadLinear(frozen(), scaling=SCALING, num_heads=H, side=side, **settings).train()
    views = {"lora_A": random(3, I, seed=3).requires_grad_(), "lora_B": random(3, O, seed=4).requires_grad_()}
    layer.bind(views, (3,), gates)
    return layer, views


@each_side
def test_shared_heads_by_the_naive_loop(side):
    gates = torch.rand(3 * H, generator=torch.Generator().manual_seed(7)).requires_grad_()
    layer, views = shared_layer(side, gates)
    assert layer.gates_per_component == H
    delta = torch.zeros(O, I, dtype=torch.float64)
    for r in range(3):
        for h in range(H):  # gates: component by component, heads last
            own = SCALING * gates[r * H + h].double() * torch.outer(views["lora_B"][r], views["lora_A"][r]).double()
            block = torch.zeros(O, I, dtype=torch.float64)
            if side == "out":
                block[h * O // H : (h + 1) * O // H] = 1.0
            else:
                block[:, h * I // H : (h + 1) * I // H] = 1.0
            delta = delta + own * block
    x, factor = random(2, 3, I, seed=8), random(2, 3, O, seed=9)
    wanted = x.double() @ (layer.weight.double() + delta).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    leaves = [views["lora_A"], views["lora_B"], gates]
    ours = torch.autograd.grad((layer(x) * factor).sum(), leaves)
    for a, b in zip(ours, torch.autograd.grad((wanted * factor).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_side
def test_shared_heads_with_open_gates_are_plain_lora(side):
    plain = AdapterLinear(frozen(), scaling=SCALING)
    x = random(2, 3, I, seed=8)
    for gates in (None, torch.ones(3 * H)):
        layer, views = shared_layer(side, gates)
        plain.bind(views, (3,))
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)


@each_side
def test_a_closed_head_is_the_frozen_linear_for_it(side):
    gates = torch.ones(3, H)
    gates[:, 2] = 0.0
    layer, _ = shared_layer(side, gates.view(-1))
    base = FrozenLinear.apply(x := random(2, 3, I, seed=8), layer.weight, layer.bias)
    if side == "out":
        torch.testing.assert_close(layer(x)[..., 4:6], base[..., 4:6], rtol=0, atol=0)
        assert not torch.isclose(layer(x), base).any(dim=0).any(dim=0)[[0, 1, 2, 3, 6, 7]].all()
    else:
        only = torch.zeros_like(x)
        only[..., 6:9] = x[..., 6:9]
        torch.testing.assert_close(layer(only), FrozenLinear.apply(only, layer.weight, layer.bias), rtol=0, atol=0)


@each_side
@pytest.mark.parametrize("empty", [False, True], ids=["ranks", "no components"])
def test_the_output_may_be_changed_in_place(side, empty):
    """As DeBERTa does with its projection of positions."""
    layer, _ = head_layer((1, 3, 2, 1), side)
    if empty:
        layer.bind(None, (0,) * H)
    x, again = random(2, 3, I, seed=8).requires_grad_(), random(2, 3, I, seed=8).requires_grad_()
    (layer(x) / 2).square().sum().backward()
    out = layer(again).view(6, -1)
    out /= 2
    out.square().sum().backward()
    assert equal_bits(again.grad, x.grad)


# ---- a whole model, by head ----

FORMS = ["own_a", "shared_a", "dora"]


def attached(form, *, ranks=None, model=None, seed=1, dropout=0.0, size=0.2):
    """(model, adapters, layout, arena with numbers that matter) of a tiny Llama."""
    model = tiny_llama() if model is None else model
    method = Dora() if form == "dora" else Lora()
    sites, first = sites_of_model(model, r=2, lora_alpha=6.0)
    heads = find_heads(sites, {"language": model.config}) if form.endswith("_a") else {}
    if form == "own_a":
        sites, first = split_heads(sites, first, heads)
    layout = ArenaLayout(RankTable.start(sites, ranks or first), method.entries, method.dense(sites))
    adapters = attach(model, sites, dropout={"language": dropout}, form=form, heads=heads)
    leaf = torch.zeros(layout.size)
    for number, block in enumerate(layout.all_blocks):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        if block.part == "magnitude":
            own = adapters[block.module].first_magnitude
            block.of(leaf).copy_(own * torch.empty_like(own).uniform_(0.7, 1.3, generator=generator))
        else:
            block.of(leaf).normal_(0.0, size, generator=generator)
    return model, adapters, layout, leaf


def grain_loss(engine, model, adapters, layout, leaf, gates=None):
    leaf = leaf.clone().requires_grad_()
    leaves = [leaf]
    if gates is not None:
        gates = gates.clone().requires_grad_()
        leaves.append(gates)
    bind_arena(adapters, layout, leaf, gates)
    batch = TokenBatches().collate((0, 0))
    model.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        group_adapters(adapters, lambda: token_loss_sum(model, batch, device=CPU))
    assert sum(a.group is not None for a in adapters.values()) == 10  # q, k, v and gate, up of two layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = token_loss_sum(model, batch, device=CPU)
        gradients = torch.autograd.grad(loss, leaves)
    if engine is not None:
        engine.release()
        assert engine.gathered_parameters() == 0
    return loss.detach(), torch.cat(gradients)


def gates_of(form, adapters, layout):
    """Half-open gates for the forms that have them."""
    if form == "dora":
        return None
    count = sum(layout.positions(m)[1] * a.gates_per_component for m, a in adapters.items())
    return torch.rand(count, generator=torch.Generator().manual_seed(9))


UNEVEN = [1 + (7 * i) % 4 for i in range(30)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_stages_and_checkpointing_give_the_same_bits(world, form, dropout):
    """ZeRO-3 in one process, with and without activation checkpointing, against the whole model."""
    ranks = UNEVEN if form == "own_a" else None
    results = {}
    for stage in (0, 3):
        for checkpointing in (False, True):
            model = tiny_llama()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model, adapters, layout, leaf = attached(form, model=model, ranks=ranks, dropout=dropout)
            engine = BackboneEngine(model, stage=stage, config=backbone_config(stage=stage), device=CPU)
            gates = gates_of(form, adapters, layout)
            results[stage, checkpointing] = grain_loss(engine, model, adapters, layout, leaf, gates)
            engine.destroy()
    loss, gradient = results.pop((0, False))
    assert torch.isfinite(loss) and gradient.any()
    for key, (other, other_gradient) in results.items():
        assert equal_bits(other, loss), key
        assert equal_bits(other_gradient, gradient), key


@pytest.mark.parametrize("form", FORMS)
def test_first_numbers_leave_the_base_as_it_is(world, form):
    """B = 0, and DoRA's magnitude is the weight's norm: the function is the base's."""
    trainer = tiny_trainer(Dora() if form == "dora" else ard_lora(), form=form, r=2)
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        trainer._bind(0)
        ours, base = trainer.backbone.module(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits
    torch.testing.assert_close(ours, base, rtol=1e-6, atol=1e-6)
    trainer.arena.engine.destroy()


def test_forms_by_module():
    _, adapters, _, _ = attached("own_a")
    kinds = {m.removeprefix("model.layers.0."): type(a) for m, a in adapters.items() if ".0." in m}
    assert kinds["self_attn.q_proj"] is kinds["self_attn.o_proj"] is HeadLinear
    assert kinds["mlp.down_proj"] is AdapterLinear
    heads = {m[-6:-5]: (a.num_heads, a.side) for m, a in adapters.items() if isinstance(a, HeadLinear)}
    assert heads == {"q": (4, "out"), "k": (2, "out"), "v": (2, "out"), "o": (4, "in")}
    _, adapters, _, _ = attached("shared_a")
    assert {type(a) for m, a in adapters.items() if "mlp" in m} == {AdapterLinear}
    assert {type(a) for m, a in adapters.items() if "attn" in m} == {SharedHeadLinear}
    _, adapters, _, _ = attached("dora")
    assert {type(a) for a in adapters.values()} == {DoraLinear}


@pytest.mark.parametrize("form", ["own_a", "shared_a"])
def test_each_adapter_gets_its_own_gates(form):
    ranks = UNEVEN if form == "own_a" else None
    _, adapters, layout, leaf = attached(form, ranks=ranks)
    gates = gates_of(form, adapters, layout)
    gates = torch.arange(float(len(gates)))
    bind_arena(adapters, layout, leaf, gates)
    taken = [a.gates for a in adapters.values()]
    assert torch.equal(torch.cat(taken), gates)
    for module, adapter in adapters.items():
        assert len(adapter.gates) == layout.positions(module)[1] * adapter.gates_per_component
    drop_views(adapters)
    assert {a.views for a in adapters.values()} == {None} and {a.gates for a in adapters.values()} == {None}


def test_gates_pass_by_a_matrix_without_components_and_a_linear_trained_in_full():
    model = tiny_llama()
    sites, _ = sites_of_model(model, ["q_proj"], r=2, lora_alpha=6.0)
    method = Lora()
    dense = dense_entries({"model.layers.1.mlp.up_proj": model.model.layers[1].mlp.up_proj})
    layout = ArenaLayout(RankTable.start(sites, [0, 3]), method.entries, dense)
    adapters = attach(model, sites, dropout={}) | attach_dense(model, ["model.layers.1.mlp.up_proj"])
    bind_arena(adapters, layout, torch.zeros(layout.size), torch.tensor([1.0, 2.0, 3.0]))
    first, second, last = adapters.values()
    assert first.views is None and first.gates.tolist() == []
    assert second.gates.tolist() == [1.0, 2.0, 3.0]
    assert last.views.keys() == {"weight"}


# ---- DoRA (methods.md 4.4) ----


def dora_layer(*, dtype=torch.float32, bias=True, rank=3, inputs=I, outputs=O, size=1.0, **settings):
    layer = DoraLinear(frozen(inputs, outputs, dtype=dtype, bias=bias), scaling=SCALING, **settings).train()
    views = {
        "lora_A": random(rank, inputs, seed=3, size=size).requires_grad_(),
        "lora_B": random(rank, outputs, seed=4, size=size).requires_grad_(),
        "magnitude": (layer.first_magnitude * torch.linspace(0.5, 2.0, outputs)).view(1, -1).requires_grad_(),
    }
    layer.bind(views, (rank,))
    return layer, views


def dora_formula(layer, views, x, *, detach=True):
    """m (W + s B A) x / ||W + s B A||, dense, in float64, the norm detached by hand."""
    whole = layer.weight.double() + SCALING * views["lora_B"].double().T @ views["lora_A"].double()
    norm = whole.norm(dim=1)
    out = x.double() @ whole.T * (views["magnitude"].double().view(-1) / (norm.detach() if detach else norm))
    return out if layer.bias is None else out + layer.bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_starts_as_its_base(bias, dtype):
    layer, views = dora_layer(dtype=dtype, bias=bias)
    start = {"lora_A": views["lora_A"], "lora_B": torch.zeros(3, O), "magnitude": layer.first_magnitude.view(1, -1)}
    layer.bind(start, (3,))
    x = random(2, 3, I, seed=8, dtype=dtype)
    base = FrozenLinear.apply(x, layer.weight, layer.bias)
    assert layer(x).dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(layer(x), base, rtol=1e-6, atol=1e-6)
    else:  # the bias is added after a rounding
        torch.testing.assert_close(layer(x), base, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_by_its_formula_with_gradients(bias):
    layer, views = dora_layer(bias=bias)
    x, factor = random(2, 3, I, seed=8).requires_grad_(), random(2, 3, O, seed=9)
    leaves = [x, *views.values()]
    out, wanted = layer(x), dora_formula(layer, views, x)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((out * factor).sum(), leaves)
    theirs = torch.autograd.grad((wanted * factor).sum(), leaves, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    undetached = torch.autograd.grad((dora_formula(layer, views, x, detach=False) * factor).sum(), leaves)
    assert (undetached[1] - theirs[1]).abs().max() > 0.1  # else this test could not tell


def test_scaling_the_magnitude_scales_the_output_without_its_bias():
    layer, views = dora_layer()
    x = random(2, 3, I, seed=8)
    before = layer(x) - layer.bias
    for c in (0.0, 0.5, 3.0):
        layer.bind(views | {"magnitude": views["magnitude"] * c}, (3,))
        torch.testing.assert_close(layer(x) - layer.bias, c * before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_norm_by_its_short_formula(dtype, tolerance, size):
    """In bf16 W A^T is rounded to 8 bits, so the norm of W + s B A to about half that many units of its size: 5e-3."""
    layer, views = dora_layer(dtype=dtype, rank=8, inputs=96, outputs=64, size=size)
    whole = layer.weight.double() + SCALING * views["lora_B"].double().T @ views["lora_A"].double()
    norm = layer.column_norm()
    assert norm.dtype == torch.float32
    assert float((norm.double() / whole.detach().norm(dim=1) - 1).abs().max()) <= tolerance


def test_a_norm_of_zero_divides_nothing_by_zero():
    """An output whose row of W is 0."""
    layer, views = dora_layer(bias=False, rank=1)
    layer.weight.data[2] = 0.0
    layer = DoraLinear(layer, scaling=SCALING)
    layer.bind(
        {p: r.detach().zero_() for p, r in views.items()} | {"magnitude": layer.first_magnitude.view(1, -1)}, (1,)
    )
    out = layer(random(2, 3, I, seed=8))
    assert torch.isfinite(out).all() and not out[..., 2].any()


def test_a_new_binding_forgets_the_norm():
    layer, views = dora_layer()
    x = random(2, 3, I, seed=8)
    layer(x)
    changed = views | {"lora_B": views["lora_B"].detach() * 5}
    layer.bind(changed, (3,))
    torch.testing.assert_close(layer(x).double(), dora_formula(layer, changed, x), rtol=1e-5, atol=1e-5)
    layer.bind(None, (0,))
    assert equal_bits(layer(x), FrozenLinear.apply(x, layer.weight, layer.bias))


def test_dropout_of_dora_spares_the_weights_part():
    """Only B A sees the dropped input (the paper's formula; PEFT drops it for both)."""
    layer, views = dora_layer(dropout=0.5, bias=False)
    x = random(2, 3, I, seed=8)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5).double()
    torch.manual_seed(0)
    ours = layer(x)
    whole = layer.weight.double() + SCALING * views["lora_B"].double().T @ views["lora_A"].double()
    own = x.double() @ layer.weight.double().T + dropped @ (whole - layer.weight.double()).T
    wanted = own * views["magnitude"].double().view(-1) / whole.norm(dim=1)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


def test_magnitudes_are_trained_and_counted(world):
    trainer = tiny_trainer(Dora(), form="dora", r=2)
    layout = trainer.arena.layout
    components = sum(2 * (s.in_features + s.out_features) for s in layout.table.sites)
    assert layout.num_trained == components + sum(s.out_features for s in layout.table.sites)
    before = {e.module: block.of(trainer.arena.engine.weights).clone() for e, block in dense_blocks(layout)}
    losses = [trainer.train_step().loss for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    for entry, block in dense_blocks(layout):
        assert entry.part == "magnitude"
        assert not torch.equal(block.of(trainer.arena.engine.weights), before[entry.module])
    trainer.arena.engine.destroy()


def dense_blocks(layout):
    return list(zip(layout.dense, layout.all_blocks[len(layout.blocks) :], strict=True))


# ---- linears that are trained in full ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_trained_in_full(bias, dtype):
    linear = frozen(dtype=dtype, bias=bias)
    dense = DenseLinear(linear)
    assert not list(dense.parameters()) and not list(dense.buffers())  # nothing for ZeRO-3 to shard
    assert list(dense.first) == (["weight", "bias"] if bias else ["weight"])
    assert all(equal_bits(v, getattr(linear, n).float()) for n, v in dense.first.items())
    dense.views = {n: v.clone().view(-1, v.shape[-1]).requires_grad_() for n, v in dense.first.items()}
    x = random(2, 3, I, seed=8, dtype=dtype)
    assert equal_bits(dense(x), FrozenLinear.apply(x, linear.weight, linear.bias))
    assert dense(x).dtype == dtype
    dense(x).float().sum().backward()
    rows = x.float().sum(dim=(0, 1)).expand(O, I)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(dense.views["weight"].grad, rows, **tolerance)
    if bias:
        assert dense.views["bias"].grad.view(-1).tolist() == [6.0] * O


LAYERS = {
    "convolution": (nn.Conv2d(3, O, 2, stride=2, padding="valid"), random(2, 3, 6, 6, seed=4)),
    "embedding": (nn.Embedding(O, I), torch.arange(O).flip(0).expand(1, -1)),
    "norm": (nn.LayerNorm(I), random(2, 3, I, seed=5)),
    "norm without bias": (nn.RMSNorm(I), random(2, 3, I, seed=6)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_another_kind_trained_in_full(kind, dtype):
    """The plain module's output and gradients to the bit, from views of an arena, with nothing for ZeRO-3 to shard."""
    layer, x = LAYERS[kind]
    plain, x = copy.deepcopy(layer).to(dtype), x.to(dtype) if x.is_floating_point() else x
    model = nn.ModuleDict({"own": copy.deepcopy(plain)})
    entries = dense_entries(model)
    layout = ArenaLayout(RankTable.start((), ()), lambda site: {}, entries)
    adapters = attach_dense(model, ["own"])
    assert isinstance(model["own"], DenseLayer) and not list(model.parameters()) and not hasattr(model["own"], "weight")
    first, leaf = first_dense(adapters), torch.zeros(layout.size)
    for entry, block in zip(entries, layout.all_blocks, strict=True):
        assert first[entry.module, entry.part].shape == entry.own_shape == plain.get_parameter(entry.part).shape
        block.of(leaf).copy_(first[entry.module, entry.part].view(entry.rows, entry.columns))
    bind_arena(adapters, layout, leaf.requires_grad_())
    own, theirs = model["own"](x), plain(x)
    assert equal_bits(own, theirs) and equal_bits(model["own"].weight, plain.weight)
    upstream = random(*own.shape, seed=7, dtype=dtype)
    own.backward(upstream)
    theirs.backward(upstream)
    for entry, block in zip(entries, layout.all_blocks, strict=True):
        gradient = plain.get_parameter(entry.part).grad.float()
        assert equal_bits(block.of(leaf.grad).reshape(entry.own_shape), gradient)
    drop_views(adapters)
    assert not hasattr(model["own"], "weight")


def test_dense_entries_name_shapes_and_first_values():
    model = nn.ModuleDict({"head": frozen(bias=True), "other": frozen(bias=False)})
    entries = dense_entries({"head": model["head"], "other": model["other"]})
    assert entries == (
        Dense("head", "weight", O, I),
        Dense("head", "bias", 1, O, (O,)),
        Dense("other", "weight", O, I),
    )
    weight, bias = model["head"].weight.clone(), model["head"].bias.clone()
    adapters = attach_dense(model, ["head"])
    assert isinstance(model["head"], DenseLinear) and isinstance(model["other"], nn.Linear)
    first = first_dense(adapters)
    assert first.keys() == {("head", "weight"), ("head", "bias")}
    assert equal_bits(first["head", "weight"], weight) and equal_bits(first["head", "bias"], bias)
    with torch.device("meta"):
        assert dense_entries({"head": nn.Linear(I, O)}) == entries[:2]
