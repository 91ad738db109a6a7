import json
import re
import time

import numpy as np
import pytest

from ardtrain.config import ConfigError
from ardtrain.report.command import report
from ardtrain.report.history import budget, read_sites
from ardtrain.report.page import MAX_POINTS, differences, embedded, html_page, run_object, thinned
from ardtrain.report.reading import names_of, read_run, seconds_of
from tests.report_runs import HEADS, site_names, write_folder, write_metrics, write_state


def page_data(text):
    """What the page's scripts read."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def decoded(ranks):
    """[E, S] as the page's script makes it of the start and the changes."""
    rows = [np.array(ranks["start"])]
    for change in ranks["changes"]:
        row, site = rows[-1].copy(), 0
        for step, difference in zip(change[::2], change[1::2], strict=True):
            site += step
            row[site] += difference
        rows.append(row)
    return np.stack(rows)


def test_the_page_holds_the_ranks_of_the_file(tmp_path):
    ranks = write_folder(tmp_path / "run", sites=site_names(4))
    data = page_data(html_page([read_run(tmp_path / "run")]))
    [run] = data["runs"]
    assert (decoded(run["ranks"]) == ranks).all()
    assert run["ranks"]["steps"] == [0, 10, 20, 30, 40, 50]
    assert run["ranks"]["budget"] == 4 * 7 * 8
    assert run["ranks"]["budgetParameters"] == 4 * 7 * 8 * (64 + 128)
    assert run["ranks"]["totals"][1] == [224] * 6
    assert run["curves"]["loss"][0] == list(range(1, 71))
    assert run["numVoid"] == 1
    lost = [int(-difference[difference < 0].sum()) for difference in np.diff(ranks, axis=0)]
    assert [event["pruned"] for event in run["ranks"]["events"]] == lost


def test_scores_are_kept_to_a_few_percent(tmp_path):
    write_folder(tmp_path / "run", sites=site_names(4))
    run = read_run(tmp_path / "run")
    scores = run_object(run)["ranks"]["scores"]
    levels = np.array(scores["rows"], float)
    read = scores["low"] * (scores["high"] / scores["low"]) ** ((levels - 1) / (scores["levels"] - 1))
    true = np.stack([run.scores[row] for row in sorted(run.scores)])
    assert np.abs(read / true - 1).max() < 0.01
    assert scores["steps"] == [10, 20, 30, 40, 50]


def test_70b_fits_a_page(tmp_path):
    """560 sites x 400 events: seconds of this process alone, not of the machine."""
    sites = site_names(80)
    ranks = write_folder(tmp_path / "run", sites=sites, num_events=400, moved=16, metrics_every=2)
    start = time.process_time()
    text = html_page([read_run(tmp_path / "run")])
    assert time.process_time() - start < 3.0
    assert len(text) < 10e6
    assert (decoded(page_data(text)["runs"][0]["ranks"]) == ranks).all()


def test_heads_of_70b_fit_a_page(tmp_path):
    """11,760 sites, of which hundreds change in each of 40 events, with all their scores."""
    sites = site_names(80, heads=HEADS)
    ranks = write_folder(tmp_path / "run", sites=sites, method="ard_lora", num_events=40, moved=600, rank=4)
    text = html_page([read_run(tmp_path / "run")])
    assert len(text) < 10e6
    found = page_data(text)["runs"][0]["ranks"]
    assert (decoded(found) == ranks).all()
    assert found["scores"]["every"] == 1
    assert found["heads"][:3] == [0, 1, 2] and found["heads"][-1] is None


