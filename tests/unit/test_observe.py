import errno
import json
import logging
import os
import re
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from ardtrain import observe
from ardtrain.observe import Clock, RunLog, cut_back, start_logging, truncate_after
from tests.runs import lines


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_keep_all_digits_and_are_json(tmp_path):
    with RunLog(tmp_path, is_main=True, num_steps=2, show_bar=False) as log:
        log.metrics(1, {"loss": 0.1 + 0.2, "norm": float("nan"), "list": [float("inf"), np.float32(0.5), np.int64(3)]})
        log.ranks(0, {"event": 0, "table": {"layers.0.q_proj": 4}})
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.30000000000000004, "norm": None, "list": [None, 0.5, 3]}
    ]
    assert read(tmp_path / "ranks.jsonl")[0]["table"] == {"layers.0.q_proj": 4}


def test_other_processes_write_nothing(tmp_path, capsys):
    with RunLog(tmp_path, is_main=False, num_steps=2) as log:
        log.metrics(1, {"loss": 1.0})
        log.ranks(1, {})
        log.progress(1, loss=1.0, num_tokens=5, total_rank=8)
        log.say("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_what_is_recorded_is_told(tmp_path, capsys):
    """Without a terminal as plain lines; held-out loss and moved ranks come from the records."""
    with RunLog(tmp_path, is_main=True, num_steps=4, first_step=2) as log:
        log.metrics(3, {"eval_loss": 2.5})
        log.ranks(3, {"event": 1, "changes": [{"site": "layers.0.q_proj", "before": 4, "after": 6}]})
        log.progress(4, loss=2.34567, num_tokens=100, total_rank=112)
        log.say("a line")
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert re.fullmatch(
        r"step 4 of 4: loss 2\.3457, held-out 2\.5000, [\d,]+ tokens/s, rank 112, moved \+2 0\.q_proj, about 0:00 left",
        first,
    )
    assert second == "a line" and err == ""


def test_resumed_run_leaves_the_records_of_an_uninterrupted_one(tmp_path):
    def run(folder, first, last):
        with RunLog(folder, is_main=True, num_steps=6, first_step=first, show_bar=False) as log:
            for step in range(first + 1, last + 1):
                log.metrics(step, {"loss": 1 / step})
                if step % 2 == 0:
                    log.ranks(step, {"event": step // 2})

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run(whole, 0, 6)
    run(cut, 0, 5)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # torn by a crash
    run(cut, 3, 6)
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_new_run_in_an_old_folder_starts_its_records_anew(tmp_path):
    (tmp_path / "ranks.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    RunLog(tmp_path, is_main=True, num_steps=1, show_bar=False).close()
    assert (tmp_path / "ranks.jsonl").read_text() == ""


def test_truncate_leaves_a_good_file_alone_and_names_a_bad_line(tmp_path):
    path = tmp_path / "m.jsonl"
    assert truncate_after(path, 3) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n')
    inode = path.stat().st_ino
    assert truncate_after(path, 2) == 0
    assert path.stat().st_ino == inode
    assert truncate_after(path, 1) == 1
    path.write_text('{"step": 1}')  # whole, but its line end is missing: the next line would join it
    assert truncate_after(path, 5) == 1
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: not a record with a step"):
        truncate_after(path, 5)


def test_what_a_resume_cuts_off_is_kept(tmp_path):
    metrics = [f'{{"step": {step}, "loss": {1 / step}}}\n' for step in range(1, 8)]
    ranks = ['{"step": 0, "event": 0}\n', '{"step": 4, "event": 1}\n', '{"step": 6, "event": 2}\n']
    (tmp_path / "metrics.jsonl").write_text("".join(metrics) + '{"step": 8, "lo')  # torn by a crash
    (tmp_path / "ranks.jsonl").write_text("".join(ranks))
    assert cut_back(tmp_path, 5) == {"metrics.jsonl": 3, "ranks.jsonl": 1}
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(metrics[:5])
    assert (tmp_path / "ranks.jsonl").read_text() == "".join(ranks[:2])
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == "".join(metrics[5:]) + '{"step": 8, "lo\n'
    assert (tmp_path / "ranks.discarded.jsonl").read_text() == ranks[2]
    assert cut_back(tmp_path, 5) == {"metrics.jsonl": 0, "ranks.jsonl": 0}
    assert cut_back(tmp_path, 3) == {"metrics.jsonl": 2, "ranks.jsonl": 1}  # behind what went before
    assert (tmp_path / "ranks.discarded.jsonl").read_text() == ranks[2] + ranks[1]
    assert cut_back(tmp_path, -1) == {"metrics.jsonl": 3, "ranks.jsonl": 1}  # a new run
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    kept = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines(keepends=True)
    assert sorted(kept) == sorted([*metrics, '{"step": 8, "lo\n'])  # no line is lost


def test_a_folder_without_records_has_nothing_to_cut(tmp_path):
    assert cut_back(tmp_path, 5) == {"metrics.jsonl": 0, "ranks.jsonl": 0}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("crash", ["before the cut", "in the middle of the discarded lines"])
def test_a_cut_that_a_crash_interrupted_is_done_again(tmp_path, monkeypatch, crash):
    lines = [f'{{"step": {step}}}\n' for step in range(1, 6)]
    path, discarded = tmp_path / "metrics.jsonl", tmp_path / "metrics.discarded.jsonl"
    path.write_text("".join(lines))
    discarded.write_text('{"step": 9}\n')

    def crashes(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(observe, "replace_file", crashes)
        truncate_after(path, 2)
    assert path.read_text() == "".join(lines)
    if crash == "in the middle of the discarded lines":
        os.truncate(discarded, discarded.stat().st_size - 4)
    assert truncate_after(path, 2) == 3
    assert path.read_text() == "".join(lines[:2])
    content = discarded.read_text()
    assert content.startswith('{"step": 9}\n') and content.endswith("".join(lines[2:]))
    assert content.count('{"step": 3}\n') == (1 if crash == "before the cut" else 2)


class Full(FileIO):
    """A disk that takes `room` bytes more."""

    room = 0

    def write(self, content):
        if not Full.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(Full.room, len(content))
        Full.room -= taken
        return super().write(content[:taken])


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, monkeypatch, caplog, room):
    with RunLog(tmp_path, is_main=True, num_steps=9, show_bar=False) as log:
        log.metrics(1, {"loss": 1.0})
        before = (tmp_path / "metrics.jsonl").read_text()
        with monkeypatch.context() as patched:
            Full.room = room
            patched.setattr(Path, "open", lambda path, mode, buffering=-1: Full(path, mode.replace("b", "")))
            for step in (2, 3, 4):
                log.metrics(step, {"loss": 0.5})
        assert (tmp_path / "metrics.jsonl").read_text() == before  # no part of a line
        log.metrics(5, {"loss": 0.25})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 5, "loss": 0.25}]
    first, last = [record.getMessage() for record in caplog.records]
    assert "the line of step 2 is lost (" in first and first.endswith("; the run goes on")
    assert last.endswith("3 lines before step 5 were lost")


def test_a_records_folder_that_is_gone_costs_lines_and_not_the_run(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    log = RunLog(folder, is_main=True, num_steps=2, show_bar=False)
    folder.rmdir()
    log.metrics(1, {"loss": 1.0})
    log.ranks(1, {"event": 1})
    log.close()
    assert [record.getMessage().count("No such file") for record in caplog.records] == [1, 1]


def test_a_log_on_a_full_disk_prints_no_traceback(tmp_path, capsys, monkeypatch):
    log = start_logging(tmp_path, global_rank=3)
    (handler,) = (h for h in logging.getLogger().handlers if isinstance(h, observe._LogFile))

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    handler.handle(logging.makeLogRecord({"msg": "a wrong %d", "args": ("format",)}))  # our own mistakes show as ever
    monkeypatch.setattr(handler, "flush", full)
    handler.handle(logging.makeLogRecord({"msg": "lost"}))
    log.close()
    error = capsys.readouterr().err
    assert "OSError" not in error and "TypeError" in error


def test_one_log_file_a_process_and_console_on_process_0(tmp_path, capsys):
    for global_rank in (0, 3):
        log = start_logging(tmp_path, global_rank=global_rank)
        logging.getLogger("ardtrain.data").info("dropped %d rows", global_rank)
        logging.getLogger("elsewhere").warning("old file")
        log.close()
    logging.getLogger("ardtrain").warning("after the end")
    assert [path.name for path in sorted((tmp_path / "logs").iterdir())] == ["process-0000.log", "process-0003.log"]
    text = (tmp_path / "logs/process-0003.log").read_text()
    assert "INFO ardtrain.data: dropped 3 rows" in text
    assert "WARNING elsewhere: old file" in text
    assert "after the end" not in text
    assert capsys.readouterr().out == "INFO: dropped 0 rows\n"


def test_clock_counts_sections_and_tokens():
    times = iter([0.0, 1.0, 3.0, 5.0, 6.0, 10.0, 10.0, 14.0])
    clock = Clock(now=lambda: next(times))  # starts at 0
    with clock.section("allocator"):  # 1 to 3
        pass
    with pytest.raises(RuntimeError, match="bad"), clock.section("allocator"):  # 5 to 6
        raise RuntimeError("bad")
    clock.count_tokens(100)
    assert clock.report() == {"tokens_per_second": 10.0, "elapsed_seconds": 10.0, "allocator_seconds": 3.0}
    assert clock.fraction("allocator") == 0.3
    clock.count_tokens(8)
    assert clock.report()["tokens_per_second"] == 2.0
    assert (clock.seconds("allocator"), clock.seconds("never")) == (3.0, 0.0)


def test_a_resume_before_the_first_step_keeps_the_start(tmp_path):
    with RunLog(tmp_path, is_main=True, num_steps=9, show_bar=False) as log:
        log.ranks(0, {"event": 0})
        log.metrics(0, {"eval_loss": 5.0})
    with RunLog(tmp_path, is_main=True, num_steps=9, show_bar=False, first_step=0, resumed=True) as log:
        log.metrics(1, {"loss": 4.0})
    assert [line["step"] for line in lines(tmp_path / "ranks.jsonl")] == [0]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1]
    with RunLog(tmp_path, is_main=True, num_steps=9, show_bar=False):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == ""
