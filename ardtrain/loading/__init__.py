"""Safetensors shards -> the bytes of the base that this process keeps, and no others.

`shards` reads headers, `sources` gives each stored range or transformed tensor as a TensorSource, `mapping` says by
transformers' own rules which source a parameter of the model has, `quantizing` makes codes of what a source gives,
`filling` reads in parallel into tensors that exist, `verifying` compares files to their checksums. The sharding itself
is the engines' (engines_filling.py).
"""

from ardtrain.loading.filling import Filler, Weights, read_modules
from ardtrain.loading.mapping import NotMapped, map_parameters
from ardtrain.loading.quantizing import quantized
from ardtrain.loading.shards import Shards, Stored
from ardtrain.loading.sources import TensorSource
from ardtrain.loading.verifying import check_finite, checked, known_checksum, verify_files

__all__ = [
    "Filler",
    "NotMapped",
    "Shards",
    "Stored",
    "TensorSource",
    "Weights",
    "check_finite",
    "checked",
    "known_checksum",
    "map_parameters",
    "quantized",
    "read_modules",
    "verify_files",
]
