"""GGUF files (llama.cpp) of the Llama family as config.json and tensors of `transformers`: our families do the rest.

A file is a header (settings, then name, shape, type and place of each tensor) and the tensors' bytes. It is checked
against the file's size before anything is read. Quantised tensors are dequantised to float32 by the `gguf` library, one
at a time.
Three things are other than in `transformers`. Rows of queries and keys in `llama` files stand in the order that turns
neighbouring dims together. Scaling of rotations as Llama 3.1 has it is a tensor of divisors, from which its settings
are found again. Numbers are float32: 1e-5 is there as 9.99999974738e-06.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.hf.family import ConfigDict, Value
from llmfoundry.hf.files import Stored
from llmfoundry.hf.pieces import Kept, Part, Spec, whole_of
from llmfoundry.layers.rope import Llama3Scaling, NoScaling

_ARCHITECTURES = "llama", "qwen2", "qwen3"  # by the same names in `transformers`
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}  # types that need no `gguf`

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROPE_DIVISORS = "rope_freqs.weight"  # Llama 3.1's, one for each pair of dims
_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"}
_SLAB_ROWS = 1024  # dequantised at a time


class _Stored(NamedTuple):
    """A tensor in the file."""

    kind: int  # of ggml
    shape: tuple[int, ...]  # as torch has it; the file has it reversed
    start: int  # byte in the file
    nbytes: int
    heads: int = 0  # whose rows are to be put back in order; 0: rows are in order

    @property
    def spec(self) -> Spec:
        """What it becomes."""
        return Spec(_PLAIN.get(self.kind, torch.float32), self.shape)


class GGUFFile:
    """A GGUF file as a `Source`, under the names of `transformers`.

    Args:
        path: the file.

    Attributes:
        config: what config.json would say.

    Raises:
        ConfigError: it is no GGUF file, cut short or damaged, or of an architecture or with a setting that is not
            supported; or it is quantised, and the `gguf` library is not installed.
    """

    def __init__(self, path: Path) -> None:
        settings, stored = _read_header(path)
        if settings.get("general.type", "model") != "model":
            raise ConfigError(f"{path}: holds no model, but a {settings['general.type']}")
        if settings.get("split.count", 1) not in (0, 1):
            raise ConfigError(
                f"{path}: is one of {settings['split.count']} parts; merge them (llama-gguf-split --merge)"
            )
        self._path = path
        divisors = stored.pop(_ROPE_DIVISORS, None)
        said = _Said(path, settings)
        self.config = _config(said, stored, None if divisors is None else self._values(divisors))
        said.check_all_read()
        self._stored = {_their_name(name): each for name, each in stored.items()}
        if said.architecture == "llama":
            self._restore_order()
        self.specs: Mapping[str, Spec] = {name: each.spec for name, each in self._stored.items()}
        self._last: tuple[str, Tensor] | None = None

    def parts(self, name: str) -> list[Kept]:
        """The tensor: as it is in the file, or made and kept until another one is asked for."""
        stored = self._stored[name]
        if stored.kind in _PLAIN and not stored.heads:
            return [self._box(stored.start, stored.spec)]
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next: one at a time
            self._last = name, self._values(stored)
        return [Part((0,) * self._last[1].dim(), self._last[1])]

    def _box(self, start: int, spec: Spec) -> Stored:
        return Stored(spec, self._path, start, (0,) * len(spec.shape))

    def _restore_order(self) -> None:
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        for name, each in self._stored.items():
            n_heads = next((heads[part] for part in name.split(".") if part in heads), None)
            if isinstance(n_heads, int) and each.shape[0] % (2 * n_heads) == 0:  # else its shape is found wrong later
                self._stored[name] = each._replace(heads=n_heads)

    def _values(self, stored: _Stored) -> Tensor:
        values = self._dequantised(stored)
        if stored.heads:  # (H, C/2, 2, ...), pairs side by side, to (H, 2, C/2, ...), the two halves
            values = values.unflatten(0, (stored.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return values

    def _dequantised(self, stored: _Stored) -> Tensor:
        if stored.kind in _PLAIN:
            return whole_of(stored.spec, [self._box(stored.start, stored.spec)])
        gguf = _library()
        kind = gguf.GGMLQuantizationType(stored.kind)
        values = torch.empty(math.prod(stored.shape[:-1]), stored.shape[-1])
        coded = self._box(stored.start, Spec(torch.uint8, (len(values), stored.nbytes // len(values))))
        for start in range(0, len(values), _SLAB_ROWS):
            rows = min(_SLAB_ROWS, len(values) - start)
            for block in coded.blocks((start, 0), (rows, coded.shape[1])):
                first = block.offsets[0]
                values[first : first + len(block.values)] = torch.from_numpy(
                    gguf.quants.dequantize(block.values.numpy(), kind)
                )
        return values.view(stored.shape)


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a GGUF file, as far as `transformers` can convert it; None if there is none.

    Raises:
        ConfigError: it cannot.
    """
    settings, _ = _read_header(path)
    if "tokenizer.ggml.model" not in settings:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever their converters fail with, the file is at fault
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path}: its tokenizer cannot be converted ({type(error).__name__}: {why}); give the tokenizer itself, a "
            "folder with tokenizer.json or a hub id"
        ) from None


