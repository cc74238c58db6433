"""Checkpoints: written whole or not at all, and brought back into a model and its optimizer.

    checkpoints/
      latest -> step-1200        for people and scripts; scanning the folder is the truth
      step-1200/
        MANIFEST.json            size and SHA-256 of every other file; written last
        tensors.json             where each tensor lies (storage.py)
        model-00000.safetensors  one file per rank; optimizer-, rng- likewise
        trainer.json             the step, what the trainer put in, who wrote it
        config.yaml, tokenizer/, generation_config.json  all that generation needs
      step-1300.tmp-5e1f.../     being written, or left by a killed run: ignored, and removed by the next run or save

Of a run that saves to a store, the folder is a station on the way there (store.py).

A save writes under a temporary name, syncs every file and folder, and renames: whatever kills it, earlier checkpoints
stay intact. A folder that exists is never written to; a second checkpoint of one step is `step-1200-r1`. Everything but
tensors is JSON or YAML, and nothing is unpickled. What else happens to the folder is in folder.py.

Every function here that takes or loads a checkpoint is for all ranks to call together.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.checkpoint.finding import Candidate, Found, newest_usable
from llmfoundry.checkpoint.folder import KEPT, CheckpointFolder, Kept
from llmfoundry.checkpoint.index import Entry
from llmfoundry.checkpoint.manifest import (
    CONFIG,
    TRAINER,
    CheckpointError,
    DamagedError,
    NotFiniteError,
    SaveError,
    checkpoints,
    fsync_folder,
    measure,
    number_of,
    write_file,
    write_manifest,
)
from llmfoundry.checkpoint.reading import (
    Base,
    Contents,
    Files,
    find_base,
    load_base,
    load_model_only,
    read,
    read_one,
    read_tensors,
)
from llmfoundry.checkpoint.staging import Stage
from llmfoundry.checkpoint.storage import SavePlan, plan_save, save_parts
from llmfoundry.checkpoint.store import RunStore
from llmfoundry.checkpoint.tensors import (
    check_same_model,
    empty_state,
    join_halves,
    model_tensors,
    optimizer_tensors,
    rng_room,
    rng_tensors,
    rooms_to_split,
    set_rng,
)
from llmfoundry.checkpoint.uploading import Uploader
from llmfoundry.hf.generation import GENERATION
from llmfoundry.kernels.halves import Halves
from llmfoundry.settings import write_resolved
from llmfoundry.strict_json import Json

__all__ = ["Checkpointer", "CheckpointState", "Contents", "SaveError", "load_model_only", "read"]

log = logging.getLogger(__name__)
WRITER = "checkpoint"  # the name of the thread that writes


class Tokenizer(Protocol):
    """What a checkpoint asks of a tokenizer; those of `transformers` have it."""

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write what `from_pretrained` needs into a new folder."""


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
        generation: a generation_config.json, kept beside the tokenizer.
        base: where the frozen weights came from; given, they are not saved.
        kept: why it is kept when newer ones are there.
    """

    step: int
    model: nn.Module
    optimizer: Optimizer | None = None
    trainer: Mapping[str, Json] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    generation: str | None = None
    base: Base | None = None
    kept: Kept = "newest"


class Beside(NamedTuple):
    """What a checkpoint holds beside tensors, as it is when it is saved.

    Attributes:
        trainer: JSON, since the run goes on to change what it is made of.
        config: plain data, which nothing changes.
    """

    step: int
    trainer: str
    config: Mapping[str, object]
    generation: str | None
    tokenizer: Tokenizer | None


class Checkpointer:
    """Saves to, finds in and loads from one run's folder.

    Args:
        folder: `save_folder/checkpoints`; made by the first save.
        keep: newest checkpoints to keep; -1 keeps all.
        asynchronous: whether `save` returns at once, and a thread copies (staging.py) and writes.
        timeout: seconds until a save fails in which some rank does not take part.
        store: where checkpoints go from there; a save is done when the store has it.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = -1,
        asynchronous: bool = False,
        timeout: float = 1800.0,
        store: RunStore | None = None,
    ) -> None:
        self.folder = CheckpointFolder(Path(folder), keep if store is None else 1)
        self.asynchronous = asynchronous
        self.store = store
        # Called on rank 0 before a checkpoint becomes one, here or in the store; raises TakenOver.
        self.check_owner: Callable[[], None] = lambda: None
        self.longest_save = 0.0  # seconds until a save was on disk, or in the store; 0 before the first
        self._begun = 0.0  # when the save in flight began, by the monotonic clock
        self.newest_saved: Path | str | None = None  # what this run has written or found intact: a folder, or a URL
        self._pending: Future[Path | str | None] | None = None
        self._config: tuple[Mapping[str, object], str] | None = None  # of the last save, and its YAML
        self._thread = ThreadPoolExecutor(1, WRITER)
        self.stage = Stage()
        # The writer's own: its messages must not meet those of a step that goes on meanwhile.
        self._ranks = runtime.plant(timeout) if runtime.world_size() > 1 else None
        self._uploader = None
        if store is not None:
            self._uploader = Uploader(self.folder, store, self._ranks, lambda: self.check_owner())

    def prepare(self, state: CheckpointState) -> None:
        """Make room for the copies of an asynchronous save beside the training that comes before the first one.

        New memory costs several times what copying into it does: a page fault each 4 KiB, or pinning.
        """
        if self.asynchronous and self._pending is None:
            self._pending = self._thread.submit(self.stage.make_room, plan_save(_tensors(state)).parts)

    def save(self, state: CheckpointState) -> Path | str:
        """Write a checkpoint, after the one in flight if there is one.

        Under `asynchronous`, parameters and the optimizer's state are copied while the caller goes on, and
        `optimizer.step()` waits for that. Whatever else changes them calls `wait`, or `stage.wait`, before.

        Returns:
            Its folder, or its URL; under `asynchronous`, what its folder will be unless that name is taken (`wait`
            returns what it is).

        Raises:
            SaveError: on all ranks, if this one or the one in flight failed on any. The run can go on.
        """
        self.wait()
        self._begun = time.monotonic()
        plan = plan_save(_tensors(state))
        beside = _beside(state)
        if not self.asynchronous:
            return self._write(plan, beside)
        self.stage.begin(plan.parts, state.optimizer, _updated(state))
        self._pending = self._thread.submit(self._write_staged, plan, beside)
        return self.folder.path / f"step-{state.step}"

    def wait(self) -> Path | str | None:
        """Wait for the save in flight and return its folder or URL; None if there is none.

        Raises:
            SaveError: it failed.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def newest(self) -> Contents | None:
        """The newest checkpoint whose every file is intact, or None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
        """

        def whole(found: Found) -> Contents:
            try:
                return read_one(found, "everything")
            except DamagedError:
                self.folder.unusable.add(found.path)
                raise

        if not runtime.on_rank0(lambda: bool(self._candidates())):
            return None
        where = str(self.folder.path) if self.store is None else self.store.url
        contents = newest_usable(self._candidates, whole, "everything", where)
        self.newest_saved = contents.place
        return contents

    def _candidates(self) -> list[Candidate]:
        """Checkpoints here and in the store, newest first; on rank 0."""
        found = [Candidate(str(path)) for path in checkpoints(self.folder.path)]
        if self.store is None:
            return found
        found += self.store.checkpoints()
        return sorted(found, key=lambda each: number_of(Path(each.place).name) or (-1, -1), reverse=True)

    def load(
        self, source: str | Path | Contents, state: CheckpointState, base_path: str | None = None
    ) -> dict[str, Json]:
        """Load a checkpoint into the model and the optimizer, whatever mesh it was saved on.

        The random state comes back too if the number of ranks is the same; with another, it is left as it is.

        Args:
            source: a checkpoint or a folder with checkpoints (the newest), or what `newest` or `read` returned.
            state: `model` and `optimizer` are loaded into; the rest is not looked at.
            base_path: where the base of an adapter run is now, if it has moved.

        Returns:
            What `state.trainer` was, and `step`.

        Raises:
            CheckpointError: it is damaged, or of another model; neither model nor optimizer has changed.
        """
        contents = source if isinstance(source, Contents) else read(source, "everything")
        assert contents.verified == "everything"
        self.stage.wait()
        entries = contents.entries
        model = model_tensors(state.model, frozen=contents.base is None)
        try:
            check_same_model(entries, model, exact_dtype=True)
            memory = empty_state(entries, state.model, state.optimizer)
        except CheckpointError as error:
            raise CheckpointError(f"{contents.path}: {error}") from None
        if contents.base is not None:
            load_base(find_base(contents.base, contents.path, base_path), state.model)
        rng = rng_room(entries)
        halves = rooms_to_split(entries, state.model, state.optimizer)
        _say_that_weights_are_cast(entries, {name: each for name, each in model.items() if name not in halves})
        rooms = {name: part.room for name, part in (memory | halves).items()}
        read_tensors(contents.path, entries, model | rooms | rng)
        if state.optimizer is not None:
            state.optimizer.state.clear()
            for weight in halves.values():
                weight.keep(state.optimizer)
            for parameter, key, tensor in memory.values():
                state.optimizer.state[parameter][key] = tensor
        set_rng(rng)
        return contents.trainer

    def tidy(self) -> None:
        """Make up for what a killed or failed run left undone in the folder; on rank 0, with the run's lock held."""
        self.folder.tidy()
        if self.store is not None:
            self.store.sweep()

    def catch_up(self) -> None:
        """Upload what the run could not before it ended, like a save of this one; all ranks together."""
        path = runtime.on_rank0(self._uploader.left) if self._uploader is not None and self.folder.shared else None
        if path is not None:
            step, _ = number_of(path.name) or (0, 0)
            self._pending = self._thread.submit(self._bring_up, path, step)

    def _write_staged(self, plan: SavePlan, beside: Beside) -> Path | str:
        return self._write(plan._replace(parts=self.stage.finish(plan.parts)), beside)

    def _write(self, plan: SavePlan, beside: Beside) -> Path | str:
        try:
            path = self._write_here(plan, beside)
        except SaveError as error:
            self._say_at_once(error)
            raise
        found = self._bring_up(path, beside.step)
        self.longest_save = max(self.longest_save, time.monotonic() - self._begun)
        return found

    def _bring_up(self, path: Path, step: int) -> Path | str:
        """Upload a checkpoint that is complete here, if there is a store."""
        if self.folder.shared:
            self.newest_saved = path
        if self._uploader is not None:
            try:
                self.newest_saved = self._uploader.upload(path, step)
            except SaveError as error:
                self._say_at_once(error)
                raise
        assert self.newest_saved is not None
        return self.newest_saved

    def _say_at_once(self, error: SaveError) -> None:
        if self.asynchronous:  # known to the caller at its next save only
            log.warning("%s", error)

    def _write_here(self, plan: SavePlan, beside: Beside) -> Path:
        """Write a checkpoint to the folder of this machine."""
        if not self.folder.shared:
            # Rank 0 sweeps its own machine's. All wait: the others of a machine would begin to write what goes then.
            sweeps = runtime.local_rank() == 0 and not runtime.is_rank0()
            runtime.agreed(lambda: self.folder.sweep() if sweeps else None, self._ranks)
        temporary = f"step-{beside.step}.tmp-{uuid.uuid4().hex[:12]}"  # rank 0's name counts
        opened, commit = partial(self.folder.open, temporary), partial(self._commit, beside)
        try:
            return save_parts(plan, opened, commit, self.folder.shared, self._ranks)
        except BaseException as error:
            shutil.rmtree(self.folder.path / temporary, ignore_errors=True)
            if isinstance(error, NotFiniteError):
                name = str(error).removeprefix("model/")
                raise NotFiniteError(
                    f"step {beside.step}: {name} has values that are not finite; the weights are damaged, and only an "
                    "older checkpoint helps"
                ) from None
            if not isinstance(error, SaveError):
                raise
            raise SaveError(f"step {beside.step} could not be saved to {self.folder.path}: {error}") from error

    def _commit(self, beside: Beside, temporary: Path, files: Files) -> Path:
        """Complete a folder that every rank has written to, and give it its name; on rank 0."""
        for name, written in files.items() if self.folder.shared else ():
            file = temporary / name
            if not file.is_file() or file.stat().st_size != written.bytes:
                raise OSError(f"{file} is not as a rank wrote it; all ranks must share one save_folder")
        texts = {TRAINER: beside.trainer, CONFIG: self._yaml(beside.config)}
        if beside.generation is not None:
            texts[GENERATION] = beside.generation
        files |= {name: write_file(temporary / name, text.encode()) for name, text in texts.items()}
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(temporary / "tokenizer")
            for path in (temporary / "tokenizer", *(temporary / "tokenizer").rglob("*")):
                if path.is_dir():
                    fsync_folder(path)
                else:
                    files[path.relative_to(temporary).as_posix()] = measure(path, sync=True)
        self.check_owner()
        write_manifest(temporary, beside.step, files, finite=True)  # the writers have looked
        return self.folder.adopt(temporary, beside.step) if self.folder.shared else temporary

    def _yaml(self, config: Mapping[str, object]) -> str:
        """A config as YAML: 300 settings take 30 ms to write, and are the same at each save."""
        if self._config is None or self._config[0] != config:
            self._config = config, write_resolved(config)
        return self._config[1]


