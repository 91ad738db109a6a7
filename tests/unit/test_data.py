"""Data: formats, broken rows, truncation, cache, packing, order, collation.  Small files and a toy tokenizer."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ardtrain.data import (
    DataError,
    EvalData,
    Samples,
    TrainData,
    build_batch,
    tokenizer_fingerprint,
)
from ardtrain.data_order import Cursor, TrainOrder, epoch_rows, pack, permutation, total_rows, total_steps
from tests.rows import row_settings as make

TEST_DATA = Path(os.environ.get("ARDTRAIN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (TEST_DATA / "stories260k_llama").is_dir(), reason=f"ARDTRAIN_TEST_DATA names no data folder ({TEST_DATA})"
)
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT_GENERATION = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character: a..z, space, a few signs; ids 0 <pad>, 1 <s>, 2 </s>, 3 <unk>."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz []:\n"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def stories():
    return AutoTokenizer.from_pretrained(TEST_DATA / "stories260k_llama")


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shown(samples, tokenizer, index):
    """The sample as text, and its targets alone as text."""
    ids, mask = samples.read([index])[0]
    return "".join(tokenizer.convert_ids_to_tokens(ids)), "".join(tokenizer.convert_ids_to_tokens(ids[mask]))


def texts(count, *, seed=0, longest=30):
    """Rows of text of uneven lengths."""
    generator = np.random.default_rng(seed)
    return [{"text": "".join(generator.choice(list("abcdef"), generator.integers(1, longest)))} for _ in range(count)]


# ---- formats ----


def test_completion_has_loss_on_completion_and_eos(tmp_path, tokenizer):
    samples = Samples(
        make(write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}])), tokenizer, tmp_path / "c"
    )
    assert samples.format == "completion"
    assert shown(samples, tokenizer, 0) == ("<s>abcd</s>", "cd</s>")


def test_templates_fill_from_fields_and_list_items(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"q": "ab", "refs": ["cd", "ef"]}])
    settings = make(path, prompt_template="q:{q}\n", completion_template="{refs[1]}")
    assert shown(Samples(settings, tokenizer, tmp_path / "c"), tokenizer, 0) == ("<s>q:ab\nef</s>", "ef</s>")


def test_exactly_one_bos_and_eos_when_text_brings_its_own(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "<s>ab", "completion": "cd</s>"}, {"prompt": "", "completion": "cd"}]
    )
    samples = Samples(make(path), tokenizer, tmp_path / "c")
    assert shown(samples, tokenizer, 0) == ("<s>abcd</s>", "cd</s>")
    assert shown(samples, tokenizer, 1) == ("<s>cd</s>", "cd</s>")


def test_tokenizer_without_bos_gets_none(tmp_path, tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    samples = Samples(make(write(tmp_path / "a.jsonl", [{"text": "ab"}])), plain, tmp_path / "c")
    assert shown(samples, plain, 0)[0] == "ab</s>"


@pytest.mark.parametrize("template", [CHAT, CHAT_GENERATION])
def test_chat_has_loss_on_assistant_turns_only(tmp_path, tokenizer, template):
    turns = [("system", "x"), ("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok then")]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    samples = Samples(make(path, chat_template=template), tokenizer, tmp_path / "c")
    text = "<s>[system]x[user]hi[assistant]yo</s>[user]so[assistant]ok then</s>"
    assert shown(samples, tokenizer, 0) == (text, "yo</s>ok then</s>")


@pytest.mark.parametrize("template", [CHAT, CHAT_GENERATION])
def test_loss_on_the_last_turn_alone(tmp_path, tokenizer, template):
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok then"), ("user", "bye")]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    samples = Samples(make(path, chat_template=template, loss_on="last"), tokenizer, tmp_path / "c")
    text = "<s>[user]hi[assistant]yo</s>[user]so[assistant]ok then</s>[user]bye"
    assert shown(samples, tokenizer, 0) == (text, "ok then</s>")
    every = Samples(make(path, chat_template=template), tokenizer, tmp_path / "c")  # another cache
    assert shown(every, tokenizer, 0) == (text, "yo</s>ok then</s>")


def test_tools_and_calls_go_through_the_template(tmp_path, tokenizer):
    template = (
        "{{ bos_token }}{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% generation %}{% for c in m.tool_calls or [] %}call {{ c.name }}{% endfor %}"
        "{{ m.content or '' }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "sum"}]},
        {"role": "tool", "content": "ab"},
        {"role": "assistant", "content": "yo"},
    ]
    path = write(tmp_path / "a.jsonl", [{"messages": messages, "tools": [{"name": "sum"}]}])
    samples = Samples(make(path, chat_template=template, tools_field="tools"), tokenizer, tmp_path / "c")
    text = "<s>[sum][user]hi[assistant]call sum</s>[tool]ab[assistant]yo</s>"
    assert shown(samples, tokenizer, 0) == (text, "call sum</s>yo</s>")


def test_chat_template_that_rewrites_history_is_refused(tmp_path, tokenizer):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else 'x' }}{% endfor %}"
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok")]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: chat_template: the chat up to message 2.*generation"):
        Samples(make(path, chat_template=template, on_bad_row="skip"), tokenizer, tmp_path / "c")


def test_chat_needs_a_template(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(ValueError, match="no chat template; set chat_template"):
        Samples(make(path), tokenizer, tmp_path / "c")
    with pytest.raises(ValueError, match="no Jinja template"):
        Samples(make(path, chat_template="{% for %}"), tokenizer, tmp_path / "c")


def test_text_file_is_one_document_and_gzip_reads_alike(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("ab\ncd")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('\ufeff{"text": "ef"}\n\n{"text": "g\u2028h"}\n')  # U+2028 does not end a line
    settings = make(str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl.gz"))
    samples = Samples(settings, tokenizer, tmp_path / "c")
    assert [shown(samples, tokenizer, i)[0] for i in range(3)] == ["<s>ab\ncd</s>", "<s>ef</s>", "<s>g<unk>h</s>"]
    assert [i.split("/")[-1] for i in samples.ids([0, 1, 2])] == ["a.txt:1", "b.jsonl.gz:1", "b.jsonl.gz:3"]
    assert shown(samples, tokenizer, 1)[1] == "ef</s>"


@pytest.mark.parametrize(
    ("row", "found"),
    [({"a": 1}, "neither a chat"), ({"messages": [], "prompt": "", "completion": ""}, "fit chat and completion")],
)
def test_auto_says_when_it_cannot_tell(tmp_path, tokenizer, row, found):
    with pytest.raises(DataError, match=rf"a\.jsonl:1: data\.format=auto cannot tell.*{found}.*set data\.format"):
        Samples(make(write(tmp_path / "a.jsonl", [row])), tokenizer, tmp_path / "c")


# ---- broken rows, files, settings ----

GOOD = {"prompt": "a", "completion": "b"}
BROKEN = [
    ('{"prompt": "a", \n', r"not valid JSON at column 18"),
    ("[1]\n", "the row is a list, not an object"),
    ({"prompt": "a"}, "field 'completion' is missing"),
    ({"prompt": "a", "completion": 3}, "field 'completion' is a int, not text"),
    ({"prompt": None, "completion": "a"}, "field 'prompt' is null"),
    ({"prompt": "a", "completion": " "}, "the completion is empty: no target token"),
    ('{"prompt": "a", "completion": "\\ud800"}\n', "surrogate"),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN)
def test_broken_row_names_file_line_reason_remedy(tmp_path, tokenizer, row, reason):
    path = write(tmp_path / "a.jsonl", [GOOD, "\n", row, GOOD])
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{reason}.*; correct the row, or .*on_bad_row: skip") as error:
        Samples(make(path), tokenizer, tmp_path / "c")
    assert error.value.line == 3
    assert [entry for entry in (tmp_path / "c").iterdir() if entry.is_dir()] == []  # nothing half-written


def test_broken_rows_are_skipped_and_counted(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [BROKEN[0][0], GOOD, *[row for row, _ in BROKEN[1:]], GOOD])
    samples = Samples(make(path, on_bad_row="skip"), tokenizer, tmp_path / "c")
    assert samples.counts == {"rows": 9, "bad": 7, "too_long": 0, "truncated": 0, "samples": 2}
    assert [name.rsplit(":", 1)[1] for name in samples.ids([0, 1])] == ["2", "9"]


def test_bad_bytes_and_bad_gzip(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid UTF-8 at byte 11"):
        Samples(make(str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "c")
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="the gzip file is damaged"):
        Samples(make(str(tmp_path / "b.jsonl.gz"), on_bad_row="skip"), tokenizer, tmp_path / "c")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "is a str, not a list"),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ([{"role": "assistant", "content": None}], "message 1 of 'messages' has no text"),
        ([{"role": "assistant", "content": ""}], "empty answer"),
    ],
)
def test_broken_chats(tmp_path, tokenizer, messages, reason):
    with pytest.raises(DataError, match=reason):
        Samples(
            make(write(tmp_path / "a.jsonl", [{"messages": messages}]), chat_template=CHAT), tokenizer, tmp_path / "c"
        )


def test_template_with_missing_field_is_a_bad_row(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "refs": ["b"]}])
    for template, reason in (("{x}", "'x' of the template is missing"), ("{refs}", "is a list, not text")):
        with pytest.raises(DataError, match=reason):
            Samples(make(path, prompt_template="{q}", completion_template=template), tokenizer, tmp_path / "c")


def test_settings_and_files_are_checked(tmp_path, tokenizer):
    for changes, text in (
        ({"format": "csv"}, "data.format='csv' is unknown; use one of auto"),
        ({"max_length": 1}, "leaves no token to predict"),
        ({"prompt_template": "{}"}, "unnamed field"),
        ({"prompt_template": "{0[a]}"}, "unnamed field"),
        ({"prompt_template": "{"}, "no format text"),
    ):
        with pytest.raises(ValueError, match=text):
            make("a.jsonl", **changes)
    (tmp_path / "a.csv").touch()
    for name, text in (
        ("*.jsonl", "is a pattern"),
        ("", "is a folder"),
        ("b.jsonl", "not exist"),
        ("a.csv", "none of"),
    ):
        with pytest.raises(ValueError, match=text):
            Samples(make(str(tmp_path / name)), tokenizer, tmp_path / "c")
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(ValueError, match="is plain text"):
        Samples(make(str(tmp_path / "a.txt"), format="completion"), tokenizer, tmp_path / "c")


# ---- length ----


def test_truncation_error_drop_right(tmp_path, tokenizer):
    rows = [GOOD, {"prompt": "abc", "completion": "defghi"}, {"prompt": "a" * 20, "completion": "b"}]
    settings = make(write(tmp_path / "a.jsonl", rows), max_length=8)
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row has 11 tokens, max_length=8"):
        Samples(replace(settings, truncation="error"), tokenizer, tmp_path / "c")
    dropped = Samples(settings, tokenizer, tmp_path / "c")
    assert dropped.counts == {"rows": 3, "bad": 0, "too_long": 2, "truncated": 0, "samples": 1}
    right = Samples(replace(settings, truncation="right"), tokenizer, tmp_path / "c")
    assert right.counts == {"rows": 3, "bad": 0, "too_long": 1, "truncated": 1, "samples": 2}
    assert shown(right, tokenizer, 1) == ("<s>abcdefg", "defg")
    assert right.lengths.tolist() == [4, 8]


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "a" * 100}])
    with pytest.raises(DataError, match=r"no row is left to use \(rows 1, bad 0, too_long 1"):
        Samples(make(path), tokenizer, tmp_path / "c")


@pytest.mark.parametrize("letters", [13, 14, 15, 16])
def test_packed_text_is_cut_into_pieces_without_loss(tmp_path, tokenizer, letters):
    text = "abcdefghijklmnopqrstuvwxyz"[:letters]
    path = write(tmp_path / "a.jsonl", [{"text": text}])
    samples = Samples(make(path, max_length=5, packing=True), tokenizer, tmp_path / "c")
    pieces = [shown(samples, tokenizer, i)[0] for i in range(len(samples.lengths))]
    assert "".join(pieces) == f"<s>{text}</s>"
    assert samples.lengths.min() >= 2 and samples.lengths.max() <= 5
    assert samples.ids([0, 1])[1] == f"{path}:1#1"


# ---- cache ----


def test_cache_is_keyed_by_contents_settings_and_tokenizer(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", [GOOD])
    first = Samples(make(path), tokenizer, tmp_path / "c")
    (tmp_path / "sub").mkdir()
    moved = write(tmp_path / "sub" / "b.jsonl", [GOOD])
    with monkeypatch.context() as patch:
        patch.setattr("ardtrain.data_cache.Tokenising", None)  # a second process loads, it tokenises nothing
        again = Samples(make(moved, seed=8), tokenizer, tmp_path / "c")
    assert again.cache_key == first.cache_key and again.counts == first.counts
    assert again.ids([0]) == [f"{moved}:1"]
    write(tmp_path / "a.jsonl", [GOOD, GOOD])
    assert Samples(make(path), tokenizer, tmp_path / "c").cache_key != first.cache_key
    assert Samples(make(moved, max_length=9), tokenizer, tmp_path / "c").cache_key != first.cache_key


def test_tokenizer_fingerprint_ignores_padding_state(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<unk>")
    assert tokenizer_fingerprint(other) != before


def test_lost_race_uses_the_winners_folder(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", [GOOD])
    rename = Path.rename

    def another_first(self, target):
        rename(self, target)
        return rename(self, target)  # the source is gone now: an OSError, as for the slower process

    monkeypatch.setattr(Path, "rename", another_first)
    assert Samples(make(path), tokenizer, tmp_path / "c").counts["samples"] == 1


def test_fingerprint_covers_what_decides_the_order(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", texts(9))

    def fingerprint(**changes):
        sizes = {"global_batch_size": changes.pop("global_batch_size", 2), "grain_size": 1, "max_steps": 3}
        return TrainData(make(path, **changes), tokenizer, tmp_path / "c", **sizes).fingerprint

    assert fingerprint() == fingerprint(global_batch_size=4)
    assert len({fingerprint(), fingerprint(seed=8), fingerprint(packing=True), fingerprint(max_length=40)}) == 4


# ---- packing and order (pure) ----


def test_permutation_never_changes():
    """Golden, printed once with NumPy 2.4.6: another answer elsewhere would change every run's data order."""
    assert permutation(10, seed=1, epoch=0, purpose=1).tolist() == [3, 1, 7, 9, 4, 5, 0, 2, 8, 6]
    assert sorted(permutation(1000, seed=1, epoch=3, purpose=1).tolist()) == list(range(1000))


