"""Reads the header of a GGUF file: settings, and the name, type, shape and offset of each tensor.

`gguf.GGUFReader` does the parsing, but it trusts the file: past the end it continues with empty values, and it creates
an object for every item of a list. Here a read past the end of the file is an error, and lists, which only tokenizers
use, are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, quants
from gguf.gguf_reader import ReaderField

from llmfoundry.config import ConfigError
from llmfoundry.hf.family import Value
from llmfoundry.hf.files import check_apart
from llmfoundry.hf.pieces import Spec

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.F64: torch.float64, GGMLQuantizationType.BF16: torch.bfloat16,
}  # fmt: skip
_DAMAGED = ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, MemoryError


class Placed(NamedTuple):
    """A tensor in the file.

    Attributes:
        shape: in torch order; the file stores it reversed.
        start: byte offset in the file.
        heads: number of heads whose rows must be put back in order; 0 if they are in order.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int
    heads: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is stored unquantized."""
        return self.kind in _PLAIN

    @property
    def spec(self) -> Spec:
        """The dtype and shape after dequantizing."""
        return Spec(_PLAIN.get(self.kind, torch.float32), self.shape)


class Header(NamedTuple):
    """The settings, without a tokenizer's lists, and the tensors."""

    settings: dict[str, Value]
    tensors: dict[str, Placed]


def read_header(path: Path) -> Header:
    """Read the header of a file, and check that every tensor lies inside of it.

    Raises:
        ConfigError: if the file cannot be read, is not GGUF, is damaged or truncated, or has a type that cannot be
            dequantized.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: {'is not a plain file' if path.exists() else 'no such file'}")
        with open(path, "rb") as file:
            magic, version = file.read(4), file.read(4)
        if magic != b"GGUF":
            raise ConfigError(f"{path}: is not a GGUF file")
        if version[:2] == b"\0\0":
            raise ConfigError(f"{path}: is big-endian; only little-endian files are read")
        return _read(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _DAMAGED as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is cut short or damaged: {error}") from None


def shortest(value: float) -> float:
    """Return the shortest decimal number, of up to 7 digits, that rounds to this float32."""
    short = float(f"{value:.7g}")
    return short if np.float32(short) == np.float32(value) else value


class _Reader(GGUFReader):
    """The library's reader, with bounds checks."""

    def _get(
        self, offset: int, dtype: npt.DTypeLike, count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[np.generic]:  # fmt: skip
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and {end} are asked for")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[np.generic]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        inner, count = GGUFValueType(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        data, end = self.data.data, orig_offs + 12
        if inner in self.gguf_scalar_to_np:
            end += count * np.dtype(self.gguf_scalar_to_np[inner]).itemsize
        elif inner != GGUFValueType.STRING:
            raise ValueError(f"a list of {inner.name}")
        else:
            while count and end < len(data):
                end += 8 + int.from_bytes(data[end : end + 8], "little")
                count -= 1
            end += 8 * count  # items past the end
        self._get(orig_offs, np.uint8, end - orig_offs)
        return end - orig_offs, [], [], [GGUFValueType.ARRAY]


def _read(path: Path) -> Header:
    with np.errstate(over="ignore"):  # offsets that wrap around are caught below
        reader = _Reader(path)
    tensors = {}
    for each in reader.tensors:
        shape = tuple(reversed(each.shape.tolist()))
        _check_readable(path, each.name, each.tensor_type)
        if not shape or 0 in shape or each.data_offset < reader.data_offset:
            raise ValueError(f"tensor {each.name!r} of shape {list(shape)} is out of place")
        tensors[each.name] = Placed(each.tensor_type, shape, each.data_offset, each.n_bytes)
    check_apart((each.start, each.start + each.nbytes, name) for name, each in tensors.items())
    return Header({name: _value(field) for name, field in reader.fields.items()}, tensors)


def _value(field: ReaderField) -> Value:
    kind, last = field.types[0], field.parts[-1]
    if kind == GGUFValueType.ARRAY:
        return []  # only its presence matters
    if kind == GGUFValueType.STRING:
        return bytes(last).decode()
    value: bool | int | float = last[0].item()
    return shortest(value) if kind == GGUFValueType.FLOAT32 else value


def _check_readable(path: Path, name: str, kind: GGMLQuantizationType) -> None:
    """Raise ConfigError if the library cannot dequantize this type, by trying it on one block."""
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise ConfigError(f"{path}: tensor {name!r} is of type {kind.name}, which `gguf` cannot dequantise") from None
