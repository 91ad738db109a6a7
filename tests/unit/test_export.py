import json

import pytest
import torch
from safetensors.torch import load_file

from ardtrain.adapters import attach, bind_arena
from ardtrain.arena import ArenaLayout
from ardtrain.export import PEFT_PREFIX, compare_with_peft, peft_config, write_peft
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable
from tests.tiny import ELALORA, equal_bits, save_tiny_llama, sites_of_model, tiny_llama

METHODS = {"diagonal": ElaLora(ELALORA), "plain": Lora()}
RANKS = {
    "even": [4] * 14,
    "uneven": [4, 1, 2, 3, 4, 5, 6, 1, 1, 8, 2, 2, 7, 3],
    "with zeros": [0, 1, 2, 0, 4, 0, 6, 1, 0, 0, 2, 2, 7, 0],
}
IDS = torch.arange(1, 41).reshape(2, 20)


@pytest.fixture(params=[(m, r) for m in METHODS for r in RANKS], ids=lambda p: f"{p[0]}, {p[1]} ranks")
def trained(request, tmp_path):
    """(folder of the export, layout, master, our logits), adapters with numbers large enough to matter."""
    method, ranks = METHODS[request.param[0]], RANKS[request.param[1]]
    model = tiny_llama()
    sites, _ = sites_of_model(model, lora_alpha=6.0)
    layout = ArenaLayout(RankTable.start(sites, ranks), method.entries)
    master = torch.zeros(layout.size)
    generator = torch.Generator().manual_seed(1)
    for block in layout.blocks:
        block.of(master).normal_(0.0, 0.2, generator=generator)
    bind_arena(attach(model, sites, dropout={}), layout, master)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    config = peft_config(layout, base_model="tiny", revision=None, lora_dropout=0.0)
    write_peft(tmp_path / "adapter", master, layout, config)
    return tmp_path / "adapter", layout, master, logits


def test_peft_reads_the_same_function(trained):
    folder, _, _, logits = trained
    difference = compare_with_peft(folder, tiny_llama(), {"input_ids": IDS}, logits)
    assert difference <= 1e-5 * max(1.0, logits.abs().max().item())
    with torch.no_grad():  # and the adapter is not nothing
        assert (tiny_llama()(input_ids=IDS).logits - logits).abs().max() > 0.1


def test_a_reader_that_knows_no_patterns_reads_the_same_function(trained):
    """Rank from the tensors, scale = lora_alpha / r: what vLLM and others do."""
    folder, _, _, logits = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = tiny_llama()
    for name in {n.rsplit(".lora_", 1)[0] for n in tensors}:
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        weight = model.get_submodule(name.removeprefix(PEFT_PREFIX)).weight
        weight.data += config["lora_alpha"] / config["r"] * (b @ a)
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
    assert (theirs - logits).abs().max() <= 1e-5 * max(1.0, logits.abs().max().item())


def test_any_choice_of_alpha_and_rank_gives_one_scale(trained):
    """1 where ranks are uneven or there is a diagonal; else lora_alpha / r is training's, and B keeps its bits."""
    folder, layout, master, _ = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = {s.module: r for s, r in zip(layout.table.sites, layout.table.ranks, strict=True) if r}
    plain = set(ranks.values()) == {4} and layout.blocks[-1].part == "lora_B"
    assert (config["r"], config["lora_alpha"]) == (max(ranks.values()), 6 if plain else max(ranks.values()))
    stored = load_file(folder / "adapter_model.safetensors")
    for index, site in enumerate(layout.table.sites if plain else ()):
        own = layout.site_rows(master, index)["lora_B"].T.contiguous()
        assert equal_bits(stored[f"{PEFT_PREFIX}{site.module}.lora_B.weight"], own)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert {m: config["rank_pattern"].get(m, config["r"]) for m in ranks} == ranks
    assert config["target_modules"] == list(ranks)  # rank 0: not in it
    assert config["use_rslora"] is False
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(ranks)
    for module, rank in ranks.items():
        assert tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"].shape[0] == rank
        assert tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"].shape[1] == rank


def test_lora_a_is_kept_to_the_bit(trained):
    folder, layout, master, _ = trained
    tensors = load_file(folder / "adapter_model.safetensors")
    for index, site in enumerate(layout.table.sites):
        if layout.table.ranks[index]:
            rows = layout.site_rows(master, index)
            assert equal_bits(tensors[f"{PEFT_PREFIX}{site.module}.lora_A.weight"], rows["lora_A"])


def test_one_rank_pattern_entry_means_one_module(trained):
    """PEFT reads the keys as regular expressions: layers.1 must not match layers.11."""
    from peft.utils.other import get_pattern_key

    folder, layout, _, _ = trained
    patterns = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    for site in layout.table.sites:
        key = get_pattern_key(patterns.keys(), site.module)
        assert key == site.module or site.module not in patterns


def test_adapter_without_components_is_refused(tmp_path):
    sites, _ = sites_of_model(tiny_llama(), ["q_proj"], lora_alpha=6.0)
    layout = ArenaLayout(RankTable.start(sites, [0, 0]), Lora().entries)
    with pytest.raises(ValueError, match="every site has rank 0: there is no adapter to export"):
        write_peft(tmp_path / "adapter", torch.zeros(layout.size), layout, {})
    assert not (tmp_path / "adapter").exists()


def test_the_tiny_folder_is_a_whole_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = 'def f(x):\n    return x + "1"\n'
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3)
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert all(equal_bits(a.data, b.data) for a, b in zip(stored.parameters(), tiny_llama().parameters(), strict=True))