def test_pack_best_fit_by_hand():
    # 10 tokens a row: 6 opens row 0, 5 row 1; 4 fits both, row 0 is fuller; 3 fits row 1 alone; 3 opens row 2
    assert pack(range(5), np.array([6, 5, 4, 3, 3]), 10) == [(0, 2), (1, 3), (4,)]
    with pytest.raises(ValueError, match="sample 0 has 11 tokens, a packed row holds 10"):
        pack([0], np.array([11]), 10)


def test_packed_epoch_holds_every_sample_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 60, 3000)
    rows = epoch_rows(lengths, seed=1, epoch=0, capacity=100)
    listed = [rows[i] for i in range(len(rows))]
    assert sorted(s for row in listed for s in row) == list(range(3000))
    assert all(lengths[list(row)].sum() <= 100 for row in listed)
    assert len(rows) <= 1.03 * lengths.sum() / 100
    assert listed[0] != epoch_rows(lengths, seed=1, epoch=1, capacity=100)[0]


def order(**changes):
    values = {"seed": 3, "capacity": None, "global_batch_size": 6, "grain_size": 2, "num_train_epochs": 2.5}
    lengths = changes.pop("lengths", np.random.default_rng(0).integers(2, 20, 32))
    return TrainOrder(lengths, **{**values, **changes})


