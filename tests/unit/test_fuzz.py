"""1,000 generated configs: whatever they hold, validate ends with exit code 2 and lines of text, never a traceback."""

import json

import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ardtrain.cli import main
from ardtrain.config.methods import METHODS
from ardtrain.config.models import RunConfig
from ardtrain.config.reading import ALIASES, BLOCKS

BASE = {
    "model_name_or_path": "no/such/model",  # so that even a config without a mistake ends here
    "output_dir": "out",
    "method": "lora",
    "data": {"train_file": "no.jsonl"},
}
TEXTS = st.sampled_from(
    ["", "a", "auto", "zero3", "1e-4", "\u00e9", "${X}", "../..", "(", "a.b=c", "nan", "null", "\x00"]
)
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=True, allow_infinity=True), st.integers(-2, 9))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.text(max_size=8), st.sampled_from(METHODS))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(TEXTS, st.sampled_from(["r", "lr", "stage"])), inner, max_size=3),
    ),
    max_leaves=6,
)


def keys_of(block):
    """Names a block may hold, other trainers' names, and names it may not."""
    model = RunConfig if not block else BLOCKS[block]
    return st.sampled_from([*model.model_fields, *ALIASES.get(block, {}), "lerning_rate", "hf_token", "x"])


BLOCK_NAMES = [name for name in BLOCKS if name and "*" not in name]
CHANGES = st.lists(
    st.one_of(
        st.tuples(keys_of(""), VALUES),
        *(st.tuples(st.just(name), st.dictionaries(keys_of(name), VALUES, max_size=4)) for name in BLOCK_NAMES),
        st.tuples(
            st.just("targets"), st.dictionaries(TEXTS, st.dictionaries(keys_of("targets.*"), VALUES), max_size=2)
        ),
        st.tuples(st.just("deepspeed"), st.dictionaries(TEXTS, VALUES, max_size=3)),
    ),
    min_size=1,
    max_size=5,
)
FUZZ = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(path, capsys):
    """Exit code and what was printed to stderr."""
    code = main(["validate", str(path)])
    return code, capsys.readouterr().err


@FUZZ
@given(changes=CHANGES)
@example(changes=[("schema_version", "\x1e\r")])  # characters that end a line
def test_no_config_gives_a_traceback(tmp_path, capsys, changes):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | dict(changes), allow_unicode=True))
    code, printed = outcome(path, capsys)
    assert code == 2
    head, *lines = printed.splitlines()
    assert head.startswith("ardtrain validate: ") and head.endswith("mistake(s)")
    assert lines and all(line.strip() for line in lines)
    assert "Traceback" not in printed and "Error(" not in printed


@settings(FUZZ, max_examples=200)
@given(
    content=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(str.encode), VALUES.map(json.dumps).map(str.encode)
    )
)
def test_no_file_gives_a_traceback(tmp_path, capsys, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    code, printed = outcome(path, capsys)
    assert code == 2 and "Traceback" not in printed


@settings(FUZZ, max_examples=200)
@given(override=st.one_of(st.text(max_size=20), st.tuples(keys_of(""), TEXTS).map("=".join)))
def test_no_override_gives_a_traceback(tmp_path, capsys, override):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    code = main(["validate", str(path), override])
    assert code == 2 and "Traceback" not in capsys.readouterr().err
