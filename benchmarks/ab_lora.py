"""AB-LoRA's scores beside the naive way of getting them: arithmetic, gathered bytes, seconds, and the same pruned set.

python -m benchmarks.ab_lora [--data DIR | --shape 256x8] [--r 8] [--timed-r 2] [--seeds 6] [--out FILE]

Naive: 2 R + 1 plain forwards of the validation batch. Operations are counted, not timed: the floating-point operations
of every matrix product and attention as they ran (torch's FlopCounterMode), for the naive way one forward's times its
number. Gathered bytes are those of the weights of every module that ran, as ZeRO-3 would gather them on one process.
Seconds are medians over repeats in turns, at a smaller rank. DIR holds `stories260k_llama` and `e2e_nlg`: adapters are
trained for some steps on its rows and judged on others; without it tokens are random.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ardtrain.ablation import AblationScorer
from ardtrain.adapters import attach, bind_arena, drop_views
from ardtrain.arena import ArenaLayout
from ardtrain.backbones import ModelSource, load_model, load_tokenizer
from ardtrain.collectives import World
from ardtrain.data import DataSettings, EvalData
from ardtrain.evaluation import token_loss_sum
from ardtrain.methods.alora import allocate, num_matrix_types
from ardtrain.methods.lora import Lora
from ardtrain.ranks import RankTable
from ardtrain.resize import start_snapshot
from ardtrain.targets import find_sites
from benchmarks.common import SHAPES, described, machine, parser, random_llama, summary, timed, write
from tests.tiny import HeldOutBatches

FRACTIONS = (0.1, 0.2, 0.4)


class Chosen:
    """Some of a data set's grains."""

    def __init__(self, data, grains):
        self._data, self._grains = data, grains

    def grains(self):
        return self._grains

    def collate(self, grain):
        return self._data.collate(grain)


class Case:
    """A model with adapters of rank r that were trained a little, and a validation batch."""

    def __init__(self, arguments, r, seed, cache):
        self.world = World(0, 1, torch.device("cpu"))
        self.r, self.seed = r, seed
        if arguments.data:
            folder = Path(arguments.data)
            source = ModelSource(str(folder / "stories260k_llama"))
            self.model = load_model(source, compute_dtype="fp32")
            settings = DataSettings(
                train_files=(str(folder / "e2e_nlg" / "train.jsonl"),), format="completion", prompt_field="",
                completion_field="ref", messages_field="", text_field="", prompt_template="{mr}\n",
                completion_template=None, chat_template=None, max_length=256, packing=False, truncation="drop",
                on_bad_row="error", seed=0,
            )  # fmt: skip
            data = EvalData(
                settings, settings.train_files, load_tokenizer(source), cache, grain_size=arguments.rows,
                max_samples=2000,
            )  # fmt: skip
        else:
            self.model = random_llama(arguments.shape, dtype=torch.float32)
            vocab = self.model.config.vocab_size
            data = HeldOutBatches(7, num_grains=400, rows=arguments.rows, length=arguments.length, vocab=vocab)
        grains = data.grains()
        picks = torch.randperm(len(grains), generator=torch.Generator().manual_seed(seed)).tolist()
        self.data = Chosen(data, [grains[i] for i in picks[: arguments.grains]])
        sites, ranks = find_sites(
            self.model, target_modules="all-linear", exclude_modules=None, r=r, lora_alpha=2.0 * r, tower_settings={}
        )
        self.adapters = attach(self.model, sites, dropout={})
        self.table = RankTable.start(sites, ranks)
        self.layout = ArenaLayout(self.table, Lora().entries)
        self.weights = start_snapshot(self.table, self.layout, Lora().init, seed=seed).full.master
        self.train([data.collate(grains[i]) for i in picks[arguments.grains :][: arguments.steps]])

    def train(self, batches):
        """Plain Adam, one grain a step."""
        leaf = self.weights.requires_grad_()
        adam = torch.optim.Adam([leaf], lr=5e-3)
        for batch in batches:
            bind_arena(self.adapters, self.layout, leaf)
            self.loss_sum(batch).div(batch.num_target_tokens).backward()
            adam.step()
            adam.zero_grad()
        drop_views(self.adapters)
        self.weights = leaf.detach()

    def loss_sum(self, batch):
        return token_loss_sum(self.model, batch, device=self.world.device)

    def scorer(self, **settings):
        return AblationScorer(
            self.model, self.adapters, self.data, world=self.world, release=lambda: None,
            **settings,
        )  # fmt: skip

    def losses(self, gates):
        """[G] summed losses of one plain forward of each grain with these gates [R]: the naive way's unit of work.

        Token losses are float32 and their sum float64: a float32 sum alone would be off by more than the two ways are.
        """
        bind_arena(self.adapters, self.layout, self.weights, gates)
        out = []
        for batch in map(self.data.collate, self.data.grains()):
            logits = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(),
                position_ids=batch.position_ids, use_cache=False,
            ).logits  # fmt: skip
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none")
            out.append(losses.double().sum())
        return torch.stack(out)

    def naive(self):
        """[R] CS by 2 R forwards, and S(M)."""
        self.model.eval()
        targets = sum(self.data.collate(g).num_target_tokens for g in self.data.grains())
        with torch.no_grad():
            self.losses(torch.ones(self.table.total))
            one = torch.eye(self.table.total)
            cs = [(self.losses(1.0 - row) - self.losses(row)).sum() / targets for row in one]
        drop_views(self.adapters)
        return torch.stack(cs)

    def pruned(self, scores):
        """(site, position) that leave in a round with the paper's n_A."""
        plan = allocate(self.table, scores.tolist(), n_a=num_matrix_types(self.table))
        return {(i, p) for i, c in plan.changes.items() for p in range(self.table.ranks[i]) if p not in c.keep}


