"""Does a tiny PaliGemma-2 learn to answer questions about pictures? Pre-trained to see, adapted to answer.

    python -m benchmarks.digits_vqa --data FOLDER --work FOLDER [--methods elalora lora] [--out FILE]

FOLDER of --data holds digits_vqa: four handwritten digits in a 2x2 picture, a question, an answer. A PaliGemma-2 of the
real classes with random weights is trained in full, by plain PyTorch, on random pictures of the training digits: to
name all four, to read the one at a place that is named among random words, and to mark where a digit is. It sees none
of the seven kinds of questions. Then ardtrain adapts it, frozen, to all of them. Figures: exact match on dev, counted
by ardtrain in the forward of the loss, and again by transformers' generate through PEFT, by kind; beside the most
frequent answer of each kind. Pictures of dev show digits that no training picture has.
"""

import random
import time
from pathlib import Path

import torch

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

SIZE, PATCH = 32, 16
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top right", "bottom left", "bottom right")
CAPTION, MARK = "name the digits", "mark the"
FILLERS = "which digit is there a how many digits are larger than what plus where odd or even the"
ROWS, RATE, EMPTY = 64, 2e-3, 0.2  # of a pre-training step; share of empty cells
ALONE = 250  # steps with captions alone: mixed from the start, none of the kinds is learnt within 600
COMMON = {"max_length": 64, "global_batch_size": 32, "per_device_train_batch_size": 32}
SETTINGS = {
    "elalora": {
        "method": "elalora", "r": 4, "learning_rate": 2e-2,
        "elalora": {"init_warmup": 40, "final_warmup": 120, "mask_interval": 40, "b": 16, "k": 2},
    },
    "lora": {"method": "lora", "r": 4, "learning_rate": 5e-3},
}  # fmt: skip


def pixels_of(rows):
    """Image number -> [8, 8] grey values 0 to 1; -1 is empty."""
    out = {r["id"]: torch.tensor([int(c, 17) / 16 for c in r["pixels"]]).view(8, 8) for r in rows}
    return out | {-1: torch.zeros(8, 8)}


def pictures_of(cells):
    """[B, 32, 32] grey values of [B, 4, 8, 8] digits: two rows of two, each twice as large."""
    grid = cells.view(-1, 2, 2, 8, 8).permute(0, 1, 3, 2, 4).reshape(-1, 16, 16)
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2)


def write_rows(data, folder, name, count=None):
    """Pictures as PNG and the data set's first rows as JSONL in `folder`; returns the rows."""
    images, out = pixels_of(read(data / "images.jsonl")), []
    for row in read(data / f"{name}.jsonl")[:count]:
        path = f"pictures/{'_'.join(map(str, row['cells']))}.png"
        save_picture(pictures_of(torch.stack([images[i] for i in row["cells"]])[None])[0], folder / path)
        out.append({"image": path, "prompt": row["question"], "completion": row["answer"], "type": row["type"]})
    write_lines(folder / f"{name}.jsonl", out)
    return out


class Batches:
    """Random pictures of the training digits by step: captions alone, then also marks, and twice reading at a place."""

    def __init__(self, data, tokenizer):
        used = {i for row in read(data / "train.jsonl") for i in row["cells"]}
        rows = [row for row in read(data / "images.jsonl") if row["id"] in used]
        self.images = torch.stack([pixels_of([row])[row["id"]] for row in rows] + [torch.zeros(8, 8)])
        self.labels = torch.tensor([row["label"] for row in rows] + [len(NAMES)])
        self.words = [ids[0] for ids in ids_of(tokenizer, [*NAMES, "none"])]
        self.no_yes = [ids[0] for ids in ids_of(tokenizer, ["no", "yes"])]
        self.caption, *self.marks = ids_of(tokenizer, [f"{CAPTION}\n", *(f"{MARK} {name}\n" for name in NAMES)])
        self.places, self.ends = ids_of(tokenizer, PLACES), ids_of(tokenizer, ["?\n"])[0]
        self.fillers, self.rng = ids_of(tokenizer, [FILLERS])[0], random.Random(0)

    def __call__(self, step):
        empty = len(self.images) - 1
        cells = torch.randint(empty, (ROWS, 4))
        cells[torch.rand(ROWS, 4) < EMPTY] = empty
        pixels = pictures_of(self.images[cells])[:, None].expand(-1, 3, -1, -1)
        kinds = (self.named, self.at_a_place, self.marked, self.at_a_place)
        kind = self.named if step < ALONE else kinds[step % 4]
        prompts, answers = zip(*map(kind, self.labels[cells].tolist()), strict=True)
        return prompts, answers, (pixels - 0.5) / 0.5

    def named(self, labels):
        """All four digits."""
        return self.caption, [self.words[label] for label in labels]

    def at_a_place(self, labels):
        """The digit at the place that stands between other words."""
        place = self.rng.randrange(4)
        before, behind = (self.rng.choices(self.fillers, k=self.rng.randint(0, 3)) for _ in range(2))
        return [*before, *self.places[place], *behind, *self.ends], [self.words[labels[place]]]

    def marked(self, labels):
        """Of each place, is this digit there? In half of the rows it is one of the picture's."""
        digit = self.rng.randrange(len(NAMES))
        if self.rng.random() < 0.5:
            digit = self.rng.choice([label for label in labels if label < len(NAMES)] or [digit])
        return self.marks[digit], [self.no_yes[label == digit] for label in labels]


def make_base(folder, data, texts, steps):
    """Pre-trains the model and writes it as a hub folder; returns its last mean loss."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer([*texts, CAPTION, MARK, FILLERS, *NAMES, "none"])
    model = make_model(len(tokenizer), size=SIZE, patch=PATCH)
    loss = train_in_full(model, Batches(data, tokenizer), steps=steps, rate=RATE)
    save_base(folder, model, tokenizer)
    return loss


def main():
    """Pictures and rows, pre-training, a run of each method, answers by generation."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="the folder of digits_vqa")
    arguments.add_argument("--work", type=Path, required=True, help="for pictures, base and runs")
    arguments.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments.add_argument("--pretrain-steps", type=int, default=1500)
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--rows", type=int, default=12000, help="training rows")
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    train = write_rows(given.data, given.work, "train", given.rows)
    dev = write_rows(given.data, given.work, "dev")
    start = time.process_time()
    texts = [row[name] for row in train + dev for name in ("prompt", "completion")]
    loss = make_base(given.work / "base", given.data, texts, given.pretrain_steps)
    result = {
        "machine": common.machine(),
        "settings": {k: v for k, v in common.described(given).items() if k != "work"},
        "rows": {"train": len(train), "dev": len(dev)},
        "pretraining": {"last_loss": loss, "cpu_seconds": time.process_time() - start},
        "most_frequent_answer": most_frequent(train, dev),
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
