"""Reads checkpoints: their metadata, and their tensors, loaded on any mesh and number of processes.

All ranks must call these functions. Given a folder of checkpoints, the newest intact one is read: damaged ones are
logged, and an older one is used. A path to a single checkpoint means that one; if it is damaged, that is an error.

A run that trains adapters saves only those. Its checkpoints name their base, the checkpoint that the frozen weights
came from, with its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmfoundry import hf, runtime
from llmfoundry.checkpoint.finding import Found, candidates, fetched, newest_usable
from llmfoundry.checkpoint.index import SAVED_DTYPES, Entry, read_index
from llmfoundry.checkpoint.manifest import (
    CONFIG,
    CONVERTED,
    INDEX,
    MANIFEST,
    TRAINER,
    CheckpointError,
    DamagedError,
    Manifest,
    Need,
    Written,
    is_needed,
    read_manifest,
    verify,
)
from llmfoundry.checkpoint.storage import TensorReader, is_finite
from llmfoundry.checkpoint.tensors import check_same_model, model_tensors
from llmfoundry.config import ConfigError, is_theirs, is_url
from llmfoundry.dtensor import local_shard
from llmfoundry.hf.files import Stored, read_header
from llmfoundry.hf.pieces import Pieces, Spec, fill_grown
from llmfoundry.hf.pretrained import VOCABULARY, locate, quantize_from
from llmfoundry.layers.lora import frozen_weights, is_adapter
from llmfoundry.model.transformer import CausalLM
from llmfoundry.settings import read_resolved
from llmfoundry.strict_json import Json, read_mapping, whole_number

log = logging.getLogger(__name__)

Files = dict[str, Written]

HUGGING_FACE = "hf:"  # prefix of a Hugging Face folder or hub id, where an llmfoundry checkpoint is also accepted
_SAMPLE_BYTES, _SAMPLES = 2**12, 64  # read from a file to distinguish it from others of the same size


class Base(NamedTuple):
    """The checkpoint that the frozen weights of an adapter run came from.

    Attributes:
        path: an llmfoundry checkpoint folder, or `hf:` and a folder or hub id.
        fingerprint: of its weight files.
    """

    path: str
    fingerprint: str


class Contents(NamedTuple):
    """The metadata of a checkpoint.

    Attributes:
        path: its folder on this machine; never a link, which could move.
        place: its folder, or its URL in a store.
        step: the step of the checkpoint.
        config: the config of the run that wrote it.
        trainer: the trainer's own state, and `step`.
        tokenizer: a folder for `from_pretrained`.
        base: where the weights are that this checkpoint does not contain; None: it contains all.
        files: by name, as in its manifest.
        finite: whether all values were checked to be finite when it was written.
        entries: its tensors by name.
        verified: which of its files were verified against the manifest.
    """

    path: Path
    place: str
    step: int
    config: dict[str, object]
    trainer: dict[str, Json]
    tokenizer: Path | None
    base: Base | None
    files: Files
    finite: bool
    entries: dict[str, Entry]
    verified: Need


def read(path: str | Path, need: Need = "model") -> Contents:
    """Read the metadata of a checkpoint.

    Args:
        path: a checkpoint, a folder of checkpoints or a run's `save_folder` (the newest intact one is used); or a URL.
        need: the files that must be intact.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    return newest_usable(lambda: candidates(path), lambda each: read_one(each, need), need, str(path))


def read_one(found: Found, need: Need) -> Contents:
    """`read` for a single checkpoint; raises DamagedError on all ranks."""
    path = found.path
    manifest = verify(path, lambda name: is_needed(name, need))  # before their headers are trusted
    files = manifest.files
    try:
        config = read_resolved(path / (CONVERTED if CONVERTED in files else CONFIG))
    except ConfigError as error:
        raise DamagedError(str(error)) from None
    trainer, entries = _trainer(path, manifest.step), _entries(path, files)
    _check_values(path, manifest, entries, need)
    base = trainer.get("base")
    tokenizer = path / "tokenizer"
    return Contents(
        path, found.place, manifest.step, config, trainer, tokenizer if tokenizer.is_dir() else None,
        Base(str(base["path"]), str(base["fingerprint"])) if isinstance(base, dict) else None,
        files, manifest.finite, entries, need,
    )  # fmt: skip


