"""Several sources of rows as one: samples numbered one source after the other, and what an epoch takes of each."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from ardtrain.data_cache import Samples
from ardtrain.data_order import IntArray, Part, drawn_samples
from ardtrain.data_rows import DataSettings
from ardtrain.images import StoredImage

MOST_PASSES = 1000  # over a source in one epoch: more is a slip in the weights
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A named data set. settings: its files and fields. weight: its share of an epoch's samples; None: each once."""

    name: str
    settings: DataSettings
    weight: float | None = None


@dataclass(frozen=True)
class Share:
    """What a mixture takes of a source. drawn: samples of an epoch; fraction: of all that an epoch draws."""

    name: str
    samples: int
    drawn: int
    fraction: float

    @property
    def passes(self) -> float:
        """Over the source, in an epoch."""
        return self.drawn / self.samples

    def text(self) -> str:
        """`chat: 1,200 samples, 75.0 % of an epoch, 2.50 passes in it`."""
        return (
            f"{self.name}: {self.samples:,} samples, {100 * self.fraction:.1f} % of an epoch, {self.passes:.2f} passes "
            "in it"
        )


@dataclass(frozen=True)
class Drawn:
    """What a run has trained on of a source."""

    samples: int
    tokens: int
    passes: float


class Mixture:
    """Samples of several sources, read as one `Samples`: same attributes and methods.

    Attributes:
        shares: of each source. parts: the same for data_order; empty without weights, when an epoch holds each sample
            once, as of one source with all the files.
        format: "mixed" where the sources' differ.
    Raises:
        DataError: a source has no row, or a broken one. ValueError: see Samples; or the weights would draw a source
            more than MOST_PASSES times an epoch.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path) -> None:
        self.names = tuple(source.name for source in sources)
        self._own = [Samples(source.settings, tokenizer, cache_dir) for source in sources]
        sizes = [len(own.lengths) for own in self._own]
        self.starts: IntArray = np.concatenate([[0], np.cumsum(sizes)])
        self.lengths: npt.NDArray[np.int32] = np.concatenate([own.lengths for own in self._own])
        weights = [source.weight for source in sources if source.weight is not None]
        assert len(weights) in (0, len(sources)), "the config checks this"
        drawn = drawn_samples(sizes, weights) if weights else sizes
        self.shares = [
            Share(name, size, count, count / sum(drawn))
            for name, size, count in zip(self.names, sizes, drawn, strict=True)
        ]
        _refuse_many_passes(self.shares)
        self.parts = [Part(size, count) for size, count in zip(sizes, drawn, strict=True)] if weights else []
        self.counts = dict(sum((Counter(own.counts) for own in self._own), Counter()))
        self.counts = {name: self.counts.get(name, 0) for name in self._own[0].counts}  # a Counter drops what is 0
        formats = {own.format for own in self._own}
        self.format = formats.pop() if len(formats) == 1 else "mixed"
        state = [[own.cache_key for own in self._own], drawn if weights else None]
        self.cache_key = hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def _each(self, samples: Sequence[int], read: Callable[[Samples, list[int]], Iterable[T]]) -> list[T]:
        """What `read` gives for each sample, in the samples' order; one call a source."""
        wanted = np.asarray(samples, dtype=np.int64)
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        out: dict[int, T] = {}
        for source in np.unique(owner).tolist():
            places = np.flatnonzero(owner == source)
            own = (wanted[places] - self.starts[source]).tolist()
            out |= zip(places.tolist(), read(self._own[source], own), strict=True)
        return [out[place] for place in range(len(wanted))]

    def read(self, samples: Sequence[int]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """See Samples.read."""
        return self._each(samples, Samples.read)

    def classes(self, samples: Sequence[int]) -> tuple[list[int], list[npt.NDArray[np.int8]]]:
        """See Samples.classes."""
        pairs = self._each(samples, lambda own, numbers: zip(*own.classes(numbers), strict=True))
        return [label for label, _ in pairs], [types for _, types in pairs]

    def images(self, samples: Sequence[int]) -> tuple[list[StoredImage], list[str]]:
        """See Samples.images."""
        pairs = self._each(samples, lambda own, numbers: zip(*own.images(numbers), strict=True))
        return [image for image, _ in pairs], [folder for _, folder in pairs]

    def ids(self, samples: Sequence[int]) -> list[str]:
        """See Samples.ids; two sources have no file in common."""
        return self._each(samples, Samples.ids)

    def cached_in(self, sample: int) -> Path:
        """See Samples.cached_in."""
        (folder,) = self._each([sample], lambda own, numbers: [own.cached_in(n) for n in numbers])
        return folder

    def drawn(self, samples: Iterable[IntArray]) -> dict[str, Drawn]:
        """What these samples, which may repeat, come to by source."""
        times = np.zeros(len(self.lengths), dtype=np.int64)
        for some in samples:
            times += np.bincount(some, minlength=len(times))
        tokens = times * self.lengths
        out = {}
        for share, start, stop in zip(self.shares, self.starts[:-1], self.starts[1:], strict=True):
            count = int(times[start:stop].sum())
            out[share.name] = Drawn(count, int(tokens[start:stop].sum()), count / share.samples)
        return out


def _refuse_many_passes(shares: Sequence[Share]) -> None:
    most = max(shares, key=lambda share: share.passes)
    once = min(shares, key=lambda share: share.passes)
    if most.passes > MOST_PASSES:
        raise ValueError(
            f"data.sources: an epoch in which {once.name} ({once.samples:,} samples) is gone through once would go "
            f"{most.passes:,.0f} times through {most.name} ({most.samples:,} samples); raise {once.name}'s weight, "
            f"lower {most.name}'s, or put fewer rows into {once.name}'s files"
        )


def open_samples(
    settings: DataSettings, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path
) -> Samples | Mixture:
    """The settings' files, or the sources where there are some."""
    return Mixture(sources, tokenizer, cache_dir) if sources else Samples(settings, tokenizer, cache_dir)
