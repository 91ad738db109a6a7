"""Base weights that changed on disk are found by a few megabytes of reading."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ardtrain import fingerprint as module
from ardtrain.fingerprint import NUM_RANGES, RANGE_BYTES, fingerprint, hub_weight_files, sample, weight_files


def shards(folder, count=3, numbers=1000):
    """A model's folder of shards with an index."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        generator = torch.Generator().manual_seed(i)
        save_file({f"layers.{i}.weight": torch.randn(numbers, generator=generator)}, folder / name)
        weight_map[f"layers.{i}.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def changed_names(before, after):
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_same_files_have_the_same_fingerprint_wherever_they_lie(tmp_path):
    shards(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (fingerprint(weight_files(tmp_path / name)) for name in ("a", "b"))
    assert first == second
    assert list(first) == [
        "model.safetensors.index.json",
        *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
    ]
    assert all(len(digest) == 64 for digest in first.values())


def test_every_byte_of_a_small_model_counts(tmp_path):
    folder = shards(tmp_path / "m", count=2, numbers=40)
    paths = weight_files(folder)
    before = fingerprint(paths)
    for path in paths:
        content = path.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 4
            path.write_bytes(changed)
            assert changed_names(before, fingerprint(paths)) == {path.name}, (path.name, place)
        path.write_bytes(content)
    assert fingerprint(paths) == before


def test_sizes_and_the_index_count(tmp_path):
    folder = shards(tmp_path / "m")
    before = fingerprint(weight_files(folder))
    one = folder / "model-00002-of-00003.safetensors"
    one.write_bytes(one.read_bytes() + b"x")
    assert changed_names(before, fingerprint(weight_files(folder))) == {one.name}
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    assert changed_names(before, fingerprint(weight_files(folder))) == {one.name, index.name}


def test_ranges_are_spread_over_all_bytes_and_stay_inside():
    generator = np.random.default_rng(0)
    for _ in range(50):
        sizes = generator.integers(0, 200 << 20, size=int(generator.integers(1, 40))).tolist()
        ranges = sample(sizes)
        total = sum(sizes)
        flat, before = [], 0
        for size, own in zip(sizes, ranges, strict=True):
            assert all(0 <= begin < end <= size for begin, end in own)
            flat += [(before + begin, before + end) for begin, end in own]
            before += size
        read = sum(end - begin for begin, end in flat)
        assert read == min(total, NUM_RANGES * RANGE_BYTES)
        assert all(a[1] <= b[0] for a, b in zip(flat, flat[1:], strict=False))  # no byte twice
        if total > NUM_RANGES * RANGE_BYTES:
            edges = [total * k // NUM_RANGES for k in range(NUM_RANGES + 1)]
            for low, high in zip(edges, edges[1:], strict=False):  # each 64th of the bytes has a range of its own
                assert sum(min(e, high) - max(b, low) for b, e in flat if b < high and e > low) == RANGE_BYTES
    assert sample(sizes) == sample(list(sizes))


def sparse_model(folder, num_files=30, num_bytes=(141 << 30) // 30):
    """141 GB of holes with sound headers: what a 70B model in bf16 looks like to the fingerprint."""
    folder.mkdir()
    weight_map = {}
    for i in range(num_files):
        name = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        numbers = num_bytes // 2
        header = json.dumps({f"w{i}": {"dtype": "BF16", "shape": [numbers], "data_offsets": [0, 2 * numbers]}}).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 2 * numbers)
        weight_map[f"w{i}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_141_gb_are_not_read(tmp_path, monkeypatch):
    paths = weight_files(sparse_model(tmp_path / "m"))
    assert sum(path.stat().st_size for path in paths) > 141e9
    read = []
    inner = module.Path.open

    class Counting:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *details):
            self._file.close()

        def seek(self, place):
            self._file.seek(place)

        def read(self, count=-1):
            content = self._file.read(count)
            read.append(len(content))
            return content

    monkeypatch.setattr(module.Path, "open", lambda path, mode: Counting(inner(path, mode)))
    before = fingerprint(paths)
    monkeypatch.undo()
    index = paths[0].stat().st_size
    assert NUM_RANGES * RANGE_BYTES <= sum(read) - index < NUM_RANGES * RANGE_BYTES + 30 * 200
    for number, own in enumerate(sample([path.stat().st_size for path in paths[1:]]), start=1):
        assert own  # every shard has a range: another model's values would be found in any
        (begin, end), shard = own[0], paths[number]
        for place, found in ((begin, True), (end - 1, True), (end, False)):  # the last is the price
            with shard.open("r+b") as file:
                file.seek(place)
                file.write(b"x")
            assert changed_names(before, fingerprint(paths)) == ({shard.name} if found else set())
            with shard.open("r+b") as file:
                file.seek(place)
                file.write(b"\0")
        if number == 3:
            break


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    shards(tmp_path)  # transformers takes the single file first
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    content = (tmp_path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(str(len(content)).encode() + content[:end] + content)  # size, header, the one range
    assert fingerprint(weight_files(tmp_path)) == {"model.safetensors": digest.hexdigest()}


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8, b"\xff" * 100, (50).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_no_safetensors_has_a_fingerprint_too(tmp_path, content):
    """Loading refuses it with its own words."""
    (tmp_path / "model.safetensors").write_bytes(content)
    assert len(fingerprint(weight_files(tmp_path))["model.safetensors"]) == 64


@pytest.mark.parametrize(
    "index",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": 7}', b'{"weight_map": {"a": 7}}', b'{"weight_map": {"a": []}}', b"\xff"],
)
def test_a_broken_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is no index of weights .*; get the model anew"):
        weight_files(tmp_path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds neither model.safetensors nor model.safetensors.index.json;"):
        weight_files(tmp_path)
    folder = shards(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="index.json names model-00002-of-00003.safetensors, which is not there"):
        weight_files(folder)
    paths = weight_files(shards(tmp_path / "m"))
    paths[1].unlink()
    with pytest.raises(ValueError, match="model-00001-of-00003.safetensors: the base's weights cannot be read"):
        fingerprint(paths)


def test_a_hub_id_is_found_in_the_cache(tmp_path):
    """In a process of its own: the cache's place is read when huggingface_hub is imported."""
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shards(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    code = (
        "from ardtrain.fingerprint import *\n"
        "for name in ('somebody/tiny', 'somebody/absent'):\n"
        "    try:\n"
        "        print(*hub_weight_files(name), sep=' ')\n"
        "    except ValueError as error:\n"
        "        print('refused', error)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, refused = result.stdout.splitlines()
    assert found.split() == [str(path) for path in weight_files(snapshot)]
    assert refused.startswith("refused model_name_or_path='somebody/absent': no safetensors weights could be had (")
    assert hub_weight_files(str(snapshot)) == weight_files(snapshot)
