"""The one YAML file of a comparison: its models, how it is read, and the config of each of its runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from ardtrain.config import ALIASES, ConfigError, RunConfig, parse_config
from ardtrain.config.block import Block
from ardtrain.config.methods import Method
from ardtrain.config.text import merged, parse_overrides, read_yaml, secret_errors

Part = Literal["tune", "test"]
Mode = Literal["min", "max"]
Rates = tuple[Annotated[float, Field(gt=0)], ...]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]

# What the suite itself says for each run, and what must be alike in all of them: rows, their order, the base.
_SUITES_OWN = {"method": "methods.NAME.method", "learning_rate": "learning_rates", "seed": "seeds",
               "output_dir": "output_dir", "resume_from_checkpoint": "output_dir"}  # fmt: skip
_SHARED = ("model_name_or_path", "revision", "tokenizer_name_or_path", "task", "data", "max_length", "truncation",
           "packing", "chat_template", "max_steps", "num_train_epochs", "global_batch_size",
           "gradient_accumulation_steps", "max_eval_samples")  # fmt: skip
_ADAPTERS_ONLY = ("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "targets")
_LOOKS_AT_HELD_OUT = ("alora", "ard_lora")  # their allocators may look at held-out rows: never those that count
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class MethodEntry(Block):
    """One line of the comparison."""

    method: Method
    settings: dict[str, Any] = {}
    """A run's settings put over `base`, such as {r: 12, adalora: {target_r: 8, ...}}."""
    learning_rates: Annotated[Rates, Field(min_length=1)] | None = None
    """None: the suite's."""
    in_budgets: bool = True
    """false: it runs once, whatever the budgets, as `full` always does."""
    budget: str | None = None
    """Which of `budgets` this entry was made for; not to be written."""
    reference: str | None = None
    """The method it is compared with; None: the suite's."""


class BudgetEntry(Block):
    """One size at which the methods are compared: settings over those of every method."""

    settings: dict[str, Any] = {}
    """Of all methods, such as {r: 4}."""
    methods: dict[str, dict[str, Any]] = {}
    """Over them, of one method, such as {adalora: {r: 6, adalora: {target_r: 4}}}."""


class _Budgets(Block):
    budgets: Annotated[dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], BudgetEntry], Field(min_length=1)]


class TuningBlock(Block):
    """The learning rate of each method is chosen with these seeds on these rows, then all `seeds` run with it."""

    seeds: Seeds = (0,)
    eval_file: str | None = None
    """Rows to tune on, others than `base.data.eval_file`; or `split_eval`."""
    metric: str | None = None
    """None: the suite's metric and mode."""
    mode: Mode | None = None
    extend: int = Field(default=2, ge=0)
    """Rates added at most beyond an edge of the grid where the best one lies."""


class SplitBlock(Block):
    """One held-out JSONL file dealt into rows to tune on and rows to test on."""

    file: str
    how: Literal["alternate", "halves"] = "alternate"
    """alternate: every other row, also right for a file sorted by task; halves: the first half to tune on."""
    list_field: str | None = None
    """Field with a list (several references): the row becomes one row an item, after the dealing."""
    item_field: str | None = None
    """The item's field in the new rows."""
    max_items: int | None = Field(default=None, ge=1)

    def cross_field_errors(self) -> list[str]:
        if (self.list_field is None) != (self.item_field is None):
            return ["list_field and item_field belong together; set both or none"]
        return []


class EqualParameters(Block):
    """The comparison counts for methods that end with as many trainable parameters as the reference."""

    tolerance: float = Field(default=0.02, ge=0)
    """Largest difference to the reference's, as a share of them; `full` is left out."""


