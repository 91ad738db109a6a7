"""AB-LoRA: how much each component matters to the loss on one fixed batch (ALoRA, arXiv 2403.16187, section 3.2).

With S minus the mean cross-entropy over the batch's target tokens, M the model with all components, M_none with none:

    CS(r) = -S(M without r) + S(M with only r),        CS0 = -S(M) + S(M_none), an empty component's CS.

The paper's importance IS(r) is CS(r) + S(M), a constant apart. The naive way costs 2R + 1 forwards of the batch
(methods.md 3.7). Here, with results equal to rounding:

- Many ablations share a forward: each of its copies of the data has its own gates.
- Ablating in layer l starts at layer l, from the hidden state of M (for "without r") or of M_none (for "only r"), and
  linears of that layer that run before the ablated one are not computed again (`_replayed`).
  These states move up with l, one layer of all grains at a time: memory is one hidden state and one layer's linear
  outputs for each grain and each of the two models that this process scores on, whatever the depth.
- The vocabulary's GEMM runs at positions whose next token is a target.

The work is cut by the settings alone and dealt over the processes; every loss is one process's, and they are added in
a fixed order. So scores do not depend on the number of processes, to the bit. Under ZeRO-3 all processes run the same
layers in each round, and layers that are skipped are not gathered.

Letters: B rows of a grain, T tokens, D hidden size, V vocabulary, C copies in a forward, n targets of a grain (its
rows, where rows have classes), R components of the table (of a matrix, where a gate tensor says so), G grains.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ardtrain.ablation_work import ONLY, WITHOUT, Group, Item, cut_work, lanes_of
from ardtrain.adapters import AdapterLinear, bind_arena, drop_views
from ardtrain.arena import ArenaLayout
from ardtrain.collectives import World, deal
from ardtrain.data import Batch
from ardtrain.decoder_stack import Skipped, find_stack
from ardtrain.dense import DenseModule
from ardtrain.evaluation import Grains, model_inputs
from ardtrain.logits import LogitHead
from ardtrain.packing import packed_arguments


@dataclass(frozen=True)
class AblationScores:
    """One round's scores, alike on every process.

    cs: [R] float64 on the host; cs0: an empty component's; full_loss, bare_loss: of M and M_none, nats a target token.
    exact: [R] bool, by ablation; the others are first-order estimates, which is not AB-LoRA.
    first_order: [R] float64, the estimate of cs, or None without a shortlist.
    forwards: calls of the model; layer_forwards: decoder layers run on one copy of a grain; layer_gathers: decoder
    layers run, whatever the copies (each is a gather under ZeRO-3); head_rows: rows of the vocabulary's GEMM. Counted
    as on one process, without backward passes and the scorer's first look at the model; more processes each bring up
    the starting states they need.
    """

    cs: Tensor
    cs0: float
    full_loss: float
    bare_loss: float
    exact: Tensor
    first_order: Tensor | None
    forwards: int
    layer_forwards: int
    layer_gathers: int
    head_rows: int

    @property
    def relative(self) -> Tensor:
        """[R] float64 CS - CS0: importance beside an empty component's; below 0: worse than an empty one."""
        return self.cs - self.cs0

    @property
    def importance(self) -> Tensor:
        """[R] float64, the paper's IS = CS + S(M)."""
        return self.cs - self.full_loss

    @property
    def notes(self) -> dict[str, float]:
        """Numbers to log."""
        return {
            "ablation_full_loss": self.full_loss,
            "ablation_bare_loss": self.bare_loss,
            "ablation_forwards": float(self.forwards),
            "ablation_exact_fraction": float(self.exact.double().mean()) if len(self.exact) else 1.0,
        }


