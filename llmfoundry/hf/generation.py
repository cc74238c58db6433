"""Reading and writing of generation_config.json: the stop token ids and the sampling defaults of a model.

A chat model has more stop ids than the single end-of-text token of its tokenizer. So the file travels with the weights:
from the Hugging Face folder into a run, through every checkpoint, and into the export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.hf.family import ConfigDict, Value
from llmfoundry.strict_json import parse_json

GENERATION = "generation_config.json"
_IDS = "bos_token_id", "eos_token_id", "pad_token_id"


def read_generation(folder: Path) -> str | None:
    """Return the text of a folder's generation_config.json, or None if there is none.

    Raises:
        ConfigError: if the file cannot be read, or its token ids are malformed.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    token_ids(text, str(file))
    return text


def generation_of(said: Mapping[str, Value]) -> str | None:
    """Return a generation_config.json with the token ids of a config.json, or None if that names no end-of-text id."""
    if said.get("eos_token_id") is None:
        return None
    text = json.dumps({key: said[key] for key in _IDS if said.get(key) is not None}, indent=2) + "\n"
    token_ids(text, "config.json")
    return text


def stop_tokens(folder: Path) -> set[int]:
    """Return the stop token ids from a folder's generation_config.json; empty if there is none.

    Raises:
        ConfigError: as `read_generation`.
    """
    text = read_generation(folder)
    found = token_ids(text, str(folder / GENERATION)).get("eos_token_id") if text is not None else None
    return {each for each in (found if isinstance(found, list) else [found]) if isinstance(each, int)}


def special_tokens(generation: str | None, tokenizer: PreTrainedTokenizerBase | None) -> ConfigDict:
    """Return the token ids for config.json: the tokenizer's ids, and the further stop ids that `generation` lists."""
    found = token_ids(generation) if generation is not None else {}
    for key in _IDS:
        own = getattr(tokenizer, key, None)
        several = found.get(key)
        if own is not None and not (isinstance(several, list) and own in several):
            found[key] = own
    return {key: found.get(key) for key in _IDS}


def token_ids(text: str, where: str = GENERATION) -> ConfigDict:
    """Return the token ids in a generation_config.json; `eos_token_id` may be a list.

    Raises:
        ConfigError: if the text is not a JSON object, or an id is not an integer.
    """
    try:
        said = parse_json(text)
    except ValueError:
        raise ConfigError(f"{where}: is not valid JSON; remove it, or restore it") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{where}: must hold a mapping, found {type(said).__name__}")
    found = {key: said[key] for key in _IDS if said.get(key) is not None}
    for key, value in found.items():
        each = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in each):
            raise ConfigError(f"{where}: {key} must be a token id, or for eos_token_id a list of them, found {value!r}")
    return found
