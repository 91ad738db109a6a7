"""One DeepSpeed JSON for two engines: what is taken over, what goes where, what is refused."""

import json
from pathlib import Path

import pytest

from ardtrain.config import ConfigError, OptimizerBlock, dump_config, load_config, parse_config, with_batch
from ardtrain.config.text import deepspeed_folder
from ardtrain.deepspeed_config import NVME_PLACEHOLDER, split_deepspeed, take_over, with_deepspeed

BASE = {"model_name_or_path": "m", "output_dir": "out", "method": "lora", "data": {"train_file": "a.jsonl"}}
NAMES = ["zero0", "zero2", "zero3", "zero3_nvme", "zero3_offload", "zero3_offload_param"]


def config_of(deepspeed=None, **settings):
    return parse_config(BASE | settings | ({} if deepspeed is None else {"deepspeed": deepspeed}))


def plan_of(deepspeed=None, *, trainable_numbers=None, **settings):
    return split_deepspeed(config_of(deepspeed, **settings), world_size=2, trainable_numbers=trainable_numbers)


def refused(deepspeed, **settings) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_of(deepspeed, **settings)
    return caught.value.errors


def zero(stage, **keys):
    return {"zero_optimization": {"stage": stage, **keys}}


def test_without_a_json_both_engines_are_complete():
    plan = plan_of(per_device_train_batch_size=3)
    triple = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1}
    assert plan.backbone == triple | zero(0)
    assert plan.adapter == {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
    }
    assert (plan.backbone_stage, plan.compute_dtype, plan.optimizer_offload, plan.notes) == (0, "fp32", False, [])


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_mean_0_for_the_backbone_and_are_the_adapters(stage):
    plan = plan_of(zero(stage))
    assert plan.backbone["zero_optimization"] == {"stage": 0}
    assert plan.adapter["zero_optimization"] == {"stage": stage}
    assert any(note.startswith(f"zero_optimization.stage {stage} means 0 for a frozen backbone") for note in plan.notes)
    assert plan_of(zero(stage), adapter_zero_stage=1).adapter["zero_optimization"] == {"stage": 1}


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_nontrainable_weights"])
def test_deepspeeds_own_quantising_is_refused_beside_ours(key):
    lines = refused(zero(3, **{key: True}), quantization="int8")
    assert lines == [
        f"deepspeed.zero_optimization.{key}=True stands beside quantization=int8: DeepSpeed would quantise codes once "
        "more; remove one of the two"
    ]
    assert plan_of(zero(3, **{key: False}), quantization="int8").backbone_stage == 3
    assert plan_of(zero(3, **{key: True})).backbone_stage == 3


def test_fetching_by_all_reduce_is_refused_for_a_quantised_base():
    lines = refused(zero(3, stage3_use_all_reduce_for_fetch_params=True), quantization="nf4")
    assert len(lines) == 1 and "it sums tensors of one dtype" in lines[0]


def test_plan_says_whether_the_base_lies_on_nvme():
    assert plan_of(zero(3, offload_param={"device": "nvme", "nvme_path": "/x"})).base_on_nvme
    assert not plan_of(zero(3, offload_param={"device": "cpu"})).base_on_nvme and not plan_of().base_on_nvme


def test_stage_3_keys_go_to_the_backbone_and_unknown_ones_are_noted():
    keys = {"stage3_prefetch_bucket_size": 5, "stage3_max_live_parameters": "auto", "zero_hpz_partition_size": 4}
    aio = {"queue_depth": 8}
    plan = plan_of({**zero(3, log_trace_cache_warnings=True, **keys), "aio": aio, "wall_clock_breakdown": True})
    assert plan.backbone_stage == 3
    assert plan.backbone["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 5,
        "zero_hpz_partition_size": 4,
        "log_trace_cache_warnings": True,
    }
    assert plan.backbone["aio"] == aio and plan.backbone["wall_clock_breakdown"] is True
    assert set(plan.adapter["zero_optimization"]) == {"stage"} and "aio" not in plan.adapter
    assert plan.notes == [
        "deepspeed.zero_optimization.stage3_max_live_parameters: auto leaves it to DeepSpeed's default",
        "passed on to the backbone's engine: wall_clock_breakdown, zero_optimization.log_trace_cache_warnings",
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "csv_monitor", "comet"])
def test_monitors_of_an_engine_without_steps_are_left_out_and_told(name):
    plan = plan_of({**zero(3), name: {"enabled": True, "output_path": "x"}})
    assert name not in plan.backbone and name not in plan.adapter
    assert len(plan.notes) == 1 and plan.notes[0].startswith(f"deepspeed.{name}: no effect, the base's engine takes no")
    plan = plan_of({**zero(3), name: {"enabled": False}})
    assert not plan.notes and name not in plan.backbone