def test_what_is_too_much_for_a_page_is_thinned_and_told(tmp_path, monkeypatch):
    ranks = write_folder(tmp_path / "run", sites=site_names(4), num_events=40)
    monkeypatch.setattr("ardtrain.report.page.MAX_CHANGES", 300)
    monkeypatch.setattr("ardtrain.report.page.MAX_SCORES", 28 * 10)
    found = page_data(html_page([read_run(tmp_path / "run")]))["runs"][0]["ranks"]
    assert found["numEvents"] == 40 and 4 < len(found["changes"]) < 40
    assert found["steps"][0] == 0 and found["steps"][-1] == 400
    assert (decoded(found) == ranks[[step // 10 for step in found["steps"]]]).all()
    assert sum(len(change) // 2 for change in found["changes"]) <= 300
    assert found["scores"]["every"] == 4 and len(found["scores"]["rows"]) == 10
    assert len(found["events"]) == 40


def test_a_run_in_the_making_is_shown(tmp_path):
    """Torn last lines, no event yet, and neither records nor config."""
    write_folder(tmp_path / "run", sites=site_names(2), num_events=3, state="started")
    for name in ("ranks.jsonl", "metrics.jsonl"):
        with (tmp_path / "run" / name).open("a") as file:
            file.write('{"step": 99, "chang')
    run = read_run(tmp_path / "run")
    assert run.history.steps == [0, 10, 20, 30] and run.goes_on
    bare = tmp_path / "bare"
    bare.mkdir()
    write_state(bare, "started", 0)
    [data] = page_data(html_page([read_run(bare)]))["runs"]
    assert data["ranks"] is None and data["curves"] == {} and data["config"] == ""
    (bare / "ranks.jsonl").write_text('{"step": 0, "table": {"layers.0.q": 4')  # its first line is being written
    assert read_run(bare).history is None


def test_runs_without_events_or_ranks(tmp_path):
    write_folder(tmp_path / "lora", sites=site_names(2), method="lora", num_events=0, scores=False)
    write_folder(tmp_path / "full", sites=[], method="full", num_events=0, scores=False)
    lora, full = page_data(html_page([read_run(tmp_path / "lora"), read_run(tmp_path / "full")]))["runs"]
    assert lora["ranks"]["changes"] == [] and lora["ranks"]["scores"] is None
    assert full["ranks"] is None and full["curves"]["loss"][1]


def test_a_failed_run_says_why_and_markup_in_it_stays_text(tmp_path):
    write_folder(tmp_path / "run", sites=site_names(1), settings={"run_name": "</script><script>alert(1)</script>"})
    write_state(tmp_path / "run", "failed", 30, error="Traceback\nRuntimeError: <b>loss</b> is not finite")
    text = html_page([read_run(tmp_path / "run")])
    assert text.count("<script") == 2 and "<b>loss" not in text
    assert page_data(text)["runs"][0]["error"].endswith("<b>loss</b> is not finite")
    assert "</" not in embedded({"a": "</script>", "b": "<!--"})


def test_a_resumed_run_sums_the_clocks_of_its_starts(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", 30, starts=(0, 20))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    phases, elapsed = seconds_of(records)
    assert elapsed == 10.0 + 5.0
    assert phases == pytest.approx({"evaluate": 1.5, "allocator": 0.75, "resize": 0.375})


def test_broken_files_are_named(tmp_path):
    folder = tmp_path / "run"
    write_folder(folder, sites=site_names(1))
    lines = (folder / "ranks.jsonl").read_text().splitlines(keepends=True)
    (folder / "ranks.jsonl").write_text("".join([*lines[:2], "{broken}\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"ranks\.jsonl:3: no record with a step"):
        report([str(folder)])
    (folder / "ranks.jsonl").write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(ConfigError, match=r"ranks\.jsonl:[234]: .* a line is missing"):
        report([str(folder)])
    (folder / "ranks.jsonl").write_text("".join(lines))
    (folder / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: no record with a step"):
        report([str(folder)])
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "which run folder"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "holds no run"),
        (["run", "--fast"], "--fast: is no option here"),
        (["run", "--watch", "0"], "--watch 0: must be a number of seconds above 0"),
        (["run", "--out"], "--out needs a path"),
        (["run", "--out", "run"], "is a folder"),
        (["run", "--figures", "file"], "is a file; name a folder"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=re.escape(words)):
        report(arguments)


def test_watch_writes_anew_until_the_run_ends(tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "out" / "page.html"
    write_folder(folder, sites=site_names(1), num_events=2, state="started")
    slept = []

    def sleep(seconds):
        assert '<meta http-equiv="refresh" content="3">' in out.read_text()
        slept.append(seconds)
        write_folder(
            folder, sites=site_names(1), num_events=2 + len(slept), state=("started", "finished")[len(slept) > 1]
        )

    assert report([str(folder), "--out", str(out), "--watch", "3"], sleep=sleep) == 0
    assert slept == [3.0, 3.0]
    text = out.read_text()
    assert 'http-equiv="refresh"' not in text
    assert len(page_data(text)["runs"][0]["ranks"]["steps"]) == 5
    assert str(out) in capsys.readouterr().out


def test_several_runs_stand_side_by_side_with_their_differences(tmp_path):
    write_folder(tmp_path / "a" / "run", sites=site_names(2), settings={"learning_rate": 0.1, "elalora": {"b": 4}})
    write_folder(tmp_path / "b" / "run", sites=site_names(2), settings={"learning_rate": 0.2, "elalora": {"b": 4}})
    runs = [read_run(tmp_path / at / "run", name) for at, name in (("a", "a/run"), ("b", "b/run"))]
    assert names_of([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]) == ["a/run", "b/run"]
    assert names_of(["x", "x"]) == ["x", "x (2)"]
    assert differences(runs) == [["learning_rate", 0.1, 0.2]]
    assert [run["name"] for run in page_data(html_page(runs))["runs"]] == ["a/run", "b/run"]


def test_the_page_asks_no_network(tmp_path):
    write_folder(tmp_path / "run", sites=site_names(1))
    text = html_page([read_run(tmp_path / "run")])
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_long_curves_are_thinned_to_means():
    steps, values = thinned(range(1, 4001), [float(v) for v in range(1, 4001)])
    assert len(steps) <= MAX_POINTS and steps[-1] == 4000 and steps[:2] == [3, 6]
    assert values[:2] == [2.0, 5.0]
    assert thinned([1, 2], [0.5, float(2)]) == [[1, 2], [0.5, 2]]
    exact = thinned(range(4000), [0.0] * 3999 + [7.0], exact=True)
    assert exact[1][-1] == 7.0


def test_budgets_of_the_methods():
    start = np.array([8, 8, 4])
    assert budget("elalora", {}, start).tolist() == [8, 8, 4]
    assert budget("adalora", {"adalora": {"target_r": 6}}, start).tolist() == [6, 6, 6]
    assert budget("ard_lora", {"ard_lora": {"target_r": 5.5}}, start).tolist() == [5.5] * 3
    assert budget("ard_lora", {"ard_lora": {"target_r": None}}, start).tolist() == [8, 8, 4]
    assert budget("ard_lora", {"ard_lora": {"budget": False}}, start) is None


def test_figures_and_tables_hold_the_numbers(tmp_path):
    ranks = write_folder(tmp_path / "run", sites=site_names(2, heads=(2, 0, 0, 0, 0, 0, 0)), num_events=3)
    report([str(tmp_path / "run"), "--out", str(tmp_path / "r.html"), "--figures", str(tmp_path / "figures")])
    folder = tmp_path / "figures"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "summary.csv", "losses.png", "losses.svg", "run-metrics.csv", "run-ranks.csv", "run-events.csv",
        "run-ranks.png", "run-ranks.svg", "run-time.png", "run-time.svg",
    }  # fmt: skip
    head, *rows = [line.split(",") for line in (folder / "run-ranks.csv").read_text().splitlines()]
    assert head == ["site", "path", "layer", "matrix", "head", "numbers", "step 0", "step 10", "step 20", "step 30"]
    assert np.array([[int(v) for v in row[6:]] for row in rows]).T.tolist() == ranks.tolist()
    assert rows[1][:6] == [
        "model.layers.0.self_attn.q_proj:head.1",
        "model.layers",
        "0",
        "self_attn.q_proj",
        "1",
        "192",
    ]
    metrics = (folder / "run-metrics.csv").read_text().splitlines()
    assert metrics[0].startswith("step,loss,") and len(metrics) == 1 + 50
    assert (folder / "run-events.csv").read_text().splitlines()[1].startswith("1,10,")


def test_history_keeps_what_events_say(tmp_path):
    write_folder(tmp_path / "run", sites=site_names(1), num_events=1)
    history = read_sites(tmp_path / "run" / "ranks.jsonl")
    assert history.events[1]["scores"]["highest_pruned"] == 1e-8 and "changes" not in history.events[1]
    assert history.moved[1]["pruned"] == history.moved[1]["born"] > 0
