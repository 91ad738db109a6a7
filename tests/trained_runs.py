"""Run folders with one checkpoint of random trained numbers, made without a training: what export and merge read."""

import json
from dataclasses import replace

import torch

from ardtrain import checkpoint, preflight, run_data
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import load_model
from ardtrain.checkpoint.format import blank
from ardtrain.config import dump_config
from ardtrain.ranks import RankTable, named_seed
from ardtrain.resize import start_snapshot
from ardtrain.session import run_identity
from tests.runs import write_run
from tests.tiny_paligemma import save_tiny_paligemma, write_rows

STEP = 16
UNEVEN = (3, 0, 1, 4, 2, 0, 5)
PLAIN = {"method": "lora", "elalora": None}
_PROBES = {"init_warmup": 2, "final_warmup": 2, "mask_interval": 4, "probe_steps": 2, "level": "head"}
# Settings for `make_run`: each form that an adapter may have.
FORMS = {
    "even": PLAIN,
    "uneven": PLAIN | {"ranks": lambda i: UNEVEN[i % 7]},
    "diagonal": {"ranks": lambda i: 1 + i % 5},
    "dora": PLAIN | {"method": "dora", "ranks": lambda i: UNEVEN[i % 7]},
    "heads": PLAIN | {"method": "ard_lora", "r": 2, "ard_lora": {"layout": "own_a"}},
    "shared heads": PLAIN | {"method": "ard_lora", "r": 4, "ard_lora": {"layout": "shared_a"}},
    "probed heads": PLAIN | {"method": "probe_lora", "probe_lora": _PROBES, "ranks": lambda i: 1 + i % 3},
    "token rows": PLAIN | {"trainable_tokens": ["+", 5]},
    "rslora": PLAIN | {"use_rslora": True, "r": 3},
}


def make_run(folder, name="run", *, config=None, ranks=None, seed=1, std=0.2, start=False, **settings):
    """Writes FOLDER/NAME with config.yaml and checkpoint-16; returns it.

    Args:
        config: path of a run's config; None: tests.runs.write_run with the settings.
        ranks: function of a site's number that gives its rank; None: the config's.
        start: the numbers that a run starts with (of init_from) in the place of random ones.
    """
    path = config or write_run(folder, name, **settings)
    prepared = preflight.prepare(path, [], world_size=1)
    config, shape = prepared.config, prepared.shape
    if ranks is not None:
        sites = shape.table.sites
        shape = replace(shape, table=RankTable.start(sites, [min(ranks(i), s.max_rank) for i, s in enumerate(sites)]))
    method = preflight.make_method(config, shape, total_steps=STEP)
    layout = ArenaLayout(shape.table, method.entries, shape.dense)
    snapshot = blank(shape.table, layout, kinds=method.state_tensors(), steps=STEP)
    if start:
        first = start_snapshot(shape.table, layout, method.init, seed=seed, rows=shape.rows)
        snapshot.full.master.copy_(first.full.master)
    else:
        fill(snapshot.full.master, layout, prepared, seed=seed, std=std)
    generator = torch.Generator().manual_seed(seed)
    if "alpha" in snapshot.sites:  # ARD-LoRA: each unit's continuous rank, and so its gates
        snapshot.sites["alpha"].uniform_(0.3, 1.0, generator=generator)
    run_dir = folder / name
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(dump_config(config))
    saved = checkpoint.save(
        run_dir,
        snapshot,
        layout,
        step=STEP,
        loop={"step": STEP, "allocator_steps": 2 * STEP},
        identity=run_identity(prepared, "0" * 64),
        write_adapter=write_nothing,
    )
    (run_dir / "latest").write_text(saved.name + "\n")
    return run_dir


def classification_config(folder, **settings):
    """A run's config for two classes over the tiny Llama, and its rows; returns the path."""
    rows = [{"text": f"row {i}", "label": ("bad", "good")[i % 2]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_run(
        folder,
        task="sequence_classification",
        **{"method": "lora", "elalora": None, "eval_steps": None} | settings,
        data={"train_file": str(folder / "rows.jsonl"), "text_field": "text", "label_field": "label"},
    )


def towers(folder, *, vision=None):
    """Settings of a run over a tiny PaliGemma-2: ranks of their own in its towers, the projector in full.

    vision: its own settings, in the place of a rank.
    """
    save_tiny_paligemma(folder / "model")
    return PLAIN | {
        "task": "image_text_to_text",
        "eval_steps": None,
        "data": {"train_file": str(write_rows(folder)), "image_field": "image"},
        "targets": {"vision": vision or {"r": 2}, "projector": {"full": True}},
        "ranks": lambda i: 1 + i % 4,
    }


def write_nothing(folder):
    """The PEFT folder of the checkpoint, which nobody here reads."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def fill(master, layout, prepared, *, seed, std):
    """Numbers that matter in every block; magnitudes and linears in full near the base's own."""
    magnitudes = any(block.part == "magnitude" for block in layout.all_blocks)
    model = load_model(run_data.model_source(prepared.config), compute_dtype="fp32") if magnitudes else None
    for block in layout.all_blocks:
        generator = torch.Generator().manual_seed(named_seed("trained", seed, block.module, block.part))
        values = block.of(master)
        if block.part == "magnitude":
            own = model.get_submodule(block.module).weight.norm(dim=1).view(values.shape)
            values.copy_(own * torch.empty_like(own).uniform_(0.7, 1.3, generator=generator))
        else:
            values.normal_(0.0, std, generator=generator)
