"""Is a sentence true of a picture? A tiny PaliGemma-2, pre-trained on our scenes, adapted to NLVR's human sentences.

    python -m benchmarks.nlvr --data FOLDER --work FOLDER [--methods elalora lora] [--out FILE]

FOLDER of --data holds nlvr: three boxes with shapes or towers of blocks, a sentence that someone wrote, true or false.
A PaliGemma-2 of the real classes with random weights is trained in full, by plain PyTorch, on random towers of ours
(scenes.py): first to see, then to list, mark and count, and to judge sentences put together from fixed words. It never
sees scattered shapes. Then ardtrain adapts it, frozen, to the human sentences (1,484 training rows). Figures: share of
right answers on dev with a bootstrap interval over its rows, counted by ardtrain in the forward of the loss, and again
by transformers' generate through PEFT, by kind of scene; and the gain over the base and over the most frequent answer.
"""

import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ardtrain.evaluating.intervals import Bootstrap
from benchmarks import common
from benchmarks.pictures import (
    HIDDEN,
    adapt,
    answered,
    frequent_hits,
    ids_of,
    make_model,
    make_tokenizer,
    read,
    save_base,
    save_picture,
    shares,
    train_in_full,
    write_lines,
)
from benchmarks.scenes import (
    COLORS,
    COUNTS,
    FACTS,
    SIDE,
    VALUES,
    as_boxes,
    counted,
    draw,
    facts,
    is_towers,
    judged,
    listed,
    marked,
    random_towers,
)

PATCH = 16  # nine tokens a picture
SIZE = {"mlp": 2, "window": 128, "spread": 0.1}  # no layer's window cuts a row; with transformers' 0.02 it learns later
SEE_STEPS, SEE_ROWS, ROWS, RATE = 300, 96, 32, 2e-3
LIST_UNTIL, MARK_UNTIL = 300, 1200  # steps with one kind of question alone; mixed from the start, none is learnt
COMMON = {"max_length": 96, "global_batch_size": 32, "per_device_train_batch_size": 32}
SETTINGS = {
    "elalora": {
        "method": "elalora", "r": 4, "learning_rate": 1e-2,
        "elalora": {"init_warmup": 20, "final_warmup": 60, "mask_interval": 20, "b": 16, "k": 2},
    },
    "lora": {"method": "lora", "r": 4, "learning_rate": 2e-3},
}  # fmt: skip


# ---- rows ----


def plain(sentence):
    """Lower case, numbers as words, without punctuation: the forms that pre-training knows."""
    words = "".join(c if c.isalnum() else " " for c in sentence.lower()).split()
    return " ".join(COUNTS[int(w)] if w.isdigit() and int(w) < len(COUNTS) else w for w in words)


def write_rows(data, folder, name):
    """Pictures as PNG and rows as JSONL in `folder`; returns the rows."""
    out = []
    for number, row in enumerate(read(data / f"{name}.jsonl")):
        path = f"pictures/{name}{number}.png"
        save_picture(draw(row["boxes"]), folder / path)
        out.append({
            "image": path, "prompt": plain(row["sentence"]), "completion": "true" if row["label"] else "false",
            "type": "towers" if is_towers(row["boxes"]) else "shapes",
        })  # fmt: skip
    write_lines(folder / f"{name}.jsonl", out)
    return out


def pixels_of(scenes):
    """[B, 3, 48, 48] from -1 to 1, of random towers."""
    return (torch.stack([draw(as_boxes(towers)) for towers in scenes]).permute(0, 3, 1, 2) - 0.5) / 0.5