def test_nodes_of_hpz_must_divide_the_processes():
    config = config_of(zero(3, zero_hpz_partition_size=4))
    for processes in (1, 2, 4, 8):  # fewer than a node has are one node
        split_deepspeed(config, world_size=processes, trainable_numbers=None)
    with pytest.raises(
        ConfigError, match="zero_hpz_partition_size=4 does not divide the 6 processes; write the number"
    ):
        split_deepspeed(config, world_size=6, trainable_numbers=None)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtype_is_the_backbones_and_the_adapter_stays_fp32(dtype):
    for plan in (plan_of(zero(3), **{dtype: True}), plan_of({dtype: {"enabled": True}})):
        assert plan.compute_dtype == dtype
        assert plan.backbone[dtype] == {"enabled": True}
        assert not {"bf16", "fp16"} & set(plan.adapter)
    assert plan_of({dtype: {"enabled": "auto"}}, **{dtype: True}).compute_dtype == dtype
    assert refused({dtype: {"enabled": False}}, **{dtype: True})[0].startswith(
        f"deepspeed.{dtype}.enabled=False disagrees with {dtype}=True; remove one"
    )


def test_both_dtypes_are_refused_wherever_they_come_from():
    assert refused({"bf16": {"enabled": True}}, fp16=True) == ["bf16=true and fp16=true; keep one of them"]
    assert plan_of({"bfloat16": {"enabled": True}}).compute_dtype == "bf16"


def test_own_loss_scaler_is_said():
    plan = plan_of({"fp16": {"enabled": True, "initial_scale_power": 12}})
    assert "deepspeed.fp16.initial_scale_power: no effect; the loss scaler is ours (powers of two)" in plan.notes


FULL_JSON = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1, "adam_w_mode": True},
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 7, "total_num_steps": 100, "warmup_type": "linear", "cos_min_ratio": 0},
    },
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


def test_values_of_the_json_are_taken_over_and_leave_it():
    config = with_deepspeed(config_of(FULL_JSON))
    assert (config.global_batch_size, config.per_device_train_batch_size) == (32, 4)
    assert (config.max_grad_norm, config.learning_rate, config.max_steps) == (0.5, 3e-4, 100)
    assert config.optimizer == OptimizerBlock(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    assert (config.lr_scheduler_type, config.warmup_steps, config.bf16) == ("cosine", 7, True)
    assert config.per_device_eval_batch_size == 4
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}
    assert with_batch(config, 2).num_grains == 8
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=4 disagrees"):
        with_batch(config, 3)
    assert "learning_rate=0.0003 comes from deepspeed.optimizer.params.lr" in take_over(config_of(FULL_JSON))[1]


def test_taking_over_again_or_after_a_dump_changes_nothing(tmp_path):
    config = with_batch(with_deepspeed(config_of(FULL_JSON)), 2)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert with_deepspeed(config) == with_deepspeed(load_config(path)) == config
    assert with_batch(with_deepspeed(load_config(path)), 3) == config


