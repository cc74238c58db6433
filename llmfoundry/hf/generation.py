"""generation_config.json: the ids at which a text ends, and how a model likes to be sampled.

A chat model has more stop ids than the one end of text that its tokenizer names. So the file travels with the weights:
from Hugging Face's folder into ours, through every checkpoint of a run, and out again.
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
    """The generation_config.json of a folder, theirs or ours; None if it has none.

    Raises:
        ConfigError: the file cannot be read, or says no token ids where they belong.
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
    """A generation_config.json of the token ids in a config.json; None if it names no end of text."""
    if said.get("eos_token_id") is None:
        return None
    text = json.dumps({key: said[key] for key in _IDS if said.get(key) is not None}, indent=2) + "\n"
    token_ids(text, "config.json")
    return text


def stop_tokens(folder: Path) -> set[int]:
    """The ids that end a text, by the generation_config.json of a folder; none if it has none.

    Raises:
        ConfigError: as `read_generation`.
    """
    text = read_generation(folder)
    found = token_ids(text, str(folder / GENERATION)).get("eos_token_id") if text is not None else None
    return {each for each in (found if isinstance(found, list) else [found]) if isinstance(each, int)}


def special_tokens(generation: str | None, tokenizer: PreTrainedTokenizerBase | None) -> ConfigDict:
    """The token ids of a config.json: the tokenizer's; with its end of text go the others that `generation` names."""
    found = token_ids(generation) if generation is not None else {}
    for key in _IDS:
        own = getattr(tokenizer, key, None)
        several = found.get(key)
        if own is not None and not (isinstance(several, list) and own in several):
            found[key] = own
    return {key: found.get(key) for key in _IDS}


def token_ids(text: str, where: str = GENERATION) -> ConfigDict:
    """The token ids that a generation_config.json names; the end of text may be several.

    Raises:
        ConfigError: it is not a JSON object, or an id is not an integer.
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
