"""Checkpoints: written whole or not at all, checked before use, loaded on any mesh and number of processes.

    checkpoints/
      latest -> step-1200        for people and scripts; scanning the folder is the truth
      step-1200/
        MANIFEST.json            size and SHA-256 of every other file; written last
        tensors.json             where each tensor lies (storage.py)
        model-00000.safetensors  a file a rank; optimizer-, rng- likewise
        trainer.json             the step, what the trainer put in, who wrote it
        config.yaml, tokenizer/  all that generation needs
      step-1300.tmp-5e1f.../     being written, or left by a killed run: ignored, and removed by the next save

A save writes under a temporary name, syncs every file and folder, and renames: whatever kills it, the
checkpoints before it stand. A folder that exists is never written to; a second checkpoint of one step is
`step-1200-r1`. All that is no tensor is JSON or YAML, and nothing is unpickled. One run owns the folder
(`RunFolder` holds its lock).

Every function here that takes or loads a checkpoint is for all ranks to call together.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint import SavePlanner
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.checkpoint.manifest import (
    CONFIG,
    INDEX,
    MANIFEST,
    TRAINER,
    CheckpointError,
    Written,
    checkpoints,
    find,
    fsync_folder,
    is_whole,
    measure,
    read_manifest,
    remove,
    verify,
    write_file,
    write_manifest,
)
from llmfoundry.checkpoint.storage import Entry, StagedPlanner, TensorReader, TensorWriter, read_index
from llmfoundry.checkpoint.tensors import (
    check_same_model,
    model_tensors,
    optimizer_memory,
    optimizer_tensors,
    rng_room,
    rng_tensors,
    set_rng,
)
from llmfoundry.dtensor import local_part
from llmfoundry.layers.lora import is_adapter

log = logging.getLogger(__name__)

# One process is a normal way to save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
Files = dict[str, Written]
T = TypeVar("T")


class Tokenizer(Protocol):
    """What a checkpoint asks of a tokenizer; those of `transformers` have it."""

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write what `from_pretrained` needs into a new folder."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; those before it stand."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint holds.

    Attributes:
        step: completed steps; names the folder.
        model: its parameters and persistent buffers are saved from, or loaded into, where they are.
        optimizer: None to leave its state out.
        trainer: what else is needed to continue, as JSON; handed back by `Checkpointer.load`.
        config: the resolved configuration as plain data.
        tokenizer: saved beside the model.
    """

    step: int
    model: nn.Module
    optimizer: Optimizer | None = None
    trainer: Mapping[str, Json] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None


