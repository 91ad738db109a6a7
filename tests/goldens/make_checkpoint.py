"""Makes the small checkpoint of the present format version that test_goldens.py loads for ever after.

python -m tests.goldens.make_checkpoint    (once for each format version; then commit tests/goldens/checkpoint-v<N>)

ElaLoRA on the q and v projections of a one-layer tiny Llama, 12 steps with 3 resizes.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from ardtrain import checkpoint
from tests.tiny import elalora, tiny_llama, tiny_trainer, weights_digest

IDENTITY = checkpoint.Identity("tiny_llama(layers=1)", "TokenBatches()", {})
HERE = Path(__file__).parent


def golden_trainer(start=True):
    """The trainer whose checkpoint this is."""
    return tiny_trainer(
        elalora(init_warmup=2, mask_interval=3, final_warmup=20),
        model=tiny_llama(layers=1, hidden=16, heads=2, kv_heads=1, mlp=16),
        target_modules=["q_proj", "v_proj"],
        start=start,
    )


def main():
    """Writes the folder and the digest of what is in it."""
    os.environ["LOCAL_RANK"] = "0"
    trainer = golden_trainer()
    for _ in range(12):
        trainer.train_step()
    snapshot = trainer.arena.capture()
    folder = HERE / f"checkpoint-v{checkpoint.FORMAT_VERSION}"
    folder.mkdir()
    checkpoint.save(
        folder, snapshot, trainer.arena.layout, step=12, loop=asdict(trainer.state), identity=IDENTITY,
        write_adapter=lambda adapter: adapter.mkdir(),
    )  # fmt: skip
    expected = {
        "weights_digest": weights_digest(snapshot),
        "ranks": snapshot.table.by_name(),
        "events": trainer.state.events,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
