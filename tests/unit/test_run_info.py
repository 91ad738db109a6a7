import json

import torch

from ardtrain.ranks import Site
from ardtrain.run_info import RUN_INFO_FILE, peaks, read_starts, write_run_info


def write(folder, step, world_size=1):
    heads = [Site(f"layers.0.q:head.{h}", "layers.0.q", 8, 4, kind="head", head=h) for h in range(2)]
    write_run_info(
        folder, step=step, sites=[*heads, Site("vision.fc", "vision.fc", 3, 5, tower="vision")], num_trained=10,
        num_base=100, world_size=world_size, device=torch.device("cpu"),
    )  # fmt: skip
    return json.loads((folder / RUN_INFO_FILE).read_text())


def test_each_start_is_added_and_a_new_run_begins_anew(tmp_path):
    first = write(tmp_path, 0)
    assert first["modules"] == {"layers.0.q": [8, 4, "language"], "vision.fc": [3, 5, "vision"]}
    assert (first["num_trained"], first["num_base"]) == (10, 100)
    assert first["starts"][0]["versions"]["torch"] == torch.__version__
    again = write(tmp_path, 50, world_size=4)
    assert [(start["step"], start["world_size"]) for start in again["starts"]] == [(0, 1), (50, 4)]
    assert [start["step"] for start in write(tmp_path, 0)["starts"]] == [0]


def test_what_cannot_be_read_is_no_start(tmp_path):
    assert read_starts(tmp_path / RUN_INFO_FILE) == []
    for text in ("", "[]", '{"starts": 3}'):
        (tmp_path / RUN_INFO_FILE).write_text(text)
        assert read_starts(tmp_path / RUN_INFO_FILE) == []
    assert len(write(tmp_path, 9)["starts"]) == 1


def test_peaks_are_bytes_of_this_process():
    host, device = peaks(torch.device("cpu"))
    assert host > 50 << 20 and device == 0