class _Cursor:
    """A place in a file that moves on as values are read."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self._file = open(path, "rb")
        self.place = 0

    def take(self, n_bytes: int) -> bytes:
        self._check(n_bytes)
        self.place += n_bytes
        return self._file.read(n_bytes)

    def skip(self, n_bytes: int) -> None:
        self._check(n_bytes)
        self.place += n_bytes
        self._file.seek(self.place)

    def number(self, letter: str) -> int:
        return int(struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0])

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Value:
        """A setting, after its type; of an array, which is a tokenizer's, only that it is one."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            letter = _SCALARS[kind]
            value: bool | int | float = struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]
            return _shortest(value) if kind == _FLOAT32 else value
        if kind != _ARRAY:
            raise ValueError(f"a setting of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[inner]))
        elif inner == _STRING:
            self._check(8 * count)
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"an array of type {inner}")
        return []

    def close(self) -> None:
        self._file.close()

    def _check(self, n_bytes: int) -> None:
        if self.place + n_bytes > self.size:
            raise ValueError(f"it has {self.size} bytes, and its header goes on to {self.place + n_bytes}")


def _read_header(path: Path) -> tuple[dict[str, Value], dict[str, _Stored]]:
    """The settings and the tensors of a file, each within it."""
    try:
        cursor = _Cursor(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if cursor.size < 4 or cursor.take(4) != b"GGUF":
            raise ConfigError("is no GGUF file")
        version = cursor.number("I")
        if version not in (2, 3):
            why = "is big-endian" if version and version & 0xFFFF == 0 else f"has version {version}"
            raise ConfigError(f"{why}; GGUF of versions 2 and 3, little-endian, is read")
        n_tensors, n_settings = cursor.number("Q"), cursor.number("Q")
        settings: dict[str, Value] = {}
        for _ in range(n_settings):
            name = cursor.text()
            settings[name] = cursor.value()
        return settings, _tensors(cursor, n_tensors, settings.get("general.alignment", 32))
    except (ValueError, KeyError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{path}: {error}") from None
        raise ConfigError(f"{path}: is cut short or damaged: {error}") from None
    finally:
        cursor.close()


def _tensors(cursor: _Cursor, n_tensors: int, alignment: Value) -> dict[str, _Stored]:
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r}")
    found: dict[str, _Stored] = {}
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.number("I")
        if name in found or not 1 <= n_dims <= 4:
            raise ValueError(f"tensor {name!r} comes twice, or has {n_dims} dims")
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
        kind = cursor.number("I")
        found[name] = _Stored(kind, shape, cursor.number("Q"), _nbytes(name, kind, shape))
    base = -(-cursor.place // alignment) * alignment
    for name, each in found.items():
        end = base + each.start + each.nbytes
        if end > cursor.size:
            raise ValueError(f"it has {cursor.size} bytes, and tensor {name!r} ends at {end}")
        found[name] = each._replace(start=base + each.start)
    return found


def _nbytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind in _PLAIN:
        return Spec(_PLAIN[kind], shape).nbytes
    gguf = _library()
    try:
        quantised = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), quantised)
    except (ValueError, KeyError, NotImplementedError):
        raise ConfigError(f"tensor {name!r} has ggml type {kind}, which the `gguf` library cannot dequantise") from None
    if shape[-1] % block or 0 in shape:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} does not divide into blocks of {block}")
    return math.prod(shape) // block * size


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "its weights are quantised: reading them needs the `gguf` package, pip install gguf"
        ) from None
    return gguf


def _shortest(value: float) -> float:
    """The decimal number that a float32 was made from, as far as 7 digits say it."""
    short = float(f"{value:.7g}")
    return short if np.float32(short) == np.float32(value) else value


