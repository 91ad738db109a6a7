import json

import numpy as np
import pytest
from matplotlib import image

from ardtrain.report.history import read_ranks
from ardtrain.report.pictures import draw_ranks

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def write(path, records, end=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return path


def made_up_run(path, num_layers=12, num_events=20, seed=0):
    """A run whose ranks drift to the middle layers, two rank moved per event in four places."""
    generator = np.random.default_rng(seed)
    table = {f"model.layers.{i}.{kind}": 4 for i in range(num_layers) for kind in KINDS}
    names = list(table)
    weight = np.array(
        [np.exp(-(((i // 7) - num_layers * 0.6) ** 2) / 12) + 0.3 * (i % 7 > 3) for i in range(len(names))]
    )
    records = [{"event": 0, "step": 0, "table": dict(table), "total_rank": sum(table.values())}]
    for event in range(1, num_events + 1):
        changes = []
        for sign, p in ((1, weight), (-1, 1 / (weight + 0.05))):
            can = p * np.array([1 <= table[n] + sign <= 12 and n not in {c["site"] for c in changes} for n in names])
            for name in generator.choice(names, size=4, replace=False, p=can / can.sum()):
                changes.append({"site": str(name), "before": table[name], "after": table[name] + sign})
                table[name] += sign
        records.append({"event": event, "step": 25 * event, "total_rank": sum(table.values()), "changes": changes})
    return write(path, records), table


def test_history_follows_the_changes(tmp_path):
    path, table = made_up_run(tmp_path / "ranks.jsonl")
    history = read_ranks(path)
    assert history.steps == [25 * event for event in range(21)]
    assert dict(zip(history.matrices, history.ranks[-1].tolist(), strict=True)) == table
    assert (history.ranks.sum(axis=1) == 4 * 84).all()


def test_heads_of_a_matrix_are_summed(tmp_path):
    start = {"layers.0.q_proj:head.0": 2, "layers.0.q_proj:head.1": 2, "layers.0.mlp": 1}
    changes = [{"site": "layers.0.q_proj:head.1", "before": 2, "after": 5}]
    path = write(
        tmp_path / "r.jsonl", [{"step": 0, "table": start}, {"step": 3, "changes": changes}], '{"step": 6, "ch'
    )
    history = read_ranks(path)
    assert history.matrices == ["layers.0.q_proj", "layers.0.mlp"]
    assert history.ranks.tolist() == [[4, 1], [7, 1]]


@pytest.mark.parametrize("name", ["layers.0.q_proj", "layers.9.q_proj"])
def test_a_missing_line_is_named(tmp_path, name):
    changes = [{"site": name, "before": 3, "after": 4}]
    path = write(tmp_path / "r.jsonl", [{"step": 0, "table": {"layers.0.q_proj": 2}}, {"step": 1, "changes": changes}])
    with pytest.raises(ValueError, match=r"r\.jsonl:2: .* has rank 3 before the event"):
        read_ranks(path)


def test_another_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1 must hold the rank table"):
        read_ranks(write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}]))


@pytest.mark.parametrize(
    "table",
    [
        {"layers.0.q_proj": 2},
        {f"model.layers.{i}.q_proj": 2 for i in range(80)},
        {f"{tower}.layers.{i}.q_proj": 2 for tower in ("vision", "text") for i in range(3)} | {"connector": 4},
    ],
)
def test_any_shape_of_model_is_drawn(tmp_path, table):
    path = write(tmp_path / "ranks.jsonl", [{"event": 0, "step": 0, "table": table}])
    pixels = image.imread(draw_ranks(path, tmp_path / "ranks.png"))
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.01  # not blank
