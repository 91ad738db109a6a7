"""chat_template of the config: a file's name, or the template itself."""

import pytest

from ardtrain.config import ConfigError, parse_config
from ardtrain.run_data import template_text


def text_of(template):
    raw = {"model_name_or_path": "m", "method": "lora", "output_dir": "o", "data": {"train_file": "a.jsonl"}}
    return template_text(parse_config(raw | {"chat_template": template}))


def test_a_template_is_read_from_its_file_or_is_itself(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert text_of(str(tmp_path / "chat.jinja")) == "{{ messages }}"
    long = "{{ messages }}" + 40 * " by turns"  # longer than a file's name may be
    assert text_of(long) == long
    assert text_of(None) is None


def test_what_is_neither_a_file_nor_a_template_is_refused(tmp_path, monkeypatch):
    """A wrong path would be rendered, the same for each row."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"chat_template='chat\.jinja' is no file in {tmp_path} and no Jinja2 template"
    ):
        text_of("chat.jinja")
    (tmp_path / "chat.jinja").write_text("hello")
    with pytest.raises(
        ConfigError, match=r"chat_template='chat\.jinja' holds no Jinja2 template, which has braces; correct"
    ):
        text_of("chat.jinja")
    (tmp_path / "chat.jinja").write_bytes(b"\xff")
    with pytest.raises(
        ConfigError, match=r"chat_template='chat\.jinja' cannot be read \('utf-8' codec.*give a text file"
    ):
        text_of("chat.jinja")
