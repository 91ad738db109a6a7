"""Is a sentence true of a picture? A tiny PaliGemma-2, pre-trained on our scenes, adapted to NLVR's human sentences.

    python -m benchmarks.nlvr --data FOLDER --work FOLDER [--methods elalora lora] [--out FILE]

FOLDER of --data holds nlvr: three grey boxes with shapes or towers of blocks, a sentence that someone wrote, true or
false. A PaliGemma-2 of the real classes with random weights is trained in full, by plain PyTorch, on random scenes: to
list what is in the boxes, and to judge sentences of a few fixed forms. Then ardtrain adapts it, frozen, to the human
sentences (1,484 training rows). Figures: share of right answers on dev, counted by ardtrain in the forward of the loss,
and again by transformers' generate through PEFT, by kind of scene; beside the most frequent answer.
"""

import random
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks import common
from benchmarks.pictures import (
    adapt,
    generated,
    ids_of,
    make_model,
    make_tokenizer,
    most_frequent,
    read,
    save_base,
    save_picture,
    train_in_full,
    write_lines,
)

BOX, PATCH = 48, 16  # pixels of a box's side; two by two boxes are a picture, the fourth stays empty
COLORS = {"b": "blue", "y": "yellow", "k": "black"}
SHAPES = {"t": "triangle", "c": "circle", "s": "square"}
INK = {"b": (0, 100, 255), "y": (255, 220, 0), "k": (0, 0, 0)}
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
LIST = "list the boxes"
ROWS, RATE = 48, 2e-3  # of a pre-training step
COMMON = {"max_length": 96, "global_batch_size": 32, "per_device_train_batch_size": 32}
SETTINGS = {
    "elalora": {
        "method": "elalora", "r": 4, "learning_rate": 1e-2,
        "elalora": {"init_warmup": 20, "final_warmup": 60, "mask_interval": 20, "b": 16, "k": 2},
    },
    "lora": {"method": "lora", "r": 4, "learning_rate": 2e-3},
}  # fmt: skip


# ---- scenes ----


