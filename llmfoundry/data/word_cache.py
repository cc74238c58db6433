"""Cache the token ids of words: the tokenizer's own ids, several times faster on one core.

A byte-level BPE cuts a text into words by a pattern and encodes each word alone, so a word has the same ids wherever it
occurs. Here the pattern cuts, a dictionary gives the ids, and the tokenizer's model encodes words that are not in it.
The patterns of GPT-2 (also GPT-NeoX, OLMo and the `bpe` trained here), Llama 3 and Qwen are known for texts in ASCII.
Other texts are cut only before a space and an ASCII letter, where each of these patterns starts a word. Other
tokenizers are not cached.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_IN_ASCII = ((r"[^\s\p{L}\p{N}]", r"[^ \t\n\v\f\rA-Za-z0-9]"), (r"\p{L}\p{N}", "A-Za-z0-9"), (r"\p{L}", "[A-Za-z]"),
             (r"\p{N}", "[0-9]"), (r"\s", r"[ \t\n\v\f\r]"), (r"\S", r"[^ \t\n\v\f\r]"))  # fmt: skip
_CUT = re.compile(r" [A-Za-z]")
_OTHER = re.compile(r"[^\x00-\x7f]+")
_LONG = 64  # maximum length of a cached word, in characters
_MOST = 2**20  # maximum number of cached words, about 150 MB
# The letters that byte-level BPE uses for UTF-8 bytes: printable bytes stand for themselves.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_BYTES = {byte: 256 + i for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


class _Ids(dict[str, bytes]):
    """The ids of words as uint32. A word that is not in the dictionary is encoded when it is looked up."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = array("I", self._encode(word)).tobytes()
        # The first words of a corpus are its most frequent ones, so a full cache is kept as it is.
        if len(word) <= _LONG and len(self) < _MOST:
            self[word] = ids
        return ids


class WordCache:
    """A tokenizer's ids, by word."""

    def __init__(self, tokenizer: Tokenizer, words: Callable[[str], list[str]]) -> None:
        parts = json.loads(tokenizer.to_str())
        self._tokenizer, self._words = tokenizer, words
        self._normalizes = parts["normalizer"] is not None
        # Tokens that may be spelled in a text are searched before it is cut into words.
        self._spelled = [token["content"] for token in parts["added_tokens"]
                         if not (token["special"] and tokenizer.encode_special_tokens)]  # fmt: skip
        self._model = tokenizer.model
        self._ids = _Ids(self._encode)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordCache | None:
        """Return the cache of a tokenizer; None if its pattern is not known."""
        parts = json.loads(tokenizer.to_str())
        pattern = _pattern_of(parts["pre_tokenizer"])
        known = pattern in (_GPT2, _LLAMA3, _QWEN) and parts["normalizer"] in (None, {"type": "NFC"})
        if pattern is None or not known or parts["model"]["type"] != "BPE" or parts["model"].get("dropout"):
            return None
        for unicode, ascii in _IN_ASCII:
            pattern = pattern.replace(unicode, ascii)
        return cls(tokenizer, re.compile(pattern).findall)

    def ids(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text."""
        look = self._ids.__getitem__
        return [np.frombuffer(b"".join(map(look, self._cut(text))), dtype=np.uint32) for text in texts]

    def _encode(self, word: str) -> list[int]:
        # The word may consist of several words.
        if not word.isascii() or (self._spelled and any(spelled in word for spelled in self._spelled)):
            return self._tokenizer.encode(word, add_special_tokens=False).ids
        return [token.id for token in self._model.tokenize(word.translate(_BYTES))]

    def _cut(self, text: str) -> list[str]:
        if any(spelled in text for spelled in self._spelled):
            return [text]
        if text.isascii():
            return self._words(text)
        return [text] if self._normalizes and self._spelled else self._mixed(text)

    def _mixed(self, text: str) -> list[str]:
        """Yield ASCII words and, between them, the stretches with other letters, each from one cut to the next."""
        found: list[str] = []
        done = 0
        for other in _OTHER.finditer(text):
            if other.start() < done:
                continue
            start = other.start()
            while (start := text.rfind(" ", done, start)) >= 0 and not _CUT.match(text, start):
                pass
            start = max(start, done)
            end = cut.start() if (cut := _CUT.search(text, other.end())) else len(text)
            found += self._words(text[done:start])
            found.append(text[start:end])
            done = end
        return found + self._words(text[done:])


def _pattern_of(pre_tokenizer: dict | None) -> str | None:
    """Return the pattern by which the pre-tokenizers of a byte-level BPE cut words."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if [step["type"] for step in steps] == ["ByteLevel"] and steps[0]["use_regex"]:
        return None if steps[0]["add_prefix_space"] else _GPT2
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, level = steps
    plain = split["behavior"] == "Isolated" and not split["invert"]
    plain &= not level["use_regex"] and not level["add_prefix_space"]
    return split["pattern"].get("Regex") if plain else None
