"""Trains a tokenizer and a small Llama on docs.jsonl, in about a minute, with plain PyTorch; saves both in one folder.

    python examples/quickstart/pretrain.py DOCS.JSONL FOLDER [STEPS]

The folder is what a downloaded model is: config.json, safetensors, tokenizer.json. ardtrain knows nothing of this file.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
CONTEXT = 256  # tokens
ROWS = 4  # of a step
STEPS = 360
LEARNING_RATE = 4e-3
SPECIAL = ["<pad>", "<s>", "</s>"]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, also code that the documentation does not show."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """4 layers, 8 heads of 32 that share 2 key-value heads.

    q, o, gate, up and down all have inputs + outputs = 128 + 256, so a component costs the same wherever it sits: the
    adapter's size does not change when its ranks move.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def main(docs: Path, folder: Path, steps: int) -> None:
    """Tokenizer, model, AdamW with warm-up and cosine, save."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    torch.set_num_threads(1)  # the same sums everywhere; more threads on a busy machine wait for each other
    texts = [json.loads(line)["text"] for line in docs.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts)
    ids: list[int] = []
    for text in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    model = make_model(tokenizer).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"  {VOCABULARY} tokens in the vocabulary, {len(ids):,} of text; {num_parameters:,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    order = torch.randperm(len(rows))
    start, losses = time.monotonic(), []
    bar = tqdm(range(steps), unit="step", desc="pre-training", mininterval=0.5)
    for step in bar:
        chosen = torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)
        batch = rows[order[chosen]].to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    bar.close()
    last = sum(losses[-20:]) / len(losses[-20:])
    print(f"  loss {losses[0]:.2f} -> {last:.2f} in {steps} steps, {time.monotonic() - start:.0f} s")
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else STEPS)
