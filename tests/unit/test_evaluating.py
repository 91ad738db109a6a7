"""`ardtrain evaluate` without a model: the request, rows of packed targets, intervals, what a wrong input gets."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from ardtrain import trained
from ardtrain.cli import main
from ardtrain.config import ConfigError
from ardtrain.data import build_batch
from ardtrain.evaluating.held_out import Rows, held_out_figures, sample_of_target
from ardtrain.evaluating.intervals import Bootstrap, Figure
from ardtrain.evaluating.request import chosen_metrics, find_target, read_request
from ardtrain.evaluating.tasks import TaskRequest, check_tasks
from ardtrain.evaluation import HeldOut
from tests.runs import write_run


def a_run(folder):
    """A run's folder as far as the request looks at it."""
    config = write_run(folder, elalora=None, method="lora")
    run = folder / "run"
    for name in ("checkpoint-4", "checkpoint-8"):
        (run / name).mkdir(parents=True)
        (run / name / "manifest.json").write_text("{}")
    (run / "config.yaml").write_text(config.read_text())
    (run / "latest").write_text("checkpoint-8\n")
    (run / "best").write_text("checkpoint-4\n")
    return run


def test_targets(tmp_path):
    run = a_run(tmp_path)
    assert find_target(str(run)).name == "checkpoint-8"
    assert find_target(str(run / "best")).name == "checkpoint-4"
    assert find_target(str(run / "checkpoint-4")).run_dir == run
    assert not find_target(str(run)).is_named and find_target(str(run / "latest")).is_named


