"""Runs that are made to go wrong on one process; started by test_provoked.py.

python -m tests.distributed.provoked disagreement | drift | failure CONFIG
"""

import os
import sys
import time
from pathlib import Path


def disagreement():
    """Process 1 sees one component's score otherwise at the first event: all must stop in that step."""
    import torch

    from ardtrain.collectives import World
    from ardtrain.engines import start_deepspeed
    from tests.tiny import CPU, elalora, tiny_trainer

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World.join(global_rank=rank, world_size=size, device=CPU, timeout_seconds=60)
    start_deepspeed(CPU)
    trainer = tiny_trainer(elalora(init_warmup=1, mask_interval=2), world=world, total_steps=60)
    if rank == 1:
        honest = trainer.arena.scores

        def changed(step):
            scores = honest(step)
            scores[0] = scores.max() * 2 if scores[0] < scores.median() else 0.0
            return scores

        trainer.arena.scores = changed
    table = trainer.arena.table
    try:
        for _ in range(5):
            trainer.train_step()
    except RuntimeError as error:
        print(f"STEP {trainer.state.step - 1} {error}", flush=True)
        assert trainer.arena.table is table, "something was changed"
        os._exit(3)


def drift():
    """One bit of one weight of process 1 flips after step 3; ZeRO would heal it at the next, the check finds it."""
    import torch

    from ardtrain.collectives import World
    from ardtrain.engines import start_deepspeed
    from tests.tiny import CPU, elalora, tiny_trainer

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World.join(global_rank=rank, world_size=size, device=CPU, timeout_seconds=60)
    start_deepspeed(CPU)
    trainer = tiny_trainer(elalora(), world=world, total_steps=60, check_every=4)
    honest = trainer.train_step

    def flipping():
        result = honest()
        if rank == 1 and result.step == 3:
            trainer.arena.engine.weights[5:6].view(torch.int32).bitwise_xor_(1)
        return result

    trainer.train_step = flipping
    try:
        trainer.fit()
    except RuntimeError as error:
        print(f"STEP {trainer.state.step} {error}", flush=True)
        os._exit(3)


def failure(config):
    """Process 1 raises in the middle of a forward of step 3 of a whole run."""
    from ardtrain.cli import main
    from ardtrain.trainer import Trainer

    honest = Trainer._grain
    calls = 0

    def failing(self, *arguments):
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and calls == 5:

            def broken(*_):
                Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
                raise FloatingPointError("provoked in mid-forward")

            self.backbone.module.model.layers[1].register_forward_pre_hook(broken)
        return honest(self, *arguments)

    Trainer._grain = failing
    sys.exit(main(["train", config]))


if __name__ == "__main__":
    {"disagreement": disagreement, "drift": drift, "failure": failure}[sys.argv[1]](*sys.argv[2:])
