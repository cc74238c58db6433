"""What a run leaves in its `save_folder`, apart from checkpoints: config.yaml, metrics.jsonl, summary.json.

A folder belongs to one run. Nothing is written before `claim` has found it free, or has been asked to resume it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import IO

import yaml

from llmfoundry.config import ConfigError
from llmfoundry.train.callback import Metrics

# Keys whose change makes another run of it: a checkpoint made under other values is not continued.
_IDENTITY = (
    "seed", "max_seq_len", "model", "tokenizer", "train_loader.dataset", "train_loader.drop_last",
    "global_train_batch_size",
)  # fmt: skip
_NO_IDENTITY = ("attn_impl", "moe_impl", "mlp_impl", "cache_dir")  # another way to the same values
# What a run that ended before its first step can leave: the folder is still free.
_TRACES = {".lock", "config.yaml", "config.yaml.tmp", "metrics.jsonl"}

Plain = dict[str, object]


class RunFolder:
    """The `save_folder` of a run; of many ranks only rank 0 makes one."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock  # held as long as the process lives; the kernel lets go of it at any death
        self._metrics: IO[str] | None = None

    @classmethod
    def claim(cls, path: Path, config: Plain, autoresume: bool) -> RunFolder:
        """Take a folder for a run, or take it up again.

        Args:
            path: made if it is not there.
            config: the resolved YAML, written to config.yaml.
            autoresume: whether a folder already in use is continued.

        Raises:
            ConfigError: as `check_free`, or it cannot be written, or a process that is alive holds it.
        """
        check_free(path, config, autoresume)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"save_folder: {path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"save_folder: {path} is in use by a process that is still running") from None
        folder = cls(path, lock)
        _write(path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        return folder

    def open_metrics(self, step: int) -> None:
        """Continue metrics.jsonl after `step`: what a killed run wrote beyond its checkpoint is dropped."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        kept = [line for i, line in enumerate(lines, 1) if line.endswith("\n") and self._step_of(i, line) <= step]
        if len(kept) < len(lines) or not file.exists():
            _write(file, "".join(kept))
        self._metrics = file.open("a")

    def _step_of(self, number: int, line: str) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{self.path / 'metrics.jsonl'}: line {number} is damaged; remove it from there on"
            ) from None

    def sync(self) -> None:
        """What metrics.jsonl holds survives a power cut: a checkpoint that does must not stand without it."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def write_metrics(self, metrics: Metrics) -> None:
        """Append one line; what is not finite becomes null, for JSON has no word for it."""
        assert self._metrics is not None
        self._metrics.write(json.dumps({key: _plain(value) for key, value in metrics.items()}) + "\n")
        self._metrics.flush()

    def write_summary(self, summary: Metrics) -> None:
        """Write summary.json."""
        _write(
            self.path / "summary.json",
            json.dumps({k: _plain(v) for k, v in summary.items()}, indent=2) + "\n",
        )


def read_summary(path: Path) -> Plain:
    """What summary.json says; nothing if there is none, or no sound one."""
    try:
        summary = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def check_free(path: Path, config: Plain, autoresume: bool) -> None:
    """Look whether a run may have a folder, and write nothing.

    Raises:
        ConfigError: it is used and not to be resumed, or by another run, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"save_folder: {path} is a file; name a folder")
    if path.exists() and not _is_free(path):
        if not autoresume:
            raise ConfigError(
                f"save_folder: {path} is already used; choose another, or continue that run with autoresume=true"
            )
        _check_same_run(path / "config.yaml", config)
    standing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(standing, os.W_OK | os.X_OK):
        raise ConfigError(f"save_folder: {path} cannot be written: no permission in {standing}")


def _is_free(path: Path) -> bool:
    """Whether a folder is empty, or a run had claimed it and ended before its first step."""
    names = {child.name for child in path.iterdir()}
    if not names:
        return True
    metrics = path / "metrics.jsonl"
    return ".lock" in names and names <= _TRACES and not (metrics.exists() and metrics.stat().st_size)


def _check_same_run(file: Path, config: Plain) -> None:
    """Refuse to continue a run under another identity.

    Raises:
        ConfigError: the folder is no run's, or an identity key differs.
    """
    try:
        before = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"save_folder: {file.parent} holds no run to resume (no config.yaml); choose another"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(before, dict):
        raise ConfigError(f"{file}: holds no run's settings; restore it, or choose another save_folder")
    old, new = _flat(before), _flat(config)
    for key in sorted(old.keys() | new.keys()):
        same_run = not key.startswith(_IDENTITY) or key.rsplit(".", 1)[-1] in _NO_IDENTITY
        if old.get(key) != new.get(key) and not same_run:
            raise ConfigError(
                f"{key}: {new.get(key)!r} differs from {old.get(key)!r} of the run in {file.parent}; "
                "restore it, or choose another save_folder"
            )


def _flat(tree: object, path: str = "") -> dict[str, object]:
    if isinstance(tree, dict) and tree:
        return {
            k: v for key, part in tree.items() for k, v in _flat(part, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: tree}


def _plain(value: float | int | str | list[float] | None) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
