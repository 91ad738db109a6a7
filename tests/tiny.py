"""Small things that tests share: a random Llama, its tokenizer, token batches, a one-process world, a whole trainer.

All of it is a function of its arguments: no global random numbers are used or changed, nothing is downloaded.
"""

import functools
import hashlib
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ardtrain.adapters import attach, first_dense
from ardtrain.backbones import quantize_base, tower_config
from ardtrain.collectives import World
from ardtrain.data import build_batch
from ardtrain.dense import attach_dense, dense_entries
from ardtrain.engines import AdamSettings, BackboneEngine, start_deepspeed
from ardtrain.heads import find_heads, split_heads
from ardtrain.methods.ard_lora import ArdLora, ArdLoraSettings
from ardtrain.methods.base import FixedRank
from ardtrain.methods.elalora import ElaLora, ElaLoraSettings
from ardtrain.methods.probe_lora import ProbeLora, ProbeLoraSettings
from ardtrain.ranks import RankTable, Site, named_seed
from ardtrain.resize import LiveArena
from ardtrain.targets import find_sites, head_linears, tower_modules
from ardtrain.trainer import LoopSettings, Trainer

CPU = torch.device("cpu")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
LETTERS = "\n" + "".join(chr(code) for code in range(32, 127))


def tiny_llama(seed=0, *, layers=2, hidden=32, heads=4, kv_heads=2, mlp=64, vocab=128, tied=False, dtype=torch.float32):
    """A frozen random Llama; the same weights for the same arguments, rounded once to `dtype`."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(named_seed("tiny_llama", seed))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 1.0 if name.endswith("embed_tokens.weight") else parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        else:
            values = torch.empty(parameter.shape).uniform_(0.8, 1.2, generator=generator)
        parameter.data = values.to(dtype)
    model.config.dtype = dtype
    return model.requires_grad_(False)


def save_tiny_llama(folder, seed=0, **shape):
    """Writes a tiny Llama (safetensors) and a tokenizer of single letters, which AutoTokenizer loads."""
    folder = Path(folder)
    tiny_llama(seed, **shape).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    unk, bos, eos, pad = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    ).save_pretrained(folder)
    return folder


class TokenBatches:
    """In-memory stand-in for data.TrainData: grains of random tokens, rows of unlike lengths, padded or packed.

    A grain is (step, number), and its tensors depend on it and the seed alone. The first third of each document is a
    prompt without loss.
    """

    def __init__(self, seed=0, *, num_grains=4, rows=2, length=24, vocab=128, packed=False):
        self.seed, self.num_grains, self.rows = seed, num_grains, rows
        self.length, self.vocab, self.packed = length, vocab, packed

    def grains(self, step):
        return [(step, index) for index in range(self.num_grains)]

    def collate(self, grain):
        numbers = np.random.default_rng(named_seed("tokens", self.seed, *grain))
        rows = [self._row(numbers) for _ in range(self.rows)]
        return build_batch(rows, packed=self.packed, pad_token_id=0)

    def sample_ids(self, grain):
        return [f"tiny:{grain[0]}.{grain[1]}.{row}" for row in range(self.rows)]

    def _row(self, numbers):
        lengths, left = [], int(numbers.integers(self.length // 2, self.length + 1))
        while self.packed and left > self.length // 4:
            lengths.append(int(numbers.integers(3, max(4, left // 2))))
            left -= lengths[-1]
        row = []
        for length in lengths or [left]:
            ids = numbers.integers(4, self.vocab, size=length).astype(np.int32)
            row.append((ids, np.arange(length) >= length // 3))
        return row


class HeldOutBatches(TokenBatches):
    """In-memory stand-in for data.EvalData."""

    def grains(self):
        return super().grains(-1)


@functools.cache
def single_world():
    """The World of this process alone on a free port, with DeepSpeed started; the same one for every caller.

    The environment is left as it was. DeepSpeed wants LOCAL_RANK while an engine is made: unit tests take the `world`
    fixture, others set it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        world = World.join(global_rank=0, world_size=1, device=CPU, timeout_seconds=60.0)
        start_deepspeed(CPU)
    finally:  # other tests start processes that inherit the environment
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    return world


