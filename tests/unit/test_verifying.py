"""`validate --verify`: checksums from wherever they are known, missing tensors, numbers that are not finite."""

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ardtrain.cli import main
from ardtrain.loading import known_checksum, verify_files
from tests.runs import write_run


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sums(folder):
    """As `sha256sum *.safetensors > SHA256SUMS`; its binary form has a star."""
    files = sorted(folder.glob("*.safetensors"))
    lines = [f"{sha256(path)} {'*' if i else ' '}{path.name}\n" for i, path in enumerate(files)]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def weights(tmp_path):
    for name in ("a", "b"):
        save_file({name: torch.arange(100.0)}, tmp_path / f"{name}.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


def in_the_hubs_cache(path, folder):
    """A snapshot's link to a blob that is named by its checksum."""
    blob = folder / "models--org--base" / "blobs" / sha256(path)
    link = folder / "models--org--base" / "snapshots" / ("0" * 40) / path.name
    for made in (blob, link):
        made.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, blob)
    link.symlink_to(blob)
    return link


def test_checksums_are_known_from_three_places(weights, tmp_path):
    first, second = weights
    assert known_checksum(first) is None
    assert verify_files([first]) == [first.name]
    assert known_checksum(in_the_hubs_cache(first, tmp_path / "hub")) == sha256(first)
    note = tmp_path / ".cache" / "huggingface" / "download" / f"{first.name}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{sha256(first)}\n1700000000.0\n")
    assert known_checksum(first) == sha256(first)
    note.write_text(f"{'0' * 40}\n{'1' * 40}\n1700000000.0\n")  # a small file's tag is no sha256
    assert known_checksum(first) is None
    write_sums(tmp_path)
    assert [known_checksum(path) for path in weights] == [sha256(first), sha256(second)]
    read = []
    assert verify_files(weights, progress=read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in weights)


def test_one_bit_is_enough(weights, tmp_path):
    write_sums(tmp_path)
    raw = bytearray(weights[1].read_bytes())
    raw[-3] ^= 1
    weights[1].write_bytes(raw)
    with pytest.raises(ValueError, match=r"b.safetensors has the checksum .*, it should have .*: it was damaged"):
        verify_files(weights)


def test_a_blob_of_the_hubs_cache_that_was_damaged(weights, tmp_path):
    link = in_the_hubs_cache(weights[0], tmp_path / "hub")
    assert verify_files([link]) == []
    with link.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(ValueError, match="remove it and get the model anew"):
        verify_files([link])


def test_validate_reads_the_weights_on_demand(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ARDTRAIN_CACHE", str(tmp_path / "cache"))
    config = str(write_run(tmp_path))
    model = tmp_path / "model" / "model.safetensors"
    assert main(["validate", config]) == 0
    assert "weights:" not in capsys.readouterr().out
    assert main(["validate", config, "--verify"]) == 0
    said = capsys.readouterr().out
    assert "weights: 1 files" in said and "checksums of 0 right, of 1 unknown (SHA256SUMS beside them" in said
    assert said.rstrip().endswith("all tensors there, all numbers finite")
    write_sums(model.parent)
    assert main(["validate", "--verify", config]) == 0
    assert "checksums of 1 right; all tensors there" in capsys.readouterr().out
    tensors = load_file(model)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, model, metadata={"format": "pt"})
    assert main(["validate", config, "--verify"]) == 2
    assert "model.safetensors has the checksum" in capsys.readouterr().err
    (model.parent / "SHA256SUMS").unlink()
    assert main(["validate", config, "--verify"]) == 2
    assert f"{name} holds a number that is not finite" in capsys.readouterr().err
