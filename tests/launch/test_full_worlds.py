"""Full fine-tuning and a classifier's head on 1, 2 and 3 processes, cut and resumed on others.

`full` sums in floats: equal bits on the same number of processes, losses that differ in their last digits on others.
"""

import hashlib
import json

import pytest
from safetensors.torch import load_file

from tests.launch.stories import Stories
from tests.runs import fingerprint, lines, write_run

pytestmark = [pytest.mark.launch, pytest.mark.full]
STEPS = 20
RESUME = ["resume_from_checkpoint=auto", "allow_pickle=true"]
# A stop that is asked for in the first evaluation of a start, every fifth step, is carried out one step later.
PARTS = {  # of a run: processes, ZeRO stage, is the optimizer offloaded?
    "cut": ((2, {"stage": 2}), (3, {"stage": 3}), (1, {"stage": 1, "offload": True})),
    "back": ((3, {"stage": 3, "offload": True}), (2, {"stage": 1})),
    "same": ((2, {"stage": 2}), (2, {"stage": 2})),
}
FULL = {"method": "full", "adapter_zero": None}
HEAD = {"method": "elalora", "features": ["lora_dropout", "task: sequence_classification"]}
CUTS = {"cut": [(6, 2, 2), (11, 3, 3), (STEPS, 1, 1)], "back": [(6, 3, 3), (STEPS, 2, 1)]}


def zero(stage, *, offload=False):
    """A DeepSpeed config of this stage."""
    where = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    return {"zero_optimization": {"stage": stage, **where}}


def full_run(folder, name, stage, *, run=None, **where):
    """The config `name` of all-weights run `run`: configs of one run differ in their ZeRO stage and offload."""
    own = {"method": "full", "elalora": None, "r": None, "lora_dropout": None, "learning_rate": 1e-3}
    output = str(folder / (run or name))
    return write_run(
        folder, name, **own, max_steps=STEPS, eval_steps=5, output_dir=output, deepspeed=zero(stage, **where)
    )


