"""DoRA (arXiv 2402.09353): direction by LoRA, magnitude of each output trained beside it; fixed ranks.

`m * (W x + s B A x) / ||W + s B A||`; the product is `adapters.DoraLinear`. Source: methods.md 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence

from ardtrain.methods.lora import Lora
from ardtrain.ranks import Dense, Site


class Dora(Lora):
    """LoRA's components and one magnitude [O] a matrix."""

    def dense(self, sites: Sequence[Site]) -> tuple[Dense, ...]:
        return tuple(Dense(site.module, "magnitude", 1, site.out_features) for site in sites)
