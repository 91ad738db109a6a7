"""A tiny PaliGemma-2 for benchmarks: words as tokens, training in full by plain PyTorch, answers by generation.

No benchmark of its own: digits_vqa, nlvr and multimodal_memory share it.
"""

import json
import math
import subprocess
import sys
from collections import Counter, defaultdict

import torch
from peft import PeftModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from ardtrain.prefix_mask import token_types

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"]
PAD_ID, EOS_ID, BOS_ID, IMAGE_ID, HIDDEN = 0, 1, 2, 4, 64


def read(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    """The rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_picture(pixels, path):
    """[H, W] grey or [H, W, 3] values 0 to 1 as PNG, once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255).round().to(torch.uint8).numpy()).save(path)


def make_tokenizer(texts):
    """One token a word of the texts."""
    pattern = r"\n|\w+|[^\w\s]"
    words = sorted({w for text in texts for w, _ in _cut(pattern, text) if w.strip()})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "\n", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    pad, eos, bos, unk, image = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, unk_token=unk,
        extra_special_tokens={"image_token": image},
    )  # fmt: skip


def _cut(pattern, text):
    return pre_tokenizers.Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(text)


def ids_of(tokenizer, texts):
    """Ids of each text, without special tokens."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def make_model(vocabulary, *, size, patch, layers=4, mlp=4, window=16, spread=0.02):
    """SigLIP of 2 layers and Gemma-2 of `layers`, random; a token for each patch.

    mlp: widths of its hidden state that Gemma-2's MLP has; window: tokens back that every other layer of it sees;
    spread: standard deviation of its first weights.
    """
    vision = SiglipVisionConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2, num_attention_heads=4, image_size=size,
        patch_size=patch, vision_use_head=False,
    )  # fmt: skip
    text = Gemma2Config(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=mlp * HIDDEN, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=window,
        max_position_embeddings=256, initializer_range=spread,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE_ID,
            vocab_size=vocabulary, projection_dim=HIDDEN, hidden_size=HIDDEN, pad_token_id=PAD_ID, eos_token_id=EOS_ID,
            bos_token_id=BOS_ID,
        )
    )  # fmt: skip


def num_image_tokens(model_config):
    """Tokens of a picture."""
    vision = model_config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def train_in_full(model, batch_of, *, steps, rate, beside=None):
    """Trains every weight, plain PyTorch and AdamW; returns the mean loss of the last 50 steps.

    batch_of: step -> (prompts with their newline and answers as lists of ids, pixels [B, 3, H, W] from -1 to 1).
    beside: a module that gives, after the model's forward, a loss to add; its weights are trained as well.
    """
    weights = [p for module in (model, beside) if module is not None for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    count, losses = num_image_tokens(model.config), []
    for step in range(steps):
        prompts, answers, pixels = batch_of(step)
        before = [[IMAGE_ID] * count + [BOS_ID, *prompt] for prompt in prompts]
        rows = [torch.tensor([*b, *answer, EOS_ID]) for b, answer in zip(before, answers, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        types, there = token_types([len(b) for b in before], ids.shape[1]), ids != PAD_ID
        loss = model(
            input_ids=ids, pixel_values=pixels, token_type_ids=types, attention_mask=there.long(), use_cache=False,
            labels=ids.masked_fill((types == 0) | ~there, -100),
        ).loss  # fmt: skip
        (loss if beside is None else loss + beside()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 99:
            mean = sum(losses[-30:]) / 30
            print(f"pre-training step {step + 1}: loss {mean:.3f}", file=sys.stderr, flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def save_base(folder, model, tokenizer):
    """As a hub folder has them."""
    size = model.config.vision_config.image_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    processor.image_seq_length = num_image_tokens(model.config)
    processor.save_pretrained(folder)


def adapt(work, name, settings):
    """One run of ardtrain on work/base, work/train.jsonl and work/dev.jsonl: held-out loss and exact match by step."""
    run = work / name
    steps = settings["max_steps"]
    config = {
        "model_name_or_path": str(work / "base"), "output_dir": str(run), "task": "image_text_to_text",
        "data": {"train_file": str(work / "train.jsonl"), "eval_file": str(work / "dev.jsonl")},
        "per_device_eval_batch_size": 100, "warmup_ratio": 0.05, "lr_scheduler_type": "cosine", "eval_on_start": True,
        "eval_steps": steps // 2, "logging_steps": 50, **settings,
    }  # fmt: skip
    path = work / f"{name}.yaml"
    path.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "ardtrain", "train", str(path)], check=True, stdout=sys.stderr)
    lines = [line for line in read(run / "metrics.jsonl") if "eval_loss" in line]
    by_step = {line["step"]: {k: line[f"eval_{k}"] for k in ("exact_match", "loss")} for line in lines}
    towers = [line["towers"] for line in read(run / "ranks.jsonl")]
    return {"by_step": by_step, "rank_by_tower": {"first": towers[0], "last": towers[-1]}}


@torch.no_grad()
def answered(base, adapter, rows, folder):
    """Of each row, does transformers' generate write the answer? adapter: a PEFT folder or None.

    Rows with prompts of equal length go together.
    """
    model = PaliGemmaForConditionalGeneration.from_pretrained(base).eval()
    count = num_image_tokens(model.config)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    processor = SiglipImageProcessorPil.from_pretrained(base)
    by_length = defaultdict(list)
    for number, row in enumerate(rows):
        ids = tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"]
        by_length[len(ids)].append((number, row, [IMAGE_ID] * count + [BOS_ID, *ids]))
    hits = [False] * len(rows)
    for group in by_length.values():
        for start in range(0, len(group), 100):
            part = group[start : start + 100]
            ids = torch.tensor([ids for _, _, ids in part])
            pictures = [Image.open(folder / row["image"]).convert("RGB") for _, row, _ in part]
            out = model.generate(
                input_ids=ids, pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"],
                token_type_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=8,
            )  # fmt: skip
            for (number, row, _), answer in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
                wanted = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], EOS_ID]
                hits[number] = answer[: len(wanted)] == wanted
    return hits


def shares(rows, hits):
    """Exact match over all rows and by kind of question."""
    by_type = defaultdict(list)
    for row, hit in zip(rows, hits, strict=True):
        by_type[row["type"]].append(hit)
    return {"all": sum(hits) / len(hits), **{kind: sum(own) / len(own) for kind, own in sorted(by_type.items())}}


def generated(base, adapter, rows, folder):
    """Exact match over all rows and by kind of question, of answers that transformers' generate writes."""
    return shares(rows, answered(base, adapter, rows, folder))


def frequent_hits(train, dev):
    """Of each row of dev, is its answer the most frequent one of its kind of question in train?"""
    answers = defaultdict(Counter)
    for row in train:
        answers[row["type"]][row["completion"]] += 1
    best = {kind: counter.most_common(1)[0][0] for kind, counter in answers.items()}
    return [best[row["type"]] == row["completion"] for row in dev]


def most_frequent(train, dev):
    """Exact match on dev of each kind of question's most frequent answer in train, over all and by kind."""
    return shares(dev, frequent_hits(train, dev))
