"""The only importer of torch.distributed: exact sums, agreement, barriers and the store that carries an error's text.

Exact sums (deepspeed.md 9): a grain's gradient becomes fixed point, `round(g * 2^e)` in int64, and integers add
associatively, so neither the order of the grains nor their dealing over processes matters. Per-grain floats (loss,
largest gradient) travel as the bits of a float64 in an int64 slot that every other process leaves zero. One int64
all-reduce a step carries all of it.

Letters: N gradient numbers, G grains of a step.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ardtrain.tracing import part

START_EXPONENT = 44
HEADROOM_BITS = 8  # a step's gradients may be 2^8 times the last step's before it has to be repeated
LIMIT_BITS = 62
CHUNK = 1 << 24  # numbers converted to fixed point at a time: bounds the temporary at 128 MiB


def open_store(host: str, port: int, *, hosts_store: bool, name: str, timeout_seconds: float) -> dist.Store:
    """A connection to the store of all processes, with keys of its own by `name`; process 0 hosts the store.

    Under torchrun its agent hosts it. A connection is for one thread: a wait on it blocks the others.

    Raises:
        RuntimeError: the port is taken (process 0), or no store answers at `host` in time.
    """
    is_master = hosts_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        "localhost" if is_master else host,  # it listens on all interfaces
        port,
        is_master=is_master,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    return dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@dataclass
class World:
    """The processes of this run; all of them are data-parallel."""

    global_rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(
        cls,
        *,
        global_rank: int,
        world_size: int,
        device: torch.device,
        timeout_seconds: float,
        store: dist.Store | None = None,
    ) -> World:
        """All processes must call this, with a store of `open_store`, or with MASTER_ADDR and MASTER_PORT set."""
        timeout = datetime.timedelta(seconds=timeout_seconds)
        if store is None:
            store, _, _ = next(rendezvous("env://", global_rank, world_size, timeout=timeout))
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("collectives", store),
            rank=global_rank,
            world_size=world_size,
            timeout=timeout,
        )
        return cls(global_rank, world_size, device)

    def watchdog_store(self) -> dist.Store | None:
        """A connection of its own to the run's store (a wait on a shared one would block it); None if single."""
        if self.world_size == 1:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore("watchdog", dist.TCPStore(host, port, is_master=False, wait_for_workers=False))

    def leave(self) -> None:
        """Ends the process group. All processes must call this."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.global_rank == 0

    def barrier(self, name: str) -> None:
        """All processes must call this. On gloo a missing process is named."""
        if self.world_size == 1:
            return
        if self.device.type == "cpu":
            try:
                dist.monitored_barrier()
            except RuntimeError as error:
                raise RuntimeError(f"barrier '{name}': {error}") from error
        else:
            dist.barrier()

    def add_integers(self, values: Tensor) -> None:
        """Sums int64 values over the processes, in place. All processes must call this."""
        assert values.dtype == torch.int64
        if self.world_size > 1:
            dist.all_reduce(values)

    def all_reduce_bandwidth(self, num_bytes: int) -> float:
        """Bytes per second that each process sends and takes in an all-reduce (NCCL's "bus bandwidth"). All must call.

        Raises:
            RuntimeError: the sum is wrong.
        """
        values = torch.ones(max(1, num_bytes // 4), device=self.device)
        dist.all_reduce(values[:1])  # connections are made here
        values[0] = 1.0
        start = time.perf_counter()
        dist.all_reduce(values)
        least, most = values.aminmax()  # waits for the device
        seconds = time.perf_counter() - start
        if not least == most == self.world_size:
            raise RuntimeError(f"an all-reduce of ones gave {least:g} to {most:g} instead of {self.world_size}")
        return 2 * (self.world_size - 1) / self.world_size * values.nbytes / seconds

    def merge(self, values: Tensor) -> Tensor:
        """Adds tensors of which each element is non-zero on at most one process: exact. All must call this."""
        if self.world_size > 1:
            values = values.contiguous()
            dist.all_reduce(values)
        return values

    def agree(self, what: str, digest: str, *, step: int) -> None:
        """Stops everywhere unless all processes hold the same digest. All processes must call this.

        Raises:
            RuntimeError: on every process, naming the processes that differ from process 0 and both digests.
        """
        if self.world_size == 1:
            return
        hashed = hashlib.sha256(digest.encode()).digest()
        words = torch.tensor([int.from_bytes(hashed[i : i + 4], "little") for i in range(0, 32, 4)])
        # The largest of words and of their negatives: equal everywhere only if nobody differs. Of a size that does not
        # grow with the processes, in a time that grows with their logarithm on NCCL; who differs is asked only then.
        both = torch.cat([words, -words]).to(self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        largest, smallest = both.cpu().view(2, -1)
        if torch.equal(largest, -smallest):
            return
        own = torch.tensor(list(hashed), dtype=torch.uint8)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own)
        digests = [bytes(g.tolist()).hex() for g in gathered]
        odd = [i for i, d in enumerate(digests) if d != digests[0]]
        raise RuntimeError(
            f"step {step}: processes {odd} hold another {what} than process 0 "
            f"(hashes {digests[odd[0]][:16]} against {digests[0][:16]}). The sums are exact, so this is broken "
            "hardware, mixed versions or a defect; nothing was changed by this step"
        )

    def gather_texts(self, text: str) -> list[str]:
        """Every process's text, in their order, on every process. All processes must call this."""
        texts = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(texts, text)
        return texts

    def broadcast_text(self, text: str) -> str:
        """Process 0's text on every process. All processes must call this."""
        if self.world_size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def ask_main(self, answer: Callable[[], str | None]) -> str:
        """What process 0 answers ("" for None), on every process; where it fails all raise, and none waits for it.

        All processes must call this; `answer` is called on process 0 alone.

        Raises:
            ValueError: process 0's own, with the same text on the others. RuntimeError: of any other Exception.
        """
        kind, text = "answer", ""
        failure: Exception | None = None
        if self.is_main:
            try:
                text = answer() or ""
            except ValueError as error:
                kind, text, failure = "mistake", str(error), error
            except Exception as error:  # whatever it is, all of them raise it below
                name = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
                kind, text, failure = "failure", f"{name}{error}", error
        kind, _, text = self.broadcast_text(f"{kind}\n{text}").partition("\n")
        if kind == "mistake":
            raise failure or ValueError(text)
        if kind == "failure":
            raise RuntimeError(text) from failure
        return text


@dataclass(frozen=True)
class StepSum:
    """What one exact sum says, alike on every process.

    gradient: [N] float64-exact sum rounded once to float32, not yet divided; losses, tokens (targets) and processed
    (tokens without padding): per grain, in grain order; largest: max over grains of max|g|; valid: no overflow was
    possible; finite: every grain's loss and gradient were; bad_grains: indices of those that were not; flag: sum of the
    flags that processes raised; milliseconds: sum of what the processes gave; numbers: what `finish` gave.
    """

    gradient: Tensor
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    processed: tuple[int, ...]
    largest: float
    valid: bool
    finite: bool
    bad_grains: tuple[int, ...]
    flag: int
    milliseconds: int = 0
    numbers: tuple[float, ...] = ()
    exponent: int = 0  # the sum was made in units of 2^-exponent


class ExactSum:
    """Accumulator of one step. `exponent` e: gradients are kept in units of 2^-e."""

    COLUMNS = 4  # of the header: loss bits, bits of max|g|, target tokens, tokens without padding

    def __init__(self, numbers: int, num_grains: int, *, exponent: int, device: torch.device) -> None:
        self.numbers, self.num_grains, self.exponent = numbers, num_grains, exponent
        self._head = num_grains * self.COLUMNS + 2
        self._buffer = torch.zeros(self._head + numbers, dtype=torch.int64, device=device)

    def add(
        self, grain: int, *, loss: Tensor, gradient: Tensor | Sequence[Tensor], tokens: int, processed: int = 0
    ) -> None:
        """Adds one grain. No host synchronisation.

        Args:
            loss: scalar, the grain's sum of token losses. gradient: [N] float32 of that sum, whole or in pieces.
            tokens: target tokens. processed: tokens without padding.
        """
        pieces = [gradient] if isinstance(gradient, Tensor) else gradient
        assert sum(len(p) for p in pieces) == self.numbers
        scale = 2.0**self.exponent
        largest = torch.zeros((), dtype=torch.float64, device=self._buffer.device)
        begin = self._head
        for chunk in (p[i : i + CHUNK] for p in pieces for i in range(0, len(p), CHUNK)):
            largest = torch.maximum(largest, chunk.abs().max().double())  # NaN stays NaN
            self._buffer[begin : begin + len(chunk)] += (chunk * scale).round_().to(torch.int64)
            begin += len(chunk)
        slot = self._buffer[grain * self.COLUMNS : (grain + 1) * self.COLUMNS]
        slot[0] = loss.detach().double().view(torch.int64)
        slot[1] = largest.view(torch.int64)
        slot[2] = tokens
        slot[3] = processed

    def reduce(
        self,
        world: World,
        *,
        flag: int = 0,
        milliseconds: int = 0,
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> StepSum:
        """All processes must call this. One all-reduce, one host synchronisation.

        Args:
            finish: takes the gradient's sum [N], which it may change, and the step's target tokens (scalar int64), and
                gives float64 numbers [n] that come to the host with the others. It is also called for a sum that turns
                out invalid or not finite: nobody knows before the one synchronisation.
        """
        self._buffer[self._head - 2] = flag
        self._buffer[self._head - 1] = milliseconds
        with part("wait"):
            world.add_integers(self._buffer)
        whole, extra = self._to_float(), self._buffer.new_empty(0)
        if finish is not None:
            extra = finish(whole, self._buffer[2 : self._head - 2 : self.COLUMNS].sum()).view(torch.int64)
        with part("wait"):
            host = torch.cat([self._buffer[: self._head], extra]).cpu()
        head, numbers = host[: self._head], host[self._head :].view(torch.float64).tolist()
        flags, spent = head[-2:].tolist()
        table = head[:-2].view(self.num_grains, self.COLUMNS)
        losses = table[:, 0].contiguous().view(torch.float64).tolist()
        maxima = table[:, 1].contiguous().view(torch.float64).tolist()
        bad = tuple(
            i
            for i, (x, m) in enumerate(zip(losses, maxima, strict=True))
            if not (math.isfinite(x) and math.isfinite(m))
        )
        largest = max(maxima, default=0.0) if not bad else math.inf
        valid = bool(bad) or self.num_grains * largest * 2.0**self.exponent < 2.0**LIMIT_BITS
        return StepSum(
            gradient=whole,
            losses=tuple(losses),
            tokens=tuple(table[:, 2].tolist()),
            processed=tuple(table[:, 3].tolist()),
            largest=largest,
            valid=valid,
            finite=not bad,
            bad_grains=bad,
            flag=flags,
            milliseconds=spent,
            numbers=tuple(numbers),
            exponent=self.exponent,
        )

    def _to_float(self) -> Tensor:
        flat = self._buffer[self._head :]
        out = torch.empty(self.numbers, dtype=torch.float32, device=flat.device)
        scale = 2.0**-self.exponent
        for start in range(0, self.numbers, CHUNK):
            out[start : start + CHUNK] = (flat[start : start + CHUNK].double() * scale).float()
        return out


def next_exponent(largest: float, num_grains: int, *, current: int) -> int:
    """The exponent that fits gradients up to 2^HEADROOM_BITS times `largest`; `current` where nothing was learnt.

    A function of per-grain numbers only, so every process computes the same one.
    """
    if largest == 0.0 or not math.isfinite(largest):
        return current
    bits = math.ceil(math.log2(largest * num_grains))
    return max(-100, min(100, LIMIT_BITS - 1 - HEADROOM_BITS - bits))


def deal(num_grains: int, world_size: int, global_rank: int) -> list[tuple[int, bool]]:
    """(grain, counted) for each round of one process: grain p, p + W, ...; idle rounds repeat grain 0, not counted.

    ZeRO-3 needs every process in every forward, so all have the same number of rounds.
    """
    rounds = -(-num_grains // world_size)
    out = []
    for r in range(rounds):
        grain = r * world_size + global_rank
        out.append((grain, True) if grain < num_grains else (0, False))
    return out


def idle_share(num_grains: int, world_size: int) -> float:
    """Share of the processes' rounds that repeat a grain and are dropped."""
    rounds = -(-num_grains // world_size)
    return 1.0 - num_grains / (rounds * world_size) if rounds else 0.0
