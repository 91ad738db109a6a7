import os

import pytest

from ardtrain.backbones import ModelSource, load_config, load_tokenizer
from ardtrain.reasons import first_line, no_source


def test_an_error_without_a_text_has_its_kind():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(EOFError()) == "EOFError"


def test_a_source_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = OSError("the hub says no")
    assert no_source("models/base", error) == f"no such folder in {os.getcwd()}; the hub says no"
    assert no_source(str(tmp_path / "base"), error) == "no such folder"
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert no_source("models/base", error) == "the hub says no"


def test_model_and_tokenizer_name_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"model_name_or_path='a/b' holds no model config .no such folder in {tmp_path}"
    ):
        load_config(ModelSource("a/b"))
    with pytest.raises(
        ValueError, match=f"tokenizer_name_or_path='a/b' holds no tokenizer .no such folder in {tmp_path}"
    ):
        load_tokenizer(ModelSource("a/b"))


def test_a_tokenizers_config_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no tokenizer .*give the folder or hub id"):
        load_tokenizer(ModelSource(str(tmp_path)))