def draw(boxes):
    """[96, 96, 3] values 0 to 1 of three boxes of [x, y, size, shape, color] in a frame of 100 x 100 each."""
    image = Image.new("RGB", (2 * BOX, 2 * BOX), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for number, items in enumerate(boxes):
        left, top = BOX * (number % 2), BOX * (number // 2)
        pen.rectangle((left, top, left + BOX - 1, top + BOX - 1), fill=(190, 190, 190))
        for x, y, size, shape, color in items:
            a, b = left + x * BOX / 100, top + y * BOX / 100
            c, d = a + size * BOX / 100 - 1, b + size * BOX / 100 - 1
            if shape == "t":
                pen.polygon([(a, d), (c, d), ((a + c) / 2, b)], fill=INK[color])
            else:
                (pen.ellipse if shape == "c" else pen.rectangle)((a, b, c, d), fill=INK[color])
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(2 * BOX, 2 * BOX, 3) / 255


def is_towers(boxes):
    """Are the boxes' items towers of blocks? They stand at x = 40."""
    return all(item[0] == 40 and item[3] == "s" for items in boxes for item in items)


def towers(rng):
    """Three towers of one to four blocks."""
    return [[[40, 80 - 21 * i, 20, "s", rng.choice("byk")] for i in range(rng.randint(1, 4))] for _ in range(3)]


def scattered(rng):
    """Three boxes of two to eight shapes."""
    boxes = []
    for _ in range(3):
        items = []
        for _ in range(rng.randint(2, 8)):
            size = rng.choice((10, 20, 20, 30))
            items.append(
                [rng.randint(0, 99 - size), rng.randint(0, 99 - size), size, rng.choice("tcs"), rng.choice("byk")]
            )
        boxes.append(items)
    return boxes


def listing(boxes):
    """What pre-training answers to LIST: a tower's colors from the ground; of another box, how many of each color."""
    if is_towers(boxes):
        padded = [[COLORS[i[4]] for i in items] + ["no"] * (4 - len(items)) for items in boxes]
        return " ".join(word for tower in padded for word in tower)
    counts = [COUNTS[sum(i[4] == c for i in items)] for items in boxes for c in COLORS]
    return " ".join([*counts, "no", "no", "no"])


def about_towers(rng, boxes):
    """A sentence of ours and whether it is true of three towers."""
    color, other = rng.sample(list(COLORS), 2)
    name, second, n, few = COLORS[color], COLORS[other], rng.randint(1, 4), rng.randint(1, 3)
    seen = [[item[4] for item in items] for items in boxes]
    bottom, top = (sum(t[i] == color for t in seen) for i in (0, -1))
    over = any(t[i] == other and t[i + 1] == color for t in seen for i in range(len(t) - 1))
    tall = sum(len(t) == n for t in seen)
    blocks = "block" if n == 1 else "blocks"
    return rng.choice(
        [
            (f"there is a tower with {COUNTS[n]} {blocks}", tall > 0),
            (f"there is exactly one tower with {COUNTS[n]} {blocks}", tall == 1),
            (f"there are two towers with {COUNTS[n]} {blocks}", tall == 2),
            (f"there is a tower with a {name} block at the base", bottom > 0),
            (f"there is a {name} block as the base of a tower with {COUNTS[n]} {blocks}",
             any(t[0] == color and len(t) == n for t in seen)),
            (f"there are {COUNTS[few]} towers with a {name} block at the base", bottom == few),
            (f"there is a {name} block as the top of a tower", top > 0),
            (f"there is a {name} block as the top of a tower with at least {COUNTS[n]} blocks",
             any(t[-1] == color and len(t) >= n for t in seen)),
            (f"there is exactly one {name} block as the top of a tower", top == 1),
            (f"there is a tower with a {name} block over a {second} block", over),
            (f"there is a tower with exactly {COUNTS[few]} {name} blocks", any(t.count(color) == few for t in seen)),
            (f"there is a tower which has only one {name} block", any(t.count(color) == 1 for t in seen)),
            (f"there is no {name} block", not any(color in t for t in seen)),
        ]
    )  # fmt: skip


def about_shapes(rng, boxes):
    """A sentence of ours and whether it is true of three boxes of shapes."""
    color, shape, n = rng.choice(list(COLORS)), rng.choice(list(SHAPES)), rng.randint(1, 6)
    name, kind, few = COLORS[color], SHAPES[shape], rng.randint(1, 3)
    found = [sum(i[3] == shape and i[4] == color for i in items) for items in boxes]
    colored = [sum(i[4] == color for i in items) for items in boxes]
    many = "item" if few == 1 else "items"
    return rng.choice(
        [
            (f"there is a {name} {kind}", sum(found) > 0),
            (f"there is exactly {COUNTS[few]} {name} {kind}", sum(found) == few),
            (f"there is a box with a {kind}", any(i[3] == shape for items in boxes for i in items)),
            (f"there is a box with {COUNTS[n]} items", any(len(items) == n for items in boxes)),
            (f"there is a box with {COUNTS[few]} {name} {many}", few in colored),
            (f"there is a box with no {name} item", 0 in colored),
            (f"all boxes have a {name} item", min(colored) > 0),
            ("there is a box with items of only one color", any(len({i[4] for i in items}) == 1 for items in boxes)),
            ("there is a box with items of three different colors",
             any(len({i[4] for i in items}) == 3 for items in boxes)),
        ]
    )  # fmt: skip


def judged(rng, tower):
    """(boxes, sentence, is it true?), true as often as false where the form allows it."""
    wanted = rng.random() < 0.5
    for _ in range(8):
        boxes = towers(rng) if tower else scattered(rng)
        sentence, truth = (about_towers if tower else about_shapes)(rng, boxes)
        if truth == wanted:
            break
    return boxes, sentence, truth


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


class Batches:
    """Random scenes by step: a listing each, then twice sentences."""

    def __init__(self, tokenizer):
        self.rng, self.tokenizer = random.Random(0), tokenizer

    def __call__(self, step):
        rows = []
        for number in range(ROWS):
            boxes, sentence, truth = judged(self.rng, number % 2 == 0)
            prompt, answer = (LIST, listing(boxes)) if step % 3 == 0 else (sentence, "true" if truth else "false")
            rows.append((prompt, answer, draw(boxes)))
        prompts = ids_of(self.tokenizer, [prompt + "\n" for prompt, _, _ in rows])
        answers = ids_of(self.tokenizer, [answer for _, answer, _ in rows])
        pixels = torch.stack([image for _, _, image in rows]).permute(0, 3, 1, 2)
        return prompts, answers, (pixels - 0.5) / 0.5


def main():
    """Pictures and rows, pre-training, a run of each method, answers by generation."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="the folder of nlvr")
    arguments.add_argument("--work", type=Path, required=True, help="for pictures, base and runs")
    arguments.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument("--pretrain-steps", type=int, default=900)
    arguments.add_argument("--steps", type=int, default=240)
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    train, dev = (write_rows(given.data, given.work, name) for name in ("train", "dev"))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start, rng = time.process_time(), random.Random(1)
    ours = [s for _ in range(2000) for s in (about_towers(rng, towers(rng))[0], about_shapes(rng, scattered(rng))[0])]
    texts = [row["prompt"] for row in train + dev]
    tokenizer = make_tokenizer([*texts, *ours, *COUNTS, *COLORS.values(), LIST, "true false"])
    model = make_model(len(tokenizer), size=2 * BOX, patch=PATCH)
    loss = train_in_full(model, Batches(tokenizer), steps=given.pretrain_steps, rate=RATE)
    save_base(given.work / "base", model, tokenizer)
    result = {
        "machine": common.machine(),
        "settings": {k: v for k, v in common.described(given).items() if k != "work"},
        "rows": {"train": len(train), "dev": len(dev)},
        "pretraining": {"last_loss": loss, "cpu_seconds": time.process_time() - start},
        "most_frequent_answer": most_frequent([r | {"type": "all"} for r in train], [r | {"type": "all"} for r in dev]),
        "base": generated(given.work / "base", None, dev, given.work),
        "methods": {},
    }
    for method in given.methods:
        start = time.perf_counter()
        figures = adapt(given.work, method, {**COMMON, "max_steps": given.steps, **SETTINGS[method]})
        figures["seconds"] = time.perf_counter() - start
        figures["generated"] = generated(given.work / "base", given.work / method / "adapter", dev, given.work)
        result["methods"][method] = figures
    common.write(result, given.out)


if __name__ == "__main__":
    main()