@pytest.mark.parametrize(
    ("source", "settings", "line"),
    [
        (
            {"gradient_clipping": 1.0},
            {"max_grad_norm": 0.5},
            "deepspeed.gradient_clipping=1.0 disagrees with max_grad_norm=0.5",
        ),
        (
            {"train_batch_size": 8},
            {"global_batch_size": 4},
            "deepspeed.train_batch_size=8 disagrees with global_batch_size=4",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
            {"learning_rate": 2},
            "deepspeed.optimizer.params.lr=1 disag",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
            {"optimizer": {"betas": [0.9, 0.999]}},
            "deepspeed.optimizer.params.betas=[0.9, 0.95] disagrees with optimizer.betas=(0.9, 0.999); remove one",
        ),
        (
            {
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2}},
            },
            {},
            "deepspeed.scheduler.params.warmup_max_lr=0.01 disagrees with deepspeed.optimizer.params.lr=0.001",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {"lr_scheduler_type": "linear"},
            "deepspeed.scheduler.type=constant disag",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}},
            {"num_train_epochs": 2},
            "deepspeed.scheduler.params.total_num_steps=9 stands beside num_train_epochs; remove one",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
            {"warmup_ratio": 0.1},
            "deepspeed.scheduler.params.warmup_num_steps stands beside warmup_ratio; remove one",
        ),
    ],
)
def test_disagreements_are_errors(source, settings, line):
    lines = refused(source, **settings)
    assert len(lines) == 1
    assert lines[0].startswith(line), lines


def test_values_that_agree_or_are_auto_are_fine():
    agreeing = config_of(FULL_JSON, learning_rate=3e-4, optimizer={"betas": [0.8, 0.9]}, max_grad_norm=0.5, bf16=True)
    assert with_deepspeed(agreeing) == with_deepspeed(config_of(FULL_JSON))
    auto = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "warmup_min_lr": "auto"}},
    }
    config, notes = take_over(config_of(auto, learning_rate=5e-4, max_steps=9))
    assert (config.learning_rate, config.max_steps, config.deepspeed) == (5e-4, 9, {})
    assert any("torch_adam has no effect" in note for note in notes)
    assert any("warm-up is linear" in note for note in notes)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            {"elasticity": {"enabled": True}},
            "deepspeed.elasticity is gone from DeepSpeed; remove it, let the scheduler requeue",
        ),
        ({"optimizer": {"type": "Lion"}}, "deepspeed.optimizer.type=Lion is not built"),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "deepspeed.optimizer.params.adam_w_mode=False is",
        ),
        ({"optimizer": "AdamW"}, "deepspeed.optimizer=AdamW is no block"),
        ({"scheduler": {"type": "OneCycle"}}, "deepspeed.scheduler.type=OneCycle is not built; write one of WarmupLR"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}},
            "deepspeed.scheduler.params.warmup_type=log must be linear here",
        ),
        (zero(4), "deepspeed.zero_optimization.stage=4 is no ZeRO stage; write 0 or 3"),
        ({"zero_optimization": True}, "deepspeed.zero_optimization=True is no block"),
        (zero(3, offload_param=True), "deepspeed.zero_optimization.offload_param=True is no block"),
        (zero(3, offload_param={"device": "disk"}), "deepspeed.zero_optimization.offload_param.device=disk is unknown"),
        (
            zero(0, zero_hpz_partition_size=2),
            "deepspeed.zero_optimization.zero_hpz_partition_size=2 needs stage 3 (it is",
        ),
        (
            zero(3, zero_hpz_partition_size="all"),
            "deepspeed.zero_optimization.zero_hpz_partition_size=all is no count of processes; write the number",
        ),
        (
            zero(2, offload_param={"device": "cpu"}),
            "deepspeed.zero_optimization.offload_param.device=cpu needs zero_optimization.stage 3 (it is 2)",
        ),
        (
            zero(3, offload_param={"device": "nvme"}),
            "deepspeed.zero_optimization.offload_param.nvme_path=None names no folder; give one on a local NVMe disk",
        ),
        (zero(0, cpu_offload=True), "deepspeed.zero_optimization.cpu_offload is an old name; write offload_optimizer"),
        (
            zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "deepspeed.zero_optimization.offload_optimizer.ratio needs ZeRO-3",
        ),
    ],
)
def test_what_is_not_built_is_refused(source, line):
    lines = refused(source)
    assert len(lines) == 1
    assert lines[0].startswith(line), lines


