"""The examples read, their parts do what the quickstart counts on, and the generated page is up to date."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ardtrain.cli import main
from ardtrain.config import BLOCKS, load_config, with_batch
from ardtrain.deepspeed_config import split_deepspeed, with_deepspeed

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"


def script(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_example_reads(path, world_size):
    """All rules that need neither model nor data; the ElaLoRA schedule fits into max_steps."""
    config = with_batch(with_deepspeed(load_config(path)), world_size)
    assert config.max_steps
    plan = split_deepspeed(config, world_size=world_size)
    assert plan.backbone_stage == 3


def test_quickstart_reads_as_plain_lora():
    config = load_config(EXAMPLES / "quickstart.yaml", ["method=lora", "elalora=null", "learning_rate=1.0e-2"])
    assert config.method == "lora"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.stem)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "x"], "belong together"),
        (["--model", "x", "--data", "no-such-file.jsonl"], "no-such-file.jsonl is no file"),
        (["--processes", "two"], "whole number"),
        (["--epochs", "3"], "--epochs is unknown"),
    ],
)
def test_quickstart_refuses(arguments, text):
    command = ["bash", EXAMPLES / "quickstart.sh", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 2
    assert text in result.stderr


def test_docstrings_leave_the_code():
    source = '"""Top."""\n\n\ndef f():\n    """What f\n    does.\n    """\n    return "kept"\n'
    docstrings, code = script(EXAMPLES / "quickstart" / "collect.py").split_docstrings(source)
    assert docstrings == ["module: Top.", "f: What f\ndoes."]
    assert code == 'def f():\n\n    return "kept"\n'


def test_hold_out_keeps_every_row_once(tmp_path):
    rows = [json.dumps({"text": str(i)}) for i in range(45)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(rows))
    script(EXAMPLES / "quickstart" / "hold_out.py").main(source, tmp_path)
    train = (tmp_path / "train.jsonl").read_text().splitlines()
    held_out = (tmp_path / "held_out.jsonl").read_text().splitlines()
    assert held_out == [rows[19], rows[39]]
    assert sorted(train + held_out) == sorted(rows)


def test_hold_out_cuts_a_text_at_a_line(tmp_path):
    source = tmp_path / "book.txt"
    source.write_text("".join(f"line {i}\n" for i in range(40)))
    script(EXAMPLES / "quickstart" / "hold_out.py").main(source, tmp_path)
    assert (tmp_path / "held_out.txt").read_text() == "line 38\nline 39\n"


def test_first_reference(tmp_path):
    source, target = tmp_path / "dev.jsonl", tmp_path / "run" / "dev.jsonl"
    source.write_text(json.dumps({"mr": "a", "refs": ["one", "two"]}) + "\n")
    script(EXAMPLES / "first_reference.py").main(source, target)
    assert json.loads(target.read_text()) == {"mr": "a", "ref": "one"}


def test_table_of_settings_is_up_to_date():
    generator = script(REPOSITORY / "docs" / "generate_settings.py")
    page = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert all(f"## Block `{name}`" in page for name in BLOCKS if name and "*" not in name)
    assert page == generator.render(), f"run: {Path(sys.executable).name} docs/generate_settings.py"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("llama31_70b_*.yaml")), ids=lambda path: path.stem)
def test_examples_of_70b_fit_where_they_say(path, capsys):
    """8 x 80 GB, and two nodes of it, by the launcher block's numbers."""
    assert main(["plan", str(path), "--json", f"model_name_or_path={EXAMPLES}/shapes/llama-3.1-70b"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["gpus"] == (16 if "2x8" in path.stem else 8)
    assert plan["placement"]["base"] == ("cpu" if "offload" in path.stem else "device")
    assert plan["fits"] == {"device": True, "host": True} and plan["largest_rows"] >= 1
