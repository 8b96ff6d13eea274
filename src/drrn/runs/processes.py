"""Several processes of one run: who starts them, what is broadcast, what only the first of them does.

`trainer.devices` above 1 starts that many on this machine; torchrun and srun start theirs themselves. Both ways
lead to the same: every process calls `train` with the same configuration, and the first one (rank 0) decides,
writes and speaks. docs/distributed.md says how to use it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from drrn.config import Config
from drrn.disk import write_json
from drrn.errors import UserError
from drrn.runs.record import read_record
from drrn.runs.stop import Stopped
from drrn.workers import end_with_parent

T = TypeVar("T")
GROUP = "drrn-"  # how the ids of the process groups begin that `Processes.start` starts


class Processes:
    """The processes of a run, this one among them.

    Args:
        config: a checked configuration.
        arguments: `trainer.*` as Lightning's Trainer takes it; `self.arguments` is that with what several
            processes need.

    Raises:
        UserError: an argument that the Trainer does not take, processes that do not fit what was asked for, a batch
            that they cannot share evenly.
    """

    def __init__(self, config: Config, arguments: dict[str, Any]) -> None:
        asked = config.trainer
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        try:
            kinds = (TorchElasticEnvironment, SLURMEnvironment)
            self.outside = next((kind() for kind in kinds if kind.detect()), None)
            trainer = Trainer(**{**arguments, **quiet})
        except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise UserError(f"trainer.*: Lightning's Trainer does not take this: {error}") from error
        self.strategy, self.here = trainer.strategy, trainer.num_devices
        self.number = trainer.num_devices * trainer.num_nodes
        there = self.outside.world_size() if self.outside else 1
        if there != self.number and (there > 1 or asked.num_nodes > 1):
            raise UserError(
                f"trainer.devices × trainer.num_nodes = {self.here} × {asked.num_nodes}, but {there} "
                f"process{'es were' if there > 1 else ' was'} started: give torchrun or srun as many on each node "
                "as trainer.devices says (docs/distributed.md)"
            )
        config.data.share(asked.accumulate_grad_batches, self.number)
        if self.number > 1 and asked.sync_batchnorm and isinstance(trainer.accelerator, CPUAccelerator):
            raise UserError(
                "trainer.sync_batchnorm = True: PyTorch's SyncBatchNorm runs on GPUs only; with false each process "
                "normalises by its own share of the batch"
            )
        self.arguments = dict(arguments)
        if self.number > 1 and asked.strategy in ("auto", "ddp"):
            # BatchNorm's buffers are averaged by SuperResolution, not overwritten by the first process's.
            self.arguments["strategy"] = DDPStrategy(forward_sync_buffers=False)

    @property
    def to_be_started(self) -> bool:
        """Whether this one process has been started for a run of several."""
        return self.number > 1 and (self.outside is None or self.outside.world_size() == 1)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return rank_zero_only.rank == 0

    def start(self, train: Callable[[Config], None], config: Config, record: Path) -> None:
        """Run `train(config)` in all processes of the run, by torchrun's own agent, and wait for them.

        When one of them ends badly the agent ends the others, and the record says why.

        Raises:
            UserError: what the processes refused.
            Stopped: by a signal, which they got too.
            RuntimeError: they failed.
        """
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher import LaunchConfig, elastic_launch

        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # the record says what went wrong
        try:
            with TemporaryDirectory() as scratch:
                settings = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=self.number,
                    run_id=f"{GROUP}{uuid.uuid4().hex}",
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",  # a free port: several runs on one machine do not meet
                    local_addr="localhost",
                    max_restarts=0,
                    signals_to_handle="SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT",  # all that `StopSignals` knows
                    logs_specs=DefaultLogsSpecs(log_dir=scratch),
                )
                refusal = Path(scratch) / "refusal.txt"
                try:
                    elastic_launch(settings, _in_a_process)(train, config, refusal)
                except ChildFailedError as error:
                    if refusal.is_file():
                        raise UserError(refusal.read_text(encoding="utf-8")) from None
                    rank, failed = error.get_first_failure()
                    raised = failed.error_file_data["message"]  # a dict if the process ended by an exception
                    text = raised["message"] if isinstance(raised, dict) else ""
                    ending = f"process {rank} ended with exit code {failed.exitcode} {text}".rstrip()
                    raise RuntimeError(note_failure(record, ending)) from None
        except SignalException as stop:
            raise Stopped(signal.Signals(stop.sigval)) from None

    def join(self) -> None:
        """Meet the other processes. From here on all but the first say nothing but errors."""
        if self.number > 1:
            self.strategy.setup_environment()
            if not self.first:
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (until the process ends)

    def one_by_node(self, work: Callable[[], None]) -> None:
        """Do `work` in the first process of each machine while the others wait, then in those.

        However long it takes: the time limit of a process group is not for downloads.
        """
        if self.number == 1:
            work()
            return
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=100))
        local = self.strategy.local_rank
        for turn in (True, False):
            if (local == 0) == turn:
                work()
            torch.distributed.barrier(patient)

    @contextmanager
    def together(self) -> Iterator[None]:
        """End this process when it fails, so that whoever started it ends the others, which wait for it."""
        try:
            yield
        except Exception as error:
            if self.number == 1:
                raise
            if not isinstance(error, UserError):
                sys.exit(1)  # the log has the traceback
            if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(GROUP):
                raise  # to `start`, in the process that waits for this one
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(2)


def broadcast(choose: Callable[[], T]) -> T:
    """What the first process chooses, or raises, in every process of a run; the others may see other files."""
    if not torch.distributed.is_initialized():
        return choose()
    outcome, own = [None, None], None
    if rank_zero_only.rank == 0:
        try:
            outcome[0] = choose()
        except Exception as error:
            own = error
            outcome[1] = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise own or outcome[1]
    return outcome[0]


def _in_a_process(train: Callable[[Config], None], config: Config, refusal: Path) -> None:
    """`train(config)` in one of the processes that `Processes.start` starts; what it refuses goes to a file."""
    end_with_parent()
    try:
        train(config)
    except UserError as error:
        with suppress(FileExistsError), refusal.open("x", encoding="utf-8") as file:  # the first one counts
            file.write(str(error))
        sys.exit(2)


def failure(record: Path) -> str | None:
    """Why a run failed, as its record says; None if it does not."""
    held = read_record(record) if record.is_file() else {}
    return held["error"] if held.get("status") == "failed" else None


def note_failure(record: Path, error: str, ended_by: str = "error") -> str:
    """Make sure that a run's record says that it failed, and why: what failed first counts, and is returned."""
    before = failure(record)
    if before is None and record.is_file():  # not on another machine, nor before there was one
        write_json(record, {**read_record(record), "status": "failed", "ended_by": ended_by, "error": error})
    return before or error
