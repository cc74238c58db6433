"""Reads Composer's checkpoints, a single FILE.pt or a sharded folder, without running any code in them.

Both formats are pickles. A FILE.pt and each item of a sharded folder are read with PyTorch's restricted unpickler
(`weights_only`), which builds tensors and plain containers. The few other objects that Composer saves (times, random
states, versions) become `Inert`, which holds nothing. The folder's `.metadata` is read with an unpickler that only
accepts PyTorch's own records. Any other name in a file is an error before the file is unpickled, and nothing is
imported.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from llmfoundry.checkpoint.manifest import CheckpointError
from llmfoundry.hf.files import DTYPE_NAMES
from llmfoundry.hf.pieces import Part, Spec, TensorSource

METADATA = ".metadata"  # of a sharded folder, in the format of torch.distributed.checkpoint
_KEPT_CHUNKS = 4  # chunks of a sharded folder to keep in memory: one expert's matrices span as many

# Other objects in Composer's files. None of them is needed, so none is built.
_INERT = re.compile(
    r"torch\.torch_version\.TorchVersion|datetime\.(datetime|timedelta|timezone)|builtins\.frozenset"
    r"|pathlib\.\w+|numpy\.(ndarray|dtype)|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
    r"|numpy\.dtypes\.\w+|(composer|llmfoundry|streaming|torchmetrics)\.[\w.]+"
)
# Wrapper prefixes in parameter names, and names that are not weights.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_NO_WEIGHT = re.compile(r"(.*\.)?(rotary_emb\.\w+|attn_bias|_extra_state)")
_BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, KeyError, IndexError, EOFError,
    AttributeError, OverflowError, RecursionError, AssertionError, MemoryError, OSError,
)  # fmt: skip

Plain = None | bool | int | float | str | bytes | list["Plain"] | dict[str, "Plain"]


class Inert:
    """Placeholder for an object that was not built."""

    def __new__(cls, *_: object) -> Inert:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Discard the state."""


class ComposerFiles(TensorSource, Protocol):
    """A checkpoint of Composer's.

    `specs` and `parts` cover the model's tensors, under their names in the checkpoint without Composer's leading
    `model.`.
    """

    path: Path

    def said(self, *keys: str) -> Plain:
        """Return the plain data under `state` at these keys, without tensors; None if there is none."""