def _their_name(name: str) -> str:
    """The name in `transformers`; one that is not known stays, and is found to have no place."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    if found[1] is None:
        return f"{_NAMES[found[2]]}.{found[3]}" if found[2] in _NAMES else name
    return f"model.layers.{found[1]}.{_BLOCK_NAMES[found[2]]}.{found[3]}" if found[2] in _BLOCK_NAMES else name


class _Said:
    """The settings of an architecture; it remembers which were read."""

    def __init__(self, path: Path, settings: Mapping[str, Value]) -> None:
        self.path, self.settings = path, settings
        architecture = settings.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise ConfigError(
                f"{path}: architecture {architecture!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
            )
        self.architecture = str(architecture)
        self._read: set[str] = set()

    def get(self, key: str) -> Value:
        self._read.add(key)
        return self.settings.get(f"{self.architecture}.{key}")

    def number(self, key: str, otherwise: float | None = None) -> float:
        value = self.get(key)
        value = otherwise if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refused(key, value, "a number")
        return float(value)

    def size(self, key: str, otherwise: int | None = None) -> int:
        value = self.get(key)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(key, value, "a whole number, 1 or more")
        return value

    def must_be(self, key: str, *values: Value) -> None:
        if self.get(key) not in (None, *values):
            raise self.refused(key, self.get(key), " or ".join(map(repr, values)))

    def refused(self, key: str, value: object, expected: str) -> ConfigError:
        """The error to raise."""
        return ConfigError(f"{self.path}: {self.architecture}.{key} must be {expected}, found {value!r}")

    def check_all_read(self) -> None:
        """Raise ConfigError where a setting of the architecture was passed over."""
        for name, value in self.settings.items():
            prefix, _, key = name.partition(".")
            if prefix == self.architecture and key not in self._read | _HARMLESS and value not in (None, False, 0):
                raise ConfigError(f"{self.path}: {name}={value!r} is not supported")


def _config(said: _Said, tensors: Mapping[str, _Stored], divisors: Tensor | None) -> ConfigDict:
    """What config.json would say."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{said.path}: tensor 'token_embd.weight' is missing or no matrix")
    # What the tensors say too is held against them first: a damaged number would ask for any amount of memory.
    n_layers = len({found[1] for name in tensors if (found := re.match(r"blk\.(\d+)\.", name))})
    said.must_be("block_count", n_layers)
    said.must_be("embedding_length", embedding.shape[1])
    d_model, n_heads = said.size("embedding_length"), said.size("attention.head_count")
    head_dim = said.size("attention.key_length", d_model // n_heads)
    said.must_be("attention.value_length", head_dim)
    said.must_be("rope.dimension_count", head_dim)
    said.must_be("attention.causal", True)
    said.must_be("expert_count", 0)
    said.must_be("vocab_size", embedding.shape[0])
    window = said.get("attention.sliding_window") or None
    if window is not None and said.architecture != "llama":
        raise said.refused("attention.sliding_window", window, "0")
    config: ConfigDict = {
        "model_type": said.architecture if window is None else "mistral",
        "hidden_size": d_model,
        "num_attention_heads": n_heads,
        "num_key_value_heads": said.size("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "num_hidden_layers": n_layers,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": said.size("context_length"),
        "intermediate_size": said.size("feed_forward_length"),
        "rms_norm_eps": said.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(said, head_dim, divisors),
    }
    if window is not None:
        config["sliding_window"] = window
    elif said.architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if config["model_type"] == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    for key, name in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        config[key] = said.settings.get(f"tokenizer.ggml.{name}_token_id")
    return config


def _rope(said: _Said, head_dim: int, divisors: Tensor | None) -> ConfigDict:
    """Their `rope_parameters`."""
    theta = said.number("rope.freq_base", 10000.0)
    factor = said.number("rope.scaling.factor", said.number("rope.scale_linear", 1.0))
    kind = said.get("rope.scaling.type") or ("none" if factor in (0.0, 1.0) else "linear")
    # llama.cpp multiplies yarn's magnitude by these, `transformers` replaces it.
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        said.must_be(f"rope.scaling.{key}", 1.0)
    length = said.get("rope.scaling.original_context_length")
    betas = {key: said.get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    rope: ConfigDict = {"rope_type": "default", "rope_theta": theta}
    if divisors is not None and not bool((divisors == 1).all()):
        if kind != "none":
            raise said.refused("rope.scaling.type", kind, f"none beside tensor {_ROPE_DIVISORS!r}")
        return rope | _llama3(said.path, theta, head_dim, divisors)
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        beyond: ConfigDict = {key: value for key, value in betas.items() if value is not None}
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length} | beyond
    if kind != "none":
        raise said.refused("rope.scaling.type", kind, "none, linear or yarn")
    return rope


def _llama3(path: Path, theta: float, head_dim: int, divisors: Tensor) -> ConfigDict:
    """The settings that made the divisors. Only two ratios matter, so low_freq_factor is 1, as it always is.

    Between the two ends a divisor is `1 / ((1 - s) / factor + s)` with `s = (length * turns - 1) / (high - 1)`: linear
    in both unknowns, and two such dims give them.
    """
    device, found = torch.device("cpu"), divisors.double()
    plain = NoScaling().inv_freq(theta, head_dim, device)
    factor = _shortest(float(found.max()))
    between = (found > 1) & (found < found.max())
    if found.shape == plain.shape and int(between.sum()) >= 2 and bool((found >= 1).all()):
        turns = plain.double()[between] / (2 * math.pi)
        s = (1 / found[between] - 1 / factor) / (1 - 1 / factor)
        ones = torch.ones_like(s)
        length, high = torch.linalg.lstsq(torch.stack((turns, -s), 1), ones[:, None]).solution[:, 0].tolist()
        settings = {
            "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": round(high + 1, 3),
            "original_max_position_embeddings": round(length),
        }  # fmt: skip
        if length >= 1 and settings["high_freq_factor"] > 1:
            scaled = Llama3Scaling.model_validate(settings).inv_freq(theta, head_dim, device)
            if torch.allclose((plain / scaled).double(), found, rtol=1e-5):
                return {"rope_type": "llama3", **settings}
    raise ConfigError(f"{path}: tensor {_ROPE_DIVISORS!r} is no scaling of Llama 3.1: {divisors.tolist()}")
