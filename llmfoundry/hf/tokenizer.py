"""Finds, reads, copies and writes tokenizer files, without running code from a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmfoundry.atomic import os_error
from llmfoundry.config import ConfigError
from llmfoundry.data.tokenizer_files import load_tokenizer
from llmfoundry.hf import gguf
from llmfoundry.private import is_secret
from llmfoundry.strict_json import read_mapping

# The files of a tokenizer, as glob patterns; no code. Named chat templates have their own folder.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a tokenizer.

    Raises:
        OSError: if they cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # from a Rust library, which does not raise OSError
        found = os_error(error)
        if found is None or found is error:
            raise
        raise found from error


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer files, or write those of a GGUF file. Returns whether there were any."""
    if source.suffix == ".gguf":
        tokenizer = gguf.tokenizer_of(source)
        if tokenizer is not None:
            save_tokenizer(tokenizer, target)
        return tokenizer is not None
    found = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()]
    for file in found:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    return bool(found)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a folder or GGUF file, or None if there is none. Runs no code from the folder.

    Raises:
        ConfigError: if it is damaged, or needs custom code.
    """
    if folder.suffix == ".gguf":
        return gguf.tokenizer_of(folder)
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    ):
        return None
    return load_tokenizer(folder, f"{folder}: its tokenizer")


def name_for_transformers_4(folder: Path) -> None:
    """Rewrite an exported tokenizer_config.json so that both `transformers` 4 and 5 can read it.

    Version 5 writes a class that 4 does not have, and a list under `extra_special_tokens`, where 4 expects a mapping.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    try:
        said = read_mapping(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: is not valid JSON: {error}") from None
    for key in [key for key, value in said.items() if is_secret(key) and isinstance(value, str) and value[:1] != "<"]:
        del said[key]  # earlier versions saved secrets
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
