"""The report in a real browser: draws without an error, fits narrow and wide windows, answers clicks.

Skipped, and said so, where no Chromium is found (ARDTRAIN_BROWSER names one).
"""

import zlib

import pytest

from ardtrain.report.page import html_page
from ardtrain.report.reading import read_run
from tests.browser import browser_page, find_browser
from tests.report_runs import site_names, write_folder

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH and ARDTRAIN_BROWSER names none")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser_page(BROWSER, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """ElaLoRA by matrices in two towers, ARD-LoRA by heads, LoRA without an event; the second goes on."""
    root = tmp_path_factory.mktemp("runs")
    towers = [*site_names(3, stack="vision_tower.encoder.layers"), *site_names(4, stack="language_model.layers")]
    write_folder(root / "elalora", sites=[*towers, "multi_modal_projector.linear"])
    heads = site_names(4, heads=(4, 2, 2, 4, 0, 0, 0))
    write_folder(root / "ard_lora", sites=heads, method="ard_lora", state="started", scores=False)
    write_folder(root / "lora", sites=site_names(4), method="lora", num_events=0, scores=False)
    path = root / "report.html"
    path.write_text(html_page([read_run(root / name) for name in ("elalora", "ard_lora", "lora")]))
    return path


def colours(page, selector):
    """How many different pixels the first canvas under `selector` has."""
    return page.script(
        f"(() => {{const c = document.querySelector('{selector} canvas'), d = c.getContext('2d').getImageData(0, 0, "
        "c.width, c.height).data, seen = new Set(); for (let i = 0; i < d.length; i += 4) "
        "seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); return seen.size})()"
    )


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_all_is_drawn_without_an_error(page, three_runs, width, dark):
    page.problems.clear()
    page.open(three_runs, width, dark=dark)
    assert page.problems == []
    assert page.script("document.documentElement.scrollWidth") <= width
    assert page.script("document.querySelectorAll('#map-cards canvas').length") == 3
    assert page.script("document.querySelectorAll('#time-cards canvas').length") == 3
    for section in ("curve-cards", "flow-cards", "layer-cards", "decision-cards"):
        assert page.script(f"document.querySelectorAll('#{section} svg path, #{section} svg rect').length") > 3, section
    assert colours(page, "#map-cards") > 10 and colours(page, "#time-cards") > 10
    widest = page.script(
        "Math.max(...[...document.querySelectorAll('.card')].map((c) => c.getBoundingClientRect().right))"
    )
    assert widest <= width
    background = page.script("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    assert len(zlib.compress(page.picture())) > 30_000  # not blank


def test_a_click_shows_the_sites_history(page, three_runs):
    page.open(three_runs, 1280)
    assert "Click a cell" in page.script("document.getElementById('site').textContent")
    page.script("document.querySelector('#map-cards canvas').scrollIntoView({block: 'center'})")
    x, y = page.script(
        "(() => {const b = document.querySelector('#map-cards canvas').getBoundingClientRect(); "
        "return [b.left + b.width - 20, b.top + 30]})()"
    )
    for along in range(0, 600, 15):  # the map is narrower than its canvas
        page.click(x - along, y)
        text = page.script("document.getElementById('site').textContent")
        if "History of" in text:
            break
    assert "History of vision_tower.encoder.layers" in text
    assert page.script("document.querySelectorAll('#site svg path').length") >= 2
    assert page.problems == []


def test_the_slider_goes_back_to_the_start(page, three_runs):
    page.open(three_runs, 1280)
    text = "document.querySelector('#map-cards h3').textContent"
    assert "step 50" in page.script(text)
    page.script(
        "(() => {const s = document.getElementById('step'); s.value = 0; s.dispatchEvent(new Event('input'))})()"
    )
    page.settle()
    assert "step 0" in page.script(text)
    for mode in ("change", "score", "rank"):
        page.script(
            f"(() => {{const s = document.querySelectorAll('#rank-controls select')[0]; s.value = '{mode}'; "
            "s.dispatchEvent(new Event('change'))})()"
        )
    assert page.problems == []


def test_heads_of_one_kind_and_towers_can_be_chosen(page, three_runs):
    page.open(three_runs, 1280)
    page.script(
        "(() => {const s = document.querySelectorAll('#rank-controls select')[1]; s.value = 'self_attn.q_proj'; "
        "s.dispatchEvent(new Event('change')); const f = document.querySelector('#flow-controls select'); "
        "f.value = 'tower'; f.dispatchEvent(new Event('change'))})()"
    )
    page.settle()
    assert "by head" in page.script("document.querySelectorAll('#map-cards h3')[1].textContent")
    assert "language" in page.script("document.querySelector('#flow-cards').textContent")
    assert page.problems == []


def test_the_button_changes_the_theme(page, three_runs):
    page.open(three_runs, 1280)
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.script(background)
    page.script("document.getElementById('theme').click()")
    assert page.script(background) != before
    page.script("document.getElementById('theme').click()")
    assert page.script(background) == before


def test_a_page_that_is_read_anew_keeps_step_and_choices(page, three_runs):
    page.open(three_runs, 1280)
    page.script("set({step: 10, mode: 'change', site: {name: 'language_model.layers.0.mlp.up_proj'}})")
    page.open(three_runs, 1280)
    assert "step 10" in page.script("document.querySelector('#map-cards h3').textContent")
    assert page.script("document.querySelectorAll('#rank-controls select')[0].value") == "change"
    assert "History of language_model.layers.0" in page.script("document.getElementById('site').textContent")
    page.script("sessionStorage.clear()")
    assert page.problems == []


@pytest.mark.parametrize("width", [1280, 400])
def test_70b_is_drawn(page, tmp_path, width):
    """560 sites x 400 events."""
    write_folder(tmp_path / "run", sites=site_names(80), num_events=400, moved=16, metrics_every=4)
    path = tmp_path / "report.html"
    path.write_text(html_page([read_run(tmp_path / "run")]))
    page.problems.clear()
    seconds = page.open(path, width)
    print(f"{width} pixels: {seconds:.2f} s, {path.stat().st_size / 1e6:.1f} MB")
    assert page.problems == []
    assert colours(page, "#map-cards") > 5 and colours(page, "#time-cards") > 5
    assert page.script("document.documentElement.scrollWidth") <= width
