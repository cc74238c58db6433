"""Conversion, as streams: Hugging Face folders to llmfoundry checkpoints and back, and dense models to mixtures.

A converted checkpoint has only weights, in their original dtype. Its config.yaml is a complete, editable recipe that
continues from it: `train.py OUT/config.yaml load_path=OUT load_weights_only=true`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmfoundry.checkpoint import manifest
from llmfoundry.checkpoint.finding import Found, candidates, newest_usable
from llmfoundry.checkpoint.index import Box, Laid, index_of
from llmfoundry.checkpoint.manifest import (
    CONFIG,
    CONVERTED,
    INDEX,
    TRAINER,
    CheckpointError,
    Need,
    Written,
)
from llmfoundry.checkpoint.reading import (
    HUGGING_FACE,
    Contents,
    SavedModel,
    check_finite,
    find_base,
    load_model_only,
    read,
)
from llmfoundry.checkpoint.storage import is_finite
from llmfoundry.code import refuse_code, run_plugins
from llmfoundry.config import ConfigError, check, dump, is_theirs, is_url
from llmfoundry.hf.adapters import peft_names
from llmfoundry.hf.family import write_config
from llmfoundry.hf.files import FillBox, new_folder, shards, write_files
from llmfoundry.hf.generation import GENERATION, read_generation
from llmfoundry.hf.pieces import Copy, Kept, Part, Pieces, Spec, TensorSource, box_of, fill, whole_of
from llmfoundry.hf.pretrained import (
    Progress,
    open_checkpoint,
    our_shapes,
    write_checkpoint,
)
from llmfoundry.hf.tokenizer import copy_tokenizer, name_for_transformers_4, tokenizer_of
from llmfoundry.hf.upcycle import Upcycling, upcycle, upcycled_config
from llmfoundry.layers.lora import adapted
from llmfoundry.model.adapters import save_peft
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.settings import write_resolved

_FILE_BYTES = 2 * 10**9  # several files can be verified on several cores


class CheckpointSource:
    """The weights of an llmfoundry checkpoint, with adapters merged; missing weights are read from its base.

    Args:
        contents: the checkpoint.
        config: of its model.
    """

    def __init__(self, contents: Contents, config: CausalLMConfig) -> None:
        self._saved = SavedModel(contents)
        self._own = self._saved.specs
        self._scale = config.lora.scale if config.lora is not None else 0.0
        self._base = _open_base(contents, config)
        own = {name: spec for name, spec in self._own.items() if "lora_" not in name}
        self.specs: Mapping[str, Spec] = {**(self._base.specs if self._base is not None else {}), **own}

    def parts(self, name: str) -> Iterator[Kept]:
        """Yield the boxes of a tensor that ranks saved; a tensor with an adapter is returned whole."""
        base = name.removesuffix(".weight")
        sides = [
            f"{base}{join}lora_{side}" for side in "AB" for join in "._" if f"{base}{join}lora_{side}" in self._own
        ]
        if not sides:
            yield from self._kept(name)
            return
        weight, a, b = (whole_of(self._spec(each), self._kept(each)) for each in (name, *sides))
        yield Part((0,) * weight.dim(), adapted(weight, a.to(weight.dtype), b.to(weight.dtype), self._scale))

    def _kept(self, name: str) -> Iterable[Kept]:
        if name in self._own:
            return self._saved.parts(name)
        assert self._base is not None
        return self._base.parts(name)

    def _spec(self, name: str) -> Spec:
        return self._own.get(name) or self.specs[name]


class HuggingFaceSource:
    """The weights of a Hugging Face checkpoint under llmfoundry names."""

    def __init__(self, path_or_id: str) -> None:
        self._theirs = open_checkpoint(path_or_id)
        self.specs: Mapping[str, Spec] = self._theirs.our_specs()

    def parts(self, name: str) -> Iterator[Kept]:
        """Yield the whole tensor."""
        tensor = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        fill(tensor, (0,) * tensor.dim(), self._theirs.copies[name], self._theirs.source)
        yield Part((0,) * tensor.dim(), tensor)


def _open_base(contents: Contents, config: CausalLMConfig) -> TensorSource | None:
    if contents.base is None:
        return None
    path = find_base(contents.base, contents.path)
    if is_theirs(path):
        return HuggingFaceSource(path.removeprefix(HUGGING_FACE))
    return CheckpointSource(read(path), _base(config))


def from_hf(source: str | Path, out: Path, progress: Progress) -> CausalLMConfig:
    """Convert a Hugging Face checkpoint to an llmfoundry checkpoint.

    Args:
        source: a folder or a hub id.
        out: the checkpoint to write; must not exist, or be empty.
        progress: reports the bytes written.

    Returns:
        The model's config.

    Raises:
        ConfigError: if `source` cannot be converted, or `out` is in use; nothing is left behind.
    """
    theirs = open_checkpoint(source, once=True)
    with new_folder(out) as folder:
        write_ours(
            folder, out, theirs.config, theirs.our_specs(), theirs.path, theirs.generation, progress,
            lambda name, at, box: fill(box, at, theirs.copies[name], theirs.source),
        )  # fmt: skip
    return theirs.config


def to_hf(
    source: str | Path, out: Path, progress: Progress, dtype: torch.dtype | None = None, model_type: str | None = None,
    allow_code: bool = False,
) -> None:  # fmt: skip
    """Convert an llmfoundry checkpoint to a Hugging Face folder, with adapters merged.

    Args:
        source: a checkpoint, a folder of checkpoints (the newest is used), or a run's `save_folder`.
        out: the folder to write; must not exist, or be empty.
        progress: reports the bytes written.
        dtype: of the weights; None: as stored.
        model_type: the family; None: the first that can represent the model.
        allow_code: whether to run the plug-ins that its settings name.

    Raises:
        ConfigError: if `source` cannot be read, no family can represent the model, or `out` is in use.
    """
    newest_usable(
        lambda: candidates(source),
        lambda found: _to_hf(found, out, progress, dtype, model_type, allow_code),
        "model",
        str(source),
    )


def _to_hf(
    found: Found, out: Path, progress: Progress, dtype: torch.dtype | None, model_type: str | None, allow_code: bool
) -> None:
    contents, config = _open(found.path, "texts", allow_code)  # tensors are verified while they are copied
    tokenizer = tokenizer_of(contents.tokenizer) if contents.tokenizer is not None else None
    weights = {name: written for name, written in sorted(contents.files.items()) if _is_weights(name)}
    with new_folder(out) as folder, manifest.verified_beside(contents.path, weights):
        if not contents.finite:
            for name in weights:
                check_finite(contents.path / name)
        write_checkpoint(
            folder, _base(config), CheckpointSource(contents, config), dtype=dtype, model_type=model_type,
            tokenizer=tokenizer, generation=read_generation(contents.path), progress=progress,
        )  # fmt: skip
        if contents.tokenizer is not None:
            copy_tokenizer(contents.tokenizer, folder)
            name_for_transformers_4(folder)


def adapters_to_peft(source: str | Path, out: Path, base_model: str | None = None, allow_code: bool = False) -> None:
    """Export the adapters of an llmfoundry checkpoint to a folder that PEFT reads.

    Args:
        source: as in `to_hf`.
        out: the folder to write; must not exist, or be empty.
        base_model: the hub id or folder of the model that they adapt.
        allow_code: whether to run the plug-ins that its settings name.

    Raises:
        ConfigError: if there are no adapters, or PEFT cannot represent them.
    """
    contents, config = _open(source, allow_code=allow_code)
    if config.lora is None:
        raise ConfigError(f"{contents.path}: has no adapters (model.lora)")
    family, _ = write_config(_base(config))
    names = peft_names(family, _base(config))
    with torch.device("meta"):
        model = config.build()
    model = model.to_empty(device="cpu")
    load_model_only(contents, model, adapters_only=True)
    with new_folder(out) as folder:
        save_peft(model, folder, names, base_model)


def grow(
    source: str | Path, out: Path, plan: Upcycling, seed: int, progress: Progress, allow_code: bool = False
) -> CausalLMConfig:
    """Upcycle a dense checkpoint, in Hugging Face's or llmfoundry's format, to a mixture in an llmfoundry checkpoint.

    Args:
        source: the dense checkpoint.
        out: the checkpoint to write; must not exist, or be empty.
        plan: how to upcycle.
        seed: for the routers and the noise.
        progress: reports the bytes written.
        allow_code: whether to run the plug-ins that its settings name.

    Returns:
        The mixture's config.

    Raises:
        ConfigError: if `source` cannot be read or is not dense, or `out` is in use.
    """
    path = Path(source)
    is_ours = is_url(str(source)) or (path / manifest.MANIFEST).exists() or (path / "checkpoints").is_dir()
    values: TensorSource
    copies: Mapping[str, list[Copy]]
    if is_ours:
        contents, config = _open(source, allow_code=allow_code)
        values = CheckpointSource(contents, config)
        dense, tokenizer, specs = _base(config), contents.tokenizer, dict(values.specs)
        copies = Pieces.identity(specs)
        generation = read_generation(contents.path)
    else:
        theirs = open_checkpoint(source)
        values, copies = theirs.source, theirs.copies
        dense, tokenizer, specs = theirs.config, theirs.path, theirs.our_specs()
        generation = theirs.generation

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, spec in specs.items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
            fill(tensor, (0,) * tensor.dim(), copies[name], values)
            yield name, tensor

    grown = upcycled_config(dense, plan)
    dtype = next(iter(specs.values())).dtype
    stream, ahead, last = upcycle(weights(), dense, plan, seed), dict[str, Tensor](), ""

    def fill_box(name: str, offsets: tuple[int, ...], box: Tensor) -> None:
        nonlocal last
        if name != last:
            ahead.pop(last, None)
            last = name
        while name not in ahead:
            found, tensor = next(stream)
            ahead[found] = tensor
        box.copy_(box_of(ahead[name], offsets, tuple(box.shape)))

    with new_folder(out) as folder:
        made = {name: Spec(dtype, shape) for name, shape in our_shapes(grown).items()}
        write_ours(folder, out, grown, made, tokenizer, generation, progress, fill_box)
    return grown


def recipe(config: CausalLMConfig, out: Path, has_tokenizer: bool) -> dict[str, object]:
    """A run that goes on from a converted checkpoint, as plain data; its data is the reader's to choose.

    It trains on all of ./data; it evaluates once `eval_interval` says so. The model has our name, since that of LLM
    Foundry would bring LLM Foundry's defaults: data that is not shuffled, and only last turns that are learned.
    """
    return {
        "max_seq_len": min(config.max_seq_len, 4096),
        "model": dump(config.model_copy(update={"name": "causal_lm"}) if config.name == "mpt_causal_lm" else config),
        "tokenizer": {"name": str(out.absolute() / "tokenizer")}
        if has_tokenizer
        else {"name": "bpe", "vocab_size": 300},
        "train_loader": {"dataset": {"name": "text_files", "path": "./data"}},
        "eval_loader": {"dataset": {"name": "text_files", "path": "./eval-data"}},
        "eval_interval": "0ba",
        "optimizer": {"name": "adamw", "lr": 1.0e-5},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "0.01dur", "alpha_f": 0.1},
        "max_duration": "1ep",
        "global_train_batch_size": 32,
        "save_folder": f"runs/{out.name}",
    }


def _is_weights(name: str) -> bool:
    return name.startswith("model-")


def _open(source: str | Path, need: Need = "model", allow_code: bool = False) -> tuple[Contents, CausalLMConfig]:
    """Read a checkpoint's contents, and the config of its model."""
    contents = read(source, need)
    if not allow_code:
        refuse_code(contents.config, str(contents.path), ["code_paths"])
    run_plugins(contents.config)
    model = contents.config.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{contents.path}: its settings have no model")
    config = check(ModelConfig, model, where=f"{contents.path}: model")
    assert isinstance(config, CausalLMConfig)
    return contents, config