def test_optimizer_offload_to_nvme_is_refused_with_what_it_would_save():
    source = zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/x"})
    (line,) = refused(source)
    assert line == (
        "deepspeed.zero_optimization.offload_optimizer.device=nvme needs ZeRO-3, which adapters do not use; write cpu, "
        "or remove the block"
    )
    (line,) = refused(source, trainable_numbers=2**20)
    assert "and would save 6.0 MiB on each process" in line  # 12 bytes a number over 2 processes


def test_optimizer_offload_goes_to_the_adapter_with_the_exact_kernel():
    source = zero(3, offload_optimizer={"device": "cpu", "pin_memory": True, "buffer_count": 4})
    plan = plan_of(source)
    assert plan.optimizer_offload
    assert plan.backbone["zero_optimization"] == {"stage": 3}
    assert plan.adapter["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert plan.adapter["zero_force_ds_cpu_optimizer"] is False
    assert plan.notes == ["zero_optimization.offload_optimizer.buffer_count: no effect on adapters"]
    faster = plan_of(source, offload_optimizer_kernel="cpu_adam")
    assert "zero_force_ds_cpu_optimizer" not in faster.adapter
    assert any("same number of processes only" in note for note in faster.notes)


def test_blocks_with_device_none_mean_no_offload():
    plan = plan_of(zero(0, offload_param={"device": "none"}, offload_optimizer={"device": "none"}))
    assert plan.backbone["zero_optimization"] == {"stage": 0}
    assert not plan.optimizer_offload


def test_reduce_bucket_is_as_large_as_the_arena():
    assert plan_of(trainable_numbers=640).adapter["zero_optimization"]["reduce_bucket_size"] == 640


def test_splitting_leaves_the_config_as_it_was():
    config = config_of(FULL_JSON)
    before = json.dumps(config.deepspeed)
    split_deepspeed(config, world_size=2)
    assert json.dumps(config.deepspeed) == before
    assert (
        split_deepspeed(with_deepspeed(config), world_size=2).backbone == split_deepspeed(config, world_size=2).backbone
    )


def test_named_configs_are_all_there_and_described():
    folder = deepspeed_folder()
    assert sorted(path.stem for path in folder.glob("*.json")) == NAMES
    readme = (folder / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "zero3_nvme"])
def test_named_config_gives_a_plan_without_surprises(name):
    plan = plan_of(name)
    assert plan.backbone_stage == (3 if name.startswith("zero3") else 0)
    assert ("offload_param" in plan.backbone["zero_optimization"]) == ("offload" in name)
    assert plan.optimizer_offload == (name == "zero3_offload")
    assert plan.adapter["zero_optimization"]["stage"] == (2 if name == "zero2" else 1)
    assert not any("passed on" in note for note in plan.notes)


def test_nvme_needs_a_path_which_an_override_gives(tmp_path):
    (line,) = refused("zero3_nvme")
    assert line.startswith(f"deepspeed.zero_optimization.offload_param.nvme_path={NVME_PLACEHOLDER} names no folder")
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(BASE | {"deepspeed": "zero3_nvme"}))
    config = load_config(path, ["deepspeed.zero_optimization.offload_param.nvme_path=/local/nvme"])
    plan = split_deepspeed(config, world_size=1)
    assert plan.backbone["zero_optimization"]["offload_param"]["nvme_path"] == "/local/nvme"
    assert plan.backbone["aio"]["queue_depth"] == 8


def test_json_by_path_and_the_ways_it_fails(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(zero(3)))
    assert plan_of(str(path)).backbone_stage == 3
    path.write_text("{,}")
    assert refused(str(path))[0].startswith(f"deepspeed={path} is no JSON (line 1")
    path.write_text("[]")
    assert refused(str(path)) == [f"deepspeed={path} holds no JSON object; write one in braces"]
    path.write_text('{"wandb": {"api_key": "xyzzy"}}')
    (line,) = refused(str(path))
    assert line.startswith("deepspeed.wandb.api_key looks like a secret") and "xyzzy" not in line
    assert refused(str(tmp_path / "none.json"))[0].startswith(f"deepspeed={tmp_path / 'none.json'} cannot be read")
    assert refused("zero5") == [f"deepspeed=zero5 is neither a file nor one of {', '.join(NAMES)}; give one of them"]


