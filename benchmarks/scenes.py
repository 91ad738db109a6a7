"""NLVR's scenes: pictures of them, random towers of blocks, and what is true of those, in sentences of ours.

No benchmark of its own: nlvr is pre-trained on them. A scene is three boxes, an item [x, y, size, shape, color] in a
box's frame of 100 x 100; y counts from above, a tower's items from the ground. A tower's color is a letter of COLORS.
"""

import torch
from PIL import Image, ImageDraw

SIDE = 48  # pixels of a picture's side; a box takes a third of the width, and all of the height
COLORS = {"b": "blue", "y": "yellow", "k": "black"}
INK = {"b": (0, 100, 255), "y": (255, 220, 0), "k": (0, 0, 0)}
COUNTS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
FACTS, VALUES = 18, 5  # of a tower, see facts()


def draw(boxes):
    """[48, 48, 3] values 0 to 1: the boxes side by side, each a third as wide as it is high."""
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), (190, 190, 190))
    pen = ImageDraw.Draw(image)
    wide, high = 2 * SIDE / 300, 2 * SIDE / 100
    for number, items in enumerate(boxes):
        left = number * 2 * SIDE // 3
        for x, y, size, shape, color in items:
            a, b, c, d = left + x * wide, y * high, left + (x + size) * wide - 1, (y + size) * high - 1
            if shape == "t":
                pen.polygon([(a, d), (c, d), ((a + c) / 2, b)], fill=INK[color])
            else:
                (pen.ellipse if shape == "c" else pen.rectangle)((a, b, c, d), fill=INK[color])
    return torch.frombuffer(bytearray(image.reduce(2).tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3) / 255


def is_towers(boxes):
    """Are the boxes' items towers of blocks? They stand at x = 40."""
    return all(item[0] == 40 and item[3] == "s" for items in boxes for item in items)


def random_towers(rng):
    """Three towers of one to four blocks, their colors from the ground."""
    return [random_tower(rng) for _ in range(3)]


def random_tower(rng):
    """The colors of one to four blocks from the ground."""
    return rng.choices("byk", k=rng.randint(1, 4))


def as_boxes(towers):
    """The scene as the data has it."""
    return [[[40, 80 - 21 * i, 20, "s", color] for i, color in enumerate(tower)] for tower in towers]


def facts(tower):
    """A tower in 18 numbers below 5: its colors from the ground (0 where there is none) and at the top, its height, how
    many blocks of each color, and is one of this color on one of that?
    """
    colors = [1 + "byk".index(color) for color in tower]
    pairs = set(zip(tower, tower[1:], strict=False))
    return [
        *colors, *[0] * (4 - len(tower)), colors[-1], len(tower), *(tower.count(color) for color in COLORS),
        *((below, above) in pairs for below in COLORS for above in COLORS),
    ]  # fmt: skip


# ---- nouns: (a word, words behind its plural's s, how many of them have these towers?) ----


def _over(rng):
    return rng.choice(("over", "above", "on"))


def _ground(rng):
    return rng.choice(("base", "bottom"))


def _blocks(rng):
    """Blocks of a color, anywhere or at a place."""
    color, other, n = rng.choice("byk"), rng.choice("byk"), rng.randint(2, 4)
    behind, holds = rng.choice([
        ("", lambda tower, i: True),
        ("", lambda tower, i: True),
        (f" as the {_ground(rng)} of a tower", lambda tower, i: i == 0),
        (" as the top of a tower", lambda tower, i: i == len(tower) - 1),
        (f" as the {_ground(rng)} of a tower with {COUNTS[n]} blocks", lambda tower, i: i == 0 and len(tower) == n),
        (f" as the top of a tower with {COUNTS[n]} blocks", lambda tower, i: i == len(tower) - 1 and len(tower) == n),
        (f" {_over(rng)} a {COLORS[other]} block", lambda tower, i: i > 0 and tower[i - 1] == other),
        (f" {_over(rng)} a {COLORS[other]} block", lambda tower, i: i > 0 and tower[i - 1] == other),
    ])  # fmt: skip
    count = lambda towers: sum(t[i] == color and holds(t, i) for t in towers for i in range(len(t)))  # noqa: E731
    return f"{COLORS[color]} {rng.choice(('block', 'block', 'item'))}", behind, count


def _feature(rng):
    """(what a tower may have, has it?)"""
    color, other = rng.sample("byk", 2)
    under, n, many = rng.choice("byk"), rng.randint(1, 4), rng.randint(1, 3)
    name, exactly = COLORS[color], rng.choice(("", "exactly ", "only "))
    s, some = "s" * (n > 1), "s" * (many > 1)
    return rng.choice([
        (f"{exactly}{COUNTS[n]} block{s}", lambda tower: len(tower) == n),
        (f"{exactly}{COUNTS[n]} block{s}", lambda tower: len(tower) == n),
        (f"at least {COUNTS[n]} block{s}", lambda tower: len(tower) >= n),
        (f"a {name} block at the {_ground(rng)}", lambda tower: tower[0] == color),
        (f"a {name} block at the {_ground(rng)}", lambda tower: tower[0] == color),
        (f"a {name} block at the top", lambda tower: tower[-1] == color),
        (f"a {name} block at the top", lambda tower: tower[-1] == color),
        (f"a {name} block {_over(rng)} a {COLORS[under]} block",
         lambda tower: (under, color) in zip(tower, tower[1:], strict=False)),
        (f"a {name} block {_over(rng)} a {COLORS[under]} block",
         lambda tower: (under, color) in zip(tower, tower[1:], strict=False)),
        (f"a {name} block", lambda tower: color in tower),
        (f"a {name} block and a {COLORS[other]} block", lambda tower: color in tower and other in tower),
        (f"{exactly}{COUNTS[many]} {name} block{some}", lambda tower: tower.count(color) == many),
        (f"at least {COUNTS[many]} {name} block{some}", lambda tower: tower.count(color) >= many),
        (f"no {name} block", lambda tower: color not in tower),
        (f"only {name} blocks", lambda tower: set(tower) == {color}),
        (f"only {name} and {COLORS[other]} blocks", lambda tower: set(tower) == {color, other}),
        ("blocks of all three colors", lambda tower: len(set(tower)) == 3),
        ("blocks of only one color", lambda tower: len(set(tower)) == 1),
    ])  # fmt: skip


def _towers(rng):
    """(a word, words behind it, is it so of a tower?): towers, or boxes, that have one feature or two."""
    words, holds = _feature(rng)
    if rng.random() < 0.2:
        (more, also), first = _feature(rng), holds
        words, holds = f"{words} and {more}", lambda tower: first(tower) and also(tower)
    having = rng.choice(("with", "with", "with", "having", "which has"))
    return rng.choice(("tower", "tower", "tower", "box")), f" {having} {words}", holds


def noun(rng):
    """Towers or blocks."""
    if rng.random() < 0.35:
        return _blocks(rng)
    words, behind, holds = _towers(rng)
    return words, behind, lambda towers: sum(map(holds, towers))


def plural(words):
    """`box` and what ends in a letter."""
    return "boxes" if words == "box" else f"{words}s"


# ---- questions and sentences ----


def sentence(rng):
    """(a sentence, is it true of these towers?)"""
    words, behind, count = noun(rng)
    n, exactly = rng.choice((2, 2, 3)), rng.choice(("exactly", "only"))
    text, holds = rng.choice([
        (f"there is a {words}{behind}", lambda k: k > 0),
        (f"there is a {words}{behind}", lambda k: k > 0),
        (f"there is at least one {words}{behind}", lambda k: k > 0),
        (f"there is {exactly} one {words}{behind}", lambda k: k == 1),
        (f"there is one {words}{behind}", lambda k: k == 1),
        (f"there are {COUNTS[n]} {plural(words)}{behind}", lambda k: k == n),
        (f"there are {exactly} {COUNTS[n]} {plural(words)}{behind}", lambda k: k == n),
        (f"there are at least {COUNTS[n]} {plural(words)}{behind}", lambda k: k >= n),
        (f"there is no {words}{behind}", lambda k: k == 0),
    ])  # fmt: skip
    return text, lambda towers: holds(count(towers))


def listed(rng):
    """(towers, a request, their colors from the ground)"""
    towers = random_towers(rng)
    return towers, "list the towers", " ".join(word for t in towers for word in [*(COLORS[c] for c in t), "no"])


def marked(rng):
    """(towers, a question for some of them, yes or no of each); yes is about as frequent."""
    words, behind, holds = _towers(rng)
    towers = random_towers(rng)
    for i in range(3):
        wanted = rng.random() < 0.5
        for _ in range(12):
            if holds(towers[i]) == wanted:
                break
            towers[i] = random_tower(rng)
    return towers, f"which {plural(words)}{behind}", " ".join("yes" if holds(tower) else "no" for tower in towers)


def counted(rng):
    """(towers, question for a number, answer); none, one, two and three are about as frequent."""
    words, behind, count = noun(rng)
    wanted = rng.randint(0, 3)
    for _ in range(12):
        towers = random_towers(rng)
        if count(towers) == wanted:
            break
    return towers, f"how many {plural(words)}{behind}", COUNTS[count(towers)]


def judged(rng):
    """(towers, sentence, "true" or "false"); a sentence is true as often as false."""
    while True:
        text, holds = sentence(rng)
        wanted = rng.random() < 0.5
        for _ in range(30):
            towers = random_towers(rng)
            if holds(towers) == wanted:
                return towers, text, "true" if wanted else "false"
