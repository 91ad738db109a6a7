"""`ardtrain evaluate`: the run's own held-out figures, and the same files for any number of processes."""

import json
import os
import subprocess
import sys

import pytest

from tests.launch.test_full_worlds import classifier_run
from tests.runs import fingerprint, lines, write_run
from tests.tiny_paligemma import save_tiny_paligemma, write_rows

pytestmark = pytest.mark.launch
SHORT = {"max_steps": 8, "eval_steps": 4, "save_steps": 4, "elalora": None}
ARD = {"init_warmup": 1, "final_warmup": 2, "resize_interval": 2, "alpha_interval": 1}


SPEAKS = {
    "evaluation": {"max_new_tokens": 10, "do_sample": True},
    "eval_metrics": ["em", "rougeL", "bleu"],
    "metric_for_best_model": "chrf",
}
SPOKEN = ("exact_match", "rougeL", "bleu", "chrf")
BEAMS = (
    "evaluation.max_new_tokens=8",
    "evaluation.num_beams=3",
    "evaluation.references_field=answers",
    "evaluation.group_field=kind",
)


def pictures_run(folder):
    """A PaliGemma-2 that trains two steps; its held-out rows have ten answers and a kind each."""
    folder.mkdir()
    save_tiny_paligemma(folder / "model")
    write_rows(folder, "train", 12)
    path = write_rows(folder, "dev", 9, seed=1)
    rows = [row | {"answers": ["odd"] * 4 + ["even"] * 6, "kind": f"kind {n % 2}"} for n, row in enumerate(lines(path))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"task": "image_text_to_text", "max_steps": 2, "eval_steps": 2, "elalora": None}
    return write_run(folder, "pictures", method="lora", **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def done(folder):
    """All starts of this file in one process: {name: its result}."""
    starts = {}

    def train(config):
        starts[config.stem] = {"config": str(config), "world_size": 1}

    def evaluate(name, target, world_size, *arguments):
        out = ["--out", str(folder / name)]
        whole = ["evaluate", str(folder / target), *out, "evaluation.bootstrap_samples=50", *arguments]
        starts[name] = {"arguments": whole, "world_size": world_size}

    gates = write_run(folder, "gates", method="ard_lora", ard_lora=ARD, packing=True, **SHORT, **SPEAKS)
    # So many tokens end an answer that processes end theirs at different places.
    model = folder / "model" / "config.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | {"eos_token_id": [2, *range(30, 60)]}))
    train(gates)
    pair = write_run(
        folder, "pair", method="ard_lora", ard_lora=ARD, packing=True, deepspeed="zero3", **SHORT, **SPEAKS
    )
    starts["pair"] = {"config": str(pair), "world_size": 2}
    evaluate("gates-middle", "gates/checkpoint-4", 1)
    evaluate("gates-one", "gates", 1)
    evaluate("gates-two", "gates", 2, "deepspeed=zero3_offload")
    spoken = ("--metrics", "loss,em,rouge,bleu,chrf")
    evaluate("said-one", "gates", 1, *spoken)
    evaluate("said-two", "gates", 2, *spoken, "deepspeed=zero3_offload")
    still = {"learning_rate": "1e-9", "early_stopping_patience": 2, "early_stopping_threshold": 0.5}
    waits = write_run(folder, "waits", method="lora", max_steps=12, eval_steps=2, save_steps=2, elalora=None, **still)
    train(waits)
    starts["waits-again"] = {"config": str(waits), "world_size": 1, "overrides": ["resume_from_checkpoint=auto"]}
    whole = {"method": "full", "r": None, "lora_dropout": None, "learning_rate": 1e-3}
    train(write_run(folder, "whole", **whole, **SHORT))
    evaluate("whole-end", "whole", 1)
    evaluate("whole-middle", "whole/checkpoint-4", 1, "allow_pickle=true")
    train(classifier_run(folder, "head", metric_for_best_model="accuracy", method="lora", save_steps=6, elalora=None))
    evaluate("head-one", "head/best", 1)
    evaluate("head-two", "head/best", 2, "deepspeed=zero3", "--metrics", "mcc,loss")
    train(pictures_run(folder / "pictures"))
    seen = ("--metrics", "token_match,vqa,cider,em", *BEAMS)
    evaluate("seen-one", "pictures/pictures", 1, *seen)
    evaluate("seen-two", "pictures/pictures", 2, *seen, "deepspeed=zero3")
    asked, answered = folder / "starts.json", folder / "results.json"
    asked.write_text(json.dumps(list(starts.values())))
    command = [sys.executable, "-m", "tests.launch.starts", str(asked), str(answered)]
    environment = os.environ | {"ARDTRAIN_CACHE": str(folder / "cache")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    results = dict(zip(starts, json.loads(answered.read_text()), strict=True))
    for name, result in results.items():
        assert set(result["codes"]) == {0}, f"{name}\n{result['logs']}"
    return results


def figures(folder, name):
    return json.loads((folder / name / "figures.json").read_text())


def logged(folder, run, step):
    """What the run logged of its evaluation at this step, by the names of `held_out`."""
    (found,) = [m for m in lines(folder / run / "metrics.jsonl") if m["step"] == step and "eval_loss" in m]
    return {name.removeprefix("eval_"): value for name, value in found.items() if name.startswith("eval_")}


@pytest.mark.parametrize(
    ("name", "run", "step"),
    [
        ("gates-middle", "gates", 4),
        ("gates-one", "gates", 8),
        ("head-one", "head", None),
        ("whole-middle", "whole", 4),
        ("whole-end", "whole", 8),
    ],
)
def test_figures_are_those_that_training_logged_at_the_checkpoint(folder, done, name, run, step):
    found = figures(folder, name)
    step = step or int((folder / run / "best").read_text().strip().rpartition("-")[2])
    assert found["step"] == step
    own = {name: value for name, value in logged(folder, run, step).items() if name not in SPOKEN}
    assert {key: found["held_out"][key] for key in own} == own
    assert {key: figure["value"] for key, figure in found["metrics"].items()} == {key: own[key] for key in own}


def test_generated_metrics_in_training_are_those_of_evaluate_on_any_number_of_processes(folder, done):
    at = {name: {step: logged(folder, name, step) for step in (4, 8)} for name in ("gates", "pair")}
    assert at["gates"] == at["pair"] and fingerprint(folder / "gates") == fingerprint(folder / "pair")
    told = figures(folder, "said-one")["metrics"]
    assert {name: at["gates"][8][name] for name in SPOKEN} == {name: told[name]["value"] for name in SPOKEN}
    assert at["gates"][8]["chrf"] > 0 and at["gates"][4]["chrf"] != at["gates"][8]["chrf"]
    best = max((4, 8), key=lambda step: at["gates"][step]["chrf"])
    assert (folder / "gates" / "best").read_text().strip() == f"checkpoint-{best}"


def test_ranks_moved_and_gates_were_open_in_part(folder, done):
    """Else the first test would say nothing of ARD-LoRA."""
    assert len(lines(folder / "gates" / "ranks.jsonl")) > 1
    assert figures(folder, "gates-middle")["held_out"]["loss"] != figures(folder, "gates-one")["held_out"]["loss"]


def test_two_processes_under_zero3_with_offload_write_the_same_files(folder, done):
    for file in ("figures.json", "predictions.jsonl"):
        assert (folder / "gates-one" / file).read_bytes() == (folder / "gates-two" / file).read_bytes()
    two, one = figures(folder, "head-two"), figures(folder, "head-one")
    assert list(two["metrics"]) == ["matthews_correlation", "loss"]
    assert two["metrics"] == {name: one["metrics"][name] for name in two["metrics"]}
    assert lines(folder / "head-one" / "predictions.jsonl") == lines(folder / "head-two" / "predictions.jsonl")


def test_rows_add_up_to_the_figures_and_intervals_hold_them(folder, done):
    rows, found = lines(folder / "gates-one" / "predictions.jsonl"), figures(folder, "gates-one")
    assert [row["row"] for row in rows] == list(range(18)) and rows[3]["id"].endswith("dev.jsonl:4")
    assert sum(row["num_tokens"] for row in rows) == found["held_out"]["num_tokens"]
    loss = sum(row["loss"] for row in rows) / found["held_out"]["num_tokens"]
    assert loss == pytest.approx(found["metrics"]["loss"]["value"], rel=1e-6)
    for figure in (found["metrics"]["loss"], *figures(folder, "head-one")["metrics"].values()):
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert found["metrics"]["loss"]["high"] - found["metrics"]["loss"]["low"] > 0.01
    rows, found = lines(folder / "head-one" / "predictions.jsonl"), figures(folder, "head-one")
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / len(rows) == found["metrics"]["accuracy"]["value"]


def test_answers_are_the_same_on_two_processes_that_end_at_different_places(folder, done):
    for one, two in (("said-one", "said-two"), ("seen-one", "seen-two")):
        for file in ("figures.json", "predictions.jsonl"):
            assert (folder / one / file).read_bytes() == (folder / two / file).read_bytes()
    lengths = [row["generated_tokens"] for row in lines(folder / "said-one" / "predictions.jsonl")]
    assert min(lengths) < 4 and max(lengths) == 10


def test_generated_rows_hold_text_references_and_scores(folder, done):
    found, rows = figures(folder, "said-one"), lines(folder / "said-one" / "predictions.jsonl")
    assert set(found["metrics"]) == {"loss", "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"}
    assert found["metrics"]["loss"] == figures(folder, "gates-one")["metrics"]["loss"]
    assert [row["id"] for row in rows] == [row["id"] for row in lines(folder / "gates-one" / "predictions.jsonl")]
    first = lines(folder / "dev.jsonl")[0]
    assert rows[0]["references"] == [first["completion"]] and isinstance(rows[0]["text"], str)
    assert sum(row["exact_match"] for row in rows) / 18 == found["metrics"]["exact_match"]["value"]
    assert len({row["text"] for row in rows}) > 10


def test_answers_about_pictures_by_kind(folder, done):
    found = figures(folder, "seen-one")
    own = logged(folder / "pictures", "pictures", 2)
    assert found["held_out"]["exact_match"] == own["exact_match"] == found["metrics"]["token_match"]["value"]
    kinds = found["groups"]["vqa_accuracy"]
    assert [(name, kind["rows"]) for name, kind in kinds.items()] == [("kind 0", 5), ("kind 1", 4)]
    assert set(found["groups"]) == {"vqa_accuracy", "cider", "exact_match"}
    (row, *_) = lines(folder / "seen-one" / "predictions.jsonl")
    assert row["references"] == ["odd"] * 4 + ["even"] * 6


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(folder, done):
    """Evaluations after steps 2, 4 and 6; the rate is so small that none is better by the threshold."""
    steps = [m["step"] for m in lines(folder / "waits" / "metrics.jsonl") if "eval_loss" in m]
    assert steps == [2, 4, 6]
    assert (folder / "waits" / "status").read_text().split()[:2] == ["finished", "6"]
    assert (folder / "waits" / "latest").read_text().strip() == "checkpoint-6"
    assert (folder / "waits" / "adapter" / "adapter_model.safetensors").is_file()
    for name in ("waits", "waits-again"):
        assert "ended early at step 6: 2 evaluations were no better than the best eval_loss" in done[name]["logs"]


def test_best_names_the_checkpoint_of_the_best_accuracy(folder, done):
    found = {m["step"]: m["eval_accuracy"] for m in lines(folder / "head" / "metrics.jsonl") if "eval_loss" in m}
    best = max(found, key=lambda step: (found[step], -step))
    assert (folder / "head" / "best").read_text().strip() == f"checkpoint-{best}"
    assert figures(folder, "head-one")["metrics"]["accuracy"]["value"] == found[best]
