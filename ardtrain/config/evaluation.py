"""The block `evaluation`: how answers are generated and figures made; which metrics there are."""

from __future__ import annotations

from pydantic import Field

from ardtrain.config.block import Block

# What a run logs of its held-out rows (evaluation.HeldOut.numbers), by task.
LOGGED = {
    "causal_lm": ("loss", "perplexity"),
    "image_text_to_text": ("loss", "exact_match"),
    "sequence_classification": ("loss", "accuracy", "f1", "matthews_correlation"),
}


# Metrics of generated answers: a score a row, or one of all rows.
ROUGE = ("rouge1", "rouge2", "rougeL")
BY_ROW = ("exact_match", *ROUGE, "vqa_accuracy", "cider")
OF_ALL = ("bleu", "chrf")
GENERATED = (*BY_ROW, *OF_ALL)
_SHORT = {"mcc": "matthews_correlation", "em": "exact_match", "vqa": "vqa_accuracy"}


def best_metric(name: str) -> str:
    """A metric's own name: without Hugging Face's eval_, and mcc in full."""
    plain = name.removeprefix("eval_")
    return _SHORT.get(plain, plain)


class EvaluationBlock(Block):
    """Generation (of `ardtrain evaluate`, and in training of eval_metrics) and intervals (of the former alone)."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer at most."""
    num_beams: int = Field(default=1, ge=1)
    length_penalty: float = 1.0
    """Of beams: above 0 longer answers win."""
    do_sample: bool = False
    """Draw tokens, each row by the run's seed and its place in the file."""
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)
    """Of a sample: only the likeliest tokens; 0: all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of a sample: only the likeliest tokens that hold this share."""
    references_field: str | None = None
    """Field with a row's right answers, a list of texts or one; None: the completion is the only one."""
    group_field: str | None = None
    """Field by whose values figures are given apart, such as the question's type."""
    bootstrap_samples: int = Field(default=1000, ge=0)
    """Resamples of the held-out rows behind each interval; 0: no intervals."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Share of the resamples that an interval covers."""

    def cross_field_errors(self) -> list[str]:
        errors = []
        if self.do_sample and self.num_beams > 1:
            errors.append(f"do_sample=true stands beside num_beams={self.num_beams}; sample, or search with beams")
        fields = type(self).model_fields
        given = [n for n in ("temperature", "top_k", "top_p") if getattr(self, n) != fields[n].default]
        if given and not self.do_sample:
            errors.append(f"{given[0]}={getattr(self, given[0])} has no effect without do_sample=true; set it")
        if self.length_penalty != 1.0 and self.num_beams == 1:
            errors.append(f"length_penalty={self.length_penalty} has no effect with num_beams=1; raise num_beams")
        return errors