@torch.no_grad()
def load_model_only(
    source: str | Path | Contents, model: nn.Module, *, base_path: str | None = None, adapters_only: bool = False
) -> None:
    """Load a checkpoint's weights and buffers into `model`, converted to its dtypes.

    Adapters are left unchanged if the checkpoint has none, so that they can start from a base model. An embedding or
    head may have more rows than the checkpoint's: the new ones are the mean of the others.

    Args:
        source: a path as in `read`, or the result of `read`.
        model: materialized, on any device and mesh.
        base_path: the current location of the base, if it has moved.
        adapters_only: leave all other weights unchanged.

    Raises:
        CheckpointError: if it is damaged, or of another model (which is then unchanged); or if its base is unusable.
    """
    contents = source if isinstance(source, Contents) else read(source)
    entries = contents.entries
    tensors = model_tensors(model)
    whole = {f"model/{name}": frozen.whole_shape for name, frozen in frozen_weights(model)}  # kept in NF4
    if adapters_only:
        tensors = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
        entries = {name: entry for name, entry in entries.items() if is_adapter(name)}
    elif contents.base is not None:
        load_base(find_base(contents.base, contents.path, base_path), model)
        tensors = {name: tensor for name, tensor in tensors.items() if name in entries}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if name in entries or not is_adapter(name)}
        # Their values are read below, after all shapes have been checked.
        tensors |= {name: torch.empty(shape, device="meta") for name, shape in whole.items()}
    longer = {name for name, tensor in tensors.items() if name in entries and _is_grown(name, tensor, entries[name])}
    try:
        check_same_model(
            {name: entry for name, entry in entries.items() if name not in longer},
            {name: tensor for name, tensor in tensors.items() if name not in longer},
            exact_dtype=False,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{contents.path}: {error}") from None
    as_they_are = {name: tensor for name, tensor in tensors.items() if name not in longer and name not in whole}
    read_tensors(contents.path, entries, as_they_are)
    saved = SavedModel(contents)
    if whole.keys() & tensors.keys():
        quantize_from(model, Pieces.identity(saved.specs), saved)
    for name in sorted(longer):
        ours = name.removeprefix("model/")
        fill_grown(local_shard(tensors[name]), Pieces.identity(saved.specs)[ours], saved, entries[name].shape[0])
        log.info(
            "%s: %d rows were added, each the mean of the others", ours, len(tensors[name]) - entries[name].shape[0]
        )


class SavedModel:
    """The model's tensors in a checkpoint, as boxes that can be read one by one."""

    def __init__(self, contents: Contents) -> None:
        entries = contents.entries
        self._reader = TensorReader(contents.path, entries)
        self._entries = {name.removeprefix("model/"): e for name, e in entries.items() if name.startswith("model/")}
        self.specs: Mapping[str, Spec] = {name: Spec(entry.dtype, entry.shape) for name, entry in self._entries.items()}

    def parts(self, name: str) -> Iterator[Stored]:
        """Yield the boxes of a tensor that ranks saved."""
        entry = self._entries[name]
        for chunk in entry.chunks:
            yield self._reader.stored(f"model/{name}", chunk)


def _is_grown(name: str, tensor: Tensor, entry: Entry) -> bool:
    """Return whether a model's embedding or head has more rows than the saved one."""
    rows, *rest = tensor.shape
    return name.removeprefix("model/") in VOCABULARY and rows > entry.shape[0] and tuple(rest) == entry.shape[1:]


def _entries(path: Path, files: Files) -> dict[str, Entry]:
    """Return the tensors of a checkpoint by name; raises DamagedError."""
    try:
        entries = read_index(path)
    except (OSError, ValueError) as error:
        raise DamagedError(str(error)) from None
    for chunks in {id(entry.chunks): entry.chunks for entry in entries.values()}.values():
        for chunk in chunks:
            if chunk.file not in files:
                raise DamagedError(f"{path / INDEX}: names {chunk.file!r}, which {MANIFEST} does not list")
    return entries


def _check_values(path: Path, manifest: Manifest, entries: dict[str, Entry], need: Need) -> None:
    """Check that files match the index, and values are finite unless checked on writing; ranks share the files.

    Raises:
        DamagedError: on all ranks, naming the file, and the non-finite tensor.
    """

    def check() -> None:
        names = sorted(name for name in manifest.files if name.endswith(".safetensors") and is_needed(name, need))
        own = names[runtime.rank() :: runtime.world_size()]
        TensorReader(path, entries).check_headers(own)
        for name in own if not manifest.finite else ():
            check_finite(path / name)

    runtime.agreed(check)


def check_finite(file: Path) -> None:
    """Read a file of tensors, and raise DamagedError if a value is not finite."""
    for name, stored in read_header(file, SAVED_DTYPES).items():
        for part in stored.blocks((0,) * len(stored.shape), stored.shape) if stored.spec.nbytes else ():
            if not is_finite(part.values):
                raise DamagedError(f"{file}: {name} has values that are not finite")


def read_tensors(path: Path, entries: dict[str, Entry], tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place; all ranks call this, each for its parts."""
    try:
        runtime.agreed(lambda: TensorReader(path, entries).read_into(tensors))
    except (OSError, RuntimeError, ConfigError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{path}: could not be loaded: {reason}") from error


def base_of(source: Contents | str) -> Base:
    """Return the base of a run that trains adapters on these weights.

    Args:
        source: an llmfoundry checkpoint, or a Hugging Face folder or hub id.
    """
    if isinstance(source, str):
        path = str(Path(source).absolute()) if Path(source).exists() else source
        return Base(f"{HUGGING_FACE}{path}", runtime.on_rank0(lambda: _fingerprint(f"{HUGGING_FACE}{path}")))
    if source.base is not None:  # adapters on adapters: the frozen weights are those of the first base
        return source.base
    path = source.place if is_url(source.place) else str(source.path.absolute())
    return Base(path, runtime.on_rank0(lambda: _fingerprint(path)))


def find_base(base: Base, owner: Path, *moved: str | None) -> str:
    """Return the current location of a checkpoint's base.

    Args:
        base: its path and fingerprint.
        owner: the checkpoint.
        moved: further places to look at; the fingerprint decides.

    Raises:
        CheckpointError: if it cannot be found, or has changed.
    """

    def look() -> str:
        changed = False
        for path in (base.path, *(each for each in moved if each)):
            for place in _places(path):
                if _fingerprint(place) == base.fingerprint:
                    return place
                changed |= path == base.path
        raise CheckpointError(
            f"{owner}: contains only adapters, and their base {base.path} {'has changed' if changed else 'is gone'}; "
            f"restore it, or name where it is now: load_path=FOLDER, or load_path={HUGGING_FACE}FOLDER_OR_ID"
        )

    return runtime.on_rank0(look)


def load_base(path: str, model: nn.Module) -> None:
    """Load the weights of a base, without adapters, into a model."""
    if is_theirs(path):
        assert isinstance(model, CausalLM)
        hf.load_weights(model, path.removeprefix(HUGGING_FACE), allow=["model"])  # compared when the run began
    else:
        load_model_only(path, model)


def _places(path: str) -> list[str]:
    """Return the checkpoints that a base's path may refer to; empty if there are none."""
    try:
        if not is_theirs(path):
            found = candidates(path)
            return [each.place for each in found if each.files is not None or Path(each.place).is_dir()]
        name = path.removeprefix(HUGGING_FACE)
        return [path] if Path(name).is_file() or _weights_in(locate(name)) else []
    except ConfigError:
        return []


def _fingerprint(path: str) -> str:
    """Return a hash of the weight files, without reading all of them.

    An llmfoundry checkpoint lists the hashes of its files. For Hugging Face files, sizes and evenly spaced samples are
    hashed, which distinguishes any two training runs.
    """
    if not is_theirs(path):
        (candidate,) = candidates(path)
        manifest = read_manifest(fetched(candidate, "texts"))
        listed = {name: written for name, written in manifest.files.items() if name.startswith("model-")}
        return _sha256(json.dumps(sorted(listed.items())))
    name = path.removeprefix(HUGGING_FACE)
    files = [Path(name)] if Path(name).is_file() else _weights_in(locate(name))
    return _sha256(json.dumps([_sampled(file) for file in files]))


def _weights_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _sampled(file: Path) -> tuple[int, str]:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as handle:
        for i in range(_SAMPLES):
            handle.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
            digest.update(handle.read(_SAMPLE_BYTES))
    return size, digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _trainer(path: Path, listed: int) -> dict[str, Json]:
    """Return the trainer's state, after a plausibility check of its counts; `listed` is the step in the manifest."""
    try:
        trainer = read_mapping(path / TRAINER, follow=False)
        step, state = whole_number(trainer.get("step")), trainer.get("state")
        if step != listed:
            raise ValueError(f"step {step}, and {MANIFEST} says {listed}")
        if isinstance(state, dict):
            for value in state.values():
                whole_number(value)
            if state.get("step", step) != step:
                raise ValueError(f"step {step} with a state of step {state['step']}")
            if whole_number(state.get("skipped_steps", 0)) > step:
                raise ValueError(f"step {step} with more steps skipped")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path / TRAINER}: is malformed ({type(error).__name__}: {error})") from None
    return trainer
