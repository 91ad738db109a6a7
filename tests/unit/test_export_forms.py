"""PEFT's own reading of what the forms export: heads, half-open gates, magnitudes, a classifier's head."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from ardtrain.adapters import attach, bind_arena, first_dense
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import init_head
from ardtrain.dense import attach_dense, dense_entries
from ardtrain.export import PEFT_PREFIX, compare_with_peft, peft_config, peft_tensors, write_peft
from ardtrain.heads import find_heads, split_heads
from ardtrain.methods.dora import Dora
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable
from ardtrain.targets import head_linears
from tests.tiny import TokenBatches, ard_lora, equal_bits, sites_of_model, tiny_llama, tiny_trainer

IDS = torch.arange(4, 44).reshape(2, 20)
TOLERANCE = 1e-5  # of the largest logit


class Exported:
    """A tiny Llama under adapters of one form, numbers that matter in them, and its PEFT folder."""

    def __init__(self, folder, form, *, ranks=None, gates=None, mlp_heads=1, seed=1):
        self.folder, model = folder, tiny_llama()
        method = Dora() if form == "dora" else Lora()
        sites, first = sites_of_model(model, r=2, lora_alpha=6.0)
        configs = {"language": model.config}
        self.heads = find_heads(sites, configs, mlp_heads=mlp_heads) if form.endswith("_a") else {}
        if form == "own_a":
            sites, first = split_heads(sites, first, self.heads)
        ranks = first if ranks is None else [ranks(i) for i in range(len(sites))]
        self.layout = ArenaLayout(RankTable.start(sites, ranks), method.entries, method.dense(sites))
        adapters = attach(model, sites, dropout={}, form=form, heads=self.heads)
        self.master, generator = torch.zeros(self.layout.size), torch.Generator().manual_seed(seed)
        for block in self.layout.all_blocks:
            if block.part == "magnitude":
                own = adapters[block.module].first_magnitude
                block.of(self.master).copy_(own * torch.empty_like(own).uniform_(0.7, 1.3, generator=generator))
            else:
                block.of(self.master).normal_(0.0, 0.25, generator=generator)
        self.gates = None
        if gates is not None:
            count = sum(self.layout.positions(m)[1] * a.gates_per_component for m, a in adapters.items())
            self.gates = gates(count, generator)
        bind_arena(adapters, self.layout, self.master, self.gates)
        with torch.no_grad():
            self.logits = model(input_ids=IDS).logits
        self.config = peft_config(self.layout, base_model="tiny", revision=None, lora_dropout=0.0)
        write_peft(folder, self.master, self.layout, self.config, heads=self.heads, gates=self.gates)
        self.tensors = load_file(folder / "adapter_model.safetensors")

    def assert_peft_reads_the_same(self):
        difference = compare_with_peft(self.folder, tiny_llama(), {"input_ids": IDS}, self.logits)
        assert difference <= TOLERANCE * float(self.logits.abs().max())
        with torch.no_grad():  # and the adapter is not nothing
            assert float((tiny_llama()(input_ids=IDS).logits - self.logits).abs().max()) > 0.1


def half_open(count, generator):
    """Gates of a ramp: some 0, some 1, some between."""
    return torch.rand(count, generator=generator).mul(3).sub(1).clamp(0, 1)


UNEVEN = {
    "even": None,
    "uneven": lambda i: 1 + (5 * i) % 4,
    "with heads of rank 0": lambda i: (5 * i) % 4,
    "with matrices of rank 0": lambda i: (5 * i) % 4 if 6 <= i < 20 else 0,
}
each_ranks = pytest.mark.parametrize("ranks", UNEVEN.values(), ids=list(UNEVEN))


@each_ranks
@pytest.mark.parametrize("mlp_heads", [1, 4])
def test_heads_that_own_a_and_b(tmp_path, ranks, mlp_heads):
    """4 query heads, 2 key and value heads, each with its own rank."""
    exported = Exported(tmp_path / "adapter", "own_a", ranks=ranks, mlp_heads=mlp_heads)
    exported.assert_peft_reads_the_same()
    wanted = {m: sum(r) for m, r in exported.layout.site_ranks.items() if sum(r)}
    assert exported.config["target_modules"] == list(wanted)
    largest = max(wanted.values())
    assert exported.config["r"] == exported.config["lora_alpha"] == largest
    assert exported.config["rank_pattern"] == {m: r for m, r in wanted.items() if r != largest}
    assert exported.config["alpha_pattern"] == exported.config["rank_pattern"]


@pytest.mark.parametrize("ranks", [None, UNEVEN["uneven"]], ids=["even", "uneven"])
def test_half_open_gates_of_heads(tmp_path, ranks):
    exported = Exported(tmp_path / "adapter", "own_a", ranks=ranks, gates=half_open)
    assert len(exported.gates.unique()) > 10
    exported.assert_peft_reads_the_same()


def test_a_matrix_of_a_head_is_block_diagonal(tmp_path):
    """Each component of head h stands in the 8 rows (q) or columns (o) of that head alone."""
    exported = Exported(tmp_path / "adapter", "own_a", ranks=UNEVEN["uneven"])
    ranks = exported.layout.site_ranks
    for name, part, axis in (("q_proj", "lora_B", 0), ("k_proj", "lora_B", 0), ("o_proj", "lora_A", 1)):
        module = f"model.layers.1.self_attn.{name}"
        values = exported.tensors[f"{PEFT_PREFIX}{module}.{part}.weight"]
        component = 0
        for head, rank in enumerate(ranks[module]):
            for _ in range(rank):
                row = values[:, component] if axis == 0 else values[component]
                own = torch.zeros(len(row), dtype=torch.bool)
                own[8 * head : 8 * head + 8] = True
                assert row[own].all() and not row[~own].any()
                component += 1
        assert component == (values.shape[1] if axis == 0 else len(values))


@pytest.mark.parametrize("gates", [None, half_open], ids=["open", "half open"])
@pytest.mark.parametrize("ranks", [None, UNEVEN["uneven"]], ids=["even", "uneven"])
def test_heads_that_share(tmp_path, gates, ranks):
    exported = Exported(tmp_path / "adapter", "shared_a", ranks=ranks, gates=gates)
    exported.assert_peft_reads_the_same()
    wanted = {m: sum(r) for m, r in exported.layout.site_ranks.items()}
    for module, rank in wanted.items():
        assert len(exported.tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"]) == rank


def test_gates_fall_on_the_side_that_belongs_to_the_heads(tmp_path):
    """q, k, v: lora_A is kept to the bit; o: lora_B but for the scale."""
    exported = Exported(tmp_path / "adapter", "shared_a", gates=half_open)
    plain = peft_tensors(exported.master, exported.layout, heads=exported.heads)
    for module, cut in exported.heads.items():
        kept, changed = ("lora_A", "lora_B") if cut.side == "out" else ("lora_B", "lora_A")
        kept, changed = (f"{PEFT_PREFIX}{module}.{part}.weight" for part in (kept, changed))
        assert equal_bits(exported.tensors[kept], plain[kept])
        assert not torch.equal(exported.tensors[changed], plain[changed])


def test_magnitudes(tmp_path):
    exported = Exported(tmp_path / "adapter", "dora", ranks=lambda i: 1 + i % 4)
    assert exported.config["use_dora"] is True and exported.config["modules_to_save"] is None
    exported.assert_peft_reads_the_same()
    for entry, block in zip(exported.layout.dense, exported.layout.all_blocks[-14:], strict=True):
        stored = exported.tensors[f"{PEFT_PREFIX}{entry.module}.lora_magnitude_vector"]
        assert equal_bits(stored, block.of(exported.master).view(-1))
    plain = Exported(tmp_path / "plain", "own_a")
    assert plain.config["use_dora"] is False


@pytest.mark.parametrize("form", ["own_a", "shared_a"])
@pytest.mark.parametrize("stop", [3, 30, 60], ids=["warm-up", "adapt", "frozen"])
def test_a_run_exports_what_it_computes(world, tmp_path, form, stop):
    """ARD-LoRA stopped in each phase: the gates of its next step are in the file."""
    trainer = tiny_trainer(
        ard_lora(target_r=1.5, lr_alpha=0.4), form=form, r=2, learning_rate=2e-2, data=TokenBatches(num_grains=1)
    )
    for _ in range(stop):
        trainer.train_step()
    gates, arena, model = trainer.method.gates(stop), trainer.arena, trainer.backbone.module
    assert (gates is None) is (stop == 3 or (form == "own_a" and stop == 60))
    if stop == 30:
        assert bool(((gates > 0) & (gates < 1)).any())
    sites, _ = sites_of_model(tiny_llama(), r=2)
    heads = find_heads(sites, {"language": tiny_llama().config})
    config = peft_config(arena.layout, base_model="tiny", revision=None, lora_dropout=0.0)
    write_peft(tmp_path / "adapter", arena.engine.weights, arena.layout, config, heads=heads, gates=gates)
    model.eval()
    with torch.no_grad():
        bind_arena(trainer.adapters, arena.layout, arena.engine.weights, gates)
        logits = model(input_ids=IDS).logits
    difference = compare_with_peft(tmp_path / "adapter", tiny_llama(), {"input_ids": IDS}, logits)
    assert difference <= TOLERANCE * float(logits.abs().max())
    arena.engine.destroy()


def classifier(seed=0):
    """A frozen random Llama with a head for 3 classes."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=3,
        num_labels=3,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 1.0 if name.endswith("embed_tokens.weight") else parameter.shape[1] ** -0.5
            parameter.data.normal_(0.0, std, generator=generator)
    init_head(model, 7)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("form", ["plain", "own_a", "dora"])