def adapter_config(*, stage=1, offload=False, world_size=1):
    """The adapter engine's DeepSpeed config, as deepspeed_config.split_deepspeed makes it."""
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
    config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def backbone_config(*, stage=0, dtype=torch.float32, world_size=1, **zero):
    """The backbone engine's DeepSpeed config; every weight is sharded, however small."""
    config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    return config


ELALORA = ElaLoraSettings(
    total_steps=60,
    b=4,
    k=2,
    init_warmup=5,
    final_warmup=10,
    mask_interval=4,
    enable_scheduler=True,
    beta1=0.85,
    beta2=0.85,
    reg_orth_coef=0.1,
    reg_orth_form="mean_norm",
    allow_swap=True,
    newborn_immunity=True,
    newborn_norm="mean",
)


def elalora(**changes):
    """ElaLoRA with an event every 4 steps from step 9 to 45 of 60."""
    return ElaLora(replace(ELALORA, **changes))


ARD = ArdLoraSettings(
    total_steps=60,
    init_warmup=4,
    final_warmup=12,
    tie="none",
    mask="ramp",
    ramp_width=1.0,
    sigmoid_tau=(1.0, 0.1),
    lr_alpha=0.2,
    alpha_scale="rms",
    alpha_interval=2,
    resize_interval=4,
    meta_interval=0,
    l1=0.0,
    l1_max=10.0,
    tv_form="temporal",
    beta=0.25,
    target_r=2.0,
    controller_rate=0.5,
    budget_in="components",
    r_max=None,
    capacities=None,
)


def ard_lora(**changes):
    """A maker of ARD-LoRA for `tiny_trainer`: alphas learn from step 4 to 47 of 60."""
    return lambda table, shared: ArdLora(replace(ARD, **changes), table, shared)


PROBE = ProbeLoraSettings(
    total_steps=60,
    b=4,
    init_warmup=4,
    final_warmup=10,
    mask_interval=6,
    enable_scheduler=False,
    probes="ride",
    probe_components=2,
    probe_steps=3,
    prune_by="gate",
    budget_in="components",
    newborn_immunity=True,
    beta=0.85,
)


def probe_lora(**changes):
    """A maker of probe growth for `tiny_trainer`: events from step 10 on, every 6."""
    return lambda table, shared: ProbeLora(replace(PROBE, **changes), table)


LOOP = LoopSettings(
    seed=7,
    total_steps=60,
    learning_rate=5e-3,
    lr_scheduler_type="linear",
    warmup_steps=5,
    max_grad_norm=1.0,
    max_skipped_steps=0,
    score_at="after_step",
    compute_dtype=torch.float32,
    eval_steps=None,
    eval_on_start=False,
    save_steps=None,
    lora_plus_ratio=1.0,
)


