"""Does a tiny PaliGemma-2 learn to answer questions about pictures? Pre-trained on captions, adapted to questions.

    python -m benchmarks.digits_vqa --data FOLDER --work FOLDER [--methods elalora lora] [--out FILE]

FOLDER of --data holds digits_vqa: four handwritten digits in a 2x2 picture, a question, an answer. A PaliGemma-2 of the
real classes with random weights is trained in full, by plain PyTorch, to name the digits of random pictures; then
ardtrain adapts it to questions it has never seen. Figures: exact match on dev before and after, counted by ardtrain in
the forward of the loss, and again by transformers' generate through PEFT; beside the most frequent answer of each kind
of question. Pictures of dev show digits that no training picture has.
"""

import json
import math
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

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
from benchmarks import common

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"]
IMAGE_ID, SIZE, PATCH, HIDDEN = 4, 32, 16, 64
NUM_IMAGE_TOKENS = (SIZE // PATCH) ** 2
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION = "name the digits"
ROWS, RATE = 64, 2e-3  # of a pre-training step
SETTINGS = {
    "elalora": {
        "r": 4, "learning_rate": 2e-2,
        "elalora": {"init_warmup": 40, "final_warmup": 120, "mask_interval": 40, "b": 16, "k": 2},
    },
    "lora": {"r": 4, "learning_rate": 5e-3},
}  # fmt: skip


def read(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pixels_of(rows):
    """Image number -> [8, 8] grey values 0 to 1; -1 is empty."""
    out = {r["id"]: torch.tensor([int(c, 17) / 16 for c in r["pixels"]]).view(8, 8) for r in rows}
    return out | {-1: torch.zeros(8, 8)}


def picture(cells, images):
    """[32, 32] grey values: four digits, each twice as large."""
    grid = [torch.cat([images[a], images[b]], dim=1) for a, b in (cells[:2], cells[2:])]
    return torch.cat(grid).repeat_interleave(2, 0).repeat_interleave(2, 1)


def write_rows(rows, images, folder, name, count):
    """Pictures as PNG and rows as JSONL; returns the JSONL's path and the rows."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    out = []
    for row in rows[:count]:
        path = f"pictures/{'_'.join(map(str, row['cells']))}.png"
        if not (folder / path).exists():
            grey = (picture(row["cells"], images) * 255).round().to(torch.uint8)
            Image.fromarray(grey.numpy()).save(folder / path)
        out.append({"image": path, "prompt": row["question"], "completion": row["answer"], "type": row["type"]})
    target = folder / f"{name}.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in out))
    return target, out


def make_tokenizer(texts):
    """One token a word, for the words of the texts and the captions."""
    words = sorted({w for text in [*texts, CAPTION, *NAMES, "none"] for w in text.replace("?", " ? ").split()})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "\n", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|\?"), "removed", invert=True)
    pad, eos, bos, unk, image = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, unk_token=unk,
        extra_special_tokens={"image_token": image},
    )  # fmt: skip


def make_model(vocabulary):
    """SigLIP of 2 layers and Gemma-2 of 4, a token for each quarter of the picture."""
    vision = SiglipVisionConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    text = Gemma2Config(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
        max_position_embeddings=128,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE_ID,
            vocab_size=vocabulary, projection_dim=HIDDEN, hidden_size=HIDDEN, pad_token_id=0, eos_token_id=1,
            bos_token_id=2,
        )
    )  # fmt: skip


def pretrain(folder, data, tokenizer, steps):
    """Trains the model in full on captions of random pictures of the training digits; returns its last mean loss."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train = {i for row in read(data / "train.jsonl") for i in row["cells"]} - {-1}
    rows = [row for row in read(data / "images.jsonl") if row["id"] in train]
    images = torch.stack([pixels_of([row])[row["id"]] for row in rows] + [torch.zeros(8, 8)])
    names = [*(NAMES[row["label"]] for row in rows), "none"]
    words = torch.tensor(tokenizer.convert_tokens_to_ids(names))
    before = [IMAGE_ID] * NUM_IMAGE_TOKENS + [2, *tokenizer(f"{CAPTION}\n", add_special_tokens=False)["input_ids"]]
    types = token_types([len(before)] * ROWS, len(before) + 5)
    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses = []
    for step in range(steps):
        cells = torch.randint(len(rows), (ROWS, 4))
        cells[torch.rand(ROWS, 4) < 0.25] = len(rows)
        grid = images[cells].view(ROWS, 2, 2, 8, 8).permute(0, 1, 3, 2, 4).reshape(ROWS, 1, 16, 16)
        grid = grid.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
        after = torch.cat([words[cells], torch.ones(ROWS, 1, dtype=torch.int64)], dim=1)
        ids = torch.cat([torch.tensor(before).expand(ROWS, -1), after], dim=1)
        labels = ids.masked_fill(types == 0, -100)
        loss = model(
            input_ids=ids, pixel_values=(grid - 0.5) / 0.5, token_type_ids=types, labels=labels, use_cache=False,
            attention_mask=torch.ones_like(ids),
        ).loss  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 250 == 0:
            print(f"pre-training step {step}: loss {losses[-1]:.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor.image_seq_length = NUM_IMAGE_TOKENS
    processor.save_pretrained(folder)
    return sum(losses[-50:]) / len(losses[-50:])


def adapt(method, work, steps):
    """One run of ardtrain; its exact match and held-out loss by step, and the run's folder."""
    run = work / method
    config = {
        "model_name_or_path": str(work / "base"), "output_dir": str(run), "task": "image_text_to_text",
        "method": method, "data": {"train_file": str(work / "train.jsonl"), "eval_file": str(work / "dev.jsonl")},
        "max_length": 64, "max_steps": steps, "global_batch_size": 32, "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 100, "warmup_ratio": 0.05, "lr_scheduler_type": "cosine", "eval_on_start": True,
        "eval_steps": steps // 2, "logging_steps": 50, **SETTINGS[method],
    }  # fmt: skip
    path = work / f"{method}.yaml"
    path.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "ardtrain", "train", str(path)], check=True, stdout=sys.stderr)
    lines = [line for line in read(run / "metrics.jsonl") if "eval_loss" in line]
    by_step = {line["step"]: {k: line[f"eval_{k}"] for k in ("exact_match", "loss")} for line in lines}
    towers = [line["towers"] for line in read(run / "ranks.jsonl")]
    return {"by_step": by_step, "rank_by_tower": {"first": towers[0], "last": towers[-1]}}, run


@torch.no_grad()
def generated(base, adapter, rows, folder):
    """Exact match by kind of question, of answers written by transformers' generate; rows of equal length together."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    processor = SiglipImageProcessorPil.from_pretrained(base)
    by_length = defaultdict(list)
    for row in rows:
        ids = tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"]
        by_length[len(ids)].append((row, [IMAGE_ID] * NUM_IMAGE_TOKENS + [2, *ids]))
    hits, counts = Counter(), Counter()
    for group in by_length.values():
        for start in range(0, len(group), 100):
            part = group[start : start + 100]
            ids = torch.tensor([ids for _, ids in part])
            pictures = [Image.open(folder / row["image"]).convert("RGB") for row, _ in part]
            out = model.generate(
                input_ids=ids, pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"],
                token_type_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=8,
            )  # fmt: skip
            for (row, _), answer in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
                wanted = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], 1]
                counts[row["type"]] += 1
                hits[row["type"]] += answer[: len(wanted)] == wanted
    by_type = {kind: hits[kind] / counts[kind] for kind in sorted(counts)}
    return {"all": sum(hits.values()) / sum(counts.values()), **by_type}


def most_frequent(train, dev):
    """Exact match on dev of each kind of question's most frequent answer in train."""
    answers = defaultdict(Counter)
    for row in train:
        answers[row["type"]][row["completion"]] += 1
    best = {kind: counter.most_common(1)[0][0] for kind, counter in answers.items()}
    return sum(best[row["type"]] == row["completion"] for row in dev) / len(dev)


def main():
    """Pictures and rows, pre-training, a run of each method, answers by generation."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="the folder of digits_vqa")
    arguments.add_argument("--work", type=Path, required=True, help="for pictures, base and runs")
    arguments.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument("--pretrain-steps", type=int, default=2500)
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--rows", type=int, default=6000, help="training rows")
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    images = pixels_of(read(given.data / "images.jsonl"))
    _, train = write_rows(read(given.data / "train.jsonl"), images, given.work, "train", given.rows)
    _, dev = write_rows(read(given.data / "dev.jsonl"), images, given.work, "dev", None)
    tokenizer = make_tokenizer([row[name] for row in train + dev for name in ("prompt", "completion")])
    start = time.monotonic()
    loss = pretrain(given.work / "base", given.data, tokenizer, given.pretrain_steps)
    result = {
        "machine": common.machine(),
        "settings": {k: v for k, v in common.described(given).items() if k != "work"},
        "rows": {"train": len(train), "dev": len(dev)},
        "pretraining": {"last_loss": loss, "seconds": time.monotonic() - start},
        "most_frequent_answer": most_frequent(train, dev),
        "base": {"generated": generated(given.work / "base", None, dev, given.work)},
        "methods": {},
    }
    for method in given.methods:
        start = time.monotonic()
        figures, run = adapt(method, given.work, given.steps)
        figures["seconds"] = time.monotonic() - start
        figures["generated"] = generated(given.work / "base", run / "adapter", dev, given.work)
        result["methods"][method] = figures
    common.write(result, given.out)


if __name__ == "__main__":
    main()
