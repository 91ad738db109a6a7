"""Merged files of every family of the support matrix give the unmerged model's logits, read by transformers."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from ardtrain.adapters import attach, bind_arena, first_dense
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import ModelSource, auto_class
from ardtrain.dense import attach_dense, dense_entries
from ardtrain.fingerprint import weight_files
from ardtrain.merged_files import Changes, Merger, make_plan
from ardtrain.methods.lora import Lora
from ardtrain.opening import open_model
from ardtrain.ranks import RankTable
from ardtrain.targets import head_linears
from tests.families import FAMILIES, build_model, inputs_of
from tests.tiny import equal_bits, sites_of_model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path, name):
    family = FAMILIES[name]
    model, inputs = build_model(family), inputs_of(FAMILIES[name])
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = model(**inputs).logits
    sites, _ = sites_of_model(model, r=3, lora_alpha=5.0)
    heads = list(head_linears(model))
    table = RankTable.start(sites, [min(i % 4, s.max_rank) for i, s in enumerate(sites)])
    layout = ArenaLayout(table, Lora().entries, dense_entries(head_linears(model)))
    adapters = attach(model, sites, dropout={}) | attach_dense(model, heads)
    master, generator = torch.zeros(layout.size), torch.Generator().manual_seed(1)
    for block in layout.blocks:
        block.of(master).normal_(0.0, 0.15, generator=generator)
    first = first_dense(adapters)
    for entry, block in zip(layout.dense, layout.all_blocks[len(layout.blocks) :], strict=True):
        rows = first[entry.module, entry.part].view(entry.rows, entry.columns)
        block.of(master).copy_(rows).add_(torch.empty_like(rows).normal_(0.0, 0.3, generator=generator))
    bind_arena(adapters, layout, master)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert float((logits - before).abs().max()) > 0.1

    trained = SimpleNamespace(layout=layout, master=master, gates=None, shape=SimpleNamespace(heads={}, tokens=()))
    opened = open_model(
        ModelSource(str(tmp_path / "base")),
        compute_dtype="fp32",
        num_labels=family.num_labels,
        pad_token_id=family.pad if family.num_labels else None,
    )
    merger = Merger(make_plan(opened, Changes(trained)), Changes(trained))
    (tmp_path / "out").mkdir()
    for path in weight_files(tmp_path / "base"):
        merger.write(path, tmp_path / "out" / path.name, added={})
    opened.weights.close()
    shutil.copyfile(tmp_path / "base" / "config.json", tmp_path / "out" / "config.json")

    config = family.config()
    merged = auto_class(config, family.num_labels).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = merged(**inputs).logits
    assert float((found - logits).abs().max()) <= 1e-5 * max(1.0, float(logits.abs().max()))
    adapted = {f"{site.module}.weight" for site, rank in zip(sites, table.ranks, strict=True) if rank}
    heads_own = {f"{entry.module}.{entry.part}" for entry in layout.dense}
    base = auto_class(config, family.num_labels).from_pretrained(tmp_path / "base").state_dict()
    changed = {n for n, t in merged.state_dict().items() if not equal_bits(t, base[n])}
    assert changed == adapted | heads_own
