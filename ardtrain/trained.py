"""What a run trained, read back from one of its checkpoints, and the model with it: for export and merge.

Which checkpoint a path means is here for `evaluate` as well.

No engine and no process group. Of the training data only the labels of a classifier are looked at, where the config
does not name them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ardtrain import checkpoint, preflight, run_data
from ardtrain.adapters import AdapterLinear, attach, bind_arena
from ardtrain.arena import ArenaLayout, Shard
from ardtrain.backbones import init_head, load_config, load_model, quantize_base, take_quantization
from ardtrain.checkpoint.finding import POINTERS, looks_complete
from ardtrain.checkpoint.format import MANIFEST, read_manifest
from ardtrain.config import ConfigError, RunConfig, updated
from ardtrain.config import load_config as load_run_config
from ardtrain.data_labels import classification_pad_id
from ardtrain.dense import DenseModule, attach_dense
from ardtrain.engines_filling import fill_whole
from ardtrain.export import peft_config, write_peft
from ardtrain.fingerprint import fingerprint, hub_weight_files
from ardtrain.loading import quantized
from ardtrain.methods.base import Binding
from ardtrain.opening import open_model
from ardtrain.prefix_mask import token_types
from ardtrain.preflight import Shape
from ardtrain.resize import Snapshot
from ardtrain.token_rows import TokenRows, embedding_path

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Trained:
    """The trained numbers of a checkpoint and what they belong to.

    master: [N] float32 as `layout` says. gates: of the forward after `step` optimizer steps, or None.
    """

    run_dir: Path
    path: Path
    step: int
    config: RunConfig
    shape: Shape
    layout: ArenaLayout
    master: Tensor
    gates: Tensor | None
    compute_dtype: str
    versions: Mapping[str, str]

    def write_adapter(self, folder: Path, *, uniform_rank: bool = False) -> dict[str, Any]:
        """Writes the PEFT folder's two files; returns the content of adapter_config.json."""
        config = peft_config(
            self.layout,
            base_model=self.config.model_name_or_path,
            revision=self.config.revision,
            lora_dropout=self.config.lora_dropout,
            task_type="SEQ_CLS" if self.shape.labels else "CAUSAL_LM",
            token_ids=self.shape.tokens,
            uniform_rank=uniform_rank,
        )
        heads = self.shape.heads
        write_peft(folder, self.master, self.layout, config, heads=heads, gates=self.gates, uniform_rank=uniform_rank)
        return config


@dataclass(frozen=True)
class Found:
    """A checkpoint and the run it belongs to. is_named: the user named the checkpoint, not the run."""

    path: Path
    run_dir: Path
    is_named: bool


def find_checkpoint(where: str | Path) -> Found:
    """What a path means: a checkpoint's folder, RUN/latest, RUN/best, or a run's folder.

    Of a run: what `latest` names, else its newest complete checkpoint.

    Raises:
        ConfigError: there is none, or the run's config is not beside it.
    """
    path, is_named = Path(where), True
    if path.name in POINTERS and not path.is_dir():
        name = checkpoint.pointed(path.parent, path.name)
        if name is None:
            raise ConfigError([f"{where} names no checkpoint of {path.parent}; give a checkpoint's folder"])
        path = path.parent / name
    if not path.is_dir():
        raise ConfigError([f"{where} does not exist; give a run's folder or one of its checkpoints"])
    run_dir = Path(os.path.abspath(path)).parent if path.name in ("", "..") else path.parent
    if not os.path.isfile(path / MANIFEST):  # in one that cannot be entered neither
        try:
            candidates = checkpoint.candidates(path, "auto")
        except checkpoint.CheckpointError as error:
            raise ConfigError([str(error)]) from error
        if not candidates:
            raise ConfigError(
                [
                    f"{where} is neither a run's folder with a checkpoint nor a checkpoint with {MANIFEST}; give one "
                    "of them"
                ]
            )
        # Where none is complete the first one's reader says what is damaged.
        path, run_dir, is_named = next(filter(looks_complete, candidates), candidates[0]), path, False
    if not os.path.isfile(run_dir / CONFIG):
        raise ConfigError([f"{run_dir} holds no {CONFIG}, which says what was trained; put the run's beside {path}"])
    return Found(path, run_dir, is_named)


def open_trained(where: str | Path, overrides: Sequence[str] = ()) -> Trained:
    """Reads a checkpoint and verifies it, its base's fingerprint too.

    Args:
        where: as `find_checkpoint` takes it. overrides: `a.b=c` over the run's config.yaml (another place of the base).
    Raises:
        ConfigError: nothing there, damaged, another base, or a run without adapters.
    """
    found = find_checkpoint(where)
    path, run_dir = found.path, found.run_dir
    # The checkpoint has its own ranks: the folder that the first came from need not be there any more.
    config = updated(load_run_config(run_dir / CONFIG, overrides), {"ranks_from": None})
    if config.method == "full":
        raise ConfigError(
            [f"{run_dir} is a run of method=full, which has no adapter: its model is {run_dir / 'model'}"]
        )
    try:
        return _read(path, run_dir, config)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError([str(error)]) from error


