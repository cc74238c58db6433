"""Code that all commands share: exit codes, errors in one line, and reading a run's YAML.

Exit codes: 0 done (also after a requested stop), 2 the user's mistake (one clear line per machine), 1 anything else
(with a traceback, and the rank that it happened on), 128 + n after signal n where nothing was saved: before the first
step, or at a second signal; and where the reader of stdout is gone. torchrun's own is 1 for all but 0.

Commands import torch inside their functions, so that `--help` and mistakes are answered without waiting for it.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmfoundry import launch
from llmfoundry.cli.quick_check import quick_mistakes
from llmfoundry.code import refuse_code, run_plugins
from llmfoundry.config import ConfigError, RunError, check, drop_replaced
from llmfoundry.integrations.foundry_yaml import Untranslated, translate
from llmfoundry.private import FromEnvironment, cleaned, without_user
from llmfoundry.settings import load_settings
from llmfoundry.stopping import Stop

if TYPE_CHECKING:
    from llmfoundry.train.config import RunConfig

log = logging.getLogger("llmfoundry")
# Seconds for local rank 0 to print an error before another rank exits, after which torchrun kills all ranks.
HEAD_START = 5.0
Command = Callable[[Sequence[str] | None], int]
_said: set[str] = set()  # error lines that have been printed


def command(run: Callable[[Sequence[str] | None], None]) -> Command:
    """Map a command's errors to exit codes."""

    @wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        launch.replace_closed()
        rank = f"[rank {launch.rank()}] " if launch.world_size() > 1 else ""
        level = logging.INFO if launch.is_rank0() else logging.WARNING
        logging.basicConfig(level=level, format=f"{rank}%(message)s", stream=sys.stderr)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_without_secrets)
        for noisy in ("httpx", "datasets", "filelock", "fsspec"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
        try:
            run(argv)
        except ConfigError as error:
            if launch.local_rank() == 0:  # most errors occur on every rank
                _print_error(cleaned(str(error)).split("\n"), rank)
            else:
                time.sleep(HEAD_START)
            _said.clear()
            launch.tell_torchrun(cleaned(f"error: {error}"))
            return 2
        except RunError as error:
            _say(f"{rank}error: {error}")
            launch.tell_torchrun(f"error: {error}")
            return 1
        except KeyboardInterrupt:
            _say(f"{rank}interrupted")
            return 1
        except Stop as stop:
            _say(f"{rank}{stop}: stopped at once; the checkpoints are as they were")
            return stop.code
        except OSError as error:
            if (broken := launch.broken_stdout(suspected=True)) is None:
                return _unexpected(error, rank)
            return _without_stdout(broken, rank)
        except Exception as error:
            return _unexpected(error, rank)
        if "torch" in sys.modules:
            from llmfoundry import runtime

            runtime.stop()
        broken = launch.broken_stdout()
        return 0 if broken is None else _without_stdout(broken, rank)

    return main


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # the exit code tells the same
        print(text, file=sys.stderr, flush=True)


def _unexpected(error: Exception, rank: str) -> int:
    why = _out_of_memory(error) or without_user(traceback.format_exc())
    _say(f"{rank}{why}")
    launch.tell_torchrun(why)
    return 1


def _without_stdout(error: OSError, rank: str) -> int:
    """Return the exit code if stdout cannot be written; print the error unless the reader has left, like `head`."""
    if error.errno == errno.EPIPE:
        return launch.SIGNALLED + signal.SIGPIPE
    _say(f"{rank}error: stdout cannot be written: {error.strerror}")
    return 1


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = cleaned(record.getMessage()), ()
    return True


def _print_error(lines: list[str], rank: str) -> None:
    """Print the lines of an error that the quick check has not printed already."""
    if new := [line for line in lines if line not in _said]:
        _say(f"{rank}error: " + "\n".join(new))
        _said.update(new)


def _out_of_memory(error: Exception) -> str:
    """Return one line for an out-of-memory error of a device; empty for any other error."""
    torch = sys.modules.get("torch")
    is_full = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return f"error: out of memory: {' '.join(str(error).split())}" if is_full else ""


class Translated(NamedTuple):
    """A YAML file in the project's keys, not checked yet.

    Attributes:
        given: the file with its overrides, as written.
        data: the same in the project's keys.
        environment: values that came from the environment, by dotted path in the file.
        notes: a line for each key that was translated or left out; it starts with the key's dotted path.
    """

    given: dict[str, object]
    data: dict[str, object]
    environment: dict[str, FromEnvironment]
    notes: list[str]


def read_translated(path: str, overrides: list[str], untrusted: Collection[str] = ()) -> Translated:
    """Read a YAML file and translate LLM Foundry's keys, with a note for each.

    Args:
        untrusted: for a file that is not the user's, the keys in use: they may not name code that the user does not
            name.
    """
    settings = load_settings(path, overrides, is_users=not untrusted)
    # torch is only imported now: all mistakes in the file's form have been reported.
    import llmfoundry.callbacks  # noqa: F401  registers all monitors and loggers
    from llmfoundry.eval.icl import with_tasks_read
    from llmfoundry.train.config import RunConfig

    refuse_code(settings.data, path, untrusted, settings.given)
    run_plugins(settings.data)
    data, dropped = drop_replaced(RunConfig, settings.data, settings.file, settings.given)
    try:
        data, notes = translate(data, settings.referred - RunConfig.model_fields.keys())
    except Untranslated as error:
        raise ConfigError("\n".join([str(error), *_mistakes(RunConfig, error.rest, Path(path).parent)])) from None
    data = with_tasks_read(data, Path(path).parent)
    return Translated(settings.data, data, settings.environment, [*dropped, *notes])


def _mistakes(config: type[RunConfig], data: dict[str, object], folder: Path) -> list[str]:
    """Return the mistakes in a translated file that is in `folder`."""
    from llmfoundry.eval.icl import with_tasks_read

    found = []
    try:
        data = with_tasks_read(data, folder)
    except ConfigError as error:
        found.append(str(error))
        data = {key: value for key, value in data.items() if not key.startswith(("icl_tasks", "eval_gauntlet"))}
    try:
        check(config, data)
    except ConfigError as error:
        found += str(error).split("\n")
    return found


def read_run_config(path: str, overrides: list[str], untrusted: Collection[str] = ()) -> RunConfig:
    """Read a YAML file as a checked config; LLM Foundry's legacy keys are translated, with a note for each.

    Mistakes that can be found without torch are printed before it is imported, which takes seconds; those that only the
    full check finds follow.

    Args:
        untrusted: see `read_translated`.
    """
    early: list[str] = []
    if "torch" not in sys.modules and launch.local_rank() == 0:
        early = quick_mistakes(path, overrides, is_users=not untrusted)
        _print_error(early, f"[rank {launch.rank()}] " if launch.world_size() > 1 else "")
    translated = read_translated(path, overrides, untrusted)
    from llmfoundry.train.config import RunConfig

    for note in translated.notes:
        log.info("%s", note)
    config = check(RunConfig, translated.data)
    config.remember(translated.environment)
    if early:
        log.warning("no error after all: schema.json is older than the code; run scripts/reference/render.py")
    return config
