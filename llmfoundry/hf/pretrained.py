"""Loads Hugging Face checkpoints into llmfoundry models, and saves llmfoundry models as Hugging Face checkpoints.

Opening a checkpoint reads no weights: its config determines the family, the family determines which tensors must exist
and how their blocks map to llmfoundry tensors, and the file headers show whether they are there. Only then are values
read, and each rank reads only those that it holds.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

import llmfoundry.hf.module  # noqa: F401  registers its kind of model, which a checkpoint's config may name
from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.dtensor import local_shard, whole
from llmfoundry.hf.facts import weight_differences
from llmfoundry.hf.family import ConfigDict, Family, read_config, write_config
from llmfoundry.hf.files import Advance, Folder, boxes, new_folder, write_weights
from llmfoundry.hf.generation import GENERATION, generation_of, read_generation, special_tokens
from llmfoundry.hf.gguf import GGUFFile
from llmfoundry.hf.pieces import Copy, Kept, Part, Pieces, Spec, TensorSource, fill, fill_grown, values_of
from llmfoundry.hf.tokenizer import TOKENIZER_FILES, name_for_transformers_4, save_tokenizer, tokenizer_of
from llmfoundry.kernels.halves import low_half_of, weight_of
from llmfoundry.layers.lora import frozen_weights, is_adapter
from llmfoundry.model.transformer import CausalLM, CausalLMConfig, cast_parameters
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.strict_json import read_mapping

log = logging.getLogger(__name__)

VOCABULARY = ("wte.weight", "lm_head.weight")  # the llmfoundry tensors with one row per token
SHARD_BYTES = 5 * 10**9  # maximum size of a written file

Progress = Callable[[int], AbstractContextManager[Advance]]  # (bytes in total) -> context manager


def _silent(total: int) -> AbstractContextManager[Advance]:
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint whose tensors all have a place in an llmfoundry model.

    Attributes:
        copies: the copies that fill each llmfoundry tensor.
        dtype: the dtype of most of the weights, by bytes.
        generation: the text of generation_config.json.
    """

    path: Path
    family: Family
    config: CausalLMConfig
    source: TensorSource
    copies: Mapping[str, list[Copy]]
    dtype: torch.dtype
    generation: str | None = None

    def our_specs(self) -> dict[str, Spec]:
        """Return the specs of the llmfoundry tensors, each with the dtype of its Hugging Face tensor."""
        return {
            name: Spec(self.source.specs[self.copies[name][0].source.name].dtype, shape)
            for name, shape in our_shapes(self.config).items()
        }


