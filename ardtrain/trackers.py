"""TensorBoard and W&B: the numbers of `metrics.jsonl` once more, from process 0. A tracker's failure ends no run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ardtrain.config import ConfigError, RunConfig, dump_config
from ardtrain.faults import replace_file

STORED = "tracker.json"  # in the run folder: W&B's id of the run
FAILED_SECONDS = 5.0  # for each tracker to end in after a failure

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where numbers go; any exception of it is told, and it gets no more."""

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one line of metrics.jsonl."""

    def close(self, *, failed: bool) -> None:
        """After the last line."""


def check_trackers(config: RunConfig) -> None:
    """Raises ConfigError where a package of `report_to` is missing."""
    missing = [name for name in config.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                f"report_to={name}: the package is not installed; pip install {name}, or remove it from report_to"
                for name in missing
            ]
        )


class Trackers:
    """All trackers of a run; those that failed get nothing more."""

    def __init__(self, config: RunConfig, run_dir: Path, *, first_step: int) -> None:
        """Starts them. Process 0 alone; first_step: steps done already, beyond which a resume goes on."""
        self._alive: dict[str, Tracker] = {}
        for name in config.report_to:
            try:
                if name == "tensorboard":
                    self._alive[name] = TensorBoard(run_dir / name, first_step=first_step)
                else:
                    self._alive[name] = WeightsAndBiases(config, run_dir)
            except Exception as error:  # whatever it raises: the network, an account, a full disk
                self._tell(name, error)

    def metrics(self, step: int, record: Mapping[str, Any]) -> None:
        """Hands on the numbers of a record of JSON's own types; what is null there is left out."""
        numbers = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
        for name, tracker in list(self._alive.items()):
            try:
                tracker.metrics(step, numbers)
            except Exception as error:
                del self._alive[name]
                self._tell(name, error)

    def close(self, *, failed: bool) -> None:
        """Lets them write what is left; after a failure for some seconds only, as the others are to hear of it."""
        for name, tracker in self._alive.items():
            closing = threading.Thread(target=self._close_one, args=(name, tracker, failed), daemon=True)
            closing.start()
            closing.join(FAILED_SECONDS if failed else None)
        self._alive.clear()

    def _close_one(self, name: str, tracker: Tracker, failed: bool) -> None:
        try:
            tracker.close(failed=failed)
        except Exception as error:
            self._tell(name, error)

    def _tell(self, name: str, error: Exception) -> None:
        _logger.warning(
            "%s gets no more numbers (%s: %s); the run goes on, and metrics.jsonl has them all",
            name,
            type(error).__name__,
            error,
        )


class TensorBoard:
    """Event files in `tensorboard/`. A resume hides what lies beyond its checkpoint (purge_step)."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(folder, purge_step=first_step + 1 if first_step else 0)

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run over all starts, by the id in `tracker.json`. WANDB_MODE, WANDB_PROJECT and so on are W&B's own.

    W&B keeps the first numbers of a step: those that a resume does again are not taken twice.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import yaml

        wandb: Any = importlib.import_module("wandb")
        settings = yaml.safe_load(dump_config(config))
        name = config.run_name
        self._run: Any = wandb.init(id=_stored_id(run_dir), resume="allow", dir=run_dir, name=name, config=settings)

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _stored_id(run_dir: Path) -> str:
    """W&B's id of the run, made at its first start."""
    path = run_dir / STORED
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["wandb"])
    number = secrets.token_hex(8)
    replace_file(path, json.dumps({"wandb": number}) + "\n")
    return number