def _mapping_of_file(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


class Suite(Block):
    """Methods x learning rates x seeds on the same rows in the same order."""

    name: str = Field(pattern=r"^[\w.-]+$")
    output_dir: str = Field(min_length=1)
    base: dict[str, Any]
    """A run's config without method, learning_rate, seed and output_dir."""
    methods: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], MethodEntry] = Field(min_length=1)
    learning_rates: Rates = ()
    seeds: Seeds
    tuning: TuningBlock | None = None
    """None: every rate runs with every seed."""
    split_eval: Annotated[SplitBlock, BeforeValidator(_mapping_of_file)] | None = None
    """A file, or a block; instead of tuning.eval_file and base.data.eval_file."""
    equal_parameters: EqualParameters | None = EqualParameters()
    """null: not checked."""
    metric: str = "eval_loss"
    """A key of the evaluation lines of metrics.jsonl; its value at the end of the run counts."""
    mode: Mode | None = None
    """Which is better; None: min for a loss or perplexity, else max."""
    reference: str = "lora"
    """The method the others are compared with."""
    jobs: int = Field(default=1, ge=1)
    """Runs at a time on this machine."""
    processes: int = Field(default=1, ge=1)
    """Data-parallel processes of each run."""

    def cross_field_errors(self) -> list[str]:
        errors = []
        if self.reference not in self.methods:
            errors.append(f"reference={self.reference} is none of the methods; name one: {', '.join(self.methods)}")
        for name, entry in self.methods.items():
            if not (entry.learning_rates or self.learning_rates):
                errors.append(f"methods.{name} has no learning rates; set learning_rates here or there")
            errors += [
                f"methods.{name}.settings.{key} would give this method other rows or another base; set it in base"
                for key in _canonical(entry.settings)
                if key in _SHARED
            ]
        for where, settings in (
            ("base", self.base),
            *((f"methods.{n}.settings", e.settings) for n, e in self.methods.items()),
        ):
            errors += [
                f"{where}.{key} is set by the suite ({_SUITES_OWN[key]}); remove it"
                for key in _canonical(settings)
                if key in _SUITES_OWN
            ]
        if len(set(self.seeds)) < len(self.seeds):
            errors.append(f"seeds={list(self.seeds)} names a seed twice; remove one")
        return [*errors, *self._row_errors()]

    def _row_errors(self) -> list[str]:
        """Tuning, allocation and test must not share rows, tuning and test no seeds."""
        given = self.base.get("data")
        data = given if isinstance(given, dict) else {}
        test, allocation = data.get("eval_file"), data.get("allocation_file")
        errors = []
        if test is not None and test == allocation:
            errors.append("base.data.allocation_file is also base.data.eval_file; allocate on rows that do not count")
        if self.tuning is None:
            looking = [name for name, entry in self.methods.items() if entry.method in _LOOKS_AT_HELD_OUT]
            if looking and allocation is None:
                errors.append(
                    f"{', '.join(looking)} would allocate on rows that count; set base.data.allocation_file, or tune"
                )
            if self.split_eval is not None:
                errors.append("split_eval deals rows for tuning; add a block `tuning:`, or remove it")
            if test is None:
                errors.append("base.data.eval_file is missing; set it")
            return errors
        shared = sorted(set(self.tuning.seeds) & set(self.seeds))
        if shared:
            errors.append(
                f"tuning.seeds and seeds share {shared}: the rate would be chosen on runs that count; change one"
            )
        tune = self.tuning.eval_file
        if self.split_eval is not None and (test is not None or tune is not None):
            errors.append("split_eval stands beside tuning.eval_file or base.data.eval_file; keep one way to hold out")
        if self.split_eval is None and (test is None or tune is None):
            errors.append("tuning needs rows: set split_eval, or tuning.eval_file and base.data.eval_file")
        if test is not None and test == tune:
            errors.append(
                f"tuning.eval_file={tune} is also base.data.eval_file; tune on other rows than those that count"
            )
        return errors

    def reference_of(self, method: str) -> str:
        """What the method is compared with: the reference of its own budget."""
        return self.methods[method].reference or self.reference

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the sizes compared, in their order; empty where there is one alone."""
        return tuple(dict.fromkeys(entry.budget for entry in self.methods.values() if entry.budget is not None))

    @property
    def tuning_metric(self) -> tuple[str, Mode]:
        """What the rate is chosen by."""
        tuning = self.tuning
        metric = tuning.metric if tuning and tuning.metric else self.metric
        given = (tuning.mode if tuning else None) or (self.mode if metric == self.metric else None)
        return metric, given or default_mode(metric)

    @property
    def table_metric(self) -> tuple[str, Mode]:
        """What the table shows."""
        return self.metric, self.mode or default_mode(self.metric)

    def rates(self, method: str) -> tuple[float, ...]:
        """The method's grid, ascending."""
        return tuple(sorted(set(self.methods[method].learning_rates or self.learning_rates)))

    def eval_file(self, part: Part) -> str:
        """Held-out rows of a part."""
        if self.split_eval is not None:
            return str(Path(self.output_dir) / "data" / f"{part}.jsonl")
        file = self.tuning.eval_file if part == "tune" and self.tuning else self.base["data"]["eval_file"]
        assert isinstance(file, str)
        return file


