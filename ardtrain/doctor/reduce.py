"""One all-reduce over all processes, with a time limit, its bandwidth, and what its errors mean."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from ardtrain.doctor.board import bounded
from ardtrain.doctor.facts import Facts
from ardtrain.environment import ProcessIdentity


def reduce_once(identity: ProcessIdentity, facts: Facts, *, deadline: float) -> dict[str, Any]:
    """`bandwidth` (bytes per second) or `error` of one all-reduce, ended by the deadline. All processes must call this.

    In a thread of its own, with a store of its own: what hangs in there does not keep this process from telling.
    """
    import torch

    from ardtrain.collectives import World, open_store

    seconds = max(1.0, deadline - time.monotonic() - 1.0)
    on_gpu = facts.accelerator == "cuda"
    stage = "the processes connect"

    def work() -> float:
        nonlocal stage
        assert identity.master_port is not None
        device = torch.device("cuda", identity.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        store = open_store(
            identity.master_addr, identity.master_port, hosts_store=False, name="reduce", timeout_seconds=seconds
        )
        world = World.join(
            global_rank=identity.global_rank,
            world_size=identity.world_size,
            device=device,
            # Gloo's own error names the peer; NCCL's limit would end the process, ours comes first.
            timeout_seconds=seconds + 60.0 if on_gpu else max(1.0, seconds - 2.0),
            store=store,
        )
        stage = "the sum"
        return world.all_reduce_bandwidth((128 if on_gpu else 8) << 20)

    try:
        return {"error": None, "bandwidth": bounded(work, seconds=seconds)}
    except TimeoutError:
        return {"error": f"no end within {seconds:.0f} s ({stage})"}
    except Exception as error:  # whatever gloo or NCCL raise is told to the user
        return {"error": f"{stage}: {first_words(str(error)) or type(error).__name__}"}


def first_words(text: str) -> str:
    """An error's text without source file, advice for developers and pictures. Pure."""
    text = re.sub(r"\[/\S*\]", "", text.encode("ascii", "ignore").decode()).split("This is typically caused")[0]
    return " ".join(text.split())[:400]


def with_names(text: str, owners: Mapping[str, str]) -> str:
    """Addresses in an error's text with their hosts behind them."""
    return re.sub(r"\d+\.\d+\.\d+\.\d+", lambda m: f"{m[0]} ({owners[m[0]]})" if m[0] in owners else m[0], text)


def remedy_of(text: str) -> str:
    """What helps against an error of gloo or NCCL. Pure."""
    if "Duplicate GPU" in text:
        return "two processes use one GPU: start one process for each GPU, and let each see all of them"
    if "CUDA" in text or "cuda" in text:
        return "look at nvidia-smi on that host"
    return (
        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the hosts' common network; all ports "
        "must be open between the hosts; NCCL_DEBUG=INFO tells more"
    )
