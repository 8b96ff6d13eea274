"""Several processes of one run: how they start, broadcast and fail.

`trainer.devices` above 1 starts that many on this machine; torchrun and srun start theirs themselves. Either way
every process calls `runs.start.start` with the same configuration, and rank 0 alone decides, writes files and prints.
How to use it: docs/distributed.md.
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
GROUP = "drrn-"  # prefix of the torchelastic run ids of `Processes.start`


class Processes:
    """The processes of a run, this one among them.

    Args:
        config: a checked configuration.
        arguments: of Lightning's Trainer; `self.arguments` adds a DDP strategy for several processes.

    Raises:
        UserError: the Trainer refuses an argument, another number of processes was started than the configuration
            has, or the batch cannot be divided evenly between them.
    """

    def __init__(self, config: Config, arguments: dict[str, Any]) -> None:
        asked = config.trainer
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        try:
            kinds = (TorchElasticEnvironment, SLURMEnvironment)
            self.outside = next((kind() for kind in kinds if kind.detect()), None)
            trainer = Trainer(**{**arguments, **quiet})
        except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise UserError(f"trainer.*: Lightning's Trainer refuses this: {error}") from error
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
                "normalises its own share of the batch"
            )
        self.arguments = dict(arguments)
        if self.number > 1 and asked.strategy in ("auto", "ddp"):
            # SuperResolution averages BatchNorm's buffers; DDP would overwrite them with rank 0's.
            self.arguments["strategy"] = DDPStrategy(forward_sync_buffers=False)

    @property
    def to_be_started(self) -> bool:
        """Whether the run needs several processes and this is the only one so far."""
        return self.number > 1 and (self.outside is None or self.outside.world_size() == 1)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes."""
        return rank_zero_only.rank == 0

    def start(self, train: Callable[[Config], None], config: Config, record: Path) -> None:
        """Run `train(config)` in all processes of the run, with torchrun's own agent, and wait for them.

        When one of them fails the agent terminates the others, and the record says why.

        Raises:
            UserError: a process raised it.
            Stopped: a signal came; the processes got it too.
            RuntimeError: a process failed otherwise.
        """
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher import LaunchConfig, elastic_launch

        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # the record has the error
        try:
            with TemporaryDirectory() as scratch:
                settings = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=self.number,
                    run_id=f"{GROUP}{uuid.uuid4().hex}",
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",  # a free port, so that several runs on one machine do not collide
                    local_addr="localhost",
                    max_restarts=0,
                    signals_to_handle="SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT",  # those of `StopSignals`, and SIGQUIT
                    logs_specs=DefaultLogsSpecs(log_dir=scratch),
                )
                refusal = Path(scratch) / "refusal.txt"
                try:
                    elastic_launch(settings, _in_a_process)(train, config, refusal)
                except ChildFailedError as error:
                    if refusal.is_file():
                        raise UserError(refusal.read_text(encoding="utf-8")) from None
                    rank, failed = error.get_first_failure()
                    raised = failed.error_file_data["message"]  # a dict if the process raised an exception
                    text = raised["message"] if isinstance(raised, dict) else ""
                    killed = failed.exitcode < 0
                    by = f"was killed by {failed.signal_name()}" if killed else ""
                    ending = f"process {rank} {by or f'ended with exit code {failed.exitcode} {text}'}".rstrip()
                    # The others only lost the connection; but NCCL aborts a process that lost it.
                    first = killed and failed.exitcode != -signal.SIGABRT
                    raise RuntimeError(note_failure(record, ending, over=first)) from None
        except SignalException as stop:
            raise Stopped(signal.Signals(stop.sigval)) from None

    def join(self) -> None:
        """Join the process group. From here on ranks above 0 print errors only."""
        if self.number > 1:
            self.strategy.setup_environment()
            if not self.first:
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (until the process ends)

    def one_by_node(self, work: Callable[[], None]) -> None:
        """Call `work` on local rank 0 of each machine while the others wait, then on those.

        The default timeout of a process group would end a long download; this one is 100 days.
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
        """On an exception exit with a code, so that the launcher ends the other processes, which wait for it."""
        try:
            yield
        except Exception as error:
            if self.number == 1:
                raise
            if not isinstance(error, UserError):
                sys.exit(1)  # the log has the traceback
            if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(GROUP):
                raise  # to `_in_a_process`
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(2)


def broadcast(choose: Callable[[], T]) -> T:
    """Call `choose` on rank 0, and return or raise its outcome on every rank; the others may see other files."""
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
    """Run `train(config)` in a process of `Processes.start`; the text of its UserError goes to the file `refusal`."""
    end_with_parent()
    try:
        train(config)
    except UserError as error:
        with suppress(FileExistsError), refusal.open("x", encoding="utf-8") as file:  # of the first process to refuse
            file.write(str(error))
        sys.exit(2)


def failure(record: Path) -> str | None:
    """The error in a run's record; None if its status is not "failed"."""
    held = read_record(record) if record.is_file() else {}
    return held["error"] if held.get("status") == "failed" else None


def note_failure(record: Path, error: str, ended_by: str = "error", over: bool = False) -> str:
    """Set a run's record to "failed", unless an earlier failure is in it and not `over`; returns the error kept."""
    before = None if over else failure(record)
    if before is None and record.is_file():  # on another machine, or early, there is none
        write_json(record, {**read_record(record), "status": "failed", "ended_by": ended_by, "error": error})
    return before or error