class _Grain:
    """A grain's tensors on the device, and where its targets are."""

    def __init__(self, batch: Batch, *, device: torch.device) -> None:
        self.rows, self.num_places = batch.input_ids.shape[0], batch.input_ids.numel()
        self.options: dict[str, Any] = {}
        self.places: Tensor | None = None  # [n] positions among B * T whose next token is a target; None for classes
        self.inputs = model_inputs(batch, device=device)  # each [B, ...]
        self.packed = batch.attention_mask is None
        if batch.class_labels is not None:
            del self.inputs["position_ids"]  # as evaluation.class_logits
            targets = batch.class_labels
            if batch.token_type_ids is not None:
                self.inputs["token_type_ids"] = batch.token_type_ids.to(device)
        else:
            self.options["use_cache"] = False
            places, targets = batch.targets()
            self.places = places.to(device)
        self.targets = targets.to(device)  # [n]
        self.num_targets = len(targets)

    def arguments(self, module: nn.Module, copies: int) -> dict[str, Any]:
        """The model's inputs, [C * B, ...], copy after copy."""
        out: dict[str, Any] = {name: _repeated(values, copies) for name, values in self.inputs.items()}
        return out | self.options | (packed_arguments(module, out["position_ids"]) if self.packed else {})

    def places_of(self, copies: int) -> Tensor:
        """[C * n] positions among C * B * T of the targets, copy after copy."""
        assert self.places is not None
        starts = torch.arange(copies, device=self.places.device) * self.num_places
        return (starts.unsqueeze(1) + self.places).view(-1)

    def at_targets(self, values: Tensor, copies: int) -> Tensor:
        """[C * n, X] rows at the target positions of [C * B, T, X], copy after copy."""
        return values.reshape(-1, values.shape[-1])[self.places_of(copies)]


class _Lane(NamedTuple):
    """M or M_none on one grain at one decoder layer.

    entering: [B, T, D] the state entering it, None below layer 1. outputs: module -> [B, T, O] of its linears, in the
    order of their calls. leaving: the state entering the next layer, None after the last.
    """

    entering: Tensor | None
    outputs: Mapping[str, Tensor]
    leaving: Tensor | None


