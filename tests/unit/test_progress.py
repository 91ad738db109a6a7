import pytest

from ardtrain.progress import PLAIN_SECONDS, Progress, duration, moved_text


def test_plain_lines_come_now_and_then(capsys):
    """The first step, then one line every PLAIN_SECONDS, then the last; speed of the last steps, time left of all."""
    clock = [0.0]
    progress = Progress(num_steps=100, first_step=10, on_terminal=False, now=lambda: clock[0])
    for step in range(11, 101):
        clock[0] += 1.0
        progress.step(step, loss=1.0, num_tokens=500 if step < 60 else 1000, total_rank=32)
    progress.close()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == ["11", "41", "71", "100"] and PLAIN_SECONDS == 30.0
    assert lines[1] == "step 41 of 100: loss 1.0000, 500 tokens/s, rank 32, about 0:59 left"
    assert "1,000 tokens/s" in lines[3] and err == ""


def test_the_bar_shows_all(capsys):
    clock = [0.0]
    progress = Progress(num_steps=4, first_step=2, on_terminal=True, now=lambda: clock[0])
    progress.held_out(1.75)
    progress.event([{"site": "layers.3.v_proj", "before": 4, "after": 2}])
    clock[0] = 2.0
    progress.step(4, loss=2.34567, num_tokens=6000, total_rank=112)
    progress.close()
    out, err = capsys.readouterr()
    assert out == "" and "4/4" in err
    assert "loss 2.3457, held-out 1.7500, 3,000 tokens/s, rank 112, moved -2 3.v_proj" in err


def test_full_fine_tuning_has_no_rank(capsys):
    progress = Progress(num_steps=1, on_terminal=False)
    progress.step(1, loss=0.5, num_tokens=10, total_rank=None)
    assert "rank" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([], ""),
        (
            [("model.layers.2.mlp.up_proj", 4, 7), ("model.layers.0.self_attn.v_proj", 4, 2)],
            "moved +3 2.up_proj -2 0.v_proj",
        ),
        ([("layers.1.q_proj:head.3", 4, 3), ("layers.1.q_proj:head.2", 4, 1)], "moved -3 1.q_proj:head.2"),
        ([("projector", 4, 4)], ""),  # one went and one came
        ([("connector.linear", 1, 2)], "moved +1 linear"),
    ],
)
def test_what_moved_most_is_named(changes, text):
    assert moved_text([{"site": s, "before": b, "after": a} for s, b, a in changes]) == text


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, -1)] == ["0:00", "1:00", "59:59", "1:00:00", "0:00"]
