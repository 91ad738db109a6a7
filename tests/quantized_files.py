"""Checkpoints as bitsandbytes stores them, made without it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ardtrain.quantized import quantize_int8, quantize_nf4
from ardtrain.targets import base_linears
from tests.tiny import tiny_llama

GOLDEN = Path(__file__).parent / "goldens" / "bitsandbytes.safetensors"  # bitsandbytes' own files


def save_by_bitsandbytes(folder, kind):
    """Writes a tiny Llama whose linears are in bitsandbytes' format; returns the model that they decode to."""
    model = tiny_llama()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    table = load_file(GOLDEN)["nf4.linear.weight.quant_map"]
    for name, linear in base_linears(model).items():
        weight = linear.weight
        if kind == "int8":
            codes, scales = quantize_int8(weight)
            tensors |= {f"{name}.weight": codes, f"{name}.SCB": scales * 127}
            weight.copy_(codes * (tensors[f"{name}.SCB"] / 127)[:, None])
            continue
        codes, scales = quantize_nf4(weight.reshape(-1))
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        tensors |= {
            f"{name}.weight": codes.view(-1, 1),
            f"{name}.weight.absmax": scales,
            f"{name}.weight.quant_map": table.clone(),
            f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }
        pairs = torch.stack([codes >> 4, codes & 15], dim=2).view(len(codes), -1)
        weight.copy_((table[pairs.int()] * scales[:, None]).view(weight.shape))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": kind == "nf4"}
    model.config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    del model.config.quantization_config
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model
