"""Load tokenizers from other sources: none of their code runs, and any error becomes one line.

A tokenizer's folder may come from anywhere. `transformers` and `tokenizers` trust it, and fail with arbitrary
exceptions if it is damaged; a panic of their Rust code is not even an `Exception`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.runtime import asks_hub
from llmfoundry.strict_json import MOST_BYTES

_OTHERS = KeyboardInterrupt, SystemExit, GeneratorExit
_MESSAGE = 300  # characters of an error to show
_MOST_IDS = 2**24  # `tokenizers` counts up to the largest id to write a vocabulary: to 2**31 in 50 s and 8 GB
_TEXTS = (".json", ".txt", ".model", ".jinja")  # files that are read whole


def load_tokenizer(source: str | Path, where: str, **words: str | int | float | bool | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id.

    Args:
        source: a `Path` is a folder, for which the hub is not asked.
        where: prefix of error messages.
        words: arguments of `from_pretrained`.

    Raises:
        ConfigError: if the tokenizer was not found, needs code of its own, or is damaged.
    """
    local = isinstance(source, Path) or not asks_hub()
    if isinstance(source, Path) and source.is_dir():
        for file in source.iterdir():
            if not file.is_file() and not file.is_dir() and file.exists():  # reading a pipe would block
                raise ConfigError(f"{where}: {file.name} is not a plain file")
            if file.suffix in _TEXTS and file.is_file() and (size := file.stat().st_size) > MOST_BYTES:
                raise ConfigError(f"{where}: {file.name} has {size:,} bytes; {MOST_BYTES:,} is the most that is read")
    try:
        found = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, local_files_only=local, **words)
        _try_out(found)
        return found
    except BaseException as error:
        if isinstance(error, _OTHERS):
            raise
        why = " ".join(str(error).split())
        if "trust_remote_code" in why:
            raise ConfigError(
                f"{where}: the tokenizer needs its own code, which is never run; save it as a tokenizer.json"
            ) from None
        what = "cannot be loaded" if local else "neither a folder nor on the Hugging Face hub"
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"{where}: {what}: {kind}{why[:_MESSAGE]}") from None


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use the tokenizer once: settings of a wrong type fail only in use."""
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= _MOST_IDS:
        raise ValueError(f"has a token of id {largest}; {_MOST_IDS} is the most that is read")
    if tokenizer.is_fast:  # some tokenizers that can be read panic when they read their own output
        Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    tokenizer.decode(tokenizer.encode("a"))
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, dict) else [template or ""]:
        text.encode()
