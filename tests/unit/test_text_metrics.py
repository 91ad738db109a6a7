"""Metrics of generated texts: worked cases, libraries' own numbers, groups, references in rows."""

import json

import numpy as np
import pytest

from ardtrain.config import ConfigError, EvaluationBlock
from ardtrain.data_sources import DataError
from ardtrain.evaluating import text_metrics
from ardtrain.evaluating.intervals import Bootstrap
from ardtrain.evaluating.references import line_of, read_known
from ardtrain.evaluating.text_metrics import Answered, by_group, check_packages, figure_of_all, row_scores
from ardtrain.evaluating.vqa import normalised, vqa_accuracy
from tests.rows import row_settings

BOOTSTRAP = Bootstrap(50, 0.9, seed=1)


def answered(*pairs, groups=None):
    texts, references = zip(*pairs, strict=True)
    return Answered(texts, references, groups or [None] * len(texts))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Cat", "cat"),
        ("two dogs, and a  bird.", "2 dogs and bird"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("red/blue", "red blue"),
        ("dont know", "don't know"),
        ("none\nof them", "0 of them"),
        ("it's", "it's"),
    ],
)
def test_answers_in_one_spelling(text, wanted):
    assert normalised(text) == wanted


def test_vqa_accuracy_leaves_each_person_out():
    """Of ten people k gave the answer: for those k there are k - 1 others, for the rest k."""
    for k in range(11):
        people = ["yes"] * k + [f"no{i}" for i in range(10 - k)]
        by_hand = (k * min((k - 1) / 3, 1) + (10 - k) * min(k / 3, 1)) / 10 if k else 0.0
        assert vqa_accuracy("Yes", people) == pytest.approx(by_hand if k < 10 else 0.0)  # all alike: as it is written
        assert vqa_accuracy("yes", people) == pytest.approx(by_hand)
    assert vqa_accuracy("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx(0.9)


def test_a_single_reference_is_equality_of_one_spelling():
    assert vqa_accuracy("The two", ["2"]) == 1.0
    assert vqa_accuracy("three", ["2"]) == 0.0


def test_exact_match_takes_any_reference_and_no_other_spelling():
    scores = row_scores("exact_match", answered((" 19. ", ["19."]), ("a", ["b", "a"]), ("A", ["a"])))
    assert scores.tolist() == [1.0, 1.0, 0.0]


def test_rouge_by_hand_with_the_best_of_two_references():
    """cat sat mat: of 3 and 4 words 3 meet in order, so F = 2 (1) (3/4) / (7/4); bigrams: 1 of 2 and of 3."""
    pairs = answered(("cat sat mat", ["dog", "cat sat on mat"]))
    assert row_scores("rouge1", pairs) == pytest.approx([6 / 7])
    assert row_scores("rougeL", pairs) == pytest.approx([6 / 7])
    assert row_scores("rouge2", pairs) == pytest.approx([2 * (1 / 2) * (1 / 3) / (5 / 6)])


def test_bleu_and_chrf_are_sacrebleus_with_unlike_numbers_of_references():
    from sacrebleu import corpus_bleu, corpus_chrf

    pairs = answered(
        ("the cat sat on the mat", ["the cat is on the mat", "a cat sat on the mat"]),
        ("it rains in the north today", ["it rains today in the north"]),
    )
    streams = [["the cat is on the mat", "it rains today in the north"], ["a cat sat on the mat", None]]
    bleu, chrf = figure_of_all("bleu", pairs, BOOTSTRAP), figure_of_all("chrf", pairs, BOOTSTRAP)
    assert bleu.value == corpus_bleu(list(pairs.texts), streams).score
    assert chrf.value == corpus_chrf(list(pairs.texts), streams).score
    for figure in (bleu, chrf):
        assert figure.low < figure.value < figure.high
    first = answered((pairs.texts[0], pairs.references[0]))
    assert figure_of_all("bleu", first, BOOTSTRAP).low == pytest.approx(figure_of_all("bleu", first, BOOTSTRAP).value)


def cider_by_numpy(text, references, everything):
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726): idf over the rows, clipped cosine, length penalty, times 10."""

    def grams(sentence, n):
        words = sentence.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def vector(sentence, n):
        out = {}
        for gram in grams(sentence, n):
            rows = sum(any(gram in grams(r, n) for r in refs) for refs in everything)
            out[gram] = out.get(gram, 0.0) + np.log(len(everything)) - np.log(max(1.0, rows))
        return out

    total = 0.0
    for reference in references:
        # Lengths are counted in bigrams, as the library does.
        gap = np.exp(-((len(grams(text, 2)) - len(grams(reference, 2))) ** 2) / (2 * 6.0**2))
        for n in (1, 2, 3, 4):
            own, other = vector(text, n), vector(reference, n)
            norms = [np.sqrt(sum(v * v for v in x.values())) for x in (own, other)]
            dot = sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in own.items())
            total += 10 * gap * (dot / (norms[0] * norms[1]) if min(norms) > 0 else 0.0) / 4
    return total / len(references)


def test_cider_is_its_formula():
    everything = [["a red bus on a street", "the bus is red"], ["two dogs run in grass"], ["a man rides a horse"]]
    texts = ["a red bus is on the street", "two dogs run in the grass", "a woman"]
    found = row_scores("cider", answered(*zip(texts, everything, strict=True)))
    assert found == pytest.approx([cider_by_numpy(*pair, everything) for pair in zip(texts, everything, strict=True)])
    assert found[1] > 3 > found[2]


def test_captions_are_compared_without_case_and_punctuation():
    plain = row_scores("cider", answered(("a red bus", ["a red bus"]), ("two dogs", ["two dogs"])))
    other = row_scores("cider", answered(("A red bus.", ["a red, bus"]), ("two dogs", ["two dogs!"])))
    assert plain.tolist() == other.tolist() and plain[0] > 4


def test_groups_by_name_without_rows_that_have_none():
    found = by_group(np.array([1.0, 0.0, 1.0, 1.0]), ["b", "a", None, "b"], BOOTSTRAP)
    assert [(name, rows, figure.value) for name, (rows, figure) in found.items()] == [("a", 1, 0.0), ("b", 2, 1.0)]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cider needs the package pycocoevalcap; pip install 'ardtrain\[caption\]'"):
        check_packages(["cider", "exact_match"])


# ---- references from rows ----


def settings_of(path, format_="completion", **changes):
    return row_settings(path, **({"format": format_, "on_bad_row": "skip", "seed": 1} | changes))


def known_of(tmp_path, rows, ids=None, *, format_="completion", changes=None, **block):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = ids or [f"{path}:{line}" for line in range(1, len(rows) + 1)]
    ids = [name.replace("rows.jsonl", str(path)) if name.startswith("rows") else name for name in ids]
    return read_known([settings_of(path, format_, **changes or {})], ids, EvaluationBlock(**block))


def test_references_of_completions_templates_and_chats(tmp_path):
    rows = [{"prompt": "1+1", "completion": "2"}, {"prompt": "bad"}, {"prompt": "2+2", "completion": "4", "kind": 7}]
    ids = ["rows.jsonl:3", "rows.jsonl:1#2"]
    known = known_of(tmp_path, rows, ids, group_field="kind")
    assert known.references == (("4",), ("2",)) and known.groups == ("7", None)
    filled = known_of(tmp_path, rows[:1], changes={"completion_template": "<{completion}>"})
    assert filled.references == (("<2>",),)
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [{"messages": [*chat, {"role": "assistant", "content": "d"}]}]
    assert known_of(tmp_path, rows, format_="chat").references == (("d",),)
    assert line_of("C:/x:y.jsonl:12#3") == line_of("C:/x:y.jsonl:12") == "C:/x:y.jsonl:12"


def test_references_from_a_field_of_one_of_several_or_of_vqas_form(tmp_path):
    rows = [
        {"prompt": "a", "completion": "x", "answers": ["x", "y"]},
        {"prompt": "b", "completion": "x", "answers": "z"},
        {"prompt": "c", "completion": "x", "answers": [{"answer": "p", "answer_id": 1}, {"answer": "q"}]},
    ]
    known = known_of(tmp_path, rows, references_field="answers")
    assert known.references == (("x", "y"), ("z",), ("p", "q"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: field 'answers' holds no answers; evaluation.references_field"):
        known_of(tmp_path, [rows[0], {"prompt": "a", "completion": "b", "answers": []}], references_field="answers")