class Gathered:
    """Bytes of the weights of the modules that run: decoder layers whole, everything else by itself."""

    def __init__(self, model):
        self.bytes, self._handles = 0, []
        layers = list(model.model.layers)
        inside = {m for layer in layers for m in layer.modules()}
        own = [m for m in model.modules() if m not in inside and any(True for _ in m.parameters(recurse=False))]
        for module in (*layers, *own):
            weights = module.parameters() if module in inside else module.parameters(recurse=False)
            size = sum(p.numel() * p.element_size() for p in weights)
            self._handles.append(module.register_forward_pre_hook(lambda *_, size=size: self._add(size)))

    def _add(self, size):
        self.bytes += size

    def end(self):
        for handle in self._handles:
            handle.remove()
        return self.bytes


def attention_on_the_host(query, key, value, *_, **__):
    """Operations of the kernel that torch's counter leaves out."""
    return sdpa_flop_count(query, key, value)


COUNTED_TOO = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_the_host}


def counted(model, function):
    """(operations, gathered bytes, result) of one call."""
    gathered = Gathered(model)
    with FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as flops:
        result = function()
    return flops.get_total_flops(), gathered.end(), result


def counts(case):
    """Operations, bytes and calls relative to the naive way, for each of the parts alone and all together."""
    total, num_grains = case.table.total, len(case.data.grains())
    depth = case.model.config.num_hidden_layers
    case.model.eval()
    with torch.no_grad():
        flops, size, _ = counted(case.model, lambda: case.losses(torch.ones(total)))
    drop_views(case.adapters)
    times = 2 * total + 1
    rows = sum(case.data.collate(g).labels.numel() for g in case.data.grains())
    naive = {
        "operations": times * flops, "gathered_bytes": times * size, "forwards": times * num_grains,
        "layer_forwards": times * num_grains * depth, "head_rows": times * rows,
    }  # fmt: skip
    ways = {
        "all": {},
        "without_prefix_cache": {"prefix_cache": False},
        "without_target_logits_only": {"target_logits_only": False},
        "shortlist_0.1": {"shortlist": 0.1},
    }
    relative = {}
    for name, settings in ways.items():
        scorer = case.scorer(**settings)
        scorer.scores(case.layout, case.weights)  # the first time looks at the model once
        flops, size, got = counted(case.model, lambda scorer=scorer: scorer.scores(case.layout, case.weights))
        ours = {
            "operations": flops, "gathered_bytes": size, "forwards": got.forwards,
            "layer_forwards": got.layer_forwards or got.forwards * depth, "head_rows": got.head_rows,
        }  # fmt: skip
        if name == "without_prefix_cache":
            ours["layer_forwards"] = times * num_grains * depth + num_grains * depth
        relative[name] = {key: ours[key] / naive[key] for key in naive}
    return {"r": case.r, "components": total, "naive": naive, "relative_to_naive": relative}


