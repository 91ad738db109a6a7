"""Kinds of damage to a checkpoint, generated: each is refused with the file named, and `auto` takes the one before.

Three sorts: bytes that changed under a sound manifest; contents that no sane program wrote under a manifest that was
sealed anew; and random bits of the two headers. Nothing but a CheckpointError may come out.
"""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ardtrain import checkpoint
from ardtrain.checkpoint import CheckpointError, OtherRunError
from tests.checkpoints import (
    IDENTITY,
    LOOP,
    assert_same,
    load,
    load_newest,
    random_snapshot,
    reseal,
    write_adapter,
)

PARTS = [f"state/arena-0000{i}-of-00002.safetensors" for i in (1, 2)]
FILES = ["manifest.json", "state/trainer.json", "adapter/adapter_config.json", *PARTS]
OLD, NEW = "checkpoint-10", "checkpoint-20"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run folder with two checkpoints of two parts each, never changed; and their snapshots."""
    run_dir = tmp_path_factory.mktemp("sound")
    snapshots = {}
    for step, seed in ((10, 1), (20, 2)):
        snapshot, layout = random_snapshot(seed=seed)
        snapshots[step] = snapshot
        writers = [checkpoint.Writer(run_dir, global_rank=i, world_size=2) for i in range(2)]
        attempt = writers[0].prepare(step)
        for writer in writers:
            writer.start(
                attempt, snapshot, layout, step=step, loop=LOOP, identity=IDENTITY, write_adapter=write_adapter
            )
        assert [writer.wait() for writer in writers] == [None, None]
    assert_same(load(run_dir / NEW).snapshot, snapshots[20])
    return run_dir, snapshots


@pytest.fixture
def run_dir(sound, tmp_path):
    shutil.copytree(sound[0], tmp_path / "run")
    return tmp_path / "run"


def refused(run_dir, sound, *, named=NEW):
    """The newest is refused and named in the text; `auto` takes the one before it, to the bit."""
    with pytest.raises(CheckpointError) as caught:
        load(run_dir / NEW)
    text = str(caught.value)
    assert str(run_dir / NEW) in text and named in text
    assert text.isprintable(), text
    assert not isinstance(caught.value, OtherRunError)
    loaded, skipped = load_newest(run_dir)
    assert loaded.path == run_dir / OLD
    assert skipped == [text]
    assert_same(loaded.snapshot, sound[1][10])


# ---- bytes that changed ----


def truncate(keep):
    def damage(file):
        content = file.read_bytes()
        file.write_bytes(content[: keep(len(content))])

    return damage


def flip(place):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[place(len(content))] ^= 0x10
        file.write_bytes(content)

    return damage


def become(make):
    def damage(file):
        content = file.read_bytes()
        file.unlink()
        make(file, content)

    return damage


def linked(file, content):
    other = file.with_name("other")
    other.write_bytes(content)
    file.symlink_to(other)


BYTES = {
    "half of it": truncate(lambda n: n // 2),
    "last byte gone": truncate(lambda n: n - 1),
    "first byte alone": truncate(lambda n: 1),
    "emptied": truncate(lambda n: 0),
    "first byte flipped": flip(lambda n: 0),
    "a byte flipped in the middle": flip(lambda n: n // 2),
    "last byte flipped": flip(lambda n: -1),
    "a byte more": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "zeros instead": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "random bytes instead": lambda file: file.write_bytes(random.Random(0).randbytes(file.stat().st_size)),
    "removed": become(lambda file, content: None),
    "a folder": become(lambda file, content: file.mkdir()),
    "a link": become(linked),
    "a link to nowhere": become(lambda file, content: file.symlink_to("nowhere")),
    "a link to itself": become(lambda file, content: file.symlink_to(file.name)),
    "a pipe": become(lambda file, content: os.mkfifo(file)),
    "full of holes": become(lambda file, content: (file.touch(), os.truncate(file, 1 << 40))),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", BYTES)
def test_changed_bytes(run_dir, sound, name, damage):
    BYTES[damage](run_dir / NEW / name)
    refused(run_dir, sound, named=name)


def exchange(run_dir, one, other):
    a, b = run_dir / NEW / one, run_dir / NEW / other
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


FOLDERS = {
    "two parts exchanged": lambda run: exchange(run, *PARTS),
    "a part of the checkpoint before": lambda run: shutil.copy(run / OLD / PARTS[0], run / NEW / PARTS[0]),
    "the trainer of the checkpoint before": lambda run: shutil.copy(
        run / OLD / "state/trainer.json", run / NEW / "state/trainer.json"
    ),
    "the manifest of the checkpoint before": lambda run: shutil.copy(
        run / OLD / "manifest.json", run / NEW / "manifest.json"
    ),
    "state removed": lambda run: shutil.rmtree(run / NEW / "state"),
    "adapter removed": lambda run: shutil.rmtree(run / NEW / "adapter"),
    "state a link": lambda run: (
        (run / NEW / "state").rename(run / "state"),
        (run / NEW / "state").symlink_to(run / "state"),
    ),
    "state a file": lambda run: (shutil.rmtree(run / NEW / "state"), (run / NEW / "state").write_text("x")),
    "empty": lambda run: (shutil.rmtree(run / NEW), (run / NEW).mkdir()),
    "half-written: no manifest yet": lambda run: (run / NEW / "manifest.json").unlink(),
    "half-written: one part": lambda run: ((run / NEW / "manifest.json").unlink(), (run / NEW / PARTS[1]).unlink()),
    "the checkpoint before under its name": lambda run: (
        shutil.rmtree(run / NEW),
        shutil.copytree(run / OLD, run / NEW),
    ),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_changed_folder(run_dir, sound, damage):
    FOLDERS[damage](run_dir)
    refused(run_dir, sound)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_disk_does_not_give(run_dir, sound, name, monkeypatch):
    """EIO on reading: what a failing disk says. A library that maps the file would end the process."""
    bad = (run_dir / NEW / name).stat().st_ino
    from ardtrain.checkpoint import strictjson

    class Failing(strictjson.FileIO):
        def fail(self, *args):
            if os.fstat(self.fileno()).st_ino == bad:
                raise OSError(5, "Input/output error")

        def readinto(self, buffer):
            self.fail()
            return super().readinto(buffer)

        def readall(self):
            self.fail()
            return super().readall()

    monkeypatch.setattr(strictjson, "FileIO", Failing)
    refused(run_dir, sound, named=name)


def test_a_file_that_may_not_be_read(run_dir, sound, monkeypatch):
    inner = os.open

    def refuse(path, flags, *args, **kwargs):
        if str(path).endswith(f"{NEW}/{PARTS[1]}"):
            raise PermissionError(13, "Permission denied", str(path))
        return inner(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    refused(run_dir, sound, named=PARTS[1])


# ---- contents that no sane program wrote, sealed anew ----


def manifest_with(**changed):
    def damage(path):
        reseal(path, **changed)

    return damage


def files_with(edit):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        edit(manifest["files"])
        (path / "manifest.json").write_text(json.dumps(checkpoint.seal(manifest)))

    return damage


def renamed(name):
    """A file's entry under another name; behind some of the names a file is found."""

    def edit(files):
        files[name] = files["adapter/adapter_config.json"]

    return files_with(edit)