@dataclass(frozen=True, order=True)
class RunKey:
    """Which run of the suite."""

    method: str
    part: Part
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """Below the suite's output_dir."""
        return Path(self.method, f"lr-{self.learning_rate:g}", f"seed-{self.seed}", self.part)

    def __str__(self) -> str:
        return f"{self.method} lr {self.learning_rate:g} seed {self.seed} {self.part}"


def default_mode(metric: str) -> Mode:
    """min for a loss or perplexity, else max."""
    return "min" if metric.endswith(("loss", "perplexity")) else "max"


def read_suite(
    path: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> tuple[Suite, dict[str, Any]]:
    """The suite, and its mapping as written (overrides over it, variables not replaced).

    `${NAME}` in a text is replaced by that variable of the environment, except in templates, where it may be text.
    Raises:
        ConfigError: all mistakes found, one line each.
    """
    written = merged(read_yaml(Path(path)), parse_overrides(overrides))
    errors = secret_errors(written)
    raw = _expanded(written, environment or {}, errors)
    try:
        suite = Suite.model_validate(with_budgets(raw))
    except ValidationError as failure:
        raise ConfigError([*errors, *_lines(failure)]) from None
    if errors:
        raise ConfigError(errors)
    check_runs(suite)
    return suite, written


def with_budgets(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping of a suite in which `budgets` are worked into `methods`: elalora at r4 becomes the method elalora-r4.

    Raises:
        ValidationError: a budget holds something else. ConfigError: it names a method that there is not.
    """
    out = dict(raw)
    methods, reference = out.get("methods"), str(out.get("reference", "lora"))
    if "budgets" not in out or not isinstance(methods, dict) or not all(isinstance(e, dict) for e in methods.values()):
        return out  # what is wrong with the methods is said by the suite
    budgets = _Budgets.model_validate({"budgets": out.pop("budgets")}).budgets
    errors = [
        f"budgets.{budget}.methods.{method} is none of the methods; name one: {', '.join(map(str, methods))}"
        for budget, entry in budgets.items()
        for method in entry.methods
        if method not in methods
    ]
    if reference not in methods:
        errors.append(f"reference={reference} is none of the methods; name one: {', '.join(map(str, methods))}")
    if errors:
        raise ConfigError(errors)
    alone = {n for n, e in methods.items() if not e.get("in_budgets", True) or e.get("method") == "full"}
    expanded: dict[str, Any] = {}
    for budget, entry in budgets.items():
        for name, own in methods.items():
            if name not in alone:
                settings = merged(merged(own.get("settings") or {}, entry.settings), entry.methods.get(name, {}))
                expanded[f"{name}-{budget}"] = {
                    **own, "settings": settings, "budget": budget, "reference": f"{reference}-{budget}",
                }  # fmt: skip
    out["methods"] = expanded | {name: methods[name] for name in methods if name in alone}
    if reference not in alone:
        out["reference"] = f"{reference}-{list(budgets)[-1]}"
    else:
        for own in expanded.values():
            own["reference"] = reference
    return out


def run_mapping(suite: Suite, key: RunKey) -> dict[str, Any]:
    """A run's YAML: base, the method's settings over it, then what the suite says for this run.

    `full` takes no settings of adapters from base. Allocators that look at held-out rows look at those for tuning.
    """
    entry = suite.methods[key.method]
    base = suite.base
    if entry.method == "full":
        base = {name: value for name, value in base.items() if ALIASES[""].get(name, name) not in _ADAPTERS_ONLY}
    rows = {"eval_file": suite.eval_file(key.part)}
    if (
        suite.tuning is not None
        and entry.method in _LOOKS_AT_HELD_OUT
        and "allocation_file" not in (base.get("data") or {})
    ):
        rows["allocation_file"] = suite.eval_file("tune")
    own = {
        "method": entry.method,
        "learning_rate": key.learning_rate,
        "seed": key.seed,
        "output_dir": str(Path(suite.output_dir) / key.folder),
        "resume_from_checkpoint": "auto",
        "data": rows,
    }
    return merged(merged(base, entry.settings), own)


def run_config(suite: Suite, key: RunKey) -> RunConfig:
    """The checked config of one run. Raises ConfigError."""
    return parse_config(run_mapping(suite, key))


def first_key(suite: Suite, method: str) -> RunKey:
    """Some run of the method, to look at what all of them share."""
    return RunKey(method, "test", suite.rates(method)[0], suite.seeds[0])


def check_runs(suite: Suite) -> None:
    """Refuses settings that a run would refuse.

    Raises:
        ConfigError: one line each; a mistake of all methods is named once, as the base's.
    """
    found: dict[str, list[str]] = {}
    for method in suite.methods:
        try:
            run_config(suite, first_key(suite, method))
        except ConfigError as error:
            for line in error.errors:
                found.setdefault(line, []).append(method)
    lines = []
    for line, methods in found.items():
        in_all = len(methods) == len(suite.methods) and len(methods) > 1
        lines += [f"base: {line}"] if in_all else [f"methods.{name}: {line}" for name in methods]
    if lines:
        raise ConfigError(lines)


def _canonical(settings: Mapping[str, Any]) -> list[str]:
    """Our own names of top-level settings."""
    return [ALIASES[""].get(key, key) for key in settings]


def _expanded(value: Any, environment: Mapping[str, str], errors: list[str], path: str = "") -> Any:
    if isinstance(value, dict):
        return {
            key: inner
            if str(key).endswith("template")
            else _expanded(inner, environment, errors, f"{path}.{key}" if path else str(key))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_expanded(inner, environment, errors, f"{path}.{index}") for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in dict.fromkeys(_VARIABLE.findall(value)):
        if name not in environment:
            errors.append(
                f"{path}={value}: the environment has no {name}; export it, or give {path}=... as an override"
            )
    return _VARIABLE.sub(lambda match: environment.get(match[1], match[0]), value)


def _lines(failure: ValidationError) -> list[str]:
    """One line for each mistake in the suite's own keys: setting, value, rule, remedy."""
    lines = []
    for error in failure.errors(include_url=False):
        path = [str(part) for part in error["loc"] if part != "[key]"]
        dotted = ".".join(path)
        if error["type"] == "extra_forbidden":
            lines.append(_unknown(path))
        elif error["type"] == "value_error":
            prefix = f"{dotted}." if dotted else ""
            lines += [f"{prefix}{line}" for line in str(error["ctx"]["error"]).split("\n")]
        elif error["type"] == "missing":
            lines.append(f"{dotted} is missing; set it")
        else:
            rule = error["msg"].replace("Input should be", "must be", 1).replace("String should", "must", 1)
            lines.append(f"{dotted}={error['input']} {rule}; correct it")
    return lines


def _unknown(path: list[str]) -> str:
    *block, key = path
    inside: dict[str, type[Block]] = {
        "": Suite,
        "methods": MethodEntry,
        "budgets": BudgetEntry,
        "tuning": TuningBlock,
        "split_eval": SplitBlock,
        "equal_parameters": EqualParameters,
    }
    model = inside[block[0] if block else ""]
    near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.6)
    prefix = "".join(f"{part}." for part in block)
    if near:
        return f"{prefix}{key} is no setting; did you mean {prefix}{near[0]}?"
    if key in RunConfig.model_fields or key in ALIASES[""]:
        where = "base" if not block else f"{prefix}settings" if block[0] == "methods" else "base"
        return f"{prefix}{key} is no setting of a suite; write it in {where}"
    return f"{prefix}{key} is no setting; remove it (known here: {', '.join(model.model_fields)})"
