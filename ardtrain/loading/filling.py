"""Reads sources in parallel into tensors that exist already; counts bytes, checks for numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor, nn

from ardtrain.loading.sources import TensorSource

CHUNK_BYTES = 16 << 20  # of one read; a thread holds about two of them


@dataclass
class Weights:
    """What an engine needs to fill a model on the meta device.

    sources: parameter name -> source. progress: gets the bytes of each chunk that is in place, from any thread.
    close: called when all is in place.
    """

    sources: dict[str, TensorSource]
    threads: int = 4
    progress: Callable[[int], None] = lambda count: None
    close: Callable[[], None] = lambda: None

    def nbytes(self, model: nn.Module) -> int:
        """Of all parameters of the model that are on the meta device, a tied one once."""
        unread = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        return sum(math.prod(self.sources[n].shape) * self.sources[n].dtype.itemsize for n in unread)


def read_modules(model: nn.Module, weights: Weights, paths: Sequence[str]) -> None:
    """Reads these modules' own parameters whole, on the CPU, where they are on the meta device.

    Raises:
        ValueError: a file is at fault.
    """
    for path in paths:
        module = model.get_submodule(path)
        for name, unread in list(module.named_parameters(recurse=False)):
            if unread.is_meta:
                values = weights.sources[f"{path}.{name}"].read(0, unread.numel()).view(unread.shape)
                setattr(module, name, nn.Parameter(values, requires_grad=unread.requires_grad))
                weights.progress(values.nbytes)


class Filler:
    """Reads in the background; `finish` waits, raises the first error, and nothing is in place before it."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._pool = ThreadPoolExecutor(weights.threads, thread_name_prefix="load")
        self._futures: list[Future[None]] = []

    def add(self, name: str, begin: int, target: Tensor) -> None:
        """Slice of the parameter `name` from `begin` on, as long as the contiguous target [n], on any device."""
        source = self._weights.sources[name]
        flat = target.detach().view(-1)
        step = max(1, CHUNK_BYTES // source.dtype.itemsize)
        for at in range(0, flat.numel(), step):
            part = flat[at : at + step]
            self._futures.append(self._pool.submit(self._read, name, source, begin + at, part))

    def _read(self, name: str, source: TensorSource, begin: int, target: Tensor) -> None:
        values = source.read(begin, target.numel())
        target.copy_(values)
        self._weights.progress(values.nbytes)

    def wait(self) -> None:
        """Until all that was added is in place. Raises the first error, a ValueError where a file is at fault."""
        done, _ = wait(self._futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        self._futures.clear()

    def __enter__(self) -> Filler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
