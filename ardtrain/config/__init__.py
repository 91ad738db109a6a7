"""The one YAML file of a run: models with every default, aliases, overrides, cross-field rules.

A config is read by `load_config`, completed by `deepspeed_config.with_deepspeed` (what the user's DeepSpeed JSON says)
and `with_batch` (the global batch size), and written into the run folder by `dump_config`, which `load_config` reads
back to an equal object. Every mistake is a `ConfigError`: one line each of setting, value, rule, remedy; all at once.
"""

from ardtrain.config.data import DataBlock, SourceBlock
from ardtrain.config.evaluation import BY_ROW, GENERATED, OF_ALL, ROUGE, EvaluationBlock, best_metric
from ardtrain.config.launcher import LauncherBlock
from ardtrain.config.methods import (
    METHODS,
    AloraBlock,
    ArdLoraBlock,
    ElaLoraBlock,
    ProbeLoraBlock,
    alora_steps,
    ard_lora_warmups,
)
from ardtrain.config.models import (
    AdapterSettings,
    OptimizerBlock,
    RunConfig,
    TargetBlock,
    adapter_settings,
    is_greater_better,
    num_warmup_steps,
    schedule_errors,
)
from ardtrain.config.reading import (
    ALIASES,
    BLOCKS,
    accumulation_steps,
    check_schedule,
    dump_config,
    load_config,
    parse_config,
    updated,
    with_batch,
)
from ardtrain.config.text import ConfigError, read_deepspeed_json

__all__ = [
    "ALIASES",
    "BLOCKS",
    "BY_ROW",
    "GENERATED",
    "METHODS",
    "OF_ALL",
    "ROUGE",
    "AdapterSettings",
    "AloraBlock",
    "ArdLoraBlock",
    "ConfigError",
    "DataBlock",
    "ElaLoraBlock",
    "EvaluationBlock",
    "LauncherBlock",
    "OptimizerBlock",
    "ProbeLoraBlock",
    "RunConfig",
    "SourceBlock",
    "TargetBlock",
    "accumulation_steps",
    "adapter_settings",
    "alora_steps",
    "ard_lora_warmups",
    "best_metric",
    "check_schedule",
    "dump_config",
    "is_greater_better",
    "load_config",
    "num_warmup_steps",
    "parse_config",
    "read_deepspeed_json",
    "schedule_errors",
    "updated",
    "with_batch",
]