@pytest.mark.parametrize("capacity", [None, 30])
def test_steps_are_the_epochs_joined_in_any_order_of_asking(capacity):
    whole = order(capacity=capacity)
    forward = [whole.grains(step) for step in range(whole.num_steps)]
    for asked in (order(capacity=capacity), whole):
        assert [asked.grains(step) for step in reversed(range(whole.num_steps))] == forward[::-1]
    assert order(capacity=capacity).grains(whole.num_steps - 1) == forward[-1]  # without what comes before

    rows = [row for grains in forward for grain in grains for row in grain.rows]
    places = [(row.epoch, row.row) for row in rows]
    counts = [whole.num_rows(epoch) for epoch in range(3)]
    assert places == [(e, r) for e in range(3) for r in range(counts[e])][: counts[0] + counts[1] + -(-counts[2] // 2)]
    for epoch in range(2):
        assert sorted(s for row in rows if row.epoch == epoch for s in row.samples) == list(range(32))
    sizes = [sum(len(grain.rows) for grain in grains) for grains in forward]
    assert set(sizes[:-1]) == {6} and 0 < sizes[-1] <= 6
    assert all(len(grain.rows) == 2 for grains in forward for grain in grains[:-1])
    assert [[grain.index for grain in grains] for grains in forward[:-1]] == [[0, 1, 2]] * (len(forward) - 1)
    assert whole.cursor(0) == Cursor(0, 0)
    assert [(whole.cursor(s).epoch, whole.cursor(s).row) for s in range(whole.num_steps)] == places[::6]


def test_packed_epochs_may_have_different_numbers_of_rows():
    packed = order(capacity=30, lengths=np.random.default_rng(1).integers(2, 20, 200), max_steps=200)
    assert len({packed.num_rows(epoch) for epoch in range(9)}) > 1
    assert packed.cursor(150) == order(
        capacity=30, lengths=np.random.default_rng(1).integers(2, 20, 200), max_steps=200
    ).cursor(150)


def test_batch_may_span_many_small_epochs():
    small = order(lengths=np.array([3, 4]), max_steps=2)
    assert [(row.epoch, row.row) for row in small.rows_of_step(1)] == [(e, r) for e in (3, 4, 5) for r in (0, 1)]


def test_total_steps_by_hand():
    assert total_steps(lambda _: 10, global_batch_size=4, num_train_epochs=1) == 3
    assert total_steps(lambda _: 10, global_batch_size=4, num_train_epochs=0.5) == 2
    assert total_steps(lambda _: 10, global_batch_size=4, num_train_epochs=99, max_steps=7) == 7
    assert total_rows(lambda _: 30, 0.1) == 3  # 0.1 * 30 is 3.0000000000000004 in floats
    assert total_rows(lambda epoch: 10 + epoch, 2.5) == 10 + 11 + 6
    for changes, text in (
        ({"num_train_epochs": 0.0}, "num_train_epochs=0.0 must be above 0"),
        ({"max_steps": 0}, "max_steps=0 must be above 0"),
        ({}, "both unset"),
    ):
        with pytest.raises(ValueError, match=text):
            total_steps(lambda _: 10, global_batch_size=4, **changes)


def test_order_refuses_bad_sizes_and_steps():
    with pytest.raises(
        ValueError, match="global_batch_size=6 is not a whole multiple of per_device_train_batch_size=4"
    ):
        order(grain_size=4)
    with pytest.raises(ValueError, match="step 14 is outside the run of 14 steps"):
        order().rows_of_step(14)


# ---- collation ----


def arrays(ids, first_target=1):
    return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= first_target


def test_unpacked_batch_by_hand():
    batch = build_batch([[arrays([1, 5, 6, 2], 2)], [arrays([1, 7])]], packed=False, pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 7, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 6, 2], [-100, 7, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert (batch.num_target_tokens, batch.num_tokens) == (3, 6)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64


def test_packed_batch_keeps_documents_apart():
    batch = build_batch([[arrays([1, 5, 2]), arrays([1, 2])], [arrays([7, 8], 0)]], packed=True, pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 2, 1, 2], [7, 8, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 5, 2, -100, 2], [-100, 8, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]  # padding is a document
    assert batch.attention_mask is None
    assert (batch.num_target_tokens, batch.num_tokens) == (4, 7)


@pytest.mark.parametrize("packing", [False, True])
def test_train_data_end_to_end(tmp_path, tokenizer, packing):
    rows = texts(40)
    path = write(tmp_path / "a.jsonl", rows)
    settings = make(path, packing=packing)
    sizes = {"global_batch_size": 4, "grain_size": 2, "num_train_epochs": 1.0}
    data = TrainData(settings, tokenizer, tmp_path / "c", **sizes)
    again = TrainData(settings, tokenizer, tmp_path / "c", **sizes)
    grains = [grain for step in range(data.num_steps) for grain in data.grains(step)]
    assert data.num_steps == -(-data.num_rows(0) // 4) and data.num_grains == 2
    names = [name for grain in grains for name in data.sample_ids(grain)]
    assert sorted(names) == sorted(f"{path}:{line}" for line in range(1, 41))
    for grain in reversed(grains):
        one, two = data.collate(grain), again.collate(grain)
        for name, value in vars(one).items():
            other = getattr(two, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert one.num_target_tokens == (one.labels[:, 1:] != -100).sum()
        tokens = "".join(tokenizer.convert_ids_to_tokens(one.input_ids.flatten())).replace("<pad>", "")
        lines = [int(name.rsplit(":", 1)[1]) - 1 for name in data.sample_ids(grain)]
        assert tokens == "".join(f"<s>{rows[line]['text']}</s>" for line in lines)


def test_eval_data_keeps_file_order(tmp_path, tokenizer):
    path = write(tmp_path / "dev.jsonl", texts(10))
    data = EvalData(make("unused.jsonl"), [path], tokenizer, tmp_path / "c", grain_size=4, max_samples=7)
    assert [name for grain in data.grains() for name in data.sample_ids(grain)] == [f"{path}:{i}" for i in range(1, 8)]
    assert [len(grain.rows) for grain in data.grains()] == [4, 3]
    packed = EvalData(make("unused.jsonl", packing=True), [path], tokenizer, tmp_path / "c", grain_size=4)
    names = [name for grain in packed.grains() for name in packed.sample_ids(grain)]
    assert sorted(names) == sorted(f"{path}:{i}" for i in range(1, 11))
    assert sum(packed.collate(g).num_target_tokens for g in packed.grains()) == sum(
        len(r["text"]) + 1 for r in texts(10)
    )


def test_chosen_held_out_samples_are_drawn_by_the_seed_alone(tmp_path, tokenizer):
    path = write(tmp_path / "dev.jsonl", texts(40))

    def chosen(count, seed, grain_size=4, **changes):
        data = EvalData(
            make("unused.jsonl", **changes),
            [path],
            tokenizer,
            tmp_path / "c",
            grain_size=grain_size,
            choose=(count, seed),
        )
        names = [name for grain in data.grains() for name in data.sample_ids(grain)]
        assert data.num_samples == len(names) == count
        return [int(name.rsplit(":", 1)[1]) for name in names]

    lines = chosen(12, 5)
    assert lines == sorted(set(lines)) and lines[0] >= 1 and lines[-1] <= 40
    assert chosen(12, 5, grain_size=5) == lines  # of the seed, not of the grains
    assert chosen(12, 6) != lines and lines != list(range(1, 13))
    assert set(chosen(5, 5)) < set(lines)  # a longer draw begins with the shorter one
    assert chosen(40, 5) == list(range(1, 41))
    assert sorted(chosen(12, 5, packing=True)) == lines
    drawn = {line for seed in range(60) for line in chosen(4, seed)}
    assert drawn == set(range(1, 41))  # every sample has its chance
    with pytest.raises(ValueError, match=r"dev\.jsonl holds 40 samples, fewer than count=41; lower the count"):
        chosen(41, 5)
    with pytest.raises(ValueError, match="count=0 samples to draw must be above 0"):
        chosen(0, 5)
    with pytest.raises(ValueError, match="exclude each other"):
        EvalData(make("unused.jsonl"), [path], tokenizer, tmp_path / "c", grain_size=4, max_samples=3, choose=(3, 1))


# ---- real data ----


@needs_data
def test_e2e_nlg(tmp_path, stories):
    settings = make(
        str(TEST_DATA / "e2e_nlg" / "train.jsonl"),
        prompt_template="{mr}\n",
        completion_template="{ref}",
        max_length=512,
    )
    data = TrainData(settings, stories, tmp_path, global_batch_size=16, grain_size=4, num_train_epochs=1.0)
    assert data.format == "completion"
    assert data.counts == {"rows": 4089, "bad": 0, "too_long": 0, "truncated": 0, "samples": 4089}
    batch = data.collate(data.grains(0)[0])
    assert (batch.input_ids[:, 0] == stories.bos_token_id).all() and (batch.input_ids[:, 1:] != 1).all()
    ids, labels = batch.input_ids[0], batch.labels[0]
    assert stories.decode(ids[(labels == -100) & batch.attention_mask[0]], skip_special_tokens=True).endswith("]\n")
    assert labels[labels != -100][-1] == stories.eos_token_id
    dev = EvalData(
        replace(settings, completion_template="{refs[0]}"),
        [str(TEST_DATA / "e2e_nlg" / "dev.jsonl")],
        stories,
        tmp_path,
        grain_size=8,
        max_samples=20,
    )
    assert len(dev.grains()) == 3


@needs_data
def test_instruct_packed(tmp_path, stories):
    settings = make(
        str(TEST_DATA / "instruct" / "train.jsonl"),
        prompt_template="{instruction}\n{input}\n",
        completion_template="{output}",
        max_length=512,
        packing=True,
    )
    data = TrainData(settings, stories, tmp_path, global_batch_size=8, grain_size=2, num_train_epochs=2.0)
    assert data.counts["rows"] == 1075 and data.counts["bad"] == 0
    assert 200 < data.counts["too_long"] < 450 and data.num_samples + data.counts["too_long"] == 1075
    grains = [grain for step in range(data.num_steps) for grain in data.grains(step)]
    rows = [row for grain in grains for row in grain.rows]
    for epoch in range(2):
        assert sorted(s for row in rows if row.epoch == epoch for s in row.samples) == list(range(data.num_samples))
    tokens = sum(data.collate(grain).num_tokens for grain in grains)
    assert tokens >= 0.96 * len(rows) * 512  # 0.964 seen; unpacked, the rows are half empty


@needs_data
def test_tinyshakespeare_packed(tmp_path, stories):
    path = TEST_DATA / "text_lm" / "tinyshakespeare_dev.txt"
    settings = make(str(path), max_length=256, packing=True)
    data = TrainData(settings, stories, tmp_path, global_batch_size=8, grain_size=4, num_train_epochs=1.0)
    assert data.format == "text" and data.counts["rows"] == 1
    sources = Samples(settings, stories, tmp_path)
    ids = np.concatenate([ids for ids, _ in sources.read(range(data.num_samples))])
    assert stories.decode(ids, skip_special_tokens=True) == path.read_text()
    batch = data.collate(data.grains(0)[0])
    assert batch.input_ids.shape == (4, 256) and batch.num_target_tokens == 4 * 255


@needs_data
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_give_the_logits_they_give_alone(tmp_path, stories, attention):
    model = AutoModelForCausalLM.from_pretrained(
        TEST_DATA / "stories260k_llama", attn_implementation=attention, dtype=torch.float32
    ).eval()
    settings = make(
        str(TEST_DATA / "e2e_nlg" / "train.jsonl"),
        prompt_template="{mr}\n",
        completion_template="{ref}",
        max_length=512,
        packing=True,
    )
    data = TrainData(settings, stories, tmp_path, global_batch_size=2, grain_size=2, max_steps=1)
    samples = Samples(settings, stories, tmp_path)
    grain = data.grains(0)[0]
    batch = data.collate(grain)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for b, row in enumerate(grain.rows):
            assert len(row.samples) > 1
            end = 0
            for ids, _ in samples.read(row.samples):
                start, end = end, end + len(ids)
                alone = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
                # Logits reach 20, and GEMMs of other lengths round otherwise: 3e-5 seen.
                torch.testing.assert_close(logits[b, start:end], alone, rtol=1e-5, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none"
    )
    assert (loss != 0).sum() == batch.num_target_tokens
