"""Settings of rows as a config gives them to the data layer, with this or that changed."""

from ardtrain.data_rows import DataSettings
from ardtrain.images import ImageReader, image_settings
from tests.tiny_paligemma import image_processor, letter_tokenizer, tiny_config

SETTINGS = {
    "format": "auto",
    "prompt_field": "prompt",
    "completion_field": "completion",
    "messages_field": "messages",
    "text_field": "text",
    "prompt_template": None,
    "completion_template": None,
    "chat_template": None,
    "max_length": 64,
    "packing": False,
    "truncation": "drop",
    "on_bad_row": "error",
    "seed": 7,
}


def row_settings(*files, **changes):
    return DataSettings(train_files=tuple(map(str, files)), **{**SETTINGS, **changes})


def picture_settings(path, *, max_length=64, **changes):
    """(settings, tokenizer, reader) of rows with a picture, for tests.tiny_paligemma's model."""
    tokenizer, processor = letter_tokenizer(), image_processor()
    images = image_settings(tiny_config(), tokenizer, processor, field="image", max_length=max_length)
    own = {"format": "image_text", "max_length": max_length, "truncation": "error", "seed": 0, "images": images}
    return row_settings(path, **(own | changes)), tokenizer, ImageReader(processor, images)
