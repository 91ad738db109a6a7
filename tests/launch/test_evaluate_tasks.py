"""`ardtrain evaluate --tasks`: lm-eval on a checkpoint, offline, beside its own reading of the exported adapter."""

import json

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.distributed.processes import run_processes
from tests.runs import lines, write_run

pytestmark = pytest.mark.launch
TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder):
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
    (folder / "tiny_sums.yaml").write_text(TASK.format(rows=path))


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
    write_task(folder / "own")
    environment = {"ARDTRAIN_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    asked = ["--tasks", "tiny_sums", "--include_path", str(folder / "own"), "--limit", "3"]
    for verb in (["train", str(config)], ["evaluate", str(folder / "run"), *asked]):
        ended = run_processes(1, ["-m", "ardtrain", *verb], folder=folder, timeout=600, environment=environment)
        assert ended.codes == [0], ended.text()
    return folder / "run"


def test_a_task_finds_what_lm_eval_finds_with_the_exported_adapter(run, data_dir, monkeypatch, tmp_path):
    (out,) = (run / "evaluation").iterdir()
    found = json.loads((out / "figures.json").read_text())
    figure = found["tasks"]["figures"]["tiny_sums"]["acc"]
    assert found["tasks"]["rows"] == {"tiny_sums": 3} and found["metrics"] == {}
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    harness = HFLM(pretrained=str(data_dir / "stories260k_llama"), peft=str(run / "adapter"), device="cpu")
    manager = TaskManager(include_path=str(run.parent / "own"), include_defaults=False)
    plain = simple_evaluate(model=harness, tasks=["tiny_sums"], task_manager=manager, bootstrap_iters=0)
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
