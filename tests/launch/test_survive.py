"""Runs that are stopped and go on elsewhere: every pair of world sizes, every method, in the middle of things."""

import shutil

import pytest

from tests.launch.stories import Stories
from tests.runs import fingerprint, lines, write_run

pytestmark = pytest.mark.launch
ALL_PAIRS = (1, 2, 3, 4, 1, 3, 1, 4, 2, 4, 3, 2, 1)  # each ordered pair of 1 to 4 once
METHODS = {
    "elalora": {},
    "adalora": {"r": 6, "adalora": {"target_r": 4, "tinit": 2, "tfinal": 8, "deltaT": 2}},
    "alora": {"alora": {"k1_steps": 4, "k2_steps": 4, "rounds": 6, "n_a": 4, "val_batch": 8}},
    "ard_lora": {"r": 2, "ard_lora": {"alpha_interval": 2, "resize_interval": 3, "lr_alpha": 0.3}},
    "shared_a": {"r": 2, "ard_lora": {"layout": "shared_a", "alpha_interval": 2, "resize_interval": 3}},
    "dora": {},
    "lora": {"optimizer": {"lora_plus_ratio": 4}},
    "probe_lora": {"probe_lora": {"init_warmup": 2, "final_warmup": 4, "mask_interval": 4, "probe_steps": 2}},
}
SHORT = ("elalora",)  # in every round of tests; the others with -m full
AUTO = ["resume_from_checkpoint=auto"]


