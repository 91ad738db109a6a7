"""Where a step's time goes: torch's profiler over a few steps, and each part's share of its CPU seconds."""

import functools
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ardtrain.tracing import PREFIX

GEMMS = ("aten::mm", "aten::addmm", "aten::matmul", "aten::linear", "aten::bmm", "aten::baddbmm", "mkl")
PARTS = {  # part in the code -> what the table calls it
    "frozen": "frozen products",
    "adapter": "adapters' products",
    "loss": "loss",
    "zero": "ZeRO-3: hooks and gathers",
    "sum": "exact sum",
    "clip": "mean, norm, finite, extra loss",
    "scores": "scores",
    "optimizer": "optimizer (DeepSpeed, AdamW)",
    "wait": "all-reduce and the host's wait",
    "forward": "attention, norms and all else of the model",
    "backward": "attention, norms and all else of the model",
    "step": "rest of the loop",
}
LOSS_NODES = ("NllLoss", "LogSoftmax", "CrossEntropy")
HOOKS = (
    "pre_sub_module_forward_function", "post_sub_module_forward_function", "pre_sub_module_backward_function",
    "post_sub_module_backward_function", "partition_all_parameters",
)  # fmt: skip


def name_zero_hooks():
    """Gives ZeRO-3's work around each module a name in the profile."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    for name in HOOKS:
        whole = getattr(DeepSpeedZeRoOffload, name)

        def named(*args, whole=whole, **kwargs):
            with record_function(PREFIX + "zero"):
                return whole(*args, **kwargs)

        setattr(DeepSpeedZeRoOffload, name, functools.wraps(whole)(named))


def trace(step, folder, *, steps, dp_rank):
    """Runs `step` under the profiler; writes a chrome trace to the folder and returns the parts' shares.

    Returns:
        {"shares": part -> share of the CPU seconds, "seconds_a_step": with the profiler, which costs some itself}
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(PREFIX + "step"):
                step()
    Path(folder).mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(Path(folder) / f"step-process-{dp_rank}.json"))
    seconds = {}
    for event in profiler.events():
        label = part_of(event)
        if label is not None:
            own = event.self_cpu_time_total
            if torch.cuda.is_available():
                own = event.self_device_time_total
            seconds[label] = seconds.get(label, 0.0) + own / 1e6
    whole = sum(seconds.values())
    shares = {label: value / whole for label, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return {"seconds_a_step": whole / steps, "shares": shares}


def part_of(event):
    """The part an event's own time belongs to: the innermost named one around it; None outside of a step."""
    gemm, inside = event.name in GEMMS, event
    while inside is not None:
        if inside.name.startswith(PREFIX):
            part = inside.name.removeprefix(PREFIX)
            if part in ("forward", "backward") and gemm:
                return "output embedding and attention's products"
            return PARTS[part]
        if any(node in inside.name for node in LOSS_NODES):
            return PARTS["loss"]
        inside = inside.cpu_parent
    return None


def table(result):
    """The shares, a line each."""
    lines = [f"{value:7.1%}  {label}" for label, value in result["shares"].items()]
    return "\n".join([*lines, json.dumps({"seconds_a_step": result["seconds_a_step"]})])
