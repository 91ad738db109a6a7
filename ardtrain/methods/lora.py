"""LoRA (arXiv 2106.09685): `W x + (alpha / r) B A x`, fixed ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ardtrain.methods.base import FixedRank
from ardtrain.ranks import Site


class Lora(FixedRank):
    """Plain form: A Kaiming-uniform (a = sqrt 5, as loralib), B zero; methods.md 4.2."""

    def entries(self, site: Site) -> Mapping[str, int]:
        return {"lora_A": site.in_features, "lora_B": site.out_features}

    def init(
        self, site: Site, existing: Mapping[str, Tensor], count: int, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        bound = 1.0 / math.sqrt(site.in_features)  # kaiming_uniform_(a=sqrt(5)) of a [r, I] matrix
        lora_a = (torch.rand(count, site.in_features, generator=generator) * 2 - 1) * bound
        return {"lora_A": lora_a, "lora_B": torch.zeros(count, site.out_features)}