def _base(config: CausalLMConfig) -> CausalLMConfig:
    return config.model_copy(update={"lora": None})


def write_ours(
    folder: Path,
    out: Path,
    config: CausalLMConfig,
    specs: Mapping[str, Spec],
    tokenizer: Path | None,
    generation: str | None,
    progress: Progress,
    fill_box: FillBox,
) -> None:
    """Write a complete llmfoundry checkpoint to `folder`, which will be renamed to `out`."""
    parts = {f"model-{number:05d}.safetensors": part for number, part in enumerate(shards(specs, _FILE_BYTES))}
    finite = []

    def fill_and_look(name: str, offsets: tuple[int, ...], box: Tensor) -> None:
        fill_box(name, offsets, box)
        finite.append(is_finite(box))

    with progress(sum(spec.nbytes for spec in specs.values())) as advance:
        filed = write_files(folder, parts, fill_and_look, advance, hashed=True)
    files = {name: Written(file.bytes, file.sha256) for name, file in filed.items()}
    tensors: dict[str, Laid] = {}
    layouts: list[list[Box]] = []
    for number, written in enumerate(filed.values()):
        for place in written.places:
            tensors[f"model/{place.name}"] = Laid(place.spec.dtype, place.spec.shape, len(layouts))
            layouts.append([Box(number, (0,) * len(place.spec.shape), place.spec.shape)])
    has_tokenizer = False
    if tokenizer is not None:
        (folder / "tokenizer").mkdir()
        has_tokenizer = copy_tokenizer(tokenizer, folder / "tokenizer")
    settings = write_resolved(recipe(config, out, has_tokenizer))
    manifest.write_file(folder / CONFIG, settings.encode())
    texts = {INDEX: index_of(tensors, layouts).decode(), TRAINER: json.dumps({"step": 0}), CONVERTED: settings}
    if generation is not None:
        texts[GENERATION] = generation
    files |= {name: manifest.write_file(folder / name, text.encode()) for name, text in texts.items()}
    if has_tokenizer:
        for file in filter(Path.is_file, (folder / "tokenizer").rglob("*")):
            files[file.relative_to(folder).as_posix()] = manifest.measure(file, sync=True)
    elif tokenizer is not None:
        (folder / "tokenizer").rmdir()
    manifest.write_manifest(folder, 0, files, finite=all(finite))
