"""Prints held-out loss and size of a LoRA and an ElaLoRA run beside the base's, from the files of the two run folders.

python examples/quickstart/table.py LORA_RUN ELALORA_RUN
"""

import json
import math
import sys
from pathlib import Path

from safetensors import safe_open


def held_out_losses(run: Path) -> dict[int, float]:
    """Step -> held-out loss; step 0 is the base, since adapters start at zero."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


def num_adapter_numbers(run: Path) -> int:
    """Numbers in the exported adapter; ElaLoRA's diagonal is folded into B there."""
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def main(lora: Path, elalora: Path) -> None:
    """Reads the two folders and prints."""
    lora_losses, elalora_losses = held_out_losses(lora), held_out_losses(elalora)
    if lora_losses[0] != elalora_losses[0]:
        sys.exit(f"the base's loss differs: {lora_losses[0]} in {lora}, {elalora_losses[0]} in {elalora}")
    last = max(lora_losses)
    rows = [
        ("base", lora_losses[0], "0"),
        ("LoRA", lora_losses[last], f"{num_adapter_numbers(lora):,}"),
        ("ElaLoRA", elalora_losses[max(elalora_losses)], f"{num_adapter_numbers(elalora):,}"),
    ]
    print(f"{'':10}{'held-out loss':>14}{'perplexity':>12}{'adapter numbers':>17}")
    for name, loss, size in rows:
        print(f"{name:10}{loss:14.4f}{math.exp(min(loss, 700.0)):12.1f}{size:>17}")
    print(f"(one seed, {last} steps; nats a token; a small demonstration, not a comparison of the methods)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
