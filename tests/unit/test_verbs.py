"""The command line around its verbs: help, examples, the schema, starter configs, and what starts without torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ardtrain import __version__, cli
from ardtrain.config import METHODS, ConfigError, load_config, parse_config
from ardtrain.config.commented import Line, commented_yaml, scalar
from ardtrain.config.schema import run_schema, schema
from ardtrain.config.text import parse_yaml
from ardtrain.starter import TASKS, new, starter_text
from ardtrain.verbs import EXAMPLES, PRINT_THEIR_OWN
from tests.report_runs import site_names, write_folder

REPOSITORY = Path(__file__).resolve().parents[2]
VERBS = sorted(cli._verbs())


def test_every_verb_has_an_example_and_stands_in_the_usage():
    assert set(EXAMPLES) == set(VERBS)
    assert all(example.split()[:2] == ["ardtrain", verb] for verb, example in EXAMPLES.items())
    assert all(re.search(rf"ardtrain \[?{verb}\b", cli.USAGE) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_ends_with_its_example(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"example: {EXAMPLES[verb]}")
    assert verb in out.split("example:")[0]
    if verb not in PRINT_THEIR_OWN:
        others = set(VERBS) - {verb}
        assert not [other for other in others if re.search(rf"^\s+ardtrain \[?{other}\b", out, re.M)]


def test_these_start_without_torch(tmp_path):
    """Asked one after another in one process; what takes seconds to import is not among its modules."""
    write_folder(tmp_path / "run", sites=site_names(1), num_events=1)
    config = tmp_path / "run.yaml"
    config.write_text(starter_text(task="sft", model="m", method="elalora", data="t", eval_data="e"))
    calls = [
        ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS if verb != "doctor"),
        ["validate", str(config), "--schema-only"], ["status", str(tmp_path / "run")], ["schema"],
        ["ranks", str(tmp_path / "run")], ["new", "--task", "sft", "--model", "m"],
        ["report", str(tmp_path / "run")],
        ["submit", str(config), "--to", "slurm", "--dry-run", f"output_dir={tmp_path / 'submitted'}"],
    ]  # fmt: skip
    code = (
        "import json, sys\nfrom ardtrain.cli import main\n"
        f"for call in json.loads({json.dumps(json.dumps(calls))}):\n"
        "    code = main(call)\n"
        "    heavy = {'torch', 'transformers', 'deepspeed', 'matplotlib'} & set(sys.modules)\n"
        "    assert code == 0 and not heavy, (call, code, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"ardtrain {__version__}\n" in done.stdout and "settings and the rules between them hold" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "ardtrain", "--version"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == f"ardtrain {__version__}\n"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("exprt", "exprt is neither a verb nor a config that exists; did you mean `ardtrain export`?"),
        ("init", "init is neither a verb nor a config that exists; `ardtrain --help` lists the verbs"),
        ("none.yaml", "config none.yaml cannot be read"),
    ],
)
def test_a_misspelt_verb_is_no_config(tmp_path, monkeypatch, capsys, word, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main([word, "runs/a"]) == 2
    assert said in capsys.readouterr().err


def test_a_path_without_access_is_one_line_in_every_verb(monkeypatch, capsys):
    def refused(error):
        def verb(arguments):
            raise error

        monkeypatch.setattr(cli, "_verbs", lambda: {"status": verb})
        return cli.main(["status", "runs/theirs"])

    monkeypatch.delenv("RANK", raising=False)
    assert refused(PermissionError(13, "Permission denied", "runs/theirs/status")) == 2
    said = "runs/theirs/status: Permission denied; give another path, or ask its owner for access"
    assert capsys.readouterr().err.splitlines() == ["ardtrain status: 1 mistake(s)", said]
    with pytest.raises(PermissionError):  # of something else than a path
        refused(PermissionError(1, "Operation not permitted"))


def test_schema_only_finds_mistakes_of_settings_alone(tmp_path, capsys):
    text = starter_text(task="sft", model="nowhere", method="elalora", data="none.jsonl", eval_data="none.jsonl")
    (tmp_path / "run.yaml").write_text(text)
    assert cli.main(["validate", str(tmp_path / "run.yaml"), "--schema-only"]) == 0
    assert cli.main(["validate", str(tmp_path / "run.yaml"), "--schema-only", "elalora.init_warmup=2000"]) == 2
    assert "leave none of the run's 1000 steps" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_starters_are_valid_and_every_line_is_commented(task, method):
    if (task, method) == ("vqa", "full"):
        with pytest.raises(ConfigError, match="not built for --task vqa"):
            new(["--task", task, "--method", method, "--model", "m"])
        return
    text = starter_text(task=task, model="org/model", method=method, data="a.jsonl", eval_data="b.jsonl", name="first")
    config = parse_config(parse_yaml(text, source="starter"))
    assert (config.method, config.output_dir) == (method, "runs/first")
    assert not list(problems(parse_yaml(text, source="starter")))
    lines = text.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=./ardtrain.schema.json"
    for before, line in zip(lines, lines[1:], strict=False):
        assert "#" in line or line.rstrip().endswith(":") or before.lstrip().startswith("#"), line
    assert max(map(len, lines)) <= 120


def test_new_writes_the_config_and_the_schema_and_overwrites_nothing(tmp_path, capsys):
    out = tmp_path / "configs" / "mine.yaml"
    assert new(["--task", "sft", "--model", "org/m", "--out", str(out), "--method=lora"]) == 0
    assert load_config(out).output_dir == "runs/mine" and "ardtrain validate" in capsys.readouterr().out
    assert json.loads((out.parent / "ardtrain.schema.json").read_text()) == run_schema()
    with pytest.raises(ConfigError, match="is there already"):
        new(["--task", "sft", "--model", "org/m", "--out", str(out)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], r"--task \(missing\): must be one of sft, classification, vqa\n--model \(missing\)"),
        (["--task", "sft", "--model", "m", "--method", "elelora"], "did you mean elalora"),
        (["--tusk"], "--tusk: is no option here"),
        (["--task"], "--task has no value"),
    ],
)
def test_mistakes_of_new_are_told(arguments, words):
    with pytest.raises(ConfigError, match=words):
        new(arguments)


# ---- the schema: what it says of a YAML, by as much of JSON Schema as it uses ----


def problems(value, part=None, whole=None, path=""):
    """Lines of what a value breaks in the schema."""
    whole = whole or run_schema()
    part = whole if part is None else part
    if "$ref" in part:
        yield from problems(value, whole["$defs"][part["$ref"].rpartition("/")[2]], whole, path)
    if "anyOf" in part and all(list(problems(value, other, whole, path)) for other in part["anyOf"]):
        yield f"{path}={value!r} is none of {part['anyOf']}"
    if "enum" in part and value not in part["enum"]:
        yield f"{path}={value!r} is none of {part['enum']}"
    if "const" in part and value != part["const"]:
        yield f"{path}={value!r} is not {part['const']!r}"
    kinds = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool, "number": (int, float),
             "integer": int}  # fmt: skip
    if "type" in part:
        names = part["type"] if isinstance(part["type"], list) else [part["type"]]
        fits = [n for n in names if isinstance(value, kinds[n]) and (not isinstance(value, bool) or n == "boolean")]
        if not fits:
            yield f"{path}={value!r} is no {names}"
            return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (value < part.get("minimum", value) or value <= part.get("exclusiveMinimum", value - 1)):
        yield f"{path}={value!r} is too small"
    if isinstance(value, dict) and ("properties" in part or "additionalProperties" in part):
        for key, inner in value.items():
            rule = part.get("properties", {}).get(key, part.get("additionalProperties", True))
            if rule is False:
                yield f"{path}.{key} is unknown"
            elif isinstance(rule, dict):
                yield from problems(inner, rule, whole, f"{path}.{key}")
        yield from (f"{path}.{key} is missing" for key in part.get("required", ()) if key not in value)
    if isinstance(value, list) and isinstance(part.get("items"), dict):
        for at, inner in enumerate(value):
            yield from problems(inner, part["items"], whole, f"{path}.{at}")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_the_examples(path):
    assert not list(problems(parse_yaml(path.read_text(), source=str(path))))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, ""),
        ({"base_model": "m", "lora_rank": 4, "load_in_4bit": True}, ""),
        ({"preemption_signal": "SIGTERM", "report_to": "wandb", "zero_checkpoint": False}, ""),
        ({"data": {"train_file": ["a", "b"]}}, ""),
        ({"targets": {"vision": {"r": 4}}, "deepspeed": {"zero_optimization": {"stage": 3}}}, ""),
        ({"learning_rte": 1}, "learning_rte is unknown"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"method": "loro"}, "is none of"),
        ({"r": 0}, "too small"),
        ({"data": {}}, "train_file"),
        ({"elalora": {"init_warmup": 1, "final_warmup": 1, "mask_interval": 1, "kk": 2}}, "elalora"),
    ],
)
def test_the_schema_knows_right_from_wrong(changes, wrong):
    found = list(problems({"method": "lora", "data": {"train_file": "a"}, "output_dir": "o"} | changes))
    assert bool(found) == bool(wrong), found
    assert wrong in "\n".join(found)


def test_schema_prints_or_writes_the_same(tmp_path, capsys):
    assert schema([]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert schema([str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == printed == run_schema()
    assert printed["properties"]["r"]["description"] == "Rank of each site at the start."
    with pytest.raises(ConfigError, match="schema takes the file to write"):
        schema(["--what"])


def test_commented_yaml_reads_back():
    lines = [
        Line("a", 1e-5, "a rate"), Line("b.c", "no", "a word that YAML takes for false"), Line("b.d.e", [1, 2], ""),
        Line("b.f", "x: #y\n", "needs quotes"), Line("g", None, "c" * 100), Line("h", {"k": "v"}, ""),
    ]  # fmt: skip
    text = commented_yaml(lines, head=["first"], with_schema=False)
    assert yaml.safe_load(text) == {
        "a": 1e-5, "b": {"c": "no", "d": {"e": [1, 2]}, "f": "x: #y\n"}, "g": None, "h": {"k": "v"},
    }  # fmt: skip
    assert text.startswith("# first\na: 1.0e-05 ") and scalar(True) == "true"