def test_named_configs_are_found_beside_the_installed_package(tmp_path, monkeypatch):
    from ardtrain.config import text

    package = tmp_path / "ardtrain"
    (package / "ds_configs").mkdir(parents=True)
    (package / "config").mkdir()
    monkeypatch.setattr(text, "__file__", str(package / "config" / "text.py"))
    assert text.deepspeed_folder() == package / "ds_configs"
    (package / "ds_configs").rmdir()
    assert text.deepspeed_folder() == Path(tmp_path / "ds_configs")


# ---- method full: one engine, the whole file ----


def full_plan(deepspeed=None, **settings):
    return plan_of(deepspeed, method="full", **settings)


def full_refused(deepspeed, **settings):
    return refused(deepspeed, method="full", **settings)


def test_full_without_a_json_is_zero_1():
    plan = full_plan(per_device_train_batch_size=3, global_batch_size=15, max_grad_norm=0.5, trainable_numbers=640)
    assert plan.full == {
        "train_batch_size": 18,  # DeepSpeed's rule: 3 x 3 rounds x 2 processes; of 6 grains dealt one is a repeat
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 640},
    }
    assert (plan.backbone, plan.adapter) == ({}, {})
    assert (plan.backbone_stage, plan.compute_dtype, plan.optimizer_offload, plan.notes) == (1, "fp32", False, [])
    assert plan_of().full is None


def test_full_takes_the_whole_json():
    source = {
        **zero(
            3,
            stage3_prefetch_bucket_size=5,
            stage3_max_live_parameters="auto",
            reduce_bucket_size=7,
            offload_param={"device": "nvme", "nvme_path": "/local/nvme", "buffer_count": 4},
            offload_optimizer={"device": "cpu", "pin_memory": True, "buffer_count": 4},
        ),
        "aio": {"queue_depth": 8},
        "wall_clock_breakdown": True,
        "fp16": {"enabled": True, "initial_scale_power": 12, "hysteresis": "auto"},
    }
    plan = full_plan(source, trainable_numbers=640, global_batch_size=2)
    assert plan.full == {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 5,
            "reduce_bucket_size": 7,
            "offload_param": {"device": "nvme", "nvme_path": "/local/nvme", "buffer_count": 4},
            "offload_optimizer": {"device": "cpu", "pin_memory": True, "buffer_count": 4},
        },
        "aio": {"queue_depth": 8},
        "wall_clock_breakdown": True,
        "fp16": {"enabled": True, "initial_scale_power": 12},
        "zero_force_ds_cpu_optimizer": False,
    }
    assert (plan.backbone_stage, plan.compute_dtype, plan.optimizer_offload) == (3, "fp16", True)
    assert not any("no effect" in note or "passed on" in note for note in plan.notes)
    assert "zero_force_ds_cpu_optimizer" not in full_plan(source, offload_optimizer_kernel="cpu_adam").full


def test_full_takes_over_the_run_and_splits_alike_before_and_after():
    config = config_of(FULL_JSON | {"fp16": {"hysteresis": 3}}, method="full")
    once = with_deepspeed(config)
    assert (once.learning_rate, once.bf16, once.max_grad_norm) == (3e-4, True, 0.5)
    assert once.deepspeed == {"zero_optimization": {"stage": 3}, "fp16": {"hysteresis": 3}}
    assert with_deepspeed(once) == once
    plan = split_deepspeed(once, world_size=2)
    assert plan.full == split_deepspeed(config, world_size=2).full
    assert plan.full["train_batch_size"] == 32 and plan.full["gradient_accumulation_steps"] == 4
    assert plan.full["bf16"] == {"enabled": True} and "fp16" not in plan.full
    assert not {"optimizer", "scheduler"} & set(plan.full)


