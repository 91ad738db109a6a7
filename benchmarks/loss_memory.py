"""Peak memory and time of the loss: logits in chunks beside the logits of all tokens, vocabulary of 131,072.

python -m benchmarks.loss_memory [--tokens 512] [--chunks 32 64] [--out FILE]

One grain's loss and gradient through a small random Llama (hidden 256, one layer, adapters of rank 8) in float32, so
that nearly all memory is that of the logits. Memory: bytes of live tensors that the forward and backward make
(common.LiveBytes); it does not hang on the machine, and grows with tokens (whole) or chunk (chunked) and vocabulary.
Time: the ways take turns; of the whole step of this model, in which the vocabulary's GEMMs are nearly everything.
"""

from functools import partial

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from ardtrain.adapters import attach, bind_arena
from ardtrain.arena import ArenaLayout
from ardtrain.data import build_batch
from ardtrain.evaluation import token_loss_sum
from ardtrain.logits import find_logit_head
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable
from ardtrain.targets import find_sites
from benchmarks.common import LiveBytes, described, machine, parser, summary, timed, write

VOCAB = 131072
CPU = torch.device("cpu")


def setup():
    """(model, leaf) with adapters bound."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=688, num_hidden_layers=1, num_attention_heads=8,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    sites, ranks = find_sites(
        model, target_modules="all-linear", exclude_modules=None, r=8, lora_alpha=16.0, tower_settings={}
    )
    adapters, layout = attach(model, sites, dropout={}), ArenaLayout(RankTable.start(sites, ranks), Lora().entries)
    leaf = torch.randn(layout.size).mul_(0.02).requires_grad_()
    bind_arena(adapters, layout, leaf)
    return model, leaf


def grain(tokens, *, prompt):
    """One row of random tokens, the first `prompt` of them without loss."""
    ids = np.random.default_rng(0).integers(0, VOCAB, size=tokens + 1)
    return build_batch([[(ids, np.arange(tokens + 1) >= prompt)]], packed=False, pad_token_id=0)


def main():
    """Measures every way on a grain whose tokens are all targets, and memory where half of them are."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=512)
    arguments.add_argument("--chunks", type=int, nargs="+", default=[32, 64])
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model, leaf = setup()
    ways = {"whole": None} | {str(c): find_logit_head(model, chunk_tokens=c, device=CPU) for c in given.chunks}
    every, half = grain(given.tokens, prompt=1), grain(given.tokens, prompt=given.tokens // 2)
    seconds = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, head in ways.items():
            seconds[name].append(timed(partial(step, model, leaf, every, head), CPU))
    result = {name: {"seconds": summary(values)} for name, values in seconds.items()}
    for what, batch in (("every token a target", every), ("half of the tokens targets", half)):
        own = {name: measured(model, leaf, batch, head) for name, head in ways.items()}
        whole_loss, whole_gradient, whole_peak = own["whole"]
        for name, (loss, gradient, peak) in own.items():
            result[name][what] = {
                "peak_mib": round(peak / 2**20, 1),
                "peak_to_whole": round(peak / whole_peak, 4),
                "loss_difference": abs(float(loss - whole_loss)) / float(whole_loss),
                "gradient_difference": float((gradient - whole_gradient).norm() / whole_gradient.norm()),
            }
    for values in result.values():
        values["time_to_whole"] = round(values["seconds"]["median"] / result["whole"]["seconds"]["median"], 3)
    about = {"what": __doc__.splitlines()[0], **described(given), "vocab": VOCAB}
    write({**about, "results": result, "mask_bytes": mask_of_packed_rows(), "machine": machine()}, given.out)


def mask_of_packed_rows(tokens=4096):
    """Bytes of the mask of one packed row of 4 documents, bfloat16: as transformers draws it on the device from the
    position ids, beside a mask made on the host in bool, shipped, and added to the scores (what was done before)."""
    positions = torch.arange(tokens // 4).repeat(1, 4)
    out = {"tokens": tokens, "made_on_host_and_shipped": tokens**2, "that_as_additive_mask": 2 * tokens**2}
    for attention in ("sdpa", "eager"):
        config = LlamaConfig(attn_implementation=attention)
        embedded = torch.zeros(1, tokens, 1, dtype=torch.bfloat16)
        with LiveBytes() as memory:
            mask = create_causal_mask(
                config=config, inputs_embeds=embedded, attention_mask=None, past_key_values=None, position_ids=positions
            )
        out[attention] = {"kept": mask.untyped_storage().nbytes(), "peak": memory.peak, "shipped": 0}
    return out


def step(model, leaf, batch, head):
    """(loss, gradient) of the grain."""
    loss = token_loss_sum(model, batch, device=CPU, logit_head=head)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def measured(model, leaf, batch, head):
    """(loss, gradient, peak bytes)."""
    with LiveBytes() as memory:
        loss, gradient = step(model, leaf, batch, head)
    return loss, gradient, memory.peak


if __name__ == "__main__":
    main()
