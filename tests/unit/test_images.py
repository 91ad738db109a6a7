"""Pictures of rows: the ways to write them, broken and missing ones by name, pixels as the model wants them."""

import base64
import io
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ardtrain.data import EvalData, TrainData
from ardtrain.data_rows import DataError
from ardtrain.images import BadImageError, StoredImage, decode, image_of, image_settings
from tests.rows import picture_settings
from tests.tiny import equal_bits
from tests.tiny_paligemma import (
    IMAGE_ID,
    IMAGE_SIZE,
    NUM_IMAGE_TOKENS,
    image_processor,
    letter_tokenizer,
    picture,
    tiny_config,
    write_rows,
)


def open_rows(path, cache, **changes):
    data, tokenizer, reader = picture_settings(path, **changes)
    return EvalData(data, data.train_files, tokenizer, cache, grain_size=1, images=reader)


def write(path, *rows):
    path.write_text("".join(json.dumps({"prompt": "what", "completion": "it"} | row) + "\n" for row in rows))
    return path


def png(seed=0):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def test_path_uri_and_bytes_give_the_same_pixels(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(png())
    text = base64.b64encode(png()).decode()
    path = write(
        tmp_path / "rows.jsonl",
        {"image": "deep/a.png"},
        {"image": str(tmp_path / "deep" / "a.png")},
        {"image": f"data:image/png;base64,{text}"},
        {"image": {"bytes": text, "path": None}},
        {"image": {"bytes": None, "path": "deep/a.png"}},
    )
    data = open_rows(path, tmp_path / "cache")
    pixels = [data.collate(grain).pixel_values for grain in data.grains()]
    assert pixels[0].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert all(equal_bits(pixels[0], other) for other in pixels)
    assert image_of({"image": png()}, "image").data == png()  # as Parquet gives them


def test_parquet_rows_hold_bytes_or_paths(tmp_path):
    """As Hugging Face's data sets keep pictures, and as a plain column; null rows are named by their number."""
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"bytes": png(1), "path": "b.png"}, {"bytes": None, "path": "a.png"}, None]
    texts = {"prompt": ["what"] * 3, "completion": ["it"] * 3}
    pq.write_table(pa.table({"image": rows, **texts}), tmp_path / "structs.parquet")
    pq.write_table(pa.table({"image": [png(1), png(), b""], **texts}), tmp_path / "bytes.parquet")
    seen = []
    for name, message in (("structs", "field 'image' is missing"), ("bytes", "field 'image' is empty")):
        path = tmp_path / f"{name}.parquet"
        with pytest.raises(DataError, match=rf"{name}\.parquet:3: .*{message}"):
            open_rows(path, tmp_path / "cache")
        data = open_rows(path, tmp_path / "cache", on_bad_row="skip")
        seen.append([data.collate(grain).pixel_values for grain in data.grains()])
    assert len(seen[0]) == len(seen[1]) == 2
    assert all(equal_bits(one, other) for one, other in zip(*seen, strict=True))
    assert not torch.equal(*seen[0])