def open_composer(path: Path) -> ComposerFiles:
    """Open a checkpoint. Of a sharded one, tensors are read later.

    Args:
        path: a `torch.save` file, or a folder with `.metadata`.

    Raises:
        CheckpointError: if it is neither, is damaged, or contains objects that no Composer checkpoint needs.
    """
    if path.is_file():
        return Monolith(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if not (path / METADATA).is_file():
        inner = sorted(each.parent.name for each in path.glob(f"*/{METADATA}")) if path.is_dir() else []
        hint = f"; name one of {', '.join(inner)} in it" if inner else ""
        raise CheckpointError(f"{path}: is neither a FILE.pt nor a sharded Composer folder, with {METADATA}{hint}")
    return Sharded(path)


class Monolith:
    """A single FILE.pt, memory-mapped, so that only what is used is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = _load(path, str(path))
        state = loaded.get("state") if isinstance(loaded, dict) else None
        if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
            raise CheckpointError(f"{path}: is not a Composer checkpoint: it has no state.model")
        self._state = cast(dict[str, object], state)
        self._tensors = {
            _named(name): value.detach() for name, value in state["model"].items() if _is_weight(name, value)
        }
        self.specs: Mapping[str, Spec] = {
            name: _spec(name, tensor, str(path)) for name, tensor in self._tensors.items()
        }

    def parts(self, name: str) -> list[Part]:
        """Return the whole tensor."""
        tensor = self._tensors[name]
        return [Part((0,) * tensor.dim(), tensor)]

    def said(self, *keys: str) -> Plain:
        """See `ComposerFiles`."""
        node: object = self._state
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return _plain(node)


class Chunk(NamedTuple):
    """A box of a tensor in a sharded folder."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    source: Sharded
    key: metadata.MetadataIndex

    def blocks(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Part]:
        """Yield the whole chunk."""
        values = self.source.item(self.key)
        if not isinstance(values, Tensor) or tuple(values.shape) != self.shape:
            raise CheckpointError(f"{self.source.path}: {self.key.fqn}: {METADATA} describes another tensor")
        yield Part(self.offsets, values)


class Sharded:
    """A folder to which each rank wrote its part."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._about = _metadata(path / METADATA)
        self._where: dict[metadata.MetadataIndex, filesystem._StorageInfo] = self._about.storage_data
        self._paths: dict[str, tuple[str | int, ...]] = self._about.planner_data or {}
        self._read: dict[metadata.MetadataIndex, object] = {}
        self._named: dict[str, tuple[str, metadata.TensorStorageMetadata]] = {}
        for name, about in self._about.state_dict_metadata.items():
            inside = name.removeprefix("state.model.")
            if inside != name and isinstance(about, metadata.TensorStorageMetadata) and not _NO_WEIGHT.fullmatch(name):
                self._named[_named(inside)] = (name, about)
        if not self._named:
            raise CheckpointError(f"{path}: is not a Composer checkpoint: it has no state.model")
        self.specs: Mapping[str, Spec] = {
            name: _spec_of(name, about.properties.dtype, tuple(about.size), str(path))
            for name, (_, about) in self._named.items()
        }

    def parts(self, name: str) -> list[Chunk]:
        """Return the boxes of a tensor that ranks saved."""
        fqn, about = self._named[name]
        boxes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in about.chunks}  # replicas save the same ones
        if sum(map(math.prod, boxes.values())) != math.prod(about.size):
            raise CheckpointError(f"{self.path / METADATA}: the parts of {fqn} are not all of it")
        return [Chunk(at, shape, self, metadata.MetadataIndex(fqn, at)) for at, shape in boxes.items()]

    def said(self, *keys: str) -> Plain:
        """See `ComposerFiles`."""
        root: dict[str | int, object] = {}
        for name, path in self._paths.items():
            inside = path[1 + len(keys) :]
            about = self._about.state_dict_metadata.get(name)
            if path[: 1 + len(keys)] != ("state", *keys) or isinstance(about, metadata.TensorStorageMetadata):
                continue
            value = self.item(metadata.MetadataIndex(name))
            if not inside:
                return _plain(value)
            node = root
            for key in inside[:-1]:
                child = node.setdefault(key, {})
                if not isinstance(child, dict):
                    raise CheckpointError(f"{self.path / METADATA}: {name} stands below a value")
                node = child
            node[inside[-1]] = value
        return _plain(_with_lists(root)) if root else None

    def item(self, index: metadata.MetadataIndex) -> object:
        """Return what is saved under an index; the last few are cached."""
        if index not in self._read:
            where = self._where.get(index)
            if where is None:
                raise CheckpointError(f"{self.path / METADATA}: says nothing of where {index.fqn} is")
            while len(self._read) >= _KEPT_CHUNKS:
                del self._read[next(iter(self._read))]
            self._read[index] = self._item(where)
        return self._read[index]

    def _item(self, where: filesystem._StorageInfo) -> object:
        name, start, length = where.relative_path, where.offset, where.length
        file = self.path / name
        if Path(name).name != name or where.transform_descriptors:
            raise CheckpointError(f"{self.path / METADATA}: {name!r} is outside of the folder, or compressed")
        try:
            with open(file, "rb") as handle:
                handle.seek(start)
                content = handle.read(length)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        if len(content) != length:
            raise CheckpointError(f"{file}: ends before byte {start + length}; copy the folder again")
        return _load(io.BytesIO(content), str(file))


def _load(source: Path | io.BytesIO, where: str) -> object:
    """Load a `torch.save` file as tensors and plain containers."""
    try:
        names = get_unsafe_globals_in_checkpoint(source)
    except PermissionError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from None
    except _BROKEN as error:
        raise _damaged(where, error) from None
    for name in names:
        if not _INERT.fullmatch(name):
            _refuse(where, name)
    try:
        with safe_globals([(Inert, name) for name in names]):
            mapped = isinstance(source, Path)
            if isinstance(source, io.BytesIO):
                source.seek(0)
            return cast(object, torch.load(source, map_location="cpu", weights_only=True, mmap=mapped))
    except _BROKEN as error:
        raise _damaged(where, error) from None


def _damaged(where: str, error: BaseException) -> CheckpointError:
    why = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return CheckpointError(
        f"{where}: is damaged, or not an uncompressed file of torch.save (torch 1.6 or later): {why}"
    )


def _refuse(where: str, name: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: refers to {name[:200]!r}, which no Composer checkpoint needs and which may run code; "
        "it was not loaded"
    )


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that only builds PyTorch's records of a sharded checkpoint, and plain containers."""

    _RECORDS = {
        (record.__module__, record.__name__): record
        for record in (
            metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.Size,
        )
    } | {("torch.serialization", "_get_layout"): torch.serialization._get_layout}  # fmt: skip

    def __init__(self, content: bytes, where: str) -> None:
        super().__init__(io.BytesIO(content))
        self._file = where

    def find_class(self, module: str, name: str) -> object:
        """Return the record of that name; raises CheckpointError for any other name."""
        if (module, name) in self._RECORDS:
            return self._RECORDS[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):  # getattr could import modules
            return vars(torch)[name]
        if module in ("pathlib", "pathlib._local"):
            return Inert
        _refuse(self._file, f"{module}.{name}")


def _metadata(file: Path) -> metadata.Metadata:
    try:
        about = _MetadataUnpickler(file.read_bytes(), str(file)).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (*_BROKEN, ImportError) as error:
        why = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{file}: is damaged: {why}") from None
    if not isinstance(about, metadata.Metadata) or not isinstance(about.storage_data, dict):
        raise CheckpointError(f"{file}: is damaged: it is not a record of torch.distributed.checkpoint")
    return about


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and _NO_WEIGHT.fullmatch(name) is None


def _named(name: str) -> str:
    """Return a parameter's name without wrappers, and without Composer's own `model.`."""
    return _WRAPPERS.sub("", name).removeprefix("model.")


def _spec(name: str, tensor: Tensor, where: str) -> Spec:
    if tensor.layout != torch.strided:
        raise CheckpointError(f"{where}: {name} is not a dense tensor")
    return _spec_of(name, tensor.dtype, tuple(tensor.shape), where)


def _spec_of(name: str, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> Spec:
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{where}: {name} has dtype {dtype}; supported are {', '.join(DTYPE_NAMES.values())}")
    return Spec(dtype, shape)


def _plain(value: object) -> Plain:
    """Return the plain data in a value; everything else becomes None."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    return None


def _with_lists(node: object) -> object:
    """Restore lists, which a sharded folder stores item by item; a mapping's own keys are strings."""
    if not isinstance(node, dict):
        return node
    inside = {key: _with_lists(each) for key, each in node.items()}
    return list(inside.values()) if inside and all(isinstance(key, int) for key in inside) else inside