def text_instead(text):
    return lambda path: (path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def without(name):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest[name]
        (path / "manifest.json").write_text(json.dumps(checkpoint.seal(manifest)))

    return damage


MANIFESTS = {
    **{f"version {v!r}": manifest_with(format_version=v) for v in (4, 10**30, 0, -1, 1.5, "2", None, True, [2])},
    **{f"step {v!r}": manifest_with(step=v) for v in (-1, 21, 1.0, "20", None, True, 10**400)},
    **{f"{n} is no text": manifest_with(**{n: 7}) for n in ("backbone", "data", "method", "table_digest")},
    **{f"{n} is a list": manifest_with(**{n: []}) for n in ("files", "settings", "changeable", "versions", "weights")},
    "a weight's digest is a number": manifest_with(weights={"model.safetensors": 7}),
    "a version is a list": manifest_with(versions={"torch": []}),
    "no files": manifest_with(files={}),
    "a file without its size": files_with(lambda files: files[PARTS[0]].pop("bytes")),
    "a file without its sha256": files_with(lambda files: files[PARTS[0]].pop("sha256")),
    "a size that is negative": files_with(lambda files: files[PARTS[0]].update(bytes=-5)),
    "a size that is true": files_with(lambda files: files[PARTS[0]].update(bytes=True)),
    "a size of 0": files_with(lambda files: files[PARTS[0]].update(bytes=0)),
    "a size of 2^70": files_with(lambda files: files[PARTS[0]].update(bytes=2**70)),
    "a sha256 that is short": files_with(lambda files: files[PARTS[0]].update(sha256="ab")),
    "a sha256 that is another": files_with(lambda files: files[PARTS[0]].update(sha256="ab" * 32)),
    "a sha256 in capitals": files_with(lambda files: files[PARTS[0]].update(sha256="AB" * 32)),
    "an entry that is text": files_with(lambda files: files.update({PARTS[0]: "x"})),
    "the trainer is not in it": files_with(lambda files: files.pop("state/trainer.json")),
    "a part is not in it": files_with(lambda files: files.pop(PARTS[0])),
    "no part is in it": files_with(lambda files: [files.pop(name) for name in PARTS]),
    **{
        f"the name {name!r}": renamed(name)
        for name in (
            "../checkpoint-10/adapter/adapter_config.json",
            "adapter/../adapter/adapter_config.json",
            "/etc/passwd",
            "adapter//adapter_config.json",
            "./adapter/adapter_config.json",
            "adapter/.hidden",
            "adapter\\adapter_config.json",
            "adapter/a\nb",
            "adapter/\x00",
            "adapter/\ud800",
            "",
            "adapter",
            "adapter/",
            "x" * 5000,
        )
    },
    **{f"{name} is missing": without(name) for name in ("format_version", "step", "table_digest", "files", "settings")},
    "text": text_instead("not JSON"),
    "a list": text_instead("[]"),
    "a number": text_instead("7"),
    "null": text_instead("null"),
    "NaN in it": text_instead('{"format_version": NaN}'),
    "infinity in it": text_instead('{"format_version": -Infinity}'),
    "1e999 in it": text_instead('{"format_version": 1e999}'),
    "a number of 10,000 digits": text_instead('{"format_version": ' + "9" * 10_000 + "}"),
    "a key twice": text_instead('{"format_version": 2, "format_version": 2}'),
    "100,000 brackets": text_instead("[" * 100_000),
    "100,000 objects": text_instead('{"a":' * 100_000),
    "no UTF-8": text_instead(b'{"format_version": "\xff\xfe"}'),
    "UTF-16": text_instead('{"format_version": 2}'.encode("utf-16")),
    "half a pair of a letter": text_instead('{"format_version": "\\ud800"}'),
}


@pytest.mark.parametrize("damage", MANIFESTS, ids=lambda name: ascii(name)[:60])
def test_changed_manifest(run_dir, sound, damage):
    MANIFESTS[damage](run_dir / NEW)
    refused(run_dir, sound)


def trainer_with(edit):
    def damage(path):
        file = path / "state" / "trainer.json"
        trainer = json.loads(file.read_text())
        changed = edit(trainer)
        file.write_text(json.dumps(trainer if changed is None or isinstance(changed, int) else changed))
        reseal(path)

    return damage


def site(index, **changed):
    return trainer_with(lambda trainer: trainer["table"]["sites"][index].update(changed))


TRAINERS = {
    "no loop": trainer_with(lambda t: t.pop("loop") and None),
    "a loop that is a list": trainer_with(lambda t: t.update(loop=[1])),
    "no table": trainer_with(lambda t: t.pop("table") and None),
    "a table that is text": trainer_with(lambda t: t.update(table="x")),
    "sites that are an object": trainer_with(lambda t: t["table"].update(sites={})),
    "a site that is null": trainer_with(lambda t: t["table"]["sites"].__setitem__(0, None)),
    "a site without a name": trainer_with(lambda t: t["table"]["sites"][0].pop("name") and None),
    "a name that is a number": site(0, name=7),
    "a name that is no letter": site(0, name="\ud800"),
    "births that are text": site(0, births="0123"),
    "births that are floats": site(0, births=[0.0, 1.0, 2.0, 3.0]),
    "births that are true": site(0, births=[True, False, 2, 3]),
    "a birth twice": site(0, births=[1, 1, 2, 3], next_birth=9),
    "a negative birth": site(0, births=[-1, 1, 2, 3], next_birth=9),
    "a birth beyond next_birth": site(0, births=[0, 1, 2, 99]),
    "a birth of 2^64": site(0, births=[0, 1, 2, 2**64], next_birth=2**65),
    "a rank beyond the matrix": site(0, births=list(range(200)), next_birth=200),
    "next_birth is null": site(0, next_birth=None),
    "next_birth is negative": site(0, next_birth=-1),
    "adam_steps is text": trainer_with(lambda t: t.update(adam_steps="30")),
    "adam_steps is negative": trainer_with(lambda t: t.update(adam_steps=-1)),
    "adam_steps is 2^80": trainer_with(lambda t: t.update(adam_steps=2**80)),
    "adam_steps is missing": trainer_with(lambda t: t.pop("adam_steps") and None),
    "a list": trainer_with(lambda t: [t]),
}


@pytest.mark.parametrize("damage", TRAINERS)
def test_changed_trainer(run_dir, sound, damage):
    TRAINERS[damage](run_dir / NEW)
    refused(run_dir, sound, named="state/trainer.json")


def header_with(edit):
    """The first part's header changed, as an object or as bytes; its data stays, and the manifest is sealed anew."""

    def damage(path):
        file = path / PARTS[0]
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = edit(json.loads(content[8:end]))
        if not isinstance(header, bytes):
            header = json.dumps(header).encode()
            header = len(header).to_bytes(8, "little") + header
        file.write_bytes(header + content[end:])
        reseal(path)

    return damage


def first(header, **changed):
    name = next(iter(header))
    return header | {name: header[name] | changed}


def another_name(header, prefix="x"):
    name = next(iter(header))
    return {(prefix + n if n == name else n): e for n, e in header.items()}


HEADERS = {
    "a length of 2^63": header_with(lambda h: (1 << 63).to_bytes(8, "little")),
    "a length of 0": header_with(lambda h: bytes(8)),
    "a length of 10": header_with(lambda h: (10).to_bytes(8, "little")),
    "a length beyond the file": header_with(lambda h: (10**7).to_bytes(8, "little")),
    "a list": header_with(lambda h: list(h.items())),
    "null": header_with(lambda h: None),
    "an entry that is a list": header_with(lambda h: h | {"x": []}),
    "an entry without a shape": header_with(lambda h: h | {"x": {"dtype": "F32", "data_offsets": [0, 0]}}),
    "an unknown dtype": header_with(lambda h: first(h, dtype="F33")),
    "a dtype that is a list": header_with(lambda h: first(h, dtype=[])),
    "another dtype of the same width": header_with(lambda h: first(h, dtype="F64" if "I64" in str(h) else "I64")),
    "a shape that is an object": header_with(lambda h: first(h, shape={})),
    "a shape of texts": header_with(lambda h: first(h, shape=["4"])),
    "a negative shape": header_with(lambda h: first(h, shape=[-4])),
    "a shape of 2^60": header_with(lambda h: first(h, shape=[2**60])),
    "a shape of 100 dimensions": header_with(lambda h: first(h, shape=[1] * 100)),
    "offsets that are three": header_with(lambda h: first(h, data_offsets=[0, 8, 16])),
    "offsets that are text": header_with(lambda h: first(h, data_offsets="ab")),
    "offsets turned round": header_with(lambda h: first(h, data_offsets=h[next(iter(h))]["data_offsets"][::-1])),
    "offsets that overlap": header_with(lambda h: {n: e | {"data_offsets": [0, 32]} for n, e in h.items()}),
    "a hole": header_with(lambda h: {n: e for i, (n, e) in enumerate(h.items()) if i != 1}),
    "another name": header_with(another_name),
    "a name that is a path": header_with(lambda h: another_name(h, "../")),
    "NaN in it": header_with(lambda h: b"\x0a" + bytes(7) + b'{"a": NaN}'),
    "a key twice": header_with(lambda h: b"\x11" + bytes(7) + b'{"a": 1, "a": 1 }'),
    "no data": header_with(lambda h: {}),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_changed_header(run_dir, sound, damage):
    HEADERS[damage](run_dir / NEW)
    refused(run_dir, sound, named=PARTS[0])


def tensors_with(edit):
    """The tensors of both parts changed by `edit`, each written to its part again by the library."""

    def damage(path):
        parts = [load_file(path / name) for name in PARTS]
        edit(parts)
        for name, tensors in zip(PARTS, parts, strict=True):
            save_file({n: t.contiguous() for n, t in tensors.items()}, path / name)
        reseal(path)

    return damage


def edited(ending, change):
    """One tensor of that ending (the last) replaced by what `change` makes of it."""

    def edit(parts):
        tensors, name = [(part, n) for part in parts for n in part if n.endswith(ending)][-1]
        tensors[name] = change(tensors[name].clone())

    return tensors_with(edit)


def put(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS = {
    **{
        f"{value} in {ending}": edited(ending, put(value))
        for value in (np.nan, np.inf, -np.inf)
        for ending in ("lora_A.master", "lora_B.exp_avg", "lora_B.exp_avg_sq", "mean", "method.gate", "method.alpha")
    },
    "another birth": edited(".birth", put(77)),
    "a negative birth": edited(".birth", put(-1)),
    "a negative age": edited(".age", put(-1)),
    "a row less": edited("lora_A.master", lambda t: t[:-1]),
    "turned round": edited("lora_A.master", lambda t: t.T),
    "flat": edited("lora_A.master", lambda t: t.view(-1)),
    "float64": edited("lora_A.master", lambda t: t.double()),
    "float16": edited("lora_A.master", lambda t: t.half()),
    "ages as floats": edited(".age", lambda t: t.double()),
    "a tensor gone": tensors_with(lambda parts: parts[0].popitem()),
    "a tensor twice": tensors_with(lambda parts: parts[1].update([next(iter(parts[0].items()))])),
    "a tensor more": tensors_with(lambda parts: parts[0].update(more=torch.zeros(3))),
    "a tensor of no numbers more": tensors_with(lambda parts: parts[0].update(more=torch.zeros(0))),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_changed_tensors(run_dir, sound, damage):
    TENSORS[damage](run_dir / NEW)
    refused(run_dir, sound, named="state")


# ---- random bits ----


def outcome(path, snapshot):
    """None: refused; else it must be the same state to the bit (a flip of a space's bit that JSON does not mind)."""
    try:
        loaded = load(path)
    except CheckpointError:
        return None
    assert_same(loaded.snapshot, snapshot)
    return loaded


def test_every_flipped_bit_of_the_manifest(run_dir, sound):
    file = run_dir / NEW / "manifest.json"
    content = file.read_bytes()
    generator = random.Random(1)
    survived = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        survived += outcome(run_dir / NEW, sound[1][20]) is not None
    assert survived <= content.count(b"\n") + content.count(b" ")


def test_flipped_bits_of_a_sealed_header(run_dir, sound):
    """The manifest agrees with the damage, so the header must be refused for itself or mean the same."""
    file = run_dir / NEW / PARTS[1]
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(2)
    refusals = 0
    for place in [*range(8), *generator.sample(range(8, end), min(end - 8, 300))]:
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        file.write_bytes(changed)
        reseal(run_dir / NEW)
        refusals += outcome(run_dir / NEW, sound[1][20]) is None
    assert refusals >= 250


def test_random_json_in_place_of_the_trainer(run_dir, sound):
    """Any value at any place of trainer.json, under a manifest that agrees: refused, or the state is what it was."""
    file = run_dir / NEW / "state" / "trainer.json"
    sound_text = file.read_text()
    generator = random.Random(3)
    odd = [None, True, -1, 0, 7, 2**63, 1.5, -0.0, 1e308, "", "x", "\ud800", [], [[]], {}, {"sites": []}]

    def places(value, path=()):
        yield path
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from places(value[key], (*path, key))

    every = [path for path in places(json.loads(sound_text)) if path and path[0] != "loop"]
    for _ in range(300):
        trainer = json.loads(sound_text)
        *before, last = generator.choice(every)
        inner = trainer
        for key in before:
            inner = inner[key]
        inner[last] = generator.choice(odd)
        file.write_text(json.dumps(trainer))
        reseal(run_dir / NEW)
        try:
            loaded = load(run_dir / NEW)
        except CheckpointError as error:
            assert str(error).replace("\n", "").isprintable()
        else:
            assert loaded.snapshot.table == sound[1][20].table  # adam_steps alone may be any count


def test_there_are_more_than_fifty_kinds():
    kinds = len(BYTES) * len(FILES) + len(FOLDERS) + len(MANIFESTS) + len(TRAINERS) + len(HEADERS) + len(TENSORS)
    assert kinds > 200
