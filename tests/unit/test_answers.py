"""Metrics of generated answers while training: what process 0 alone computes, and what all learn of it."""

import pytest

from ardtrain import run_data
from ardtrain.evaluating import answers
from ardtrain.preflight import prepare
from tests.runs import write_run
from tests.threads import Threads
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    settings = {"eval_metrics": ["em", "bleu"], "evaluation": {"max_new_tokens": 2}}
    prepared = prepare(write_run(folder, **settings), [], world_size=1)
    tokenizer = run_data.tokenizer_of(prepared.config)
    _, data = run_data.open_data(prepared.config, tokenizer, ())
    return prepared.config, tokenizer, data


def metrics_on(size, prepared):
    """[size] what each process gets of its Answers, or its error."""
    config, tokenizer, data = prepared
    models = [tiny_llama() for _ in range(size)]

    def run(world):
        model = models[world.global_rank]
        return answers.Answers(config, tokenizer, data, model, world=world, sharded=False, between=lambda: None)()

    return Threads(size).run(run)


def test_all_processes_get_what_process_0_computes(prepared):
    alone, *_ = metrics_on(1, prepared)
    assert set(alone) == {"exact_match", "bleu"} and metrics_on(2, prepared) == [alone] * 2


def test_a_metric_that_fails_ends_all_with_its_name_and_text(prepared, monkeypatch):
    def failing(name, answered):
        if name == "bleu":
            raise LookupError("a resource that was not found")
        return 0.0

    monkeypatch.setattr(answers, "metric_value", failing)
    errors = metrics_on(2, prepared)
    texts = {f"{type(error).__name__}: {error}" for error in errors}
    assert texts == {"RuntimeError: eval_metrics: bleu failed (LookupError: a resource that was not found)"}
    assert isinstance(errors[0].__cause__.__cause__, LookupError)  # its traceback is in the log of process 0


def test_a_row_without_answers_is_a_mistake_on_all(prepared):
    config, tokenizer, data = prepared
    block = config.evaluation.model_copy(update={"references_field": "answers"})
    errors = metrics_on(2, (config.model_copy(update={"evaluation": block}), tokenizer, data))
    assert len({str(error) for error in errors}) == 1 and {type(e).__name__ for e in errors} == {"ConfigError"}
    assert "dev.jsonl:1" in str(errors[0]) and "field 'answers' holds no answers" in str(errors[0])
