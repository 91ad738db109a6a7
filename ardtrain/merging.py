"""`ardtrain merge`: the base with a checkpoint's trained numbers in its weights, a model of its own.

File by file and never whole in memory (merged_files.py); config, tokenizer and licence are copied.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ardtrain import checkpoint, export, run_data
from ardtrain.backbones import auto_class, load_config, load_tokenizer
from ardtrain.cards import CARD, write_card
from ardtrain.config import ConfigError
from ardtrain.exporting import Arguments, describe, unwritable
from ardtrain.fingerprint import INDEX, hub_weight_files
from ardtrain.loading import verify_files
from ardtrain.loading.verifying import SUMS
from ardtrain.merged_files import Changes, Merger, Plan, make_plan
from ardtrain.opening import open_model
from ardtrain.publishing import check_hub, push
from ardtrain.trained import Trained, base_arguments, bound_model, logits_of, open_trained, probe_inputs

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
# What a hub id's folder may hold beside the weights; fetched if it is there.
_COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("chat_template.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt"),
)


# ---- what lies beside the weights ----


def copy_companions(trained: Trained, model: PreTrainedModel, source: Path, out: Path) -> None:
    """Config, generation config, tokenizer, licence, code: every file of the base's folder that is no weight.

    A classifier's config gets the model's class, classes and padding. The run's own tokenizer or chat template, where
    its config names one, takes the place of the base's.
    """
    config = trained.config
    if not os.path.isdir(config.model_name_or_path):
        from transformers.utils.hub import cached_file

        for name in _COMPANIONS:
            cached_file(
                config.model_name_or_path, name, revision=config.revision, _raise_exceptions_for_missing_entries=False
            )
    for path in sorted(source.iterdir()):
        weights = path.name.endswith(_NOT_COPIED) or path.name in (SUMS, CARD)
        if path.is_file() and not path.name.startswith(".") and not weights:
            shutil.copyfile(path, out / path.name)
    if trained.shape.labels:
        _classify(out / "config.json", trained, model)
    template = run_data.template_text(config)
    if config.tokenizer_name_or_path is not None or template is not None:
        tokenizer = load_tokenizer(run_data.model_source(config), config.tokenizer_name_or_path)
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(out)


def _classify(path: Path, trained: Trained, model: PreTrainedModel) -> None:
    """Makes the config one of a classifier of the run's classes."""
    config, labels = json.loads(path.read_text()), trained.shape.labels
    config["architectures"] = [type(model).__name__]
    config["id2label"] = {str(i): name for i, name in enumerate(labels)}
    config["label2id"] = {name: i for i, name in enumerate(labels)}
    config["pad_token_id"] = model.config.get_text_config().pad_token_id
    config.pop("num_labels", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


# ---- the verb ----


def merge_command(arguments: list[str]) -> int:
    """`ardtrain merge ...`; returns the exit code. Raises ConfigError."""
    options, overrides = _parser().read(arguments)
    if options.push_to_hub:
        check_hub(options.push_to_hub)
    out = Path(options.out)
    if out.exists():
        raise ConfigError([f"--out {out} exists; name another folder, or remove it"])
    trained = open_trained(options.run, overrides)
    for line in merge(trained, out, check=options.check):
        print(line)
    if options.push_to_hub:
        print(push(out, options.push_to_hub, private=options.private, message=f"{out.name}, merged by ardtrain"))
    return 0


def _parser() -> Arguments:
    parser = Arguments("merge")
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--check", action="store_true")
    return parser


def merge(trained: Trained, out: Path, *, check: bool = False) -> list[str]:
    """The merged model in the folder `out`, which is complete and read back when it gets this name.

    Memory: the trained numbers twice, and blocks of 16 MiB; with check, the whole model.

    Returns:
        Lines to tell.
    Raises:
        ConfigError: `out` exists, or a changed parameter cannot be followed to the files.
        RuntimeError: a file reads back other than written, or (check) logits differ.
    """
    if out.exists():
        raise ConfigError([f"--out {out} exists; name another folder, or remove it"])
    started = time.monotonic()
    paths = hub_weight_files(trained.config.model_name_or_path, trained.config.revision)
    opened = open_model(run_data.model_source(trained.config), **(base_arguments(trained) | {"compute_dtype": "fp32"}))
    if opened.weights is None:
        raise ConfigError(
            [
                f"model_name_or_path={trained.config.model_name_or_path!r} is read by transformers' own loader alone, "
                "so which stored numbers a parameter is made of is not known; serve the exported adapter"
            ]
        )
    building = out.with_name(f".{out.name}.tmp")
    try:
        checkpoint.remove_folder(building)
        building.mkdir(parents=True)
        changes = Changes(trained)
        plan = make_plan(opened, changes)
        _check_room(building, sum(path.stat().st_size for path in paths))
        _write_weights(paths, building, plan, changes)
        copy_companions(trained, opened.model, paths[0].parent, building)
        warnings = _warnings(trained)
        checks = [*warnings, "every weight file was read back and has the checksum in SHA256SUMS"]
        if check:
            checks.append(_compare(trained, building))
        write_card(building, describe(trained, "merged", export.module_ranks(trained.layout), checks))
        building.rename(out)
    except OSError as error:
        raise unwritable(out, building, error) from error
    except ValueError as error:
        checkpoint.remove_folder(building)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([str(error)]) from error
    finally:
        opened.weights.close()
    gib = sum(path.stat().st_size for path in paths) / 2**30
    told = f"{len(changes.names)} tensors changed, {gib:.2f} GiB in {time.monotonic() - started:.1f} s"
    return [f"{trained.path}: step {trained.step}: {told}", *checks, f"model: {out}"]


def _check_room(folder: Path, size: int) -> None:
    """Raises ConfigError where the disk has less room than the base's files take."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError([f"--out: the merged model takes {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free there"])


def _write_weights(paths: list[Path], folder: Path, plan: Plan, changes: Changes) -> None:
    """All weight files, their index and their checksums; then everything is read back."""
    weights = [path for path in paths if path.name != INDEX]
    merger, sums = Merger(plan, changes), {}
    for path in weights:
        added = plan.added if path is weights[-1] else {}
        sums[path.name] = merger.write(path, folder / path.name, added=added)
    for path in paths:
        if path.name == INDEX:
            (folder / INDEX).write_bytes(_new_index(path.read_bytes(), plan, weights[-1].name))
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    try:
        verify_files([folder / path.name for path in weights])
    except ValueError as error:
        raise RuntimeError(
            f"a merged file reads back other than written; is the disk full or failing? {error}"
        ) from error


def _new_index(content: bytes, plan: Plan, last: str) -> bytes:
    """The index as it is, or with the tensors that were added."""
    if not plan.added:
        return content
    index = json.loads(content)
    index["weight_map"] |= dict.fromkeys(plan.added, last)
    size = index.get("metadata", {}).get("total_size")
    if isinstance(size, int):
        index["metadata"]["total_size"] = size + sum(t.nbytes for t in plan.added.values())
    return json.dumps(index, indent=2).encode() + b"\n"


def _warnings(trained: Trained) -> list[str]:
    if trained.config.quantization is None:
        return []
    return [
        f"warning: training saw the base in {trained.config.quantization}, and this is the base in full with the "
        "adapter: its logits are not those of training; evaluate it before it is used"
    ]


def _compare(trained: Trained, folder: Path) -> str:
    """A line with the largest logit difference to the unmerged model. Raises RuntimeError where it is too large."""
    model = bound_model(trained)
    inputs = probe_inputs(trained, model)
    logits = logits_of(model, inputs).float()
    del model
    merged = load_merged(trained, folder)
    difference = float((logits_of(merged, inputs).float() - logits).abs().max())
    stored = "bf16" if any(p.dtype != torch.float32 for p in merged.parameters()) else "fp32"
    largest = float(logits.abs().max())
    limit = max(export.LOGIT_TOLERANCE[dtype] for dtype in (stored, trained.compute_dtype)) * max(1.0, largest)
    if not difference <= limit and trained.config.quantization is None:
        raise RuntimeError(
            f"the merged model's logits are {difference:.2e} away from training's (limit {limit:.2e}); it was left in "
            f"{folder} and has not got its name"
        )
    return f"largest logit difference to the unmerged model {difference:.1e} (logits up to {largest:.2f})"


def load_merged(trained: Trained, folder: Path) -> PreTrainedModel:
    """A merged model whole on the CPU as transformers loads it, in the dtype of its config, head and all."""
    source = replace(run_data.model_source(trained.config), name_or_path=str(folder), revision=None)
    auto = auto_class(load_config(source), len(trained.shape.labels) or None)
    model: PreTrainedModel = auto.from_pretrained(
        folder, dtype="auto", attn_implementation=source.attn_implementation, use_safetensors=True
    )
    return model.eval().requires_grad_(False)
