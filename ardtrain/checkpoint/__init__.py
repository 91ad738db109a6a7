"""Checkpoints: rank-independent state, safetensors and JSON only, nothing unpickled; complete and verified, or absent.

`checkpoint-N/` (N optimizer steps done) is written beside its final name and renamed when it is complete and verified;
`latest` and `best` are files that name complete checkpoints only. The state holds full tensors by matrix, never the
flat vector, so another world size, ZeRO stage, offload or a later layout read it alike (architecture.md 9).
"""

from ardtrain.checkpoint.errors import CheckpointError, OtherRunError
from ardtrain.checkpoint.finding import (
    candidates,
    check_writable,
    checkpoints,
    clean,
    load_newest,
    pointed,
    prune,
    remove_folder,
    state_bytes,
)
from ardtrain.checkpoint.format import FORMAT_VERSION, FULL, PREFIX, Loaded, from_tensors, load, seal, to_tensors
from ardtrain.checkpoint.identity import Identity, compare
from ardtrain.checkpoint.saving import save
from ardtrain.checkpoint.tensorfile import file_sha256 as sha256
from ardtrain.checkpoint.writer import Writer

__all__ = [
    "FORMAT_VERSION",
    "FULL",
    "PREFIX",
    "CheckpointError",
    "Identity",
    "Loaded",
    "OtherRunError",
    "Writer",
    "candidates",
    "check_writable",
    "checkpoints",
    "clean",
    "compare",
    "from_tensors",
    "load",
    "load_newest",
    "pointed",
    "prune",
    "remove_folder",
    "save",
    "seal",
    "sha256",
    "state_bytes",
    "to_tensors",
]
