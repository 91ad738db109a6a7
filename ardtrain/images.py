"""Pictures of rows: where they are, are they whole, and their pixels as the model's own image processor makes them.

A row holds a path (relative to its data file), a data URI, or {"bytes": ...} (base64 in JSONL). Pictures are decoded by
Pillow and processed by transformers' Pillow backend, whatever else is installed, so no machine gives other pixels.
Rows are tokenised once and cached; pixels are made when a grain is collated.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ardtrain.reasons import first_line

IMAGE_TOKEN = "<image>"
PLAIN_TOKENS = re.compile(r"<loc\d{4}>|<seg\d{3}>")  # of detection and segmentation answers
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_THREADS = 8  # that check pictures; Pillow decodes without Python's lock
# How a picture becomes pixels; what else a processor's settings hold (names, versions) changes none.
_PIXEL_SETTINGS = (
    "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize", "do_center_crop",
    "do_rescale", "do_normalize", "do_pad", "pad_size",
)  # fmt: skip


class BadImageError(Exception):
    """Why a row's picture cannot be used."""


class StoredImage(NamedTuple):
    """A row's picture as it was found: a path as the row writes it, or its bytes; and sha256 (hex) of the bytes."""

    path: str = ""
    data: bytes = b""
    digest: str = ""


@dataclass(frozen=True)
class ImageSettings:
    """What decides tokens and pixels of a row's picture.

    field: of the row. token_id: stands for a patch. num_tokens: patches of a picture. pixels: the processor's settings.
    """

    field: str
    token_id: int
    num_tokens: int
    pixels: str


class ImageReader:
    """Pictures -> pixels [3, height, width], by the model's image processor.

    Args:
        processor: transformers' image processor, Pillow backend.
    """

    def __init__(self, processor: Any, settings: ImageSettings) -> None:
        self.processor, self.settings = processor, settings

    def pixels(self, images: Sequence[StoredImage], folders: Sequence[str]) -> Tensor:
        """[B, 3, height, width] float32; each picture's numbers depend on it alone.

        folders: of each row's data file.

        Raises:
            BadImageError: a file is gone, or is another than when the rows were read.
        """
        return torch.stack([self._pixels(image, folder) for image, folder in zip(images, folders, strict=True)])

    def _pixels(self, image: StoredImage, folder: str) -> Tensor:
        data = image.data or _read(image.path, folder)
        if hashlib.sha256(data).hexdigest() != image.digest:
            raise BadImageError(f"the picture {image.path!r} is another than when the rows were read")
        values: Tensor = self.processor(images=[decode(data, image.path)], return_tensors="pt")["pixel_values"][0]
        return values.float()


