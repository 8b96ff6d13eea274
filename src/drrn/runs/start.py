"""Starting a run: the checks and messages before torch and Lightning are imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory

from drrn.config import Config
from drrn.disk import check_output
from drrn.errors import UserError
from drrn.fast.threads import Watch
from drrn.identity import run_dir
from drrn.launch import launched
from drrn.runs.record import done_before, finished_message, own_record


def start(config: Config) -> None:
    """Train, evaluate and record one network unless it is finished (`runs.run.train`).

    Raises:
        UserError: the record has the status "failed" and the error, except for errors found before the work, which
            leave no record.
        Stopped: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP; the status is "stopped", and the same command resumes.
    """
    with tried(config) as config:
        own_record(run_dir(config))  # a damaged one is a UserError
        finished = done_before(config)
        if finished is not None and not launched():
            print(finished_message(config, finished))
            return
        check_output("output", run_dir(config), folder=True)
        watch = Watch()  # measures the machine's load while torch is imported
        from drrn.runs.run import train

        train(config, watch, start)


@contextmanager
def tried(config: Config) -> Iterator[Config]:
    """The configuration for `trainer.fast_dev_run=n`: n steps, n images a set, no logger, a temporary folder."""
    extra = dict(config.trainer_extra or {})
    steps = extra.pop("fast_dev_run", False)
    if not isinstance(steps, int) or steps < 0:
        raise UserError(f"trainer.fast_dev_run = {steps}: true, or a number of steps")
    if not steps:
        yield config
        return
    length = {"max_steps": int(steps), "max_epochs": None, "val_check_interval": int(steps), "log_every_n_steps": 1}
    with TemporaryDirectory() as folder:
        yield replace(
            config,
            output=folder,
            ckpt_path=None,
            trainer=replace(config.trainer, **length),
            trainer_extra={**extra, "limit_val_batches": int(steps), "limit_test_batches": int(steps)},
            logger=replace(config.logger, wandb=False),
            logger_extra={},
        )
    print("trainer.fast_dev_run: the run works; nothing of it is kept")
