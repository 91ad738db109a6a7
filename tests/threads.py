"""Worlds whose processes are threads of this one, for code that reduces little: no process is started."""

import threading
from functools import partial

import torch

from ardtrain.collectives import World
from tests.tiny import CPU


class ThreadWorld(World):
    """One of them; each collective hands every thread what all of them gave."""

    def __init__(self, shared, global_rank):
        super().__init__(global_rank, shared.size, CPU)
        self.shared = shared

    def merge(self, values):
        together = torch.stack(self.shared.exchange(self.global_rank, values))
        assert bool(((together != 0).sum(0) <= 1).all()), "an element of two processes"
        return together.sum(0)

    def add_integers(self, values):
        assert values.dtype == torch.int64
        values.copy_(torch.stack(self.shared.exchange(self.global_rank, values.clone())).sum(0))

    def broadcast_text(self, text):
        return self.shared.exchange(self.global_rank, text)[0]


class Threads:
    """`size` worlds that meet in their collectives; one that comes alone fails after a minute."""

    def __init__(self, size):
        self.size, self.given = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, index, value):
        """What every thread gave, in their order."""
        self.given[index] = value
        self.barrier.wait()
        together = list(self.given)
        self.barrier.wait()
        return together

    def run(self, work):
        """[size] what work(world) returned in each thread, or the exception it raised."""
        results = [None] * self.size

        def one(index):
            try:
                results[index] = work(ThreadWorld(self, index))
            except BaseException as error:
                results[index] = error

        threads = [threading.Thread(target=partial(one, i)) for i in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return results

    def results(self, work):
        """As `run`, where none fails."""
        results = self.run(work)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results
