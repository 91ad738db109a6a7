"""Every family under a method that moves ranks, cut and resumed: run by several processes, writes JSON from process 0.

python -m tests.distributed.families CASES.json OUT.json

A case: model (a family's name), method, and what may not change bits: ZeRO stage, activation checkpointing, where the
run is cut and resumed.
"""

import sys

from tests.distributed.matrix import main, run_case
from tests.families import FAMILIES, STEPS, family_trainer
from tests.tiny import adapter_config, backbone_config

CUT = 6


def build(case, world):
    """A trainer for the case; its arena is unbuilt if the case resumes."""
    zero = {"offload_param": {"device": "cpu"}} if case.get("stage") == 3 else {}
    return family_trainer(
        FAMILIES[case["model"]],
        case["method"],
        num_grains=5,
        world=world,
        dropout=0.1,
        backbone=backbone_config(stage=case.get("stage", 0), world_size=world.world_size, **zero),
        adapter=adapter_config(world_size=world.world_size),
        start="resume" not in case,
        gradient_checkpointing=case.get("gradient_checkpointing", False),
    )


def run(case, world):
    """See matrix.run_case."""
    result = run_case(case, world, build=build, steps=STEPS, cut=CUT, evaluate_after=(4, 9))
    return result | {"checkpointing": case.get("gradient_checkpointing", False)}


if __name__ == "__main__":
    main(*sys.argv[1:], run=run)