class Checkpointer:
    """Saves to, finds in and loads from one run's folder.

    Args:
        folder: `save_folder/checkpoints`; made by the first save.
        keep: newest checkpoints to keep; -1 keeps all.
        asynchronous: whether `save` returns when everything is copied to the CPU, and a thread writes it.
    """

    def __init__(self, folder: str | Path, keep: int = -1, asynchronous: bool = False) -> None:
        if keep == 0 or keep < -1:
            raise ValueError(f"keep={keep}: write -1 to keep all checkpoints, or 1 or more")
        self.folder = Path(folder)
        self.keep = keep
        self._unusable: set[Path] = set()  # seen damaged by `latest`: neither counted nor deleted
        self._verified: Path | None = None  # by `latest` or `look`: not read a second time to load it
        self._reaped = False
        self._pending: Future[Path] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._stage: dict[str, Tensor] = {}
        # The writer's own group: its collectives must not meet those of a step that goes on meanwhile.
        self._group: dist.ProcessGroup | None = None
        if runtime.world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=1))

    def save(self, state: CheckpointState) -> Path:
        """Write a checkpoint, after the one in flight if there is one.

        Returns:
            Its folder; under `asynchronous`, what it will be unless that name is taken (`wait` returns it).

        Raises:
            SaveError: on all ranks, if this one or the one in flight failed on any. The run can go on.
        """
        self.wait()
        tensors = model_tensors(state.model) | optimizer_tensors(state.model, state.optimizer) | rng_tensors()
        trainer = {"step": state.step} | dict(state.trainer) | {"saved_by": _writer()}
        texts = {
            TRAINER: json.dumps(trainer, indent=1),
            CONFIG: yaml.safe_dump(dict(state.config), sort_keys=False),
        }
        if self._thread is None:
            live = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            return self._write(tensors, live, state.step, texts, state.tokenizer)
        planner = StagedPlanner(self._staged(tensors))
        self._pending = self._thread.submit(self._write, tensors, planner, state.step, texts, state.tokenizer)
        return self.folder / f"step-{state.step}"

    def poll(self) -> Path | None:
        """Without waiting: the checkpoint that an asynchronous save has finished since the last call, if any.

        Ranks may see the end of a save a step apart, so nothing collective may hang on the answer.

        Raises:
            SaveError: that save failed.
        """
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> Path | None:
        """Wait for the save in flight and return its folder; None if there is none.

        Raises:
            SaveError: it failed.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def latest(self) -> Path | None:
        """The newest checkpoint whose every file is intact, or None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
        """
        found = _on_rank0(lambda: checkpoints(self.folder))
        first_error = None
        for path in found:
            try:
                verify(path)
                self._verified = path.resolve()
                return path
            except CheckpointError as error:
                log.error("SKIPPING A DAMAGED CHECKPOINT: %s; looking for an older one", error)
                self._unusable.add(path)
                first_error = first_error or error
        if first_error is not None:
            raise CheckpointError(f"{self.folder}: none of {len(found)} checkpoints can be used; {first_error}")
        return None

    def look(self, path: Path) -> dict[str, Json]:
        """What `load` will return, before anything is loaded; raises CheckpointError if any file is damaged."""
        path = find(path)
        if path != self._verified:
            verify(path)
            self._verified = path
        return _trainer(path)

    def load(self, path: Path, state: CheckpointState) -> dict[str, Json]:
        """Load a checkpoint into the model and the optimizer, whatever mesh it was saved on.

        The random state comes back too if the number of ranks is the same; with another, it is left as it is.

        Args:
            path: a checkpoint, or a folder with checkpoints (the newest).
            state: `model` and `optimizer` are loaded into; the rest is not looked at.

        Returns:
            What `state.trainer` was, and `step`.

        Raises:
            CheckpointError: it is damaged, or of another model; neither model nor optimizer has changed.
        """
        path = find(path)
        manifest = read_manifest(path) if path == self._verified else verify(path)
        entries, trainer = _index(path, manifest), _trainer(path)
        model = model_tensors(state.model)
        try:
            check_same_model(entries, model, exact_dtype=True)
            memory = optimizer_memory(entries, state.model, state.optimizer)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        rng = rng_room(entries)
        _read(path, entries, model | {name: part.room for name, part in memory.items()} | rng)
        if state.optimizer is not None:
            state.optimizer.state.clear()
            for parameter, key, tensor in memory.values():
                state.optimizer.state[parameter][key] = tensor
        set_rng(rng)
        return trainer

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each tensor, copied to the CPU; the same memory each time, pinned if from a GPU."""
        for name, tensor in tensors.items():
            local = local_part(tensor).detach()
            if name not in self._stage:
                self._stage[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self._stage[name].copy_(local, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._stage[name] for name in tensors}

    def _write(
        self,
        tensors: dict[str, Tensor],
        planner: SavePlanner,
        step: int,
        texts: dict[str, str],
        tokenizer: Tokenizer | None,
    ) -> Path:
        temporary = self.folder / f"step-{step}.tmp-{uuid.uuid4().hex[:12]}"  # rank 0's name counts
        writer = TensorWriter(partial(self._open, temporary), partial(self._commit, step, texts, tokenizer))
        try:
            with torch.no_grad():
                metadata = dcp.save(
                    tensors,
                    storage_writer=writer,
                    planner=planner,
                    process_group=self._group,
                    no_dist=runtime.world_size() == 1,
                )
        except dcp.CheckpointException as error:  # a BaseException, carrying what went wrong on each rank
            shutil.rmtree(temporary, ignore_errors=True)
            raise SaveError(f"step {step} could not be saved to {self.folder}: {_reason(error)}") from error
        assert metadata.storage_meta is not None and metadata.storage_meta.checkpoint_id is not None
        return Path(metadata.storage_meta.checkpoint_id)

    def _open(self, temporary: Path) -> Path:
        """Make the folder to write to; on rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._reaped:  # what dead runs left: this run has the folder to itself
            self._reaped = True
            for stale in (*self.folder.glob("step-*.tmp-*"), *self.folder.glob("latest.tmp-*")):
                try:
                    remove(stale)
                except OSError as error:
                    log.warning("cannot remove %s: %s", stale, error)
        temporary.mkdir()
        return temporary

    def _commit(
        self,
        step: int,
        texts: dict[str, str],
        tokenizer: Tokenizer | None,
        temporary: Path,
        files: Files,
    ) -> Path:
        """Complete a folder that every rank has written to, and give it its name; on rank 0."""
        for name, written in files.items():
            file = temporary / name
            if not file.is_file() or file.stat().st_size != written.bytes:
                raise OSError(f"{file} is not as a rank wrote it; all ranks must share one save_folder")
        files |= {name: write_file(temporary / name, text.encode()) for name, text in texts.items()}
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary / "tokenizer")
            for path in (temporary / "tokenizer", *(temporary / "tokenizer").rglob("*")):
                if path.is_dir():
                    fsync_folder(path)
                else:
                    files[path.relative_to(temporary).as_posix()] = measure(path, sync=True)
        write_manifest(temporary, step, files)
        final, again = self.folder / f"step-{step}", 0
        while final.exists():
            again += 1
            final = self.folder / f"step-{step}-r{again}"
        temporary.rename(final)
        fsync_folder(self.folder)
        try:
            self._point_latest(final)
            self._prune(final)
        except OSError as error:  # the checkpoint itself is safe
            log.warning("after saving %s: %s", final, error)
        return final

    def _point_latest(self, path: Path) -> None:
        link = self.folder / f"latest.tmp-{uuid.uuid4().hex[:12]}"
        link.symlink_to(path.name)
        link.replace(self.folder / "latest")

    def _prune(self, newest: Path) -> None:
        """Delete all but the newest `keep` whole checkpoints; never the last written, nor damaged ones."""
        if self.keep == -1:
            return
        others = (path for path in checkpoints(self.folder) if path != newest and path not in self._unusable)
        for path in [path for path in others if is_whole(path)][self.keep - 1 :]:
            remove(path)


class Contents(NamedTuple):
    """What a checkpoint says about itself, tensors aside."""

    path: Path
    step: int
    config: dict[str, object]
    trainer: dict[str, Json]
    tokenizer: Path | None  # a folder for `from_pretrained`


def read(path: str | Path) -> Contents:
    """Read what a checkpoint says about itself.

    Args:
        path: a checkpoint, a folder with checkpoints (the newest), or a run's `save_folder`.

    Raises:
        ConfigError: it is none, or one of the files read is damaged.
    """
    path = find(path)
    verify(path, only=lambda name: not name.endswith(".safetensors"))
    try:
        config = yaml.safe_load((path / CONFIG).read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path / CONFIG}: is malformed: {' '.join(str(error).split())}") from None
    trainer = _trainer(path)
    step = trainer["step"]
    assert isinstance(step, int)
    tokenizer = path / "tokenizer"
    return Contents(path, step, config, trainer, tokenizer if tokenizer.is_dir() else None)


@torch.no_grad()
def load_model_only(path: str | Path, model: nn.Module) -> None:
    """Load a checkpoint's weights and buffers into `model`, converted to the dtypes that it has.

    Adapters stay as they are where the checkpoint has none: so they begin on a base model.

    Args:
        path: as in `read`.
        model: materialised, on any device and mesh.

    Raises:
        CheckpointError: it is damaged, or of another model, which has not changed then.
    """
    path = find(path)
    entries = _index(path, verify(path, only=lambda name: name == INDEX or name.startswith("model-")))
    tensors = {name: tensor for name, tensor in model_tensors(model).items() if name in entries or not is_adapter(name)}
    try:
        check_same_model(entries, tensors, exact_dtype=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _read(path, entries, tensors)


def _trainer(path: Path) -> dict[str, Json]:
    try:
        trainer = json.loads((path / TRAINER).read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / TRAINER}: is malformed ({type(error).__name__}: {error})") from None
    if not isinstance(trainer, dict) or not isinstance(trainer.get("step"), int):
        raise CheckpointError(f"{path / TRAINER}: is malformed (no step)")
    return trainer


def _index(path: Path, manifest: Files) -> dict[str, Entry]:
    try:
        entries = read_index(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    unlisted = {chunk.file for entry in entries.values() for chunk in entry.chunks} - manifest.keys()
    if unlisted:
        raise CheckpointError(f"{path / INDEX}: names {min(unlisted)!r}, which {MANIFEST} does not list")
    return entries


def _read(path: Path, entries: dict[str, Entry], tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place."""
    try:
        dcp.load(
            tensors,
            storage_reader=TensorReader(path, entries),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=runtime.world_size() == 1,
        )
    except dcp.CheckpointException as error:  # a BaseException
        raise CheckpointError(f"{path}: could not be loaded: {_reason(error)}") from error


def _reason(error: dcp.CheckpointException) -> str:
    """The first rank's reason on one line; an interrupt goes on as what it is."""
    for rank, (failure, _) in sorted(error.failures.items()):
        if isinstance(failure, KeyboardInterrupt | SystemExit):
            raise failure
        where = f"rank {rank}: " if runtime.world_size() > 1 else ""
        return f"{where}{type(failure).__name__}: {' '.join(str(failure).split())}"
    return str(error)


def _writer() -> dict[str, Json]:
    return {
        "torch": torch.__version__,
        "ranks": runtime.world_size(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _on_rank0(ask: Callable[[], T]) -> T:
    """Rank 0's answer, on all ranks."""
    answers: list[T | None] = [ask() if runtime.rank() == 0 else None]
    if runtime.world_size() > 1:
        dist.broadcast_object_list(answers)
    answer = answers[0]
    assert answer is not None
    return answer
