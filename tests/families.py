"""The model families that users bring: a tiny random model of each real class, rows for it, and a trainer over it.

All of it is a function of its arguments, as in tests/tiny.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as hf

from ardtrain.ablation import AblationScorer
from ardtrain.adapters import bind_arena
from ardtrain.backbones import auto_class, enable_checkpointing, set_padding, tower_config
from ardtrain.data import build_batch
from ardtrain.evaluation import loss_sum, model_inputs
from ardtrain.export import peft_config
from ardtrain.heads import Heads, find_heads
from ardtrain.logits import find_logit_head
from ardtrain.methods.adalora import AdaLora, AdaLoraSettings
from ardtrain.methods.alora import Alora, AloraSettings
from ardtrain.methods.dora import Dora
from ardtrain.methods.lora import Lora
from ardtrain.prefix_mask import token_types
from ardtrain.ranks import named_seed
from tests.tiny import CPU, TokenBatches, ard_lora, elalora, probe_lora, tiny_trainer
from tests.tiny_paligemma import IMAGE_ID, IMAGE_SIZE, NUM_IMAGE_TOKENS, tiny_config

VOCAB = 96
NUM_CLASSES = 3
STEPS = 14
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 66,
}  # fmt: skip
GEMMA = DECODER | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BERT_LAYER = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
SIGLIP = (
    *(f"vision_tower.encoder.layers.0.{n}" for n in (*ATTENTION[:3], "self_attn.out_proj", "mlp.fc1", "mlp.fc2")),
    "multi_modal_projector.linear",
)
Q, KV, OUT = Heads(4, "out"), Heads(2, "out"), Heads(4, "in")
DECODER_HEADS = dict(zip(ATTENTION, (Q, KV, KV, OUT), strict=True))
BERT_HEADS = dict.fromkeys(BERT_LAYER[:3], Q) | {"attention.output.dense": OUT}


@dataclass(frozen=True)
class Family:
    """A family and what must hold for it.

    kind: of its rows: text, classes (one text of a pair, or a pair) or pictures.
    stack, layer: path of its two layers, and within one the paths of linears with an adapter by all-linear; others:
    paths of the rest that have one. head: trained in full. left_out: topmost modules with linears that never run.
    heads: path within a layer -> how ARD-LoRA cuts it. pad: token. typed: are the texts of a pair told apart by types?
    """

    name: str
    config: Callable[[], Any]
    kind: str
    stack: str
    layer: tuple[str, ...]
    heads: Mapping[str, Heads]
    others: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    pad: int = 0
    typed: bool = False

    @property
    def sites(self):
        """Paths of all linears with an adapter."""
        return {f"{self.stack}.{i}.{name}" for i in range(2) for name in self.layer} | set(self.others)

    @property
    def num_labels(self):
        return NUM_CLASSES if self.kind == "classes" else None


def _decoder(name, config, **more):
    more = {"stack": "model.layers", "layer": (*ATTENTION, *MLP), "heads": DECODER_HEADS} | more
    return Family(name, config, "text", **more)


def _encoder(name, config, **more):
    more = {"layer": BERT_LAYER, "heads": BERT_HEADS, "head": ("pooler.dense", "classifier"), "typed": True} | more
    return Family(name, config, "classes", f"{name.lower().removesuffix('-v2')}.encoder.layer", **more)


FAMILIES = {
    f.name: f
    for f in (
        _decoder("Llama", lambda: hf.LlamaConfig(**DECODER)),
        _decoder("Mistral", lambda: hf.MistralConfig(**DECODER, sliding_window=8)),
        _decoder("Qwen2", lambda: hf.Qwen2Config(**DECODER)),
        _decoder("Qwen3", lambda: hf.Qwen3Config(**DECODER, head_dim=8)),
        _decoder("Gemma-2", lambda: hf.Gemma2Config(**GEMMA, **LAYERS)),
        _decoder("Gemma-3 (text)", lambda: hf.Gemma3TextConfig(**GEMMA, **LAYERS)),
        _decoder(
            "Gemma-3 with a vision tower, on text",
            lambda: hf.Gemma3Config(
                text_config=hf.Gemma3TextConfig(**GEMMA, **LAYERS).to_dict(), vision_config=VISION,
                mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
            ),
            stack="model.language_model.layers",
            left_out=("model.vision_tower",),
        ),
        _decoder(
            "Phi-3",
            lambda: hf.Phi3Config(**DECODER),
            layer=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
            heads={"self_attn.qkv_proj": Heads(8, "out"), "self_attn.o_proj": OUT},
        ),
        _decoder("Mixtral", lambda: hf.MixtralConfig(**DECODER, num_local_experts=4), layer=ATTENTION),
        Family(
            "PaliGemma-2",
            lambda: tiny_config(layers=2, vision_layers=1, vocab=VOCAB),
            "pictures",
            stack="model.language_model.layers",
            layer=(*ATTENTION, *MLP),
            heads=DECODER_HEADS,
            others=tuple(f"model.{name}" for name in SIGLIP),
            left_out=("model.vision_tower.head",),
        ),
        _encoder("BERT", lambda: hf.BertConfig(**ENCODER), others=("bert.pooler.dense",), head=("classifier",)),
        _encoder(
            "RoBERTa",
            lambda: hf.RobertaConfig(**ENCODER, pad_token_id=1, type_vocab_size=1),
            head=("classifier.dense", "classifier.out_proj"),
            pad=1,
            typed=False,
        ),
        _encoder(
            "DeBERTa",
            lambda: hf.DebertaConfig(**ENCODER, **DEBERTA, type_vocab_size=2),
            layer=("attention.self.in_proj", "attention.self.pos_proj", "attention.self.pos_q_proj", *BERT_LAYER[3:]),
            heads={"attention.self.in_proj": Q, "attention.output.dense": OUT},
        ),
        _encoder(
            "DeBERTa-v2",
            lambda: hf.DebertaV2Config(
                **ENCODER, **DEBERTA, share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm",
                type_vocab_size=2,
            ),
            layer=(*(f"attention.self.{n}_proj" for n in ("query", "key", "value")), *BERT_LAYER[3:]),
            heads={f"attention.self.{n}_proj": Q for n in ("query", "key", "value")} | {"attention.output.dense": OUT},
        ),
    )
}  # fmt: skip


def as_classifier(family):
    """A decoder's family with `score` in the place of its output embedding."""
    return replace(family, name=f"{family.name}, classes", kind="classes", head=("score",))


