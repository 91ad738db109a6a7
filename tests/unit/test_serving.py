"""An exported folder read as vLLM 0.30 reads it, without vLLM and without a GPU: training's logits come out.

vLLM's rules (0.30.0: lora/peft_helper.py, lora_model.py, lora_weights.py, utils.py, layers/base_linear.py), written
down anew: of adapter_config.json only r, lora_alpha, use_rslora, use_dora, modules_to_save and bias are looked at; the
rank of a matrix is that of its tensors, and r alone is held against max_lora_rank; every product is scaled by the one
lora_alpha / r, which is multiplied into B; names end in lora_A.weight or lora_B.weight or the adapter is refused; pairs
lie in buffers of max_lora_rank rows, zero behind their own.
"""

import json
import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ardtrain.export import SERVER_RANKS
from ardtrain.exporting import export_peft
from ardtrain.trained import bound_model, load_base, logits_of, open_trained, probe_inputs
from tests.trained_runs import FORMS, PLAIN, classification_config, make_run

KINDS = {name: FORMS[name] for name in ("even", "uneven", "diagonal", "heads", "shared heads", "rslora")}


class ServerError(ValueError):
    """The server refuses the adapter."""


def served(folder, model, *, max_lora_rank=16):
    """The model with the folder's pairs beside its linears, as the server has them."""
    described = json.loads((folder / "adapter_config.json").read_text())
    r, alpha = described["r"], described["lora_alpha"]
    scaling = alpha / math.sqrt(r) if described.get("use_rslora") else alpha / r
    if r > max_lora_rank or max_lora_rank not in SERVER_RANKS:
        raise ServerError(f"LoRA rank {r} is greater than max_lora_rank {max_lora_rank}")
    if described.get("use_dora") or described.get("modules_to_save") or described.get("bias", "none") != "none":
        raise ServerError("DoRA, modules_to_save or bias")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    pairs = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            parts = name.split(".")
            if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
                raise ServerError(f"{name} is unsupported LoRA weight")
            module = ".".join(parts[2:-2])
            if module not in linears:
                raise ServerError(f"unexpected module {module}")
            pairs.setdefault(module, {})[parts[-2]] = file.get_tensor(name)
    for module, pair in pairs.items():
        linear, a, b = linears[module], pair["lora_A"], pair["lora_B"] * scaling
        down, up = torch.zeros(max_lora_rank, linear.in_features), torch.zeros(linear.out_features, max_lora_rank)
        down[: len(a)], up[:, : b.shape[1]] = a, b

        def add(linear, inputs, out, down=down, up=up):
            return out + inputs[0] @ down.T @ up.T

        linear.register_forward_hook(add)
    return model


@pytest.mark.parametrize("uniform", [False, True], ids=["", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_ignores_patterns_computes_what_training_did(tmp_path, kind, uniform):
    trained = open_trained(make_run(tmp_path, **KINDS[kind]))
    export_peft(trained, tmp_path / "out", uniform_rank=uniform, without_base=True)
    base = load_base(trained)
    inputs = probe_inputs(trained, base)
    logits = logits_of(bound_model(trained), inputs)
    assert float((logits_of(base, inputs) - logits).abs().max()) > 0.1
    difference = (logits_of(served(tmp_path / "out", base), inputs) - logits).abs().max()
    assert float(difference) <= 1e-5 * float(logits.abs().max())


def test_the_server_of_this_test_would_show_the_trap(tmp_path):
    """Uneven ranks with each module's own alpha and no scale folded in, as PEFT's patterns allow: other logits."""
    trained = open_trained(make_run(tmp_path, **KINDS["uneven"]))
    export_peft(trained, tmp_path / "out", without_base=True)
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 8}))
    base = load_base(trained)
    inputs = probe_inputs(trained, base)
    logits = logits_of(bound_model(trained), inputs)
    assert float((logits_of(served(tmp_path / "out", base), inputs) - logits).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["dora", "token rows", "head"])
def test_what_the_server_refuses_the_export_says(tmp_path, kind):
    if kind == "head":
        run_dir = make_run(tmp_path, config=classification_config(tmp_path))
    else:
        settings = {"method": "dora"} if kind == "dora" else {"method": "lora", "trainable_tokens": [5]}
        run_dir = make_run(tmp_path, elalora=None, **settings)
    trained = open_trained(run_dir)
    lines = export_peft(trained, tmp_path / "out", without_base=True)
    assert any("which PEFT reads and vLLM 0.30 refuses; `ardtrain merge`" in line for line in lines)
    with pytest.raises(ServerError, match="DoRA, modules_to_save or bias|is unsupported LoRA weight"):
        served(tmp_path / "out", load_base(trained))


def test_the_largest_rank_is_held_against_the_servers(tmp_path):
    trained = open_trained(make_run(tmp_path, **PLAIN, r=17, target_modules=["q_proj", "down_proj"]))
    lines = export_peft(trained, tmp_path / "out", without_base=True)
    assert any("start it with --max-lora-rank 32" in line for line in lines)
    with pytest.raises(ServerError, match="LoRA rank 17 is greater than max_lora_rank 16"):
        served(tmp_path / "out", load_base(trained))
    served(tmp_path / "out", load_base(trained), max_lora_rank=32)
