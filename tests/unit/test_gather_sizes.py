"""ZeRO-3's sizes move memory, not bits: the same steps with every weight sharded, with `auto`, with all kept whole."""

import pytest

from ardtrain.gather_sizes import RULES
from ardtrain.methods.lora import Lora
from ardtrain.preflight import weight_sizes
from tests.tiny import backbone_config, tiny_llama, tiny_trainer


def losses(world, **zero):
    """Of three steps under ZeRO-3, and how many weights stay whole."""
    trainer = tiny_trainer(Lora(), world=world, backbone=backbone_config(stage=3, **zero))
    out = [trainer.train_step().loss.hex() for _ in range(3)]
    whole = sum(getattr(p, "ds_persist", False) for p in trainer.backbone.module.parameters())
    trainer.arena.engine.destroy()
    trainer.backbone.destroy()
    return out, whole


@pytest.mark.usefixtures("world")
def test_bits_do_not_depend_on_the_sizes(world):
    model = tiny_llama()
    sizes = weight_sizes(model)
    auto = {name: rule(sizes, 1)[0] for name, rule in RULES.items() if name.startswith("stage3_")}
    sharded, none_whole = losses(world, stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=0)
    chosen, vectors_whole = losses(world, **auto)
    large, all_whole = losses(world, stage3_param_persistence_threshold=10**6)
    assert sharded == chosen == large
    assert none_whole == 0 and vectors_whole == 5  # two norms a layer and the last one
    assert all_whole == len(list(model.parameters()))
