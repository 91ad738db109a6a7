"""`ardtrain evaluate --tasks`: lm-eval on a checkpoint, offline, beside its own reading of the exported adapter."""

import json

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ardtrain.evaluating.dealt_tasks import prompt_batches, token_batches
from tests.distributed.processes import run_processes
from tests.runs import lines, write_run

pytestmark = pytest.mark.launch
SAYS = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TASKS = {
    "tiny_sums": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_says": SAYS | {"generation_kwargs": {"until": ["."], "max_gen_toks": 8}},
    "tiny_draws": SAYS
    | {"generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}},
    "tiny_tales": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def write_tasks(folder):
    folder.mkdir()
    rows = [
        {
            "question": f"Once upon a time there was a {name} who",
            "choices": ["had a", "the dog", "was very"],
            "answer": n,
        }
        for n, name in enumerate(("girl", "dog", "bird"))
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **rows, **task}))  # JSON is YAML


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """A LoRA on the tiny Llama of the test data, trained on tales until its answers change, and its evaluation."""
    folder = tmp_path_factory.mktemp("tasks")
    base = str(data_dir / "stories260k_llama")
    texts = [{"text": f"Once upon a time there was a {name}. The {name} was very good."} for name in ("cat", "dog") * 6]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    more = {"elalora": None, "data": {"train_file": str(path)}, "eval_steps": None, "max_steps": 4}
    config = write_run(folder, "run", model_name_or_path=base, method="lora", learning_rate="2e-2", **more)
    write_tasks(folder / "own")
    environment = {"ARDTRAIN_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    asked = [str(folder / "run"), "--tasks", ",".join(TASKS), "--include_path", str(folder / "own"), "--limit", "3"]
    several = [*asked, "deepspeed=zero3", "--out", str(folder / "two")]
    for count, verb in ((1, ["train", str(config)]), (1, ["evaluate", *asked]), (2, ["evaluate", *several])):
        ended = run_processes(count, ["-m", "ardtrain", *verb], folder=folder, timeout=600, environment=environment)
        assert set(ended.codes) == {0}, ended.text()
    return folder / "run"


def test_a_task_finds_what_lm_eval_finds_with_the_exported_adapter(run, data_dir, monkeypatch, tmp_path):
    (out,) = (run / "evaluation").iterdir()
    found = json.loads((out / "figures.json").read_text())
    figure = found["tasks"]["figures"]["tiny_sums"]["acc"]
    assert found["tasks"]["rows"] == dict.fromkeys(TASKS, 3) and found["metrics"] == {}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    harness = HFLM(pretrained=str(data_dir / "stories260k_llama"), peft=str(run / "adapter"), device="cpu")
    manager = TaskManager(include_path=str(run.parent / "own"), include_defaults=False)
    tasks = ["tiny_sums", "tiny_says", "tiny_tales"]
    plain = simple_evaluate(model=harness, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    (perplexity,) = found["tasks"]["figures"]["tiny_tales"].values()
    assert perplexity["value"] == pytest.approx(plain["results"]["tiny_tales"]["word_perplexity,none"], rel=1e-4)
    said = [sample["resps"] for sample in lines(out / "samples_tiny_says.jsonl")]
    assert said == [[list(answers) for answers in sample["resps"]] for sample in plain["samples"]["tiny_says"]]
    assert figure["value"] == plain["results"]["tiny_sums"]["acc,none"]
    assert figure["low"] < figure["value"] < figure["high"]

    def likelihoods(samples):
        return [[float(choice[0][0]) for choice in sample["resps"]] for sample in samples]

    ours = likelihoods(lines(out / "samples_tiny_sums.jsonl"))
    theirs = likelihoods(plain["samples"]["tiny_sums"])
    assert len(ours) == 3 and ours == pytest.approx([pytest.approx(row, abs=1e-3) for row in theirs])
    base = HFLM(pretrained=str(data_dir / "stories260k_llama"), device="cpu")
    before = simple_evaluate(model=base, tasks=["tiny_sums"], task_manager=manager, bootstrap_iters=0)
    assert abs(ours[0][0] - likelihoods(before["samples"]["tiny_sums"])[0][0]) > 0.1, "the adapter must be seen"


def test_two_processes_under_zero_3_share_the_batches_and_find_what_one_finds(run):
    (one,) = (run / "evaluation").iterdir()
    two = run.parent / "two"
    assert json.loads((one / "figures.json").read_text()) == json.loads((two / "figures.json").read_text())
    for task in TASKS:
        assert lines(one / f"samples_{task}.jsonl") == lines(two / f"samples_{task}.jsonl")
    drawn = [sample["resps"] for sample in lines(one / "samples_tiny_draws.jsonl")]
    assert drawn != [sample["resps"] for sample in lines(one / "samples_tiny_says.jsonl")]


def test_batches_are_the_longest_first_and_one_row_for_one_context():
    requests = [([1, 2], [5]), ([1], [7, 8, 9]), ([1, 2], [6]), ([3], [4]), ([2], [4])]
    assert token_batches(requests, 2) == [[1, 0, 2], [4, 3]]
    assert token_batches([], 2) == []
    greedy, drawn = {"until": ["."]}, {"until": ["."], "do_sample": True}
    prompts = [(1, "a", greedy), (3, "b", drawn), (3, "d", greedy), (3, "c", greedy), (1, "e", drawn)]
    assert prompt_batches(prompts, 2) == [[3, 2], [0], [1, 4]]