def tiny_trainer(
    method,
    *,
    world=None,
    model=None,
    data=None,
    r=4,
    lora_alpha=8.0,
    target_modules="all-linear",
    dropout=0.0,
    form="plain",
    mlp_heads=1,
    quantization=None,
    backbone=None,
    adapter=None,
    adam=None,
    start=True,
    full_towers=(),
    **loop,
):
    """A trainer over a tiny Llama, or another model, ready to step; a classification head is trained in full, and so
    are full_towers.

    Args:
        backbone, adapter: DeepSpeed configs (default: both as simple as can be); loop: changes of `LOOP`.
        quantization: of the base's linears.
        method: a method, or a function that makes one of (table, heads that share components).
        form: of the adapters; own_a and shared_a cut the attention matrices by head.
        start: False leaves the arena unbuilt, for a checkpoint to fill.
    """
    world = world or single_world()
    model = tiny_llama() if model is None else model
    backbone = backbone or backbone_config(world_size=world.world_size)
    adapter = adapter or adapter_config(world_size=world.world_size)
    settings = replace(LOOP, **loop)
    sites, ranks = find_sites(
        model,
        target_modules=target_modules,
        exclude_modules=None,
        r=r,
        lora_alpha=lora_alpha,
        tower_settings={},
        frozen_towers=full_towers,
    )
    towers = {site.tower: tower_config(model, site.tower) for site in sites}
    heads = find_heads(sites, towers, mlp_heads=mlp_heads) if form.endswith("_a") else {}
    shared = {m: (h.count, "lora_B" if h.side == "out" else "lora_A") for m, h in heads.items()}
    if form == "own_a":
        sites, ranks = split_heads(sites, ranks, heads)
    table = RankTable.start(sites, ranks)
    if not isinstance(method, FixedRank):
        method = method(table, shared if form == "shared_a" else {})
    if quantization is not None:
        offload = backbone["zero_optimization"].get("offload_param", {})
        quantize_base(model, quantization, carried=offload.get("device") == "nvme")
    adapters = attach(model, sites, dropout=dict.fromkeys(towers, dropout), form=form, heads=heads)
    in_full = head_linears(model)
    for tower in full_towers:
        in_full |= tower_modules(model, tower)
    dense = (*method.dense(sites), *dense_entries(in_full))
    adapters |= attach_dense(model, list(in_full))
    first = first_dense(adapters)
    engine = BackboneEngine(model, stage=backbone["zero_optimization"]["stage"], config=backbone, device=world.device)
    arena = LiveArena(
        method,
        world=world,
        engine_config=adapter,
        adam=adam or AdamSettings(),
        seed=settings.seed,
        dense=dense,
    )
    if start:
        arena.start(table, first)
    model.train()
    trainer = Trainer(settings, world, engine, adapters, arena, method, data or TokenBatches())
    trainer.first_table = table
    return trainer


def sites_of_model(model, target_modules="all-linear", *, r=4, lora_alpha=8.0, **others):
    """(sites, first ranks) of a model, as find_sites gives them for these settings."""
    settings = {"exclude_modules": None, "tower_settings": {}, **others}
    return find_sites(model, target_modules=target_modules, r=r, lora_alpha=lora_alpha, **settings)


def sites_of(*shapes):
    """Sites named s0, s1, ... of (in, out) shapes, all with scaling 2."""
    return [Site(f"s{i}", f"s{i}", inputs, outputs, scaling=2.0) for i, (inputs, outputs) in enumerate(shapes)]


def equal_bits(a, b):
    """Are two tensors alike in dtype, shape and every bit? (-0.0 is not 0.0, a NaN equals itself.)"""
    return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)


def _bytes(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_plan(table, generator):
    """A valid plan that prunes, grows, reorders and empties sites at random, as `apply` allows."""
    from ardtrain.ranks import RankPlan, SiteChange

    changes = {}
    for index, (site, rank) in enumerate(zip(table.sites, table.ranks, strict=True)):
        if generator.random() < 0.3:
            continue
        kept = generator.permutation(rank)[: generator.integers(0, rank + 1)].tolist()
        born = int(generator.integers(0, min(3, site.max_rank - len(kept)) + 1))
        changes[index] = SiteChange(tuple(kept), born)
    return RankPlan(table.digest, changes)


def weights_digest(snapshot, table_digest=None):
    """sha256 over table, master, moments and per-entry arrays of a snapshot; -0.0 counts as 0.0."""
    digest = hashlib.sha256((table_digest or snapshot.table.digest).encode())
    for tensor in (snapshot.full.master, snapshot.full.exp_avg, snapshot.full.exp_avg_sq, *snapshot.entries.values()):
        digest.update((tensor + 0.0).numpy().tobytes())
    return digest.hexdigest()
