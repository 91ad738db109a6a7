"""Starts a run from a PEFT adapter: its ranks, scales and weights (LoRA, AdaLoRA), or its ranks alone (any).

With weights come ranks and scales, so that the adapter's tensors stay as they are, to the bit, and the run's first loss
is that of the adapter; moments start at zero. Only JSON and safetensors are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ardtrain.patterns import by_pattern
from ardtrain.ranks import Site

PREFIX = "base_model.model."
_REFUSED = {  # settings of adapter_config.json that mean another function than ours
    "use_dora": "is DoRA",
    "fan_in_fan_out": "holds transposed matrices",
    "modules_to_save": "holds modules that were trained in full",
    "layer_replication": "replicates layers",
    "trainable_token_indices": "holds trained token rows",
}


@dataclass(frozen=True)
class Imported:
    """Module -> A [r, I], B [r, O], diagonal [r, 1] or None; and its scale."""

    rows: dict[str, dict[str, Tensor]]
    scaling: dict[str, float]


def read_adapter(folder: str | Path) -> Imported:
    """Reads a PEFT folder.

    Raises:
        ValueError: files are missing or damaged, or the adapter is of a kind that cannot be continued.
    """
    path = Path(folder)
    try:
        described = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"init_from={folder}: no readable PEFT adapter ({error}); it needs adapter_config.json and "
            "adapter_model.safetensors"
        ) from error
    kind = described.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"init_from={folder} is an adapter of type {kind}; LORA and ADALORA can be continued")
    for name, what in _REFUSED.items():
        if described.get(name):
            raise ValueError(f"init_from={folder} {what} ({name}); it cannot be continued by this run")
    rows: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        module, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if part == "ranknum":
            continue
        if not key.startswith(PREFIX) or part not in ("lora_A", "lora_B", "lora_E"):
            raise ValueError(
                f"init_from={folder}: tensor {key} belongs to no LoRA or AdaLoRA adapter of a linear layer"
            )
        value = value.float()
        name = "diagonal" if part == "lora_E" else part
        rows.setdefault(module, {})[name] = value.T.contiguous() if part == "lora_B" else value
    for module, parts in rows.items():
        ranks = {len(values) for values in parts.values()}
        if not {"lora_A", "lora_B"} <= parts.keys() or len(ranks) != 1:
            raise ValueError(f"init_from={folder}: {module} lacks a matrix or its ranks disagree ({sorted(ranks)})")
        if not all(bool(torch.isfinite(v).all()) for v in parts.values()):
            raise ValueError(f"init_from={folder}: {module} holds a number that is not finite")
    return Imported(rows, {m: _scaling(described, m, len(p["lora_A"])) for m, p in rows.items()})


def read_ranks(folder: str | Path) -> dict[str, int]:
    """Module -> rank of a PEFT folder's adapter, from the shapes of its tensors.

    Raises:
        ValueError: there is no readable adapter of linear layers.
    """
    path = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"ranks_from={folder}: no readable PEFT adapter ({error}); give a folder with adapter_model.safetensors, "
            "such as a finished run's `adapter`"
        ) from error
    ending = ".lora_A.weight"
    ranks = {k.removeprefix(PREFIX).removesuffix(ending): s[0] for k, s in shapes.items() if k.endswith(ending)}
    if not any(ranks.values()):
        raise ValueError(f"ranks_from={folder} holds no {ending.strip('.')} of any rank; give a LoRA adapter")
    return ranks


def place_ranks(found: Mapping[str, int], sites: Sequence[Site], *, source: str) -> list[int]:
    """First ranks of whole matrices as in `read_ranks`; a site that the adapter lacks gets 0.

    Raises:
        ValueError: the adapter has a module that is no target, or a rank that a module cannot have.
    """
    known = {site.module: site for site in sites}
    for module, r in found.items():
        if module not in known:
            raise ValueError(
                f"ranks_from={source} adapts {module}, which target_modules does not name; widen target_modules"
            )
        if r > known[module].max_rank:
            raise ValueError(
                f"ranks_from={source} has rank {r} for {module}, whose rank is at most {known[module].max_rank} here; "
                "give an adapter of this base"
            )
    return [found.get(site.module, 0) for site in sites]


def _scaling(described: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's factor of one module: alpha / r by its patterns; AdaLoRA divides by its first rank."""
    if described["peft_type"] == "ADALORA":
        return float(described["lora_alpha"]) / (float(described["init_r"]) + 1e-5)
    r = by_pattern(described.get("rank_pattern") or {}, module, float(described["r"]))
    alpha = by_pattern(described.get("alpha_pattern") or {}, module, float(described["lora_alpha"]))
    if int(r) != rank:
        raise ValueError(f"{module} has rank {rank} and adapter_config.json says {r:g}")
    return alpha / math.sqrt(r) if described.get("use_rslora") else alpha / r


def place(
    imported: Imported, sites: Sequence[Site], *, source: str, diagonal: bool
) -> tuple[list[Site], list[int], dict[str, dict[str, Tensor]]]:
    """Sites with the adapter's scales, their first ranks, and first rows by site name.

    A site that the adapter lacks starts with rank 0.

    Args:
        diagonal: the method's form has one; a LoRA adapter then starts with all 1, else a diagonal is folded into B.

    Raises:
        ValueError: the adapter has a module that is no target, or shapes differ.
    """
    known = {site.module: site for site in sites}
    foreign = [m for m in imported.rows if m not in known]
    if foreign:
        raise ValueError(
            f"init_from={source} adapts {foreign[0]}, which target_modules does not name; widen target_modules"
        )
    out: list[Site] = []
    ranks: list[int] = []
    first: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        parts = imported.rows.get(site.module)
        if parts is None:
            out.append(site)
            ranks.append(0)
            continue
        wanted = (site.in_features, site.out_features)
        found = (parts["lora_A"].shape[1], parts["lora_B"].shape[1])
        if found != wanted:
            raise ValueError(f"init_from={source}: {site.module} has shapes {found}, this model's are {wanted}")
        rows = {"lora_A": parts["lora_A"], "lora_B": parts["lora_B"]}
        own = parts.get("diagonal")
        if diagonal:
            rows["diagonal"] = torch.ones(len(rows["lora_A"]), 1) if own is None else own.view(-1, 1)
        elif own is not None:
            rows["lora_B"] = rows["lora_B"] * own.view(-1, 1)
        out.append(replace(site, scaling=imported.scaling[site.module]))
        ranks.append(len(rows["lora_A"]))
        first[site.name] = rows
    return out, ranks, first
