"""NLVR's scenes: pictures of them, towers of blocks, and sentences of ours about three towers, with their truth.

No benchmark of its own: nlvr is pre-trained on them. A scene is three boxes, an item [x, y, size, shape, color] in a
box's frame of 100 x 100; y counts from above. A tower here is its blocks' colors from the ground, a letter of COLORS
each. The wording is that of NLVR's training sentences about towers; its dev sentences were not looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

SIDE = 48  # pixels of a picture's side; a box takes a third of the width, and all of the height
COLORS = {"b": "blue", "y": "yellow", "k": "black"}
INK = {"b": (0, 100, 255), "y": (255, 220, 0), "k": (0, 0, 0)}
COUNTS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
FACTS, VALUES = 18, 5  # of a tower, see facts()
UNKNOWN = -100  # where there is nothing to tell; cross_entropy leaves it out


# ---- pictures and towers ----


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


def random_tower(rng):
    """The colors of one to four blocks from the ground."""
    return "".join(rng.choices("byk", k=rng.randint(1, 4)))


def as_boxes(towers):
    """The scene as the data has it."""
    return [[[40, 80 - 21 * i, 20, "s", color] for i, color in enumerate(tower)] for tower in towers]


def facts(tower):
    """A tower in 18 numbers below 5: its colors from the ground (0 where there is none) and at the top, its height, how
    many blocks of each color, and is one of this color on one of that?
    """
    colors = [1 + "byk".index(color) for color in tower]
    return [
        *colors, *[0] * (4 - len(tower)), colors[-1], len(tower), *(tower.count(color) for color in COLORS),
        *(int(below + above in tower) for below in COLORS for above in COLORS),
    ]  # fmt: skip


# ---- the words ----

AMOUNTS = (  # (weight, wording, is it so of k things?)
    (4, "a", lambda k, n: k > 0),
    (3, "{n}", lambda k, n: k == n),
    (3, "exactly {n}", lambda k, n: k == n),
    (2, "only {n}", lambda k, n: k == n),
    (3, "at least {n}", lambda k, n: k >= n),
    (0.5, "at most {n}", lambda k, n: k <= n),
    (0.5, "more than {n}", lambda k, n: k > n),
    (0.5, "no", lambda k, n: k == 0),
)
BLOCKS = ("block", "block", "block", "block", "item", "object", "square")
TOWERS = ("tower", "tower", "tower", "box")
HAVING = ("with", "with", "with", "with", "having", "which has", "that has", "that contain")
JOINTS = ("and", "and", "with", "having", "which has", "and it has")
PLACES = (  # (wordings, is it so of a tower's i-th block?)
    (("at the top", "at the top", "on top", "on the top"), lambda tower, i: i == len(tower) - 1),
    (("at the base", "at the base", "at the bottom", "at base", "touching the wall"), lambda tower, i: i == 0),
    (("in the middle",), lambda tower, i: 0 < i < len(tower) - 1),
    (("not touching the wall",), lambda tower, i: i > 0),
)
ENDS = {"top": PLACES[0][1], "base": PLACES[1][1]}
NEIGHBORS = (  # (wordings, is it so of a tower's i-th block and this color?)
    (("over", "above", "on", "on top of"), lambda tower, i, color: tower[:i].endswith(color)),
    (("below", "under"), lambda tower, i, color: tower[i + 1 :].startswith(color)),
    (("attached to", "touching"), lambda tower, i, color: color in (tower[:i][-1:], tower[i + 1 :][:1])),
)
FEATURES = (  # (wordings, is it so of a tower and these two colors?); {w} is a word for a block
    (("only {c} {w}s", "{w}s of only {c} color", "{w}s of {c} color only"), lambda tower, c, d: set(tower) == {c}),
    (("only {c} and {d} {w}s", "{w}s of only {c} and {d} color"), lambda tower, c, d: set(tower) == {c, d}),
    (("{w}s of all three colors", "{w}s of all three different colors", "all three colors"),
     lambda tower, c, d: len(set(tower)) == 3),
    (("{w}s of only one color", "only one color", "{w}s of the same color"), lambda tower, c, d: len(set(tower)) == 1),
    (("{w}s of two different colors",), lambda tower, c, d: len(set(tower)) == 2),
    (("a {c} {w} and a {d} {w}", "one {c} and one {d} {w}"), lambda tower, c, d: {c, d} <= set(tower)),
    (("a {c} base", "a {c} base", "{c} base"), lambda tower, c, d: tower[0] == c),
    (("a {c} top",), lambda tower, c, d: tower[-1] == c),
    (("two {c} {w}s stacked together", "two {c} {w}s touching each other"), lambda tower, c, d: c + c in tower),
    (("three {w}s of the same color",), lambda tower, c, d: max(map(tower.count, tower)) == 3),
    (("a {c} second {w}",), lambda tower, c, d: tower[1:2] == c),
)  # fmt: skip
ALIKE = (  # (wordings, what is alike in two towers?)
    (("with the same height", "that are the same in height"), len),
    (("with the same base color", "that has the same base color"), lambda tower: tower[0]),
    (("with the same top color",), lambda tower: tower[-1]),
)
ALIKE_AMOUNTS = (("two", (2,)), ("only two", (2,)), ("at least two", (1, 2)))  # numbers of different ones among three


# ---- parts of a sentence: their words, and what must hold ----


def amount(rng, most):
    """(words, are they plural?, is it so of k things?)"""
    _, words, holds = rng.choices(AMOUNTS, [weight for weight, *_ in AMOUNTS])[0]
    n = min(rng.randint(1, most), rng.randint(1, most))
    return words.format(n=COUNTS[n]), "{n}" in words and n > 1, lambda k: holds(k, n)


def colored(rng):
    """(a word for blocks, mostly of a color, is it so of a tower's i-th?)"""
    color, word = rng.choice("byk"), rng.choice(BLOCKS)
    if rng.random() < 0.15:
        return word, lambda tower, i: True
    return f"{COLORS[color]} {word}", lambda tower, i: tower[i] == color


def placed(rng):
    """(words behind blocks, is it so of a tower's i-th?)"""
    if rng.random() < 0.6:
        ((wordings, holds),) = rng.choices(PLACES, (4, 4, 1, 1))
        return f" {rng.choice(wordings)}", holds
    ((wordings, near),), color = rng.choices(NEIGHBORS, (4, 2, 1)), rng.choice("byk")
    return f" {rng.choice(wordings)} a {COLORS[color]} block", lambda tower, i: near(tower, i, color)


def number_of(*conditions):
    """How many of a tower's blocks meet all of them?"""
    return lambda tower: sum(all(holds(tower, i) for holds in conditions) for i in range(len(tower)))


def size(rng):
    """(so many blocks, the number to tell of a tower, is it so of a tower?)"""
    many, plural, holds = amount(rng, 4)
    return f"{many} {rng.choice(BLOCKS)}{'s' * plural}", len, lambda tower: holds(len(tower))


def feature(rng):
    """As size(): what a tower may have."""
    kind = rng.random()
    if kind < 0.2:
        return size(rng)
    if kind < 0.75:
        (many, plural, holds), (word, is_one), (behind, there) = amount(rng, 4), colored(rng), placed(rng)
        if rng.random() < 0.5:
            behind, there = "", is_one
        count = number_of(is_one, there)
        return f"{many} {word}{'s' * plural}{behind}", count, lambda tower: holds(count(tower))
    (wordings, has), (c, d) = rng.choice(FEATURES), rng.sample("byk", 2)
    words = rng.choice(wordings).format(c=COLORS[c], d=COLORS[d], w=rng.choice(BLOCKS))
    return words, None, lambda tower: has(tower, c, d)


def features(rng):
    """(one feature or two, what to tell of a tower, has it them?)"""
    words, count, holds = feature(rng)
    if rng.random() < 0.7:
        return words, (count,), holds
    first, _, also = (feature if rng.random() < 0.4 else size)(rng)
    return f"{first} {rng.choice(JOINTS)} {words}", (also, holds), lambda tower: also(tower) and holds(tower)


def kind_of(rng):
    """(words before `tower`, words behind it, is it one?); None where any tower is."""
    color, n = rng.choice("byk"), rng.randint(1, 4)
    blocks = f"block{'s' * (n > 1)}"
    return rng.choices((
        ("", "", None),
        (f"{COLORS[color]} ", "", lambda tower: set(tower) == {color}),
        (f"{COUNTS[n]} {rng.choice(('block', blocks))} ", "", lambda tower: len(tower) == n),
        ("", f" with {rng.choice(('', 'exactly '))}{COUNTS[n]} {blocks}", lambda tower: len(tower) == n),
    ), (0.8, 0.08, 0.05, 0.07))[0]  # fmt: skip


# ---- sentences ----


@dataclass
class Said:
    """A sentence about three towers.

    outer: how many things (the tower itself, or its blocks) are meant in one tower? None where that says nothing.
    inner: up to two numbers of a tower to find on the way, None where there is none.
    """

    words: str
    holds: Callable
    outer: Callable | None
    inner: tuple = ()

    def marks(self, tower):
        """Three numbers below 5, or UNKNOWN: outer and inner."""
        told = [tell(tower) if tell else UNKNOWN for tell in (self.outer, *self.inner, None, None)]
        return [min(int(number), VALUES - 1) for number in told[:3]]


def about_blocks(rng):
    """There are so many of these blocks."""
    (many, plural, holds), (word, is_one), (behind, there) = amount(rng, 4), colored(rng), placed(rng)
    form = rng.random()
    if form < 0.3:
        behind, there = "", is_one
    elif form < 0.6:
        (end, at), (tall, _, high), any_tower = rng.choice([*ENDS.items()]), size(rng), rng.random() < 0.4
        behind = f" as the {end} of a tower" + ("" if any_tower else f" with {tall}")
        there = at if any_tower else lambda tower, i: at(tower, i) and high(tower)
    count, be, words = number_of(is_one, there), "are" if plural else "is", f"{many} {word}{'s' * plural}"
    text = f"{words} {be}{behind}" if "touching" in behind and rng.random() < 0.3 else f"there {be} {words}{behind}"
    return Said(text, lambda towers: holds(sum(map(count, towers))), count)


def about_towers(rng):
    """So many towers of this kind have that."""
    (many, plural, holds), (before, behind, is_one), (words, inner, has) = amount(rng, 3), kind_of(rng), features(rng)
    one = rng.choice(TOWERS)
    more = one + ("es" if one == "box" else "s")
    some, be, have = (more, "are", "have") if plural else (one, "is", "has")
    form = rng.random()
    if is_one and form < 0.4:
        text, fits, inner = f"there {be} {many} {before}{some}{behind}", is_one, ()
    elif form < 0.06:
        some, have = rng.choice(((f"each {one}", "has"), (f"all three {more}", "have"), (f"all {more}", "have")))
        text, fits, holds = f"{some} {have} {words}", has, lambda k: k == 3
    else:
        fits, inner = (lambda tower: is_one(tower) and has(tower), (is_one, has)) if is_one else (has, inner)
        if is_one and form > 0.8:
            text, holds = f"the {before}{one}{behind} has {words}", lambda k: k > 0
        elif form > 0.94:
            text = f"{many} of the {before}{more}{behind} {rng.choice((have, 'contains'))} {words}"
        elif form > 0.88:
            text = f"{many} {before}{some}{behind} {have} {words}"
        else:
            text = f"there {be} {many} {before}{some}{behind} {rng.choice(HAVING)} {words}"
    return Said(text, lambda towers: holds(sum(map(fits, towers))), fits, inner)


def about_ends(rng):
    """The base of a tower is black."""
    (end, at), color, (before, behind, is_one) = rng.choice([*ENDS.items()]), rng.choice("byk"), kind_of(rng)
    count = number_of(at, lambda tower, i: tower[i] == color and (is_one is None or is_one(tower)))
    text = f"the {end} of {rng.choice(('a', 'the'))} {before}tower{behind} is {COLORS[color]}"
    return Said(text, lambda towers: any(map(count, towers)), count)


def about_likeness(rng):
    """There are two towers that are alike."""
    (wordings, key), (many, numbers) = rng.choice(ALIKE), rng.choice(ALIKE_AMOUNTS)
    text = f"there are {many} towers {rng.choice(wordings)}"
    return Said(text, lambda towers: len(set(map(key, towers))) in numbers, None)


def sentence(rng):
    """A sentence of a random form."""
    about = rng.choices((about_blocks, about_towers, about_ends, about_likeness), (0.35, 0.59, 0.03, 0.03))[0]
    said = about(rng)
    said.words = said.words.replace(" a item", " an item").replace(" a object", " an object")
    return said


def judged(rng):
    """(sentence, three towers, is it true of them?); a sentence is true as often as false."""
    while True:
        said, some = sentence(rng), [random_tower(rng) for _ in range(40)]
        meant = [bool(said.outer and said.outer(tower)) for tower in some]
        halves = [[t for t, m in zip(some, meant, strict=True) if m == which] for which in (True, False)]
        halves = [half for half in halves if half]  # a tower is meant as often as not, where both kinds are there
        wanted = rng.random() < 0.5
        for _ in range(12):
            towers = [rng.choice(rng.choice(halves)) for _ in range(3)]
            if said.holds(towers) == wanted:
                return said, towers, wanted
