"""What a run needs of its hosts, as far as its config says without loading the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ardtrain.config import RunConfig, load_config, read_deepspeed_json
from ardtrain.data_sources import is_hub


@dataclass(frozen=True)
class Needs:
    """Folder, files and disks of a run; of a doctor's visit without a config the folder alone.

    files: data, model and config, as the run will open them. nvme: folders that DeepSpeed offloads to.
    """

    run_dir: Path
    config: RunConfig | None = None
    config_path: Path | None = None
    files: tuple[Path, ...] = ()
    nvme: tuple[Path, ...] = ()

    @property
    def method(self) -> str | None:
        return self.config.method if self.config is not None else None


def read_needs(config_path: str | None, overrides: Sequence[str] = (), run_dir: str | None = None) -> Needs:
    """Needs of a run's config file, or of this folder. `run_dir` goes over the config's output_dir.

    Raises:
        ConfigError: mistakes in the config.
    """
    if config_path is None:
        return Needs(Path(run_dir or ".").absolute())
    config = load_config(config_path, overrides)
    files = [Path(file) for file in config.data.files if not is_hub(file)]
    model = Path(config.model_name_or_path)
    if model.is_dir():  # else an id of the hub
        files += sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".json", ".model"))
    folder = Path(run_dir or config.output_dir).absolute()
    return Needs(folder, config, Path(config_path), tuple(files), _nvme_folders(config))


def _nvme_folders(config: RunConfig) -> tuple[Path, ...]:
    if config.deepspeed is None:
        return ()
    json = config.deepspeed if isinstance(config.deepspeed, dict) else read_deepspeed_json(config.deepspeed)
    zero: Any = json.get("zero_optimization")
    blocks = [zero.get(f"offload_{name}") for name in ("param", "optimizer")] if isinstance(zero, dict) else []
    chosen = [b.get("nvme_path") for b in blocks if isinstance(b, dict) and b.get("device") == "nvme"]
    return tuple(dict.fromkeys(Path(str(path)) for path in chosen if path))


def checkpoint_bytes(needs: Needs) -> int:
    """About how large one checkpoint of the run is. Builds the model's shapes (seconds); loads no weights.

    Per trained number: adapters 16 bytes (master, two moments, the copy in `adapter/`), with ElaLoRA's and AdaLoRA's
    averages 24, and 12 more for DeepSpeed's own copy; full fine-tuning 14 (weights, master, two moments).

    Raises:
        ConfigError: the model's shapes cannot be had, or do not fit the config.
    """
    from ardtrain.deepspeed_config import take_over
    from ardtrain.preflight import check_model

    assert needs.config is not None
    config, _ = take_over(needs.config)
    shape = check_model(config)
    if config.method == "full":
        return 14 * shape.num_base
    own = 24 if config.method in ("elalora", "adalora") else 16
    return shape.num_trained * (own + (0 if config.zero_checkpoint == "off" else 12))
