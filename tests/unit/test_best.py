"""The best evaluation and early stops: Hugging Face's own rules as oracle, the loop, a resume, wrong settings."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import EarlyStoppingCallback

from ardtrain.best import Judge
from ardtrain.config import best_metric, is_greater_better, load_config
from ardtrain.evaluation import HeldOut
from ardtrain.methods.lora import Lora
from ardtrain.session import loop_state
from ardtrain.trainer import LoopState
from tests.runs import write_run
from tests.tiny import HeldOutBatches, tiny_trainer


def of_hugging_face(values, *, greater, patience, threshold):
    """(evaluation at which it stops or None, best value) by EarlyStoppingCallback and Trainer's rule for the best."""
    callback = EarlyStoppingCallback(patience, threshold)
    args = SimpleNamespace(greater_is_better=greater, metric_for_best_model="m")
    state, control = SimpleNamespace(best_metric=None), SimpleNamespace(should_training_stop=False)
    better = np.greater if greater else np.less
    for index, value in enumerate(values):
        callback.on_evaluate(args, state, control, {"eval_m": value})
        if state.best_metric is None or better(value, state.best_metric):
            state.best_metric = value
        if control.should_training_stop:
            return index, state.best_metric
    return None, state.best_metric


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_judges_as_hugging_face_does(greater, threshold):
    numbers = np.random.default_rng(3)
    stops = set()
    for _ in range(60):
        values = numbers.normal(size=12).round(1).tolist()
        judge, state, stopped = Judge("accuracy", greater, 3, threshold), LoopState(), None
        for index, value in enumerate(values):
            judge.look(state, index, {"accuracy": value})
            if judge.is_done(state):
                stopped = index
                break
        wanted = of_hugging_face(values, greater=greater, patience=3, threshold=threshold)
        assert (stopped, state.best_value) == wanted
        assert values[state.best_step] == state.best_value
        stops.add(stopped)
    assert len(stops) > 4


def test_no_number_is_no_better_and_another_metric_begins_anew():
    judge, state = Judge(patience=2), LoopState()
    for step, loss in enumerate((math.nan, 2.0, math.inf, math.nan)):
        judge.look(state, step, {"loss": loss})
    assert (state.best_value, state.best_step, state.waited) == (2.0, 1, 2) and judge.is_done(state)
    Judge("accuracy", True).look(state, 9, {"accuracy": 0.5, "loss": 9.0})
    assert (state.best_metric, state.best_value, state.best_step, state.waited) == ("accuracy", 0.5, 9, 0)
    assert not Judge(patience=None).is_done(LoopState(waited=99))


def test_a_checkpoint_from_before_these_fields_keeps_its_best_loss():
    state = loop_state({"step": 30, "best_loss": 1.5})
    Judge().look(state, 40, {"loss": 1.75})
    assert (state.best_value, state.best_step, state.waited) == (1.5, -1, 1)
    Judge().look(state, 50, {"loss": 1.25})
    assert (state.best_value, state.best_step, state.waited) == (1.25, 50, 0)


def stopping_trainer(losses, *, saves, state=None, **judge):
    """A trainer of 12 steps that evaluates after each second one and finds these losses."""
    trainer = tiny_trainer(Lora(), total_steps=12, eval_steps=2, judge=Judge(**judge), start=True, learning_rate=1e-4)
    trainer.eval_data = HeldOutBatches()
    if state is not None:
        trainer.state = state
    found = iter(losses)
    trainer.evaluate = lambda: HeldOut(next(found), 1)
    trainer.hooks.save = lambda reason: saves.append((trainer.state.step, reason, trainer.state.best_step))
    return trainer


def test_the_loop_ends_with_a_checkpoint_and_a_resume_of_it_has_nothing_to_do(world):
    saves = []
    trainer = stopping_trainer([3.0, 2.0, 2.5, 2.2], saves=saves, patience=2)
    assert trainer.fit() == 0 and trainer.waited_enough
    assert saves == [(8, "last", 4)]
    again = stopping_trainer([], saves=saves, state=loop_state(asdict(trainer.state)), patience=2)
    assert again.fit() == 0 and again.state.step == 8 and len(saves) == 1
    longer = stopping_trainer([2.1, 1.9], saves=saves, state=loop_state(asdict(trainer.state)), patience=4)
    assert longer.fit() == 0 and longer.state.step == 12
    assert saves[1:] == [(12, "last", 12)]


def test_without_patience_the_loop_goes_to_its_last_step(world):
    saves = []
    trainer = stopping_trainer([3.0] * 6, saves=saves)
    assert trainer.fit() == 0 and trainer.state.step == 12 and not trainer.waited_enough


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"metric_for_best_model": "accuracy"},
            "metric_for_best_model=accuracy is not logged by task=causal_lm; choose",
        ),
        (
            {"early_stopping_patience": 2, "eval_steps": None},
            "early_stopping_patience=2 waits for evaluations; set eval",
        ),
        (
            {"eval_metrics": ["rougue1"]},
            "eval_metrics=rougue1 is no metric of generated answers to task=causal_lm; choose",
        ),
        ({"eval_metrics": "bleu", "data": {"train_file": "a"}, "eval_steps": None}, "eval_metrics=.* has no rows; set"),
        (
            {"eval_metrics": "bleu", "task": "sequence_classification"},
            "eval_metrics=bleu is no metric of generated answers to task=sequence_classification; remove it",
        ),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold=0.1 has no effect; set early_stopping_patience"),
    ],
)
def test_settings_that_cannot_work_say_why(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        load_config(write_run(tmp_path, **settings))


def test_direction_follows_the_metric_unless_it_is_set(tmp_path):
    config = load_config(write_run(tmp_path, metric_for_best_model="eval_perplexity"))
    assert best_metric(config.metric_for_best_model) == "perplexity" and not is_greater_better(config)
    assert config.generated_metrics == ()
    spoken = config.model_copy(update={"metric_for_best_model": "eval_em", "eval_metrics": ("rougeL", "vqa")})
    assert spoken.generated_metrics == ("rougeL", "vqa_accuracy", "exact_match") and is_greater_better(spoken)
    assert spoken.model_copy(update={"task": "image_text_to_text"}).generated_metrics == ("rougeL", "vqa_accuracy")
    assert is_greater_better(config.model_copy(update={"metric_for_best_model": "mcc"}))
    assert is_greater_better(config.model_copy(update={"greater_is_better": True}))
