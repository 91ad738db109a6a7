"""Sequence classification: labels, rows, padding, loss, metrics, heads and loading, on tiny random models."""

import copy
import json
import logging
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from ardtrain.backbones import ModelSource, head_values, init_head, load_model, meta_model
from ardtrain.data import DataError, EvalData, Samples, TrainData, build_batch, find_labels
from ardtrain.data_labels import classification_pad_id
from ardtrain.evaluation import class_logits, classification_metrics, held_out_loss, loss_sum, token_loss_sum
from ardtrain.targets import find_sites, head_linears
from tests.rows import row_settings
from tests.threads import Threads
from tests.tiny import CPU, HeldOutBatches, equal_bits, single_world, sites_of_model, tiny_llama

LETTERS = "abcdefghijklmnopqrstuvwxyz \n"


def make_tokenizer(kind):
    """One token a character. bert: [CLS] a [SEP] b [SEP] with types; roberta: <s> a </s></s> b </s>; llama: <s> a;
    eos_end: <s> a </s> with the end token as padding; unk_pad: llama's, padded with <unk> as some checkpoints say."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] if kind == "bert" else ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*names, *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=names[3]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    first, end = (names[1], names[2]) if kind == "bert" else (names[0], names[2])
    template = {
        "bert": ("{f} $A {e}", "{f} $A {e} $B:1 {e}:1"),
        "roberta": ("{f} $A {e}", "{f} $A {e} {e} $B {e}"),
        "llama": ("{f} $A", "{f} $A {f}:1 $B:1"),
        "unk_pad": ("{f} $A", "{f} $A {f}:1 $B:1"),
        "eos_end": ("{f} $A {e}", "{f} $A {e} {f}:1 $B:1 {e}:1"),
    }[kind]
    single, pair = (text.format(f=first, e=end) for text in template)
    special = [(token, vocabulary[token]) for token in (first, end)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    special = {
        "bert": {"cls_token": first, "sep_token": end, "pad_token": "[PAD]"},
        "roberta": {"bos_token": first, "cls_token": first, "eos_token": end, "sep_token": end, "pad_token": "<pad>"},
        "llama": {"bos_token": first, "eos_token": end, "pad_token": "<pad>"},
        "unk_pad": {"bos_token": first, "eos_token": end, "pad_token": "<unk>"},
        "eos_end": {"bos_token": first, "eos_token": end, "pad_token": end},
    }[kind]
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=names[3], model_input_names=inputs, **special)


TOKENIZER_OF = {"bert": "bert", "deberta": "bert", "roberta": "roberta", "llama": "llama"}
FAMILIES = list(TOKENIZER_OF)


def family_config(family):
    common = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    if family == "bert":
        return BertConfig(**common)
    if family == "roberta":
        return RobertaConfig(**common, pad_token_id=1, type_vocab_size=1)
    if family == "deberta":
        return DebertaV2Config(
            **common,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        )
    return LlamaConfig(**common, num_key_value_heads=1, pad_token_id=None, use_cache=False)


def classifier(family, *, num_labels=3, seed=0):
    """A random classifier with its padding said, in eval mode."""
    config = family_config(family)
    config.num_labels = num_labels
    config.pad_token_id = classification_pad_id(make_tokenizer(TOKENIZER_OF[family]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config).eval()


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make(*files, **changes):
    return row_settings(*files, **({"format": "classification", "labels": ("no", "yes", "maybe")} | changes))


def pairs(count, *, seed=0, num_labels=3):
    """Rows of two texts of unlike lengths with a label."""
    numbers = np.random.default_rng(seed)

    def text():
        return "".join(numbers.choice(list("abcdef"), numbers.integers(1, 15)))

    return [{"text": text(), "text_pair": text(), "label": int(numbers.integers(num_labels))} for _ in range(count)]


def tokens(tokenizer, samples, index):
    return "".join(tokenizer.convert_ids_to_tokens(samples.read([index])[0][0]))


# ---- labels ----


def test_labels_are_found_in_a_fixed_way(tmp_path):
    numbers = write(tmp_path / "a.jsonl", [{"label": 3}, {"label": 0}, "\n", {"label": 3}])
    for none in (None, ()):
        assert find_labels([make(numbers, labels=none)]) == ("0", "1", "2", "3")
    texts = write(tmp_path / "b.jsonl", [{"y": "b"}, {"y": "B"}, {"y": "b"}])
    more = write(tmp_path / "c.jsonl", [{"y": "a"}])
    settings, other = make(texts, more, labels=None, label_field="y"), make(more, texts, labels=None, label_field="y")
    assert find_labels([settings]) == find_labels([other]) == ("B", "a", "b")
    renamed = make(write(tmp_path / "d.jsonl", [{"z": "c"}]), labels=None, label_field="z")
    assert find_labels([settings, renamed]) == ("B", "a", "b", "c")
    given = make(texts, more, labels=("b", "a", "B", "never seen"), label_field="y")
    assert find_labels([given]) == ("b", "a", "B", "never seen")


BAD_LABELS = [
    ({"text": "a"}, "field 'label' is missing"),
    ({"label": None}, "is null, neither a whole number nor text"),
    ({"label": True}, "is a bool, neither"),
    ({"label": 1.0}, "is a float, neither"),
    ({"label": ""}, "the label in field 'label' is empty"),
    ({"label": -1}, "label -1 in field 'label' is outside 0 .. 65535"),
    ({"label": 10**9}, "label 1000000000 in field 'label' is outside"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_LABELS)
def test_bad_label_names_file_line_rule_remedy(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", [{"label": 1}, "\n", row, {"label": 0}])
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{reason}.*; correct the row, or .*on_bad_row: skip"):
        find_labels([make(path, labels=None)])
    assert find_labels([make(path, labels=None, on_bad_row="skip")]) == ("0", "1")


def test_mixed_unknown_and_too_few_labels(tmp_path):
    mixed = write(tmp_path / "a.jsonl", [{"label": 1}, {"label": "yes"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: label 'yes' is a str, unlike .*a\.jsonl:1; write all labels the"):
        find_labels([make(mixed, labels=None, on_bad_row="skip")])
    unknown = write(tmp_path / "b.jsonl", [{"label": "yes"}, {"label": "mabe"}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: label 'mabe' is unknown: did you mean 'maybe'\?"):
        find_labels([make(unknown)])
    large = write(tmp_path / "c.jsonl", [{"label": 2}, {"label": 3}])
    with pytest.raises(DataError, match=r"c\.jsonl:2: label 3 is unknown: there are 3 classes, 0 \.\. 2"):
        find_labels([make(large)])
    one = write(tmp_path / "d.jsonl", [{"label": "yes"}, {"label": "yes"}])
    with pytest.raises(DataError, match="holds the one label 'yes'; two classes at least are needed"):
        find_labels([make(one, labels=None)])
    with pytest.raises(DataError, match="holds no label; two classes"):
        find_labels([make(write(tmp_path / "e.jsonl", []), labels=None)])
    (tmp_path / "f.txt").write_text("a")
    with pytest.raises(ValueError, match="is plain text and holds no labels"):
        find_labels([make(str(tmp_path / "f.txt"), labels=None)])
    for labels in (("a",), ("a", "a")):
        with pytest.raises(ValueError, match="two or more different names"):
            make("a.jsonl", labels=labels)


# ---- rows ----


@pytest.mark.parametrize(
    ("kind", "single", "pair", "types"),
    [
        ("bert", "[CLS]ab[SEP]", "[CLS]ab[SEP]cde[SEP]", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("roberta", "<s>ab</s>", "<s>ab</s></s>cde</s>", []),
        ("llama", "<s>ab", "<s>ab\ncde", []),
        ("eos_end", "<s>ab</s>", "<s>ab\ncde</s>", []),
    ],
)
def test_texts_and_pairs_get_the_tokenizers_own_special_tokens(tmp_path, kind, single, pair, types):
    tokenizer = make_tokenizer(kind)
    path = write(tmp_path / "a.jsonl", [{"text": "ab", "text_pair": "cde", "label": "yes"}, {"text": "b", "label": 0}])
    first = write(tmp_path / "b.jsonl", [{"text": "ab", "text_pair": "cde", "label": "yes"}])
    alone = Samples(make(path), tokenizer, tmp_path / "c")
    assert alone.format == "classification" and tokens(tokenizer, alone, 0) == single
    assert [list(map(len, alone.classes([0, 1])[1])), alone.classes([1, 0])[0]] == [[0, 0], [0, 1]]
    both = Samples(make(first, text_pair_field="text_pair"), tokenizer, tmp_path / "c")
    assert tokens(tokenizer, both, 0) == pair
    assert both.classes([0])[1][0].tolist() == types
    assert not both.read([0])[0][1].any()  # no token is a target
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'text_pair' is missing"):
        Samples(make(path, text_pair_field="text_pair"), tokenizer, tmp_path / "c")


def test_truncation_keeps_the_special_tokens_and_cuts_the_longer_text(tmp_path):
    tokenizer = make_tokenizer("bert")
    tokenizer.truncation_side = "left"
    rows = [{"text": "abcdef", "text_pair": "xyz", "label": 0}, {"text": "a", "text_pair": "x", "label": 1}]
    settings = make(write(tmp_path / "a.jsonl", rows), text_pair_field="text_pair", max_length=8)
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row has 12 tokens, max_length=8"):
        Samples(
            make(*settings.train_files, text_pair_field="text_pair", max_length=8, truncation="error"),
            tokenizer,
            tmp_path / "c",
        )
    dropped = Samples(settings, tokenizer, tmp_path / "c")
    assert dropped.counts == {"rows": 2, "bad": 0, "too_long": 1, "truncated": 0, "samples": 1}
    cut = make(*settings.train_files, text_pair_field="text_pair", max_length=8, truncation="right")
    right = Samples(cut, tokenizer, tmp_path / "c")
    assert right.counts == {"rows": 2, "bad": 0, "too_long": 0, "truncated": 1, "samples": 2}
    # 8 - 3 special tokens leave 5 of 6 + 3: three of the longer text, two of the other
    assert tokens(tokenizer, right, 0) == "[CLS]abc[SEP]xy[SEP]" and right.lengths.tolist() == [8, 5]
    assert right.classes([0])[1][0].tolist() == [0] * 5 + [1] * 3
    assert tokenizer.truncation_side == "left"
    with pytest.raises(ValueError, match="max_length=3 leaves no room for text beside 3 special tokens"):
        Samples(make(*settings.train_files, text_pair_field="text_pair", max_length=3), tokenizer, tmp_path / "c")
    joined = Samples(cut, make_tokenizer("llama"), tmp_path / "c")
    assert tokens(make_tokenizer("llama"), joined, 0) == "<s>abcdef\n"


def test_broken_rows_are_refused_or_skipped(tmp_path):
    tokenizer = make_tokenizer("llama")
    good = {"text": "ab", "label": 1}
    bad = [
        ({"text": " ", "label": 1}, "the text in field 'text' is empty"),
        ({"text": 5, "label": 1}, "field 'text' is a int, not text"),
        ({"text": "ab", "label": "on"}, "label 'on' is unknown"),
        ({"text": "ab", "label": 7}, "label 7 is unknown"),
        ({"text": "ab<pad>", "label": 1}, r"the text holds the token that pads batches, '<pad>' \(id 1\)"),
    ]
    for row, reason in bad:
        path = write(tmp_path / "a.jsonl", [good, row])
        with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}.*; correct the row"):
            Samples(make(path), tokenizer, tmp_path / "c")
    path = write(tmp_path / "a.jsonl", [good, *[row for row, _ in bad], good])
    skipped = Samples(make(path, on_bad_row="skip"), tokenizer, tmp_path / "c")
    assert skipped.counts == {"rows": 7, "bad": 5, "too_long": 0, "truncated": 0, "samples": 2}
    assert [name.rsplit(":", 1)[1] for name in skipped.ids([0, 1])] == ["1", "7"]


def test_settings_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "ab", "label": 1}])
    with pytest.raises(ValueError, match="packing=true does not go with data.format=classification"):
        make(path, packing=True)
    for none in (None, ()):
        with pytest.raises(ValueError, match="needs the names of its labels; find_labels"):
            Samples(make(path, labels=none), make_tokenizer("bert"), tmp_path / "c")
    (tmp_path / "a.txt").write_text("ab")
    with pytest.raises(ValueError, match="is plain text"):
        Samples(make(str(tmp_path / "a.txt")), make_tokenizer("bert"), tmp_path / "c")


def test_cache_knows_labels_and_fields(tmp_path):
    tokenizer = make_tokenizer("bert")
    path = write(tmp_path / "a.jsonl", [{"text": "ab", "text_pair": "c", "label": 1}])
    changes = ({}, {"labels": ("yes", "no")}, {"text_pair_field": "text_pair"})
    keys = [Samples(make(path, **c), tokenizer, tmp_path / "c").cache_key for c in changes]
    assert len(set(keys)) == 3


def test_other_formats_have_no_class(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "ab"}])
    data = TrainData(
        make(path, format="text", labels=None),
        make_tokenizer("llama"),
        tmp_path / "c",
        global_batch_size=1,
        grain_size=1,
        max_steps=1,
    )
    batch = data.collate(data.grains(0)[0])
    assert batch.class_labels is None and batch.token_type_ids is None
    assert batch.num_target_tokens == 3  # a, b and the end


# ---- padding ----


def test_padding_is_never_a_real_token():
    assert classification_pad_id(make_tokenizer("bert")) == 0
    assert classification_pad_id(make_tokenizer("roberta")) == 1
    assert classification_pad_id(make_tokenizer("llama")) == 1
    assert classification_pad_id(make_tokenizer("unk_pad")) == 2  # not <unk>, which a text may give: the end token
    # Rows end with the end token, the tokenizer's padding: only <unk> is left.
    assert classification_pad_id(make_tokenizer("eos_end")) == 3
    bare = make_tokenizer("llama")
    bare.pad_token = None
    assert classification_pad_id(bare) == bare.eos_token_id == 2
    none = PreTrainedTokenizerFast(tokenizer_object=bare.backend_tokenizer, bos_token="<s>")
    with pytest.raises(ValueError, match="no special token free for padding.*set tokenizer.pad_token"):
        classification_pad_id(none)


def test_end_token_as_padding_is_counted_wrongly_and_ours_is_not(tmp_path):
    """transformers takes the rightmost token that is not the padding: with eos for it, the one before the real eos."""
    tokenizer = make_tokenizer("eos_end")
    path = write(tmp_path / "a.jsonl", [{"text": "ab", "label": 1}, {"text": "abcdefg", "label": 0}])
    data = EvalData(make(path), [path], tokenizer, tmp_path / "c", grain_size=2)
    batch = data.collate(data.grains()[0])
    assert batch.input_ids[0].tolist() == [0, 4, 5, 2, *[data.pad_token_id] * 5] and data.pad_token_id == 3
    model = classifier("llama")
    with torch.no_grad():
        all_logits = model.score(model.model(input_ids=batch.input_ids[:1, :4]).last_hidden_state)[0]
        found = {}
        for pad in (tokenizer.eos_token_id, data.pad_token_id):
            model.config.pad_token_id = pad
            padded = replace(batch, input_ids=torch.where(batch.attention_mask, batch.input_ids, pad))
            found[pad] = class_logits(model, padded, device=CPU)[0]
    torch.testing.assert_close(found[2], all_logits[2], rtol=0, atol=1e-5)  # wrong: that of "b"
    torch.testing.assert_close(found[3], all_logits[3], rtol=0, atol=1e-5)  # right: that of the end token
    assert (found[2] - found[3]).abs().max() > 1e-2


# ---- batches and loss ----


def row(*ids):
    return [(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool))]


def test_batch_of_classes_by_hand():
    types = [np.array([0, 0, 1, 1]), np.array([0, 1])]
    batch = build_batch(
        [row(1, 5, 6, 2), row(1, 7)], packed=False, pad_token_id=0, class_labels=[2, 0], token_type_ids=types
    )
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 7, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.labels.tolist() == [[-100] * 4] * 2
    assert batch.class_labels.tolist() == [2, 0] and batch.class_labels.dtype == torch.int64
    assert batch.token_type_ids.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch.token_type_ids.dtype == torch.int64
    assert (batch.num_target_tokens, batch.num_tokens) == (2, 6)


def batches(family, tmp_path, grain_size, *, count=7):
    path = write(tmp_path / "rows.jsonl", pairs(count))
    settings = make(path, text_pair_field="text_pair")
    data = EvalData(settings, [path], make_tokenizer(TOKENIZER_OF[family]), tmp_path / "c", grain_size=grain_size)
    return data, [data.collate(grain) for grain in data.grains()]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_gives_the_rows_own_losses_and_gradients(tmp_path, family):
    model = classifier(family)
    _, (together,) = batches(family, tmp_path, 7)
    _, alone = batches(family, tmp_path, 1)
    assert len({b.input_ids.shape[1] for b in alone}) > 3  # unlike lengths
    assert (together.token_type_ids is not None) == (TOKENIZER_OF[family] == "bert")
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss_and_gradient(some):
        loss = sum(loss_sum(model, b, device=CPU) for b in some)
        return loss.item(), torch.autograd.grad(loss, trained, allow_unused=True)

    loss, gradient = loss_and_gradient([together])
    rows_loss, rows_gradient = loss_and_gradient(alone)
    assert loss == pytest.approx(rows_loss, abs=1e-5)
    largest = 0.0
    for ours, theirs in zip(gradient, rows_gradient, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            largest = max(largest, float(ours.abs().max()))
    assert largest > 0.1
    # The loss itself in float64, from each row's own logits.
    expected = 0.0
    with torch.no_grad():
        for batch in alone:
            inputs = {"input_ids": batch.input_ids}
            if batch.token_type_ids is not None:
                inputs["token_type_ids"] = batch.token_type_ids
            logits = model(**inputs).logits[0].double().numpy()
            expected += math.log(np.exp(logits).sum()) - logits[int(batch.class_labels)]
    assert loss == pytest.approx(expected, abs=1e-5)
    assert together.num_target_tokens == 7


def test_token_types_reach_the_model(tmp_path):
    model = classifier("bert")
    _, (batch,) = batches("bert", tmp_path, 7)
    with_types = class_logits(model, batch, device=CPU)
    plain = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    assert (with_types - plain).abs().max() > 1e-2


def test_language_models_keep_their_loss():
    data = HeldOutBatches(num_grains=1)
    batch = data.collate(data.grains()[0])
    model = tiny_llama()
    ours = loss_sum(model, batch, device=CPU)
    assert equal_bits(ours, token_loss_sum(model, batch, device=CPU))
    held_out = held_out_loss(model, data, world=single_world())
    assert held_out.metrics == {}
    assert held_out.numbers() == {"loss": held_out.loss, "perplexity": math.exp(held_out.loss)}


# ---- metrics ----


def naive_metrics(labels, predictions, num_classes):
    """The three metrics from counts, in plain Python."""
    both = list(zip(labels, predictions, strict=True))

    def f1(c):
        hits = sum(y == p == c for y, p in both)
        misses = sum((y == c) != (p == c) for y, p in both)
        return 2 * hits / (2 * hits + misses) if hits or misses else None

    scores = [f1(1)] if num_classes == 2 else [f1(c) for c in range(num_classes)]
    scores = [s for s in scores if s is not None]
    n, right = len(both), sum(y == p for y, p in both)
    real, told = Counter(labels), Counter(predictions)
    # Gorodkin's R_K (2004): covariances over the confusion counts
    cov = right * n - sum(real[c] * told[c] for c in range(num_classes))
    spread = (n * n - sum(v * v for v in told.values())) * (n * n - sum(v * v for v in real.values()))
    return {
        "accuracy": right / n,
        "f1": sum(scores) / len(scores) if scores else 0.0,
        "matthews_correlation": cov / math.sqrt(spread) if spread else 0.0,
    }


def test_metrics_by_hand():
    # two classes: 2 hits of class 1, 1 false alarm, 1 miss, 1 right rejection
    found = classification_metrics(np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0]), num_classes=2)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    nothing = classification_metrics(np.zeros(4, dtype=int), np.zeros(4, dtype=int), num_classes=2)
    assert nothing == {"accuracy": 1.0, "f1": 0.0, "matthews_correlation": 0.0}


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_metrics_against_counting(num_classes):
    numbers = np.random.default_rng(num_classes)
    labels = numbers.integers(0, num_classes, 60)
    predictions = np.where(numbers.random(60) < 0.6, labels, numbers.integers(0, num_classes, 60))
    expected = naive_metrics(labels.tolist(), predictions.tolist(), num_classes)
    assert classification_metrics(labels, predictions, num_classes=num_classes) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_held_out_metrics_are_the_same_for_any_number_of_processes(tmp_path, family):
    model = classifier(family)
    data, collated = batches(family, tmp_path, 3, count=22)
    assert [len(b.class_labels) for b in collated] == [3] * 7 + [1]
    results = {}
    for world_size in (1, 2, 3, 9):
        models = [copy.deepcopy(model).train() for _ in range(world_size)]

        def work(world, models=models):
            return held_out_loss(models[world.global_rank], data, world=world)

        found = Threads(world_size).results(work)
        assert all(result == found[0] for result in found) and found[0] is not None
        assert all(m.training for m in models)
        results[world_size] = found[0]
    assert results[1] == results[2] == results[3] == results[9]
    with torch.no_grad():
        logits = torch.cat([class_logits(model, b, device=CPU) for b in collated])
    labels = torch.cat([b.class_labels for b in collated])
    expected = naive_metrics(labels.tolist(), logits.argmax(-1).tolist(), 3)
    assert results[1].metrics == pytest.approx(expected, abs=1e-12) and 0 < expected["accuracy"] < 1
    assert results[1].loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-6)
    assert results[1].num_tokens == 22
    assert results[1].numbers() == {"loss": results[1].loss, **results[1].metrics}


def test_held_out_loss_asks_the_loss_it_is_given(tmp_path):
    model = classifier("bert")
    data, collated = batches("bert", tmp_path, 3)

    def doubled(*args, **settings):
        return 2 * loss_sum(*args, **settings)

    plain = held_out_loss(model, data, world=single_world())
    twice = held_out_loss(model, data, world=single_world(), loss_sum=doubled)
    assert twice.loss == pytest.approx(2 * plain.loss, rel=1e-6) and twice.metrics == plain.metrics


# ---- heads ----

HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "deberta": ["pooler.dense", "classifier"],
    "llama": ["score"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_what_lies_outside_the_base_and_no_site(family):
    model = classifier(family)
    head = head_linears(model)
    assert list(head) == HEADS[family]
    settings = {"exclude_modules": None, "r": 2, "lora_alpha": 4.0, "tower_settings": {}}
    sites, _ = find_sites(model, target_modules="all-linear", **settings)
    names = [site.module for site in sites]
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert names == [n for n in linears if n not in head] and len(names) > 10
    with pytest.raises(ValueError, match="matches no linear layer"):
        find_sites(model, target_modules=[HEADS[family][-1]], **settings)
    assert head_linears(model.base_model) == {}


def test_language_model_has_no_head_and_keeps_its_sites():
    model = tiny_llama()
    assert head_linears(model) == {} and head_values(model, 1) == {}
    sites, _ = sites_of_model(model, r=2, lora_alpha=4.0)
    assert len(sites) == 14 and all("lm_head" not in s.module for s in sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_values_depend_on_seed_and_path_alone(family):
    torch.manual_seed(1)
    one, two = classifier(family, seed=1), classifier(family, seed=2)
    before = {n: p.clone() for n, p in one.named_parameters()}
    init_head(one, 5)
    torch.rand(3)
    init_head(two, 5)
    names = {f"{path}.{n}" for path, m in head_linears(one).items() for n, _ in m.named_parameters()}
    assert names == set(head_values(one, 5))
    for name, parameter in one.named_parameters():
        assert equal_bits(parameter, two.get_parameter(name)) == (name in names or family_constant(parameter)), name
        assert equal_bits(parameter, before[name]) == (name not in names or name.endswith(".bias")), name
    values, others = head_values(one, 5), head_values(one, 6)
    weights = [name for name in names if name.endswith("weight")]
    assert all(not torch.equal(values[n], others[n]) for n in weights)
    assert all(not values[n].any() for n in names if n.endswith("bias"))
    wide = family_config(family)
    wide.num_labels = 500
    with torch.device("meta"):
        shapes = AutoModelForSequenceClassification.from_config(wide)
    large = head_values(shapes, 5)[HEADS[family][-1] + ".weight"]
    assert large.shape == (500, 16) and float(large.std()) == pytest.approx(0.2, rel=0.05)
    assert abs(float(large.mean())) < 0.01


def family_constant(parameter):
    """Norms and biases: transformers starts them at 1 and 0, whatever the seed."""
    return bool((parameter == parameter.flatten()[0]).all())


# ---- loading ----


def save_base(family, folder):
    config = family_config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoModel.from_config(config).save_pretrained(folder)
    return ModelSource(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_classifier_is_loaded_on_the_bases_weights(tmp_path, caplog, monkeypatch, family):
    source = save_base(family, tmp_path)
    pad = classification_pad_id(make_tokenizer(TOKENIZER_OF[family]))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        model = load_model(
            source, compute_dtype="fp32", num_labels=3, label_names=("no", "yes", "maybe"), pad_token_id=pad
        )
    assert "LOAD REPORT" not in caplog.text
    base = AutoModel.from_pretrained(tmp_path)
    for name, parameter in base.named_parameters():
        if not (name.startswith("pooler.") and family == "roberta"):  # its classifier builds the base without a pooler
            assert equal_bits(model.base_model.get_parameter(name), parameter), name
    assert list(head_linears(model)) == HEADS[family]
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"} and model.config.label2id["maybe"] == 2
    assert model.config.pad_token_id == pad and model.config.num_labels == 3
    init_head(model, 5)
    shapes = meta_model(source, num_labels=3)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(equal_bits(v, model.get_parameter(n)) for n, v in head_values(shapes, 5).items())
    _, (together,) = batches(family, tmp_path, 7)
    _, alone = batches(family, tmp_path, 1)
    with torch.no_grad():
        model.eval()
        rows = torch.cat([class_logits(model, b, device=CPU) for b in alone])
        torch.testing.assert_close(class_logits(model, together, device=CPU), rows, rtol=0, atol=1e-5)


def test_head_of_another_shape_is_no_obstacle(tmp_path):
    classifier("bert", num_labels=5).save_pretrained(tmp_path)
    model = load_model(ModelSource(str(tmp_path)), compute_dtype="bf16", num_labels=2, pad_token_id=0)
    assert model.classifier.weight.shape == (2, 16) and model.classifier.weight.dtype == torch.bfloat16
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_base_with_holes_is_refused(tmp_path):
    BertForMaskedLM(family_config("bert")).save_pretrained(tmp_path)  # has no pooler
    with pytest.raises(ValueError, match=r"lacks 2 tensors of the base.*bert\.pooler\.dense\.bias.*stay frozen at"):
        load_model(ModelSource(str(tmp_path)), compute_dtype="fp32", num_labels=2, pad_token_id=0)


def test_padding_that_does_not_fit_the_model_is_refused(tmp_path):
    RobertaModel(family_config("roberta")).save_pretrained(tmp_path / "r")
    with pytest.raises(ValueError, match=r"pads with token 3, but the model counts positions \(roberta.* padding 1"):
        load_model(ModelSource(str(tmp_path / "r")), compute_dtype="fp32", num_labels=2, pad_token_id=3)
    BertModel(family_config("bert")).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="pads with token 40, but the model has 40 tokens"):
        load_model(ModelSource(str(tmp_path / "b")), compute_dtype="fp32", num_labels=2, pad_token_id=40)
    LlamaModel(family_config("llama")).save_pretrained(tmp_path / "l")
    model = load_model(ModelSource(str(tmp_path / "l")), compute_dtype="fp32", num_labels=2, pad_token_id=3)
    assert model.config.pad_token_id == 3


def test_language_model_is_loaded_as_before(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = load_model(ModelSource(str(tmp_path)), compute_dtype="fp32")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.pad_token_id == 3
    assert type(meta_model(ModelSource(str(tmp_path)))).__name__ == "LlamaForCausalLM"


# ---- real data ----


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "classes", "pair"),
    [("sst2", 2, False), ("cola", 2, False), ("mrpc", 2, True), ("rte", 2, True), ("banking77", 77, False)],
)
def test_real_rows_keep_their_labels_and_texts(tmp_path, data_dir, name, classes, pair):
    train, dev = (data_dir / name / f"{part}.jsonl" for part in ("train", "dev"))
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "stories260k_llama")
    raw = make(
        str(train), labels=None, text_pair_field="text_pair" if pair else None, max_length=512, truncation="right"
    )
    labels = find_labels([raw])
    assert labels == tuple(str(i) for i in range(classes))
    settings = make(str(train), labels=labels, text_pair_field=raw.text_pair_field, max_length=512, truncation="right")
    data = TrainData(settings, tokenizer, tmp_path, global_batch_size=64, grain_size=32, num_train_epochs=1.0)
    rows = rows_of(train)
    assert data.counts["bad"] == data.counts["too_long"] == 0 and data.num_samples == len(rows)
    counted = Counter()
    for step in range(data.num_steps):
        for grain in data.grains(step):
            batch = data.collate(grain)
            counted.update(batch.class_labels.tolist())
            assert batch.num_target_tokens == len(grain.rows) and (batch.labels == -100).all()
    assert counted == Counter(r["label"] for r in rows) and len(counted) == classes
    held_out = EvalData(settings, [str(dev)], tokenizer, tmp_path, grain_size=16)
    batch = held_out.collate(held_out.grains()[0])
    assert batch.class_labels.tolist() == [r["label"] for r in rows_of(dev)[:16]]
    for i, r in enumerate(rows_of(dev)[:16]):
        text = r["text"] + ("\n" + r["text_pair"] if pair else "")
        ids = batch.input_ids[i][batch.attention_mask[i]]
        assert ids[0] == tokenizer.bos_token_id and (ids != held_out.pad_token_id).all()
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_real_names_of_labels(tmp_path, data_dir):
    train = data_dir / "banking77" / "train.jsonl"
    names = json.loads((data_dir / "banking77" / "labels.json").read_text())
    by_name = make(str(train), labels=None, label_field="name")
    assert find_labels([by_name]) == tuple(sorted(names)) and len(names) == 77
    given = make(str(train), labels=tuple(names))
    assert find_labels([given]) == tuple(names)


def test_tiny_pretrained_llama_classifies_padded_rows_as_single_ones(tmp_path, data_dir):
    folder = data_dir / "stories260k_llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dev = str(data_dir / "rte" / "dev.jsonl")
    settings = make(dev, labels=("0", "1"), text_pair_field="text_pair", max_length=512)
    together = EvalData(settings, [dev], tokenizer, tmp_path, grain_size=6, max_samples=6)
    alone = EvalData(settings, [dev], tokenizer, tmp_path, grain_size=1, max_samples=6)
    model = load_model(
        ModelSource(str(folder)), compute_dtype="fp32", num_labels=2, pad_token_id=together.pad_token_id
    ).eval()
    init_head(model, 1)
    assert model.config.pad_token_id == tokenizer.eos_token_id  # its padding doubles as <unk>
    with torch.no_grad():
        padded = class_logits(model, together.collate(together.grains()[0]), device=CPU)
        single = torch.cat([class_logits(model, alone.collate(g), device=CPU) for g in alone.grains()])
    torch.testing.assert_close(padded, single, rtol=0, atol=1e-5)