class Loaded(NamedTuple):
    """An llmfoundry model, and its tokenizer if the checkpoint has one."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase | None


def locate(path_or_id: str | Path, *, settings_only: bool = False) -> Path:
    """Return the folder of a checkpoint: a local path, or a hub id, which is downloaded on first use.

    Only weights, JSON files and tokenizer files are downloaded: no code, no pickles.

    Args:
        settings_only: for a hub id, download only config.json.

    Raises:
        ConfigError: if it is neither a folder nor a hub id that can be downloaded.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError(f"{path}: is a file; name the folder of a Hugging Face model")
    patterns = ["config.json", GENERATION, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    wanted = patterns[:1] if settings_only else patterns

    def fetch() -> str:
        return snapshot_download(str(path_or_id), allow_patterns=wanted, local_files_only=not runtime.asks_hub())

    try:
        return Path(runtime.first_of_node(f"{path_or_id}{' (settings)' if settings_only else ''}", fetch))
    except HFValidationError:
        raise ConfigError(f"{path_or_id}: no such folder") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{path_or_id}: no such folder, and the hub did not deliver it: {why}") from None


def our_shapes(config: CausalLMConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors, without adapters."""
    with torch.device("meta"):
        state = config.model_copy(update={"lora": None}).build().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def pieces_of(family: Family, config: CausalLMConfig, layout: str) -> Pieces:
    """Return the mapping between an llmfoundry model and a Hugging Face model."""
    pieces = Pieces(our_shapes(config))
    family.add_pieces(config, pieces, layout)
    pieces.check()
    return pieces


def open_checkpoint(path_or_id: str | Path, once: bool = False, as_it_is: bool = False) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path_or_id: a folder, a GGUF file or a hub id.
        once: each tensor will be read only once, by this process alone.
        as_it_is: use the `transformers` module, even if llmfoundry can express the model.

    Raises:
        ConfigError: if a file is missing, damaged or outside of the folder; if the model or a setting is not supported;
            or if a tensor is missing, unexpected or of the wrong shape.
    """
    if str(path_or_id).endswith(".gguf"):
        file = GGUFFile(Path(path_or_id))
        family, config = read_config(file.config, str(path_or_id))
        found = matched(Path(path_or_id), family, config, file)
        return replace(found, generation=generation_of(file.config))
    path = locate(path_or_id)
    data = read_settings(path)
    family, config = read_config(data, str(path / "config.json"), as_it_is)
    found = matched(path, family, config, Folder(path, once))
    return replace(found, generation=read_generation(path) or generation_of(data))


def read_settings(folder: Path) -> ConfigDict:
    """Return the config.json of a folder.

    Raises:
        ConfigError: if it is missing, or is not a JSON object.
    """
    config_file = folder / "config.json"
    try:
        return read_mapping(config_file)
    except FileNotFoundError:
        raise ConfigError(f"{config_file}: no such file; {_instead(folder)}") from None
    except OSError as error:
        raise ConfigError(f"{config_file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{config_file}: is not valid JSON: {error}") from None


def _instead(folder: Path) -> str:
    """Return advice for a folder without a config.json."""
    if (folder / "adapter_config.json").exists():
        return "these are adapters; merge them into their base model first, with peft's merge_and_unload"
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        return "it is a run or a checkpoint of this framework, which is used as it is, without hf: or from-hf"
    return "name a Hugging Face model's folder or hub id"


def matched(path: Path, family: Family, config: CausalLMConfig, folder: TensorSource) -> Checkpoint:
    """Match the tensors of a checkpoint against those that the family expects.

    Raises:
        ConfigError: if a tensor is missing, unexpected or of the wrong shape.
    """
    source = _with_prefix(folder, family)
    _check_counts(path, config, source.specs)
    found = family.weights(source.specs, config)
    if config.tie_word_embeddings and family.head in found:  # some writers store the embedding under this name too
        found.discard(family.head)
        _check_same(path, source, family.head, family.embedding)
    layout = family.layout_of(source.specs)
    candidates = [pieces_of(family, config, each) for each in (family.layouts if layout is None else (layout,))]
    pieces = max(candidates, key=lambda each: len(found & each.their_shapes().keys()))
    expected = pieces.their_shapes()
    for name in expected:
        if name not in found:
            close = _nearest(name, found - expected.keys(), "is there")
            raise ConfigError(f"{path}: tensor {name!r} is missing{close}")
        if source.specs[name].shape != expected[name]:
            raise ConfigError(
                f"{path}: tensor {name!r} has shape {list(source.specs[name].shape)}, "
                f"but config.json makes it {list(expected[name])}"
            )
    for name in sorted(found - expected.keys()):
        raise ConfigError(
            f"{path}: tensor {name!r} has no place in a {family.model_type} model of this config.json"
            f"{_nearest(name, set(expected), 'has a place')}"
        )
    sizes: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return Checkpoint(path, family, config, source, pieces.reading(), max(sizes, key=sizes.__getitem__))


def _check_counts(path: Path, config: CausalLMConfig, specs: Mapping[str, Spec]) -> None:
    """Reject layer and expert counts that the files cannot hold, before anything of that size is built."""
    ffn = config.ffn(config.n_layers - 1)
    n_experts = ffn.moe_num_experts if isinstance(ffn, MoEConfig) else 0
    largest = max((max(spec.shape, default=0) for spec in specs.values()), default=0)  # if experts are stacked
    if config.n_layers > len(specs) or n_experts > max(len(specs), largest):
        raise ConfigError(
            f"{path}: config.json says {config.n_layers} layers and {n_experts} experts, and the files hold "
            f"{len(specs)} tensors"
        )


def load_weights(model: CausalLM, path_or_id: str | Path, allow: Collection[str] = ()) -> None:
    """Load the weights of a checkpoint into a model. Each rank of a sharded model reads only what it holds.

    Values are converted to the model's dtype. Adapters (`lora`) are left unchanged. The model's vocabulary may be
    larger than the checkpoint's: the new rows are the mean of the others.

    Args:
        model: materialized, on any device and mesh.
        path_or_id: a folder, a GGUF file or a hub id.
        allow: settings, or blocks of settings, in which the model may differ from the checkpoint, e.g.
            `model.attn_config.rope_theta`.

    Raises:
        ConfigError: as `open_checkpoint`, or if the model does not match the checkpoint. The model is then unchanged.
    """
    checkpoint = open_checkpoint(path_or_id, as_it_is=not model.own_blocks)
    stored = checkpoint.config
    if grown := stored.vocab_size < model.config.vocab_size:
        added = model.config.vocab_size - stored.vocab_size
        log.info("%s: %d rows are added to the embedding, each the mean of the others", checkpoint.path, added)
        stored = stored.model_copy(update={"vocab_size": model.config.vocab_size})
    other = weight_differences(stored, model.config)
    for name, (theirs, ours) in other.items():
        if not any(f"model.{name}.".startswith(f"{each}.") for each in allow):
            raise ConfigError(f"model.{name}: is {ours!r}, but {theirs!r} in {checkpoint.path}")
    if other and our_shapes(model.config) != our_shapes(stored):
        said = ", ".join(f"model.{name} is {ours!r}, and {theirs!r} there" for name, (theirs, ours) in other.items())
        raise ConfigError(f"{checkpoint.path}: its tensors have other shapes than the model's: {said}")
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        shard = local_shard(tensor)
        if grown and name in VOCABULARY:
            fill_grown(shard, checkpoint.copies[name], checkpoint.source, checkpoint.config.vocab_size)
        else:
            fill(shard.local, shard.offsets, checkpoint.copies[name], checkpoint.source)
    quantize_from(model, checkpoint.copies, checkpoint.source)


def quantize_from(model: nn.Module, copies: Mapping[str, Iterable[Copy]], source: TensorSource) -> None:
    """Fill the weights that a model keeps in NF4, a bounded piece at a time. Each rank reads only what it keeps.

    Args:
        copies: the copies that fill each llmfoundry tensor.
        source: the tensors to read from.
    """
    for name, frozen in frozen_weights(model):
        dtype = source.specs[next(iter(copies[name])).source.name].dtype
        for rows in frozen.pieces():
            shape = (rows.stop - rows.start, *frozen.shape[1:])
            values = torch.empty(shape, dtype=dtype, device=frozen.codes.device)
            fill(values, (frozen.first + rows.start, *(0 for _ in shape[1:])), copies[name], source)
            frozen.quantize_(values, rows.start)


def from_pretrained(
    path_or_id: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Loaded:
    """Load a Hugging Face checkpoint as an llmfoundry model in evaluation mode, with its tokenizer.

    Args:
        path_or_id: a folder, a GGUF file or a hub id.
        dtype: of the weights; None: as stored.

    Raises:
        ConfigError: if the checkpoint cannot be found, is damaged, or is not supported.
    """
    checkpoint = open_checkpoint(path_or_id)
    with torch.device("meta"):
        model = checkpoint.config.build()
    cast_parameters(model, dtype or checkpoint.dtype)
    model = model.to_empty(device=device)
    model.init_buffers()
    for name, tensor in model.state_dict().items():
        fill(tensor, (0,) * tensor.dim(), checkpoint.copies[name], checkpoint.source)
    return Loaded(model.eval(), tokenizer_of(checkpoint.path))


def save_pretrained(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    model_type: str | None = None,
    generation: str | None = None,
    optimizer: Optimizer | None = None,
) -> None:
    """Write a model as a Hugging Face checkpoint. If the model is sharded, all ranks call this; rank 0 writes.

    Args:
        folder: the folder to write. It must not exist or must be empty; it appears when it is complete.
        dtype: dtype of the Hugging Face tensors; None: the dtype of the model's weights.
        model_type: the Hugging Face model type; None: the first family that can represent the model.
        generation: the text of a generation_config.json; None: that of the folder from which the tokenizer was read,
            if it has one.
        optimizer: the optimizer of a model in training; its state may hold the low halves of weights
            (kernels/halves.py).

    Raises:
        ConfigError: on all ranks, if no family can represent the model, or the folder is in use or cannot be written.
    """
    source = _Model(model, optimizer)

    def write() -> None:
        stops = generation
        if stops is None and tokenizer is not None and tokenizer.name_or_path:
            stops = read_generation(Path(tokenizer.name_or_path))
        with new_folder(Path(folder)) as temporary:
            write_checkpoint(
                temporary, model.config, source, dtype=dtype, model_type=model_type, tokenizer=tokenizer,
                generation=stops,
            )  # fmt: skip
            if tokenizer is not None:
                save_tokenizer(tokenizer, temporary)
                name_for_transformers_4(temporary)

    def follow() -> None:
        family, _ = write_config(model.config, model_type)
        pieces = pieces_of(family, model.config, family.layouts[0])
        copies = pieces.writing()
        for name, spec in _their_specs(pieces, source, dtype).items():
            for offsets, box in boxes(spec):  # the same collectives as on rank 0
                fill(torch.empty(box.shape, dtype=box.dtype), offsets, copies[name], source)

    runtime.all_or_none(write if runtime.is_rank0() else follow)


def write_checkpoint(
    folder: Path,
    config: CausalLMConfig,
    source: TensorSource,
    *,
    dtype: torch.dtype | None = None,
    model_type: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation: str | None = None,
    progress: Progress = _silent,
) -> None:
    """Write the JSON files and the weights of an llmfoundry model into a folder, without holding all weights in memory.

    Args:
        source: the llmfoundry tensors.
        dtype: of the weights; None: as in the source.
        model_type: the family to write; None: the first that can represent the model.
        tokenizer: provides the special tokens that `generation` does not name.
        generation: the text of generation_config.json.
        progress: reports the bytes written.
    """
    family, data = write_config(config, model_type)
    pieces = pieces_of(family, config, family.layouts[0])
    specs = _their_specs(pieces, source, dtype)
    dtypes = {spec.dtype for spec in specs.values()}
    dtype_name = str(max(dtypes, key=lambda each: each.itemsize)).removeprefix("torch.")
    said: ConfigDict = {
        "dtype": dtype_name,
        "torch_dtype": dtype_name,  # its name before `transformers` 4.56
        "transformers_version": transformers.__version__,
        **special_tokens(generation, tokenizer),
    }
    (folder / "config.json").write_text(json.dumps(data | said, indent=2) + "\n", encoding="utf-8")
    if family.code:
        (folder / family.code).write_text(Path(__file__).with_name(family.code).read_text(encoding="utf-8"), "utf-8")
    text = generation or generation_of(said)
    if text is not None:
        (folder / GENERATION).write_text(text, encoding="utf-8")
    copies = pieces.writing()

    def fill_box(name: str, at: tuple[int, ...], box: Tensor) -> None:
        if name in pieces.left:
            box.zero_()
        fill(box, at, copies[name], source)

    with progress(sum(spec.nbytes for spec in specs.values())) as advance:
        write_weights(folder, specs, fill_box, SHARD_BYTES, advance)


def _their_specs(pieces: Pieces, source: TensorSource, dtype: torch.dtype | None) -> dict[str, Spec]:
    """Return the specs of the Hugging Face tensors. Their dtype defaults to that of the llmfoundry tensors."""
    writing = pieces.writing()
    return {
        name: Spec(dtype or source.specs[writing[name][0].source.name].dtype, shape)
        for name, shape in pieces.their_shapes().items()
    }


def _nearest(name: str, known: set[str], what: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; the nearest that {what} is {close[0]!r}" if close else ""


def _check_same(path: Path, source: TensorSource, head: str, embedding: str) -> None:
    """Raise ConfigError if a tied model's head differs from its embedding, since one of them would be lost."""
    same = embedding in source.specs and source.specs[head] == source.specs[embedding]
    if same:
        pairs = zip(values_of(source.parts(head)), values_of(source.parts(embedding)), strict=True)
        same = all(torch.equal(one.values, two.values) for one, two in pairs)
    if not same:
        raise ConfigError(
            f"{path}: config.json ties the embeddings, but {head!r} is not {embedding!r}; "
            "set tie_word_embeddings to false there to keep both"
        )


class _Renamed:
    """A source whose tensors are renamed."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names
        self.specs: Mapping[str, Spec] = {new: source.specs[old] for new, old in names.items()}

    def parts(self, name: str) -> Iterable[Kept]:
        return self._source.parts(self._names[name])


def _with_prefix(source: TensorSource, family: Family) -> TensorSource:
    """Add the family's prefix to the tensor names of a bare decoder."""
    if not family.prefix or any(name.startswith(family.prefix) for name in source.specs):
        return source
    own = {family.head}
    return _Renamed(source, {name if name in own else family.prefix + name: name for name in source.specs})


class _Model:
    """A model's tensors as a source. Sharded tensors are gathered one at a time, by all ranks together.

    The last one is kept, because the next Hugging Face tensor is often another part of it.
    """

    def __init__(self, model: CausalLM, optimizer: Optimizer | None = None) -> None:
        self._state = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
        self._parameters, self._optimizer = dict(model.named_parameters()), optimizer
        in_halves = {name for name, each in self._parameters.items() if low_half_of(each, optimizer) is not None}
        self.specs: Mapping[str, Spec] = {
            name: Spec(torch.float32 if name in in_halves else tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._state.items()
        }
        self._last: tuple[str, Tensor] | None = None

    def parts(self, name: str) -> list[Part]:
        if self._last is None or self._last[0] != name:
            parameter = self._parameters.get(name)
            kept = self._state[name] if parameter is None else weight_of(parameter, self._optimizer)
            runtime.meet()
            self._last = name, whole(kept)
        return [Part((0,) * self._last[1].dim(), self._last[1])]
