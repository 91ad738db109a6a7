"""`ardtrain fetch CONFIG`: the base and its tokenizer into the hub's cache, for nodes that see no internet."""

from __future__ import annotations

import os
from pathlib import Path

from ardtrain.config import ConfigError, load_config

# No second copy of the weights in another framework's format.
IGNORED = ("*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "*.pth")


def fetch(path: str, overrides: list[str]) -> int:
    """Downloads what the config names; what is there already is not loaded again. Returns the exit code.

    Raises:
        ConfigError: the hub does not have it or cannot be reached.
    """
    config = load_config(path, overrides)
    wanted = {config.model_name_or_path: config.revision}
    if config.tokenizer_name_or_path:
        wanted.setdefault(config.tokenizer_name_or_path, None)
    for name, revision in wanted.items():
        print(f"{name}: {_fetched(name, revision)}")
    return 0


def _fetched(name: str, revision: str | None) -> str:
    if Path(name).is_dir():
        return "a local folder, nothing to fetch"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, ignore_patterns=list(IGNORED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = " HF_HUB_OFFLINE is set;" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            [f"{name}: not fetched ({reason});{offline} check the name, the network and HF_TOKEN, then say it again: "
             "it goes on where it stopped"]
        ) from None  # fmt: skip
    pinned = Path(folder).name
    return f"{folder}" + (f"; to pin it: revision: {pinned}" if revision is None else "")
