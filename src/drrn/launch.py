"""Starting an entry point, printing its user errors, and its exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from drrn.errors import UserError, printable
from drrn.help import explained, show, unknown_option, unnamed_group


def launched() -> bool:
    """Whether torchrun, srun or `drrn.runs.processes` started this process as one of several."""
    by_srun = "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return "TORCHELASTIC_RUN_ID" in os.environ or (by_srun and int(os.environ.get("SLURM_NTASKS", 1)) > 1)


def first_process() -> bool:
    """Whether this is rank 0 of the processes that torchrun or srun started, or the only process."""
    return not launched() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


@contextmanager
def refusing() -> Iterator[None]:
    """Context for the task of a Hydra entry point: print a user error in one line and exit with 2.

    Paths are relative to the directory where the command was started, also with `hydra.job.chdir`.

    Hydra passes SystemExit on; before other exceptions it would print "Error executing job with overrides". In a
    multirun the error is raised as the job's result, for the sweeper.
    """
    if HydraConfig.initialized():
        os.chdir(HydraConfig.get().runtime.cwd)
    try:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.RUN:
            for given in HydraConfig.get().overrides.hydra:
                if given.startswith(("hydra.sweeper", "hydra/sweeper")):
                    raise UserError(f"{given}: this is no sweep; add -m")
        yield
    except (UserError, OSError) as error:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _refuse(error)


def _refuse(reason: object) -> NoReturn:
    if isinstance(reason, OSError):
        users = isinstance(reason, PermissionError) or reason.errno == errno.ENAMETOOLONG
        if not users or reason.filename is None:  # not about a file that the user named
            raise reason
        reason = f"{printable(reason.filename)}: {reason.strerror}"
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.exit(2)


def launch(main: Callable[[], Any]) -> None:
    """Run a Hydra entry point; a user error is printed in one line, without a traceback, and exits with 2.

    `--help` prints the docstring of its module and the keys of its schema, `KEYS`.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises exceptions instead of printing them
    with suppress(AttributeError):  # sys.stdout has been replaced
        sys.stdout.reconfigure(errors="replace")  # a terminal without "×" or "γ" shows "?"; stderr escapes them
    # Read when torch is imported: OpenMP threads that wait for each other spin for some microseconds and then sleep.
    # By default they spin for long, and on a shared machine a step then takes many times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if "SLURM_NTASKS" in os.environ and "SLURM_PROCID" not in os.environ:  # salloc without srun: one process;
        os.environ["SLURM_JOB_NAME"] = "interactive"  # Lightning recognises it by this name
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # Hydra wants them first
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            module = sys.modules[main.__module__]
            show(module.__doc__ or "", module.KEYS, sys.argv[1:])
            return
        if (wrong := unknown_option(sys.argv[1:])) is not None:
            _refuse(wrong)
        main()
    except KeyboardInterrupt:  # Ctrl-C before there is anything to save
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has closed the pipe: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except ValueError:
        if (wrong := unnamed_group(sys.argv[1:])) is None:
            raise
        _refuse(wrong)
    except HydraException as error:
        _refuse(explained(error, sys.argv[1:]))
    except (UserError, OSError, OmegaConfBaseException) as error:
        _refuse(error)
