"""A model's decoder layers, any part of which can be run alone: for ablations that start in the middle.

Letters: B rows of a grain, T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn


class Skipped(nn.Module):
    """In the place of a decoder layer or the output embedding: gives back its input, at no cost.

    Attributes come from the module it stands for (some models ask a layer for its kind of attention), which is no
    submodule of it: ZeRO-3 must not see it.
    """

    def __init__(self, original: nn.Module, give_back: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.give_back = give_back

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.give_back(args[0] if args else kwargs["hidden_states"])


class DecoderStack:
    """The list of decoder layers, any part of which can be run alone."""

    def __init__(self, path: str, layers: nn.ModuleList) -> None:
        self.path, self.layers = path, layers
        self._beside: int | None = None  # what layers return beside the hidden state, if a tuple; learnt from the first

    def layer_of(self, module: str) -> int | None:
        """Which layer a module sits in, by its path."""
        inside = module.removeprefix(self.path + ".")
        return None if inside == module else int(inside.partition(".")[0])

    @contextlib.contextmanager
    def part(self, start: int, stop: int, entering: Tensor | None) -> Iterator[dict[int, Tensor]]:
        """While open, a forward runs layers start .. stop - 1 only; `start` gets `entering` [B, T, D] as its input.

        The list keeps its length and the other layers are never called, so ZeRO-3 does not gather them.

        Args:
            entering: None: what the forward brings, for start 0.
        Returns:
            layer -> the hidden state that entered it, of the skipped ones.
        Raises:
            ValueError: the model did not run its layers once each, in order.
        """
        originals = list(self.layers)
        order: list[int] = []
        seen: dict[int, Tensor] = {}

        def pass_on(index: int, hidden: Tensor) -> Any:
            order.append(index)
            seen[index] = hidden
            return hidden if self._beside is None else (hidden, *[None] * self._beside)

        def enter(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            order.append(index)
            if index != start or entering is None:
                return None
            return ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})

        def learn(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._beside = len(out) - 1 if isinstance(out, tuple) else None

        handles = [originals[start].register_forward_hook(learn)]
        try:
            for index, layer in enumerate(originals):
                if start <= index < stop:
                    handles.append(layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True))
                else:
                    self.layers[index] = Skipped(layer, partial(pass_on, index))
            yield seen
        finally:
            for index, layer in enumerate(originals):
                self.layers[index] = layer
            for handle in handles:
                handle.remove()
        if order != list(range(len(originals))):
            raise ValueError(
                f"{self.path} did not run its {len(originals)} layers once each in order, so ablations cannot start in "
                "the middle; set alora.prefix_cache=false"
            )


def find_stack(model: nn.Module, modules: Sequence[str]) -> DecoderStack | None:
    """The list of decoder layers that holds most of the adapted modules, or None.

    A list counts whose entries are all of classes that transformers never splits over devices.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    stacks = [
        DecoderStack(path, m)
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and all(type(layer).__name__ in names for layer in m)
    ]
    held = [sum(s.layer_of(name) is not None for name in modules) for s in stacks]
    return stacks[held.index(max(held))] if any(held) else None
