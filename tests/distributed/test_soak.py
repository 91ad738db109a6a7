"""50 resizes in one process: memory flat, engines collected, trained bytes as the rank table says."""

import gc
import weakref

import psutil
import pytest

from tests.tiny import TokenBatches, backbone_config, elalora, tiny_llama, tiny_trainer

pytestmark = pytest.mark.full


def test_fifty_resizes_keep_memory_flat_and_collect_every_engine(world):
    trainer = tiny_trainer(
        elalora(
            total_steps=80,
            init_warmup=1,
            final_warmup=5,
            mask_interval=1,
            enable_scheduler=False,
            newborn_immunity=False,
        ),
        model=tiny_llama(layers=3, hidden=64, mlp=128),
        backbone=backbone_config(stage=3),
        data=TokenBatches(num_grains=2),
        total_steps=80,
    )
    process, engines, resident = psutil.Process(), [], []
    for _ in range(80):
        step = trainer.train_step()
        if step.record is not None:
            engines.append(weakref.ref(trainer.arena.engine))
            trained = sum(b.rows * b.columns for b in trainer.arena.layout.blocks)
            assert trained == trainer.arena.layout.num_trained
            expected = sum(
                rank * (site.in_features + site.out_features + 1)
                for site, rank in zip(trainer.arena.table.sites, trainer.arena.table.ranks, strict=True)
            )
            assert trained == expected
            assert trainer.arena.engine.weights.numel() == trainer.arena.layout.size
            resident.append(process.memory_info().rss)
    gc.collect()
    alive = [e for e in engines if e() is not None]
    assert alive == [engines[-1]], f"{len(alive)} of {len(engines)} engines alive"
    after_warm_up = resident[10:]  # 50 and more resizes; the first ten fill allocator pools and caches
    assert len(after_warm_up) >= 50
    assert max(after_warm_up) / min(after_warm_up) < 1.02, [r >> 20 for r in after_warm_up]
