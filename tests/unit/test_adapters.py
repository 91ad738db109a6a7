import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn

from ardtrain import products
from ardtrain.adapters import AdapterLinear, attach, bind_arena, drop_views, group_adapters
from ardtrain.arena import ArenaLayout
from ardtrain.engines import BackboneEngine
from ardtrain.methods.lora import Lora
from ardtrain.products import FrozenLinear
from ardtrain.ranks import RankTable
from tests.tiny import CPU, backbone_config, equal_bits, sites_of_model, tiny_llama

I, O, R = 6, 5, 3  # noqa: E741


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def frozen(dtype=torch.float32, bias=True):
    linear = nn.Linear(I, O, bias=bias)
    linear.weight.data = random(O, I, seed=1)
    if bias:
        linear.bias.data = random(O, seed=2)
    return linear.to(dtype).requires_grad_(False)


def adapter(*, diagonal=True, dtype=torch.float32, bias=True, **settings):
    out = AdapterLinear(frozen(dtype, bias), scaling=2.0, **settings)
    out.views = {"lora_A": random(R, I, seed=3), "lora_B": random(R, O, seed=4)}
    if diagonal:
        out.views["diagonal"] = random(R, 1, seed=5)
    return out.train()


def test_plain_form():
    layer, x = adapter(diagonal=False), random(2, 4, I)
    a, b = layer.views["lora_A"], layer.views["lora_B"]
    wanted = x @ layer.weight.T + layer.bias + 2.0 * (x @ a.T @ b)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)


def test_diagonal_form():
    layer, x = adapter(), random(2, 4, I)
    a, b, e = (layer.views[n].double() for n in ("lora_A", "lora_B", "diagonal"))
    delta = 2.0 * b.T @ torch.diag(e.view(-1)) @ a  # [O, I]
    wanted = x.double() @ (layer.weight.double() + delta).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_rank_zero_is_the_frozen_linear(bias):
    layer, x = adapter(bias=bias), random(2, 4, I)
    layer.views = None
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert equal_bits(layer(x), FrozenLinear.apply(x, layer.weight, layer.bias))
    assert "rank=0" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", [True, False])
def test_gates_of_one_change_no_bit(diagonal, dtype):
    layer, x = adapter(diagonal=diagonal, dtype=dtype), random(2, 4, I, dtype=dtype)
    wanted = layer(x)
    assert wanted.dtype == dtype
    layer.gates = torch.ones(R)
    assert equal_bits(layer(x), wanted)
    layer.gates = torch.ones(2, 1, R)  # one vector an example
    assert equal_bits(layer(x), wanted)


def test_gate_of_zero_removes_its_component():
    layer, x = adapter(), random(2, 4, I)
    layer.gates = torch.tensor([1.0, 0.0, 1.0])
    gated = layer(x)
    layer.gates = None
    layer.views = {name: rows[[0, 2]] for name, rows in layer.views.items()}
    torch.testing.assert_close(gated, layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gate_gradient_by_finite_differences(diagonal):
    layer, x = adapter(diagonal=diagonal, dtype=torch.float64), random(2, 4, I, dtype=torch.float64)
    layer.views = {name: rows.double() for name, rows in layer.views.items()}
    target = random(2, 4, O, seed=9, dtype=torch.float64)

    def loss(gates):
        layer.gates = gates
        return ((layer(x) - target) ** 2).sum()

    gates = torch.ones(R, dtype=torch.float64, requires_grad=True)
    loss(gates).backward()
    for k in range(R):
        step = torch.zeros(R, dtype=torch.float64)
        step[k] = 1e-6
        slope = (loss(torch.ones(R) + step) - loss(torch.ones(R) - step)).item() / 2e-6
        assert gates.grad[k].item() == pytest.approx(slope, rel=1e-6)


def test_views_get_their_gradients_in_float32():
    layer, x = adapter(dtype=torch.bfloat16), random(2, 4, I, dtype=torch.bfloat16)
    layer.views = {name: rows.requires_grad_() for name, rows in layer.views.items()}
    layer(x).float().sum().backward()
    assert {rows.grad.dtype for rows in layer.views.values()} == {torch.float32}
    assert all(rows.grad.any() for rows in layer.views.values())


def test_dropout_falls_on_the_adapters_input_only_and_in_training_only():
    layer, x = adapter(dropout=0.5), random(2, 4, I)
    torch.manual_seed(0)
    once, plain = layer(x), FrozenLinear.apply(x, layer.weight, layer.bias)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    clean = adapter()
    torch.testing.assert_close(once - plain, clean.product(dropped), rtol=1e-4, atol=1e-5)
    layer.eval()
    assert equal_bits(layer(x), clean(x))


# ---- the frozen part ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, I), (2, 4, I)])
def test_frozen_linear_has_the_gradient_of_linear(shape, bias):
    linear = frozen(bias=bias)
    x, y = random(*shape).requires_grad_(), random(*shape).requires_grad_()
    factor = random(*shape[:-1], O, seed=8)
    (FrozenLinear.apply(x, linear.weight, linear.bias) * factor).sum().backward()
    (F.linear(y, linear.weight, linear.bias) * factor).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)
    assert linear.weight.grad is None