def classifier_run(folder, name, **changes):
    """ElaLoRA on a tiny Llama that tells rows with more a's from rows with more b's; its head trains in full."""
    path = folder / "labels.jsonl"
    if not path.is_file():
        texts = ["".join("ab"[(n * k + k * k // 3) % 7 % 2] for k in range(5 + n % 7)) for n in range(60)]
        rows = [{"text": text, "label": "ab"[2 * text.count("b") > len(text)]} for text in texts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train_file": str(path), "eval_file": str(path)}
    return write_run(folder, name, task="sequence_classification", data=data, max_steps=12, eval_steps=6, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def done(folder):
    """All starts of this file in one process."""
    stories = Stories(folder)
    for name, size, stage in (("alone-1", 1, 1), ("alone-2", 2, 2), ("alone-3", 3, 3)):
        stories.add(name, full_run(folder, name, stage), size)
    for name, parts in PARTS.items():
        for number, (size, where) in enumerate(parts):
            config = full_run(folder, f"{name}-part-{number}", run=name, **where)
            is_last = number == len(parts) - 1
            stories.add(name, config, size, RESUME, **({} if is_last else {"stop_in": ("evaluation", 1)}))
    for size in (1, 2, 3):
        stories.add(
            f"head-{size}", classifier_run(folder, f"head-{size}", deepspeed="zero3" if size == 3 else None), size
        )
    cut = classifier_run(folder, "head-cut")
    stories.add("head-cut", cut, 3, RESUME, stop_after=5)
    stories.add("head-cut", cut, 2, RESUME)
    stories.play()
    return stories


def cut_by(run_dir):
    """[(step, processes, ZeRO stage)] of the checkpoints of an all-weights run."""
    found = []
    for path in run_dir.glob("checkpoint-*/deepspeed/layout.json"):
        layout = json.loads(path.read_text())
        found.append((int(path.parent.parent.name.rpartition("-")[2]), layout["processes"], layout["stage"]))
    return sorted(found)


def losses(run_dir, key="loss"):
    """{step: loss} of a whole run, every step once."""
    found = [(m["step"], m[key]) for m in lines(run_dir / "metrics.jsonl") if key in m]
    out = dict(found)
    assert len(out) == len(found)
    if key == "loss":
        assert len(out) == STEPS
    return out


def model_digest(run_dir):
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_full_on_one_two_and_three_processes_is_one_run_to_a_millionth(folder, done, record_run):
    names = ("alone-1", "alone-2", "alone-3")
    done.ended_well(*names)
    one, two, three = (losses(folder / name) for name in names)
    assert two == pytest.approx(one, rel=1e-6) and three == pytest.approx(one, rel=1e-6)
    held_out = [losses(folder / name, "eval_loss") for name in names]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-6) and held_out[2] == pytest.approx(held_out[0], rel=1e-6)
    assert one[STEPS] < one[1] - 0.1  # it learns: equality of runs that stand still would say nothing
    for size in (1, 2, 3):
        record_run(processes=size, base_zero=size, equal="bits" if size == 1 else "1e-6", **FULL)


def test_full_twice_on_two_processes_once_cut_and_resumed_has_equal_bits(folder, done, record_run):
    done.ended_well("alone-2", "same")
    assert cut_by(folder / "same") == [(6, 2, 2), (STEPS, 2, 2)]
    for key in ("loss", "grad_norm", "eval_loss"):
        assert losses(folder / "same", key) == losses(folder / "alone-2", key)
    assert model_digest(folder / "same") == model_digest(folder / "alone-2")
    record_run(processes=2, resumed_from=2, base_zero=2, **FULL)


@pytest.mark.parametrize("name", CUTS)
def test_full_resumed_elsewhere_is_the_unbroken_run_to_a_millionth(folder, done, name, record_run):
    done.ended_well(name, "alone-1")
    unbroken, own = losses(folder / "alone-1"), losses(folder / name)
    assert own == pytest.approx(unbroken, rel=1e-6)
    assert losses(folder / name, "eval_loss") == pytest.approx(losses(folder / "alone-1", "eval_loss"), rel=1e-6)
    assert cut_by(folder / name) == CUTS[name]
    before = None
    for size, where in PARTS[name]:
        offload = where.get("offload", False)
        settings = {"base_zero": where["stage"], "optimizer_offload": offload, "resumed_from": before}
        record_run(processes=size, equal="1e-6", **settings, **FULL)
        before = size


def test_a_classifier_has_equal_bits_on_one_two_and_three_processes(folder, done, record_run):
    runs = ("head-1", "head-2", "head-3")
    done.ended_well(*runs)
    one, two, three = (fingerprint(folder / name) for name in runs)
    assert one == two == three and len(one["tables"]) > 1
    last = folder / "head-1" / (folder / "head-1" / "latest").read_text().strip()
    tensors = {}
    for path in (last / "state").glob("*.safetensors"):
        tensors |= load_file(path)
    (head,) = [name for name in tensors if name.startswith("score") and name.endswith("master")]
    assert tensors[head].abs().max() > 0 and tensors[head.replace("master", "exp_avg")].abs().max() > 0
    written = load_file(folder / "head-1" / "adapter" / "adapter_model.safetensors")
    assert any("score" in name for name in written)
    for size in (1, 2, 3):
        record_run(processes=size, base_zero=3 if size == 3 else 0, resizes=len(set(one["tables"])) - 1, **HEAD)


def test_a_classifier_cut_and_resumed_on_others_has_equal_bits(folder, done, record_run):
    done.ended_well("head-cut", "head-1")
    manifests = [json.loads(p.read_text()) for p in (folder / "head-cut").glob("checkpoint-*/manifest.json")]
    assert sorted((m["step"], m["world_size"]) for m in manifests) == [(5, 3), (12, 2)]
    assert fingerprint(folder / "head-cut") == fingerprint(folder / "head-1")
    resizes = len(set(fingerprint(folder / "head-1")["tables"])) - 1
    for size, before in ((3, None), (2, 3)):
        record_run(processes=size, resumed_from=before, resizes=resizes, **HEAD)