def _read(path: Path, run_dir: Path, config: RunConfig) -> Trained:
    shape, manifest = preflight.check_model(config), read_manifest(path)
    method = preflight.make_method(config, shape, total_steps=preflight.UNKNOWN_STEPS)  # for names and shapes
    identity = checkpoint.Identity(
        backbone=shape.backbone_fingerprint,
        data=manifest["data"],
        versions={},
        weights=fingerprint(hub_weight_files(config.model_name_or_path, config.revision)),
        method=config.method,
    )
    loaded = checkpoint.load(
        path,
        sites=shape.table.sites,
        parts=method.entries,
        kinds=method.state_tensors(),
        identity=identity,
        dense=shape.dense,
    )
    step = int(manifest["step"])
    total = loaded.loop.get("allocator_steps") or step
    method = preflight.make_method(config, shape, total_steps=total)
    method.bind(_binding(loaded.snapshot, loaded.layout))
    return Trained(
        run_dir=run_dir,
        path=path,
        step=step,
        config=config,
        shape=shape,
        layout=loaded.layout,
        master=loaded.snapshot.full.master,
        gates=method.gates(step),
        compute_dtype=manifest.get("settings", {}).get("compute_dtype", "fp32"),
        versions=manifest["versions"],
    )


def _binding(snapshot: Snapshot, layout: ArenaLayout) -> Binding:
    """What a method sees of a snapshot on one process."""
    shard = Shard(layout, 0, 1)
    state = {name: shard.take(values) for name, values in snapshot.entries.items()}
    own = state | snapshot.components | snapshot.sites
    return Binding(
        snapshot.table, shard, snapshot.age, own, shard, lambda index: layout.site_rows(snapshot.full.master, index)
    )


# ---- the model ----


def base_arguments(trained: Trained) -> dict[str, Any]:
    """What opening and loading the base take, as training did."""
    labels = trained.shape.labels
    pad = classification_pad_id(run_data.tokenizer_of(trained.config)) if labels else None
    return {
        "compute_dtype": trained.compute_dtype,
        "num_labels": len(labels) or None,
        "label_names": labels or None,
        "pad_token_id": pad,
    }


def read_base(trained: Trained) -> PreTrainedModel:
    """The base whole on the CPU as training had it: read by our loader, quantised if the run's was."""
    config = trained.config
    opened = open_model(run_data.model_source(config), **base_arguments(trained))
    if trained.shape.labels:
        init_head(opened.model, config.seed)
    packings = {} if config.quantization is None else quantize_base(opened.model, config.quantization)
    if opened.weights is not None:
        fill_whole(opened.model, quantized(opened.weights, packings), torch.device("cpu"))
    return opened.model


def load_base(trained: Trained) -> PreTrainedModel:
    """The base whole on the CPU as transformers loads it, for who compares; quantised if the run's was.

    Files that bitsandbytes quantised are read by us, without that library.
    """
    config, source = trained.config, run_data.model_source(trained.config)
    if take_quantization(source, load_config(source)):
        return read_base(trained)
    model = load_model(source, **base_arguments(trained))
    if trained.shape.labels:
        init_head(model, config.seed)
    if config.quantization is not None:
        quantize_base(model, config.quantization)
    return model


def bound_model(trained: Trained) -> PreTrainedModel:
    """The base with the run's own adapters, heads and rows bound to the trained numbers, in eval mode."""
    config, shape = trained.config, trained.shape
    model = read_base(trained)
    adapters: dict[str, AdapterLinear | DenseModule] = {
        **attach(model, shape.table.sites, dropout={}, form=preflight.adapter_form(config), heads=shape.heads)
    }
    adapters |= attach_dense(model, list(preflight.in_full(config, model)))
    if shape.tokens:
        adapters[embedding_path(model)] = TokenRows(model, shape.tokens)
    bind_arena(adapters, trained.layout, trained.master, trained.gates)
    return model.eval()


def probe_inputs(trained: Trained, model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs that reach every tower and every trained row, one row; a function of the model and the trained tokens."""
    num_tokens = model.get_input_embeddings().num_embeddings
    text = torch.tensor([*range(1, 33), *trained.shape.tokens[:32]]).remainder(num_tokens)
    if trained.config.task != "image_text_to_text":
        return {"input_ids": text[None]}
    vision = model.config.vision_config
    ids = torch.tensor([model.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2)
    text = text[text != model.config.image_token_id]
    tokens = torch.cat([ids, text])[None]
    pixels = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size)
    pixels.normal_(generator=torch.Generator().manual_seed(0))
    types = token_types([len(ids) + len(text) // 2], tokens.shape[1])
    return {"input_ids": tokens, "pixel_values": pixels, "token_type_ids": types}


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    return out


def available_bytes() -> int | None:
    """Memory of this host that is free for us, by /proc/meminfo; None where it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
