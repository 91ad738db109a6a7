"""Several data sets with weights: what an epoch draws, in which order, as a function of seed and epoch; errors."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ardtrain import preflight, run_data
from ardtrain.config import ConfigError, load_config, parse_config
from ardtrain.config.resuming import differences
from ardtrain.data import DataError, EvalData, Source, TrainData
from ardtrain.data_mix import MOST_PASSES
from ardtrain.data_order import Part, TrainOrder, drawn_samples, mixed_order, permutation
from ardtrain.evaluation import held_out_loss
from ardtrain.fetching import tokenise
from ardtrain.planning.suggest import suggest
from tests.rows import row_settings as make
from tests.runs import write_run
from tests.tiny import single_world, tiny_llama
from tests.unit.test_data import CHAT, texts, tokenizer, write  # noqa: F401 - a fixture

PARTS = (Part(10, 25), Part(30, 30), Part(7, 9))


# ---- what an epoch draws: pure ----


def test_an_epoch_draws_by_the_weights_and_no_source_less_than_once():
    assert drawn_samples([10, 30], [3.0, 1.0]) == [90, 30]
    assert drawn_samples([10, 30], [1.0, 3.0]) == [10, 30]
    assert drawn_samples([10, 7], [0.1, 0.2]) == [10, 20]  # exact decimals: 0.2 is twice 0.1
    assert drawn_samples([3, 100], [2.0, 3.0]) == [67, 100]  # 66.7: off by half a sample at most
    assert drawn_samples([5], [0.25]) == [5]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_shares_are_exact_in_each_epoch_and_the_limiting_source_comes_once(epoch):
    order = mixed_order(PARTS, seed=3, epoch=epoch)
    owner = np.searchsorted([10, 40], order, side="right")
    assert np.bincount(owner).tolist() == [25, 30, 9]
    assert sorted(order[owner == 1].tolist()) == list(range(10, 40))
    assert (np.diff(np.flatnonzero(owner == 0)) > 1).any()  # the sources come mixed


def test_passes_go_on_over_epochs_each_in_another_order():
    orders = [mixed_order(PARTS, seed=3, epoch=epoch) for epoch in range(8)]
    listed = np.concatenate([order[order < 10] for order in orders])
    passes = listed.reshape(-1, 10)  # 8 x 25 samples: 20 passes
    assert all(sorted(one.tolist()) == list(range(10)) for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) == 20
    last = np.concatenate([order[order >= 40] for order in orders])
    counts = Counter(last.tolist())
    assert set(counts) == set(range(40, 47)) and max(counts.values()) - min(counts.values()) == 1


def test_an_order_hangs_on_seed_and_epoch_alone():
    one = mixed_order(PARTS, seed=3, epoch=2)
    assert one.tolist() == mixed_order(PARTS, seed=3, epoch=2).tolist()
    assert one.tolist() != mixed_order(PARTS, seed=4, epoch=2).tolist()
    # A source's own order is its own: another's size or weight changes when it comes, not what comes.
    other = mixed_order((Part(10, 25), Part(20, 50), Part(7, 9)), seed=3, epoch=2)
    assert one[one < 10].tolist() == other[other < 10].tolist()
    assert permutation(10, seed=1, epoch=0, purpose=1, source=0).tolist() == [3, 1, 7, 9, 4, 5, 0, 2, 8, 6]
    assert permutation(10, seed=1, epoch=0, purpose=1, source=1).tolist() != [3, 1, 7, 9, 4, 5, 0, 2, 8, 6]


@pytest.mark.parametrize("capacity", [None, 30])
def test_steps_of_a_mixture_in_any_order_of_asking(capacity):
    lengths = np.random.default_rng(0).integers(2, 20, 47)
    sizes = {"seed": 3, "capacity": capacity, "global_batch_size": 6, "grain_size": 2, "num_train_epochs": 2.5}
    whole = TrainOrder(lengths, **sizes, parts=PARTS)
    forward = [whole.grains(step) for step in range(whole.num_steps)]
    again = TrainOrder(lengths, **sizes, parts=PARTS)
    assert [again.grains(step) for step in reversed(range(whole.num_steps))] == forward[::-1]
    rows = [row for grains in forward for grain in grains for row in grain.rows]
    for epoch in range(2):
        drawn = Counter(s for row in rows if row.epoch == epoch for s in row.samples)
        assert drawn == Counter(mixed_order(PARTS, seed=3, epoch=epoch).tolist())
    if capacity is None:
        assert whole.num_rows(0) == 64
    before = np.concatenate(list(whole.samples_before(7)))
    assert before.tolist() == [
        s for grains in forward[:7] for grain in grains for row in grain.rows for s in row.samples
    ]


# ---- files ----

SIZES = {"global_batch_size": 4, "grain_size": 2, "num_train_epochs": 1.0}


def two_sources(tmp_path, weights=(3.0, 1.0), **changes):
    """Texts and completions with fields of their own, in two files."""
    first = write(tmp_path / "a.jsonl", texts(10))
    second = write(tmp_path / "b.jsonl", [{"q": "ab", "a": "cdef"[: 1 + n % 4]} for n in range(6)])
    settings = make(first, second, **changes)
    return settings, [
        Source("stories", replace(settings, train_files=(first,)), weights[0]),
        Source("sums", replace(settings, train_files=(second,), prompt_field="q", completion_field="a"), weights[1]),
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_sources_keep_their_names_fields_and_shares(tmp_path, tokenizer, packing):  # noqa: F811
    settings, sources = two_sources(tmp_path, packing=packing)
    data = TrainData(settings, tokenizer, tmp_path / "c", **SIZES, sources=sources)
    assert [(s.name, s.samples, s.drawn, s.fraction, s.passes) for s in data.shares] == [
        ("stories", 10, 18, 0.75, 1.8),
        ("sums", 6, 6, 0.25, 1.0),
    ]
    assert data.shares[0].text() == "stories: 10 samples, 75.0 % of an epoch, 1.80 passes in it"
    assert data.format == "mixed" and data.counts["samples"] == 16 and data.counts["bad"] == 0
    grains = [grain for step in range(data.num_steps) for grain in data.grains(step)]
    names = Counter(name.rsplit("/", 1)[1] for grain in grains for name in data.sample_ids(grain))
    assert {line: names[f"b.jsonl:{line}"] for line in range(1, 7)} == dict.fromkeys(range(1, 7), 1)
    assert sorted(names[f"a.jsonl:{line}"] for line in range(1, 11)) == [1, 1, *[2] * 8]
    stories = texts(10)
    tokens = {"stories": 0, "sums": 0}
    for grain in grains:
        batch = data.collate(grain)
        shown = "".join(tokenizer.convert_ids_to_tokens(batch.input_ids.flatten())).replace("<pad>", "")
        wanted = ""
        for name in data.sample_ids(grain):
            line = int(name.rsplit(":", 1)[1]) - 1
            text = stories[line]["text"] if "a.jsonl" in name else "ab" + "cdef"[: 1 + line % 4]
            tokens["stories" if "a.jsonl" in name else "sums"] += len(text) + 2
            wanted += f"<s>{text}</s>"
        assert shown == wanted
    drawn = data.drawn(data.num_steps)
    assert {name: own.tokens for name, own in drawn.items()} == tokens
    assert (drawn["stories"].samples, drawn["stories"].passes, drawn["sums"].samples) == (18, 1.8, 6)
    assert sum(own.samples for own in data.drawn(1).values()) >= 4


def test_sources_without_weights_are_one_list_of_files(tmp_path, tokenizer):  # noqa: F811
    settings, sources = two_sources(tmp_path, weights=(None, None), prompt_field="q", completion_field="a")
    sources[0] = replace(sources[0], settings=replace(sources[0].settings, format="text"))
    mixed = TrainData(settings, tokenizer, tmp_path / "c", **SIZES, sources=sources)
    both = write(tmp_path / "both.jsonl", [*texts(10), *texts(6, seed=1)])
    assert [mixed.grains(s) for s in range(4)] == [
        TrainData(make(both), tokenizer, tmp_path / "c", **SIZES).grains(s) for s in range(4)
    ]
    assert [share.passes for share in mixed.shares] == [1.0, 1.0]


def test_the_fingerprint_follows_what_decides_the_order(tmp_path, tokenizer):  # noqa: F811
    def fingerprint(*weights, names=("a", "b"), **changes):
        settings, sources = two_sources(tmp_path, weights, **changes)
        sources = [replace(source, name=name) for source, name in zip(sources, names, strict=True)]
        return TrainData(settings, tokenizer, tmp_path / "c", **SIZES, sources=sources).fingerprint

    one = fingerprint(3.0, 1.0)
    assert one == fingerprint(0.75, 0.25) == fingerprint(3.0, 1.0, names=("c", "d"))
    others = fingerprint(2.0, 1.0), fingerprint(None, None), fingerprint(3.0, 1.0, seed=8)
    assert len({one, *others, fingerprint(3.0, 1.0, max_length=40)}) == 5


def test_tokenised_rows_are_found_again_under_other_weights(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    settings, sources = two_sources(tmp_path)
    TrainData(settings, tokenizer, tmp_path / "c", **SIZES, sources=sources)
    monkeypatch.setattr("ardtrain.data_cache.Tokenising", None)
    sources = [replace(source, weight=1.0) for source in sources[::-1]]
    assert TrainData(settings, tokenizer, tmp_path / "c", **SIZES, sources=sources).num_samples == 16


def test_empty_sources_and_slips_in_weights_say_so(tmp_path, tokenizer):  # noqa: F811
    settings, sources = two_sources(tmp_path)
    empty = write(tmp_path / "e.jsonl", [])
    for format_, said in (("auto", "no row to detect the format from"), ("text", "no row is left to use")):
        nothing = Source("nothing", replace(settings, train_files=(empty,), format=format_), 1.0)
        with pytest.raises(DataError, match=rf"e\.jsonl: {said}"):
            TrainData(settings, tokenizer, tmp_path / "c", **SIZES, sources=[*sources, nothing])
    sources[1] = replace(sources[1], weight=0.001)  # 6 samples: 18,000 of the other's 10 go beside them
    with pytest.raises(
        ValueError, match=r"data\.sources: an epoch in which sums \(6 .* go 1,800 times through stories"
    ):
        TrainData(settings, tokenizer, tmp_path / "c", **SIZES, sources=sources)
    assert MOST_PASSES == 1000


def test_held_out_rows_of_sources_have_a_loss_each(tmp_path, tokenizer, world):  # noqa: F811
    settings, sources = two_sources(tmp_path)
    cache = {"tokenizer": tokenizer, "cache_dir": tmp_path / "c", "grain_size": 4}
    data = EvalData(settings, (), sources=sources, max_samples=5, **cache)
    assert [(grain.index, grain.source, len(grain.rows)) for grain in data.grains()] == [
        (0, "stories", 4), (1, "stories", 1), (2, "sums", 4), (3, "sums", 1),
    ]  # fmt: skip
    assert [row.row for grain in data.grains() for row in grain.rows] == list(range(10)) and data.num_samples == 10
    model = tiny_llama()
    found = held_out_loss(model, data, world=single_world())
    alone = {s.name: EvalData(settings, (), sources=[s], max_samples=5, **cache) for s in sources}
    losses = {name: held_out_loss(model, one, world=single_world()) for name, one in alone.items()}
    assert found.numbers() == {
        "loss": found.loss, "perplexity": found.perplexity,
        "stories_loss": losses["stories"].loss, "sums_loss": losses["sums"].loss,
    }  # fmt: skip
    assert found.num_tokens == sum(one.num_tokens for one in losses.values())
    batches = [data.collate(grain) for grain in data.grains()[2:]]
    plain = sum(
        float(F.cross_entropy(model(b.input_ids, attention_mask=b.attention_mask.long()).logits[:, :-1].flatten(0, 1),
                              b.labels[:, 1:].flatten(), reduction="sum"))
        for b in batches
    )  # fmt: skip
    assert found.others["sums_loss"] == pytest.approx(plain / sum(b.num_target_tokens for b in batches), rel=1e-5)
    chosen = EvalData(settings, (), sources=sources, choose=(7, 6), **cache)
    assert chosen.num_samples == 7 and {grain.source for grain in chosen.grains()} == {"stories", "sums"}
    assert torch.equal(chosen.collate(chosen.grains()[0]).input_ids, chosen.collate(chosen.grains()[0]).input_ids)


# ---- the config ----

BASE = {"model_name_or_path": "m", "output_dir": "o", "method": "lora"}
CHATS = {"file": "c.jsonl", "weight": 3, "messages_field": "turns", "eval_file": "d.jsonl"}
SUMS = {"file": ["s.jsonl", "t.jsonl"], "weight": 1, "prompt_field": "q", "eval_file": "u.jsonl"}


def data_of(**data):
    return parse_config(BASE | {"data": data}).data


def test_a_source_has_fields_of_its_own_and_the_blocks_else():
    data = data_of(sources={"chats": CHATS, "sums": SUMS}, prompt_template="{x}", completion_field="y")
    assert data.row_fields()["prompt_template"] == data.row_fields("chats")["prompt_template"] == "{x}"
    sums = data.row_fields("sums")
    assert (sums["prompt_template"], sums["prompt_field"], sums["completion_field"]) == (None, "q", "y")
    assert data.row_fields("chats")["messages_field"] == "turns" and sums["messages_field"] == "messages"
    assert data.training_files == ("c.jsonl", "s.jsonl", "t.jsonl")
    assert data.held_out_files == data.allocation_files == ("d.jsonl", "u.jsonl")
    assert data.files == ("c.jsonl", "s.jsonl", "t.jsonl", "d.jsonl", "u.jsonl")


def test_a_source_can_be_changed_by_its_name_on_the_command_line(tmp_path):
    path = write_run(tmp_path, data={"sources": {"chats": CHATS, "sums": SUMS}})
    config = load_config(path, ["data.sources.sums.weight=0.5", "metric_for_best_model=eval_sums_loss"])
    assert config.data.sources["sums"].weight == 0.5
    taken, refused = differences(load_config(path), config)  # the data's fingerprint decides at the resume
    assert [line for line in taken if "weight" in line] and not refused


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sources": {"a": {"file": "x", "weight": 0}}}, "data.sources.a.weight=0 must be greater than 0 (Share of"),
        ({"sources": {"a": {"file": "x", "weight": -1.5}}}, "data.sources.a.weight=-1.5 must be greater than 0"),
        ({"sources": {"a": {"file": "x", "weight": float("nan")}}}, "data.sources.a.weight=nan must be a finite numb"),
        ({"sources": {"a": {"file": "x", "wieght": 1}}}, "data.sources.a.wieght is no setting; did you mean data.sou"),
        ({"sources": {"a": {"weight": 1}}}, "data.sources.a.file is missing; set it"),
        ({"sources": {"a": {"file": "x", "prompt_template": "{"}}}, "data.sources.a.prompt_template is no str.format"),
        (
            {"sources": {"a": {"file": "x", "weight": 1}, "b": {"file": "y"}}},
            "data.sources.b.weight is missing, and other sources have one; give all a weight, or none",
        ),
        (
            {"sources": {"a": {"file": ["x", "z"]}, "b": {"file": "./z"}}},
            "data.sources.b.file=./z stands in sources.a already; remove it here and raise that one's weight",
        ),
        ({"sources": {"a": {"file": ["x", "x"]}}}, "data.sources.a.file=x stands in sources.a already"),
        ({"sources": {"a b": {"file": "x"}}}, "data.sources.a b is no name for a source"),
        ({"sources": {"a": {"file": "x"}}, "train_file": "y"}, "data.train_file=['y'] stands beside sources; make it"),
        (
            {"sources": {"a": {"file": "x", "eval_file": "y"}}, "eval_file": "z"},
            "data.eval_file=z stands beside sources.a.eval_file; remove one of them",
        ),
        ({"sources": {}}, "data.train_file is missing; set it"),
    ],
)
def test_wrong_sources_say_what_and_where(data, said):
    with pytest.raises(ConfigError) as error:
        data_of(**data)
    (line,) = str(error.value).splitlines()
    assert line.startswith(said)


# ---- from config to data ----


def write_chats(folder):
    rows = [
        {"turns": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(9)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"file": str(folder / "chats.jsonl"), "messages_field": "turns", "eval_file": str(folder / "chats.jsonl")}


def mixed_run(folder, name="mixed", **settings):
    """A run on sums and chats, three to one, with held-out rows of both."""
    chats = write_chats(folder) | {"weight": 1.0}
    sums = {"file": str(folder / "train.jsonl"), "eval_file": str(folder / "dev.jsonl"), "weight": 3.0}
    more = {"data": {"sources": {"sums": sums, "chats": chats}}, "chat_template": CHAT}
    return write_run(folder, name, **more | settings)


def test_open_data_tells_each_source(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDTRAIN_CACHE", str(tmp_path / "cache"))
    config, _ = preflight.read_run_config(mixed_run(tmp_path), [], world_size=1)
    train, held_out = run_data.open_data(config, run_data.tokenizer_of(config))
    assert [share.text() for share in train.shares] == [
        "sums: 72 samples, 75.0 % of an epoch, 1.00 passes in it",
        "chats: 9 samples, 25.0 % of an epoch, 2.67 passes in it",
    ]
    assert train.num_rows(0) == 96 and {grain.source for grain in held_out.grains()} == {"sums", "chats"}
    settings = run_data.held_out_settings(config)
    assert [one.train_files for one in settings] == [(path,) for path in config.data.held_out_files]
    assert settings[1].messages_field == "turns" and settings[0].messages_field == "messages"


def test_fetch_and_suggest_know_the_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDTRAIN_CACHE", str(tmp_path / "cache"))
    path = mixed_run(tmp_path, max_steps=None, num_train_epochs=8)
    assert tokenise(str(path), [])[1] == "  sums: 72 samples, 75.0 % of an epoch, 1.00 passes in it"
    out = tmp_path / "out.yaml"
    assert suggest([str(path), "--gpus", "1", "--out", str(out)]) == 0
    assert "96 rows an epoch" in out.read_text()
    assert load_config(out).data.sources == load_config(path).data.sources