def _say_that_weights_are_cast(entries: Mapping[str, Entry], model: Mapping[str, Tensor]) -> None:
    for name, tensor in model.items() if runtime.is_rank0() else ():
        if entries[name].dtype != tensor.dtype:
            log.info("weights were %s in the checkpoint and are kept in %s (optimizer.master_weights)",
                     entries[name].dtype, tensor.dtype)  # fmt: skip
            return


def _tensors(state: CheckpointState) -> dict[str, Tensor | Halves]:
    model = join_halves(model_tensors(state.model, frozen=state.base is None), state.model, state.optimizer)
    return model | optimizer_tensors(state.model, state.optimizer) | rng_tensors()


def _updated(state: CheckpointState) -> set[str]:
    """The names of what nothing but `optimizer.step()` changes: parameters and the optimizer's state, not buffers."""
    parameters = {f"model/{name}" for name, _ in state.model.named_parameters()}
    return parameters | optimizer_tensors(state.model, state.optimizer).keys()


def _beside(state: CheckpointState) -> Beside:
    trainer = {"step": state.step} | dict(state.trainer) | {KEPT: state.kept, "saved_by": _writer()}
    if state.base is not None:
        trainer["base"] = state.base._asdict()
    return Beside(state.step, json.dumps(trainer, indent=1), state.config, state.generation, state.tokenizer)


def _writer() -> dict[str, Json]:
    return {
        "torch": torch.__version__,
        "ranks": runtime.world_size(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
