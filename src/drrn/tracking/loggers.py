"""Where a run's metrics go besides its record: Weights & Biases (offline unless asked otherwise), or CSV.

Tracking never decides over a run. Whatever W&B raises (no account, no network, a full or read-only folder, a
service that was killed) is said once in the run's log and in `record["tracking"]`; training goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from drrn.config import Config
from drrn.tracking.wandb_run import Tracker, progress

if TYPE_CHECKING:
    from drrn.module import SuperResolution


def make_logger(config: Config, folder: Path, record: dict[str, Any], module: SuperResolution) -> Logger | bool:
    """The logger that `logger.kind` names, or False; `record["tracking"]` will say what became of it."""
    if config.logger.kind == "wandb":
        return Tracker(config, folder, record, module)
    record["tracking"] = {"kind": config.logger.kind}
    return CSV(config, folder, module) if config.logger.kind == "csv" else False


class CSV(CSVLogger):
    """Metrics by steps done and patches seen; a version for each time the run goes on: none is overwritten."""

    def __init__(self, config: Config, folder: Path, module: SuperResolution) -> None:
        super().__init__(folder, name="csv")
        self.module, self.batch_size = module, config.data.batch_size

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """A row."""
        steps, where = progress(self.module, self.batch_size)
        super().log_metrics({**metrics, **where}, steps)


def finish(record: dict[str, Any]) -> bool:
    """End the tracking of the run that is over; True if `record["tracking"]` may have changed."""
    tracker, Tracker.current = Tracker.current, None
    if tracker is not None:
        tracker.finish(failed=record["status"] == "failed")
    return tracker is not None
