"""Which settings a resume may change, and what changed since a run's last start."""

from __future__ import annotations

from typing import Any

from ardtrain.config.models import RunConfig

# Settings that a resume may change; all others make it another run.
CHANGEABLE = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_steps", "num_train_epochs"),
    *("eval_steps", "eval_on_start", "max_eval_samples", "per_device_eval_batch_size", "logging_steps", "save_steps"),
    *("save_total_limit", "max_skipped_steps", "gradient_checkpointing", "attn_implementation", "check_every"),
    *("loss_chunk_tokens", "activation_offload", "metric_for_best_model", "greater_is_better", "eval_metrics"),
    *("early_stopping_patience", "early_stopping_threshold"),
)
# Settings that say where and how, not what: a resume need not even tell them. (The data have a fingerprint.)
ELSEWHERE = (
    *("schema_version", "model_name_or_path", "revision", "trust_remote_code", "tokenizer_name_or_path", "data"),
    *("output_dir", "gradient_accumulation_steps", "adapter_zero_stage", "deepspeed", "launcher"),
    *("resume_from_checkpoint", "ranks_from", "init_from", "zero_checkpoint", "allow_pickle", "preemption_signal"),
    *("stop_poll_seconds", "max_hours", "watchdog_seconds", "collective_timeout_seconds", "log_scores"),
    *("verify_weights", "chat_template", "bf16", "fp16", "report_to", "run_name", "evaluation"),
)


def differences(before: RunConfig, now: RunConfig) -> tuple[list[str], list[str]]:
    """Lines `setting: before -> now` of what changed: what a resume takes, and what makes it another run.

    Base, data and dtype are in the first list: their fingerprints decide at the resume. What the first start derived
    (the global batch) and `now` leaves open is no change.
    """
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    taken: list[str] = []
    refused: list[str] = []
    for name, was, value in _changed(old, new, now.model_fields_set):
        line = f"{name}: {was} -> {value}"
        top = name.partition(".")[0]
        (taken if top in (*CHANGEABLE, *ELSEWHERE) else refused).append(line)
    return taken, refused


def _changed(old: dict[str, Any], new: dict[str, Any], given: set[str]) -> list[tuple[str, Any, Any]]:
    out = []
    for name in new:
        if old[name] == new[name] or name not in given and new[name] is None:
            continue
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            inner = {*old[name], *new[name]}
            pairs = [(key, old[name].get(key), new[name].get(key)) for key in sorted(inner)]
            out += [(f"{name}.{key}", was, value) for key, was, value in pairs if was != value]
        else:
            out.append((name, old[name], new[name]))
    return out
