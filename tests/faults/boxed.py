"""Commands in a box: each in a process of its own, with its time, memory and exit code measured.

Starting Python with torch takes seconds, so one process imports all and is forked for each command. It never runs
anything itself, and has one thread.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

GIB = 2**30
COMMANDS = {
    "train": "llmfoundry.cli.train:train_main",
    "generate": "llmfoundry.cli.inference:generate_main",
    "eval": "llmfoundry.cli.inference:eval_main",
    "convert": "llmfoundry.cli.convert:convert_main",
    "chat": "llmfoundry.cli.chat:chat_main",
    "xray": "llmfoundry.cli.xray:xray_main",
    "data": "llmfoundry.cli.data:data_main",
    "report": "llmfoundry.cli.report:report_main",
}


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; negative: the signal that killed it.
        peak: bytes of memory beyond what the process had when it was forked.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak: int

    @property
    def lines(self) -> list[str]:
        """What it said on stderr that is an error."""
        return [line for line in self.err.splitlines() if line.strip()]


class Box:
    """Runs commands, one after the other, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        environment |= {"LLMFOUNDRY_CACHE": str(folder / "cache"), "TRITON_INTERPRET": "0"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, env=environment,
            text=True,
        )  # fmt: skip

    def run(self, command: str, *words: str | Path, seconds: float = 60.0, env: dict[str, str] | None = None) -> Ended:
        """Run a command to its end, or kill it when its time is up (code -9)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"command": command, "words": [str(word) for word in words], "seconds": seconds, "env": env or {}}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    mains = {}
    for name, place in COMMANDS.items():
        module, _, function = place.partition(":")
        mains[name] = getattr(importlib.import_module(module), function)
    # What the commands import when they are called.
    for name in ("train.build", "checkpoint.convert", "cli.opening", "hf.gguf_header", "eval.chat", "report.xray"):
        importlib.import_module(f"llmfoundry.{name}")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_forked(mains[request["command"]], **request)._asdict()) + "\n")
        answers.flush()


def _forked(main: object, command: str, words: Sequence[str], seconds: float, env: dict[str, str]) -> Ended:
    out, err = os.memfd_create("out"), os.memfd_create("err")
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.environ.update(env)
            null = os.open(os.devnull, os.O_RDONLY)
            for handle, at in ((null, 0), (out, 1), (err, 2)):
                os.dup2(handle, at)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            sys.argv = ["llmfoundry", command]
            assert callable(main)
            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended = os.pidfd_open(child)
    if not select.select([ended], [], [], seconds)[0]:
        os.killpg(child, signal.SIGKILL)
    os.close(ended)
    _, status, used = os.wait4(child, 0)
    texts = [_text(handle) for handle in (out, err)]
    peak = max(0, used.ru_maxrss - before) * 1024
    return Ended(os.waitstatus_to_exitcode(status), *texts, time.monotonic() - started, peak)


def _text(handle: int) -> str:
    with os.fdopen(handle, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    _serve()
