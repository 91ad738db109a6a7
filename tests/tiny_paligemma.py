"""A random PaliGemma-2 of the real classes (SigLIP, Gemma-2), its tokenizer of single letters, pictures and rows."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from ardtrain.ranks import named_seed
from tests.tiny import LETTERS

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")  # ids 0 to 4; Gemma's order
PLAIN = tuple(f"<loc{i:04d}>" for i in range(0, 1024, 64)) + ("<seg000>", "<seg001>")
IMAGE_ID = 4
IMAGE_SIZE, PATCH = 16, 4
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
WINDOW = 8
VOCAB = 128


def tiny_config(*, hidden=32, layers=4, vision_layers=2, window=WINDOW, pooling_head=True, vocab=VOCAB):
    """PaliGemma-2's config in small: soft caps, alternating windows, tied embeddings, SigLIP's unused pooling head."""
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            vision_use_head=pooling_head,
        ).to_dict(),
        text_config=Gemma2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden // 4,
            query_pre_attn_scalar=hidden // 4,
            sliding_window=window,
            final_logit_softcapping=30.0,
            attn_logit_softcapping=50.0,
            max_position_embeddings=256,
            use_cache=False,
        ).to_dict(),
        image_token_index=IMAGE_ID,
        vocab_size=vocab,
        projection_dim=hidden,
        hidden_size=hidden,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def tiny_paligemma(seed=0, *, dtype=torch.float32, **shape):
    """A frozen random PaliGemma-2; the same weights for the same arguments, rounded once to `dtype`."""
    with torch.random.fork_rng(devices=[]):
        model = PaliGemmaForConditionalGeneration(tiny_config(**shape))
    generator = torch.Generator().manual_seed(named_seed("tiny_paligemma", seed))
    for name, parameter in model.named_parameters():
        std = 0.1 if parameter.dim() < 2 or "embed" in name else parameter[0].numel() ** -0.5
        parameter.data = torch.empty(parameter.shape).normal_(0.0, std, generator=generator).to(dtype)
    model.config.dtype = dtype
    return model.requires_grad_(False)


def letter_tokenizer():
    """Single letters behind Gemma's special tokens; detection tokens are plain tokens."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, eos, bos, unk, image = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad,
        extra_special_tokens={"image_token": image},
    )  # fmt: skip
    fast.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return fast


def image_processor():
    """SigLIP's, for the tiny model's size, on Pillow."""
    processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor.image_seq_length = NUM_IMAGE_TOKENS
    return processor


def save_tiny_paligemma(folder, seed=0, **shape):
    """Writes model, tokenizer and image processor as a hub folder has them."""
    folder = Path(folder)
    tiny_paligemma(seed, **shape).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def picture(seed=0, size=(20, 14)):
    """A random RGB picture."""
    numbers = np.random.default_rng(named_seed("picture", seed))
    return Image.fromarray(numbers.integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8))


def write_rows(folder, name="train", count=12, seed=0):
    """`count` rows and their pictures (PNG, in `pictures/`) in FOLDER/NAME.jsonl; returns the path."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        path = f"pictures/{name}{index}.png"
        picture((seed, name, index)).save(folder / path)
        rows.append(
            {"image": path, "prompt": f"is {index} odd?"[: 5 + index % 7], "completion": "odd" if index % 2 else "even"}
        )
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
