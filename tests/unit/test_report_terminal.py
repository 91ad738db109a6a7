import io
import re

import pytest

from ardtrain.config import ConfigError
from ardtrain.report.reading import read_run
from ardtrain.report.terminal import WIDTH, has_colours, ranks, ranks_text
from tests.report_runs import HEADS, site_names, write_folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def numbers(text):
    """First number of each cell of the lines that begin with a layer."""
    return [
        [int(n) for n in re.findall(r"(?<![+\-\d])\d+", line)[1:]] for line in text.splitlines() if line[:1].isdigit()
    ]


def test_the_text_holds_the_ranks(tmp_path):
    ranks_by_event = write_folder(tmp_path / "run", sites=site_names(4))
    text = ranks_text(read_run(tmp_path / "run", "run"))
    assert numbers(text) == ranks_by_event[-1].reshape(4, 7).tolist()
    assert "run: elalora, finished, step 70 of 70" in text and "5 events, the last after step 50" in text
    changes = (ranks_by_event[-1] - ranks_by_event[0]).reshape(4, 7)[0]
    shown = [int(n) for n in re.findall(r"[+-]\d+", text.splitlines()[4])]
    assert shown == [int(c) for c in changes if c]
    assert "\x1b" not in text and text.isascii()


def test_eighty_columns_and_a_screen_for_70b(tmp_path):
    write_folder(tmp_path / "run", sites=site_names(80), num_events=3)
    lines = ranks_text(read_run(tmp_path / "run")).splitlines()
    assert max(map(len, lines)) <= WIDTH and len(lines) < 50
    assert lines[4].startswith("0-1 ") and any("mean" in line for line in lines)


def test_colours_only_add_colour(tmp_path):
    write_folder(tmp_path / "run", sites=site_names(3))
    run = read_run(tmp_path / "run")
    coloured = ranks_text(run, colours=True)
    assert coloured.count("\x1b[48;5;") == 21
    assert [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines()] == ranks_text(
        run
    ).splitlines()


@pytest.mark.parametrize(
    ("stream", "environ", "wanted"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colours_where_a_terminal_has_them(stream, environ, wanted):
    assert has_colours(stream, environ) is wanted


def test_towers_have_tables_of_their_own(tmp_path):
    sites = [*site_names(2, stack="vision.layers"), *site_names(2, stack="text.layers"), "connector"]
    write_folder(tmp_path / "run", sites=sites)
    text = ranks_text(read_run(tmp_path / "run"))
    assert all(f"\n{title}\n" in text for title in ("vision.layers", "text.layers", "outside the layers"))


def test_heads_of_one_kind(tmp_path):
    after = write_folder(tmp_path / "run", sites=site_names(3, heads=(4, 2, 2, 4, 0, 0, 0)), method="ard_lora")[-1]
    run = read_run(tmp_path / "run")
    assert numbers(ranks_text(run, heads="q_proj")) == after.reshape(3, 15)[:, :4].tolist()
    assert "Heads are summed" in ranks_text(run)
    with pytest.raises(ValueError, match="--heads up_proj: no matrix .* known: k_proj, o_proj, q_proj, v_proj"):
        ranks_text(run, heads="up_proj")
    write_folder(tmp_path / "big", sites=site_names(80, heads=HEADS), num_events=1)
    assert max(map(len, ranks_text(read_run(tmp_path / "big"), heads="q_proj").splitlines())) <= WIDTH


def test_the_verb_prints_or_draws(tmp_path, capsys):
    write_folder(tmp_path / "run", sites=site_names(2))
    assert ranks([str(tmp_path / "run")]) == 0
    assert "total rank" in capsys.readouterr().out
    assert ranks([str(tmp_path / "run"), str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such folder"),
        (["nowhere", "a.png"], "ranks.jsonl: no such file"),
        (["run", "--heads"], "--heads needs a kind"),
        (["run", "--head"], "--head: ranks takes"),
        (["run", "a.png", "b.png"], "b.png: ranks takes"),
        (["full"], "has no ranks"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "run", sites=site_names(1))
    write_folder(tmp_path / "full", sites=[], method="full", num_events=0)
    with pytest.raises(ConfigError, match=words):
        ranks(arguments)
