"""Peak host memory of what data cost before the first step: tokenising a large file, and the order of many rows.

python -m benchmarks.data_memory [--mib 200] [--rows 10000000] [--out FILE]

Memory is the process's peak resident memory above what it had before; on Linux.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ardtrain.data import Samples
from ardtrain.data_order import TrainOrder
from ardtrain.data_rows import DataSettings
from ardtrain.rehearse import peaks, reset_peaks
from benchmarks.common import described, machine, write

CPU = torch.device("cpu")
WORDS = [f"word{i}" for i in range(1000)]


def main():
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--mib", type=int, default=200)
    arguments.add_argument("--rows", type=int, default=10_000_000)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"jsonl": folder / "a.jsonl", "parquet": folder / "a.parquet"}
        write_rows(files["jsonl"], given.mib << 20)
        write_parquet(files["jsonl"], files["parquet"])
        for kind, path in files.items():
            own = alone(tokenise, path, folder / kind)
            results[f"tokenise {kind}"] = {"file_mib": round(path.stat().st_size / 2**20, 1), **own}
    for what, capacity in (("rows", None), ("packed", 2048)):
        own = alone(order, given.rows, capacity)
        results[f"order of {what}"] = own | {"bytes_a_row": round(own["peak_mib"] * 2**20 / given.rows, 1)}
    write({"what": __doc__.splitlines()[0], **described(given), "results": results, "machine": machine()}, given.out)


def alone(work, *arguments):
    """What `measured` gives, in a process of its own: memory that was freed before would hide the peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measured(work):
    """Seconds and MiB of peak memory above the start."""
    reset_peaks(CPU)
    before, start = peaks(CPU)[0], time.perf_counter()
    work()
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds, "peak_mib": round((peaks(CPU)[0] - before) / 2**20, 1)}


def write_rows(path, size):
    """JSONL of prompts and completions, about `size` bytes."""
    generator, written = np.random.default_rng(0), 0
    with path.open("w") as file:
        while written < size:
            words = [WORDS[i] for i in generator.integers(0, len(WORDS), 120)]
            written += file.write(
                json.dumps({"prompt": " ".join(words[:40]), "completion": " ".join(words[40:])}) + "\n"
            )


def write_parquet(source, path):
    """The same rows."""
    with (
        source.open() as file,
        pq.ParquetWriter(path, pa.schema([("prompt", "string"), ("completion", "string")])) as out,
    ):
        while lines := file.readlines(1 << 24):
            out.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]))


def tokenise(path, cache):
    """Fills a new cache, as the first start of a run does."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    settings = DataSettings(
        train_files=(str(path),), format="completion", prompt_field="prompt", completion_field="completion",
        messages_field="messages", text_field="text", prompt_template=None, completion_template=None,
        chat_template=None, max_length=2048, packing=False, truncation="error", on_bad_row="error", seed=0,
    )  # fmt: skip
    return measured(lambda: Samples(settings, tokenizer, cache))


def order(num_rows, capacity):
    """What a start works out before it can name a step's rows."""
    lengths = np.random.default_rng(0).integers(20, 400, num_rows).astype(np.int32)
    sizes = {"global_batch_size": 64, "grain_size": 8, "num_train_epochs": 1.0}
    return measured(lambda: TrainOrder(lengths, seed=0, capacity=capacity, **sizes).grains(3))


if __name__ == "__main__":
    main()
