"""VQA accuracy (Antol et al. 2015, arXiv 1505.00468): answers of several people, normalised as the challenge does.

A person's answer counts as right where at least three of the others gave it, as a third where one did; the accuracy is
the mean over leaving each person out: mean over i of min(matches among the others / 3, 1). The normalisation follows
the rules of the challenge's evaluation (visualqa.org/evaluation.html): line breaks, punctuation, number words,
articles, contractions. Answers that all people share are compared as they are written, as there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"} | {
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_SHORT_FORMS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how'd how'll how's i'm "
    "i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't "
    "should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's "
    "there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've "
    "wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {text.replace("'", ""): text for text in _SHORT_FORMS.split()}


def normalised(answer: str) -> str:
    """An answer as it is compared: one spelling of punctuation, numbers, articles and contractions."""
    return _words(_without_punctuation(" ".join(answer.split())))


def _without_punctuation(text: str) -> str:
    """A mark beside a blank, or any in a text with a number like 1,000, is dropped; else it becomes a blank."""
    out = text
    number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or number else " ")
    return _PERIOD.sub("", out)


def _words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """0 to 1. references: one answer a person; of a single one it is equality."""
    if len(references) == 1:
        return float(normalised(answer) == normalised(references[0]))
    spell = normalised if len(set(references)) > 1 else str.strip
    own, given = spell(answer), [spell(reference) for reference in references]
    matches = given.count(own)
    left_out = [min((matches - (reference == own)) / 3, 1.0) for reference in given]
    return sum(left_out) / len(left_out)
