"""Makes tests/goldens/bitsandbytes.safetensors: one weight as bitsandbytes stores it, and as it dequantises it.

pip install bitsandbytes==0.50.2 (on the CPU; no dependency of ours), then python -m tests.goldens.make_bitsandbytes

Per way (nf4, nf4_nested, fp4, int8): the tensors of a checkpoint under WAY.linear.*, and WAY.expected [24, 64] float32.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

TARGET = Path(__file__).with_name("bitsandbytes.safetensors")


def main():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    tensors = {}
    for way, kind, nested in (("nf4", "nf4", False), ("nf4_nested", "nf4", True), ("fp4", "fp4", False)):
        codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        tensors[f"{way}.linear.weight"] = codes
        tensors |= {f"{way}.linear.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors[f"{way}.expected"] = bnb.dequantize_4bit(codes, state)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors |= {"int8.linear.weight": codes, "int8.linear.SCB": scales}
    tensors["int8.linear.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    tensors["int8.expected"] = bnb.int8_vectorwise_dequant(codes, scales)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, TARGET)


if __name__ == "__main__":
    main()