class AblationScorer:
    """Scores all components of a table on fixed held-out data. All processes must call it.

    Args:
        module: the backbone (its linears are AdapterLinears), called as in training, in eval mode, without gradient.
        data: the validation batch, cut into grains; always the same.
        release: frees what ZeRO-3 left gathered (BackboneEngine.release).
        ablations_per_forward: C, at most; memory of a forward is C times a grain's.
        shortlist: None: all components exactly. Else a fraction: two backward passes estimate all scores to first
            order, and only the lowest such fraction is ablated. That is NOT AB-LoRA: which components are spared the
            ablation is the estimate's word. The others keep their estimate, raised above the highest exact score where
            it is lower, so the lowest scores are exact ones as long as the shortlist is not smaller than what is
            pruned. The backward passes keep the activations of one grain.
        prefix_cache: start at the ablated layer; needs decoder layers that run once each, in order.
        target_logits_only: the vocabulary's GEMM at target positions only.
        logit_head: does so chunk by chunk; None: at all of them at once.
        between: called after each round of forwards, equally often on every process; it may raise, and the model is
            left as it was.
    """

    def __init__(
        self,
        module: nn.Module,
        adapters: Mapping[str, AdapterLinear | DenseModule],
        data: Grains,
        *,
        world: World,
        release: Callable[[], None],
        ablations_per_forward: int = 8,
        shortlist: float | None = None,
        prefix_cache: bool = True,
        target_logits_only: bool = True,
        logit_head: LogitHead | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        if ablations_per_forward < 1:
            raise ValueError(f"ablations_per_forward={ablations_per_forward} must be at least 1")
        if shortlist is not None and not 0.0 < shortlist <= 1.0:
            raise ValueError(f"shortlist={shortlist} must be a fraction above 0, at most 1; leave it out to score all")
        self.module, self.adapters, self.data = module, adapters, data
        self.world, self.release, self.between = world, release, between
        self.ablations_per_forward, self.shortlist, self.logit_head = ablations_per_forward, shortlist, logit_head
        self.stack = find_stack(module, list(adapters)) if prefix_cache else None
        get_head = getattr(module, "get_output_embeddings", None)
        self._head: nn.Module | None = get_head() if get_head is not None else None
        self._head_path = next((name for name, m in module.named_modules() if m is self._head), "")
        # An adapted head's gates are one an example, so it must see [C * B, T, D].
        self._selects = target_logits_only and self._head is not None and not isinstance(self._head, AdapterLinear)
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._row_by_row: set[str] | None = None

    @cached_property
    def _grains(self) -> list[_Grain]:
        batches = [self.data.collate(grain) for grain in self.data.grains()]
        return [_Grain(b, device=self.world.device) for b in batches]

    def scores(self, layout: ArenaLayout, weights: Tensor) -> AblationScores:
        """The scores of all components. All processes must call this.

        Args:
            weights: [N] float32, the arena.
        Raises:
            RuntimeError: a loss is not finite; on every process.
        """
        was_training = self.module.training
        self.module.eval()
        self._layout, self._weights = layout, weights.detach()
        self._views = layout.views(self._weights)
        self._spans = {block.module: (block.first, block.rows) for block in layout.blocks}
        try:
            with torch.no_grad():
                return self._scores()
        finally:
            drop_views(self.adapters)
            self.release()
            self.module.train(was_training)
            self._lanes = {}
            del self._layout, self._weights, self._views, self._spans

    def _scores(self) -> AblationScores:
        total, num_grains = self._layout.table.total, len(self._grains)
        num_targets = max(1, sum(g.num_targets for g in self._grains))
        layers = self._layer_of_components()
        slopes = None if self.shortlist is None else self._slopes() / num_targets
        if slopes is not None:
            _refuse_non_finite(slopes.tolist())
        chosen = list(range(total)) if slopes is None else _lowest(slopes.tolist(), self.shortlist)
        groups = cut_work(
            layers,
            chosen=chosen,
            num_grains=num_grains,
            ablations_per_forward=self.ablations_per_forward,
            alone=self._alone(),
        )
        # One loss by side, component (behind them the unablated model) and grain, each of one process alone.
        sums = torch.zeros(2, total + 1, num_grains, dtype=torch.float64, device=self.world.device)
        self._run_groups(groups, sums)
        losses = [[math.fsum(row) / num_targets for row in side] for side in self.world.merge(sums).cpu().tolist()]
        full, bare = losses[WITHOUT][total], losses[ONLY][total]
        # -S is the loss, so CS = loss without r - loss with only r.
        cs = [a - b for a, b in zip(losses[WITHOUT][:total], losses[ONLY][:total], strict=True)]
        _refuse_non_finite([full, bare, *cs])
        cs0 = full - bare
        first_order = None if slopes is None else slopes + cs0
        exact = torch.zeros(total, dtype=torch.bool)
        exact[chosen] = True
        scores = torch.tensor(cs, dtype=torch.float64)
        if first_order is not None and chosen:
            floor = math.nextafter(max(cs[c] for c in chosen), math.inf)
            scores = torch.where(exact, scores, first_order.clamp_min(floor))
        return AblationScores(scores, cs0, full, bare, exact, first_order, *self._cost(groups))

    def _layer_of_components(self) -> list[int | None]:
        """[R] decoder layer in which each component sits; None: in none, or no layers were found."""
        if self.stack is None:
            return [None] * self._layout.table.total
        table = self._layout.table
        layers = [self.stack.layer_of(site.module) for site in table.sites]
        return [layer for layer, rank in zip(layers, table.ranks, strict=True) for _ in range(rank)]

    def _alone(self) -> set[int]:
        """Components whose ablations cannot share a forward: their linear is not called once with [B, T, I].

        Experts see tokens, a pooler one token a row, DeBERTa's projections a table of positions too. The first time
        it runs the model once to look. All processes must call this.
        """
        if self._row_by_row is None:
            calls: dict[str, list[tuple[int, ...]]] = {name: [] for name in self.adapters}
            grain = self._grains[0]
            self._bind(ONLY)
            with contextlib.ExitStack() as stack:
                for name, adapter in self.adapters.items():
                    hook = partial(_keep_shape, calls[name])
                    stack.callback(adapter.register_forward_pre_hook(hook).remove)
                self.module(**grain.arguments(self.module, 1))
            self._row_by_row = {
                name
                for name, shapes in calls.items()
                if len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][0] == grain.rows
            }
        table = self._layout.table
        out: set[int] = set()
        for index, site in enumerate(table.sites):
            if site.module not in self._row_by_row:
                out.update(range(table.offsets[index], table.offsets[index + 1]))
        return out

    @cached_property
    def _modules_of_layer(self) -> dict[int | None, list[str]]:
        out: dict[int | None, list[str]] = {}
        for name, adapter in self.adapters.items():
            if self.stack is not None and isinstance(adapter, AdapterLinear):
                out.setdefault(self.stack.layer_of(name), []).append(name)
        return out

    # ---- the exact scores ----

    def _run_groups(self, groups: Sequence[Group], sums: Tensor) -> None:
        """Writes this process's losses into `sums` [2, R + 1, G]. All processes must call this."""
        size, own = self.world.world_size, self.world.global_rank
        lanes = [lanes_of(groups, size, p) for p in range(size)]
        num_rounds = max(len(own_lanes) for own_lanes in lanes)
        self._lanes = {lane: _Lane(None, {}, None) for lane in lanes[own]}
        risen = 0  # layers behind the lanes
        for group in groups:
            while group.start is not None and risen <= group.start:
                self._rise(risen, num_rounds, keep_outputs=risen == group.start)
                risen += 1
            for index, counted in deal(len(group.items), size, own):
                item = group.items[index]
                losses = self._losses(item, group.start)
                if counted:
                    rows = list(item.components) or [sums.shape[1] - 1]
                    sums[item.side, rows, item.grain] = losses
                self.between()

    def _rise(self, layer: int, num_rounds: int, *, keep_outputs: bool) -> None:
        """Brings the lanes of this process from below `layer` to it. All processes must call this.

        num_rounds: the most lanes of any process; a process with fewer repeats one, since ZeRO-3 needs every process.
        """
        old, lanes = self._lanes, list(self._lanes)
        new: dict[tuple[int, int], _Lane] = {}
        for r in range(num_rounds):
            lane = lanes[min(r, len(lanes) - 1)]
            new[lane] = self._run_layer(layer, lane, old[lane].leaving, keep_outputs=keep_outputs)
            self.between()
        self._lanes = new

    def _run_layer(self, layer: int, lane: tuple[int, int], entering: Tensor | None, *, keep_outputs: bool) -> _Lane:
        """Runs one decoder layer of M or M_none alone, without the output embedding."""
        assert self.stack is not None
        side, grain = lane
        calls: list[tuple[str, Tensor]] = []
        self._bind(side)
        with contextlib.ExitStack() as stack:
            if keep_outputs:
                for name in self._modules_of_layer.get(layer, []):
                    hook = partial(_keep_output, name, calls)
                    stack.callback(self.adapters[name].register_forward_hook(hook).remove)
            stack.enter_context(self._head_skipped())
            seen = stack.enter_context(self.stack.part(layer, layer + 1, entering))
            self.module(**self._grains[grain].arguments(self.module, 1))
        outputs = dict(calls)
        if len(outputs) < len(calls):  # a linear that runs twice in a layer: nothing is replayed
            outputs = {}
        return _Lane(entering, outputs, seen.get(layer + 1))

    def _losses(self, item: Item, start: int | None) -> Tensor:
        """[C] float64: the grain's summed loss under each ablation."""
        grain, copies = self._grains[item.grain], item.copies
        self._bind(item.side)
        touched = self._gate(item)
        with contextlib.ExitStack() as stack:
            if start is not None:
                assert self.stack is not None
                lane = self._lanes[item.side, item.grain]
                entering = None if lane.entering is None else _repeated(lane.entering, copies)
                stack.enter_context(self.stack.part(start, len(self.stack.layers), entering))
                stack.enter_context(self._replayed(lane.outputs, touched, copies))
            targets = grain.targets.repeat(copies)
            if self.logit_head is not None and grain.places is not None:
                arguments = grain.arguments(self.module, copies)
                losses = self.logit_head.losses(self.module, arguments, grain.places_of(copies), targets)
            else:
                losses = F.cross_entropy(self._logits(grain, copies).float(), targets, reduction="none")
        return losses.view(copies, -1).double().sum(dim=1)

    def _logits(self, grain: _Grain, copies: int) -> Tensor:
        """[C * n, V] at the target positions, or each row's logits of classes; copy after copy."""
        if grain.places is None or not self._selects:
            logits: Tensor = self.module(**grain.arguments(self.module, copies)).logits
            return logits if grain.places is None else grain.at_targets(logits, copies)
        assert self._head is not None
        handle = self._head.register_forward_pre_hook(lambda _, args: (grain.at_targets(args[0], copies), *args[1:]))
        try:
            out: Tensor = self.module(**grain.arguments(self.module, copies)).logits
        finally:
            handle.remove()
        return out

    # ---- what the adapters do ----

    def _bind(self, side: int) -> None:
        """M: all components; M_none: none."""
        bind_arena(self.adapters, self._layout, self._weights)
        if side == ONLY:
            for adapter in self.adapters.values():
                if isinstance(adapter, AdapterLinear):  # what is trained in full belongs to no component and stays
                    adapter.bind(None, (0,))

    def _gate(self, item: Item) -> list[str]:
        """Gives each copy its own gates, [C * B, 1, R] or for one copy [R]; returns the modules that are ablated."""
        rows = self._grains[item.grain].rows
        touched = []
        for name, (first, count) in self._spans.items():
            own = [(i, c - first) for i, c in enumerate(item.components) if first <= c < first + count]
            if not own:
                continue
            gates = torch.full((item.copies, count), 1.0 - item.side)
            gates[tuple(zip(*own, strict=True))] = float(item.side)
            # One copy takes one vector for all rows: that fits however a linear is called.
            gates = gates[0] if item.copies == 1 else gates.repeat_interleave(rows, dim=0).unsqueeze(1)
            adapter = self.adapters[name]
            assert isinstance(adapter, AdapterLinear)
            adapter.bind(self._views[name], self._layout.site_ranks[name], gates.to(self.world.device))
            touched.append(name)
        return touched

    @contextlib.contextmanager
    def _replayed(self, outputs: Mapping[str, Tensor], touched: Sequence[str], copies: int) -> Iterator[None]:
        """While open, linears of the first layer that run before the ablated ones give back what they gave before.

        The first ablated one sees the same input in all copies: its frozen product is computed once. `forward` is
        replaced, not the module: its hooks still run, so under ZeRO-3 all processes gather the same weights in each
        round, whatever they ablate.
        """
        order = list(outputs)
        if not all(name in outputs for name in touched):
            yield
            return
        first = min(order.index(name) for name in touched)
        changed = []
        for name in order[: first + 1]:
            adapter = self.adapters[name]
            assert isinstance(adapter, AdapterLinear)
            if name != order[first]:
                adapter.forward = partial(_replay, outputs[name], copies)  # type: ignore[method-assign]
            elif type(adapter) is AdapterLinear:  # other forms are more than a sum of two products
                adapter.forward = partial(_share_base, adapter, copies)  # type: ignore[method-assign]
            else:
                continue
            changed.append(adapter)
        try:
            yield
        finally:
            for adapter in changed:
                del adapter.forward

    @contextlib.contextmanager
    def _head_skipped(self) -> Iterator[None]:
        """While open, the output embedding does not run."""
        if self._head is None or not self._head_path:
            yield
            return
        parent_path, _, child = self._head_path.rpartition(".")
        parent = self.module.get_submodule(parent_path)
        setattr(parent, child, Skipped(self._head, lambda hidden: hidden))
        try:
            yield
        finally:
            setattr(parent, child, self._head)

    # ---- the first-order estimate (not AB-LoRA) ----

    def _slopes(self) -> Tensor:
        """[R] float64: dS/dg at M plus dS/dg at M_none, S not yet divided by the targets. All processes must call this.

        To first order CS(r) = CS0 + this (methods.md 3.7). Two forwards and backwards of each grain.
        """
        total, num_grains = self._layout.table.total, len(self._grains)
        slopes = torch.zeros(2, num_grains, total, dtype=torch.float64, device=self.world.device)
        items = [(side, grain) for side in (WITHOUT, ONLY) for grain in range(num_grains)]
        for index, counted in deal(len(items), self.world.world_size, self.world.global_rank):
            side, number = items[index]
            grain = self._grains[number]
            with torch.enable_grad():
                gates = torch.full((total,), 1.0 - side, device=self.world.device, requires_grad=True)
                bind_arena(self.adapters, self._layout, self._weights, gates)
                if self.logit_head is not None and grain.places is not None:
                    loss = self.logit_head.loss_sum(
                        self.module, grain.arguments(self.module, 1), grain.places, grain.targets
                    )
                else:
                    loss = F.cross_entropy(self._logits(grain, 1).float(), grain.targets, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, gates)
            self.release()
            if counted:
                slopes[side, number] = -gradient.double()
            self.between()
        by_component = self.world.merge(slopes).cpu().flatten(0, 1).T.tolist()
        return torch.tensor([math.fsum(row) for row in by_component], dtype=torch.float64)

    # ---- cost ----

    def _cost(self, groups: Sequence[Group]) -> tuple[int, int, int, int]:
        """forwards, layer_forwards, layer_gathers, head_rows of AblationScores."""
        depth = len(self.stack.layers) if self.stack is not None else 0
        forwards = layer_forwards = layer_gathers = head_rows = 0
        passes = [(g.start, i) for g in groups for i in g.items]
        if self.shortlist is not None:
            unablated = [Item((), side, g) for side in (WITHOUT, ONLY) for g in range(len(self._grains))]
            passes += [(None, item) for item in unablated]
        for start, item in passes:
            grain, depth_run = self._grains[item.grain], depth - (start or 0)
            forwards += 1
            layer_forwards += item.copies * depth_run
            layer_gathers += depth_run
            selects = self._selects or self.logit_head is not None or grain.places is None
            head_rows += item.copies * (grain.num_targets if selects else grain.num_places)
        lanes = len(lanes_of(groups, 1, 0))
        rises = lanes * max((g.start + 1 for g in groups if g.start is not None), default=0)
        return forwards + rises, layer_forwards + rises, layer_gathers + rises, head_rows


