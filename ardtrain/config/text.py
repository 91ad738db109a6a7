"""Text to plain nested mappings: YAML, command-line overrides, the user's DeepSpeed JSON. Knows no setting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_SECRET = re.compile(r"(?:token|secret|password|api_?key)s?(?:$|[_-])", re.IGNORECASE)
_NO_SECRET = re.compile(r"(?:max|min|num)_|(?:trainable|loss_chunk)_tokens$", re.IGNORECASE)  # max_new_tokens is none
_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")  # a revision may look like a date


DEFAULT_CONFIG = "ardtrain.yaml"
MAX_VALUES = 100_000  # of a file, aliases written out


class ConfigError(ValueError):
    """What is wrong with a config, one line for each mistake; `errors` holds the lines."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.1 says string) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):  # such as of {{question}} without quotes
                problem = "a key is a list or a mapping; write a text with braces in quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text `1e5`, which our loader would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML text in the order of `values`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str, *, source: str) -> Any:
    """Value of a YAML text.

    Raises:
        ConfigError: not YAML; the line says where and quotes nothing of the text.
    """
    try:
        loader = _Loader(text)  # a SafeLoader
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{source}{line}: {error.problem}; correct the YAML there"]) from None
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        raise ConfigError([f"{source} line {at}: a character that YAML does not take; remove it"]) from None
    except RecursionError:
        raise ConfigError([f"{source}: nested too deeply; correct the YAML there"]) from None


def _check_aliases(root: yaml.Node) -> None:
    """Refuses aliases that hold themselves, or lists of lists of them: what is read later would not end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is None:
            sizes[id(node)] = MAX_VALUES + 1  # of one that holds itself
            inside = () if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = known = 1 + sum(map(size, parts))
        if known > MAX_VALUES:
            problem = f"stands, with its aliases, for more than {MAX_VALUES:,} values, or for itself"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return known

    size(root)


def with_config(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The arguments with a config in front: the one given, or what ARDTRAIN_CONFIG names, or ./ardtrain.yaml.

    Raises:
        ConfigError: none of the three is there.
    """
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("--"):
        return list(arguments)
    default = environ.get("ARDTRAIN_CONFIG") or (DEFAULT_CONFIG if Path(DEFAULT_CONFIG).exists() else None)
    if default is None:
        raise ConfigError(
            ["no config: name one, for example `deepspeed --num_nodes 2 ardtrain/main.py train run.yaml`, or set "
             f"ARDTRAIN_CONFIG, or put {DEFAULT_CONFIG} here"]
        )  # fmt: skip
    return [default, *arguments]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"config {path} cannot be read ({error}); give the path of a YAML file"]) from None
    raw = parse_yaml(text, source=str(path))
    if not isinstance(raw, dict):
        raise ConfigError([f"config {path} holds no `setting: value` lines; see examples/"])
    return raw


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Nested mapping of `a.b=c`, `--a.b=c` and `--a.b c`; values are YAML, later ones win."""
    nested: dict[str, Any] = {}
    for name, value in _override_pairs(arguments):
        block = nested
        *path, last = name.split(".")
        for part in path:
            inner = block.setdefault(part, {})
            if not isinstance(inner, dict):
                if name.split(".")[0] != "deepspeed" or not isinstance(inner, str):
                    raise ConfigError([f"override {name} lies inside {part}={inner}, which is no block; remove one"])
                inner = block[part] = read_deepspeed_json(inner)  # deepspeed=NAME, then a change to that file
            block = inner
        block[last] = parse_yaml(value, source=f"override {name}")
    return nested


def _override_pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Dotted name and text of each override; `--max-steps` is max_steps."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        dashed = argument.startswith("--")
        name, equals, value = argument.removeprefix("--").partition("=")
        if dashed:
            name = name.replace("-", "_")
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ConfigError([f"override {name!r} names no setting; write a.b=value or --a.b value"])
        if not equals:
            if not dashed or not rest or rest[0].startswith("--"):
                raise ConfigError([f"override {name} has no value; write {name}=value"])
            value = rest.pop(0)
        yield name, value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `over` put over it."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def secret_errors(raw: object, path: str = "") -> list[str]:
    """One line for each key that looks like a secret's; the value is not quoted."""
    errors = []
    if isinstance(raw, dict):
        for key, value in raw.items():
            name = f"{path}{key}"
            if _SECRET.search(str(key)) and not _NO_SECRET.match(str(key)):
                errors.append(f"{name} looks like a secret, and configs are written into run folders; remove it and "
                              "set it in the environment (such as HF_TOKEN)")  # fmt: skip
            else:
                errors += secret_errors(value, f"{name}.")
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            errors += secret_errors(value, f"{path}{index}.")
    return errors


def tilde_errors(raw: object, path: str = "") -> list[str]:
    """One line for each path that begins with `~`: only shells read it, and not within a YAML file.

    Templates of texts may begin so.
    """
    if isinstance(raw, str):
        setting = path.removesuffix(".")
        if (raw == "~" or raw.startswith("~/")) and not setting.endswith("template"):
            return [f"{setting}={raw} begins with ~, which nothing expands here; write the whole path"]
        return []
    inside = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    return [error for key, value in inside for error in tilde_errors(value, f"{path}{key}.")]


def deepspeed_folder() -> Path:
    """Where the named DeepSpeed configs lie: data of the installed package, or the checkout's ds_configs/."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def read_deepspeed_json(name_or_path: str) -> dict[str, Any]:
    """The user's DeepSpeed JSON: a path (with `/` or `.json`, or a file that exists), else a name in ds_configs/.

    Raises:
        ConfigError: there is no such file, it is no JSON object, or it holds a secret.
    """
    path = Path(name_or_path)
    if "/" not in name_or_path and path.suffix != ".json" and not path.is_file():
        folder = deepspeed_folder()
        path = folder / f"{name_or_path}.json"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
            raise ConfigError([f"deepspeed={name_or_path} is neither a file nor one of {names}; give one of them"])
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"deepspeed={name_or_path} cannot be read ({error}); correct the path"]) from None
    except json.JSONDecodeError as error:
        raise ConfigError([f"deepspeed={path} is no JSON (line {error.lineno}: {error.msg}); correct it"]) from None
    if not isinstance(loaded, dict):
        raise ConfigError([f"deepspeed={path} holds no JSON object; write one in braces"])
    if errors := secret_errors(loaded, "deepspeed."):
        raise ConfigError(errors)
    return loaded