def config_of(folder, method, name, **changes):
    """A run of 26 steps."""
    kind = "ard_lora" if method == "shared_a" else method
    own = METHODS[method] | ({} if method == "elalora" else {"elalora": None})
    return write_run(folder, name, **({"method": kind, "max_steps": 26, "eval_steps": 5} | own | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("survive")


@pytest.fixture(scope="module")
def done(folder):
    """The stories of ElaLoRA, and of ALoRA's ablation."""
    stories = Stories(folder)
    for method in SHORT:
        cut_twice(stories, folder, method)
    stories.add("alora-alone", config_of(folder, "alora", "alora-alone"), 1)
    elsewhere = config_of(folder, "elalora", "elsewhere")
    stories.add("elsewhere", elsewhere, 1, [f"resume_from_checkpoint={folder / 'elalora-cut' / 'checkpoint-9'}"])
    fast = ["stop_poll_seconds=1e-6"]  # asks after every round
    for name, method, stop in (
        ("grain", "elalora", ("grain", 20)),
        ("evaluation", "elalora", ("evaluation", 9)),
        ("ablation", "alora", ("ablation", 7)),
    ):
        cut = config_of(folder, method, f"in-{name}")
        stories.add(f"in-{name}", cut, 2, AUTO + fast, stop_in=stop)
        stories.add(f"in-{name}", cut, 1, AUTO)
    zero = config_of(folder, "elalora", "zero")
    stories.add("zero", zero, 3, AUTO, stop_after=9)
    stories.play()
    leave_only_deepspeeds(folder)
    stories.add("zero", zero, 2, [f"resume_from_checkpoint={folder / 'zero-alone'}"])
    longer = config_of(folder, "elalora", "longer", max_steps=20)
    stories.add("longer", longer, 1, AUTO)
    stories.add("longer", longer, 2, [*AUTO, "max_steps=26", "learning_rate=1e-3"])
    stories.add("other", folder / "longer.yaml", 1, [*AUTO, "max_steps=26", "lora_alpha=3"])
    stories.add("first", config_of(folder, "lora", "first"), 1)
    begun = config_of(folder, "elalora", "from", init_from=str(folder / "first" / "adapter"), eval_on_start=True)
    stories.add("from", begun, 2)
    stories.play()
    return stories


@pytest.fixture(scope="module")
def others(folder, done):
    """Every pair of world sizes; the other methods, cut twice.

    tests/distributed/test_matrix.py goes from 4 processes to 3, 2, 1 and 5, and cuts every method once, below the
    command line.
    """
    stories = done
    pairs = config_of(folder, "elalora", "pairs")
    for number, size in enumerate(ALL_PAIRS):
        stop = {"stop_after": 2} if number < len(ALL_PAIRS) - 1 else {}
        zero = ["deepspeed=zero3_offload_param"] if number % 2 else []
        stories.add("pairs", pairs, size, AUTO + zero, **stop)
    for method in METHODS:
        if method not in SHORT:
            cut_twice(stories, folder, method)
    stories.play()
    return stories


def cut_twice(stories, folder, method):
    """A run of the method alone, and one cut on 2 processes and on 3 that ends on 1."""
    if f"{method}-alone" not in stories.results:
        stories.add(f"{method}-alone", config_of(folder, method, f"{method}-alone"), 1)
    cut = config_of(folder, method, f"{method}-cut", deepspeed="zero3" if method != "elalora" else None)
    stories.add(f"{method}-cut", cut, 2, AUTO, stop_after=9)
    stories.add(f"{method}-cut", cut, 3, AUTO, stop_after=4)
    stories.add(f"{method}-cut", cut, 1, AUTO)


def leave_only_deepspeeds(folder):
    """Of the checkpoint of `zero`, in a folder beside it."""
    run = folder / "zero"
    step = (run / "latest").read_text().strip()
    shutil.move(run / step / "deepspeed", folder / "zero-alone")
    shutil.rmtree(run / step)
    (run / "latest").unlink()


@pytest.mark.full
def test_every_pair_of_world_sizes_equals_the_unbroken_run(folder, others):
    others.ended_well("pairs")
    assert len(others.results["pairs"]) == 13
    assert fingerprint(folder / "pairs") == fingerprint(folder / "elalora-alone")


@pytest.mark.parametrize("method", SHORT)
def test_a_method_cut_twice_on_other_world_sizes(folder, done, method):
    done.ended_well(f"{method}-alone", f"{method}-cut")
    assert fingerprint(folder / f"{method}-cut") == fingerprint(folder / f"{method}-alone")


@pytest.mark.full
@pytest.mark.parametrize("method", [m for m in METHODS if m not in SHORT])
def test_every_other_method_cut_twice_on_other_world_sizes(folder, others, method):
    others.ended_well(f"{method}-alone", f"{method}-cut")
    assert fingerprint(folder / f"{method}-cut") == fingerprint(folder / f"{method}-alone")


def test_a_checkpoint_is_gone_on_with_in_an_empty_folder(folder, done):
    """Its records begin with the checkpoint's table, so that pictures and tools know what moved."""
    done.ended_well("elsewhere")
    whole, rest = fingerprint(folder / "elalora-alone"), fingerprint(folder / "elsewhere")
    assert rest["losses"] == {step: loss for step, loss in whole["losses"].items() if step > 9}
    assert (rest["weights"], rest["adapter"]) == (whole["weights"], whole["adapter"])
    first, *events = lines(folder / "elsewhere" / "ranks.jsonl")
    assert first["step"] == 9 and sum(first["table"].values()) == first["total_rank"] and events
    assert all((folder / "elsewhere" / name).is_file() for name in ("ranks.png", "config.yaml"))


@pytest.mark.parametrize("where", ["grain", "evaluation", "ablation"])
def test_a_stop_in_the_middle_is_carried_out_there_and_done_again(folder, done, where):
    done.ended_well(f"in-{where}")
    alone = "alora-alone" if where == "ablation" else "elalora-alone"
    assert fingerprint(folder / f"in-{where}") == fingerprint(folder / alone)


def test_resume_from_deepspeeds_files_alone_on_another_world_size(folder, done):
    done.ended_well("zero")
    whole, rest = fingerprint(folder / "elalora-alone"), fingerprint(folder / "zero")
    assert rest["losses"] == {s: v for s, v in whole["losses"].items() if s in rest["losses"]}
    assert rest["weights"] == whole["weights"] and rest["adapter"] == whole["adapter"]


def test_a_longer_run_goes_on_at_fixed_ranks_and_says_what_changed(folder, done):
    done.ended_well("longer")
    events = lines(folder / "longer" / "ranks.jsonl")
    assert max(e["step"] for e in events) <= 16  # 20 steps, the last 4 of them without events
    logs = (folder / "longer" / "logs" / "process-0000.log").read_text()
    assert "the run has 26 steps now, not 20; ranks had settled and stay" in logs
    assert "learning_rate: the checkpoint has 0.005, this run 0.001" in logs


def test_another_setting_is_refused_with_both_values(done):
    (result,) = done.results["other"]
    assert result["codes"] == [2]
    assert "lora_alpha: the checkpoint has 8.0, this run 3.0" in result["logs"]
    assert "Traceback" not in result["logs"]


def test_a_run_begins_where_an_adapter_of_another_method_ended(folder, done):
    done.ended_well("first")
    done.ended_well("from")
    last = [m for m in lines(folder / "first" / "metrics.jsonl") if "eval_loss" in m][-1]
    begun = [m for m in lines(folder / "from" / "metrics.jsonl") if "eval_loss" in m]
    assert begun[0]["step"] == 0 and begun[0]["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert begun[-1]["eval_loss"] < begun[0]["eval_loss"]
