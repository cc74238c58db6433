"""Reads GGUF files (llama.cpp) of the Llama family as a `transformers` config.json and tensors.

The `gguf` library reads the header (gguf_header.py) and dequantizes tensors to float32, one at a time.
GGUF differs from `transformers` in three ways. In `llama` files, the rows of q and k are permuted for RoPE on adjacent
pairs of dims. Llama 3.1's RoPE scaling is stored as a tensor of frequency divisors, from which the settings are
recovered. Numbers are float32: 1e-5 is stored as 9.99999974738e-06.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.tokenizer_files import load_tokenizer
from llmfoundry.hf.family import ConfigDict, Value
from llmfoundry.hf.files import Stored
from llmfoundry.hf.pieces import Kept, Part, Spec, whole_of
from llmfoundry.layers.rope import Llama3Scaling, NoScaling

if TYPE_CHECKING:
    from llmfoundry.hf.gguf_header import Header, Placed

_ARCHITECTURES = "llama", "qwen2", "qwen3"  # the names are the same in `transformers`

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROPE_DIVISORS = "rope_freqs.weight"  # for Llama 3.1 scaling, one per pair of dims
_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"}
_SLAB_ROWS = 1024  # dequantized at a time


class GGUFFile:
    """A GGUF file as a `TensorSource`, under the tensor names of `transformers`.

    Args:
        path: the file.

    Attributes:
        config: the equivalent of config.json.

    Raises:
        ConfigError: if the file is not GGUF, is truncated or damaged, or has an unsupported architecture or setting; or
            if the `gguf` library is not installed.
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
        """Return the tensor. If it is dequantized or reordered, it is kept in memory until another one is requested."""
        stored = self._stored[name]
        if stored.is_plain and not stored.heads:
            return [self._box(stored.start, stored.spec)]
        if self._last is None or self._last[0] != name:
            self._last = None  # free the previous tensor before creating the next
            self._last = name, self._values(stored)
        return [Part((0,) * self._last[1].dim(), self._last[1])]

    def _box(self, start: int, spec: Spec) -> Stored:
        return Stored(spec, self._path, start, (0,) * len(spec.shape))

    def _restore_order(self) -> None:
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        for name, each in self._stored.items():
            n_heads = next((heads[part] for part in name.split(".") if part in heads), None)
            if isinstance(n_heads, int) and each.shape[0] % (2 * n_heads) == 0:  # else the shape is rejected later
                self._stored[name] = each._replace(heads=n_heads)

    def _values(self, stored: Placed) -> Tensor:
        values = self._dequantised(stored)
        if stored.heads:  # (H, C/2, 2, ...) adjacent pairs to (H, 2, C/2, ...) halves
            values = values.unflatten(0, (stored.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return values

    def _dequantised(self, stored: Placed) -> Tensor:
        if stored.is_plain:
            return whole_of(stored.spec, [self._box(stored.start, stored.spec)])
        from gguf import quants

        values = torch.empty(math.prod(stored.shape[:-1]), stored.shape[-1])
        coded = self._box(stored.start, Spec(torch.uint8, (len(values), stored.nbytes // len(values))))
        for start in range(0, len(values), _SLAB_ROWS):
            rows = min(_SLAB_ROWS, len(values) - start)
            for block in coded.blocks((start, 0), (rows, coded.shape[1])):
                first = block.offsets[0]
                values[first : first + len(block.values)] = torch.from_numpy(
                    quants.dequantize(block.values.numpy(), stored.kind)
                )
        return values.view(stored.shape)


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a GGUF file, or None if it has none.

    Raises:
        ConfigError: if `transformers` cannot convert it.
    """
    settings, _ = _read_header(path)
    if "tokenizer.ggml.model" not in settings:
        return None
    try:
        return load_tokenizer(path.parent, f"{path}: its tokenizer", gguf_file=path.name)
    except ConfigError as error:
        raise ConfigError(f"{error}; give the tokenizer itself, a folder with tokenizer.json or a hub id") from None


def _read_header(path: Path) -> Header:
    """Read the header of a file. `gguf` is an optional dependency, so it is imported here."""
    try:
        from llmfoundry.hf.gguf_header import read_header
    except ImportError:
        raise ConfigError(f"{path}: reading GGUF files needs the `gguf` package, pip install gguf") from None
    return read_header(path)


def _their_name(name: str) -> str:
    """Return the name in `transformers`. Unknown names are kept and rejected later."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    if found[1] is None:
        return f"{_NAMES[found[2]]}.{found[3]}" if found[2] in _NAMES else name
    return f"model.layers.{found[1]}.{_BLOCK_NAMES[found[2]]}.{found[3]}" if found[2] in _BLOCK_NAMES else name


class _Said:
    """The settings of an architecture, which records those that were read."""

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
        """Return the error to raise."""
        return ConfigError(f"{self.path}: {self.architecture}.{key} must be {expected}, found {value!r}")

    def check_all_read(self) -> None:
        """Raise ConfigError if a setting of the architecture has not been read."""
        for name, value in self.settings.items():
            prefix, _, key = name.partition(".")
            if prefix == self.architecture and key not in self._read | _HARMLESS and value not in (None, False, 0):
                raise ConfigError(f"{self.path}: {name}={value!r} is not supported")


def _config(said: _Said, tensors: Mapping[str, Placed], divisors: Tensor | None) -> ConfigDict:
    """Return the equivalent of config.json."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{said.path}: tensor 'token_embd.weight' is missing or is not a matrix")
    # Check sizes against the tensors first: a damaged number could request any amount of memory.
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
    """Return the Hugging Face `rope_parameters`."""
    theta = said.number("rope.freq_base", 10000.0)
    factor = said.number("rope.scaling.factor", said.number("rope.scale_linear", 1.0))
    kind = said.get("rope.scaling.type") or ("none" if factor in (0.0, 1.0) else "linear")
    # llama.cpp multiplies YaRN's attention factor by these; `transformers` replaces it.
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
    """Recover the Llama 3 scaling settings from the divisors. Only two ratios matter, so low_freq_factor is set to 1.

    Between the two cutoffs a divisor is `1 / ((1 - s) / factor + s)` with `s = (length * turns - 1) / (high - 1)`. That
    is linear in both unknowns, `length` and `high`, so two such dims determine them.
    """
    device, found = torch.device("cpu"), divisors.double()
    plain = NoScaling().inv_freq(theta, head_dim, device)
    factor = float(f"{float(found.max()):.7g}")
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
    raise ConfigError(f"{path}: tensor {_ROPE_DIVISORS!r} is not the rope scaling of Llama 3.1: {divisors.tolist()}")
