"""Is a sentence true of a picture? A tiny PaliGemma-2, pre-trained on our scenes, adapted to NLVR's human sentences.

    python -m benchmarks.nlvr --data FOLDER --work FOLDER [--methods elalora lora] [--out FILE]

FOLDER of --data holds nlvr: three boxes with shapes or towers of blocks, a sentence that someone wrote, true or false.
A PaliGemma-2 of the real classes with random weights is trained in full, by plain PyTorch, on random towers of ours
(scenes.py): first to see, then to judge sentences of a grammar whose wording follows the training sentences about
towers. It never sees scattered shapes. Then ardtrain adapts it, frozen, to the human sentences: 1,484 training rows,
each with its boxes in three orders. Figures: share of right answers on dev with a bootstrap interval over its rows,
counted by ardtrain in the forward of the loss, and again by transformers' generate through PEFT, by kind of scene; the
gain over the base and over the most frequent answer; and the share when each sentence gets another row's picture of
its kind.
NLVR asks each sentence of several pictures: of dev's rows, most have a sentence that training rows have as well, of
other pictures (the result says how many).
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
    draw,
    facts,
    is_towers,
    judged,
    random_tower,
    sentence,
)

PATCH = 16  # nine tokens a picture, three a tower
SIZE = {"mlp": 2, "window": 128, "spread": 0.1}  # no layer's window cuts a row; with transformers' 0.02 it learns later
SEE_STEPS, SEE_ROWS, ROWS, RATE = 300, 96, 64, 2e-3
MARK_LAYER, MARK_WEIGHT = 3, 0.25  # the layer of four whose picture tokens shall know what the sentence means by tower
SORTED = 8  # batches that are made together and cut by length
ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))  # of a training row's boxes: none of them changes what is true
COMMON = {"max_length": 96, "global_batch_size": 32, "per_device_train_batch_size": 32}
SETTINGS = {
    "elalora": {
        "method": "elalora", "r": 8, "learning_rate": 4e-3,
        "elalora": {"init_warmup": 20, "final_warmup": 60, "mask_interval": 20, "b": 16, "k": 2},
    },
    "lora": {"method": "lora", "r": 8, "learning_rate": 2e-3},
}  # fmt: skip


# ---- rows ----


def plain(sentence):
    """Lower case, numbers as words, without punctuation: the forms that pre-training knows."""
    words = "".join(c if c.isalnum() else " " for c in sentence.lower()).split()
    return " ".join(COUNTS[int(w)] if w.isdigit() and int(w) < len(COUNTS) else w for w in words)


def write_rows(data, folder, name, orders):
    """Pictures as PNG and rows as JSONL in `folder`, each in these orders of its boxes; returns the rows."""
    out = []
    for row in read(data / f"{name}.jsonl"):
        for order in orders:
            path, boxes = f"pictures/{name}{len(out)}.png", [row["boxes"][i] for i in order]
            save_picture(draw(boxes), folder / path)
            out.append({
                "image": path, "prompt": plain(row["sentence"]), "completion": "true" if row["label"] else "false",
                "type": "towers" if is_towers(boxes) else "shapes",
            })  # fmt: skip
    write_lines(folder / f"{name}.jsonl", out)
    return out


def write_ours(folder, count):
    """Rows as write_rows makes them, of judged sentences of ours, drawn apart from those of pre-training."""
    rng, out = random.Random(2), []
    for number in range(count):
        said, towers, answer = judged(rng)
        path = f"pictures/ours{number}.png"
        save_picture(draw(as_boxes(towers)), folder / path)
        out.append({"image": path, "prompt": said.words, "completion": str(answer).lower(), "type": "towers"})
    return out


def with_other_pictures(rows):
    """The rows, each with the picture of the row of its kind before it; the first have the last's."""
    before, out = {row["type"]: row["image"] for row in rows}, []
    for row in rows:
        out.append(row | {"image": before[row["type"]]})
        before[row["type"]] = row["image"]
    return out


def pixels_of(scenes):
    """[B, 3, 48, 48] from -1 to 1, of random towers."""
    return (torch.stack([draw(as_boxes(towers)) for towers in scenes]).permute(0, 3, 1, 2) - 0.5) / 0.5


def by_tower(tokens):
    """[B, 3, 3 * HIDDEN] of a picture's [B, 9, HIDDEN], which go row by row."""
    return tokens.reshape(len(tokens), 3, 3, HIDDEN).transpose(1, 2).flatten(2)


