"""Commands in processes of their own, forked from a process that has imported torch and Lightning already.

Starting an interpreter that imports Lightning takes 5 s of a core. Tests of signals, kills and exit codes need a
process, not its start. The start itself (imports, refusals before them) is tested with real commands.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOADED = [
    "pytest", "train", "evaluate", "drrn.datamodule", "drrn.runs.journal", "drrn.runs.lightning",
    "drrn.sweep.outcome", "drrn.tracking.wandb_run", "drrn.weights.ours",
]  # fmt: skip

RUN = subprocess.run
OWN = ("WANDB_SERVICE", "PL_GLOBAL_SEED", "HYDRA_FULL_ERROR")  # what this process has set for itself


def forking() -> multiprocessing.context.BaseContext:
    """The context of processes forked from a server process that has only imported LOADED."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for what that one imports
        forkserver.set_forkserver_preload(LOADED)
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


class Started:
    """`python src/SCRIPT.py words …` with the interface of `subprocess.Popen`, in a session of its own.

    Use it in a `with`: at its end the process and its children are killed.

    Args:
        script: the name of a file of src/, or source text.
        words: its arguments.
        cwd: its directory.
        environment: changes to this process's environment.
    """

    def __init__(self, script: str, *words: object, cwd: Path, **environment: str) -> None:
        self._said = TemporaryDirectory()
        self.out, self.err = (Path(self._said.name, name) for name in ("out", "err"))
        self.out.touch()
        self.err.touch()
        environment = {key: value for key, value in os.environ.items() if key not in OWN} | environment
        self._process = forking().Process(
            target=_begin,
            args=(script, [*map(str, words)], cwd, environment, self.out, self.err),
        )
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float = 120) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a process that was started", timeout, self.out.read_bytes())
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and its children."""
        for end in (os.killpg, os.kill):  # it may have no session yet
            with suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)
        self._process.join()


def run(command: Sequence[str], env: dict[str, str] | None = None, **how: Any) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, file of src/, …], text=True)` in a forked process; other commands as usual."""
    program, path, *words = command
    if program != sys.executable or not path.endswith(".py"):
        return RUN(command, env=env, **how)
    with Started(Path(path).name, *words, cwd=Path(how.get("cwd", Path.cwd())), **(env or {})) as process:
        code, (out, err) = process.wait(), process.communicate()
    return subprocess.CompletedProcess(command, code, out, err)


def wait_for(what: Callable[[], object], seconds: float = 120) -> None:
    """Wait until `what()` is true; fail after `seconds`, enough for a slow machine."""
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            pytest.fail("waited in vain")
        time.sleep(0.02)


def _begin(script: str, words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """In the new process, do what a shell and an interpreter do before a script begins."""
    os.setsid()
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if "\n" not in script:
            sys.argv = [str(ROOT / "src" / script), *words]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = ["-c", *words]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(script, vars(main))
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
