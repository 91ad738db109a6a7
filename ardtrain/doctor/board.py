"""What the processes of a meeting tell each other, through the store. Here every wait has an end."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from ardtrain.doctor.finding import Finding, Trouble
from ardtrain.reasons import first_line

POLL_SECONDS = 0.05
T = TypeVar("T")


def bounded(action: Callable[[], T], *, seconds: float) -> T:
    """What the action gives, or raises. It runs in a thread of its own, which is left behind when time is over.

    Raises:
        TimeoutError: it did not end in time.
    """
    ended: concurrent.futures.Future[T] = concurrent.futures.Future()

    def attempt() -> None:
        try:
            ended.set_result(action())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=attempt, daemon=True).start()
    return ended.result(timeout=seconds)


class Store(Protocol):
    """The part of torch's stores that a board needs."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set."""

    def get(self, key: str, /) -> bytes:
        """Value of a key that is set."""

    def set(self, key: str, value: str, /) -> None:
        """Sets a key for all processes."""


class Board:
    """Notes by kind and process. For one thread."""

    def __init__(self, store: Store, *, host: str) -> None:
        self._store, self._host = store, host

    def post(self, kind: str, process: int, note: Mapping[str, Any]) -> None:
        """Puts a note up for all. Raises Trouble if the store is gone."""
        try:
            self._store.set(f"{kind}/{process}", json.dumps(note))
        except RuntimeError as error:
            raise self._gone(error) from error

    def gather(self, kind: str, processes: Iterable[int], *, deadline: float) -> dict[int, dict[str, Any]]:
        """Notes of these processes, as far as they are up by the deadline (time.monotonic). Raises Trouble."""
        found: dict[int, dict[str, Any]] = {}
        waiting = list(processes)
        try:
            while True:
                for process in [p for p in waiting if self._store.check([f"{kind}/{p}"])]:
                    found[process] = json.loads(self._store.get(f"{kind}/{process}"))
                    waiting.remove(process)
                if not waiting or time.monotonic() > deadline:
                    return found
                time.sleep(POLL_SECONDS)
        except RuntimeError as error:
            raise self._gone(error) from error

    def read(self, kind: str, process: int, *, deadline: float) -> dict[str, Any]:
        """One process's note. Raises Trouble if it does not come in time."""
        found = self.gather(kind, [process], deadline=deadline)
        if process not in found:
            what = f"process {process} said nothing more (it should have told '{kind}')"
            raise Trouble(Finding("fail", self._host, what, f"look at process {process}'s own output"))
        return found[process]

    def _gone(self, error: RuntimeError) -> Trouble:
        what = f"process 0's store is gone ({first_line(error)[:120]})"
        return Trouble(
            Finding("fail", self._host, what, "process 0 ended, or its host is cut off: look at process 0's own output")
        )