def test_targets_from_inside_and_by_links(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    monkeypatch.chdir(run / "checkpoint-4")
    assert find_target(".").run_dir == run and not find_target("..").is_named
    (tmp_path / "link").symlink_to(run)
    assert find_target(str(tmp_path / "link" / "best")).run_dir == tmp_path / "link"
    (run / "checkpoint-8").rename(tmp_path / "moved")
    (run / "checkpoint-8").symlink_to(tmp_path / "moved")
    assert find_target(str(run / "checkpoint-8")).run_dir == run


def test_a_run_whose_newest_checkpoint_is_incomplete(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    monkeypatch.setattr(trained, "looks_complete", lambda path: path.name == "checkpoint-4")
    assert find_target(str(run)).name == "checkpoint-4" and find_target(str(run / "latest")).name == "checkpoint-8"


@pytest.mark.parametrize("verb", ["evaluate", "export", "merge"])
def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, capsys, verb):
    run, listdir = a_run(tmp_path), os.listdir

    def refused(path):
        if Path(path) == run:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    assert main([verb, str(run), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read (Permission denied); make it readable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere does not exist; give a run's folder or one of its checkpoints"),
        (["{run}/.."], "is neither a run's folder with a checkpoint nor a checkpoint with manifest.json"),
        (["{run}", "--metrics", "los"], "--metrics: los is no metric; did you mean loss?"),
        (["{run}", "--metrics", "loss,mcc"], "--metrics: mcc does not fit task=causal_lm; choose among loss, perplex"),
        (["{run}", "--data", "gone.jsonl"], "data file 'gone.jsonl' does not exist; correct --data"),
        (["{run}", "data.eval_file=gone.jsonl"], "data file 'gone.jsonl' does not exist; correct data.eval_file"),
        (["{run}", "data.eval_file=null", "eval_steps=null"], "has no data.eval_file; give --data FILE"),
        (["{run}", "evaluation.confidence=1"], "evaluation.confidence=1 must be less than 1"),
        (["{run}", "--metrics", "roug"], "--metrics: roug is no metric; did you mean rougeL?"),
        (["{run}", "evaluation.do_sample=true", "evaluation.num_beams=2"], "sample, or search with beams"),
        (["{run}", "evaluation.top_k=5"], "evaluation.top_k=5 has no effect without do_sample=true; set it"),
        (["{run}", "evaluation.length_penalty=2"], "evaluation.length_penalty=2.0 has no effect with num_beams=1"),
        (["{run}", "--limit", "3"], "--limit goes with --tasks; name some, or remove it"),
        (["{run}", "--tasks", "a", "--include_path", "gone"], "--include_path=gone is no folder; name one with task"),
        (["{run}", "--metric"], "ambiguous|unrecognized|expected one argument"),
    ],
)
def test_a_wrong_input_gets_one_line_and_exit_code_2(tmp_path, capsys, arguments, said):
    run = a_run(tmp_path)
    capsys.readouterr()
    assert main(["evaluate", *(argument.format(run=run) for argument in arguments)]) == 2
    first, *rest = capsys.readouterr().err.strip().splitlines()
    assert first == "ardtrain evaluate: 1 mistake(s)" and len(rest) == 1
    assert any(part in rest[0] for part in said.split("|")), rest


def test_request_and_metrics_by_their_aliases():
    request = read_request(["run", "a.b=1", "--metrics", "mcc, f1", "--out", "o", "c=2"])
    assert (request.target, request.overrides, request.metrics) == ("run", ("a.b=1", "c=2"), ("mcc", "f1"))
    assert chosen_metrics(request.metrics, task="sequence_classification") == ("matthews_correlation", "f1")
    assert chosen_metrics((), task="causal_lm") == ("loss", "perplexity")
    with pytest.raises(ConfigError, match="los is no metric"):
        chosen_metrics(("los",), task="causal_lm")


def rows_of(*lengths):
    """One row of documents, each with the first token a prompt."""
    return [(np.arange(4, 4 + n, dtype=np.int32), np.arange(n) > 0) for n in lengths]


def test_packed_targets_know_their_sample():
    packed = build_batch([rows_of(3, 2), rows_of(4)], packed=True, pad_token_id=0)
    places, _ = packed.targets()
    assert sample_of_target(packed, places).tolist() == [0, 0, 1, 2, 2, 2]
    plain = build_batch([rows_of(3), rows_of(2)], packed=False, pad_token_id=0)
    assert sample_of_target(plain, plain.targets()[0]).tolist() == [0, 0, 1]


def test_interval_is_that_of_a_proportion():
    """Of 400 rows with 100 hits the normal interval is 0.25 +- 1.96 sqrt(0.25 0.75 / 400)."""
    scores = np.repeat([1.0, 0.0], [100, 300])
    figure = Bootstrap(4000, 0.95, seed=1).mean(scores)
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert figure.value == 0.25
    assert figure.low == pytest.approx(0.25 - half, abs=0.004) and figure.high == pytest.approx(0.25 + half, abs=0.004)
    assert figure == Bootstrap(4000, 0.95, seed=1).mean(scores)
    unlike = np.linspace(0.0, 1.0, 50)
    assert Bootstrap(99, 0.95, seed=1).mean(unlike) != Bootstrap(99, 0.95, seed=2).mean(unlike)
    assert Bootstrap(0, 0.95, seed=1).mean(scores) == Figure(0.25)


def test_interval_of_a_ratio_counts_rows_not_tokens():
    """One long row with another loss than the others: the interval must reach far to both sides."""
    losses, targets = np.array([100.0, *[1.0] * 9]), np.array([50.0, *[1.0] * 9])
    figure = Bootstrap(2000, 0.9, seed=3).ratio(109 / 59, losses, targets)
    assert figure.low == 1.0 and figure.high > figure.value


def test_class_figures_are_scikit_learns_and_their_intervals_resample_rows():
    numbers = np.random.default_rng(5)
    labels = numbers.integers(0, 3, 60)
    predicted = np.where(numbers.random(60) < 0.7, labels, numbers.integers(0, 3, 60))
    rows = Rows(np.ones(60), np.ones(60, dtype=np.int64), labels, predicted, ids=(), num_classes=3)
    metrics = {
        "accuracy": float((labels == predicted).mean()),
        "f1": float(f1_score(labels, predicted, average="macro")),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }
    bootstrap = Bootstrap(40, 0.9, seed=7)
    found = held_out_figures(HeldOut(1.0, 60, metrics), rows, tuple(metrics), bootstrap)
    assert {name: figure.value for name, figure in found.items()} == metrics
    (draws,) = bootstrap.draws(60)
    plain = [matthews_corrcoef(labels[row], predicted[row]) for row in draws]
    mcc = found["matthews_correlation"]
    assert (mcc.low, mcc.high) == pytest.approx(tuple(np.quantile(plain, [0.05, 0.95])), abs=1e-12)
    alone = held_out_figures(HeldOut(1.0, 60, metrics), rows, ("f1",), Bootstrap(0, 0.9, seed=7))
    assert alone == {"f1": Figure(metrics["f1"])}


def test_figure_of_a_rising_function_keeps_its_ends():
    assert Figure(1.0, 0.0, 2.0).map(lambda x: 10 * x) == Figure(10.0, 0.0, 20.0)
    assert Figure(1.0).map(lambda x: 10 * x) == Figure(10.0)
    assert Figure(0.5, 0.25, 0.75).text() == "0.5000 [0.2500, 0.7500]" and Figure(0.5).text() == "0.5000"


def test_torch_is_not_asked_for_random_numbers():
    before = torch.random.get_rng_state()
    Bootstrap(10, 0.9, seed=1).mean(np.ones(5))
    assert torch.equal(before, torch.random.get_rng_state())


OWN_TASK = """
task: own_task
dataset_path: json
dataset_kwargs: {data_files: {test: gone.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_tasks_that_cannot_run_say_why(tmp_path, monkeypatch):
    import lm_eval.tasks

    honest = lm_eval.tasks.TaskManager  # without the harness's own thousands of tasks, which take seconds to list
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **known: honest(include_defaults=False, **known))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own_task.yaml").write_text(OWN_TASK)
    with pytest.raises(ConfigError, match="lm-eval asks language models, and the run's task is sequence_class"):
        check_tasks(TaskRequest(("own_task",)), task="sequence_classification")
    own = str(tmp_path)
    with pytest.raises(ConfigError, match="--tasks: lm-eval knows no task own_tusk; did you mean own_task?"):
        check_tasks(TaskRequest(("own_tusk",), own), task="causal_lm")
    with pytest.raises(ConfigError, match="--tasks: the rows of own_task cannot be loaded .*correct the task's file"):
        check_tasks(TaskRequest(("own_task",), own), task="causal_lm")
