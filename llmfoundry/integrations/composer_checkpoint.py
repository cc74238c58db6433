"""Converts LLM Foundry and Composer checkpoints to llmfoundry checkpoints: the model, its tokenizer, its weights.

The model's config comes from a training YAML, from the settings that integrations/composer.py stores, or from the
Hugging Face config that Composer stores for LLM Foundry's models (its MPT, and any family of hf/families). The states
of the optimizer, the schedule and random generators are dropped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from llmfoundry.checkpoint.composer_files import ComposerFiles, Plain, open_composer
from llmfoundry.checkpoint.composer_names import copies_from
from llmfoundry.checkpoint.convert import write_ours
from llmfoundry.checkpoint.finding import file_here
from llmfoundry.config import ConfigError, check
from llmfoundry.hf.family import read_config
from llmfoundry.hf.files import new_folder
from llmfoundry.hf.pieces import Copy, Spec, TensorSource, fill
from llmfoundry.hf.pretrained import Progress, matched, our_shapes
from llmfoundry.hf.tokenizer import TOKENIZER_FILES
from llmfoundry.integrations.foundry_tree import Tree
from llmfoundry.integrations.foundry_yaml import translate
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.settings import load_yaml

log = logging.getLogger(__name__)

SETTINGS = "LLMFoundrySettings"  # the callback of integrations/composer.py whose state is the model's config
_HUGGING_FACE = ("integrations", "huggingface")


class Found(NamedTuple):
    """An llmfoundry model in a Composer checkpoint; `copies` fill its tensors from `source`."""

    config: CausalLMConfig
    source: TensorSource
    copies: Mapping[str, list[Copy]]


def from_composer(source: str | Path, out: Path, yaml: str | Path | None, progress: Progress) -> CausalLMConfig:
    """Convert an LLM Foundry or Composer checkpoint to an llmfoundry checkpoint, without running its code or pickles.

    Args:
        source: a FILE.pt or its URL, or a sharded folder.
        out: the checkpoint to write; must not exist, or be empty.
        yaml: the training YAML, LLM Foundry's or llmfoundry's, with the checkpoint's `model`. None: the config stored
            in the checkpoint.
        progress: reports the bytes written.

    Returns:
        The model's config.

    Raises:
        ConfigError: if `source` is unusable, it stores no config and none is given, the model is not supported or does
            not match the config, or `out` is in use; nothing is left behind.
    """
    files = open_composer(Path(file_here(str(source))))
    found = find_model(files, yaml)
    specs = {
        name: Spec(found.source.specs[found.copies[name][0].source.name].dtype, shape)
        for name, shape in our_shapes(found.config).items()
    }
    with new_folder(out) as folder, TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) if write_tokenizer(files, Path(temporary)) else None
        write_ours(
            folder, out, found.config, specs, tokenizer, None, progress,
            lambda name, at, box: fill(box, at, found.copies[name], found.source),
        )  # fmt: skip
    return found.config


def find_model(files: ComposerFiles, yaml: str | Path | None = None) -> Found:
    """Find the model of a checkpoint; its weights are read later.

    Raises:
        ConfigError: as in `from_composer`.
    """
    if yaml is not None:
        model = load_yaml(yaml).get("model")
        if not isinstance(model, dict):
            raise ConfigError(f"{yaml}: has no `model`; name the YAML that trained the checkpoint")
        config = model_config(model, f"{yaml}: model")
        return Found(config, files, copies_from(files, config))
    settings = files.said("callbacks", SETTINGS, "model")
    if isinstance(settings, dict):
        config = model_config(dict(settings), f"{files.path}: model")
        return Found(config, files, copies_from(files, config))
    content = files.said(*_HUGGING_FACE, "model", "config", "content")
    if not isinstance(content, dict):
        raise ConfigError(f"{files.path}: stores no config of its model; name the YAML that trained it: --config YAML")
    family, config = read_config(content, f"{files.path}: config of the model")
    theirs = matched(files.path, family, config, files)
    return Found(theirs.config, theirs.source, theirs.copies)


def model_config(model: Tree, where: str) -> CausalLMConfig:
    """Convert a `model` block, LLM Foundry's or llmfoundry's, to a config.

    Raises:
        ConfigError: if it requests something that llmfoundry does not support.
    """
    data, notes = translate({"model": model, "save_folder": "none"})
    for note in notes:  # only debug: a stored config lists all of its defaults
        log.debug("%s", note)
    translated = data["model"]
    assert isinstance(translated, dict)
    config = check(ModelConfig, translated, where=where)
    if not isinstance(config, CausalLMConfig):
        raise ConfigError(f"{where}.name: {config.name} is not a causal language model of this framework")
    return config


def write_tokenizer(files: ComposerFiles, folder: Path) -> bool:
    """Write the tokenizer files that a checkpoint stores, if their names are known. Returns whether there were any.

    Raises:
        ConfigError: if a file has content of the wrong type.
    """
    stored = files.said(*_HUGGING_FACE, "tokenizer")
    written = False
    for name, about in stored.items() if isinstance(stored, dict) else ():
        if name in TOKENIZER_FILES and isinstance(about, dict):
            (folder / name).write_bytes(_content(about.get("content"), Path(name).suffix, f"{files.path}: {name}"))
            written = True
    return written


def _content(content: Plain, suffix: str, where: str) -> bytes:
    """Return the bytes of a file: JSON is stored parsed, text as lines."""
    if suffix == ".json":
        _fill_templates(content)
        return json.dumps(content, indent=2, ensure_ascii=False).encode()
    if suffix == ".txt" and isinstance(content, list):
        return "\n".join(map(str, content)).encode()
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, bytes):
        return content
    raise ConfigError(f"{where}: is stored as {type(content).__name__}, which is not a file's content")


def _fill_templates(content: Plain) -> None:
    """Restore what a sharded folder loses of a tokenizer.json: an empty mapping that `tokenizers` requires."""
    if isinstance(content, dict):
        if content.get("type") == "TemplateProcessing":
            content.setdefault("special_tokens", {})
        for inside in content.values():
            _fill_templates(inside)
    elif isinstance(content, list):
        for inside in content:
            _fill_templates(inside)
