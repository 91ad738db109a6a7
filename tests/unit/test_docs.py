"""The pages: built by mkdocs with warnings as errors; their blocks are run or say that they are not; texts are real."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
MARK = re.compile(r"<!-- (run|run on each host|run: \S+|config|file: \S+|not run(: [^>]+)?) -->")
RUN_BY = {  # page -> the test that runs its blocks
    "operations.md": "tests/launch/test_operations.py",
    "first_run.md": "tests/launch/test_pages.py",
    "data.md": "tests/launch/test_pages.py",
    "adding_a_method.md": "tests/launch/test_pages.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_is_run_or_says_that_it_is_not(page):
    lines = page.read_text().splitlines()
    opening = [n for n, line in enumerate(lines) if re.match(r"\s*```", line)][::2]
    for number in opening:
        above = lines[number - 1].strip()
        mark = MARK.fullmatch(above)
        assert mark, f"{page.name}:{number + 1}: the line above says neither `<!-- run -->` nor `<!-- not run -->`"
        if not mark[1].startswith("not run"):
            assert (ROOT / RUN_BY[page.name]).is_file()


def test_texts_of_the_troubleshooting_page_are_texts_of_the_program():
    source = "".join(path.read_text() for path in sorted((ROOT / "ardtrain").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # long texts are written in pieces
    table = (ROOT / "docs" / "troubleshooting.md").read_text().split("What has no text of ours")[0]
    texts = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(texts) > 10
    for text in texts:
        for piece in text.split("..."):
            words = piece.strip(" ,").removesuffix(" rank plan than process 0")  # the thing that differs is a variable
            assert words in joined, f"no error says {words!r}"


def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "api" / "index.html").read_text().count("RankTable") > 3


def test_every_page_is_in_the_sites_menu():
    menu = [name for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for name in entry.values()]
    assert sorted(menu) == [path.name for path in sorted((ROOT / "docs").glob("*.md"))]