def test_image_columns_of_data_sets(tmp_path, monkeypatch):
    """As the datasets library keeps them: a column of its type Image in Parquet, and a folder of pictures."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    paths = [tmp_path / "set" / "train" / f"{seed}.png" for seed in range(3)]
    paths[0].parent.mkdir(parents=True)
    for seed, path in enumerate(paths):
        path.write_bytes(png(seed))
    texts = {"prompt": ["what"] * 3, "completion": ["it"] * 3}
    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths], **texts})
    table = table.cast_column("image", datasets.Image())
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train.parquet")  # the bytes go into the file
    lines = [{"file_name": path.name, "prompt": "what", "completion": "it"} for path in paths]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    for name in (f"{tmp_path / 'table' / 'train.parquet'}", f"hub:{tmp_path / 'table'}", f"hub:{tmp_path / 'set'}"):
        data = open_rows(name, tmp_path / "cache")
        seen.append([data.collate(grain).pixel_values for grain in data.grains()])
    assert [len(pixels) for pixels in seen] == [3, 3, 3]
    assert all(equal_bits(one, other) for pixels in seen[1:] for one, other in zip(seen[0], pixels, strict=True))
    assert not torch.equal(seen[0][0], seen[0][1])


def test_pixels_are_resized_and_normalised(tmp_path):
    """SigLIP's numbers by hand: bicubic to the model's size, then (x / 255 - 0.5) / 0.5."""
    path = write_rows(tmp_path, count=1)
    data = open_rows(path, tmp_path / "cache")
    ours = data.collate(data.grains()[0]).pixel_values[0]
    image = Image.open(tmp_path / "pictures" / "train0.png").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    expected = (np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 - 0.5) / 0.5
    assert np.abs(ours.numpy() - expected).max() < 1e-6


def test_grey_palette_and_alpha_become_rgb():
    for mode in ("L", "P", "RGBA", "I;16"):
        file = io.BytesIO()
        (Image.new("I;16", (3, 2)) if mode == "I;16" else picture(size=(3, 2)).convert(mode)).save(file, "PNG")
        assert decode(file.getvalue()).mode == "RGB"


def test_exif_turns_the_picture():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(size=(20, 14)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue()).size == (14, 20)


BAD = {
    "missing": ({"image": "gone.png"}, r"the picture '.*gone\.png' cannot be read \(No such file"),
    "folder": ({"image": "."}, r"cannot be read \(Is a directory"),
    "empty file": ({"image": "empty.png"}, r"empty\.png' is an empty file"),
    "no picture": ({"image": "text.png"}, r"the file 'text\.png' holds no whole picture \(cannot identify image"),
    "cut short": ({"image": "cut.png"}, r"the file 'cut\.png' holds no whole picture \(.*truncated"),
    "no field": ({}, r"field 'image' is missing"),
    "null": ({"image": None}, r"the picture in field 'image' is empty, neither a path"),
    "number": ({"image": 3}, r"the picture in field 'image' is a int, neither a path"),
    "several": ({"image": ["a.png", "b.png"]}, r"the picture in field 'image' is a list, neither a path"),
    "address": ({"image": "https://x.y/a.png"}, r"is an address; download it"),
    "base64": ({"image": {"bytes": "%%%"}}, r"the bytes in field 'image' are no base64"),
    "uri": ({"image": "data:image/png;base64,AAAA"}, r"its bytes hold no whole picture"),
    "picture token": ({"image": "a.png", "prompt": "<image>what"}, r"the text holds '<image>', which is written for"),
    "bos": ({"image": "a.png", "prompt": "<bos>what"}, r"the text holds '<bos>', which is written for you"),
    "eos": ({"image": "a.png", "completion": "it<eos>"}, r"the text holds '<eos>', which is written for you"),
    "unknown detection token": ({"image": "a.png", "completion": "<loc0001>"}, r"<loc0001>, which the tokenizer does"),
    "no answer": ({"image": "a.png", "completion": " "}, r"the completion is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_or_left_out(tmp_path, name):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(png()[:-200])
    row, message = BAD[name]
    good = {"image": "a.png"}
    path = write(tmp_path / "rows.jsonl", good, row, good)
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:2: .*{message}.*; correct the row, or leave"):
        open_rows(path, tmp_path / "cache")
    data = open_rows(path, tmp_path / "cache", on_bad_row="skip")
    assert (data.counts["rows"], data.counts["bad"], data.num_samples) == (3, 1, 2)
    assert data.sample_ids(data.grains()[1]) == [f"{path}:3"]


def test_picture_that_changed_is_told(tmp_path):
    path = write_rows(tmp_path, count=2)
    data = open_rows(path, tmp_path / "cache")
    picture("other").save(tmp_path / "pictures" / "train1.png")
    data.collate(data.grains()[0])
    with pytest.raises(RuntimeError, match=r"train\.jsonl:2: the picture 'pictures/train1.png' is another than when"):
        data.collate(data.grains()[1])
    (tmp_path / "pictures" / "train1.png").unlink()
    with pytest.raises(RuntimeError, match=r"train\.jsonl:2: the picture .* cannot be read .* put the file back, or"):
        data.collate(data.grains()[1])


def fingerprint(path, cache):
    data, tokenizer, reader = picture_settings(path)
    return TrainData(data, tokenizer, cache, global_batch_size=1, grain_size=1, max_steps=1, images=reader).fingerprint


def test_fingerprint_follows_the_pictures_not_their_place(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, count=3)
    picture("other").save(tmp_path / "three" / "pictures" / "train1.png")
    one, two, three = (fingerprint(tmp_path / n / "train.jsonl", tmp_path / "cache") for n in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_length_counts_the_picture(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"image": {"bytes": base64.b64encode(png()).decode()}})
    needed = NUM_IMAGE_TOKENS + len("<what\n") + len("it>")  # < and > stand for bos and eos
    open_rows(path, tmp_path / "cache", max_length=needed)
    with pytest.raises(DataError, match=f"the row has {needed} tokens, max_length={needed - 1}; raise max_length"):
        open_rows(path, tmp_path / "cache", max_length=needed - 1)
    cut = open_rows(path, tmp_path / "cache", max_length=needed - 1, truncation="right")
    batch = cut.collate(cut.grains()[0])
    assert batch.input_ids.shape[1] == needed - 1
    assert batch.num_target_tokens == 2


def test_detection_tokens_are_plain_tokens(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = write(tmp_path / "rows.jsonl", {"image": "a.png", "completion": "<loc0064><loc0128> cat <seg001>"})
    data = open_rows(path, tmp_path / "cache")
    batch = data.collate(data.grains()[0])
    tokenizer = letter_tokenizer()
    wanted = [tokenizer.convert_tokens_to_ids(t) for t in ("<loc0064>", "<loc0128>", *" cat ", "<seg001>", "<eos>")]
    assert batch.labels[batch.labels != -100].tolist() == wanted


def test_caption_without_prompt(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = write(tmp_path / "rows.jsonl", {"image": "a.png", "prompt": ""})
    data = open_rows(path, tmp_path / "cache")
    batch = data.collate(data.grains()[0])
    assert batch.input_ids[0, : NUM_IMAGE_TOKENS + 1].tolist() == [IMAGE_ID] * NUM_IMAGE_TOKENS + [2]
    assert int(batch.token_type_ids.argmax()) == NUM_IMAGE_TOKENS + 2  # behind bos and newline


def test_model_tokenizer_and_processor_must_agree():
    tokenizer, processor = letter_tokenizer(), image_processor()

    def check(config, *, tokenizer=tokenizer, processor=processor, max_length=64):
        return image_settings(config, tokenizer, processor, field="image", max_length=max_length)

    assert check(tiny_config()).num_tokens == NUM_IMAGE_TOKENS
    other = tiny_config()
    other.image_token_id = 9
    with pytest.raises(ValueError, match="the tokenizer's <image> is id 4, the model's image_token_id is 9; use"):
        check(other)
    with pytest.raises(ValueError, match="the image processor makes pictures of .* the model takes 16 x 16; use"):
        check(tiny_config(), processor=type(processor)(size={"height": 32, "width": 32}))
    with pytest.raises(
        ValueError, match="max_length=18 leaves no room for text beside 16 tokens of the picture; raise"
    ):
        check(tiny_config(), max_length=18)
    with pytest.raises(ValueError, match="model_type='gemma2' is not built"):
        check(tiny_config().text_config)


def test_reader_refuses_what_is_not_the_rows_picture(tmp_path):
    _, _, reader = picture_settings(tmp_path)
    with pytest.raises(BadImageError, match="is another than when the rows were read"):
        reader.pixels([StoredImage(data=png(), digest="0")], [""])
    assert torch.isfinite(reader.processor(images=[picture()], return_tensors="pt")["pixel_values"]).all()
