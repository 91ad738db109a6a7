"""Packed rows: how a model is told which tokens are one document, and a check that it keeps documents apart.

Documents are told apart by position ids that start again at 0; no mask is made here and none travels to the device.
transformers draws the masks of sdpa and eager from them on the device (masking_utils.find_packed_sequence_indices),
with each layer's sliding window; flash attention takes the documents' ends instead and makes none.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE_TOKENS = 6  # of each of the probe's documents
LEAK = 0.02  # share of a changed document's own change that another's logits may show; rounding only


def packed_arguments(module: nn.Module, position_ids: Tensor) -> dict[str, Any]:
    """What a forward needs beside the position ids [B, T] of packed rows: for flash attention the documents' ends.

    transformers would find them itself, but for one row a batch only, and with a host synchronisation in each layer.
    One here, if the position ids are on the device.
    """
    config = getattr(getattr(module, "module", module), "config", None)  # an engine's own config is DeepSpeed's
    if "flash" not in (getattr(config, "_attn_implementation", None) or ""):
        return {}
    flat = position_ids.reshape(-1)
    starts = torch.nonzero(flat == 0).view(-1)
    ends = F.pad(starts, (0, 1), value=len(flat)).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def check_packing(module: nn.Module, *, device: torch.device) -> None:
    """A forward of two rows whose first documents differ: the second documents' logits must not. All must call this.

    Raises:
        ValueError: the model lets documents see each other (a recurrent layer, attention that ignores positions).
    """
    config = module.config.get_text_config()  # type: ignore[union-attr, operator]
    ids = torch.arange(2 * PROBE_TOKENS, device=device).remainder(config.vocab_size).repeat(2, 1)
    ids[1, :PROBE_TOKENS] = ids[0, :PROBE_TOKENS].flip(0)
    positions = torch.arange(PROBE_TOKENS, device=device).repeat(2, 2)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            logits = module(
                input_ids=ids, position_ids=positions, use_cache=False, **packed_arguments(module, positions)
            ).logits.float()
    finally:
        module.train(was_training)
    own, other = (logits[0] - logits[1]).abs().split(PROBE_TOKENS)
    if not float(other.max()) <= LEAK * float(own.max()):
        raise ValueError(
            f"packing=true: the documents of a row see each other in this model (a change of one moves another's "
            f"logits by {float(other.max()):.1e}, its own by {float(own.max()):.1e}); set packing=false"
        )
