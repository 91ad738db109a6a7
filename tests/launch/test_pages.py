"""Runs docs/first_run.md, data.md and adding_a_method.md as they stand: files, commands and Python, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- (run|file: \S+) -->\n```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def place(tmp_path):
    """A folder with a base, and a checkout's package and command, as a user has them."""
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "ardtrain").symlink_to(ROOT / "ardtrain")
    (tmp_path / "bin").mkdir()
    for name, module in (("ardtrain", "ardtrain"), ("python", None)):
        ours = tmp_path / "bin" / name
        start = f"{sys.executable} -m {module}" if module else sys.executable
        ours.write_text(f'#!/bin/sh\nexec {start} "$@"\n')
        ours.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("page", ["first_run", "data", "adding_a_method"])
def test_page(place, page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    environment = os.environ | {
        "PATH": f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ARDTRAIN_CACHE": str(place / "cache"),
        "LOCAL_RANK": "0",  # DeepSpeed asks for it when an engine is made outside a launcher
    }
    ran, program = 0, ""
    for kind, language, body in BLOCK.findall(text):
        if kind != "run":
            (place / kind.removeprefix("file: ")).write_text(body)
            continue
        program += body if language == "python" else ""  # a page's Python is one program
        command = [sys.executable, "-c", program] if language == "python" else ["bash", "-euc", body]
        variables = {k: v for k, v in environment.items() if language == "python" or k != "LOCAL_RANK"}
        done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{body}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        ran += 1
    assert ran