def teach_to_see(model, rng):
    """Trains vision tower and projector to tell each tower's facts from its three tokens, by one linear layer that is
    thrown away; returns the share of facts that are right in the last 50 steps.
    """
    head = nn.Linear(SIDE // PATCH * HIDDEN, FACTS * VALUES)
    towers = (model.model.vision_tower, model.model.multi_modal_projector)
    optimizer = torch.optim.AdamW([p for m in (head, *towers) for p in m.parameters()], lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SEE_STEPS)
    right = []
    for step in range(SEE_STEPS):
        scenes = [random_towers(rng) for _ in range(SEE_ROWS)]
        tokens = model.model.get_image_features(pixels_of(scenes)).pooler_output
        by_tower = tokens.view(SEE_ROWS, SIDE // PATCH, 3, HIDDEN).transpose(1, 2).flatten(2)
        told = head(by_tower).view(SEE_ROWS, 3, FACTS, VALUES)
        wanted = torch.tensor([[facts(tower) for tower in scene] for scene in scenes]).long()
        nn.functional.cross_entropy(told.flatten(0, 2), wanted.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right.append((told.argmax(-1) == wanted).float().mean().item())
        if step % 100 == 99:
            print(f"seeing step {step + 1}: {sum(right[-50:]) / 50:.4f} right", file=sys.stderr, flush=True)
    return sum(right[-50:]) / 50


class Batches:
    """Random towers by step: lists, then marks, then everything."""

    def __init__(self, tokenizer):
        self.rng, self.tokenizer = random.Random(0), tokenizer

    def __call__(self, step):
        later = (marked, counted, judged, judged)[step % 4]
        ask = listed if step < LIST_UNTIL else marked if step < MARK_UNTIL else later
        scenes, prompts, answers = zip(*(ask(self.rng) for _ in range(ROWS)), strict=True)
        prompts = ids_of(self.tokenizer, [f"{prompt}\n" for prompt in prompts])
        return prompts, ids_of(self.tokenizer, answers), pixels_of(scenes)


def make_base(folder, texts, steps):
    """Pre-trains the model and writes it as a hub folder, with what there is to tell about it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start, rng = time.process_time(), random.Random(1)
    ours = [make(rng)[1] for _ in range(2000) for make in (listed, marked, counted, judged)]
    tokenizer = make_tokenizer([*texts, *ours, *COUNTS, *COLORS.values(), "true false yes no"])
    model = make_model(len(tokenizer), size=SIDE, patch=PATCH, **SIZE)
    seen = teach_to_see(model, rng)
    loss = train_in_full(model, Batches(tokenizer), steps=steps, rate=RATE)
    save_base(folder, model, tokenizer)
    about = {"numbers": sum(p.numel() for p in model.parameters()), "facts_seen": seen, "last_loss": loss}
    (folder / "about.json").write_text(json.dumps({**about, "cpu_seconds": time.process_time() - start}))


def figures_of(rows, hits, others):
    """Shares of right answers, and the interval of all of them and of the gain over each of `others` (name -> hits)."""
    bootstrap = Bootstrap(samples=10000, confidence=0.95, seed=0)
    own = np.array(hits, float)
    gains = {name: bootstrap.mean(own - np.array(them, float)).to_json() for name, them in others.items()}
    return {**shares(rows, hits), "interval": bootstrap.mean(own).to_json(), "gain_over": gains}


def main():
    """Pictures and rows, pre-training, a run of each method, answers by generation."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="the folder of nlvr")
    arguments.add_argument(
        "--work", type=Path, required=True, help="for pictures, base and runs; a base that is there is kept"
    )
    arguments.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument("--pretrain-steps", type=int, default=4000)
    arguments.add_argument("--steps", type=int, default=240)
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    train, dev = (write_rows(given.data, given.work, name) for name in ("train", "dev"))
    base = given.work / "base"
    if not (base / "about.json").exists():
        make_base(base, [row["prompt"] for row in train + dev], given.pretrain_steps)
    frequent = frequent_hits([r | {"type": "all"} for r in train], [r | {"type": "all"} for r in dev])
    before = answered(base, None, dev, given.work)
    result = {
        "machine": common.machine(),
        "settings": {k: v for k, v in common.described(given).items() if k != "work"},
        "rows": {"train": len(train), "dev": len(dev)},
        "pretraining": json.loads((base / "about.json").read_text()),
        "most_frequent_answer": shares(dev, frequent),
        "base": figures_of(dev, before, {"most_frequent_answer": frequent}),
        "methods": {},
    }
    for method in given.methods:
        start = time.perf_counter()
        figures = adapt(given.work, method, {**COMMON, "max_steps": given.steps, **SETTINGS[method]})
        figures["seconds"] = time.perf_counter() - start
        after = answered(base, given.work / method / "adapter", dev, given.work)
        figures["generated"] = figures_of(dev, after, {"base": before, "most_frequent_answer": frequent})
        result["methods"][method] = figures
        common.write(result, given.out)


if __name__ == "__main__":
    main()