def test_a_classifiers_head(tmp_path, form):
    """The head is trained in full: PEFT reads it as a module to save, beside the adapters."""
    model, method = classifier(), Dora() if form == "dora" else Lora()
    sites, ranks = sites_of_model(model, r=2, lora_alpha=6.0)
    assert "score" not in {s.module for s in sites}
    heads = find_heads(sites, {"language": model.config}) if form == "own_a" else {}
    if form == "own_a":
        sites, ranks = split_heads(sites, ranks, heads)
    dense = (*method.dense(sites), *dense_entries(head_linears(model)))
    layout = ArenaLayout(RankTable.start(sites, ranks), method.entries, dense)
    names = list(head_linears(model))
    assert names == ["score"]
    adapters = attach(model, sites, dropout={}, form=form, heads=heads) | attach_dense(model, names)
    first = first_dense(adapters)
    master, generator = torch.zeros(layout.size), torch.Generator().manual_seed(1)
    for block in layout.blocks:
        block.of(master).normal_(0.0, 0.25, generator=generator)
    for entry, block in zip(layout.dense, layout.all_blocks[len(layout.blocks) :], strict=True):
        rows = first[entry.module, entry.part].view(entry.rows, entry.columns)
        block.of(master).copy_(rows * torch.empty_like(rows).uniform_(0.7, 1.3, generator=generator))
        if entry.module == "score":
            block.of(master).normal_(generator=generator)
    bind_arena(adapters, layout, master)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    config = peft_config(layout, base_model="tiny", revision=None, lora_dropout=0.0, task_type="SEQ_CLS")
    assert config["modules_to_save"] == ["score"]
    write_peft(tmp_path / "adapter", master, layout, config, heads=heads)
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_CLS" and stored["use_dora"] is (form == "dora")
    peft = PeftModel.from_pretrained(classifier(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        theirs, base = peft(input_ids=IDS).logits, classifier()(input_ids=IDS).logits
    assert theirs.shape == (2, 3)
    assert float((theirs - logits).abs().max()) <= TOLERANCE * float(logits.abs().max())
    assert float((base - logits).abs().max()) > 0.1
