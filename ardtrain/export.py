"""The adapter as a PEFT folder, right also in readers that ignore rank_pattern and alpha_pattern.

The scale (and the diagonal) is folded into B, `r` is the largest rank and `lora_alpha = r`, so alpha / r = 1; with
uneven ranks `rank_pattern` and `alpha_pattern` both name each module's own rank: whatever a reader does, it multiplies
by one. Sites of rank 0 are not in it. architecture.md 6.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ardtrain.arena import ArenaLayout

PEFT_PREFIX = "base_model.model."
# Largest logit difference to PEFT's, as a share of the largest logit: folding the scale into B rounds B once, in
# float32 for fp32, in the compute dtype elsewhere (8 bits of mantissa over a few layers).
LOGIT_TOLERANCE = {"fp32": 1e-5, "bf16": 6e-2, "fp16": 1e-2}


def peft_tensors(master: Tensor, layout: ArenaLayout) -> dict[str, Tensor]:
    """PEFT's names -> `lora_A.weight` [r, I] and `lora_B.weight` [O, r] with scale and diagonal folded into B."""
    out: dict[str, Tensor] = {}
    table = layout.table
    for index, site in enumerate(table.sites):
        if not table.ranks[index]:
            continue
        rows = layout.site_rows(master, index)
        middle = rows["diagonal"] * site.scaling if "diagonal" in rows else site.scaling
        out[f"{PEFT_PREFIX}{site.module}.lora_A.weight"] = rows["lora_A"].clone()
        out[f"{PEFT_PREFIX}{site.module}.lora_B.weight"] = (rows["lora_B"] * middle).T.contiguous()
    return out


def peft_config(layout: ArenaLayout, *, base_model: str, revision: str | None, lora_dropout: float) -> dict[str, Any]:
    """The content of adapter_config.json."""
    ranks = {s.module: r for s, r in zip(layout.table.sites, layout.table.ranks, strict=True) if r}
    largest = max(ranks.values(), default=1)
    uneven = {module: r for module, r in ranks.items() if r != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": lora_dropout,
        "target_modules": list(ranks),
        "rank_pattern": uneven,
        "alpha_pattern": uneven,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def write_peft(folder: Path, master: Tensor, layout: ArenaLayout, config: Mapping[str, Any]) -> None:
    """Writes the two files and reads them back: names, shapes and bits.

    Raises:
        ValueError: no component is left. RuntimeError: the files read back other than written.
    """
    tensors = peft_tensors(master, layout)
    if not tensors:
        raise ValueError("every site has rank 0: there is no adapter to export")
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / "adapter_config.json"
    described.write_text(json.dumps(dict(config), indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(described.stat().st_mode)  # safetensors writes for the owner alone, whatever the umask
    stored = load_file(weights)
    if stored.keys() != tensors.keys() or not all(torch.equal(stored[n], t) for n, t in tensors.items()):
        raise RuntimeError(f"{folder}: the adapter reads back other than written; is the disk full or failing?")


def compare_with_peft(folder: Path, base: torch.nn.Module, input_ids: Tensor, logits: Tensor) -> float:
    """Largest difference between `logits` [B, T, V] and those of PEFT's own reading of the folder on `base`.

    base: the model as transformers loads it, without our adapters; PEFT's layers stay in it.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        theirs = model(input_ids=input_ids, use_cache=False).logits
    return float((theirs.float() - logits.float()).abs().max())
