"""The rules of the house that a machine can check: who may import whom, monopolies, names, ASCII, no machine paths."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "ardtrain"

# Module (with everything below it) -> the only modules of ours it may import.
MAY_IMPORT_ONLY = {
    "config": {"config"},
    "ranks": {"ranks"},
    "schedule": {"schedule"},
    "arena": {"ranks"},
    "heads": {"ranks"},
    "tracing": set(),
    "products": {"tracing"},
    "quantized": {"quantized", "products"},
    "dense": {"ranks"},
    "adapters": {"ranks", "arena", "dense", "heads", "products", "quantized"},
    "patterns": set(),
    "targets": {"patterns", "ranks"},
    "methods": {"ranks", "schedule", "methods"},
    "resize": {"arena", "engines", "collectives", "ranks", "methods.base"},  # of the methods the protocol alone
    "environment": set(),
    "faults": set(),
    "report": {"report", "config", "faults", "watch"},
}
# Module -> modules of ours it must not import.
MUST_NOT_IMPORT = {
    "engines": {"methods", "trainer", "cli"},
    "collectives": {"methods", "trainer", "cli"},
    "trainer": {"engines", "cli"},  # it sees protocols; cli wires
    "data": {"engines"},
    "observe": {"engines"},
    "export": {"engines"},
    "memory": {"engines"},
}


def modules():
    """Dotted name below `ardtrain` -> file; a package's name stands for its __init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree, name="", is_package=False):
    """Every dotted name a module imports, at any depth of the code, relative ones resolved; `from a import b` gives
    `a` and `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["ardtrain", *name.split(".")] if name else ["ardtrain"]
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def edges():
    """Module of ours -> the modules of ours it imports."""
    graph = {}
    for name, path in MODULES.items():
        graph[name] = set()
        tree = ast.parse(path.read_text())
        for _, target in imports(tree, name, path.name == "__init__.py"):
            parts = target.split(".")
            if parts[0] != "ardtrain":
                continue
            # The longest prefix that is a module: ardtrain.ranks.Site -> ranks.
            for end in range(len(parts), 1, -1):
                if ".".join(parts[1:end]) in MODULES:
                    graph[name].add(".".join(parts[1:end]))
                    break
        graph[name].discard(name)
    return graph


GRAPH = edges()


def belongs(module, owner):
    return module == owner or module.startswith(owner + ".")


def cycles(graph):
    """One cycle as a list of names, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for target in sorted(graph.get(name, ())):
            if (cycle := visit(target)) is not None:
                return cycle
        path.pop()
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := visit(name)) is not None), None)


def test_no_import_cycles():
    assert cycles(GRAPH) is None


def test_a_cycle_would_be_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("module", sorted(MAY_IMPORT_ONLY))
def test_imports_only_what_it_may(module):
    allowed = MAY_IMPORT_ONLY[module]
    wrong = {
        f"{name} -> {target}"
        for name in GRAPH
        if belongs(name, module)
        for target in GRAPH[name]
        if not any(belongs(target, owner) for owner in allowed)
    }
    assert not wrong


@pytest.mark.parametrize("module", sorted(MUST_NOT_IMPORT))
def test_imports_nothing_it_must_not(module):
    # data_rows and data_order are parts of data that grew.
    names = [name for name in GRAPH if belongs(name, module) or name.startswith(module + "_")]
    wrong = {
        f"{name} -> {target}"
        for name in names
        for target in GRAPH[name]
        if any(belongs(target, owner) for owner in MUST_NOT_IMPORT[module])
    }
    assert not wrong


def uses(path, package):
    """Lines where a file imports a package, or names it by its full path after `import torch`."""
    tree = ast.parse(path.read_text())
    lines = {line for line, target in imports(tree) if belongs(target, package)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == package:
            lines.add(node.lineno)
    return [f"{path.relative_to(REPOSITORY)}:{line}" for line in sorted(lines)]


@pytest.mark.parametrize(("package", "owner"), [("deepspeed", "engines"), ("torch.distributed", "collectives")])
def test_one_importer_of(package, owner):
    """`engines` may grow into a package or into engines_*.py."""
    wrong = [
        use
        for name, path in MODULES.items()
        if not (belongs(name, owner) or name.startswith(owner + "_"))
        for use in uses(path, package)
    ]
    assert not wrong


def test_the_monopoly_check_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    path = tmp_path / "m.py"
    for code in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "import torch\n\ntorch.distributed.barrier()",
        "def f():\n    from torch.distributed import barrier",
    ):
        path.write_text(code)
        assert uses(path, "torch.distributed"), code
    path.write_text("import torch\nfrom torch import nn")
    assert not uses(path, "torch.distributed")


def test_no_module_is_a_drawer():
    assert not [name for name in MODULES if name.rsplit(".", 1)[-1] in {"util", "utils", "helpers", "misc", "common"}]


def test_cli_and_config_start_without_torch():
    """The command line and the config check answer at once; torch takes seconds to import."""
    for module in ("cli", "config", "environment", "faults", "observe", "report"):
        if module in MODULES:
            code = f"import sys, ardtrain.{module}; sys.exit('torch' in sys.modules)"
            assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0, module


def text_files():
    """Files of the checkout that git would carry; test data and results with their own letters are not code."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    suffixes = {
        ".py",
        ".md",
        ".toml",
        ".txt",
        ".sh",
        ".yaml",
        ".yml",
        ".json",
        ".j2",
        ".html",
        ".css",
        ".js",
        ".cfg",
        "",
    }
    paths = [REPOSITORY / line for line in listed.stdout.splitlines()]
    return [p for p in paths if p.is_file() and p.suffix in suffixes and "goldens" not in p.parts]


def offending_lines(pattern):
    return [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:120]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_files_are_ascii():
    assert not offending_lines(re.compile(r"[^\x00-\x7f]"))


def test_no_path_of_one_machine():
    """`~`, `$HOME` and relative paths work everywhere; somebody's home folder does not."""
    assert not offending_lines(re.compile(r"(?<![\w.$}~>)/-])/(?:work|home|root|opt|tmp/w)/"))


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["mypy"]], ids=lambda tool: tool[0])
def test_code_is_clean_for(tool):
    pytest.importorskip(tool[0])
    result = subprocess.run([sys.executable, "-m", *tool], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
