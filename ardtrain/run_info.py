"""`run_info.json` of a run folder: what was trained, with which versions, on what, at each start of the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ardtrain import __version__
from ardtrain.faults import replace_file
from ardtrain.ranks import Site

RUN_INFO_FILE = "run_info.json"
_VERSIONS = ("torch", "deepspeed", "transformers", "peft", "numpy")


def write_run_info(
    run_dir: str | os.PathLike[str],
    *,
    step: int,
    sites: Sequence[Site],
    num_trained: int,
    num_base: int,
    world_size: int,
    device: torch.device,
    sources: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Adds this start to the file. Process 0 alone.

    step: optimizer steps done before it; 0 of a new run, whose starts are the file's first.
    num_trained, num_base: numbers that are trained, and those of the base, now.
    sources: what an epoch takes of each data set, where there are several by name.
    """
    path = Path(run_dir) / RUN_INFO_FILE
    starts = read_starts(path) if step else []
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "world_size": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "versions": {"ardtrain": __version__, **{name: importlib.metadata.version(name) for name in _VERSIONS}},
    }
    record = {
        "num_trained": num_trained,
        "num_base": num_base,
        **({"sources": sources} if sources else {}),
        "modules": {s.module: [s.in_features, s.out_features, s.tower] for s in sites},  # alike for a matrix's heads
        "starts": [*starts, start],
    }
    replace_file(path, json.dumps(record, separators=(", ", ": ")) + "\n")


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts that the file holds; none where it cannot be read."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return starts if isinstance(starts, list) else []


def reset_peaks(device: torch.device) -> None:
    """Begins the peaks anew; the host's only where Linux lets a process do so (else it counts from its start)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peaks(device: torch.device) -> list[int]:
    """[host, device] most bytes since `reset_peaks`: resident memory of this process, allocations on the device."""
    host = 0
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        host = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)
    return [host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0]
