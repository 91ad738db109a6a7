"""`ardtrain fetch CONFIG`: base, tokenizer and data sets into the hub's caches, and rows tokenised, for offline nodes.

The caches must be where the run looks: HF_HOME for what the hub gives, ARDTRAIN_CACHE for tokenised rows, on a disk
that all nodes see.
"""

from __future__ import annotations

import os
from pathlib import Path

from ardtrain.config import ConfigError, load_config
from ardtrain.reasons import no_source

# No second copy of the weights in another format, and no pickles, which are never read.
IGNORED = (
    *("*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "*.pth", "*.bin", "*.pt", "*.ckpt", "*.tflite"),
    *("consolidated*.safetensors", "coreml/*", "openvino/*"),
)


def fetch(path: str, overrides: list[str]) -> int:
    """Downloads what the config names; files that are there already are not loaded again. Returns the exit code.

    A file that was cut is loaded anew, from its beginning (huggingface_hub goes on inside a file within one call only).

    Raises:
        ConfigError: the hub does not have it or cannot be reached; or the base's weights are not complete.
    """
    config = load_config(path, overrides)
    wanted = {config.model_name_or_path: config.revision}
    if config.tokenizer_name_or_path:
        wanted.setdefault(config.tokenizer_name_or_path, None)
    for name, revision in wanted.items():
        print(f"{name}: {_fetched(name, revision)}")
    print(f"{config.model_name_or_path}: {_weights(config.model_name_or_path, config.revision)}")
    for line in tokenise(path, overrides):
        print(line)
    return 0


def tokenise(path: str, overrides: list[str]) -> list[str]:
    """Reads and tokenises all rows that the run will ask for, as its own start would; returns a line for each source.

    Raises:
        ConfigError: rows are missing or broken.
    """
    from ardtrain import preflight, run_data
    from ardtrain.data_sources import commit_of, is_hub, parse_hub

    config, _ = preflight.read_run_config(path, overrides, world_size=1)
    labels, tokenizer = run_data.read_labels(config), run_data.tokenizer_of(config)
    train, held_out = run_data.open_data(config, tokenizer, labels)
    run_data.open_allocation_data(config, tokenizer, labels)
    told = [f"rows: {train.num_samples} to train on" + (f", {held_out.num_samples} held out" if held_out else "")]
    told[0] += f", tokenised in {run_data.cache_dir()}"
    told += [f"  {share.text()}" for share in train.shares]
    for source in filter(is_hub, config.data.files):
        hub = parse_hub(source)
        if not hub.is_folder and hub.revision != (commit := commit_of(hub)):
            name = hub.name if hub.config is None else f"{hub.name}/{hub.config}"
            told.append(f"{source}: to pin it: hub:{name}@{commit}:{hub.split}")
    return told


def _weights(name: str, revision: str | None) -> str:
    """What the base's weight files hold by their headers, found as a run finds them. Raises ConfigError."""
    from ardtrain.fingerprint import hub_weight_files
    from ardtrain.loading import Shards

    try:
        shards = Shards(hub_weight_files(name, revision))
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    shards.close()
    return f"weights complete: {len(shards.tensors)} tensors, {shards.nbytes / 2**30:.2f} GiB"


def _fetched(name: str, revision: str | None) -> str:
    if Path(name).is_dir():
        return "a local folder, nothing to fetch"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, ignore_patterns=list(IGNORED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = " HF_HUB_OFFLINE is set;" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise ConfigError(
            [f"{name}: not fetched ({no_source(name, error)});{offline} check the name, the network and HF_TOKEN, then "
             "say it again: it goes on where it stopped"]
        ) from None  # fmt: skip
    pinned = Path(folder).name
    return f"{folder}" + (f"; to pin it: revision: {pinned}" if revision != pinned else "")
