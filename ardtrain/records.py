"""What a run writes while it trains: metrics.jsonl, ranks.jsonl and the sites' mean scores. No step waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ardtrain.config import RunConfig
from ardtrain.data_mix import Drawn
from ardtrain.evaluation import HeldOut
from ardtrain.observe import RunLog
from ardtrain.ranks import RankTable
from ardtrain.run_info import peaks
from ardtrain.trainer import Event, StepResult, Trainer

_logger = logging.getLogger(__name__)

LOG_SCORES_SITES = 2000  # `log_scores` is on by default below this many sites


class Records:
    """Turns the loop's results into lines. Every process has one; `RunLog` writes on process 0 only."""

    def __init__(
        self,
        run_dir: Path,
        log: RunLog,
        trainer: Trainer,
        config: RunConfig,
        *,
        utilisation: Callable[[float], float] | None = None,
    ) -> None:
        """utilisation: makes the share of the GPUs' peak of tokens per second; None: it is not known."""
        self._utilisation = utilisation
        self._run_dir, self._log, self._trainer, self._config = run_dir, log, trainer, config

    def start(self, table: RankTable) -> None:
        """Line 0 of ranks.jsonl: the full table of a new run, or of one that goes on in an empty folder."""
        line = {
            "event": self._trainer.state.events,
            "total_rank": table.total,
            "table": table.by_name(),
            "digest": table.digest,
        }
        self._log.ranks(self._trainer.state.step, line | _towers(table))

    def step(self, result: StepResult) -> None:
        """Records one step; its numbers are on the host already."""
        done, clock = result.step + 1, self._trainer.clock
        clock.count_tokens(result.num_tokens)
        arena = self._trainer.arena
        total_rank = None if arena is None else arena.table.total  # method full has none
        self._log.progress(done, loss=result.loss, num_tokens=result.num_tokens, total_rank=total_rank)
        last = done == self._trainer.settings.total_steps
        if done % self._config.logging_steps == 0 or result.void or last:
            shares = {f"{name}_fraction": clock.fraction(name) for name in ("allocator", "resize")}
            host, device = peaks(self._trainer.world.device)  # of process 0
            memory = {"host_memory_peak_bytes": host} | ({"device_memory_peak_bytes": device} if device else {})
            times = clock.report()
            if self._utilisation is not None:
                times["mfu_4n"] = self._utilisation(times["tokens_per_second"])
            self._log.metrics(done, _numbers(result) | times | shares | memory)

    def evaluation(self, step: int, held_out: HeldOut) -> None:
        """Records a held-out loss and says it."""
        self._log.metrics(step, {f"eval_{name}": value for name, value in held_out.numbers().items()})
        unit = "rows" if "accuracy" in held_out.metrics else "tokens"
        told = {**held_out.metrics, **held_out.others}
        others = "".join(f", {name} {value:.4f}" for name, value in told.items())
        self._log.say(f"step {step}: held-out loss {held_out.loss:.4f} over {held_out.num_tokens} {unit}{others}")

    def drawn(self, sources: Mapping[str, Drawn]) -> None:
        """Records what the run has trained on of each source, at its end, and says it; nothing without sources."""
        if not sources:
            return
        self._log.metrics(self._trainer.state.step, {"sources": {name: asdict(own) for name, own in sources.items()}})
        for name, own in sources.items():
            self._log.say(f"{name}: {own.samples:,} samples, {own.tokens:,} tokens, {own.passes:.2f} passes")

    def event(self, event: Event) -> None:
        """Records one event of the allocator."""
        number, record = self._trainer.state.events, event.record
        plan = record.plan
        changes = [
            {
                "site": record.before.sites[i].name,
                "before": record.before.ranks[i],
                "after": record.after.ranks[i],
                "pruned": record.before.ranks[i] - len(change.keep),
                "born": change.born,
                "masked": len(change.zero),
            }
            for i, change in sorted(plan.changes.items())
        ]
        line = {
            "event": number,
            "total_rank": record.after.total,
            "digest": record.after.digest,
            "reason": plan.reason,
            "scores": {**plan.scores, **event.notes},
            "changes": changes,
            "seconds": record.seconds,
            **_towers(record.after),
        }
        self._log.ranks(event.step + 1, line)
        wanted = self._config.log_scores
        if wanted is None:
            wanted = len(record.before.sites) < LOG_SCORES_SITES
        if wanted and event.scores is not None and self._trainer.world.is_main:
            _write_scores(self._run_dir / "scores" / f"event-{number}.safetensors", record.before, event.scores)


def _towers(table: RankTable) -> dict[str, dict[str, int]]:
    """Total rank by tower, where there are several."""
    towers = table.by_tower()
    return {"towers": towers} if len(towers) > 1 else {}


def _numbers(result: StepResult) -> dict[str, float]:
    return {
        "loss": result.loss,
        "extra_loss": result.extra_loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.lr,
        "target_tokens": result.num_targets,
        "tokens": result.num_tokens,
        "void": result.void,
    }


def _write_scores(path: Path, table: RankTable, scores: Tensor) -> None:
    """Mean score of each site before the event, and its rank then."""
    sums = np.bincount(table.owners, scores.numpy(), minlength=len(table.sites))
    means = torch.from_numpy(sums / np.maximum(table.rank_array, 1))
    try:  # a full disk costs the picture of the scores, not the run
        path.parent.mkdir(exist_ok=True)
        save_file({"mean_score": means, "rank": torch.tensor(table.ranks)}, path)
    except (OSError, SafetensorError) as error:
        _logger.error("%s was not written (%s); the run goes on", path, error)