def seconds(case, repeats):
    """Naive and ours in turns, and how far apart their scores are."""
    scorer = case.scorer()
    got = scorer.scores(case.layout, case.weights)
    want = case.naive()
    kinds = {"naive": case.naive, "ours": lambda: scorer.scores(case.layout, case.weights)}
    taken = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, function in kinds.items():
            taken[kind].append(timed(function, case.world.device))
    ratio = [a / b for a, b in zip(taken["ours"], taken["naive"], strict=True)]
    ordered = want.sort().values
    cut = num_matrix_types(case.table)
    return {
        "r": case.r, "components": case.table.total,
        "seconds": {kind: summary(values) for kind, values in taken.items()}, "ours_over_naive": summary(ratio),
        "largest_difference": float((got.cs - want).abs().max()), "spread_of_scores": float(want.max() - want.min()),
        "gap_at_the_cut": float(ordered[cut] - ordered[cut - 1]),
        "same_pruned_set": case.pruned(got.cs) == case.pruned(want),
    }  # fmt: skip


def shortlists(arguments, cache):
    """How often the shortlisted round prunes what the full one does, over seeds; and what the estimate costs."""
    equal, kept, share = dict.fromkeys(FRACTIONS, 0), {f: [] for f in FRACTIONS}, []
    by_estimate, cut = [], 0
    for seed in range(arguments.seeds):
        case = Case(arguments, arguments.r, seed, cache)
        cut = num_matrix_types(case.table)
        scorer = case.scorer(shortlist=1.0)
        full = scorer.scores(case.layout, case.weights)
        want = case.pruned(full.relative)
        by_estimate.append(len(case.pruned(full.first_order) & want) / cut)
        for fraction in FRACTIONS:
            got = case.scorer(shortlist=fraction).scores(case.layout, case.weights)
            same = case.pruned(got.relative)
            equal[fraction] += same == want
            kept[fraction].append(len(same & want) / cut)
        share.append(estimate_share(case))
    return {
        "r": arguments.r, "seeds": arguments.seeds, "pruned": cut,
        "seeds_with_the_same_pruned_set": equal,
        "share_of_the_pruned_set_found": {f: summary(v) for f, v in kept.items()},
        "share_found_by_the_estimate_alone": summary(by_estimate),
        "estimate_seconds_over_exact": summary(share),
    }  # fmt: skip


def estimate_share(case):
    """Seconds of the two backward passes over those of the exact scores of all components."""
    exact, short = case.scorer(), case.scorer(shortlist=1.0)
    exact.scores(case.layout, case.weights)
    taken = []
    short._layout, short._weights = case.layout, case.weights
    for _ in range(3):
        case.model.eval()
        taken.append(timed(short._slopes, case.world.device))
    drop_views(case.adapters)
    return min(taken) / timed(lambda: exact.scores(case.layout, case.weights), case.world.device)


def main():
    """Measures and prints."""
    options = parser(__doc__)
    options.add_argument("--data", help="folder with stories260k_llama and e2e_nlg; else a random Llama")
    options.add_argument("--shape", choices=sorted(SHAPES), default="256x8")
    options.add_argument("--r", type=int, default=8)
    options.add_argument("--timed-r", type=int, default=2)
    options.add_argument("--grains", type=int, default=2)
    options.add_argument("--rows", type=int, default=2, help="of a grain")
    options.add_argument("--length", type=int, default=64, help="tokens of a random row, at most")
    options.add_argument("--steps", type=int, default=40, help="that adapters are trained")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--seeds", type=int, default=6)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        result = {
            "benchmark": "ab_lora",
            "machine": machine(),
            "arguments": described(arguments),
            "counted": counts(Case(arguments, arguments.r, 0, cache)),
            "timed": seconds(Case(arguments, arguments.timed_r, 0, cache), arguments.repeats),
            "shortlist_which_is_not_ab_lora": shortlists(arguments, cache),
        }
    write(result, arguments.out)


if __name__ == "__main__":
    main()
