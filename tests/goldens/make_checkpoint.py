"""Makes the small checkpoint of the present format version that test_goldens.py loads for ever after.

python -m tests.goldens.make_checkpoint    (once for each format version; then commit tests/goldens/checkpoint-v<N>)

ElaLoRA on the q and v projections of a one-layer tiny Llama, 12 steps with 3 resizes; written by two processes.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from ardtrain import checkpoint, export
from tests.tiny import elalora, tiny_llama, tiny_trainer, weights_digest

IDENTITY = checkpoint.Identity(
    "tiny_llama(layers=1)",
    "TokenBatches()",
    {},
    weights={"model.safetensors": hashlib.sha256(b"tiny_llama").hexdigest()},
    method="elalora",
    settings={"r": 4, "seed": 7, "target_modules": ["q_proj", "v_proj"], "elalora": {"mask_interval": 3}},
    changeable={"learning_rate": 5e-3},
)
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
    layout = trainer.arena.layout
    described = export.peft_config(layout, base_model="tiny_llama", revision=None, lora_dropout=0.0)
    writers = [checkpoint.Writer(folder, global_rank=i, world_size=2) for i in range(2)]
    attempt = writers[0].prepare(12)
    for writer in writers:
        writer.start(
            attempt, snapshot, layout, step=12, loop=asdict(trainer.state), identity=IDENTITY,
            write_adapter=lambda adapter: export.write_peft(adapter, snapshot.full.master, layout, described),
        )  # fmt: skip
    for writer in writers:
        problems = writer.wait()
        assert problems is None, problems
    expected = {
        "weights_digest": weights_digest(snapshot),
        "ranks": snapshot.table.by_name(),
        "events": trainer.state.events,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
