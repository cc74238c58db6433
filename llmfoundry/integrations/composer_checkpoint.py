"""Checkpoints of LLM Foundry and Composer as checkpoints of ours: which model one holds, its tokenizer, its weights.

What makes the model comes from a training YAML, from the settings that integrations/composer.py stores, or from the
Hugging Face config that Composer stores for the models of LLM Foundry (its MPT, and any family of hf/families).
Optimizer, schedule and random states stay behind.
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

SETTINGS = "LLMFoundrySettings"  # the callback of integrations/composer.py whose state is the config of the run
_HUGGING_FACE = ("integrations", "huggingface")


class Found(NamedTuple):
    """A model of ours in a checkpoint of theirs: what leads from `source` to each tensor."""

    config: CausalLMConfig
    source: TensorSource
    copies: Mapping[str, list[Copy]]


def from_composer(source: str | Path, out: Path, yaml: str | Path | None, progress: Progress) -> CausalLMConfig:
    """A checkpoint of LLM Foundry or Composer as one of ours; its code and pickled objects never run.

    Args:
        source: a FILE.pt or its URL, or a sharded folder.
        out: the checkpoint; must not exist, or be empty.
        yaml: the training YAML, in LLM Foundry's words or ours, whose `model` is the checkpoint's. None: the config
            that the checkpoint has stored.

    Returns:
        The model's config.

    Raises:
        ConfigError: what is wrong with `source`, it stores no config and none is named, the model is not supported or
            not that of the config, or `out` is in use; nothing is left of it.
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
    """The model of a checkpoint; its weights are read later.

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
    """A model in LLM Foundry's words, or ours, as a config.

    Raises:
        ConfigError: it asks for what this framework does not do.
    """
    data, notes = translate({"model": model, "save_folder": "none"})
    for note in notes:  # a stored config says all of its defaults
        log.debug("%s", note)
    translated = data["model"]
    assert isinstance(translated, dict)
    config = check(ModelConfig, translated, where=where)
    if not isinstance(config, CausalLMConfig):
        raise ConfigError(f"{where}.name: {config.name} is not a causal language model of this framework")
    return config


def write_tokenizer(files: ComposerFiles, folder: Path) -> bool:
    """Write the files of the tokenizer that a checkpoint stores, known names only; whether there were any.

    Raises:
        ConfigError: one has a content that its name does not allow.
    """
    stored = files.said(*_HUGGING_FACE, "tokenizer")
    written = False
    for name, about in stored.items() if isinstance(stored, dict) else ():
        if name in TOKENIZER_FILES and isinstance(about, dict):
            (folder / name).write_bytes(_content(about.get("content"), Path(name).suffix, f"{files.path}: {name}"))
            written = True
    return written


def _content(content: Plain, suffix: str, where: str) -> bytes:
    """The bytes of a file: JSON is stored parsed, text as lines."""
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
    """Put back what a sharded folder loses of a tokenizer.json: an empty mapping, which `tokenizers` insists on."""
    if isinstance(content, dict):
        if content.get("type") == "TemplateProcessing":
            content.setdefault("special_tokens", {})
        for inside in content.values():
            _fill_templates(inside)
    elif isinstance(content, list):
        for inside in content:
            _fill_templates(inside)