def test_full_adds_bf16_gradients_in_float32_unless_told_otherwise():
    several = {"bf16": True, "global_batch_size": 4}
    plan = full_plan(**several)
    assert plan.full["data_types"] == {"grad_accum_dtype": "fp32"}
    assert plan.notes == ["gradients of a step's grains are added in float32 (data_types.grad_accum_dtype)"]
    assert "data_types" not in full_plan(bf16=True, global_batch_size=2).full  # one grain a process: nothing to add
    assert "data_types" not in full_plan(global_batch_size=4).full
    own = full_plan({"data_types": {"grad_accum_dtype": "bf16"}}, **several)
    assert own.full["data_types"] == {"grad_accum_dtype": "bf16"} and own.notes == []


def test_full_stage_0_is_1_and_says_so():
    plan = full_plan(zero(0))
    assert plan.full["zero_optimization"]["stage"] == plan.backbone_stage == 1
    assert [note.split(":")[0] for note in plan.notes] == ["zero_optimization.stage 0 means 1 for method=full"]
    assert full_plan(zero(2)).full["zero_optimization"]["stage"] == 2
    assert full_plan(zero(2)).notes == []  # adapter_zero_stage is of no concern


def test_full_allows_nvme_at_stage_3_and_says_what_it_costs():
    nvme = {"device": "nvme", "nvme_path": "/local/nvme"}
    plan = full_plan(zero(3, offload_optimizer=nvme, offload_param=nvme))
    assert plan.full["zero_optimization"]["offload_optimizer"] == nvme
    assert [note.split(":")[0] for note in plan.notes] == ["offload_optimizer to NVMe"]
    name = "deepspeed.zero_optimization.offload_optimizer"
    (line,) = full_refused(zero(2, offload_optimizer=nvme))
    assert line == f"{name}.device=nvme needs zero_optimization.stage 3 (it is 2); set it, or write cpu"
    (line,) = full_refused(zero(3, offload_optimizer={"device": "nvme"}))
    assert line.startswith(f"{name}.nvme_path=None names no folder")
    none = full_plan(zero(3, offload_param={"device": "none"}, offload_optimizer={"device": "none"}))
    assert none.full["zero_optimization"] == {"stage": 3} and not none.optimizer_offload


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (zero(4), "deepspeed.zero_optimization.stage=4 is no ZeRO stage; write 1, 2 or 3"),
        (zero(1, compute_grad_norm=False), "deepspeed.zero_optimization.compute_grad_norm=False: a step that is not"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "deepspeed.bf16.check_grad_overflow=False: a step"),
        ({"managed_gradient_accumulation": False}, "deepspeed.managed_gradient_accumulation=False: the loop sets"),
        ({"sequence_parallel_size": 2}, "deepspeed.sequence_parallel_size=2: all processes are data-parallel; remove"),
        ({"tensor_parallel": {"autotp_size": 2}}, "deepspeed.tensor_parallel.autotp_size=2: all processes are data-"),
        ({"torch_autocast": {"enabled": True}}, "deepspeed.torch_autocast.enabled=True: held-out loss would be"),
        ({"gradient_predivide_factor": 2.0}, "deepspeed.gradient_predivide_factor=2.0: sums would hang on the stage"),
        (zero(1, cpu_offload=True), "deepspeed.zero_optimization.cpu_offload is an old name"),
        (
            zero(1, offload_param={"device": "cpu"}),
            "deepspeed.zero_optimization.offload_param.device=cpu needs zero_op",
        ),
        (zero(3, offload_optimizer={"device": "disk"}), "deepspeed.zero_optimization.offload_optimizer.device=disk is"),
        (
            zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "deepspeed.zero_optimization.offload_optimizer.ratio=0.5 needs offload_optimizer_kernel=cpu_adam; set it",
        ),
    ],
)
def test_full_refuses_what_breaks_its_promises(source, line):
    lines = full_refused(source)
    assert len(lines) == 1
    assert lines[0].startswith(line), lines


@pytest.mark.parametrize("name", [name for name in NAMES if name != "zero3_nvme"])
def test_named_configs_serve_full_as_well(name):
    plan = full_plan(name)
    stage = int(name.removeprefix("zero")[0])
    assert plan.full["zero_optimization"]["stage"] == plan.backbone_stage == max(1, stage)
    assert (
        plan.optimizer_offload == ("offload_optimizer" in plan.full["zero_optimization"]) == (name == "zero3_offload")
    )
