"""Cross-entropy at target positions, chunk by chunk, so that logits of all tokens never exist.

The output embedding stays the model's own module, called once by the model's own forward: ZeRO-3's hooks on it gather
its weight once for all chunks. Meanwhile only its `forward` is replaced: by a loop over chunks of target positions that
computes losses and, where wanted, their gradient by the hidden states at once. Nothing of the size of the vocabulary is
kept for backward, and backward does not need the weight again.

What a model does to its logits behind the output embedding is found by a probe (find_logit_head), not by its name.

Letters: B batch, T tokens, N = B T positions, n targets among them, c targets of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Names in transformers' configs: a factor of the logits (Granite divides by it, others multiply), and a soft cap.
FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
COMPUTES_WITH = "computes_with"  # attribute of an output embedding: a module outside the model whose views it uses
PROBE_TOKENS = 4
PROBE_LARGEST = 100.0  # of the probe's logits: a soft cap is far from the identity there
# float16 holds the gradient of a loss by the logits, about 1 / V, only when it is scaled up.
HALF_SCALE = 2.0**10

LogitsOf = Callable[[Tensor], Tensor]  # [c, D] -> [c, V], in the compute dtype


@dataclass(frozen=True)
class Form:
    """What a model does to its output embedding's result: times factor, then cap * tanh(x / cap)."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Elementwise, in the dtype it gets."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class LogitHead:
    """The output embedding, run at chosen positions, `chunk_tokens` of them at a time; bits depend on that number."""

    def __init__(self, head: nn.Module, form: Form, *, chunk_tokens: int) -> None:
        assert chunk_tokens > 0
        self.head, self.form, self.chunk_tokens = head, form, chunk_tokens

    def losses(self, module: nn.Module, arguments: Mapping[str, Any], places: Tensor, targets: Tensor) -> Tensor:
        """[n] float32 cross-entropy of each target, without gradient, by one forward of the model.

        Args:
            arguments: of the model's forward. places: [n] int64 among N. targets: [n] int64.
        """

        def run(logits_of: LogitsOf, x_ND: Tensor) -> Tensor:
            parts = [
                cross_entropy_(logits_of(x_ND[own]).to(torch.float32), wanted)
                for own, wanted in self._chunks(places, targets)
            ]
            return torch.cat(parts)

        with torch.no_grad():
            _, losses = self._run(module, arguments, run)
        return losses

    def loss_sum(self, module: nn.Module, arguments: Mapping[str, Any], places: Tensor, targets: Tensor) -> Tensor:
        """Scalar float32: the sum of `losses`, with a gradient where gradients are enabled."""
        if not torch.is_grad_enabled():
            return self.losses(module, arguments, places, targets).sum()
        trained = trained_tensors(self.head)
        found: list[_Slopes] = []

        def run(logits_of: LogitsOf, x_ND: Tensor) -> Tensor:
            found.append(_slopes(logits_of, x_ND, self._chunks(places, targets), trained))
            return found[0].loss

        x_BTD, _ = self._run(module, arguments, run)
        (slopes,) = found
        loss: Tensor = _KnownGradient.apply(x_BTD, slopes, places, *trained)
        return loss

    def _chunks(self, places: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(places.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True))

    def _run(
        self, module: nn.Module, arguments: Mapping[str, Any], run: Callable[[LogitsOf, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One forward of the model in which `run` stands for the output embedding's.

        Returns:
            The output embedding's input [B, T, D], and what `run` gave for it (as [N, D], detached).
        """
        inputs: list[Tensor] = []
        results: list[Tensor] = []

        def detach(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs.append(args[0])
            return (args[0].detach(), *args[1:])

        def instead(own: LogitsOf, x: Tensor) -> Tensor:
            results.append(run(lambda rows: self.form(own(rows)), x.reshape(-1, x.shape[-1])))
            return x.new_zeros((*x.shape[:-1], 1))  # the model may do to its logits what it does

        # Ahead of ZeRO-3's hooks, which would wait for a backward through this module: there is none.
        handle = self.head.register_forward_pre_hook(detach, prepend=True)
        try:
            with replaced(self.head, instead):
                module(**arguments)
        finally:
            handle.remove()
        (x,), (result,) = inputs, results
        return x, result


def trained_tensors(head: nn.Module) -> list[Tensor]:
    """The arena's views that the output embedding computes with (`views` of our own modules), if any."""
    held = [getattr(m, "views", None) for m in (*head.modules(), vars(head).get(COMPUTES_WITH))]
    return [view for views in held if isinstance(views, Mapping) for view in views.values() if view.requires_grad]


def cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool = False) -> Tensor:
    """[c] float32 cross-entropy of logits [c, V] float32, which are overwritten.

    With `gradient` by d loss / d logits = softmax(logits) - onehot(target), else by what is of no use. In place because
    nothing else here has the vocabulary's size.
    """
    rows = torch.arange(len(targets), device=targets.device)
    largest = logits.amax(dim=-1)
    wanted = logits[rows, targets]
    logits.sub_(largest.unsqueeze(-1)).exp_()
    total = logits.sum(dim=-1)
    if gradient:
        logits.div_(total.unsqueeze(-1))
        logits[rows, targets] -= 1.0
    return total.log() + (largest - wanted)


class _Slopes(NamedTuple):
    """loss: scalar float32. by_rows: [n, D], by_trained: the gradient of `scale` times the loss."""

    loss: Tensor
    by_rows: Tensor
    by_trained: list[Tensor]
    scale: float


def _slopes(
    logits_of: LogitsOf, x_ND: Tensor, chunks: Sequence[tuple[Tensor, Tensor]], trained: Sequence[Tensor]
) -> _Slopes:
    """The summed loss of chunks of (places, targets); its gradient by their hidden states and by trained tensors."""
    scale = HALF_SCALE if x_ND.dtype == torch.float16 else 1.0
    by_rows = x_ND.new_empty(sum(len(own) for own, _ in chunks), x_ND.shape[1])
    by_trained = [torch.zeros_like(tensor) for tensor in trained]
    losses: list[Tensor] = []
    end = 0
    for own, targets in chunks:
        rows = x_ND[own].requires_grad_()
        logits = logits_of(rows)
        # In float32 this is the same memory: what computed the logits does not need them again, or autograd raises.
        slope = logits.detach().to(torch.float32)
        losses.append(cross_entropy_(slope, targets, gradient=True))
        slope = (slope if scale == 1.0 else slope.mul_(scale)).to(logits.dtype)
        of_rows, *of_trained = torch.autograd.grad(logits, [rows, *trained], slope, allow_unused=True)
        start, end = end, end + len(own)
        by_rows[start:end] = of_rows
        for total, part in zip(by_trained, of_trained, strict=True):
            if part is not None:
                total += part
        del logits, slope  # before the next chunk's are made
    return _Slopes(torch.cat(losses).sum(), by_rows, by_trained, scale)


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient by the hidden states [B, T, D] and by trained tensors is known already."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, slopes: _Slopes, places: Tensor, *trained: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(places, slopes.by_rows, *slopes.by_trained)
        ctx.scale, ctx.shape = slopes.scale, x_BTD.shape
        return slopes.loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        places, by_rows, *by_trained = ctx.saved_tensors
        factor = grad / ctx.scale
        by_x = by_rows.new_zeros(ctx.shape)
        by_x.view(-1, by_rows.shape[1])[places] = (by_rows * factor).to(by_rows.dtype)
        return (by_x, None, None, *(values * factor for values in by_trained))


@contextmanager
def replaced(head: nn.Module, instead: Callable[[LogitsOf, Tensor], Tensor]) -> Iterator[None]:
    """While open, `instead(own forward, x)` stands for the module's forward; its hooks still run."""
    own, before = head.forward, head.__dict__.get("forward")
    head.forward = lambda x: instead(own, x)
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def find_logit_head(module: nn.Module, *, chunk_tokens: int, device: torch.device) -> LogitHead | str:
    """The model's LogitHead, or why its logits have to be computed whole. All processes must call this.

    Probe: a forward of a few tokens in which the output embedding gives back chosen numbers. What the model makes of
    them must be one of the forms that its config lets expect, everywhere. So the answer hangs on no data and no weight,
    and is the same on every process. The forward is a whole one; beside a run's it is nothing.
    """
    get_head = getattr(module, "get_output_embeddings", None)
    head: nn.Module | None = None if get_head is None else get_head()
    if head is None:
        return "the model has no output embedding"
    config = module.config.get_text_config()  # type: ignore[union-attr, operator]
    vocab = int(getattr(head, "out_features", config.vocab_size))
    count = PROBE_TOKENS * vocab
    probe = torch.linspace(-PROBE_LARGEST, PROBE_LARGEST, count, device=device).view(1, PROBE_TOKENS, vocab)
    shapes: list[tuple[int, ...]] = []

    def instead(own: LogitsOf, x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape[:-1]))
        return probe

    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), replaced(head, instead):
            logits = module(
                input_ids=positions, attention_mask=torch.ones_like(positions), position_ids=positions, use_cache=False
            ).logits
    finally:
        module.train(was_training)
    if shapes != [(1, PROBE_TOKENS)]:
        return "the model does not run its output embedding once on [batch, tokens, hidden]"
    for form in _forms(config):
        expected = form(probe)
        if logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=1e-5, atol=1e-5):
            return LogitHead(head, form, chunk_tokens=chunk_tokens)
    return "what the model does to its logits is none of the known forms"


def _forms(config: Any) -> Iterator[Form]:
    """The forms that a config lets expect, the plain one first."""
    values = [float(getattr(config, name, None) or 1.0) for name in FACTORS]
    factors = [1.0, *(v for value in values if value != 1.0 for v in (value, 1.0 / value))]
    caps = [None, *(float(cap) for name in CAPS if (cap := getattr(config, name, None)))]
    for factor in factors:
        for cap in caps:
            yield Form(factor, cap)
