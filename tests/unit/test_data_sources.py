import json
import os
import re

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from ardtrain import data_sources
from ardtrain.data import Samples, TrainData
from ardtrain.data_labels import DataError, find_labels
from ardtrain.data_sources import HubSource, check_source, commit_of, identity, load_hub, parse_hub, read_rows
from tests.rows import row_settings as make
from tests.tiny import save_tiny_llama
from tests.unit.test_classification import make as make_classes

ROWS = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(1200)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model")))


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    return str(path)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_of(samples):
    return [(ids.tolist(), mask.tolist()) for ids, mask in samples.read(range(len(samples.lengths)))]


def test_parquet_and_a_data_sets_folder_give_the_rows_of_jsonl(tmp_path, tokenizer, monkeypatch):
    """Several files in their order, mixed; over row groups and batches."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    lines = Samples(make(jsonl(tmp_path / "a.jsonl", ROWS)), tokenizer, tmp_path / "c")
    first, second = parquet(tmp_path / "a.parquet", ROWS[:700]), jsonl(tmp_path / "b.jsonl", ROWS[700:])
    mixed = Samples(make(first, second), tokenizer, tmp_path / "c")
    assert all_of(mixed) == all_of(lines) and mixed.format == "completion"
    assert mixed.ids([0, 699, 700]) == [f"{first}:1", f"{first}:700", f"{second}:1"]
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet", ROWS[:700])
    parquet(tmp_path / "set" / "test.parquet", ROWS[:2])
    named = f"hub:{tmp_path / 'set'}"
    hub = Samples(make(named, second), tokenizer, tmp_path / "c")
    assert all_of(hub) == all_of(lines) and hub.ids([699]) == [f"{named}:700"]
    assert len(Samples(make(f"{named}:test"), tokenizer, tmp_path / "c").lengths) == 2
    assert len({lines.cache_key, mixed.cache_key, hub.cache_key}) == 3


def test_nulls_of_a_table_are_fields_that_a_row_lacks(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a", "tool": None}, {"role": "assistant", "content": "b"}],
             "text": None}, {"text": "c", "messages": None}]  # fmt: skip
    path = parquet(tmp_path / "a.parquet", rows)
    read = [row for _, row in read_rows(path)]
    assert read[0] == {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read[1] == {"text": "c"}
    bad = parquet(tmp_path / "b.parquet", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(DataError, match=re.escape(f"{bad}:2: field 'completion' is missing")):
        Samples(make(bad), tokenizer, tmp_path / "c")
    assert Samples(make(bad, on_bad_row="skip"), tokenizer, tmp_path / "c").counts["bad"] == 1


def test_damaged_parquet_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    parquet(path, ROWS)
    whole = path.read_bytes()
    for content in (b"PAR1", whole[:-20], whole[:4000] + bytes(len(whole) - 8000) + whole[-4000:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="a.parquet: the Parquet file is damaged .*; replace the file"):
            Samples(make(str(path)), tokenizer, tmp_path / "c")


def test_labels_are_found_in_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"text": "a", "label": 2}, {"text": "b", "label": 0}])
    assert find_labels([make_classes(path, labels=None)]) == ("0", "1", "2")


def test_cache_key_follows_contents_and_not_places(tmp_path, tokenizer):
    (tmp_path / "x").mkdir()
    one, two = parquet(tmp_path / "a.parquet", ROWS[:3]), parquet(tmp_path / "x" / "b.parquet", ROWS[:3])
    assert identity(one) == identity(two) != identity(parquet(tmp_path / "c.parquet", ROWS[:4]))
    folder = identity(f"hub:{tmp_path / 'x'}")
    assert folder[:2] == ["folder", "train"] and folder != identity(f"hub:{tmp_path / 'x'}:test")
    assert identity(f"hub:org/rows@{COMMIT}:dev") == ["hub", "org/rows", None, COMMIT, "dev"]


def test_names_of_data_sets(tmp_path, monkeypatch):
    assert parse_hub("hub:org/rows") == HubSource("org/rows", None, None, "train")
    assert parse_hub("hub:rows:train[:50%]") == HubSource("rows", None, None, "train[:50%]")
    assert parse_hub(f"hub:org/rows/plain@{COMMIT}:dev") == HubSource("org/rows", "plain", COMMIT, "dev")
    assert parse_hub(f"hub:{tmp_path}").is_folder and not parse_hub("hub:org/rows").is_folder
    check_source("hub:org/rows")
    for wrong in ("hub:", "hub:/nowhere/at/all/here", "hub:a//b", "hub:a/b/c/d", "hub:org/rows@"):
        with pytest.raises(ValueError, match="is no hub:OWNER/NAME"):
            check_source(wrong)
    with pytest.raises(ValueError, match=re.escape(f"write hub:{tmp_path}")):
        check_source(str(tmp_path))
    (tmp_path / "a.jsonl").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read all
    with pytest.raises(ValueError, match="a.jsonl' may not be read .*; make it readable"):
        check_source(str(tmp_path / "a.jsonl"))


def test_offline_hub_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"which commit 'main' is cannot be asked .*run `ardtrain fetch`.*@COMMIT:dev"):
        commit_of(parse_hub("hub:org/rows:dev"))
    assert commit_of(parse_hub(f"hub:org/rows@{COMMIT}")) == COMMIT  # asks nobody
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'org/rows', split 'train', could not be loaded .*check the name.*pin the"):
        load_hub(parse_hub(f"hub:org/rows@{COMMIT}"))


def test_the_hub_is_asked_for_the_pinned_commit_and_another_in_the_cache_is_refused(monkeypatch):
    asked = []

    def load(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        table = datasets.Dataset.from_list(ROWS[:2])
        table.info.download_checksums = {f"hf://datasets/org/rows@{asked[0][3]}/train.parquet": {}}
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    name = f"hub:org/rows/plain@{COMMIT}:dev"
    assert [row for _, row in read_rows(name)] == ROWS[:2]
    assert asked == [("org/rows", "plain", "dev", COMMIT)]
    monkeypatch.setattr(data_sources, "commit_of", lambda source: "f" * 40)
    with pytest.raises(ValueError, match=f"the local cache holds commit {COMMIT} and the run wants f{{40}}"):
        list(read_rows("hub:org/rows:dev"))


def test_training_data_of_a_table_end_to_end(tmp_path, tokenizer):
    path = parquet(tmp_path / "a.parquet", ROWS)
    data = TrainData(make(path), tokenizer, tmp_path / "c", global_batch_size=8, grain_size=4, max_steps=2)
    batch = data.collate(data.grains(0)[0])
    assert batch.input_ids.shape[0] == 4 and data.sample_ids(data.grains(0)[0])[0].startswith(f"{path}:")


def test_cache_key_follows_template_length_and_tokenizer(tmp_path, tokenizer):
    """All else that decides samples, so that no run finds another's rows."""
    path = jsonl(tmp_path / "a.jsonl", ROWS[:3])
    changes = [{}, {"max_length": 32}, {"prompt_template": "{prompt}?"}, {"chat_template": "{{ messages }}"}]
    keys = [Samples(make(path, **change), tokenizer, tmp_path / "c").cache_key for change in changes]
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = "{{ messages }}"
    keys.append(Samples(make(path), other, tmp_path / "c").cache_key)
    other.add_tokens(["1 = "])
    keys.append(Samples(make(path), other, tmp_path / "c").cache_key)
    assert len(set(keys)) == 6
    assert Samples(make(path, seed=9), tokenizer, tmp_path / "c").cache_key == keys[0]  # the order is no part of it
