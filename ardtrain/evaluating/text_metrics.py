"""Metrics of generated texts: a score a row (exact match, ROUGE, VQA accuracy, CIDEr) or one of all rows (BLEU, chrF).

BLEU and chrF are sacrebleu's, 0 to 100; ROUGE rouge-score's F-measure, CIDEr pycocoevalcap's (CIDEr-D, 0 to 10).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ardtrain.config import BY_ROW, GENERATED, OF_ALL, ROUGE, ConfigError
from ardtrain.evaluating.intervals import Bootstrap, Figure, Floats
from ardtrain.evaluating.vqa import vqa_accuracy

__all__ = ["BY_ROW", "GENERATED", "OF_ALL", "ROUGE", "Answered", "check_packages", "metric_value", "row_scores"]
_ONCE = Bootstrap(samples=0, confidence=0.95, seed=0)  # no interval
# Metric -> what it is computed by, and how to install it.
_NEEDS = {
    **dict.fromkeys(OF_ALL, ("sacrebleu", "ardtrain[eval]")),
    **dict.fromkeys(ROUGE, ("rouge_score", "ardtrain[eval]")),
    "cider": ("pycocoevalcap", "ardtrain[caption]"),
}
# Treebank tokens that the caption challenge's tokenizer leaves out.
_NO_WORDS = {"''", "'", "``", "`", "(", ")", "{", "}", "[", "]", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


@dataclass(frozen=True)
class Answered:
    """Generated texts beside their references, in the file's order. groups: a name a row, or None for none."""

    texts: Sequence[str]
    references: Sequence[Sequence[str]]
    groups: Sequence[str | None]


def check_packages(metrics: Sequence[str], *, setting: str = "--metrics") -> None:
    """ConfigError for a metric whose package is not installed."""
    errors = []
    for name in metrics:
        package, extra = _NEEDS.get(name, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            errors.append(f"{setting}: {name} needs the package {package}; pip install '{extra}'")
    if errors:
        raise ConfigError(errors)


def metric_value(name: str, answered: Answered) -> float:
    """One of GENERATED, without an interval."""
    if name in OF_ALL:
        return figure_of_all(name, answered, _ONCE).value
    return _ONCE.mean(row_scores(name, answered)).value


def row_scores(name: str, answered: Answered) -> Floats:
    """[N] one of BY_ROW for each row; several references: the best match, by the metric's own rule."""
    pairs = zip(answered.texts, answered.references, strict=True)
    if name == "exact_match":
        return np.array([float(text.strip() in [r.strip() for r in references]) for text, references in pairs])
    if name == "vqa_accuracy":
        return np.array([vqa_accuracy(text, references) for text, references in pairs])
    if name == "cider":
        return _cider(answered)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name])
    return np.array([scorer.score_multi(references, text)[name].fmeasure for text, references in pairs])


def _cider(answered: Answered) -> Floats:
    """How rare the common n-grams are is counted over these rows' references."""
    from pycocoevalcap.cider.cider import Cider

    truth = {row: [_caption(text) for text in texts] for row, texts in enumerate(answered.references)}
    given = {row: [_caption(text)] for row, text in enumerate(answered.texts)}
    _, scores = Cider().compute_score(truth, given)
    return np.asarray(scores, dtype=np.float64)


def _caption(text: str) -> str:
    """Lower-case Treebank tokens without punctuation; the challenge's own tokenizer does this in Java."""
    from nltk.tokenize import TreebankWordTokenizer

    return " ".join(token for token in TreebankWordTokenizer().tokenize(text.lower()) if token not in _NO_WORDS)


def figure_of_all(name: str, answered: Answered, bootstrap: Bootstrap) -> Figure:
    """One of OF_ALL: corpus BLEU or chrF2, resampled by sacrebleu's statistics of each row."""
    from sacrebleu.metrics import BLEU, CHRF

    metric: Any = BLEU() if name == "bleu" else CHRF()
    most = max(map(len, answered.references))
    streams = [[r[i] if i < len(r) else None for r in answered.references] for i in range(most)]
    value = float(metric.corpus_score(list(answered.texts), streams).score)
    # sacrebleu's own significance tests use these two; its public bootstrap draws by an environment variable.
    counts = np.array(metric._extract_corpus_statistics(list(answered.texts), streams))
    scores = [
        metric._compute_score_from_stats(counts[rows].sum(axis=0)).score
        for draws in bootstrap.draws(len(counts))
        for rows in draws
    ]
    return bootstrap.interval(value, np.array(scores)) if scores else Figure(value)


def by_group(scores: Floats, groups: Sequence[str | None], bootstrap: Bootstrap) -> dict[str, tuple[int, Figure]]:
    """Group -> its rows and the mean of their scores, groups in order of their names; rows without one are left out."""
    out = {}
    for name in sorted({name for name in groups if name is not None}):
        own = scores[[group == name for group in groups]]
        out[name] = (len(own), bootstrap.mean(own))
    return out