def test_frozen_linear_keeps_its_weight_and_nothing_else():
    linear, x = frozen(), random(2, 4, I).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FrozenLinear.apply(x, linear.weight, linear.bias)
    assert [t.data_ptr() for t in kept] == [linear.weight.data_ptr()]  # neither the input nor a copy


def test_rank_zero_adapter_keeps_no_activation():
    layer, x = adapter(), random(2, 4, I).requires_grad_()
    layer.views = None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in kept} == {layer.weight.data_ptr()}


# ---- attaching ----


def test_base_parameter_names_and_weights_stay():
    model, plain = tiny_llama(), tiny_llama()
    sites, _ = sites_of_model(model)
    adapters = attach(model, sites, dropout={"language": 0.1})
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(equal_bits(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert list(adapters) == [s.module for s in sites]
    assert all(model.get_submodule(name) is adapter for name, adapter in adapters.items())
    assert {a.dropout for a in adapters.values()} == {0.1}
    assert not any(p.requires_grad for p in model.parameters())


def test_views_are_never_parameters_or_buffers():
    model = tiny_llama()
    sites = sites_of_model(model)[0]
    adapters = attach(model, sites, dropout={})
    before = len(list(model.parameters())), len(list(model.buffers()))
    name = next(iter(adapters))
    layout = ArenaLayout(RankTable.start(sites, [1] + [0] * (len(sites) - 1)), Lora().entries)
    bind_arena(adapters, layout, torch.zeros(layout.size, requires_grad=True))
    assert (len(list(model.parameters())), len(list(model.buffers()))) == before
    assert adapters[name].views is not None and list(adapters.values())[1].views is None
    drop_views(adapters)
    assert all(a.views is None for a in adapters.values())


def test_attached_model_without_views_gives_the_bases_logits():
    model, plain = tiny_llama(), tiny_llama()
    attach(model, sites_of_model(model)[0], dropout={})
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_linears_without_adapters_keep_no_input_for_backward(monkeypatch):
    """Also where zero.Init has put its own product, which keeps it, in the place of F.linear."""
    model, x = tiny_llama(), random(1, 3, 32).requires_grad_()
    attach(model, sites_of_model(model, ["q_proj"])[0], dropout={})
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    linears, kept = (model.model.layers[0].mlp.up_proj, model.lm_head), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for linear in linears:
            linear(x)
    assert [t.data_ptr() for t in kept] == [linear.weight.data_ptr() for linear in linears]


def test_no_rows_have_no_output_and_no_gradient():
    """An expert that sees no token; a grain without targets, whose logits are those of no position."""
    model = tiny_llama()
    sites = sites_of_model(model, ["q_proj"])[0]
    adapters, layout = attach(model, sites, dropout={}), ArenaLayout(RankTable.start(sites, [2] * 2), Lora().entries)
    leaf = torch.ones(layout.size, requires_grad=True)
    bind_arena(adapters, layout, leaf)
    x = torch.ones(0, 32, requires_grad=True)
    for linear in (*adapters.values(), model.lm_head):
        out = linear(x)
        of_x, of_leaf = torch.autograd.grad(out.sum(), (x, leaf), allow_unused=True)
        assert out.shape == (0, linear.out_features) and of_x.shape == (0, 32)
        assert of_leaf is None or not of_leaf.any()


# ---- adapters that share an input ----


class Layer(nn.Module):
    """Three linears of one input, as q, k and v, and one of their sum; a view for each, as hooks make."""

    def __init__(self, *, dropout=0.0, form=AdapterLinear, **settings):
        super().__init__()
        for name in "qkv":
            setattr(self, name, form(frozen(), scaling=2.0, dropout=dropout, **settings))
        self.o = AdapterLinear(nn.Linear(O, I).requires_grad_(False), scaling=2.0)

    def forward(self, x):
        q, k, v = (getattr(self, name)(x.view_as(x)) for name in "qkv")
        return self.o(torch.tanh(q) * torch.sigmoid(k) + v)


def layer_of(ranks=(3, 2, 4), *, grouped=True, dropout=0.0):
    """(layer, leaves): ranks of q, k and v; 0: no components."""
    layer = Layer(dropout=dropout).train()
    adapters = {f"layer.{name}": getattr(layer, name) for name in "qkvo"}
    leaves = []
    for seed, (module, rank) in enumerate(zip(adapters.values(), (*ranks, 2), strict=True)):
        if rank:
            inputs, outputs = module.in_features, module.out_features
            views = {"lora_A": random(rank, inputs, seed=10 + seed), "lora_B": random(rank, outputs, seed=20 + seed)}
            leaves += [rows.requires_grad_() for rows in views.values()]
            module.bind(views, (rank,))
    if grouped:
        with torch.no_grad():
            group_adapters(adapters, lambda: layer(random(2, 4, I)))
    return layer, leaves


def test_groups_are_found_by_their_inputs_not_by_names():
    layer, _ = layer_of()
    assert layer.q.group is layer.k.group is layer.v.group and layer.q.group.members == [layer.q, layer.k, layer.v]
    assert layer.o.group is None


def test_no_group_over_unlike_inputs_parents_or_modes():
    layer, other = Layer(), Layer()

    def run():
        x = random(2, 4, I).requires_grad_()
        layer.q(x), layer.k(x.clone()), layer.v(x.detach()), other.q(x), other.k(x)
        x.data[0] = 0.0  # no new version: the caller's own mistake, as for every saved tensor
        other.v(x)
        other.q(x)  # a second time

    named = {f"{path}.{name}": getattr(m, name) for path, m in (("a", layer), ("b", other)) for name in "qkvo"}
    group_adapters(named, run)
    assert [m.group is not None for m in named.values()] == [False] * 4 + [True] * 3 + [False]


@pytest.mark.parametrize("ranks", [(3, 2, 4), (0, 2, 4), (3, 0, 0), (3, 2, 0)])
@pytest.mark.parametrize("needs", [True, False])
def test_a_group_computes_what_its_members_would(ranks, needs):
    (layer, leaves), (alone, same) = layer_of(ranks), layer_of(ranks, grouped=False)
    alone.o.weight = layer.o.weight
    alone.o.bias = layer.o.bias
    x = random(2, 4, I, seed=5).requires_grad_(needs)
    factor = random(2, 4, I, seed=6)
    out, wanted = layer(x), alone(x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    inputs = [x] if needs else []
    ours = torch.autograd.grad((out * factor).sum(), inputs + leaves)
    theirs = torch.autograd.grad((wanted * factor).sum(), inputs + same)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert layer.q.group._input is None  # nothing is held


def test_a_group_makes_one_product_of_the_shared_input(monkeypatch):
    shapes = []
    whole = products.down
    monkeypatch.setattr(products, "down", lambda x, a: (shapes.append(tuple(a.shape)), whole(x, a))[1])
    layer, _ = layer_of((3, 2, 4))
    shapes.clear()
    layer(random(2, 4, I))
    assert shapes == [(9, I), (2, O)]


def test_saved_for_backward_are_u_and_the_shared_input_once():
    layer, leaves = layer_of()
    kept = []
    x = random(2, 4, I).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        [getattr(layer, name)(x) for name in "qkv"]
    numbers = {id(m) for m in leaves}
    own = [t for t in kept if id(t) not in numbers and not any(t is p for p in layer.parameters())]
    assert sorted(tuple(t.shape) for t in own) == [(2, 4, I), (8, 2), (8, 3), (8, 4)]


def test_another_input_is_never_taken_for_the_groups():
    """A change in place, another tensor at the same address, and a member that does not come."""
    layer, _ = layer_of()
    lone, _ = layer_of(grouped=False)
    x = random(2, 4, I)
    with torch.no_grad():
        layer.q(x)
        x.mul_(2.0)
        torch.testing.assert_close(layer.k(x), lone.k(x), rtol=1e-6, atol=1e-6)
        layer.q(x)
        other = random(2, 4, I, seed=9)
        torch.testing.assert_close(layer.v(other), lone.v(other), rtol=1e-6, atol=1e-6)
    layer.q(x)
    assert layer.q.group._input is not None
    layer.k.bind(None, (0,))  # a new step
    assert layer.q.group._input is None


def test_bits_do_not_hang_on_who_comes_first():
    layer, _ = layer_of()
    x = random(2, 4, I)
    layer.q(x)
    second = layer.v(x)
    layer.k.group.forget()
    assert equal_bits(second, layer.v(x))


def test_dropout_draws_a_mask_for_each_module_of_a_group():
    layer, _ = layer_of(dropout=0.5)
    lone, _ = layer_of(dropout=0.5, grouped=False)
    x = random(2, 4, I)
    for module, other in ((layer.q, lone.q), (layer.k, lone.k)):
        torch.manual_seed(3)
        dropped = module(x)
        torch.manual_seed(3)
        assert equal_bits(dropped, other(x))
    layer.q(x)
    assert layer.q.group._input is None


@pytest.mark.parametrize("stage", [0, 3])
def test_a_llamas_groups_are_the_same_under_zero3(world, stage):
    model = tiny_llama()
    sites, ranks = sites_of_model(model, r=2, lora_alpha=4.0)
    adapters = attach(model, sites, dropout={})
    engine = BackboneEngine(model, stage=stage, config=backbone_config(stage=stage), device=CPU)
    layout = ArenaLayout(RankTable.start(sites, ranks), Lora().entries)
    bind_arena(adapters, layout, torch.zeros(layout.size))
    with torch.no_grad():
        group_adapters(adapters, lambda: engine.module(input_ids=torch.ones(1, 4, dtype=torch.int64)))
    found = [[m.rpartition(".")[2] for m, a in adapters.items() if a.group is g] for g in dict.fromkeys(
        a.group for a in adapters.values() if a.group is not None)]  # fmt: skip
    assert found == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2
    engine.destroy()
