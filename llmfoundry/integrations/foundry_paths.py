"""Run names, folders and checkpoint names in LLM Foundry's files: missing ones and placeholders."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from llmfoundry.config import ConfigError
from llmfoundry.integrations.foundry_tree import Note, Tree

_FILE = re.compile(r"(?:ep\d+-ba(?P<step>\d+)|latest)(?:-rank(?:\d+|\{rank\}))?(?:\.pt)?")
_FILLED_IN = re.compile(r"\{(rank|epoch|batch)\}")


def made_up_name(data: Tree) -> list[Note]:
    """Name a run that has no name but whose save folder contains `{run_name}`."""
    folder = data.get("save_folder")
    if data.get("run_name") is not None or "RUN_NAME" in os.environ or "{run_name}" not in str(folder):
        return []
    data["run_name"] = f"run-{_launcher('run_name')}"
    return [Note("run_name", f"is missing; made up {data['run_name']}: write run_name=... to resume this run later")]


def temporary_folder(data: Tree) -> list[Note]:
    """Set a missing save folder to one that all ranks of this node agree on."""
    if data.get("save_folder") is not None:
        return []
    folder = Path(tempfile.gettempdir()) / f"llmfoundry-{_launcher('save_folder')}"
    data |= {"save_folder": str(folder), "save_interval": "0ba"}
    said = f"is missing; the last checkpoint and the logs go to {folder}: write save_folder=... instead"
    return [Note("save_folder", said)]


def without_placeholders(data: Tree) -> list[Note]:
    """Reject a save folder that would depend on step or rank."""
    folder = data.get("save_folder")
    if not isinstance(folder, str) or (found := _FILLED_IN.search(folder)) is None:
        return []
    data["save_folder"] = _FILLED_IN.sub("", folder)  # so that other mistakes are found too
    raise ConfigError(
        f"save_folder: {folder}: {found[0]} is not filled in here: all ranks write each checkpoint together, into a "
        "folder of its step; leave it out"
    )


def load_path(data: Tree, value: object) -> list[str]:
    """Translate `load_path`, a checkpoint's name in Composer; for a single file per checkpoint, that of rank 0."""
    found = data["load_path"] = checkpoint_named(value) if isinstance(value, str) else value
    return [] if found == value else [f"load_path: {found}"]


def checkpoint_named(path: str) -> str:
    """Return the path of a checkpoint, given its name in Composer."""
    if path.startswith("hf:"):
        return path
    found = our_checkpoint(path)
    return path.replace("{rank}", "0") if found == path else found


def _launcher(key: str) -> str:
    """Return a name that all ranks of this node agree on: their parent process, and its start time.

    Raises:
        ConfigError: if the run has several nodes, which share no such process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        raise ConfigError(f"{key}: is missing, and several nodes must agree on it; write {key}=...")
    process = os.getppid() if world > 1 else os.getpid()
    try:  # process ids are reused, in containers soon
        since = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return str(process)
    return f"{process}-{since}"


def our_checkpoint(path: str) -> str:
    """Return the llmfoundry path of a checkpoint that Composer names `FOLDER/ep0-ba10-rank0.pt` or `latest-rank0.pt`.

    A path that exists, or that does not look like a Composer checkpoint, is returned unchanged.
    """
    folder, found = Path(path).parent, _FILE.fullmatch(Path(path).name)
    if Path(path).exists() or found is None or not (folder / "checkpoints").is_dir():
        return path
    ours = folder if found["step"] is None else folder / "checkpoints" / f"step-{found['step']}"
    return str(ours)
