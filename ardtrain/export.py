"""The adapter as a PEFT folder, right also in readers that ignore rank_pattern and alpha_pattern.

The scale (and the diagonal) is folded into B, `r` is the largest rank and `lora_alpha = r`, so alpha / r = 1; with
uneven ranks `rank_pattern` and `alpha_pattern` both name each module's own rank: whatever a reader does, it multiplies
by one. Sites of rank 0 are not in it. architecture.md 6.

Where all ranks and scales are equal and the form is plain, nothing is folded: lora_alpha / r is the scale, and a PEFT
adapter that a run started from keeps its bytes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ardtrain.adapters import AdapterLinear, Form, attach, bind_arena
from ardtrain.arena import ArenaLayout
from ardtrain.heads import Heads
from ardtrain.token_rows import PART as TOKEN_ROWS

PEFT_PREFIX = "base_model.model."
# Largest logit difference to PEFT's, as a share of the largest logit: folding the scale into B rounds B once, in
# float32 for fp32, in the compute dtype elsewhere (8 bits of mantissa over a few layers).
PRODUCT_TOLERANCE = 1e-5  # of a matrix's product, as a share of its largest number; float32 in both
LOGIT_TOLERANCE = {"fp32": 1e-5, "bf16": 6e-2, "fp16": 1e-2}


# vllm 0.30, config/lora.py: what --max-lora-rank may be, and what it is if nobody says.
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SERVER_DEFAULT_RANK = 16


def module_ranks(layout: ArenaLayout) -> dict[str, int]:
    """Module -> rank of its exported pair, over all its heads; those of rank 0 are not in it."""
    return {module: sum(own) for module, own in layout.site_ranks.items() if sum(own)}


def common_scale(layout: ArenaLayout) -> float | None:
    """The scale of all components where it can stay outside B as lora_alpha / r; None: it is folded into B.

    Ranks are even, no head has a pair of its own, nothing has a diagonal, and r times the scale, a number of
    adapter_config.json, gives the scale back to the bit.
    """
    sites, ranks = layout.table.sites, set(module_ranks(layout).values())
    scales = {site.scaling for site, rank in zip(sites, layout.table.ranks, strict=True) if rank}
    plain = all(block.part in ("lora_A", "lora_B") for block in layout.blocks)
    if not plain or len(ranks) != 1 or len(scales) != 1 or any(site.head is not None for site in sites):
        return None
    (rank,), (scale,) = ranks, scales
    return scale if rank * scale / rank == scale else None


def peft_tensors(
    master: Tensor,
    layout: ArenaLayout,
    *,
    heads: Mapping[str, Heads] | None = None,
    gates: Tensor | None = None,
    uniform_rank: bool = False,
) -> dict[str, Tensor]:
    """PEFT's names -> `lora_A.weight` [r, I] and `lora_B.weight` [O, r] with scale, diagonal and gates folded in.

    Heads that own A and B become one block-diagonal pair of rank the sum of theirs. Magnitudes and modules that
    are trained in full are written under PEFT's names for them.

    Args:
        heads: of the matrices that are cut by head. gates: as the method gives them (base.Method.gates).
        uniform_rank: zeros behind each pair up to the largest rank, and pairs of zeros for modules of rank 0 (none with
            DoRA, where such a module has no magnitude).
    """
    out: dict[str, Tensor] = {}
    own_ranks, pairs = module_ranks(layout), Pairs(master, layout, heads=heads, gates=gates)
    magnitudes = {entry.module for entry in layout.dense if entry.part == "magnitude"}
    largest = max(own_ranks.values(), default=0)
    for module in layout.site_ranks:
        a, b = pairs.pair(module)
        if uniform_rank and (len(a) or module not in magnitudes):
            a, b = (torch.cat([rows, rows.new_zeros(largest - len(rows), rows.shape[1])]) for rows in (a, b))
        if len(a):
            out[f"{PEFT_PREFIX}{module}.lora_A.weight"] = a.contiguous()
            out[f"{PEFT_PREFIX}{module}.lora_B.weight"] = b.T.contiguous()
    for entry, block in zip(layout.dense, layout.all_blocks[len(layout.blocks) :], strict=True):
        values = block.of(master).clone()
        if block.part == "magnitude":
            if own_ranks.get(block.module):  # a module of rank 0 is the base's, whatever its magnitude
                out[f"{PEFT_PREFIX}{block.module}.lora_magnitude_vector"] = values.view(-1)
        elif block.part == TOKEN_ROWS:
            out[f"{PEFT_PREFIX}{block.module}.token_adapter.trainable_tokens_delta"] = values
        else:
            out[f"{PEFT_PREFIX}{block.module}.{block.part}"] = values.view(entry.own_shape)
    return out


class Pairs:
    """Each module's pair as it is exported, made when it is asked for: of many heads a pair is large."""

    def __init__(
        self,
        master: Tensor,
        layout: ArenaLayout,
        *,
        heads: Mapping[str, Heads] | None = None,
        gates: Tensor | None = None,
    ) -> None:
        """heads, gates: as in `peft_tensors`."""
        self.scale = common_scale(layout)  # what B is still to be multiplied by; None: nothing
        self._master, self._layout, self._heads, self._gates = master, layout, heads or {}, gates
        self._places: dict[str, tuple[int, int, int, int]] = {}  # sites from, to; its gates' first, gates a component
        taken, table = 0, layout.table
        for module, start, stop in table.sites.modules:
            cut = self._heads.get(module)
            width = cut.count if cut is not None and table.sites[start].head is None else 1
            self._places[module] = (start, stop, taken, width)
            taken += sum(table.ranks[start:stop]) * width

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A [R, I], B [R, O]: heads in their places of the matrix, gates folded in, scale and diagonal if they are."""
        start, stop, first_gate, width = self._places[module]
        parts = [self._site(index) for index in range(start, stop)]
        a, b = (torch.cat(rows) if len(parts) > 1 else rows[0] for rows in zip(*parts, strict=True))
        if self._gates is not None and len(a):
            own = self._gates[first_gate : first_gate + len(a) * width].view(len(a), width).to(self._master)
            a, b = _gated(a, b, own, self._heads.get(module))
        return a, b

    def _site(self, index: int) -> tuple[Tensor, Tensor]:
        site, rows = self._layout.table.sites[index], self._layout.site_rows(self._master, index)
        a, b = rows["lora_A"].clone(), rows["lora_B"].clone()
        if self.scale is None:
            b = b * (rows["diagonal"] * site.scaling if "diagonal" in rows else site.scaling)
        cut = self._heads.get(site.module)
        if site.head is None or cut is None:
            return a, b
        if cut.side == "out":
            return a, _placed(b, site.start, site.out_features * cut.count)
        return _placed(a, site.start, site.in_features * cut.count), b


def _placed(rows: Tensor, start: int, columns: int) -> Tensor:
    """[R, columns]: rows [R, d] from column `start` on, zero elsewhere."""
    out = rows.new_zeros(len(rows), columns)
    out[:, start : start + rows.shape[1]] = rows
    return out


def _gated(a: Tensor, b: Tensor, gates: Tensor, cut: Heads | None) -> tuple[Tensor, Tensor]:
    """A and B with gates [R, 1] or [R, H] folded into B, or into A where heads share B."""
    if gates.shape[1] > 1 and cut is not None and cut.side == "in":
        return (a.view(len(a), gates.shape[1], -1) * gates[:, :, None]).view(a.shape), b
    return a, (b.view(len(b), gates.shape[1], -1) * gates[:, :, None]).view(b.shape)


def peft_config(
    layout: ArenaLayout,
    *,
    base_model: str,
    revision: str | None,
    lora_dropout: float,
    task_type: str = "CAUSAL_LM",
    token_ids: Sequence[int] = (),
    uniform_rank: bool = False,
) -> dict[str, Any]:
    """The content of adapter_config.json.

    token_ids: of the trained rows of the embedding, in their order. uniform_rank: as in `peft_tensors`.
    """
    ranks = module_ranks(layout)
    largest = max(ranks.values(), default=1)
    parts = {(entry.module, entry.part) for entry in layout.dense}
    if uniform_rank:
        magnitudes = {module for module, part in parts if part == "magnitude"}
        ranks = {module: largest for module in layout.site_ranks if module in ranks or module not in magnitudes}
    uneven = {module: r for module, r in ranks.items() if r != largest}
    alpha = largest * (common_scale(layout) or 1.0)
    dense = {module for module, part in parts if part not in ("magnitude", TOKEN_ROWS)}
    # PEFT adds the top-level `classifier` or `score` itself: a path below it would be wrapped twice.
    in_full = {module if module.startswith("model.") else module.partition(".")[0] for module in dense}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": largest,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora_dropout,
        "target_modules": list(ranks),
        "rank_pattern": uneven,
        "alpha_pattern": uneven,
        "use_rslora": False,
        "use_dora": any(part == "magnitude" for _, part in parts),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted(in_full) or None,
        "trainable_token_indices": list(token_ids) or None,
    }


def write_peft(
    folder: Path,
    master: Tensor,
    layout: ArenaLayout,
    config: Mapping[str, Any],
    *,
    heads: Mapping[str, Heads] | None = None,
    gates: Tensor | None = None,
    uniform_rank: bool = False,
) -> None:
    """Writes the two files and reads them back: names, shapes and bits. Other arguments: as in `peft_tensors`.

    Raises:
        ValueError: no component is left. RuntimeError: the files read back other than written.
    """
    tensors = peft_tensors(master, layout, heads=heads, gates=gates, uniform_rank=uniform_rank)
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


def serving_notes(config: Mapping[str, Any]) -> list[str]:
    """What a server makes of an adapter_config.json: a line on its largest rank, and lines on what is not loaded."""
    largest = int(config["r"])
    fitting = next((rank for rank in SERVER_RANKS if rank >= largest), None)
    merge = "`ardtrain merge` makes a model of its own, which every server loads"
    if largest <= SERVER_DEFAULT_RANK:
        notes = [f"largest rank {largest}: vLLM's default --max-lora-rank {SERVER_DEFAULT_RANK} is enough"]
    elif fitting is not None:
        notes = [
            f"largest rank {largest}: above vLLM's default --max-lora-rank {SERVER_DEFAULT_RANK}, so start it with "
            f"--max-lora-rank {fitting}; where a server's limit is lower, {merge}"
        ]
    else:
        notes = [f"largest rank {largest}: above every --max-lora-rank that vLLM takes ({SERVER_RANKS[-1]}); {merge}"]
    kinds = {
        "use_dora": "DoRA's magnitudes",
        "modules_to_save": "modules that were trained in full",
        "trainable_token_indices": "trained token rows",
    }
    held = [what for name, what in kinds.items() if config.get(name)]
    if held:
        notes.append(f"holds {' and '.join(held)}, which PEFT reads and vLLM 0.30 refuses; {merge}")
    return notes


def compare_products(
    folder: Path,
    master: Tensor,
    layout: ArenaLayout,
    *,
    form: Form,
    heads: Mapping[str, Heads] | None = None,
    gates: Tensor | None = None,
) -> float:
    """Largest difference of a matrix's product, by PEFT's rules from the folder, to that of training's own adapter.

    As a share of the product's largest number; on random inputs, without the base. What stands beside the pairs
    (magnitudes, heads, token rows) is not looked at.

    Args:
        form: of the adapters. Others as in `peft_tensors`.
    """
    from peft.utils.other import get_pattern_key

    config = json.loads((folder / "adapter_config.json").read_text())
    adapters = _adapters_without_base(layout, form, heads or {})
    bind_arena(adapters, layout, master, gates)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file, torch.no_grad():
        for module, adapter in adapters.items():
            if adapter.views is None:
                continue
            a, b = (file.get_tensor(f"{PEFT_PREFIX}{module}.{part}.weight") for part in ("lora_A", "lora_B"))
            r, alpha = (
                config[pattern].get(get_pattern_key(config[pattern].keys(), module), config[name])
                for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
            )
            x = torch.empty(16, adapter.in_features).normal_(generator=generator)
            own = adapter.eval().product(x)
            difference = float((x @ a.t() @ b.t() * (alpha / r) - own).abs().max())
            worst = max(worst, difference / max(float(own.abs().max()), 1e-30) if difference else 0.0)
    return worst


def _adapters_without_base(layout: ArenaLayout, form: Form, heads: Mapping[str, Heads]) -> dict[str, AdapterLinear]:
    """Training's adapters on linears of the meta device, which hold no numbers."""
    root = nn.Module()
    for site in layout.table.sites:
        cut = heads.get(site.module) if site.head is not None else None
        wide, high = site.in_features, site.out_features
        if cut is not None:
            wide, high = (wide, high * cut.count) if cut.side == "out" else (wide * cut.count, high)
        *parents, last = site.module.split(".")
        owner = root
        for name in parents:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(last, nn.Linear(wide, high, bias=False, device="meta"))
    return attach(root, layout.table.sites, dropout={}, form=form, heads=heads)


def compare_with_peft(folder: Path, base: torch.nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> float:
    """Largest difference between `logits` [B, T, V] and those of PEFT's own reading of the folder on `base`.

    inputs: arguments of the model's forward.
    base: the model as transformers loads it, without our adapters; PEFT's layers stay in it. One that was trained on in
    few bits comes dequantised (quantized.dequantize_modules): the adapter belongs to those numbers, and so a merge must
    be made into them, or say how far the full base is from them.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT asks by the name that transformers is about to drop; the user can do nothing about it.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        theirs = model(**inputs).logits
    return float((theirs.float() - logits.float()).abs().max())