def teach_to_see(model, rng):
    """Trains vision tower and projector to tell each tower's facts from its three tokens, by one linear layer that is
    thrown away; returns the share of facts that are right in the last 50 steps.
    """
    head = nn.Linear(3 * HIDDEN, FACTS * VALUES)
    towers = (model.model.vision_tower, model.model.multi_modal_projector)
    optimizer = torch.optim.AdamW([p for m in (head, *towers) for p in m.parameters()], lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SEE_STEPS)
    right = []
    for step in range(SEE_STEPS):
        scenes = [[random_tower(rng) for _ in range(3)] for _ in range(SEE_ROWS)]
        tokens = model.model.get_image_features(pixels_of(scenes)).pooler_output
        told = head(by_tower(tokens.view(SEE_ROWS, -1, HIDDEN))).view(SEE_ROWS, 3, FACTS, VALUES)
        wanted = torch.tensor([[facts(tower) for tower in scene] for scene in scenes])
        nn.functional.cross_entropy(told.flatten(0, 2), wanted.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right.append((told.argmax(-1) == wanted).float().mean().item())
        if step % 100 == 99:
            print(f"seeing step {step + 1}: {sum(right[-50:]) / 50:.4f} right", file=sys.stderr, flush=True)
    return sum(right[-50:]) / 50


class Marks(nn.Module):
    """A loss beside the answer's, thrown away later: from each tower's three tokens at MARK_LAYER, one linear layer
    tells how much of the tower the sentence means (Said.marks).
    """

    def __init__(self, model):
        super().__init__()
        self.head, self.tokens, self.wanted = nn.Linear(3 * HIDDEN, 3 * VALUES), None, None
        model.model.language_model.layers[MARK_LAYER - 1].register_forward_hook(self._keep)

    def _keep(self, layer, given, out):
        self.tokens = (out[0] if isinstance(out, tuple) else out)[:, :9]

    def forward(self):
        told = self.head(by_tower(self.tokens)).view(-1, VALUES)
        return MARK_WEIGHT * nn.functional.cross_entropy(told, self.wanted.flatten())


class Batches:
    """Judged sentences by step, of about equal length; `marks` learns what is wanted of it."""

    def __init__(self, tokenizer, marks):
        self.rng, self.tokenizer, self.marks, self.ready = random.Random(0), tokenizer, marks, []

    def __call__(self, step):
        if not self.ready:
            made = sorted((judged(self.rng) for _ in range(SORTED * ROWS)), key=lambda row: row[0].words.count(" "))
            self.ready = [made[i : i + ROWS] for i in range(0, len(made), ROWS)]
            self.rng.shuffle(self.ready)
        said, scenes, answers = zip(*self.ready.pop(), strict=True)
        self.marks.wanted = torch.tensor(
            [[s.marks(tower) for tower in scene] for s, scene in zip(said, scenes, strict=True)]
        )
        prompts = ids_of(self.tokenizer, [f"{s.words}\n" for s in said])
        return prompts, ids_of(self.tokenizer, [str(answer).lower() for answer in answers]), pixels_of(scenes)


def make_base(folder, texts, steps):
    """Pre-trains the model and writes it as a hub folder, with what there is to tell about it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start, rng = time.process_time(), random.Random(1)
    ours = [sentence(rng).words for _ in range(8000)]
    tokenizer = make_tokenizer([*texts, *ours, *COUNTS, *COLORS.values(), "true false"])
    model = make_model(len(tokenizer), size=SIDE, patch=PATCH, **SIZE)
    seen, marks = teach_to_see(model, rng), Marks(model)
    loss = train_in_full(model, Batches(tokenizer, marks), steps=steps, rate=RATE, beside=marks)
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
    arguments.add_argument("--pretrain-steps", type=int, default=2000)
    arguments.add_argument("--steps", type=int, default=300)
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    train = write_rows(given.data, given.work, "train", ORDERS)
    dev = write_rows(given.data, given.work, "dev", ORDERS[:1])
    ours = write_ours(given.work, 500)
    base, known = given.work / "base", {row["prompt"] for row in train}
    if not (base / "about.json").exists():
        make_base(base, known, given.pretrain_steps)
    others = with_other_pictures(dev)
    frequent = frequent_hits([r | {"type": "all"} for r in train], [r | {"type": "all"} for r in dev])
    before = answered(base, None, dev, given.work)
    result = {
        "machine": common.machine(),
        "settings": {k: v for k, v in common.described(given).items() if k != "work"},
        "rows": {
            "train": len(train) // len(ORDERS),
            "dev": len(dev),
            "dev_with_a_sentence_of_train": sum(row["prompt"] in known for row in dev),
        },
        "pretraining": json.loads((base / "about.json").read_text()),
        "most_frequent_answer": shares(dev, frequent),
        "base": {
            "our_sentences": shares(ours, answered(base, None, ours, given.work))["all"],
            **figures_of(dev, before, {"most_frequent_answer": frequent}),
        },
        "methods": {},
    }
    for method in given.methods:
        start = time.perf_counter()
        figures = adapt(given.work, method, {**COMMON, "max_steps": given.steps, **SETTINGS[method]})
        figures["seconds"] = time.perf_counter() - start
        adapter = given.work / method / "adapter"
        after = answered(base, adapter, dev, given.work)
        figures["generated"] = figures_of(dev, after, {"base": before, "most_frequent_answer": frequent})
        figures["pictures_of_other_rows"] = shares(dev, answered(base, adapter, others, given.work))
        result["methods"][method] = figures
        common.write(result, given.out)


if __name__ == "__main__":
    main()