def image_settings(
    model_config: Any, tokenizer: PreTrainedTokenizerBase, processor: Any, *, field: str, max_length: int
) -> ImageSettings:
    """What rows need to know of the model's pictures; model, tokenizer and processor must agree.

    Args:
        model_config: transformers' config of the model.
    Raises:
        ValueError: the model is no PaliGemma, or the three do not belong together.
    """
    if model_config.model_type != "paligemma":
        raise ValueError(
            f"task=image_text_to_text: model_type={model_config.model_type!r} is not built; use a PaliGemma or "
            "PaliGemma-2"
        )
    vision = model_config.vision_config
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token_id != model_config.image_token_id:
        raise ValueError(
            f"the tokenizer's {IMAGE_TOKEN} is id {token_id}, the model's image_token_id is "
            f"{model_config.image_token_id}; use the model's own tokenizer"
        )
    size = processor.size
    if (size.get("height"), size.get("width")) != (vision.image_size, vision.image_size):
        raise ValueError(
            f"the image processor makes pictures of {dict(size)}, the model takes {vision.image_size} x "
            f"{vision.image_size}; use the model's own preprocessor_config.json"
        )
    num_tokens = (vision.image_size // vision.patch_size) ** 2
    if num_tokens + 4 > max_length:  # bos, prompt's newline, one token of the answer, eos
        raise ValueError(
            f"max_length={max_length} leaves no room for text beside {num_tokens} tokens of the picture; raise it to "
            f"{num_tokens} and the longest text"
        )
    known = processor.to_dict()
    pixels = {name: known[name] for name in _PIXEL_SETTINGS if known.get(name) is not None}
    return ImageSettings(field, int(token_id), num_tokens, json.dumps(pixels, sort_keys=True, default=str))


def text_problem(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a row's texts cannot stand beside a picture; "" where they can.

    We write the picture's tokens, the one bos and the last eos ourselves. Detection tokens must be tokens.
    """
    for text in (prompt, completion):
        for token in (IMAGE_TOKEN, tokenizer.bos_token, tokenizer.eos_token):
            if token is not None and token in text:
                return f"the text holds {token!r}, which is written for you"
        found = PLAIN_TOKENS.search(text)
        if found and tokenizer.convert_tokens_to_ids(found[0]) in (None, tokenizer.unk_token_id):
            return f"the text holds {found[0]}, which the tokenizer does not know: it is not PaliGemma's own"
    return ""


def check_images(found: Sequence[StoredImage | BadImageError], folder: str) -> list[StoredImage | BadImageError]:
    """Decodes each picture once, several at a time; gives it with its digest, or why it cannot be used.

    folder: of the data file.
    """

    def check(image: StoredImage | BadImageError) -> StoredImage | BadImageError:
        if isinstance(image, BadImageError):
            return image
        try:
            data = image.data or _read(image.path, folder)
            decode(data, image.path)
        except BadImageError as reason:
            return reason
        return image._replace(digest=hashlib.sha256(data).hexdigest())

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(check, found))


def image_of(row: Mapping[str, Any], field: str) -> StoredImage:
    """The row's picture, not yet read.

    Raises:
        BadImageError: the field is missing or holds no picture.
    """
    if field not in row:
        raise BadImageError(f"field {field!r} is missing")
    value = row[field]
    if isinstance(value, Mapping):  # as Hugging Face's data sets keep pictures
        data, path = value.get("bytes"), value.get("path")
        value = data if data is not None else path
        if isinstance(data, str):
            return StoredImage(data=_unbase64(data, field))
    if isinstance(value, bytes) and value:
        return StoredImage(data=value)
    if not isinstance(value, str) or not value:
        kind = "empty" if value in ("", b"", None) else f"a {type(value).__name__}"
        raise BadImageError(f"the picture in field {field!r} is {kind}, neither a path, a data URI nor bytes")
    uri = _DATA_URI.match(value)
    if uri:
        return StoredImage(data=_unbase64(value[uri.end() :], field))
    if value.startswith(("http://", "https://")):
        raise BadImageError(f"the picture {value!r} is an address; download it and write its path")
    return StoredImage(path=value)


def decode(data: bytes, path: str = "") -> Image.Image:
    """The picture, upright (EXIF) and RGB; of an animation the first frame. path: for the message, "" for bytes.

    Raises:
        BadImageError: the bytes are no whole picture that Pillow knows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"the file {path!r} holds" if path else "its bytes hold"
        raise BadImageError(f"{what} no whole picture ({first_line(error)})") from error


def _read(path: str, folder: str) -> bytes:
    whole = os.path.join(folder, path)
    try:
        with open(whole, "rb") as file:
            data = file.read()
    except OSError as error:
        raise BadImageError(f"the picture {whole!r} cannot be read ({error.strerror or error})") from error
    if not data:
        raise BadImageError(f"the picture {whole!r} is an empty file")
    return data


def _unbase64(text: str, field: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImageError(f"the bytes in field {field!r} are no base64 ({error})") from error
    if not data:
        raise BadImageError(f"the bytes in field {field!r} are empty")
    return data
