import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file

from ardtrain.adapters import attach, bind_arena
from ardtrain.arena import ArenaLayout
from ardtrain.importing import place, place_ranks, read_adapter, read_ranks
from ardtrain.methods.elalora import ElaLora
from ardtrain.methods.lora import Lora
from ardtrain.preflight import prepare
from ardtrain.ranks import RankTable, Site
from ardtrain.resize import start_snapshot
from tests.runs import write_run
from tests.tiny import ELALORA, equal_bits, sites_of, sites_of_model, tiny_llama

IDS = torch.arange(4, 40)[None]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}


def saved(folder, config):
    """A PEFT adapter of random numbers in `folder`, and its logits."""
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def ours(folder, method, diagonal):
    """Logits of a run's start from the folder; ranks and first rows."""
    model = tiny_llama()
    sites, _ = sites_of_model(model, r=8, lora_alpha=16.0)
    sites, ranks, rows = place(read_adapter(folder), sites, source=str(folder), diagonal=diagonal)
    table = RankTable.start(sites, ranks)
    layout = ArenaLayout(table, method.entries)
    snapshot = start_snapshot(table, layout, method.init, seed=0, rows=rows)
    bind_arena(attach(model, sites, dropout={}), layout, snapshot.full.master)
    with torch.no_grad():
        return model(input_ids=IDS).logits, table, rows


@pytest.mark.parametrize("method", [Lora(), ElaLora(ELALORA)], ids=["plain", "diagonal"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, **PATTERNS),
        LoraConfig(**LORA, use_rslora=True),
        AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], total_step=10),
    ],
    ids=["even", "patterns", "rslora", "adalora"],
)
def test_a_run_starts_as_the_adapter(tmp_path, config, method):
    wanted = saved(tmp_path, config)
    got, table, _ = ours(tmp_path, method, diagonal=isinstance(method, ElaLora))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)
    ranks = {name.rpartition(".")[2]: r for name, r in table.by_name().items()}
    assert ranks["q_proj"] == (2 if getattr(config, "rank_pattern", None) else 4)
    assert ranks["down_proj"] == 4 and ranks["v_proj"] == 0


def test_tensors_of_a_plain_adapter_stay_to_the_bit(tmp_path):
    saved(tmp_path, LoraConfig(**LORA))
    _, _, rows = ours(tmp_path, Lora(), diagonal=False)
    original = read_adapter(tmp_path).rows
    assert rows.keys() == original.keys()
    for module, parts in rows.items():
        assert all(equal_bits(parts[name], original[module][name]) for name in ("lora_A", "lora_B"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is an adapter of type IA3; LORA and ADALORA can be continued"),
        ({"use_dora": True}, "is DoRA"),
        ({"modules_to_save": ["score"]}, "holds modules that were trained in full"),
        ({"r": 5}, "has rank 4 and adapter_config.json says 5"),
    ],
)
def test_what_cannot_be_continued_is_refused(tmp_path, change, message):
    saved(tmp_path, LoraConfig(**LORA))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_damaged_and_foreign_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no readable PEFT adapter"):
        read_adapter(tmp_path / "nothing")
    saved(tmp_path, LoraConfig(**LORA))
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no readable PEFT adapter"):
        read_adapter(tmp_path)
    weights.write_bytes(whole)
    sites, _ = sites_of_model(tiny_llama(), ["q_proj"])
    with pytest.raises(ValueError, match="which target_modules does not name; widen target_modules"):
        place(read_adapter(tmp_path), sites, source="x", diagonal=False)


# ---- ranks alone ----


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_ranks_of_an_adapter(tmp_path, extra):
    saved(tmp_path, LoraConfig(**LORA, **PATTERNS, **extra))
    sites, _ = sites_of_model(tiny_llama(), r=8, lora_alpha=16.0)
    ranks = place_ranks(read_ranks(tmp_path), sites, source="x")
    of = {"q_proj": 2, "down_proj": 4}
    assert ranks == [of.get(site.module.rpartition(".")[2], 0) for site in sites]


MOVES = {"init_warmup": 2, "final_warmup": 2, "mask_interval": 4}
BLOCKS = {
    "lora": {},
    "dora": {},
    "elalora": {"elalora": MOVES},
    "adalora": {"adalora": {"target_r": 1, "tinit": 2, "tfinal": 2}},
    "alora": {"alora": {"rounds": 2}},
    "probe_lora": {"probe_lora": MOVES | {"probe_steps": 2}},
}


@pytest.mark.parametrize("method", BLOCKS)
def test_a_run_starts_with_the_ranks_of_another_and_the_scale_of_its_own_r(tmp_path, method):
    saved(tmp_path, LoraConfig(**LORA, **PATTERNS))
    settings = {"elalora": None, "r": 4, "lora_alpha": 6, "ranks_from": str(tmp_path)} | BLOCKS[method]
    config = write_run(tmp_path, method=method, **settings)
    table = prepare(config, [], world_size=1).shape.table
    assert set(table.ranks) == {0, 2, 4}
    assert {site.scaling for site in table.sites} == {1.5}


def test_ranks_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no readable PEFT adapter"):
        read_ranks(tmp_path)
    saved(tmp_path, LoraConfig(**LORA))
    found = read_ranks(tmp_path)
    with pytest.raises(ValueError, match="which target_modules does not name; widen target_modules"):
        place_ranks(found, sites_of((4, 4)), source="x")
    site = next(iter(found))
    with pytest.raises(ValueError, match="has rank 4 for .*, whose rank is at most 3 here"):
        place_ranks({site: 4}, [Site(site, site, 3, 8)], source="x")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no readable PEFT adapter"):
        read_ranks(tmp_path)
    save_file({"base_model.model.x.lora_E": torch.ones(2, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds no lora_A.weight of any rank"):
        read_ranks(tmp_path)
