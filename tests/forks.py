"""Processes of tests that start in milliseconds: forks of one process that has imported all that a run imports.

Python needs six seconds of a core for torch, transformers and this package; a run of three steps needs half of one. So
the standard library's fork server imports them once for each process of pytest, and `start`, `run` and `in_processes`
take a fork of it: a process of its own, with its own signals, environment, folder, output and exit code. Of torchrun
the ranks are forks as well. What concerns the start of Python itself (what is imported, the installed script) takes
`subprocess`.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, NoReturn

import torch.multiprocessing as mp

TORCHRUN = ("-m", "torch.distributed.run")
IMPORTED = (
    "pytest", "torch.distributed.run", "torch.distributed.fsdp", "torch._dynamo", "transformers",
    "llmfoundry.callbacks", "llmfoundry.cli.train", "llmfoundry.cli.inference", "llmfoundry.cli.opening",
    "llmfoundry.train.build", "llmfoundry.report.page",
)  # fmt: skip
# As pytest was started: what a test sets for a while is given to its own processes alone.
_ENVIRONMENT = dict(os.environ) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Started:
    """A process, as `subprocess.Popen` would give it; stdout and stderr are kept in files."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None, apart: bool) -> None:
        self.args = list(words)
        self.returncode: int | None = None
        self._out, self._err = tempfile.NamedTemporaryFile("r"), tempfile.NamedTemporaryFile("r")
        err = self._err if apart else self._out
        place = (dict(os.environ if env is None else env), str(cwd or Path.cwd()))
        given = (list(words), *place, self._out.name, err.name)
        _serve()
        self._process = multiprocessing.get_context("forkserver").Process(target=_become, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        atexit.register(self.kill)  # what a test that failed has left

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, self._text(self._out))
        atexit.unregister(self.kill)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._text(self._out), self._text(self._err)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @staticmethod
    def _text(file: IO[str]) -> str:
        file.seek(0)
        return file.read()


def start(*words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Started:
    """`python WORDS`: a script, `-m module` or `-c code`, and its arguments; stdout and stderr are one."""
    return Started(words, env, cwd, apart=False)


def run(
    *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """`python WORDS` to its end."""
    started = Started(words, env, cwd, apart=True)
    try:
        out, err = started.communicate(timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    return subprocess.CompletedProcess(started.args, started.wait(), out, err)


def in_processes(job: Callable[..., None], args: tuple[object, ...], nprocs: int) -> None:
    """`torch.multiprocessing.spawn` by forks: `job(i, *args)` in each; raises what any of them raises."""
    _serve()
    mp.start_processes(_job, (dict(os.environ), job, args), nprocs=nprocs, start_method="forkserver")


def _serve() -> None:
    """Start the fork server, once, as if no test had changed the environment."""
    if forkserver._forkserver._forkserver_pid is not None:  # type: ignore[attr-defined]
        return
    changed = dict(os.environ)
    forkserver.set_forkserver_preload(list(IMPORTED))
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(changed)


def _job(rank: int, env: dict[str, str], job: Callable[..., None], args: tuple[object, ...]) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(env)
    job(rank, *args)


def _become(words: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> NoReturn:
    """Be `python WORDS` from here on."""
    gc.freeze()  # what is forked is not looked through again: that would copy every page of it
    for handle, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, handle)
        os.close(file)
    os.chdir(cwd)
    if tuple(words[:2]) == TORCHRUN:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = Rank  # type: ignore[misc,assignment]
    _main(words, env)


def _main(words: list[str], env: dict[str, str]) -> NoReturn:
    """What Python does from its first line to its exit code."""
    from llmfoundry import launch

    os.environ.clear()
    os.environ.update(env)
    launch.BEGUN = time.monotonic()
    sys.orig_argv = [sys.executable, *words]
    code: object = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


class Rank:
    """A rank that torchrun starts: a fork of torchrun's process, with what torchrun uses of `subprocess.Popen`."""

    def __init__(
        self, args: Sequence[str], env: dict[str, str], stdout: None, stderr: None, start_new_session: bool
    ) -> None:
        assert args[:2] == (sys.executable, "-u") and stdout is None and stderr is None and start_new_session, args
        self.args = args
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if callable(signal.getsignal(number)):  # torchrun's own
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _main(list(args[2:]), env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        return code
