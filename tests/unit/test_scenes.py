"""Scenes of the nlvr benchmark: what is true of towers that are written down here, from the ground up."""

import random

import pytest

from benchmarks import scenes


@pytest.fixture(scope="module")
def sentences():
    """By their words, all sentences that the grammar made in so many tries."""
    rng = random.Random(0)
    kinds = (scenes.about_blocks, scenes.about_towers, scenes.about_ends, scenes.about_likeness)
    return {said.words: said for about in kinds for said in (about(rng) for _ in range(30000))}


@pytest.mark.parametrize(
    ("words", "true", "false"),
    [
        ("there are two blue items", "bk yb y", "bk yb b"),
        ("there are at least two blue blocks", "bk yb b", "bk y y"),
        ("there is at most one blue block", "bk y k", "bk y b"),
        ("there is more than one yellow block", "yk yb b", "yk b b"),
        ("there is no yellow block", "bk k k", "bk k yk"),
        ("there is a blue block at the base", "bk y k", "yb kb k"),
        ("there is a yellow block at the bottom", "yk b k", "by k b"),
        ("there is a yellow block at the top", "by k b", "yb k b"),
        ("there is a black block on top", "bk y y", "kb y y"),
        ("there is a yellow block in the middle", "byk b b", "yk by b"),
        ("there is a black block not touching the wall", "bk y y", "k kb y"),
        ("a yellow block is not touching the wall", "by b b", "yb b b"),
        ("there is a blue block under a black block", "bk y y", "kb b k"),
        ("there is a black block below a blue block", "ykb y y", "ybk b k"),
        ("there is a black block touching a blue block", "kb y y", "kyb y b"),
        ("there is a yellow block attached to a black block", "ky y y", "kby y y"),
        ("there are two yellow blocks as the base of a tower", "yk yb k", "yk by b"),
        ("there are exactly two blue blocks as the top of a tower", "kb b y", "kb b b"),
        ("there is a yellow block as the top of a tower with a block", "by k k", "yb k k"),
        ("there is a yellow tower", "yy k b", "yk b by"),
        ("there are exactly two towers with exactly four blocks", "bbbb ykyk y", "bbbb ykyk yyyy"),
        ("there is a four block tower", "bbbb y y", "bbb y y"),
        ("there is a tower with blocks of two different colors", "bkb b y", "bky b y"),
        ("there is a tower with three blocks of the same color", "bkbb y y", "bkb y y"),
        ("there is a tower with all three colors", "byk b b", "by k b"),
        ("there is one tower with only one color", "bb yk by", "bb y bk"),
        ("there is a tower with a black top", "bk y y", "kb y y"),
        ("there is a tower with a blue base", "bk y y", "kb y y"),
        ("there is a tower with a blue second block", "kby y y", "kyb b y"),
        ("each tower has only blue and black blocks", "kb bk bbk", "kb bk byk"),
        ("there is a tower with two blue blocks touching each other", "kbb y y", "bkb y y"),
        ("there are two towers with two black blocks stacked together", "kkb ykk b", "kkb kyk b"),
        ("there are two towers with blocks of only yellow color", "y yyy b", "y yyb b"),
        ("all three towers have blocks of two different colors", "bk yb kkb", "bk yb kk"),
        ("each tower has a block", "b y k", ""),
        ("the base of a tower is blue", "bk y y", "kb y y"),
        ("the top of a tower with four blocks is black", "yyyk y y", "yyk y k"),
        ("there are two towers with the same height", "by kk b", "by kk bb"),
        ("there are two towers with the same base color", "by bk k", "by y k"),
        ("there are two towers with the same top color", "by yy k", "by k b"),
        ("there are only two towers that has the same base color", "by bk k", "by bk b"),
    ],
)
def test_truth_of_a_sentence(sentences, words, true, false):
    """Of each form of the grammar."""
    assert sentences[words].holds(true.split())
    if false:
        assert not sentences[words].holds(false.split())


@pytest.mark.parametrize(
    ("words", "tower", "marks"),
    [
        ("there are two blue items", "bkb", [2, -100, -100]),
        ("there is a yellow block at the top", "yyb", [0, -100, -100]),
        ("there is a tower with at least three blocks", "bbk", [1, 3, -100]),
        ("there is a yellow tower", "yy", [1, -100, -100]),
        ("there is a tower with a blue base", "bk", [1, -100, -100]),
        ("there are two towers with the same height", "bk", [-100, -100, -100]),
    ],
)
def test_marks_of_a_tower(sentences, words, tower, marks):
    """How much of the tower is meant, and the number on the way."""
    assert sentences[words].marks(tower) == marks


def test_two_features_are_both_asked():
    """Both are marked, and the tower is meant where both hold."""
    rng = random.Random(1)
    for _ in range(300):
        said = scenes.about_towers(rng)
        tower = scenes.random_tower(rng)
        outer, *inner = said.marks(tower)
        if scenes.UNKNOWN not in inner:
            assert outer == (inner[0] and inner[1])


def test_judged_answers_are_balanced_and_right():
    """The answer is what holds of the towers, true as often as false."""
    rng = random.Random(2)
    rows = [scenes.judged(rng) for _ in range(600)]
    assert all(said.holds(towers) == answer for said, towers, answer in rows)
    assert 0.4 < sum(answer for *_, answer in rows) / len(rows) < 0.6


def test_facts_of_a_tower():
    """Colors from the ground and at the top, height, blocks of each color, pairs."""
    #                                      ground up   top n  counts    on b     on y     on k
    assert scenes.facts("byk") == [1, 2, 3, 0, 3, 3, 1, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0]


def test_picture_of_a_tower():
    """A block has its ink, the ground is gray; towers are told from shapes."""
    boxes = scenes.as_boxes(["b", "k", "yy"])
    picture = (scenes.draw(boxes) * 255).round()
    assert picture.shape == (48, 48, 3)
    assert [tuple(picture[43, x].int().tolist()) for x in (8, 24, 40)] == [scenes.INK[c] for c in "bky"]
    assert tuple(picture[5, 8].int().tolist()) == (190, 190, 190)
    assert scenes.is_towers(boxes) and not scenes.is_towers([[[10, 10, 20, "c", "b"]]])