def _refuse_non_finite(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise RuntimeError("an ablated model's loss is not finite; lower learning_rate, or compute in bf16 or fp32")


def _repeated(values: Tensor, copies: int) -> Tensor:
    """[C * B, ...], copy after copy, of [B, ...]."""
    return values.repeat(copies, *[1] * (values.dim() - 1))


def _keep_shape(shapes: list[tuple[int, ...]], _: nn.Module, args: tuple[Any, ...]) -> None:
    shapes.append(tuple(args[0].shape))


def _keep_output(name: str, calls: list[tuple[str, Tensor]], _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    calls.append((name, out))


def _replay(out: Tensor, copies: int, _: Tensor) -> Tensor:
    """In the place of a linear's forward whose input is the same in all copies."""
    return _repeated(out, copies)


def _share_base(adapter: AdapterLinear, copies: int, x_BTI: Tensor) -> Tensor:
    """In the place of a plain adapter's forward whose input is the same in all copies but whose gates differ."""
    views, adapter.views = adapter.views, None
    base = AdapterLinear.forward(adapter, x_BTI[: len(x_BTI) // copies])
    adapter.views = views
    return _repeated(base, copies) + adapter.product(x_BTI)


def _lowest(values: Sequence[float], fraction: float | None) -> list[int]:
    """The positions of the lowest `fraction` of the values (rounded up), by (value, position), in ascending order."""
    assert fraction is not None
    count = math.ceil(fraction * len(values))
    return sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])