def build_model(family, *, dtype=torch.float32):
    """A frozen random model of the family's real class, in eval mode; logits of size 1 or so."""
    config = family.config()
    if family.num_labels is not None:
        config.num_labels = family.num_labels
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        model = auto_class(config, family.num_labels).from_config(config)
    tied = config.get_text_config().tie_word_embeddings
    generator = torch.Generator().manual_seed(named_seed("family", family.name))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            values = torch.empty(parameter.shape).uniform_(0.8, 1.2, generator=generator)
            values = values - 1.0 if name.endswith("bias") else values
        else:
            std = (parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]) ** -0.5
            if "embed" in name:
                std = 0.05 if tied and parameter is model.get_input_embeddings().weight else 0.5
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        parameter.data = values.to(dtype)
    if family.num_labels is not None:
        set_padding(model, family.pad)
    config.dtype = dtype
    return model.requires_grad_(False).eval()


class PairBatches(TokenBatches):
    """Rows of two texts with a class, as the data layer makes them of BERT's kind of tokenizer."""

    def __init__(self, family, **more):
        super().__init__(vocab=VOCAB, **more)
        self.family = family

    def collate(self, grain):
        numbers = np.random.default_rng(named_seed("pairs", self.seed, *grain))
        rows, types = [], []
        for _ in range(self.rows):
            lengths = numbers.integers(3, self.length // 2, size=2)
            ids = numbers.integers(4, VOCAB, size=int(lengths.sum())).astype(np.int32)
            rows.append([(ids, np.zeros(len(ids), dtype=np.bool_))])
            types.append(np.repeat([0, 1], lengths))
        labels = numbers.integers(NUM_CLASSES, size=self.rows).tolist()
        return build_batch(
            rows, packed=False, pad_token_id=self.family.pad, class_labels=labels,
            token_type_ids=types if self.family.typed else None,
        )  # fmt: skip


class PictureBatches(TokenBatches):
    """Rows of a picture, a prompt and an answer, as the data layer makes them for PaliGemma."""

    def __init__(self, **more):
        super().__init__(vocab=VOCAB, **more)

    def collate(self, grain):
        numbers = np.random.default_rng(named_seed("pictures", self.seed, *grain))
        rows = []
        for _ in range(self.rows):
            ids = numbers.integers(5, VOCAB, size=int(numbers.integers(6, 12))).astype(np.int32)
            whole = np.concatenate([np.full(NUM_IMAGE_TOKENS, IMAGE_ID, dtype=np.int32), ids])
            rows.append([(whole, np.arange(len(whole)) >= NUM_IMAGE_TOKENS + 3)])
        batch = build_batch(rows, packed=False, pad_token_id=0)
        types = token_types([int(row[0][1].argmax()) for row in rows], batch.input_ids.shape[1])
        pixels = torch.from_numpy(numbers.uniform(-1, 1, size=(self.rows, 3, IMAGE_SIZE, IMAGE_SIZE)))
        return replace(batch, position_ids=batch.position_ids + 1, token_type_ids=types, pixel_values=pixels.float())


class HeldOut:
    """Some grains of other rows."""

    def __init__(self, batches):
        self.batches = batches

    def grains(self):
        return self.batches.grains(-1)

    def collate(self, grain):
        return self.batches.collate(grain)


def batches(family, *, num_grains=3, seed=0):
    """Rows of the family's kind."""
    if family.kind == "classes":
        return PairBatches(family, num_grains=num_grains, seed=seed)
    if family.kind == "pictures":
        return PictureBatches(num_grains=num_grains, seed=seed)
    return TokenBatches(vocab=VOCAB, num_grains=num_grains, seed=seed)


def inputs_of(family):
    """What the model's forward takes for one grain of held-out rows, padding among them."""
    batch = batches(family, seed=5).collate((0, 0))
    inputs = model_inputs(batch, device=CPU)
    if family.kind == "classes":
        del inputs["position_ids"]
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
    return inputs


ADALORA = AdaLoraSettings(
    total_steps=STEPS, target_r=2, tinit=1, tfinal=4, deltaT=2, beta1=0.85, beta2=0.85, orth_reg_weight=0.5,
    reg_orth_form="mean_norm", compact="end",
)  # fmt: skip
ALORA = AloraSettings(total_steps=STEPS, k1=3, k2=3, rounds=2, n_a=6, prune_only_harmful=False, revive=False)
METHODS = {
    "lora": {"method": lambda: Lora()},
    "dora": {"method": lambda: Dora(), "form": "dora"},
    "adalora": {"method": lambda: AdaLora(ADALORA)},
    "elalora": {
        "method": lambda: elalora(
            total_steps=STEPS, init_warmup=1, final_warmup=3, mask_interval=2, b=8, k=3, allow_swap=True
        ),
    },
    "alora": {"method": lambda: Alora(ALORA), "r": 1},
    "probe_lora": {
        "method": lambda: probe_lora(
            total_steps=STEPS, init_warmup=1, final_warmup=3, mask_interval=3, probe_steps=2, b=8
        ),
    },
    "ard_lora, own_a": {"method": lambda: _ard(), "form": "own_a", "r": 2},
    "ard_lora, shared_a": {"method": lambda: _ard(), "form": "shared_a", "r": 2},
}


def _ard():
    return ard_lora(
        total_steps=STEPS, init_warmup=1, final_warmup=3, resize_interval=2, alpha_interval=1, lr_alpha=0.4,
        target_r=1.5,
    )  # fmt: skip


def family_trainer(family, method, *, num_grains=3, gradient_checkpointing=False, **more):
    """A trainer over the family's model, by the method's name, ready to step; more: of tiny_trainer."""
    settings, model = dict(METHODS[method]), build_model(family)
    if gradient_checkpointing:
        enable_checkpointing(model, offload=False, device=CPU)
    trainer = tiny_trainer(
        settings.pop("method")(),
        model=model,
        data=batches(family, num_grains=num_grains),
        total_steps=STEPS,
        **({"r": 3, "learning_rate": 1e-2} | settings | more),
    )
    if family.kind != "classes":
        head = find_logit_head(trainer.backbone.module, chunk_tokens=16, device=trainer.world.device)
        assert not isinstance(head, str), head
        trainer.backbone.release()
        trainer.loss_sum = partial(loss_sum, logit_head=head)
    trainer.eval_data = HeldOut(batches(family, num_grains=3, seed=1))
    if trainer.method.needs.ablation:
        trainer.allocation_data = HeldOut(batches(family, num_grains=2, seed=2))
        trainer.ablation = AblationScorer(
            trainer.backbone.module,
            trainer.adapters,
            trainer.allocation_data,
            world=trainer.world,
            release=trainer.backbone.release,
            between=trainer.between,
        )
    return trainer


def heads_of(family, model, sites):
    """How ARD-LoRA cuts the matrices; model: on the meta device or not."""
    return find_heads(sites, {site.tower: tower_config(model, site.tower) for site in sites})


def trained_logits(trainer, inputs):
    """The logits with the numbers as they are, and the gates that are in them."""
    gates, model = trainer.method.gates(trainer.state.step), trainer.backbone.module.eval()
    bind_arena(trainer.adapters, trainer.arena.layout, trainer.arena.engine.weights, gates)
    with torch.no_grad():
        logits = model(**inputs).logits
    model.train()
    return logits, gates


def adapter_json(family, trainer):
    """adapter_config.json of the trainer's adapter."""
    task = "SEQ_CLS" if family.kind == "classes" else "CAUSAL_LM"
    return peft_config(trainer.arena.layout, base_model="tiny", revision=None, lora_dropout=0.0, task_type=task)
